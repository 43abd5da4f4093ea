"""What a start of training reads of cached latents, and the order of millions of examples."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from processes import run
from test_extract_latents import flip_byte
from torch import nn

import extract_latents
from data.cached import CachedLatents, ShardWriter, channel_statistics, channel_sums, stopped_setting
from data.loader import GlobalBatchSampler
from utils import files

SHARDS = [f"shard-{k:05d}.safetensors" for k in range(3)]
SCALE = 0.18215  # of the released autoencoder, whose latents have a standard deviation of 1 / SCALE


def write_latents(folder, dtype=torch.float32, num_examples=12, shard_size=4):
    """Latents like the released autoencoder's: means of a deviation of 1 / SCALE, posteriors of about 0.02."""
    settings = dict(num_examples=num_examples, num_classes=3, mirrors=True, vae="ema", scale=SCALE, shift=0.0)
    settings |= dict(image_size=64, latent_size=8, channels=4, shard_size=shard_size, batch_size=4)
    folder.mkdir(parents=True, exist_ok=True)
    writer, g = ShardWriter(folder, settings), torch.Generator().manual_seed(0)
    for k, shard in enumerate(writer.shards):
        mean, noise = torch.randn(2, len(shard), 2, 4, 8, 8, generator=g)
        moments = torch.stack([(mean + 1) / SCALE, 0.02 * noise.exp()], dim=2).to(dtype)
        writer.write(k, {"moments": moments, "labels": torch.tensor(shard) % 3}, [])
    writer.finish()
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Cached latents in three shards; what is stored of them elsewhere lies beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "SETTLED", -(10**12))  # as if the shards had been written long ago
    folder = write_latents(tmp_path / "latents")
    time.sleep(0.02)  # the time stamps of what a test changes are others
    return folder


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were hashed, in a list that `opened` empties."""
    names, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: (names.append(path.name), sha256(path))[1])
    return names


def opened(folder, read, **how):
    """The names of the shards that opening the latents hashes, and the message if they are refused."""
    read.clear()
    message = None
    try:
        CachedLatents(folder, **how)
    except ValueError as error:
        message = str(error)
    return sorted(read), message


def damage_beneath(path):
    """Flip a byte as a failing disk does, which changes neither size nor time stamps: the verdict has those."""
    flip_byte(path)
    state, verdicts = path.stat(), files.read_json(path.parent / files.VERDICTS)
    verdicts[path.name] |= {"mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}
    files.write_json(path.parent / files.VERDICTS, verdicts)


def test_a_second_start_hashes_nothing(folder, read):
    assert opened(folder, read) == (SHARDS, None)
    assert opened(folder, read) == ([], None) == opened(folder, read, skip_bad=True)
    assert opened(folder, read, verify="full") == (SHARDS, None)
    assert opened(folder, read) == ([], None)
    assert {path.name for path in folder.iterdir()} == {*SHARDS, "manifest.json", files.VERDICTS}
    folder = folder.rename(folder.with_name("moved"))
    assert opened(folder, read) == ([], None)


@pytest.mark.parametrize("change", ["time", "byte", "byte, time set back", "copy", "entry", "size"])
def test_what_changed_is_hashed_again(change, folder, read):
    opened(folder, read)
    shard = folder / SHARDS[1]
    before, content = shard.stat(), shard.read_bytes()
    manifest = files.read_json(folder / "manifest.json")
    if change == "time":
        shard.touch()
    elif change in ("byte", "byte, time set back"):
        flip_byte(shard)
    elif change == "copy":  # of a damaged file, with its time, in its place
        shard.with_name("other").write_bytes(content)
        shard.with_name("other").rename(shard)
    elif change == "entry":
        manifest["shards"][1]["sha256"] = manifest["shards"][0]["sha256"]
        files.write_json(folder / "manifest.json", manifest)
    else:
        shard.write_bytes(content[:-1])
    if change in ("byte, time set back", "copy"):
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    is_good = change in ("time", "copy")
    for _ in range(2):  # a damaged shard is not forgotten
        hashed, message = opened(folder, read)
        assert hashed == ([] if change == "size" else [SHARDS[1]])
        assert message is None if is_good else f"{shard} is damaged" in message
        if is_good:
            assert opened(folder, read) == ([], None)
            break
    if not is_good:
        assert opened(folder, read, skip_bad=True)[1] is None
        (folder / "manifest.json").write_text(
            json.dumps(manifest | {"shards": [manifest["shards"][k] for k in (0, 2)]})
        )
        assert opened(folder, read) == ([], None)


def test_full_finds_what_a_disk_lost(folder, read):
    opened(folder, read)
    damage_beneath(folder / SHARDS[2])
    assert opened(folder, read) == ([], None)
    hashed, message = opened(folder, read, verify="full")
    assert hashed == SHARDS and "shard-00002.safetensors is damaged" in message
    hashed, message = opened(folder, read)  # its verdict is gone
    assert hashed == SHARDS[2:] and "shard-00002.safetensors is damaged" in message


def test_damage_outweighs_a_verdict_that_cannot_be_replaced(folder, read, monkeypatch):
    """The folder is another user's, whose verdict is older than the damage."""
    opened(folder, read)
    damage_beneath(folder / SHARDS[2])
    write = files._write_verdicts
    monkeypatch.setattr(files, "_write_verdicts", lambda places, verdicts: write(places[1:], verdicts))
    assert opened(folder, read) == ([], None)
    assert "shard-00002.safetensors is damaged" in opened(folder, read, verify="full")[1]
    for _ in range(2):
        hashed, message = opened(folder, read)
        assert hashed == SHARDS[2:] and "shard-00002.safetensors is damaged" in message
    flip_byte(folder / SHARDS[2])
    assert opened(folder, read) == (SHARDS[2:], None)
    assert opened(folder, read) == ([], None)


