"""Checkpoints and half-drawn samples of the code before its new layout (tests/before_layout) load and continue.

They were written on one machine, whose arithmetic another one may round differently. So results agree closely anywhere,
and byte for byte where a run from step 0 gives the bytes of the old checkpoint at step 3.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from conftest import read_metrics
from processes import run

from utils import checkpoint
from utils.tensor_files import read_pt, read_safetensors

OLD = pathlib.Path(__file__).parent / "before_layout"
FLAGS = (
    "--data-path digits --vae none --model SiT-S/2 --hidden-size 8 --depth 1 --num-heads 2 --num-workers 0 "
    "--global-batch-size 8 --lr 1e-2 --ema-decay 0.9 --log-every 2 --sample-every 0 --ckpt-every 3"
).split()
SAMPLES = (
    "SDE --ckpt run/checkpoint-3 --num-fid-samples 12 --per-proc-batch-size 4 --num-sampling-steps 5 --cfg-scale 1.5"
).split()
OPTIMIZER = "optimizer/__0_0.distcp"
WEIGHTS = (("model.safetensors", read_safetensors), ("ema.pt", read_pt))  # since then, files with a config in them


@pytest.fixture(scope="module")
def reproduces(tmp_path_factory):
    """Whether this machine computes the bytes of the machine that wrote the old checkpoint."""
    folder = tmp_path_factory.mktemp("new")
    assert run("train.py", *FLAGS, "--max-steps", 3, "--output-dir", folder).returncode == 0
    return same_bytes(folder / "checkpoint-3", OLD / "run" / "checkpoint-3")


def same_bytes(ours, theirs):
    for name, read in WEIGHTS:
        here, there = read(ours / name), read(theirs / name)
        if here.keys() != there.keys() or not all(torch.equal(here[key], there[key]) for key in there):
            return False
    return (ours / OPTIMIZER).read_bytes() == (theirs / OPTIMIZER).read_bytes()


def test_a_checkpoint_resumes_to_the_same_bytes(reproduces, tmp_path):
    shutil.copytree(OLD / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    shutil.copy(OLD / "run" / "metrics.jsonl", tmp_path / "run")
    checkpoint.check(tmp_path / "run" / "checkpoint-3")
    result = run("train.py", *FLAGS, "--max-steps", 6, "--output-dir", tmp_path / "run")
    assert result.returncode == 0 and "continuing from" in result.stdout, result.stderr
    ours, theirs = tmp_path / "run" / "checkpoint-6", OLD / "run" / "checkpoint-6"
    assert same_bytes(ours, theirs) or not reproduces
    for name, read in WEIGHTS:
        here, there = read(ours / name), read(theirs / name)
        assert all((here[key] - there[key]).abs().max() < 1e-4 for key in there)
    # Step 3 lies in a window of the log that the old checkpoint cut, and stored in another form.
    for here, there in zip(read_metrics(tmp_path / "run"), read_metrics(OLD / "run"), strict=True):
        assert here["step"] == there["step"] and here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        for ours, theirs in zip(here["loss_by_time"], there["loss_by_time"], strict=True):
            assert ours == theirs or ours == pytest.approx(theirs, rel=1e-5)


def test_half_drawn_samples_continue(reproduces, tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    shutil.copytree(OLD / "half.npz.parts", tmp_path / "half.npz.parts")
    shards = sorted((tmp_path / "half.npz.parts").glob("*.npy"))
    drawn = np.concatenate([np.load(shard) for shard in shards])
    result = run("sample_ddp.py", *SAMPLES, "--output", "half.npz", cwd=tmp_path)
    assert result.returncode == 0 and "4 images in" in result.stdout, result.stderr
    with np.load(tmp_path / "half.npz") as ours, np.load(OLD / "whole.npz") as theirs:
        assert np.array_equal(ours["arr_1"], theirs["arr_1"]) and np.array_equal(ours["arr_0"][:8], drawn)
        assert np.abs(ours["arr_0"].astype(int) - theirs["arr_0"]).max() <= (0 if reproduces else 1)


def test_cached_latents_train_as_before(tmp_path):
    shutil.copytree(OLD / "latents", tmp_path / "latents")
    for path in (tmp_path / "latents").glob("*.json"):
        path.write_text(path.read_text().replace("@FOLDER@", str(OLD)))
    flags = "--model SiT-S/2 --hidden-size 8 --depth 1 --num-heads 2 --num-workers 0 --global-batch-size 4 --lr 1e-2"
    more = ["--log-every", 1, "--sample-every", 0, "--max-steps", 3, "--output-dir", tmp_path / "run"]
    result = run("train.py", "--data-path", tmp_path / "latents", *flags.split(), *more)
    assert result.returncode == 0, result.stderr
    expected = [line["loss"] for line in map(json.loads, (OLD / "run-of-latents.jsonl").read_text().splitlines())]
    assert [line["loss"] for line in read_metrics(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)
