"""Mean and standard deviation of each latent channel: computed once, exactly, and with the checkpoint ever after."""

import json
import pathlib
import re
import signal
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, read_metrics
from diffusers import AutoencoderKL
from processes import Script, run
from test_data import write_images
from test_extract_latents import arguments, contents, flip_byte

from data.cached import channel_statistics, channel_sums
from data.sources import open_source
from sampling.draw import SampleSettings, generate
from sampling.pipeline import load_pipeline
from training.resume import Start
from training.setup import initial_weights, resolve_config
from utils.checkpoint import read_state
from vae import LatentSpace

FACTORS, OFFSETS = torch.tensor([0.2, 5.0, 1.0, 0.5]), torch.tensor([3.0, 0.0, -40.0, 0.1])
FLAGS = [flag for pair in zip(TINY[::2], TINY[1::2], strict=True) for flag in pair if pair[0] not in ("--vae",)]
FLAGS = [FLAGS[:1], FLAGS[2:]]  # around the data's path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "train", {"cat": [(16, 16)] * 12, "dog": [(20, 17)] * 11})


@pytest.fixture(scope="module")
def vaes(small_vae, tmp_path_factory):
    """Two autoencoders: the second's latents are those of the first, each channel scaled and shifted."""
    first, second = pathlib.Path(small_vae(scaling_factor=0.7)), tmp_path_factory.mktemp("scaled")
    model = AutoencoderKL.from_pretrained(first)
    with torch.no_grad():
        model.quant_conv.weight[:4] *= 6  # means that spread as much as the posteriors' samples
        model.save_pretrained(first)
        model.quant_conv.weight[:4] *= FACTORS[:, None, None, None]
        model.quant_conv.bias[:4] = model.quant_conv.bias[:4] * FACTORS + OFFSETS
        model.quant_conv.bias[4:] += 2 * FACTORS.log()  # the logarithm of the variance
        weight = model.post_quant_conv.weight[:, :, 0, 0] / FACTORS
        model.post_quant_conv.bias -= weight @ OFFSETS
        model.post_quant_conv.weight[:] = weight[:, :, None, None]
    model.save_pretrained(second)
    return first, second


def extract(images, vae, folder, *more, **how):
    result = run(*arguments(images, vae, folder), "--channel-statistics", *more, **how)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def caches(images, vaes, tmp_path_factory):
    return [extract(images, vae, tmp_path_factory.mktemp("latents")) for vae in vaes]


@pytest.fixture(scope="module")
def plain(images, vaes, tmp_path_factory):
    """Latents of the first autoencoder without statistics."""
    folder = tmp_path_factory.mktemp("plain")
    result = run(*arguments(images, vaes[0], folder))
    assert result.returncode == 0, result.stderr
    return folder