def test_a_file_with_two_entries_must_fit_both(folder, read):
    manifest = files.read_json(folder / "manifest.json")
    manifest["shards"].append(manifest["shards"][0] | {"sha256": manifest["shards"][1]["sha256"]})
    files.write_json(folder / "manifest.json", manifest)
    for _ in range(2):
        assert "shard-00000.safetensors is damaged" in opened(folder, read)[1]


def test_without_a_home_or_a_temporary_folder(folder, read, tmp_path, monkeypatch):
    """What no place is known for is stored nowhere: not in a folder of the name ~."""
    (folder / files.VERDICTS).mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user whom the system does not know
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(folder / "manifest.json")])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert opened(folder, read) == (SHARDS, None)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_verdicts_are_no_files_of_others(folder, tmp_path):
    """What a shell leaves of latents that are removed by a pattern, `rm latents/*`."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / files.VERDICTS).write_text("{}")
    files.keep_settings(tmp_path / "new" / "settings.json", {"a": 1}, "", "")
    with pytest.raises(ValueError, match="is not empty"):
        files.keep_settings(folder / "settings.json", {"a": 1}, "", "")


def test_waiting_is_said(folder, tmp_path, monkeypatch, capsys):
    """A process that is stopped, with Ctrl-Z for one, has its turn for ever."""
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    log = tmp_path / "log"
    with processes((folder, log, True)) as (first,):
        while not lines_of(log):
            time.sleep(0.005)
        os.kill(first.pid, signal.SIGSTOP)
        killed = threading.Timer(0.5, first.kill)
        killed.start()
        CachedLatents(folder)
        killed.join()
    assert "waiting for a process that checks the same files" in capsys.readouterr().out
    CachedLatents(folder)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 10**5, '"x"', "{NAME: 7}", "{NAME: {}}", "{NAME: null}", "\0"]
)
def test_a_damaged_file_of_verdicts_is_ignored(content, folder, read):
    (folder / files.VERDICTS).write_text(content.replace("NAME", f'"{SHARDS[0]}"'))
    assert opened(folder, read) == (SHARDS, None)
    assert opened(folder, read) == ([], None)


def test_verdicts_of_a_folder_that_cannot_be_written_are_in_the_cache(folder, read, tmp_path, monkeypatch):
    (folder / files.VERDICTS).mkdir()  # which no file replaces
    assert opened(folder, read) == (SHARDS, None)
    assert opened(folder, read) == ([], None)
    assert len(list((tmp_path / "cache" / "sit").iterdir())) == 1
    write_latents(tmp_path / "others")
    (tmp_path / "others" / files.VERDICTS).mkdir()
    assert opened(tmp_path / "others", read) == (SHARDS, None)
    flip_byte(folder / SHARDS[0])
    assert opened(folder, read)[0] == SHARDS[:1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "manifest.json"))
    for _ in range(2):
        assert opened(tmp_path / "others", read) == (SHARDS, None)
    assert not list(folder.glob(".*partial")) and not list(folder.parent.rglob("*.lock"))


def test_a_shard_that_has_just_changed_is_hashed_again(folder, read, monkeypatch):
    """A clock's tick may hide that it changes once more."""
    monkeypatch.setattr(files, "SETTLED", 60 * 10**9)
    assert opened(folder, read) == opened(folder, read) == (SHARDS, None)


