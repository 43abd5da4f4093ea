"""extract_latents.py, and training from what it writes."""

import json
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from diffusers import AutoencoderKL
from processes import Script, run
from test_command_line import fail
from test_data import bad_folder, write_images

from data.images import ImageDataset
from data.loader import GlobalBatchSampler, make_loader
from data.sources import open_source
from utils.files import VERDICTS
from vae import LatentSpace

SIZES = {"cat": [(20, 17)] * 9, "dog": [(16, 40)] * 8, "fox": [(16, 16), (33, 31)] * 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "train", SIZES)


@pytest.fixture(scope="module")
def vae(small_vae):
    return small_vae(scaling_factor=0.7, shift_factor=0.2)


def arguments(images, vae, output):
    flags = ["--image-size", 16, "--batch-size", 4, "--shard-size", 5, "--num-workers", 0, "--dtype", "float32"]
    return ["extract_latents.py", "--data-path", images, "--vae", vae, "--output", output, *flags]


@pytest.fixture(scope="module")
def cached(images, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    result = run(*arguments(images, vae, folder))
    assert result.returncode == 0, result.stderr
    assert "23 images" in result.stdout and "images/s, 0 left out" in result.stdout
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != VERDICTS}


def test_shards_hold_the_posteriors_of_images_and_mirror_images(images, vae, cached):
    latent_data = open_source(str(cached))
    source = open_source(str(images))
    model = AutoencoderKL.from_pretrained(vae)
    pixels = ImageDataset(source, 16, 3)
    assert len(latent_data) == len(pixels) == 23 and latent_data.num_classes == 3
    for index in range(23):
        for flip in (False, True):
            item, image = latent_data[index, flip], pixels[index, flip]
            with torch.no_grad():
                posterior = model.encode(image["images"][None]).latent_dist
            expected = torch.cat([posterior.mean, posterior.std])
            torch.testing.assert_close(item.pop("moments"), expected, atol=1e-5, rtol=1e-4)
            assert item == {"y": image["y"], "problems": []}


def test_training_from_latents_is_training_from_images(images, vae, cached, tmp_path):
    """Flips and posterior noise belong to the place in the global batch, so even the loss curves agree."""
    flags = [*TINY, "--max-steps", 4, "--sample-every", 4]
    result = run(
        "train.py", *flags, "--data-path", images, "--vae", vae, "--image-size", 16, "--output-dir", tmp_path / "a"
    )
    assert result.returncode == 0, result.stderr
    position = flags.index("--vae")
    flags = flags[:position] + flags[position + 2 :]
    result = run("train.py", *flags, "--data-path", cached, "--num-workers", 2, "--output-dir", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    curves = [[line["loss"] for line in read_metrics(tmp_path / run_folder)] for run_folder in ("a", "b")]
    np.testing.assert_allclose(*curves, atol=1e-5)
    states = [json.loads((tmp_path / f / "checkpoint-4/trainer_state.json").read_text()) for f in ("a", "b")]
    assert states[0]["latents"] == states[1]["latents"] and states[0]["model"] == states[1]["model"]
    assert (tmp_path / "b" / "samples" / "0000004.png").is_file()


def test_cached_latents_can_be_sent_to_worker_processes(cached):
    latent_data = open_source(str(cached))
    expected = latent_data[11, True]["moments"]
    assert torch.equal(pickle.loads(pickle.dumps(latent_data))[11, True]["moments"], expected)


def test_draws_have_the_posteriors_mean_and_deviation(cached, vae):
    latent_data = open_source(str(cached))
    space = LatentSpace(str(vae), "cpu", scale=latent_data.scale, shift=latent_data.shift)
    moments = latent_data[3, True]["moments"]
    draws = space.sample(moments.expand(4000, *moments.shape))
    mean, std = moments
    torch.testing.assert_close(draws.mean(0), (mean - 0.2) * 0.7, atol=0.06, rtol=0.05)
    torch.testing.assert_close(draws.std(0), std * 0.7, atol=0.01, rtol=0.1)


def test_two_ranks_write_the_same_bytes(images, vae, cached, tmp_path):
    result = run(*arguments(images, vae, tmp_path / "two"), processes=2)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "two") == contents(cached)


