"""Runs that are killed, stopped, damaged or resumed on other ranks end as if nothing had happened."""

import json
import math
import os
import pathlib
import random
import shutil
import signal
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, read_metrics
from processes import Script, start_torchrun, torchrun

from models import SiT
from training import resume
from utils import checkpoint, files
from utils.weights import load_weights

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
    weights = {name: (folder / name).read_bytes() for name in ("model.safetensors", "ema.pt")}
    state = json.loads((folder / "trainer_state.json").read_text())
    optimizer = {}
    reader = torch.distributed.checkpoint.FileSystemReader(folder / "optimizer")
    metadata = reader.read_metadata().state_dict_metadata
    for key, entry in metadata.items():
        optimizer[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    torch.distributed.checkpoint.load(optimizer, checkpoint_id=folder / "optimizer", no_dist=True)
    return weights, {key: value.tolist() for key, value in optimizer.items()}, state["samples_seen"], state["window"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function of the way to run that returns the folder of an uninterrupted run, made at its first call."""
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
    metrics_file = folder / "metrics.jsonl"
    while time.monotonic() < deadline and script.alive():
        if metrics_file.exists() and metrics_file.read_text().count("\n") >= after:
            break
        time.sleep(0.002)
    alive = script.alive()
    script.signal(signal.SIGKILL)
    script.wait()
    return alive


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_resumes_to_the_same_bytes(way, uninterrupted, tmp_path):
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
    finish(train(tmp_path / "a", way, "--micro-batch-size", 2, "--max-steps", 20))
    np.testing.assert_allclose(curve(tmp_path / "a"), expected[:20], atol=1e-4)
    norms = [
        [line["gradient_norm"] for line in read_metrics(folder)[:20]]
        for folder in (tmp_path / "a", uninterrupted("one process"))
    ]
    np.testing.assert_allclose(*norms, rtol=1e-3)
    clipped = [*TINY, "--max-steps", 10, "--max-grad-norm", 0.1, "--weight-decay", 0.1]
    for name, kind in (("b", way), ("c", "one process")):
        finish(train(tmp_path / name, kind, flags=clipped))
    np.testing.assert_allclose(curve(tmp_path / "b"), curve(tmp_path / "c"), atol=1e-4)


@pytest.mark.parametrize("processes, more", [(4, ["--fsdp-shard-size", 2]), (3, [])])
def test_groups_of_shards_and_shards_of_uneven_size(processes, more, tmp_path):
    """HSDP: two replicas of two shards; and three shards of widths that three does not divide."""
    flags = [*TINY, "--max-steps", 8, "--global-batch-size", 12]
    finish(train(tmp_path / "one", "one process", flags=flags))
    finish(train(tmp_path / "many", "fsdp", *more, flags=flags, processes=processes))
    np.testing.assert_allclose(curve(tmp_path / "many"), curve(tmp_path / "one"), atol=1e-4)
    finish(train(tmp_path / "many", "one process", "--max-steps", 10, flags=flags))
    assert len(curve(tmp_path / "many")) == 10


@pytest.mark.parametrize(
    "first, then", [("fsdp", "one process"), ("one process", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")]
)
def test_a_run_resumes_on_other_ranks(first, then, uninterrupted, tmp_path):
    finish(train(tmp_path, first, "--max-steps", 20))
    result = finish(train(tmp_path, then))
    assert f"continuing from {tmp_path}/checkpoint-20" in result.stdout
    assert "--max-steps was 20 until now, and is 40" in result.stdout
    np.testing.assert_allclose(curve(tmp_path), curve(uninterrupted("one process")), atol=1e-4)


def wait_for_step(script, folder, step):
    """Wait until the run has logged a step."""
    metrics_file = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics_file.exists() or metrics_file.read_text().count("\n") < step:
        assert script.alive() and time.monotonic() < deadline, script.wait().stderr
        time.sleep(0.01)


@pytest.mark.parametrize(
    "way, number", [("one process", signal.SIGINT), ("ddp", signal.SIGTERM), ("fsdp", signal.SIGTERM)]
)
def test_a_signal_saves_the_step_and_the_run_resumes(way, number, uninterrupted, tmp_path):
    endless = [*TINY, "--max-steps", 10**6, "--num-workers", 1]
    script = train(tmp_path, way, flags=endless)
    wait_for_step(script, tmp_path, 5)
    script.signal(number, ranks=[0] if way == "one process" else [1])  # a scheduler may reach one rank first
    result = finish(script, code=75)
    assert "the same command resumes the run" in result.stdout
    done = len(read_metrics(tmp_path))
    assert sorted(checkpoint.steps(tmp_path)) == [done]
    finish(train(tmp_path, way, "--max-steps", done + 3, flags=endless))
    assert len(curve(tmp_path)) == done + 3
    expected = curve(uninterrupted("one process"))
    np.testing.assert_allclose(curve(tmp_path)[:40], expected[: done + 3], atol=1e-4)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_rank_that_dies_ends_the_others(way, tmp_path):
    script = train(tmp_path, way, flags=[*TINY, "--max-steps", 10**6])
    wait_for_step(script, tmp_path, 5)
    script.signal(signal.SIGKILL, ranks=[1])
    assert script.wait(timeout=60).returncode != 0


def test_torchrun_starts_a_run_again_that_lost_a_rank(uninterrupted, tmp_path):
    """Half of --max-restarts' promise is torchrun's; the other half is that the same command resumes the run."""
    process = start_torchrun("--max-restarts=1", *FLAGS, "--max-steps", 200, "--parallel", "ddp", folder=tmp_path)
    metrics_file = tmp_path / "metrics.jsonl"
    while not metrics_file.exists() or metrics_file.read_text().count("\n") < 15:
        assert process.poll() is None
        time.sleep(0.01)
    workers = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    assert len(curve(tmp_path)) == 200
    np.testing.assert_allclose(curve(tmp_path)[:40], curve(uninterrupted("one process")), atol=1e-4)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("continuing from") == 1


def test_ranks_end_with_torchrun(tmp_path):
    process = start_torchrun(*TINY, "--max-steps", 10**6, folder=tmp_path)
    metrics_file = tmp_path / "metrics.jsonl"
    while not metrics_file.exists() or metrics_file.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    workers = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_restarts_without_a_folder_are_refused():
    result = torchrun("train.py", *TINY, processes=1, flags=["--max-restarts=1"])
    assert result.returncode == 1 and "--max-restarts needs --output-dir" in result.stderr


def test_a_kill_while_a_checkpoint_is_written_loses_none(uninterrupted, tmp_path):
    expected = uninterrupted("one process")
    flags = [*TINY, "--max-steps", STEPS, "--ckpt-every", 1]
    script = train(tmp_path, "one process", flags=flags)
    wait_for_step(script, tmp_path, random.randrange(2, 30))
    while not checkpoint.steps(tmp_path) and script.alive():
        pass  # one is whole: they are written in the background, and on a busy machine later than the step's line
    while not list(tmp_path.glob(".checkpoint-*")) and script.alive():
        pass
    script.signal(signal.SIGKILL)
    script.wait()
    written = checkpoint.steps(tmp_path)
    for step in written:
        checkpoint.check(tmp_path / f"checkpoint-{step}")
    result = finish(train(tmp_path, "one process", flags=flags))
    assert f"continuing from {tmp_path}/checkpoint-{max(written)}," in result.stdout
    assert contents(tmp_path / "checkpoint-40") == contents(expected / "checkpoint-40")
    assert not list(tmp_path.glob(".checkpoint-*"))


@pytest.mark.parametrize("way", ["one process", "fsdp"])
def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_used(way, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted(way), tmp_path / "run")
    shard = tmp_path / "run" / "checkpoint-40" / "optimizer" / ("__1_0.distcp" if way == "fsdp" else "__0_0.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = finish(train(tmp_path / "run", way))
    assert f"{shard} is damaged" in result.stdout and "continuing from" in result.stdout
    assert "checkpoint-30" in result.stdout
    assert (tmp_path / "run" / "damaged-0-checkpoint-40").is_dir()
    assert contents(tmp_path / "run" / "checkpoint-40") == contents(uninterrupted(way) / "checkpoint-40")


def test_a_run_that_is_done_says_so_and_does_nothing(uninterrupted):
    folder = uninterrupted("one process")
    before = (folder / "log.txt").read_text()
    result = finish(train(folder, "one process"))
    assert "it is done" in result.stdout and (folder / "log.txt").read_text() == before


def test_changed_flags_are_named_and_win(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted("one process"), tmp_path / "run")
    result = finish(train(tmp_path / "run", "one process", "--max-steps", 41, "--lr", 0.5, "--global-batch-size", 32))
    assert "--lr was 0.001 until now, and is 0.5" in result.stdout
    assert "--global-batch-size was 16 until now, and is 32" in result.stdout
    last = read_metrics(tmp_path / "run")[-1]
    assert last["learning_rate"] == 0.5 and last["samples_seen"] == 40 * 16 + 32


def test_another_number_of_examples_is_named():
    for seen, then in ((1, 7), (640, 1797), (1_792_000_000, 1_281_167)):
        start = resume.Start("run/checkpoint-1", {"args": {}, "samples_seen": seen, "epoch": seen / then})
        assert resume.changes({}, then, start) == resume.changes({}, None, start) == []
        (line,) = resume.changes({}, then + 1, start)
        assert f"{then:,} examples" in line and f"{then + 1:,}" in line
    assert resume.changes({}, 7, resume.Start("run/checkpoint-1", {"args": {}, "samples_seen": 1, "epoch": None})) == []


def test_a_run_can_resume_from_a_checkpoint_in_another_folder(uninterrupted, tmp_path):
    source = uninterrupted("one process")
    finish(train(tmp_path, "one process", "--resume", source / "checkpoint-20"))
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(21, 41))
    assert contents(tmp_path / "checkpoint-40") == contents(source / "checkpoint-40")


def test_a_run_whose_start_is_typed_while_the_last_one_stops(uninterrupted, tmp_path):
    """A scheduler can start a job again before the old one is gone: what that saves meanwhile is gone on from."""
    endless = [*TINY, "--max-steps", 10**6]
    first = train(tmp_path, "one process", flags=endless)
    wait_for_step(first, tmp_path, 5)
    second = train(tmp_path, "one process", flags=endless)
    time.sleep(3)  # it waits for the lock
    first.signal(signal.SIGTERM)
    finish(first, code=75)
    (saved,) = checkpoint.steps(tmp_path)
    wait_for_step(second, tmp_path, saved + 3)
    second.signal(signal.SIGTERM)
    assert f"continuing from {tmp_path}/checkpoint-{saved}," in finish(second, code=75).stdout
    assert sorted(checkpoint.steps(tmp_path))[0] == saved and not list(tmp_path.glob("damaged-*"))


def test_a_run_from_another_folder_is_typed_again(uninterrupted, tmp_path):
    source = uninterrupted("one process")
    more = ["--resume", source / "checkpoint-20"]
    finish(train(tmp_path, "one process", *more, "--max-steps", 35))
    result = finish(train(tmp_path, "one process", *more))
    assert f"continuing from {tmp_path}/checkpoint-35" in result.stdout
    assert contents(tmp_path / "checkpoint-40") == contents(source / "checkpoint-40")


def test_epochs_are_completed_with_another_batch_size(tmp_path):
    flags = [*TINY, "--ckpt-every", 1000]
    finish(train(tmp_path, "one process", "--epochs", 1, flags=flags))
    assert read_metrics(tmp_path)[-1]["step"] == 112
    finish(train(tmp_path, "one process", "--epochs", 2, "--global-batch-size", 32, flags=flags))
    last = read_metrics(tmp_path)[-1]
    assert (
        last["step"] == 112 + (2 * 1797 - 112 * 16) // 32
        and last["samples_seen"] <= 2 * 1797 < last["samples_seen"] + 32
    )


def test_a_log_that_cannot_be_read_does_not_stop_a_run(tmp_path):
    flags = [*TINY, "--ckpt-every", 5]
    finish(train(tmp_path, "one process", "--max-steps", 5, flags=flags))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\x80 no text")
    finish(train(tmp_path, "one process", "--max-steps", 8, flags=flags))
    assert len(curve(tmp_path)) == 8
    (tmp_path / "log.txt").unlink()
    (tmp_path / "log.txt").mkdir()
    result = finish(train(tmp_path, "one process", "--max-steps", 9, flags=flags), code=2)
    assert "log.txt cannot be written: Is a directory" in result.stderr and result.stderr.count("\n") == 1


def test_a_grid_that_cannot_be_written_does_not_stop_a_run(tmp_path):
    tmp_path.joinpath("samples").touch()
    result = finish(train(tmp_path, "one process", "--max-steps", 4, "--sample-every", 2, "--ckpt-every", 2))
    assert result.stderr.count("training continues") == 1 and sorted(checkpoint.steps(tmp_path)) == [2, 4]


def test_no_checkpoint_is_made_among_steps_that_are_not_finite(tmp_path):
    good, bad = write_latents(tmp_path / "good", bad=[]), write_latents(tmp_path / "bad", bad=range(64))
    flags = [*LATENT_FLAGS, "--max-bad-steps", 6, "--keep-checkpoints", 1, "--ckpt-every", 2]
    finish(train(tmp_path / "run", "one process", "--max-steps", 4, flags=[*flags, "--data-path", good]))
    finish(train(tmp_path / "run", "one process", "--max-steps", 40, flags=[*flags, "--data-path", bad]), code=3)
    assert checkpoint.steps(tmp_path / "run") == [4]


def test_two_runs_do_not_share_a_folder(tmp_path):
    script = train(tmp_path, "one process", flags=[*TINY, "--max-steps", 10**6])
    wait_for_step(script, tmp_path, 1)
    result = finish(train(tmp_path, "one process"), code=2)
    assert "another run is writing to" in result.stderr and result.stderr.count("\n") == 1
    script.signal(signal.SIGKILL)
    script.wait()


def test_windows_of_the_log_that_a_kill_cuts_are_whole(tmp_path):
    """Lines of the log every 7 steps, a checkpoint every 10: the loss of steps 8 to 14 needs steps 8 to 10."""
    flags = [*TINY, "--max-steps", 21, "--ckpt-every", 10, "--log-every", 7]
    finish(train(tmp_path / "a", "one process", flags=flags))
    finish(train(tmp_path / "b", "one process", "--resume", tmp_path / "a" / "checkpoint-10", flags=flags))
    keys = ("step", "loss", "loss_by_time", "samples_seen", "learning_rate")
    a, b = ([[line[key] for key in keys] for line in read_metrics(tmp_path / name)] for name in "ab")
    assert [line[0] for line in a] == [7, 14, 21] and a[1:] == b


# ------------------------------------------------------------------------------------- what is not finite


def write_latents(folder, bad):
    """64 cached latents of which those with the numbers `bad` are not numbers."""
    moments = torch.rand(64, 2, 2, 4, 8, 8)
    moments[list(bad)] = math.nan
    folder.mkdir()
    path = folder / "shard-00000.safetensors"
    safetensors.torch.save_file({"moments": moments, "labels": torch.arange(64) % 10}, path)
    entry = {"file": path.name, "examples": 64, "bytes": path.stat().st_size, "sha256": files.sha256(path)}
    manifest = {"vae": "ema", "image_size": 64, "channels": 4, "latent_size": 8, "num_classes": 10, "mirrors": True}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"scale": 1.0, "shift": 0.0, "shards": [entry]}))
    return folder


LATENT_FLAGS = [flag for flag in TINY if flag not in ("--vae", "none")] + ["--ckpt-every", 2]


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_is_not_finite_is_left_out(way, tmp_path):
    latents = write_latents(tmp_path / "latents", bad=[5])
    flags = [*LATENT_FLAGS, "--data-path", latents, "--max-steps", 4]  # one epoch: one step has it
    result = finish(train(tmp_path / "run", way, flags=flags))
    assert result.stdout.count("left out: not finite (loss nan, gradient norm nan), 1 in a row") == 1
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["bad_steps"] == 1 and sorted(line["loss"] is None for line in metrics) == [False] * 3 + [True]
    state = load_weights(tmp_path / "run" / "checkpoint-4" / "model.safetensors").state_dict
    assert all(value.isfinite().all() for value in state.values())
    optimizer = contents(tmp_path / "run" / "checkpoint-4")[1]
    assert optimizer["state.final_layer.linear.weight.step"] == 3.0


def test_a_step_that_is_left_out_changes_no_weight(tmp_path):
    latents = write_latents(tmp_path / "latents", bad=range(64))
    flags = [*LATENT_FLAGS, "--data-path", latents, "--max-steps", 1, "--ema-decay", 0.5, "--weight-decay", 0.5]
    finish(train(tmp_path / "run", "one process", flags=flags))
    weights, ema = (
        load_weights(tmp_path / "run" / "checkpoint-1" / name).state_dict for name in ("model.safetensors", "ema.pt")
    )
    torch.manual_seed(0)
    initial = SiT(**checkpoint.read_state(tmp_path / "run" / "checkpoint-1")["model"]).state_dict()
    for key, value in initial.items():
        assert torch.equal(weights[key], value) and torch.allclose(ema[key], value)


@pytest.mark.parametrize("way", ["one process", "ddp"])
def test_a_run_that_is_not_finite_any_more_stops(way, tmp_path):
    good, bad = write_latents(tmp_path / "good", bad=[]), write_latents(tmp_path / "bad", bad=range(64))
    flags = [*LATENT_FLAGS, "--max-bad-steps", 5]
    finish(train(tmp_path / "run", way, "--max-steps", 4, flags=[*flags, "--data-path", good]))
    before = contents(tmp_path / "run" / "checkpoint-4")
    flags += ["--max-steps", 40, "--ckpt-every", 100]
    result = finish(train(tmp_path / "run", way, flags=[*flags, "--data-path", bad]), code=3)
    assert (
        "stopped at step 9: --max-bad-steps 5 in a row were not finite (loss nan, gradient norm nan)" in result.stdout
    )
    assert checkpoint.find_latest(tmp_path / "run") == (tmp_path / "run" / "checkpoint-4", [])
    assert contents(tmp_path / "run" / "checkpoint-4") == before


def test_a_model_option_that_this_code_does_not_know_is_refused(tmp_path):
    flags = [*TINY, "--ckpt-every", 2]
    finish(train(tmp_path, "one process", "--max-steps", 2, flags=flags))
    folder = tmp_path / "checkpoint-2"
    state = json.loads((folder / "trainer_state.json").read_text())
    state["model"]["activation"] = "relu"
    (folder / "trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer_state.json"] = files.manifest_entry(folder / "trainer_state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = finish(train(tmp_path, "one process", "--max-steps", 4, flags=flags), code=2)
    assert "--activation: None was given, but" in result.stderr and result.stderr.count("\n") == 1
