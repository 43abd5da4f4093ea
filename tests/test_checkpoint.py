import argparse
import json
import pickle
import re

import pytest
import safetensors.torch
import torch
from test_models import META, STATE_DICT, tiny

import download
from models import SiT, SiT_models
from utils import checkpoint
from utils.weights import load_weights, model_config_from_shapes

TRANSPORT = {"path_type": "Linear", "prediction": "velocity"}
STATE = {"model": META["config"], "transport": TRANSPORT, "latents": {"vae": "none"}}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of two different sets of weights, after a step of the optimizer; (folder, model, ema, optimizer)."""
    model, ema = tiny(), tiny()
    ema.load_state_dict(STATE_DICT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    writer = checkpoint.Writer(tmp_path / "run")
    writer.save(7, model, {"ema": ema}, optimizer, STATE)
    with torch.no_grad():  # what comes after a save has no say in it
        kept = [p.clone() for p in model.parameters()]
        torch._foreach_add_(list(model.parameters()), 1.0)
        assert writer.finish()
        torch._foreach_copy_(list(model.parameters()), kept)
    return tmp_path / "run" / "checkpoint-7", model, ema, optimizer


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_layout_and_contents(saved):
    folder, model, ema, _ = saved
    assert folder.name == "checkpoint-7"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "ema.pt",
        "optimizer",
        "trainer_state.json",
        "manifest.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-7"]
    assert equal(safetensors.torch.load_file(folder / "model.safetensors"), model.state_dict())
    assert equal(torch.load(folder / "ema.pt", weights_only=True), ema.state_dict())
    assert json.loads((folder / "trainer_state.json").read_text()) == STATE


def test_training_loads_again(saved):
    folder, model, ema, optimizer = saved
    others = tiny(), tiny()
    other = torch.optim.AdamW([p for p in others[0].parameters() if p.requires_grad], lr=0.5)
    assert checkpoint.load_training(folder, others[0], {"ema": others[1]}, other) == []
    assert equal(others[0].state_dict(), model.state_dict()) and equal(others[1].state_dict(), ema.state_dict())
    for mine, theirs in zip(
        other.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert equal(mine, theirs)
    assert other.param_groups[0]["lr"] == 0.5  # the flags', not the checkpoint's


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["model.safetensors", "ema.pt", "optimizer/.metadata", "optimizer/__0_0.distcp", "trainer_state.json"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", [flip_byte, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, name, damage):
    folder, model, ema, optimizer = saved
    writer = checkpoint.Writer(folder.parent)
    writer.save(9, model, {"ema": ema}, optimizer, STATE)
    assert writer.finish()
    newest = folder.with_name("checkpoint-9")
    checkpoint.check(newest)
    assert checkpoint.find_latest(folder.parent) == (newest, [])
    damage(newest / name)
    latest, (problem,) = checkpoint.find_latest(folder.parent)
    assert latest == folder and str(newest if name == "manifest.json" else newest / name) in problem
    if name == "ema.pt":
        with pytest.raises(ValueError, match="ema.pt"):
            load_weights(newest)
        with pytest.warns(UserWarning, match="checkpoint-9.ema.pt.*using.*checkpoint-7"):
            assert load_weights(folder.parent).path == folder / "ema.pt"


def test_checkpoints_are_kept_by_number_and_by_step(saved):
    folder, model, ema, optimizer = saved
    for leftover in (".checkpoint-6.partial", ".checkpoint-5.removed"):
        (folder.parent / leftover).mkdir()
    writer = checkpoint.Writer(folder.parent, keep_last=2, keep_every=10)
    for step in (10, 11, 12, 20, 21, 22):
        writer.save(step, model, {"ema": ema}, optimizer, STATE)
    assert writer.finish()
    assert sorted(checkpoint.steps(folder.parent)) == [10, 20, 21, 22]
    assert {path.name[:11] for path in folder.parent.iterdir()} == {"checkpoint-"}


@pytest.mark.parametrize("where", ["safetensors", "torch", "dcp", "folder"])
def test_a_failed_write_is_reported_and_keeps_earlier_checkpoints(saved, where, monkeypatch):
    folder, model, ema, optimizer = saved

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target = {
        "safetensors": "safetensors.torch.save_file",
        "torch": "torch.save",
        "dcp": "torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data",
        "folder": "pathlib.Path.mkdir",
    }[where]
    monkeypatch.setattr(target, full)
    said = []
    writer = checkpoint.Writer(folder.parent, report=said.append)
    writer.save(9, model, {"ema": ema}, optimizer, STATE)
    assert not writer.finish()
    assert "checkpoint-9 was not written" in said[0] and "No space left" in said[0]
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-7"]
    checkpoint.check(folder)
    monkeypatch.undo()
    writer.save(10, model, {"ema": ema}, optimizer, STATE)
    assert writer.finish()


def test_ema_first_from_a_run_a_checkpoint_and_its_files(saved):
    folder, model, ema, _ = saved
    for path in (folder.parent, folder, folder / "ema.pt"):
        weights = load_weights(path)
        assert weights.own and weights.config == STATE and equal(weights.state_dict, ema.state_dict())
    assert equal(load_weights(folder / "model.safetensors").state_dict, model.state_dict())


def test_the_latest_checkpoint_is_the_one_of_the_highest_step(saved):
    folder, model, ema, optimizer = saved
    writer = checkpoint.Writer(folder.parent)
    writer.save(100, model, {"ema": ema}, optimizer, STATE)
    assert writer.finish()
    for name in (".checkpoint-200.partial", "checkpoint-300-old", "checkpoint-x"):
        (folder.parent / name).mkdir()
    assert checkpoint.find_latest(folder.parent)[0].name == "checkpoint-100"
    assert checkpoint.find_latest(folder) == (None, [])


OTHER = {key: value + 1 for key, value in STATE_DICT.items()}
CONTENTS = {
    "bare": STATE_DICT,
    "official": {
        "model": OTHER,
        "ema": STATE_DICT,
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "args": argparse.Namespace(model="SiT-S/2", path_type="GVP", prediction="noise", vae="mse", image_size=64),
    },
    "without ema": {"model": STATE_DICT},
    "of DDP": {"module." + key: value for key, value in STATE_DICT.items()},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CONTENTS)
def test_pt_files(name, zipped, tmp_path):
    torch.save(CONTENTS[name], tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    weights = load_weights(tmp_path / "w.pt")
    assert equal(weights.state_dict, STATE_DICT) and not weights.own
    if name == "official":
        assert weights.config["transport"] == {"path_type": "GVP", "prediction": "noise"}
        assert weights.config["latents"] == {"vae": "mse", "image_size": 64}
    assert equal(download.find_model(tmp_path / "w.pt"), STATE_DICT)


class Malicious:
    def __reduce__(self):
        return (open, ("/tmp/sit-test-was-here", "w"))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": STATE_DICT, "args": Malicious()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="more than tensors and plain data"):
        load_weights(tmp_path / "w.pt")
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError):
        load_weights(tmp_path / "p.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "half"])
def test_damaged_files_are_named(name, damage, tmp_path):
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(STATE_DICT, path)
    else:
        safetensors.torch.save_file(STATE_DICT, path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not weights", "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ValueError, match=name) as error:
        load_weights(path)
    assert "\n" not in str(error.value)


def test_files_that_only_one_reader_understands_are_named(tmp_path):
    """The zip says that its entries are encrypted, which PyTorch ignores; the pickle has a text of 2^62 bytes."""
    torch.save(STATE_DICT, tmp_path / "zip.pt")
    content = bytearray((tmp_path / "zip.pt").read_bytes())
    for match in re.finditer(b"PK\x01\x02", bytes(content)):
        content[match.start() + 8] |= 1
    (tmp_path / "zip.pt").write_bytes(content)
    (tmp_path / "old.pt").write_bytes(b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b".")
    for name in ("zip.pt", "old.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a readable PyTorch file") as error:
            load_weights(tmp_path / name)
        assert "\n" not in str(error.value)


def test_other_things_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_weights(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="no checkpoint in"):
        load_weights(tmp_path)
    (tmp_path / "text.pt").write_text("q: not weights\n")
    with pytest.raises(ValueError, match="text.pt"):
        load_weights(tmp_path / "text.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(tmp_path / "w.pt")
    torch.save({"a": 1}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not those of a SiT"):
        model_config_from_shapes({**STATE_DICT, "pos_embed": torch.zeros(3)})
    with pytest.raises(ValueError, match="not those of a SiT"):
        model_config_from_shapes({k: v for k, v in STATE_DICT.items() if not k.startswith("blocks")})
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not of a SiT"):
        load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("name, arguments", [("SiT-XL/2", {}), ("SiT-S/8", dict(input_size=64, learn_sigma=False))])
def test_the_architecture_is_read_off_the_shapes(name, arguments):
    with torch.device("meta"):
        model = SiT_models[name](**arguments, num_classes=17, in_channels=5, mlp_ratio=2.0)
    config = model_config_from_shapes(model.state_dict())
    with torch.device("meta"):
        again = SiT(**config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert (config["num_classes"], config["num_heads"]) == (17, model.blocks[0].attn.num_heads)
    assert config["learn_sigma"] == model.learn_sigma


def test_an_unknown_width_leaves_the_heads_open():
    config = model_config_from_shapes(STATE_DICT)
    assert config == {key: META["config"][key] for key in config} and "num_heads" not in config
