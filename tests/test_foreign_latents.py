"""Latents that other projects cached, each written here as that project writes it, and used as that project uses it.

| cache | its x1 | autoencoder | flips |
|---|---|---|---|
| LightningDiT: shards of safetensors, latents_stats.pt | (latent - mean) / std, per channel | unknown: --vae | yes |
| REPA: vae-sd, a folder or zip of .npy moments, dataset.json | (mean + std noise) 0.18215 | sd-vae-ft-mse | no |
| fast-DiT: NAME_features and NAME_labels, .npy | as stored | sd-vae-ft-ema | no |
| EDM2's moments, of images in [0, 1] | - | refused, unless --vae says that they are REPA's | - |
"""

import io
import json
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import TINY
from processes import run
from safetensors.torch import save_file

from data.labelled import match_classes
from data.sources import open_source
from sampling.pipeline import load_pipeline
from training.setup import SIZE_FLAGS, open_training_space, resolve_config, resolve_flips
from vae import LatentSpace

NUMBERS = np.random.default_rng(0)


def lightning(folder, counts=(3, 2), channels=32, side=4, flip=True, statistics=True):
    """Write LightningDiT's shards of random latents into a folder; the labels are 0, 1, 2, ... Return all tensors."""
    folder.mkdir()
    parts, first = [], 0
    for shard, count in enumerate(counts):
        part = {
            "latents": torch.randn(count, channels, side, side) * 3 + 1,
            "labels": torch.arange(first, first + count),
        }
        part |= {"latents_flip": torch.randn(count, channels, side, side)} if flip else {}
        save_file(part, folder / f"latents_rank00_shard{shard:03d}.safetensors", metadata={"total_size": str(count)})
        parts.append(part)
        first += count
    if statistics:
        shape = 1, channels, 1, 1
        torch.save({"mean": torch.randn(shape), "std": 1 + torch.rand(shape)}, folder / "latents_stats.pt")
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def repa(folder, labels=(2, 0, 1), mean=0.0, channels=4):
    """Write moments as REPA's and EDM2's dataset_tool.py encode does. Return them, (N, 2C, 4, 4)."""
    moments = NUMBERS.normal(size=(len(labels), 2 * channels, 4, 4)).astype(np.float32)
    moments[:, :channels] += np.reshape(mean, (-1, 1, 1))
    moments[:, channels:] = np.abs(moments[:, channels:])
    names = [f"{i // 2:05d}/img-mean-std-{i:08d}.npy" for i in range(len(labels))]
    for name, array in zip(names, moments, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(npy(array))
    table = {"labels": [list(pair) for pair in zip(names, labels, strict=True)]}
    (folder / "dataset.json").write_text(json.dumps(table))
    return moments


def fast_dit(folder, labels=(1, 0, 3)):
    """Write samples as fast-DiT's extract_features.py does. Return them and the labels in the order of their names."""
    samples = {f"{i}.npy": NUMBERS.normal(size=(1, 4, 4, 4)).astype(np.float32) for i in range(len(labels))}
    for (name, sample), label in zip(samples.items(), labels, strict=True):
        for part, array in (("features", sample), ("labels", np.array([label]))):
            (folder / f"imagenet256_{part}").mkdir(parents=True, exist_ok=True)
            (folder / f"imagenet256_{part}" / name).write_bytes(npy(array))
    order = sorted(range(len(labels)), key=lambda i: f"{i}.npy")
    return np.concatenate([samples[f"{i}.npy"] for i in order]), [labels[i] for i in order]


def config_of(latents, vae=None, **sizes):
    return resolve_config(latents, "SiT-S/2", {"patch_size": 2}, sizes, {}, vae)


def x1_and_labels(latents, noise=None, flip=False):
    """What training computes of all latents, after a trip to a worker process: scaled samples, and labels."""
    config = config_of(latents)
    latents = pickle.loads(pickle.dumps(latents))
    items = [latents[i, flip] for i in range(len(latents))]
    assert not any(item["problems"] for item in items)
    space = open_training_space(config, latents, torch.device("cpu"), "fp32", decodes=False, losses=[])
    moments = torch.stack([item["moments"] for item in items])
    noise = torch.zeros_like(moments[:, 0]) if noise is None else noise
    return space.sample(moments, noise), [item["y"] for item in items]


def test_lightningdits_latents_are_normalised_by_its_statistics(tmp_path):
    stored = lightning(tmp_path / "latents")
    statistics = torch.load(tmp_path / "latents" / "latents_stats.pt", weights_only=True)
    latents = open_source(str(tmp_path / "latents"))
    assert latents.mirrors and latents.num_examples == 5 and latents.num_classes == 5
    for key, flip in (("latents", False), ("latents_flip", True)):
        x1, labels = x1_and_labels(latents, noise=torch.randn(5, 32, 4, 4), flip=flip)  # std is 0: noise adds nothing
        torch.testing.assert_close(x1, (stored[key] - statistics["mean"]) / statistics["std"], rtol=1e-5, atol=1e-5)
        assert labels == [0, 1, 2, 3, 4]
    config = config_of(latents, image_size=64, num_classes=1000)
    assert config["latents"]["image_size"] == 64 and config["model"]["num_classes"] == 1000
    assert config["model"]["in_channels"] == 32 and config["model"]["input_size"] == 4
    torch.testing.assert_close(torch.tensor(config["latents"]["shift"]), statistics["mean"].flatten())
    torch.testing.assert_close(1 / torch.tensor(config["latents"]["scale"]), statistics["std"].flatten())


def test_without_statistics_they_are_those_of_the_latents(tmp_path):
    stored = lightning(tmp_path / "latents", flip=False, statistics=False)["latents"]
    latents = open_source(str(tmp_path / "latents"))
    assert not latents.mirrors and "latents_stats.pt is missing" in latents.notes[0]
    mean, std = (getattr(stored, name)(dim=(0, 2, 3), keepdim=True) for name in ("mean", "std"))
    torch.testing.assert_close(x1_and_labels(latents)[0], (stored - mean) / std, rtol=1e-4, atol=1e-4)


def test_a_run_keeps_its_statistics_when_the_data_grow(tmp_path):
    lightning(tmp_path / "latents", statistics=False)
    before = config_of(open_source(str(tmp_path / "latents")))
    lightning(tmp_path / "more", counts=(4,), statistics=False)
    (tmp_path / "more" / "latents_rank00_shard000.safetensors").rename(tmp_path / "latents" / "more.safetensors")
    for resumed, count in (None, 0), (before, 1):
        source = open_source(str(tmp_path / "latents"))
        config = resolve_config(source, "SiT-S/2", {"patch_size": 2}, {}, {}, resumed=resumed)
        assert (config["latents"] == before["latents"]) == (count == 1)
        assert (source.scale, source.shift) == (config["latents"]["scale"], config["latents"]["shift"])
        assert len([note for note in source.notes if "of the run until now" in note]) == count


def test_repas_moments(tmp_path):
    moments = torch.from_numpy(repa(tmp_path / "data" / "vae-sd"))
    with zipfile.ZipFile(tmp_path / "vae-sd.zip", "w") as archive:
        for path in (tmp_path / "data" / "vae-sd").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path / "data" / "vae-sd"))
    (tmp_path / "data" / "images").mkdir()
    mean, std = moments.chunk(2, dim=1)
    noise = torch.randn_like(mean)
    for path in ("data", "data/vae-sd", "vae-sd.zip"):
        latents = open_source(str(tmp_path / path))
        x1, labels = x1_and_labels(latents, noise)
        torch.testing.assert_close(x1, (mean + std * noise) * 0.18215)
        assert labels == [2, 0, 1] and not latents.mirrors and config_of(latents)["latents"]["vae"] == "mse"
        assert config_of(latents)["latents"]["image_size"] == 32
        assert any("passed over" in note for note in latents.notes) == (path == "data")