def train(data, folder, *more):
    result = run("train.py", *FLAGS[0], data, *FLAGS[1], "--output-dir", folder, *more)
    assert result.returncode == 0, result.stderr
    return [line["loss"] for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def runs(caches, tmp_path_factory):
    """Runs on the latents of both autoencoders, with their loss curves."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("first", "second")]
    return [(folder, train(cache, folder, "--max-steps", 4)) for cache, folder in zip(caches, folders, strict=True)]


def stored_moments(folder):
    shards = sorted(folder.glob("*.safetensors"))
    return torch.cat([safetensors.torch.load_file(path)["moments"] for path in shards]).double()


def test_the_manifest_has_mean_and_deviation_of_sampled_latents(caches, plain, vaes):
    """var = E[std^2] + Var(mean), over all images and mirror images; the shards are those without statistics."""
    mean, std = stored_moments(caches[0]).unbind(2)
    expected_mean = mean.mean((0, 1, 3, 4))
    expected_std = ((std**2).mean((0, 1, 3, 4)) + mean.var((0, 1, 3, 4), correction=0)).sqrt()
    manifest = json.loads((caches[0] / "manifest.json").read_text())
    np.testing.assert_allclose(manifest["shift"], expected_mean, rtol=1e-12)
    np.testing.assert_allclose(manifest["scale"], 1 / expected_std, rtol=1e-12)

    # What training draws has mean 0 and standard deviation 1 in each channel.
    source = open_source(str(caches[1]))
    space = LatentSpace(str(vaes[1]), "cpu", scale=source.scale, shift=source.shift)
    torch.manual_seed(0)
    moments = stored_moments(caches[1]).flatten(0, 1).float().repeat(20, 1, 1, 1, 1)
    drawn = space.sample(moments).transpose(0, 1).flatten(1)
    torch.testing.assert_close(drawn.mean(1), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(1), torch.ones(4), atol=0.02, rtol=0)

    without = contents(plain)
    assert all(contents(caches[0])[name] == without[name] for name in without if name.endswith(".safetensors"))
    manifest = json.loads(without["manifest.json"])
    assert (manifest["scale"], manifest["shift"]) == (0.7, 0.0)
    assert "channel_statistics" not in manifest and not any("sums" in shard for shard in manifest["shards"])


def test_neither_ranks_nor_kills_nor_damage_change_a_byte(caches, images, vaes, tmp_path):
    expected = contents(caches[0])
    assert contents(extract(images, vaes[0], tmp_path / "two", processes=2)) == expected
    script = Script(*arguments(images, vaes[0], tmp_path / "killed"), "--channel-statistics")
    while not list((tmp_path / "killed").glob("*.safetensors")) and script.alive():
        time.sleep(0.002)
    script.signal(signal.SIGKILL)
    script.wait()
    final = contents(extract(images, vaes[0], tmp_path / "killed"))
    assert {name: content for name, content in final.items() if not name.endswith(".partial")} == expected
    flip_byte(tmp_path / "two" / "shard-00001.safetensors")
    assert contents(extract(images, vaes[0], tmp_path / "two")) == expected
    result = run(*arguments(images, vaes[0], caches[0]))
    assert result.returncode == 2 and "made with channel_statistics True" in result.stderr


def test_the_order_of_shards_changes_nothing_and_constant_channels_are_shifted_alone():
    torch.manual_seed(0)
    moments = torch.rand(40, 2, 2, 3, 4, 4) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    moments[:, :, 0, 2], moments[:, :, 1, 2] = 1234.567, 0.0
    parts = [channel_sums(part) for part in moments.split(7)]
    scaling, constant = channel_statistics(parts)
    assert (scaling, constant) == channel_statistics(parts[::-1]) and constant == [2]
    assert scaling["scale"][2] == 1 and scaling["shift"][2] == pytest.approx(1234.567)
    whole, _ = channel_statistics([channel_sums(moments)])
    for key in scaling:
        np.testing.assert_allclose(scaling[key], whole[key], rtol=1e-12)
    assert channel_statistics([channel_sums(moments[:0]), *parts]) == (scaling, constant)
    moments[3, 0, 0, 1, 0, 0] = 1e5
    with pytest.raises(ValueError, match="not finite, or too large for --dtype float16"):
        channel_sums(moments.half())


def test_latents_scaled_by_channel_train_and_sample_as_the_normalised_ones(runs, caches, vaes):
    """The network is given the same numbers, to rounding: so are its losses, its samples and its likelihoods."""
    first, second = (open_source(str(folder)) for folder in caches)
    np.testing.assert_allclose(np.divide(first.scale, second.scale), FACTORS, rtol=1e-4)
    np.testing.assert_allclose(*[losses for _, losses in runs], rtol=2e-4)
    assert read_state(runs[1][0] / "checkpoint-4")["latents"]["scale"] == second.scale
    pictures, bits = [], []
    for (folder, _), cache in zip(runs, caches, strict=True):
        pipeline = load_pipeline(str(folder), torch.device("cpu"))
        settings = SampleSettings(solver={"sampling_method": "euler", "num_steps": 4})
        pictures.append(generate(pipeline, [0, 1] * 4, settings, show_progress=False)[0].numpy().astype(int))
        flags = ["--sampling-method", "euler", "--num-sampling-steps", 3, "--num-examples", 8]
        result = run("likelihood.py", "--ckpt", folder, "--data-path", cache, *flags)
        assert result.returncode == 0 and "scale and shift" not in result.stdout, result.stderr
        bits.append(float(re.search(r"dimension (\S+)", result.stdout)[1]))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and bits[0] == pytest.approx(bits[1], abs=2e-3)


@pytest.mark.parametrize("damage", [{"scale": [1.0, 2.0, float("nan"), 1.0]}, {"latent_size": [8, 4]}])
def test_a_damaged_manifest_is_named(damage, caches, tmp_path):
    manifest = json.loads((caches[0] / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | damage))
    with pytest.raises(ValueError, match=f"manifest.json is damaged .*: {next(iter(damage))} is"):
        open_source(str(tmp_path))


def test_a_likelihood_takes_the_models_statistics_and_says_so(runs, images, vaes, plain):
    """From a cache with the autoencoder's own scale, the same bits."""
    flags = ["--sampling-method", "euler", "--num-sampling-steps", 3, "--num-examples", 8]
    cached = [run("likelihood.py", "--ckpt", runs[0][0], "--data-path", plain, *flags)]
    cached.append(run("likelihood.py", "--ckpt", runs[0][0], "--data-path", images, "--vae", vaes[0], *flags))
    lines = [re.search(r"dimension \S+", result.stdout)[0] for result in cached]
    assert lines[0] == lines[1] and "are not those of the training, which are taken" in cached[0].stdout


def test_a_run_keeps_its_scale_and_shift(runs, caches, images, vaes, plain):
    """Resumed on other data, a run goes on with its own; weights that start a run have a line for other ones."""
    transport = {"path_type": "Linear", "prediction": "velocity"}

    def config(data, resumed=None, **more):
        source = open_source(str(data))
        return resolve_config(source, "SiT-S/2", {}, more, transport, str(vaes[0]), resumed=resumed), source

    with_statistics, without = (config(data)[0] for data in (caches[0], plain))
    assert "scale" not in without["latents"] and isinstance(with_statistics["latents"]["scale"], list)
    for data, more in ((plain, {}), (images, {"image_size": 16})):
        resumed, source = config(data, with_statistics, **more)
        assert resumed["latents"] == with_statistics["latents"] and "those of the run until now" in source.notes[-1]
    assert config(caches[0], with_statistics)[1].notes == [] and source is not None
    resumed, source = config(caches[0], without)
    assert resumed["latents"] == without["latents"] and source.scale is None
    space = LatentSpace(str(vaes[0]), "cpu", scale=source.scale, shift=source.shift)
    assert (space.scale, space.shift) == (0.7, 0.0)
    options = {"latents": with_statistics["latents"], "model": read_state(runs[0][0] / "checkpoint-4")["model"]}
    for run_folder, is_other in ((runs[0][0], False), (runs[1][0], True)):
        _, notes = initial_weights(with_statistics | options, 0, str(run_folder), Start())
        assert any("latents of other scale and shift" in note for note in notes) == is_other