def test_a_killed_extraction_continues_to_the_same_bytes(images, vae, cached, tmp_path):
    folder = tmp_path / "killed"
    script = Script(*arguments(images, vae, folder))
    while not list(folder.glob("*.safetensors")) and script.alive():
        time.sleep(0.002)
    script.signal(signal.SIGKILL)
    script.wait()
    survivors = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    result = run(*arguments(images, vae, folder))
    assert result.returncode == 0, result.stderr
    final = {name: content for name, content in contents(folder).items() if not name.endswith(".partial")}
    assert final == contents(cached)
    assert survivors and all((folder / name).stat().st_mtime_ns == stamp for name, stamp in survivors.items())


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard_is_written_again(finished, images, vae, cached, tmp_path):
    """Extraction, run again, compares shards with what it recorded when it wrote them."""
    for name, content in contents(cached).items():
        (tmp_path / name).write_bytes(content)
    shards = json.loads((cached / "manifest.json").read_text())["shards"]
    if not finished:
        (tmp_path / "manifest.json").unlink()
        for k, shard in enumerate(shards):
            (tmp_path / f"shard-{k:05d}.json").write_text(json.dumps(shard))
    flip_byte(tmp_path / "shard-00002.safetensors")
    (tmp_path / ".settings.json.partial").write_text("{")  # what a kill can leave
    result = run(*arguments(images, vae, tmp_path))
    assert result.returncode == 0, result.stderr
    assert "shard-00002.safetensors is damaged" in result.stdout and "it is written again" in result.stdout
    assert "5 images in" in result.stdout
    (tmp_path / ".settings.json.partial").unlink()
    assert contents(tmp_path) == contents(cached)


def test_other_settings_or_other_data_are_refused(vae, tmp_path):
    """Another label column, or as many other files, would silently mix two data sets."""
    images = write_images(tmp_path / "images", {"a": [(16, 16)] * 3, "b": [(16, 16)] * 3})
    assert run(*arguments(images, vae, tmp_path / "out")).returncode == 0
    for flags in (["--label-key", "other"], ["--image-key", "other"]):
        result = run(*arguments(images, vae, tmp_path / "out"), *flags)
        assert result.returncode == 2 and "made with" in result.stderr
    (images / "a" / "0.png").rename(images / "b" / "9.png")
    result = run(*arguments(images, vae, tmp_path / "out"))
    assert result.returncode == 2 and "made with names_and_labels" in result.stderr


def test_cropped_images_are_stored_on_request(images, vae, cached, tmp_path):
    """For losses that read them beside the latents: the pixels that training on images reads, to the bit."""
    with pytest.raises(ValueError, match="stores no images; .*--keep-images"):
        open_source(str(cached)).require_images()
    result = run(*arguments(images, vae, tmp_path), "--keep-images")
    assert result.returncode == 0, result.stderr
    latents, plain, pixels = (
        open_source(str(tmp_path)),
        open_source(str(cached)),
        ImageDataset(open_source(str(images)), 16, 3),
    )
    assert torch.equal(latents[3, True]["moments"], plain[3, True]["moments"]) and "images" not in latents[3, True]
    latents.require_images()
    for index in (0, 4, 5, 22):
        for flip in (False, True):
            assert torch.equal(latents[index, flip]["images"], pixels[index, flip]["images"])
    sampler = GlobalBatchSampler(23, 6, 6, seed=0, rank=0, world_size=1, mirror=True)
    batch = next(make_loader(latents, sampler, 0, torch.device("cpu")))
    assert batch["images"].shape == (6, 3, 16, 16) and batch["moments"].shape == (6, 2, 4, 8, 8)
    result = run(*arguments(images, vae, tmp_path))
    assert result.returncode == 2 and "made with keep_images True" in result.stderr
    result = run(*arguments(images, vae, cached), "--keep-images")
    assert result.returncode == 2 and "made with keep_images None, not True" in result.stderr