def test_logarithms_of_variances_are_no_standard_deviations(tmp_path):
    repa(tmp_path / "vae-sd")
    assert open_source(str(tmp_path / "vae-sd")).notes == []
    path = sorted((tmp_path / "vae-sd").rglob("*.npy"))[1]
    np.save(path, np.load(path) - 5)
    (note,) = open_source(str(tmp_path / "vae-sd")).notes
    assert "standard deviations below 0" in note


def test_edm2s_moments_are_not_taken_for_repas(tmp_path):
    repa(tmp_path, mean=[5.81, 3.25, 0.12, -2.15], labels=(0,) * 8)
    latents = open_source(str(tmp_path))
    with pytest.raises(ValueError, match="look like EDM2's"):
        config_of(latents)
    match_classes(latents, None, 1, "it")  # as likelihood.py does
    assert any("look like EDM2's" in note for note in latents.notes)
    assert config_of(latents, "mse")["latents"]["scale"] == 0.18215


def test_fast_dits_samples(tmp_path):
    stored, right = fast_dit(tmp_path, labels=range(12))
    stored = torch.from_numpy(stored)
    assert right[:4] == [0, 1, 10, 11]
    for path in (tmp_path, tmp_path / "imagenet256_features"):
        latents = open_source(str(path))
        x1, labels = x1_and_labels(latents, noise=torch.randn_like(stored))
        torch.testing.assert_close(x1, stored, rtol=1e-6, atol=1e-6)
        assert labels == right and latents.num_classes == 12
        assert config_of(latents)["latents"] == dict(vae="ema", image_size=32, channels=4, scale=0.18215, shift=0.0)