# ---------------------------------------------------------------------------------------------- several processes


def open_and_log(folder, log, hangs):
    """In a new process: open the latents; a line of `log` for each hash that begins, and one for the end."""
    sha256 = files.sha256

    def slow(path):
        with open(log, "a") as file:
            file.write(f"{path.name}\n")
        time.sleep(60 if hangs else 0.05)
        return sha256(path)

    files.sha256 = slow
    CachedLatents(folder)
    with open(log, "a") as file:
        file.write("done\n")


@contextlib.contextmanager
def processes(*arguments):
    """Processes that run `open_and_log`."""
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=open_and_log, args=words) for words in arguments]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def lines_of(log):
    return sorted(log.read_text().splitlines()) if log.exists() else []


def test_one_process_hashes_for_all(folder, tmp_path):
    log = tmp_path / "log"
    with processes(*[(folder, log, False)] * 3) as started:
        for process in started:
            process.join(30)
        assert [process.exitcode for process in started] == [0, 0, 0]
    assert lines_of(log) == ["done"] * 3 + SHARDS


def test_the_next_takes_over_from_one_that_is_killed(folder, tmp_path):
    logs = tmp_path / "first", tmp_path / "second"
    with processes((folder, logs[0], True)) as (first,):
        while not lines_of(logs[0]):
            time.sleep(0.005)
        with processes((folder, logs[1], False)) as (second,):
            second.join(0.3)
            assert second.is_alive() and lines_of(logs[1]) == []  # it waits
            first.kill()
            second.join(30)
            assert second.exitcode == 0 and lines_of(logs[1]) == ["done", *SHARDS]


def test_without_a_place_for_verdicts_nobody_waits(folder, tmp_path, monkeypatch):
    (folder / files.VERDICTS).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "manifest.json"))
    logs = tmp_path / "first", tmp_path / "second"
    with processes((folder, logs[0], True)):
        while not lines_of(logs[0]):
            time.sleep(0.005)
        with processes((folder, logs[1], False)) as (second,):
            second.join(30)
            assert second.exitcode == 0


def test_ranks_find_the_damage_that_full_is_to_find(folder, read, tmp_path):
    opened(folder, read)
    damage_beneath(folder / SHARDS[0])
    words = [word for word in TINY if word not in ("--vae", "none")]
    words = [*words, "--data-path", folder, "--max-steps", 1, "--output-dir", tmp_path / "run"]
    result = run("train.py", *words, "--verify", "full", processes=2)
    assert result.returncode == 2 and "shard-00000.safetensors is damaged" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("mirror", [True, False])
