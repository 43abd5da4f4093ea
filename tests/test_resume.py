"""Runs that are killed, stopped, damaged or continued on other ranks: they go on as if nothing had happened."""

import json
import random
import signal
import time

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from processes import Script

STEPS = 40
FLAGS = [*TINY, "--max-steps", STEPS, "--ckpt-every", 10]
WAYS = {"one process": [], "ddp": ["--parallel", "ddp"], "fsdp": ["--parallel", "fsdp"]}


def train(folder, way, *more, processes=None, flags=FLAGS):
    """A run of 40 steps, begun or continued: a `Script`."""
    processes = processes or (1 if way == "one process" else 2)
    return Script("train.py", *flags, *WAYS[way], "--output-dir", folder, *more, processes=processes)


def finish(script, code=0):
    result = script.wait()
    assert result.returncode == code, result.stderr + result.stdout
    return result


def curve(folder):
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    return [line["loss"] for line in metrics]


def contents(folder):
    """Everything that a checkpoint holds, as bytes or tensors, apart from times, versions and paths."""
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "ema.pt")}
    state = json.loads((folder / "trainer_state.json").read_text())
    optimizer = {}
    reader = torch.distributed.checkpoint.FileSystemReader(folder / "optimizer")
    metadata = reader.read_metadata().state_dict_metadata
    for key, entry in metadata.items():
        optimizer[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    torch.distributed.checkpoint.load(optimizer, checkpoint_id=folder / "optimizer")
    return files, {key: value.tolist() for key, value in optimizer.items()}, state["samples_seen"], state["window"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folders of runs that nothing happened to, made when they are asked for: {way: folder}."""
    folders = {}

    def of(way):
        if way not in folders:
            folders[way] = tmp_path_factory.mktemp("runs") / way.replace(" ", "-")
            finish(train(folders[way], way))
        return folders[way]

    return of


def kill(script, folder, after):
    """SIGKILL all ranks of a script when its log says step `after`; whether it was alive then."""
    deadline = time.monotonic() + 120
    figures = folder / "metrics.jsonl"
    while time.monotonic() < deadline and script.alive():
        if figures.exists() and figures.read_text().count("\n") >= after:
            break
        time.sleep(0.002)
    alive = script.alive()
    script.signal(signal.SIGKILL)
    script.wait()
    return alive


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_to_the_same_bytes(way, uninterrupted, tmp_path):
    expected = uninterrupted(way)
    after = random.randrange(1, STEPS - 2)
    assert kill(train(tmp_path, way), tmp_path, after), f"not alive at step {after}"
    finish(train(tmp_path, way))
    assert contents(tmp_path / "checkpoint-40") == contents(expected / "checkpoint-40"), f"killed after step {after}"
    assert curve(tmp_path) == curve(expected)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_loss_curve_does_not_depend_on_how_ranks_share_the_work(way, uninterrupted, tmp_path):
    expected = curve(uninterrupted("one process"))
    np.testing.assert_allclose(curve(uninterrupted(way)), expected, atol=1e-4)
    finish(train(tmp_path, way, "--micro-batch-size", 2, "--max-steps", 20))
    np.testing.assert_allclose(curve(tmp_path), expected[:20], atol=1e-4)


@pytest.mark.parametrize(
    "first, then", [("fsdp", "one process"), ("one process", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")]
)
def test_a_run_goes_on_on_other_ranks(first, then, uninterrupted, tmp_path):
    finish(train(tmp_path, first, "--max-steps", 20))
    result = finish(train(tmp_path, then))
    assert f"continuing from {tmp_path}/checkpoint-20" in result.stdout
    assert "--max-steps was 20 until now, and is 40" in result.stdout
    np.testing.assert_allclose(curve(tmp_path), curve(uninterrupted("one process")), atol=1e-4)