def test_digits_are_not_mirrored_from_latents_either(vae, tmp_path):
    script = arguments("digits", vae, tmp_path)
    script[script.index("--shard-size") + 1] = 2000
    script[script.index("--batch-size") + 1] = 256
    script[script.index("--image-size") + 1] = 8
    result = run(*script)
    assert result.returncode == 0, result.stderr
    assert open_source(str(tmp_path)).mirrors is False


@pytest.mark.parametrize(
    "change", [{"shards": []}, {"scale": "x"}, {"shift": [0.0]}, {"latent_size": 0}, {"num_classes": None}]
)
def test_a_manifest_that_makes_no_sense_is_named(change, cached, tmp_path):
    for name, content in contents(cached).items():
        (tmp_path / name).write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json"):
        open_source(str(tmp_path))


def test_damaged_shards_are_left_out_on_request(cached, tmp_path):
    for name, content in contents(cached).items():
        (tmp_path / name).write_bytes(content)
    flip_byte(tmp_path / "shard-00001.safetensors")
    flags = [*TINY, "--data-path", tmp_path, "--max-steps", 1]
    flags = [flag for flag in flags if flag not in ("--vae", "none")]
    result = run("train.py", *flags, "--output-dir", tmp_path / "a")
    assert result.returncode == 2 and "shard-00001.safetensors is damaged" in result.stderr
    result = run("train.py", *flags, "--output-dir", tmp_path / "b", "--skip-bad-images")
    assert result.returncode == 0, result.stderr
    assert "left out" in result.stdout and "shard-00001.safetensors is damaged" in result.stdout
    assert read_metrics(tmp_path / "b")[-1]["bad_images"] == 1
    latent_data = open_source(str(tmp_path), skip_bad_images=True)
    whole = open_source(str(cached))
    assert len(latent_data) == 18
    assert torch.equal(latent_data[5, False]["moments"], whole[10, False]["moments"])


@pytest.mark.parametrize("damage", ["flipped byte", "shorter", "missing", "manifest"])
def test_damage_is_named(damage, cached, tmp_path):
    for name, content in contents(cached).items():
        (tmp_path / name).write_bytes(content)
    shard = tmp_path / "shard-00002.safetensors"
    if damage == "flipped byte":
        flip_byte(shard)
    elif damage == "shorter":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    else:
        (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="manifest.json is damaged" if damage == "manifest" else "shard-00002"):
        open_source(str(tmp_path))


def test_bad_images_stop_extraction_or_are_left_out(vae, tmp_path):
    folder = bad_folder(tmp_path / "images")
    result = run(*arguments(folder, vae, tmp_path / "latents"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "a/1.png" in result.stderr
    result = run(*arguments(folder, vae, tmp_path / "latents"), "--skip-bad-images")
    assert result.returncode == 0, result.stderr
    assert "2 left out" in result.stdout and result.stdout.count("left out") == 3 and "a/1.png" in result.stdout
    latent_data = open_source(str(tmp_path / "latents"))
    assert [latent_data[i, False]["y"] for i in range(len(latent_data))] == [0, 0, 1, 1, 1]


def test_mistakes(images, vae, cached, tmp_path, capsys, monkeypatch):
    def message(*more, output=tmp_path / "new", path=images):
        _, *flags = arguments(path, vae, output)
        return fail("extract_latents", [*flags, *more], capsys, monkeypatch)

    assert "made with image_size 16, not 32" in message("--image-size", 32, output=cached)
    assert "is not empty" in message(output=images)
    assert "must be a multiple of 2" in message("--image-size", 15)
    assert "--vae none encodes nothing" in message("--vae", "none")
    assert "holds cached latents already" in message(path=cached)
    assert not (tmp_path / "new").exists()
    flags = [flag for flag in TINY if flag not in ("--vae", "none")]
    sizes = ["--image-size", 32], ["--input-size", 16], ["--input-size", "8x16"]
    for given in (*sizes, ["--vae", "mse"], ["--num-classes", 4], ["--num-classes", 2]):
        error = fail(
            "train", [*flags, "--data-path", cached, *given, "--output-dir", tmp_path / "r"], capsys, monkeypatch
        )
        assert "contradicts the cached latents" in error
