"""Folders of runs and outputs: claimed by one process, not written through links, and noticed when they are gone."""

import fcntl
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from processes import ENVIRONMENT, ROOT, Script, run
from torch.utils.data import Dataset

from data.loader import make_loader
from sampling.draw import NotFinite, decode
from sampling.shards import Shards, check_npz
from training import log, resume
from utils import checkpoint, files
from vae import PixelSpace


@pytest.fixture(autouse=True)
def signals():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGCHLD), before, strict=True):
        signal.signal(number, handler)


def test_a_numbered_folder_is_of_one_run(tmp_path):
    chosen = [resume.choose_folder(None, "auto", resume.Start(), tmp_path / "results", "SiT") for _ in range(3)]
    assert {path.name for path in chosen} == {"000-SiT"}
    claimed = [resume.claim_folder(path, "auto", numbered=True) for path in chosen]
    assert [folder.name for folder, _ in claimed] == ["000-SiT", "001-SiT", "002-SiT"]
    assert resume.choose_folder(None, "auto", resume.Start(), tmp_path / "results", "SiT").name == "003-SiT"
    with pytest.raises(ValueError, match="cannot be made"):
        (tmp_path / "file").touch()
        resume.claim_folder(tmp_path / "file" / "000-SiT", "auto", numbered=True)