def test_flags_must_fit(tmp_path, small_vae):
    lightning(tmp_path / "lightning", channels=4)
    fast_dit(tmp_path / "fast")
    four, fast = (open_source(str(tmp_path / name)) for name in ("lightning", "fast"))
    vae, wide = str(small_vae(latent_channels=4)), str(small_vae(latent_channels=8))
    assert config_of(four, vae)["latents"] | {"scale": 0, "shift": 0} == dict(
        vae=vae, image_size=8, channels=4, scale=0, shift=0
    )
    wrong = [
        (four, "none", {}, r"--vae none makes pixels.*\.safetensors.*4 channels"),
        (fast, "none", {}, r"--vae none makes pixels.*\.npy.*4 channels"),
        (four, wide, {}, "8 channels"),
        (four, vae, {"image_size": 16}, "it must be 8, 2 times"),
        (fast, None, {"image_size": 256}, "it must be 32, 8 times"),
        (fast, None, {"num_classes": 3}, "labels up to 3"),
        (fast, None, {"in_channels": 3}, "--in-channels 3"),
    ]
    for latents, name, sizes, words in wrong:
        with pytest.raises(ValueError, match=words):
            config_of(open_source(latents.folder), name, **sizes)
    with pytest.raises(ValueError, match="it must be a multiple of their side, 4"):
        config_of(open_source(four.folder), image_size=30)
    with pytest.raises(ValueError, match="--horizontal-flip"):
        resolve_flips(fast, True)
    assert [resolve_flips(latents, None) for latents in (four, fast)] == [True, False] and resolve_flips(four, True)
    with pytest.raises(ValueError, match="stores no images"):
        fast.require_images()
    with pytest.raises(ValueError, match="no effect"):
        open_source(fast.folder, split="val")
    assert set(SIZE_FLAGS) >= {"image_size", "num_classes"}


def test_an_unknown_autoencoder_is_needed_only_to_decode(tmp_path):
    lightning(tmp_path / "latents")
    latents = open_source(str(tmp_path / "latents"))
    config = config_of(latents)
    assert config["latents"]["image_size"] == 64  # VA-VAE's downsampling of 16
    assert "do not name their VAE; to decode, give --vae; images of 64 x 64 pixels" in latents.notes[-1]
    with pytest.raises(ValueError, match="--sample-every 0"):
        open_training_space(config, latents, torch.device("cpu"), "fp32", decodes=True, losses=[])
    assert isinstance(open_training_space(config, latents, "cpu", "fp32", decodes=False, losses=[]), LatentSpace)


