"""Nothing in a checkpoint runs code, whatever its checksums say; what is damaged means the checkpoint before it."""

import collections
import copy
import io
import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import TINY
from processes import run
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from training import resume
from training.log import TIME_BINS, Metrics
from utils import checkpoint, files
from utils.sharded_files import TensorReader, read_metadata


@pytest.fixture
def folder(digits_run, tmp_path):
    """A copy of a run with checkpoints at steps 3 and 6."""
    shutil.copytree(digits_run, tmp_path / "run")
    return tmp_path / "run"


def certify(folder):
    """Give a checkpoint the manifest of its files as they are."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    entries = {path.relative_to(folder).as_posix(): files.manifest_entry(path) for path in paths}
    (folder / "manifest.json").write_text(json.dumps({"files": entries}))


def refused(folder, words):
    """Assert that checkpoint-6, with right checksums, is refused in a line with these words, and that 3 is used."""
    certify(folder / "checkpoint-6")
    latest, (problem,) = checkpoint.find_latest(folder)
    assert latest == folder / "checkpoint-3" and words in problem and "\n" not in problem
    start = resume.find_start("auto", folder)
    assert start.folder == latest and start.damaged == [problem]
    with pytest.raises(ValueError, match="more than tensors"):
        TensorReader(folder / "checkpoint-6" / "optimizer").read_metadata()
    with pytest.raises(ValueError):
        resume.find_start(str(folder / "checkpoint-6"), None)  # it alone was asked for
    shutil.rmtree(folder / "checkpoint-3")
    with pytest.raises(ValueError, match="no checkpoint in .* is intact"):
        resume.find_start("auto", folder)


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(mark):
    code = f"open({str(mark)!r}, 'w')"
    yield "eval", Call(eval, code)
    yield "system", Call(os.system, f"touch {mark}")
    yield "open", Call(open, str(mark), "w")
    yield "getattr", Call(getattr, Call(__import__, "os"), "system")
    yield "a pickle in it", Call(pickle.loads, pickle.dumps(Call(eval, code)))
    yield "torch.load", Call(torch.load, str(mark))
    yield "an ordered dict", collections.OrderedDict(a=Call(eval, code))
    yield "a set", {Call(eval, code)}
    yield "tensor", torch.zeros(1)


@pytest.mark.parametrize("where", ["instead", "planner_data", "an entry", "a shape"])
@pytest.mark.parametrize("number", range(9))
def test_a_payload_in_the_metadata_is_not_run(where, number, digits_run, tmp_path):
    mark, optimizer = tmp_path / "mark", tmp_path / "optimizer"
    shutil.copytree(digits_run / "checkpoint-6" / "optimizer", optimizer)
    metadata = pickle.loads((optimizer / ".metadata").read_bytes())
    payload = list(payloads(mark))[number][1]
    if where == "planner_data":
        metadata.planner_data = payload
    elif where == "an entry":
        metadata.state_dict_metadata["state.x"] = payload
    elif where == "a shape":
        next(iter(metadata.state_dict_metadata.values())).size = payload
    (optimizer / ".metadata").write_bytes(pickle.dumps(payload if where == "instead" else metadata))
    with pytest.raises(ValueError, match="is no part of the metadata of tensors") as error:
        read_metadata(optimizer)
    assert not mark.exists() and "\n" not in str(error.value)


def test_a_payload_with_right_checksums_means_the_checkpoint_before(folder, tmp_path):
    metadata = folder / "checkpoint-6" / "optimizer" / ".metadata"
    code = f"(open({str(tmp_path / 'mark')!r}, 'w'), __import__('pickle').loads({metadata.read_bytes()!r}))[1]"
    metadata.write_bytes(pickle.dumps(Call(eval, code)))
    refused(folder, "builtins.eval is no part of the metadata of tensors")
    assert not (tmp_path / "mark").exists()


def test_entries_that_the_library_would_unpickle_are_refused(folder, tmp_path):
    optimizer, content = folder / "checkpoint-6" / "optimizer", io.BytesIO()
    torch.save(Call(open, str(tmp_path / "mark"), "w"), content)
    (optimizer / "__0_9.distcp").write_bytes(content.getvalue())
    metadata = pickle.loads((optimizer / ".metadata").read_bytes())
    key = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__0_9.distcp", 0, len(content.getvalue()))
    (optimizer / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, "BytesStorageMetadata is no part of the metadata of tensors")
    assert not (tmp_path / "mark").exists()


def of_first(change):
    """A change of the place or shape of the first tensor with two dimensions."""

    def apply(metadata, optimizer):
        key = next(key for key, entry in metadata.state_dict_metadata.items() if len(entry.size) == 2)
        index = next(index for index in metadata.storage_data if index.fqn == key)
        change(metadata.state_dict_metadata[key], metadata.storage_data[index], optimizer)

    return apply


def move(name):
    def change(entry, info, optimizer):
        shutil.copy(optimizer / info.relative_path, optimizer.parent.parent / "outside.distcp")
        info.relative_path = name.format(optimizer.parent.parent)

    return of_first(change)


def link(metadata, optimizer):
    shard = optimizer / "__0_0.distcp"
    shard.rename(optimizer.parent.parent / "outside.distcp")
    shard.symlink_to(optimizer.parent.parent / "outside.distcp")


CHANGES = {
    "up": (move("../../outside.distcp"), "is not in the folder"),
    "absolute": (move("{}/outside.distcp"), "is not in the folder"),
    "a link": (link, "is not in the folder"),
    "missing": (move("__0_7.distcp"), "__0_7.distcp is missing"),
    "huge": (of_first(lambda entry, info, _: setattr(entry, "size", torch.Size([10**9, 10**9]))), "not wholly there"),
    "huge part": (
        of_first(lambda entry, info, _: setattr(entry.chunks[0], "sizes", torch.Size([10**9, 10**9]))),
        "does not hold what",
    ),
    "no parts": (of_first(lambda entry, info, _: entry.chunks.clear()), "not wholly there"),
    "behind the end": (of_first(lambda entry, info, _: setattr(info, "offset", 10**9)), "does not hold what"),
    "before the start": (of_first(lambda entry, info, _: setattr(info, "offset", -1)), "is no shape"),
    "compressed": (of_first(lambda entry, info, _: setattr(info, "transform_descriptors", ["zstd"])), "does not hold"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_lie_wholly_in_the_folder(name, folder):
    change, words = CHANGES[name]
    optimizer = folder / "checkpoint-6" / "optimizer"
    metadata = pickle.loads((optimizer / ".metadata").read_bytes())
    change(metadata, optimizer)
    (optimizer / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, words)


def test_the_metadata_are_those_that_the_library_reads(digits_run):
    optimizer = digits_run / "checkpoint-6" / "optimizer"
    ours, theirs = read_metadata(optimizer), torch.distributed.checkpoint.FileSystemReader(optimizer).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and len(ours.state_dict_metadata) > 50
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    for index, info in theirs.storage_data.items():
        here = ours.storage_data[index]
        assert (here.relative_path, here.offset, here.length) == (info.relative_path, info.offset, info.length)


def test_a_pickle_cannot_change_classes(tmp_path):
    """BUILD on a class sets attributes of it: here of a record's class, which is made for one reading alone."""
    before = copy.deepcopy(vars(_StorageInfo).get("offset"))
    attack = b"\x80\x04ctorch.distributed.checkpoint.filesystem\n_StorageInfo\nN}X\x06\x00\x00\x00offsetK\x07s\x86b."
    (tmp_path / ".metadata").write_bytes(attack)
    with pytest.raises(ValueError):
        read_metadata(tmp_path)
    assert vars(_StorageInfo).get("offset") == before


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\x80\x05\x96" + (1 << 62).to_bytes(8, "little") + b".", f"tensors: {pickle.BYTEARRAY8[0]}"),  # gigabytes
        (tuple([2**62] * 100_000), "is no shape"),  # its product takes minutes
    ],
    ids=["bytearray", "shape"],
)
def test_metadata_that_ask_for_much_memory_or_time_are_refused(content, words, digits_run, tmp_path):
    metadata = pickle.loads((digits_run / "checkpoint-6" / "optimizer" / ".metadata").read_bytes())
    if isinstance(content, tuple):
        next(iter(metadata.state_dict_metadata.values())).size = content
        content = pickle.dumps(metadata)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_metadata(tmp_path)
    assert len(str(error.value)) < 500