def test_links_are_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    for name in (".lock", "log.txt", "metrics.jsonl", "evaluations.jsonl", ".settings.json.partial", ".x.partial"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match=r"\.lock is a symbolic link, which is not written through"):
        resume.claim_folder(tmp_path / "run", "auto")
    with pytest.raises(ValueError, match="log.txt is a symbolic link"):
        log.RunLog(tmp_path / "run", 0, [])
    files.write_json(tmp_path / "run" / "settings.json", {"a": 1})
    assert files.read_json(tmp_path / "run" / "settings.json") == {"a": 1}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / ".checkpoint-9.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "file").touch()
    checkpoint.Writer(tmp_path / "run")
    assert not (tmp_path / "run" / ".checkpoint-9.partial").is_symlink() and (tmp_path / "elsewhere" / "file").exists()
    assert (tmp_path / "victim").read_text() == "precious"
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")  # the folder itself may be a link
    assert resume.claim_folder(tmp_path / "linked", "auto")[0] == tmp_path / "linked"
    run_log = log.RunLog(tmp_path / "linked", 0, [])
    (tmp_path / "linked" / "samples").symlink_to(tmp_path / "elsewhere")
    run_log.grid(torch.zeros(4, 8, 8, 1, dtype=torch.uint8), 2, 5)
    assert run_log.reported and [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["file"]


@pytest.mark.parametrize("leftover", [".settings.json.partial", ".0000000-0000004.calls-1-1.npy.partial"])
def test_leftovers_of_a_killed_process_lock_nobody_out(leftover, tmp_path):
    (tmp_path / "x.npz.parts").mkdir()
    (tmp_path / "x.npz.parts" / leftover).write_text('{"half')
    assert not Shards(tmp_path / "x.npz", 4, (2, 2, 3)).prepare({"seed": 1}, False)
    with pytest.raises(ValueError, match="made with seed 1, not 2"):
        Shards(tmp_path / "x.npz", 4, (2, 2, 3)).prepare({"seed": 2}, False)
    (tmp_path / "y.npz.parts").mkdir()
    (tmp_path / "y.npz.parts" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty, and sample_ddp.py did not write it"):
        Shards(tmp_path / "y.npz", 4, (2, 2, 3)).prepare({"seed": 2}, False)


def hold(path, held, done):
    """In another process: lock a folder until `done`, then remove it."""
    file = open(path / files.LOCK, "a+")
    fcntl.lockf(file, fcntl.LOCK_EX)
    held.set()
    done.wait(20)
    shutil.rmtree(path)


@pytest.mark.parametrize("patience, right", [(0, False), (20, True)])
def test_a_lock_on_a_removed_file_is_none(patience, right, tmp_path):
    context = multiprocessing.get_context("fork")
    held, done, folder = context.Event(), context.Event(), tmp_path / "folder"
    folder.mkdir()
    other = context.Process(target=hold, args=(folder, held, done))
    other.start()
    assert held.wait(20)
    if right:
        done.set()
        files.lock(folder, "taken", patience)
        assert files.is_locked(folder) and (folder / files.LOCK).exists()
        shutil.rmtree(folder)
        assert not files.is_locked(folder)
    else:
        with pytest.raises(ValueError, match="^taken$"):
            files.lock(folder, "taken", patience)
    done.set()
    other.join()


def test_a_run_notices_that_its_folder_is_gone(tmp_path):
    folder, _ = resume.claim_folder(tmp_path / "run", "auto")
    stop, lines = resume.Stop(folder), []
    assert not stop.check(at_once=True)
    (folder / files.LOCK).unlink()
    assert not stop.check(at_once=True) and files.is_locked(folder)  # locked again
    folder.rename(tmp_path / "moved")
    assert not stop.check(at_once=False)  # looks once a second
    assert stop.check(at_once=True) and stop.lost
    stop.report(7, lines.append)
    assert "was removed or replaced: stopped at step 7, not saved" in lines[0]
    folder.mkdir()
    assert stop.check(at_once=True) and stop.lost
    os.kill(os.getpid(), signal.SIGTERM)
    (folder / files.LOCK).touch()
    assert stop.check(at_once=True) and stop.stopping and stop.reasons == ["SIGTERM"]


class Numbers(Dataset):
    def __getitem__(self, key):
        time.sleep(0.01)
        return {"x": key, "problems": []}

    def __len__(self):
        return 10**6


def batches(count, **how):
    return make_loader(Numbers(), ([2 * i, 2 * i + 1] for i in range(count)), 2, torch.device("cpu"), **how)


def test_batches_go_on_without_a_process_that_ended():
    said, seen, others = [], [], multiprocessing.active_children()
    loader = batches(40, report=said.append)
    for batch in loader:
        seen.append(batch["x"].tolist())
        if len(seen) == 5:
            worker = next(process for process in multiprocessing.active_children() if process not in others)
            os.kill(worker.pid, signal.SIGKILL)
    assert seen == [[2 * i, 2 * i + 1] for i in range(40)] and len(said) == 1
    assert "by SIGKILL, perhaps because the system was out of memory; try fewer than --num-workers 2, or 0" in said[0]
    assert set(multiprocessing.active_children()) <= set(others)


def test_a_process_that_ended_is_an_error_of_one_line():
    others, loader = multiprocessing.active_children(), batches(400)
    next(loader)
    worker = next(process for process in multiprocessing.active_children() if process not in others)
    os.kill(worker.pid, signal.SIGBUS)
    with pytest.raises(ValueError, match="^a loader process ended by SIGBUS, perhaps because /dev/shm is full"):
        list(loader)


def test_a_run_that_lost_a_loader_process_saves_and_resumes(tmp_path):
    flags = [*TINY, "--max-steps", 10**6, "--num-workers", 2, "--parallel", "ddp", "--output-dir", tmp_path]
    script = Script("train.py", *flags, processes=2)
    while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 5:
        assert script.alive()
        time.sleep(0.02)
    second = script.ranks[1].pid
    worker = pathlib.Path(f"/proc/{second}/task/{second}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    result = script.wait(60)
    assert result.returncode == 75 and "Traceback" not in result.stderr, result.stderr
    assert "a loader process ended by SIGKILL" in result.stdout and "the same command resumes the run" in result.stdout
    (saved,) = checkpoint.steps(tmp_path)
    checkpoint.check(tmp_path / f"checkpoint-{saved}")


@pytest.mark.parametrize("size", [0, 100, -1])
def test_an_npz_that_was_cut_is_drawn_again(size, tmp_path, capsys):
    shards = Shards(tmp_path / "x.npz", 4, (2, 2, 3))
    images, counts = np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3), {"nfe": 1, "forward_passes": 1}

    def complete():
        return shards.prepare({"seed": 1}, False)

    assert not complete()
    shards.write(images, 0, counts, False)
    shards.finish(np.arange(4), {"seed": 1})
    check_npz(shards.output, {"arr_0": (4, 2, 2, 3), "arr_1": (4,)})
    assert complete() and not shards.folder.exists()
    os.truncate(shards.output, size if size >= 0 else shards.output.stat().st_size - 1)
    assert not complete() and "x.npz is damaged" in capsys.readouterr().out and shards.missing(4) == [(0, 4)]
    shards.write(images, 0, counts, False)
    shards.finish(np.arange(4), {"seed": 1})
    assert complete() and np.array_equal(np.load(shards.output)["arr_0"], images)
    with pytest.raises(ValueError, match="is damaged: arr_0"):
        check_npz(shards.output, {"arr_0": (5, 2, 2, 3)})


def test_metrics_of_samples_that_are_not_finite_are_null(tmp_path, capsys):
    class Pipeline:
        space = PixelSpace()

    for value in (float("nan"), float("inf")):
        with pytest.raises(NotFinite, match="not finite"):
            decode(Pipeline, torch.tensor([0.0, value]).reshape(2, 1, 1, 1))
    more = ["--eval-every", 6, "--eval-samples", 4, "--sample-every", 6, "--output-dir", tmp_path / "run"]
    flags = [*TINY[: TINY.index("--sample-every")], "--num-workers", 0]
    result = run("train.py", *flags, "--max-steps", 6, "--lr", 1e30, "--ema-decay", 0, *more)
    assert result.returncode == 0, result.stderr
    assert "no grid: the samples are not finite" in result.stdout
    assert "no fd_pixels: the samples are not finite" in result.stdout
    (line,) = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 6, "fd_pixels": None, "n_samples": 0}
    assert not (tmp_path / "run" / "samples").exists()


def test_json_knows_no_nan():
    content = {"a": [1.0, float("nan"), (float("inf"), "x")], "b": {"c": np.float64("-inf"), "d": None}}
    assert files.to_json(content) == '{"a": [1.0, null, [null, "x"]], "b": {"c": null, "d": null}}'


@pytest.mark.parametrize("script", ["train.py", "sample.py", "download.py"])
def test_ctrl_c_while_packages_load_ends_without_a_traceback(script):
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / script), "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    for line in process.stderr:
        if "numpy" in line or "huggingface" in line or "torch" in line:
            break
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.stderr.read() and process.wait() == -signal.SIGINT