def damage(kind, folder):
    """Write a cache with one bad file in it. Return the name of that file, and what a message says of it."""
    if kind == "truncated shard":
        lightning(folder)
        path = folder / "latents_rank00_shard001.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        return path.name, "not a readable shard"
    if kind == "other shape":
        lightning(folder)
        extra = {"latents": torch.zeros(2, 16, 4, 4), "labels": torch.zeros(2, dtype=torch.int64)}
        save_file(extra, folder / "latents_rank01_shard000.safetensors")
        return "latents_rank01_shard000.safetensors", "shape"
    if kind == "no labels":
        lightning(folder)
        save_file({"latents": torch.zeros(2, 32, 4, 4)}, folder / "latents_rank01_shard000.safetensors")
        return "latents_rank01_shard000.safetensors", "labels"
    if kind == "missing label":
        fast_dit(folder)
        (folder / "imagenet256_labels" / "1.npy").unlink()
        return "1.npy", "no partner"
    repa(folder)
    (folder / "00000" / "img-mean-std-00000001.npy").unlink()
    return "img-mean-std-00000001.npy", "missing"


@pytest.mark.parametrize("kind", ["truncated shard", "other shape", "no labels", "missing label", "missing moments"])
def test_bad_files_are_named_or_left_out(tmp_path, kind):
    name, words = damage(kind, tmp_path / "latents")
    path = str(tmp_path / "latents")
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*{words}|{words}.*{re.escape(name)}"):
        open_source(path)
    latents = open_source(path, skip_bad_images=True)
    assert len(latents.left_out) == 1 and name in latents.left_out[0]
    assert not any(latents[i, False]["problems"] for i in range(len(latents)))


@pytest.mark.parametrize(("write", "part"), [(repa, ""), (fast_dit, "imagenet256_features/")])
@pytest.mark.parametrize(
    "content", [b"", b"half", npy(np.zeros((3, 2), np.float32)), npy(np.full((1, 8, 4, 4), np.nan))]
)
def test_a_bad_array_is_replaced_and_reported(tmp_path, write, part, content):
    write(tmp_path)
    path = sorted((tmp_path / part).rglob("*.npy"))[1]
    path.write_bytes(content)
    latents = open_source(str(tmp_path))
    item = latents[1, False]
    assert path.name in item["problems"][0] and item["y"] == latents.labels[2] and latents[2, False]["problems"] == []


@pytest.mark.parametrize("labels", [(0, -1, 2), (0, 1, 10**7), (0, None, 1), (0, 1.5, 1)])
def test_bad_labels_are_named(tmp_path, labels):
    repa(tmp_path, labels)
    with pytest.raises(ValueError, match="img-mean-std-0000000[12].npy: |1.5"):
        open_source(str(tmp_path))


def test_bad_statistics_are_named(tmp_path):
    lightning(tmp_path / "latents")
    for content in ({"mean": torch.zeros(32)}, {"mean": torch.zeros(4), "std": torch.ones(4)}, [1]):
        torch.save(content, tmp_path / "latents" / "latents_stats.pt")
        with pytest.raises(ValueError, match="latents_stats.pt does not hold"):
            open_source(str(tmp_path / "latents"))


def test_train_resume_and_sample(tmp_path, small_vae):
    """A run on LightningDiT's latents resumes, and samples with an autoencoder, through the cache's statistics."""
    lightning(tmp_path / "latents", counts=(8,), channels=4)
    without = [flag for pair in zip(TINY[::2], TINY[1::2], strict=True) for flag in pair if pair[0] != "--vae"]
    without[without.index("--data-path") + 1] = str(tmp_path / "latents")
    folder = tmp_path / "run"
    for steps in (1, 2):
        result = run("train.py", *without, "--max-steps", steps, "--output-dir", folder)
        assert result.returncode == 0, result.stderr
        assert "8 images of 8 classes" in (folder / "log.txt").read_text()
    assert "continuing from" in (folder / "log.txt").read_text()
    sample = ["ODE", "--ckpt", folder, "--sampling-method", "euler", "--num-sampling-steps", 3, "--cfg-scale", 1]
    result = run("sample.py", *sample, "--output", tmp_path / "x.png")
    assert result.returncode == 2 and "--vae" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    pipeline = load_pipeline(folder, torch.device("cpu"), vae=str(small_vae(latent_channels=4)))
    statistics = torch.load(tmp_path / "latents" / "latents_stats.pt", weights_only=True)
    x = torch.randn(2, 4, 4, 4)
    decoded = pipeline.space.load().decode(x * statistics["std"] + statistics["mean"]).sample
    torch.testing.assert_close(pipeline.space.decode(x), decoded)