def test_the_order_is_torchs_permutation_of_each_epoch(mirror):
    """Each rank's keys, over the end of an epoch, as Python's numbers: neither a worker nor a file sees NumPy's."""
    from utils.distributed import ORDER_STREAM, generator

    expected = []
    for epoch in range(3):
        g = generator("cpu", 5, ORDER_STREAM, epoch)
        order = torch.randperm(10, generator=g).tolist()
        expected += zip(order, (torch.rand(10, generator=g) < 0.5 * mirror).tolist(), strict=True)
    settings = dict(seed=5, world_size=2, mirror=mirror, start=4)
    ranks = [iter(GlobalBatchSampler(10, 4, 2, rank=rank, **settings)) for rank in range(2)]
    keys = list(itertools.chain.from_iterable(next(ranks[rank]) for _ in range(6) for rank in range(2)))
    assert keys == expected[4:28]
    assert {(type(index), type(flip)) for index, flip in keys} == {(int, bool)}


# ---------------------------------------------------------------------------------------------- float16


def test_float16_moments_train_to_the_same_losses(tmp_path):
    """Latents of the released autoencoder's size: each loss within 1e-4, in half the bytes."""
    words = [word for word in TINY if word not in ("--vae", "none")]
    curves, sizes = [], []
    for dtype in (torch.float32, torch.float16):
        folder = write_latents(tmp_path / str(dtype), dtype, num_examples=256, shard_size=64)
        sizes.append(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
        out = tmp_path / f"run-{dtype}"
        result = run("train.py", *words, "--lr", 1e-2, "--data-path", folder, "--max-steps", 20, "--output-dir", out)
        assert result.returncode == 0, result.stderr
        curves.append([line["loss"] for line in read_metrics(out)])
    assert len(curves[0]) == 20 and np.mean(curves[0][-5:]) < 0.9 * np.mean(curves[0][:5])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    assert sizes[1] < 0.51 * sizes[0]


def test_statistics_of_float16_moments_are_those_of_float32(tmp_path):
    torch.manual_seed(0)
    moments = torch.stack([torch.randn(64, 2, 4, 8, 8) / SCALE - 3, 0.02 * torch.rand(64, 2, 4, 8, 8)], dim=2)
    exact, rounded = (channel_statistics([channel_sums(part)])[0] for part in (moments, moments.half()))
    np.testing.assert_allclose(rounded["scale"], exact["scale"], rtol=1e-5)
    np.testing.assert_allclose(rounded["shift"], exact["shift"], rtol=1e-4)
    assert (torch.tensor(3.05e-7).half() > 0).item()  # the smallest deviation of a posterior, exp(-15)


class Latents(nn.Module):
    """A latent space whose moments are all of one value."""

    device = torch.device("cpu")

    def __init__(self, value):
        super().__init__()
        self.value = value

    def moments(self, images):
        return torch.full((len(images), 2, 4, 2, 2), self.value)


def test_latents_beyond_float16_are_refused():
    batch = {"images": torch.zeros(2, 3, 4, 4), "y": torch.tensor([0, 1]), "problems": [[], ["bad"]]}
    for value, dtype in ((6e4, torch.float16), (7e4, torch.float32)):
        assert extract_latents.encode(Latents(value), batch, dtype, False)["moments"].shape == (1, 2, 2, 4, 2, 2)
    for value, dtype in ((7e4, torch.float16), (float("nan"), torch.float32)):
        with pytest.raises(ValueError, match="not finite, or too large for --dtype float16"):
            extract_latents.encode(Latents(value), batch, dtype, False)


def test_a_stopped_extraction_keeps_its_dtype(tmp_path):
    assert stopped_setting(tmp_path, "dtype") is None
    for value, kept in (("float32", "float32"), ("float16", "float16"), ("int8", None), ([], None), (4, None)):
        (tmp_path / "settings.json").write_text(json.dumps({"dtype": value, "image_size": 16}))
        assert stopped_setting(tmp_path, "dtype") == kept and stopped_setting(tmp_path, "image_size") == 16
    (tmp_path / "settings.json").write_text(json.dumps({"dtype": 16, "image_size": "float16"}))
    assert stopped_setting(tmp_path, "dtype") is stopped_setting(tmp_path, "image_size") is None