# ------------------------------------------------------------------------------------------------- damage


def change_state(folder, **changes):
    path = folder / "checkpoint-6" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    certify(folder / "checkpoint-6")


STATES = [
    *({"step": value} for value in ("6", -6, None, 6.0, True, 5)),
    *({"samples_seen": value} for value in (None, -1, "96")),
    *({"bad_steps": None}, {"bad_in_a_row": []}, {"bad_images": "x"}, {"args": None}, {"args": []}),
    *({"window": value} for value in (3, "x", {"loss": "x"}, {"loss": [[1.0]]}, {"loss": [[1], ["a"]]}, [1.0, 2.0])),
    *({"model": 1}, {"transport": {}}, {"latents": {"vae": 3}}, {"model": {"class_dropout_prob": "x"}}),
]


@pytest.mark.parametrize("changes", STATES, ids=str)
def test_a_state_that_makes_no_sense_is_damage(changes, folder):
    change_state(folder, **changes)
    start = resume.find_start("auto", folder)
    assert start.folder.name == "checkpoint-3" and len(start.damaged) == 1 and "\n" not in start.damaged[0]


@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json"])
@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "", "[]", "{}", '{"files": {}}', '{"files": [1]}'])
def test_json_of_any_kind_is_damage(name, text, folder):
    (folder / "checkpoint-6" / name).write_text(text)
    if name == "trainer_state.json":
        certify(folder / "checkpoint-6")
    start = resume.find_start("auto", folder)
    assert start.folder.name == "checkpoint-3" and name in start.damaged[0] and "\n" not in start.damaged[0]


def test_a_manifest_names_files_of_its_folder(folder):
    path = folder / "checkpoint-6" / "manifest.json"
    entries = json.loads(path.read_text())["files"]
    (folder / "outside").write_text("x")
    path.write_text(json.dumps({"files": entries | {"../outside": files.manifest_entry(folder / "outside")}}))
    assert "../outside is not in the folder" in resume.find_start("auto", folder).damaged[0]
    device = folder / "checkpoint-6" / "device"
    device.symlink_to(os.devnull)  # /dev/zero would be read for ever
    path.write_text(json.dumps({"files": entries | {"device": files.manifest_entry(device)}}))
    assert "device is damaged" in resume.find_start("auto", folder).damaged[0]
    del entries["optimizer/.metadata"]
    path.write_text(json.dumps({"files": entries}))
    assert "manifest.json is missing or damaged" in resume.find_start("auto", folder).damaged[0]


def test_a_checkpoint_is_what_its_name_says(folder):
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-9")
    (folder / "checkpoint-12").touch()
    (folder / "checkpoint-15").symlink_to("nowhere")
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-006")
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-0000018")
    start = resume.find_start("auto", folder)
    assert start.folder.name == "checkpoint-6" and len(start.damaged) >= 4
    assert any("checkpoint-9 is not what its name says: it is of step 3" in line for line in start.damaged)
    resume.set_aside(start, folder)
    assert checkpoint.steps(folder) == [3, 6] and len(list(folder.glob("damaged-*"))) == 4
    assert resume.find_start("auto", folder).folder == start.folder


@pytest.mark.parametrize("name", ["checkpoint-9", "checkpoint-006", "damaged-0-checkpoint-6", "a file"])
def test_a_run_whose_only_checkpoint_was_renamed_does_not_begin_again(name, folder):
    shutil.rmtree(folder / "checkpoint-3")
    (folder / "checkpoint-6").rename(folder / name.replace("a file", "x"))
    if name == "a file":
        (folder / "checkpoint-6").touch()
    with pytest.raises(ValueError) as error:
        resume.find_start("auto", folder)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_does_not_load_means_the_one_before(folder, tmp_path):
    """Weights of another model, and a tensor that is none, in files with right checksums."""
    other = torch.load(folder / "checkpoint-6" / "ema.pt", weights_only=True)
    torch.save({key: value[..., :1] for key, value in other.items()}, folder / "checkpoint-6" / "ema.pt")
    certify(folder / "checkpoint-6")
    assert resume.find_start("auto", folder).folder.name == "checkpoint-6"  # the shapes are seen when it is loaded
    more = ["--ckpt-every", 3, "--output-dir", folder]
    result = run("train.py", *TINY, "--max-steps", 7, *more)
    assert result.returncode == 0 and f"continuing from {folder}/checkpoint-3, step 3" in result.stdout, result.stderr
    assert "checkpoint-6/ema.pt does not fit" in result.stdout and (folder / "damaged-0-checkpoint-6").is_dir()
    shard = folder / "checkpoint-7" / "optimizer" / "__0_0.distcp"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    certify(folder / "checkpoint-7")
    for step in (3, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    result = run("train.py", *TINY, "--max-steps", 8, *more)
    assert result.returncode == 2 and "checkpoint-7/optimizer does not load" in result.stderr
    assert result.stderr.count("\n") == 1 and checkpoint.steps(folder) == [7]


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint; give auto, never, a run folder"):
        resume.find_start(str(tmp_path), None)


def test_a_window_of_other_code_or_without_finite_sums_goes_on():
    metrics = Metrics("cpu", {"loss": [[1.0], [1.0]], "loss_by_time": [[1.0] * 3, [1.0] * 3], "x": [["nan"], [1.0]]})
    metrics.mean("loss", 3.0)
    metrics.mean_by_time("loss_by_time", torch.ones(1), torch.zeros(1))
    state = metrics.state()
    assert state["loss"] == [[4.0], [2.0]] and len(state["loss_by_time"][0]) == TIME_BINS
    assert state["x"] == [["nan"], [1.0]] and json.loads(files.to_json(state)) == state
