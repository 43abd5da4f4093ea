"""Weights that others bring. Each kind is written here as its project writes it.

| weights | read as |
|---|---|
| train.py: run, checkpoint, model.safetensors or ema.pt copied away | what they are: the config is in the file |
| checkpoint folder without manifest.json | what they are, not verified |
| official SiT: {'model', 'ema', 'opt', 'args'} | path, prediction and VAE by `args` |
| bare state dict, .pt or .safetensors, any float dtype | Linear, velocity, VAE ema; a line says so |
| keys with `module.`, `_orig_mod.`, `model.`, ... before them | the same weights without |
| folder or hub snapshot with one file of weights | that file; by config.json if train.py's config is in it |
| NumPy numbers and arrays, paths, dates beside weights | plain data |
| REPA, paths linear and cosine, also its first ones with decoder_blocks | SiT with time reversed; a line says so |
| REPA with qk-norm, REPA-E, RAE, LightningDiT, MDT, diffusers | refused; the line names what is foreign |
| DiT | refused by its arguments; a warning by its name |
| anything that runs code, absurd shapes, bombs | refused in one line |
"""

import argparse
import collections
import datetime
import json
import math
import pathlib
import pickle
import re
import shutil
import struct
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from processes import run
from test_models import META, STATE_DICT, randomise, tiny

import download
from models import SiT
from sampling.draw import describe, summary
from sampling.guidance import resolve_cfg_scale
from sampling.pipeline import load_pipeline
from training import resume, setup
from transport import Sampler, create_transport
from utils import checkpoint
from utils.tensor_files import config_of, read_pt, read_safetensors
from utils.weights import load_weights

CPU = torch.device("cpu")
HEADS = META["config"]["num_heads"]
VP = {"path_type": "VP", "prediction": "noise", "loss_weight": None, "train_eps": None, "sample_eps": 0.01}
GIVEN = dict(vae="none", num_heads=HEADS)


def state_of(model, **transport):
    config = {"model": META["config"] | model, "transport": VP | transport}
    config |= {"latents": {"vae": "none", "image_size": 8, "channels": 4}, "data": {"class_names": ["ä", "VP"]}}
    return {"step": 7, "seed": 0, **config, "args": {"lr": 1e-4}}


def save(folder, model, ema, state):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    writer = checkpoint.Writer(folder)
    writer.save(state["step"], model, {"ema": ema}, optimizer, state)
    assert writer.finish()
    return folder / f"checkpoint-{state['step']}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of train.py's on the VP path, with an option of SiT that differs from its default."""
    return save(tmp_path_factory.mktemp("run"), randomise(tiny()), randomise(tiny()), state_of({}))


def printed(capsys):
    """What load_pipeline said beside that it loads."""
    return "".join(line for line in capsys.readouterr().out.splitlines(True) if not line.startswith("loading "))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Checkpoints of train.py.


@pytest.mark.parametrize("name", ["ema.pt", "model.safetensors"])
def test_a_copied_file_says_what_it_is(name, saved, tmp_path, capsys):
    shutil.copy(saved / name, tmp_path / name)
    for ckpt in (tmp_path / name, tmp_path):
        weights = load_weights(ckpt)
        assert weights.own and weights.notes == [] and weights.guided_channels == "all"
        assert weights.config == {k: v for k, v in state_of({}).items() if k not in ("args", "seed")}
        pipeline = load_pipeline(ckpt, CPU)
        transport = pipeline.transport
        assert (type(transport.path).__name__, transport.prediction, transport.sample_eps) == ("VPPath", "noise", 0.01)
        assert pipeline.space.name == "none" and pipeline.guided_channels is None
        assert printed(capsys) == ""
    with pytest.raises(ValueError, match="--path-type Linear contradicts the checkpoint, trained with VP"):
        load_pipeline(tmp_path / name, CPU, path_type="Linear")


def test_the_official_way_to_load_stays_strict(saved):
    for weights_only in (True, False):
        state_dict = torch.load(saved / "ema.pt", weights_only=weights_only)
        tiny().load_state_dict(state_dict)
        assert isinstance(state_dict, dict) and state_dict.keys() == STATE_DICT.keys()
    tiny().load_state_dict(safetensors.torch.load_file(saved / "model.safetensors"))
    with safetensors.safe_open(saved / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "sit_config"} and metadata["format"] == "pt"
    assert json.loads(metadata["sit_config"]) == config_of(read_pt(saved / "ema.pt"))


def test_bytes_depend_on_the_run_alone(saved, tmp_path):
    """Not on the identity of strings, nor on the order of a hash table; nor on model options that are off."""
    state = json.loads(json.dumps(state_of({})))
    state["model"]["an option of later"] = False
    folders = [save(tmp_path / str(i), randomise(tiny()), randomise(tiny()), state) for i in range(4)]
    option = types.SimpleNamespace(default=False)
    released = types.SimpleNamespace(default=True)
    signature = types.SimpleNamespace(parameters={"learn_sigma": released, "an option of later": option})
    for name in ("ema.pt", "model.safetensors"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.inspect, "signature", lambda _: signature)
        folder = save(tmp_path / "option", randomise(tiny()), randomise(tiny()), state)
    for name in ("ema.pt", "model.safetensors"):
        assert (folder / name).read_bytes() == (saved / name).read_bytes()


def test_a_state_of_other_weights_is_refused(saved, tmp_path):
    for name in ("ema.pt", "trainer_state.json"):
        shutil.copy(saved / name, tmp_path)
    others = [state_of({}, path_type="Linear"), state_of({}, prediction="score")]
    others.append(state_of({}) | {"data": {"class_names": ["VP", "ä"]}})
    for change, other in zip(("path_type", "prediction", "class_names"), others, strict=True):
        (tmp_path / "trainer_state.json").write_text(json.dumps(other))
        for ckpt in (tmp_path, tmp_path / "ema.pt"):
            with pytest.raises(ValueError, match=f"trainer_state.json is damaged, or of other.*{change} is"):
                load_weights(ckpt)


@pytest.mark.parametrize("name, note", [("ema.pt", "not verified"), ("model.safetensors", "the trained weights")])
def test_a_checkpoint_without_its_manifest_loads_with_a_note(name, note, saved, tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoint-7"
    folder.mkdir(parents=True)
    for copied in (name, "trainer_state.json"):
        shutil.copy(saved / copied, folder)
    for ckpt in (folder, folder.parent):
        assert type(load_pipeline(ckpt, CPU).transport.path).__name__ == "VPPath"
        said = printed(capsys)
        assert "has no manifest.json" in said and note in said
    (folder / name).unlink()
    with pytest.raises(ValueError, match="manifest.json|holds neither ema.pt nor model.safetensors"):
        load_weights(folder)


def test_files_of_before_load_as_they_did(saved, tmp_path, capsys):
    """Without a config in them: by trainer_state.json beside them, or by flags."""
    torch.save(dict(read_pt(saved / "ema.pt")), tmp_path / "ema.pt")
    safetensors.torch.save_file(dict(read_safetensors(saved / "model.safetensors")), tmp_path / "model.safetensors")
    for name in ("ema.pt", "model.safetensors"):
        assert not load_weights(tmp_path / name).own
        pipeline = load_pipeline(tmp_path / name, CPU, **GIVEN, path_type="VP", prediction="noise")
        assert pipeline.guided_channels == 3 and printed(capsys) == ""
    shutil.copy(saved / "trainer_state.json", tmp_path)
    for name in ("ema.pt", "model.safetensors"):
        assert load_weights(tmp_path / name).own and load_weights(tmp_path / name).config["transport"] == VP


@pytest.mark.parametrize(
    "config",
    [
        {"model": 3},
        {"model": {}, "transport": {}, "latents": {}},
        {"model": {"width": 1}, "transport": VP, "latents": {"vae": "none"}},
        ["model"],
        {"model": META["config"] | {"hidden_size": "a"}, "transport": VP, "latents": {"vae": "none"}},
        {"model": META["config"] | {"depth": None}, "transport": VP, "latents": {"vae": "none"}},
        {"model": META["config"], "transport": VP | {"sample_eps": "x"}, "latents": {"vae": "none"}},
    ],
)
def test_a_damaged_config_is_named(config, tmp_path):
    metadata = {"sit_config": json.dumps(config)}
    safetensors.torch.save_file(STATE_DICT, tmp_path / "w.safetensors", metadata=metadata)
    state_dict = collections.OrderedDict(STATE_DICT)
    state_dict._metadata = {"sit_config": config}
    torch.save(state_dict, tmp_path / "w.pt")
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(ValueError, match=f"{name}.*damaged"):
            load_pipeline(tmp_path / name, CPU)


# Weights without a config.


def test_what_is_assumed_is_said_and_flags_say_otherwise(tmp_path, capsys):
    torch.save(STATE_DICT, tmp_path / "w.pt")
    pipeline = load_pipeline(tmp_path / "w.pt", CPU, num_heads=HEADS, vae="none")
    (line,) = printed(capsys).splitlines()
    assert (
        "w.pt does not say" in line
        and "--path-type Linear, --prediction velocity, --num-classes 10 (one label more" in line
    )
    counts = {"nfe": 1, "forward_passes": 1}
    settings = types.SimpleNamespace(mode="ODE", solver={"sampling_method": "euler"}, cfg_scale=1, seed=0)
    settings.cfg_interval, settings.guidance, settings.internal_guidance = (0, 1), None, None
    assert summary(describe(pipeline, settings) | counts).endswith("fp32, Linear velocity")
    load_pipeline(tmp_path / "w.pt", CPU, **GIVEN, path_type="GVP", prediction="score")
    assert printed(capsys) == ""
    official = {"ema": STATE_DICT, "args": argparse.Namespace(path_type="GVP", prediction="noise", vae="none")}
    torch.save(official, tmp_path / "w.pt")
    assert load_pipeline(tmp_path / "w.pt", CPU, num_heads=HEADS).transport.prediction == "noise"
    assert printed(capsys) == ""


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "module.module.",
        "model._orig_mod.module.",
        "ema_model.",
        "net.dit.",
    ],
)
def test_prefixes_of_wrappers_are_taken_off(prefix, tmp_path):
    torch.save({"ema": {prefix + key: value for key, value in STATE_DICT.items()}}, tmp_path / "w.pt")
    assert equal(download.find_model(tmp_path / "w.pt"), STATE_DICT)


def test_wrappers_inside_names_and_averages_of_torch(tmp_path):
    inside = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in STATE_DICT.items()}
    averaged = torch.optim.swa_utils.AveragedModel(randomise(tiny())).state_dict()
    torch.save(inside, tmp_path / "inside.pt")
    torch.save(averaged, tmp_path / "averaged.pt")
    assert equal(load_weights(tmp_path / "inside.pt").state_dict, STATE_DICT)
    assert equal(load_weights(tmp_path / "averaged.pt").state_dict, randomise(tiny()).state_dict())
    torch.save(STATE_DICT | inside, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="twice"):
        load_weights(tmp_path / "twice.pt")
    torch.save(
        {"model." + key: value for key, value in STATE_DICT.items()} | {"vae.w": torch.ones(1)}, tmp_path / "m.pt"
    )
    with pytest.raises(ValueError, match="not of a SiT"):
        load_weights(tmp_path / "m.pt")


def test_an_ema_that_is_no_state_dict_is_said(tmp_path):
    shadow = {"decay": 0.9999, "shadow_params": list(STATE_DICT.values())}
    torch.save({"ema": shadow, "model": STATE_DICT}, tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert equal(weights.state_dict, STATE_DICT) and "trained weights are used" in weights.notes[0]
    torch.save({"params_ema": STATE_DICT, "model": STATE_DICT}, tmp_path / "w.pt")
    assert "params_ema" in load_weights(tmp_path / "w.pt").notes[0]
    torch.save({"ema_model": STATE_DICT, "state_dict": {}}, tmp_path / "w.pt")
    assert load_weights(tmp_path / "w.pt").notes == []


def test_a_file_that_was_compressed_later(tmp_path):
    torch.save({"ema": STATE_DICT}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as plain,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert equal(load_weights(tmp_path / "z.pt").state_dict, STATE_DICT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions(dtype, tmp_path):
    weights = {key: value.to(dtype) for key, value in STATE_DICT.items()}
    torch.save(weights, tmp_path / "w.pt")
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        model = load_pipeline(tmp_path / name, CPU, **GIVEN).model
        assert equal(model.state_dict(), {key: value.float() for key, value in weights.items()})


def test_heads_of_a_known_width_are_those_of_the_flag(tmp_path):
    model = randomise(SiT(input_size=8, hidden_size=384, depth=1, num_heads=12, num_classes=3))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert load_pipeline(tmp_path / "w.pt", CPU, vae="none").model.blocks[0].attn.num_heads == 6
    assert load_pipeline(tmp_path / "w.pt", CPU, vae="none", num_heads=12).model.blocks[0].attn.num_heads == 12
    with pytest.raises(ValueError, match="--num-heads|--model SiT-S/2 contradicts"):
        load_pipeline(tmp_path / "w.pt", CPU, vae="none", num_heads=12, model="SiT-S/2")


def test_heads_of_a_name_are_those_of_its_width(tmp_path):
    """Another project's SiT-S/2 of width 48 would load with the 6 heads of width 384, and draw something else."""
    torch.save({"ema": tiny(hidden_size=48).state_dict(), "args": {"model": "SiT-S/2"}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="width 48.*give --num-heads"):
        load_pipeline(tmp_path / "w.pt", CPU, vae="none")


def test_weights_without_a_null_class_are_known_by_their_number_of_classes(tmp_path, capsys):
    """Guidance would take the last class for the null class."""
    state_dict = tiny(class_dropout_prob=0.0, num_classes=5).state_dict()
    torch.save(state_dict, tmp_path / "bare.pt")
    torch.save({"ema": state_dict, "args": argparse.Namespace(num_classes=5)}, tmp_path / "official.pt")
    for name, given in (("bare.pt", {"num_classes": 5}), ("official.pt", {}), ("official.pt", {"num_classes": 5})):
        pipeline = load_pipeline(tmp_path / name, CPU, **GIVEN, **given)
        assert pipeline.model.num_classes == 5 and resolve_cfg_scale(None, pipeline.model) == 1
    for given, cfg_scale in (({}, 4), ({"num_classes": 4}, 4)):
        pipeline = load_pipeline(tmp_path / "bare.pt", CPU, **GIVEN, **given)
        assert pipeline.model.num_classes == 4 and resolve_cfg_scale(None, pipeline.model) == cfg_scale
    assert "none of them is taken for the null class" in printed(capsys)
    torch.save({"ema": state_dict, "args": argparse.Namespace(num_classes=4)}, tmp_path / "null.pt")
    for name, num_classes in (("bare.pt", 6), ("null.pt", 5), ("official.pt", 4)):
        with pytest.raises(ValueError, match=f"--num-classes {num_classes} contradicts"):
            load_pipeline(tmp_path / name, CPU, **GIVEN, num_classes=num_classes)


def test_a_folder_with_one_file_of_weights(saved, tmp_path):
    for name in ("pytorch_model.bin", "0050000.pt", "last.ckpt", "checkpoints/0400000.pt"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        torch.save(STATE_DICT, folder / name)
        (folder / "README.md").write_text("# weights")
        (folder / ".hidden.pt").write_text("")
        assert equal(load_weights(folder).state_dict, STATE_DICT)
    hub = tmp_path / "models--me--sit" / "snapshots" / "abc"
    hub.mkdir(parents=True)
    (tmp_path / "blob").write_bytes(safetensors.torch.save(STATE_DICT))
    (hub / "model.safetensors").symlink_to(tmp_path / "blob")
    (hub / "config.json").write_text("{}")
    assert not load_weights(hub).own and equal(load_weights(hub).state_dict, STATE_DICT)
    (hub / "config.json").write_text((saved / "trainer_state.json").read_text())
    assert load_weights(hub).own and load_weights(hub).config["transport"] == VP
    (hub / "other.pt").write_text("")
    with pytest.raises(ValueError, match="several files of weights.*model.safetensors, other.pt"):
        load_weights(hub)
    shutil.rmtree(hub)
    hub.mkdir()
    (hub / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ValueError, match="no checkpoint in.*a pipeline of diffusers"):
        load_weights(hub)


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_data_beside_weights(zipped, tmp_path):
    beside = {
        "steps": np.int64(400000),
        "best": np.float64(2.5),
        "loss": np.float32(0.25),
        "done": np.bool_(True),
        "name": np.str_("é"),
        "big endian": np.array([3], ">i4")[0],
        "history": np.arange(5.0),
        "generator": np.random.get_state(),
        "path": pathlib.Path("/a/b"),
        "when": datetime.datetime(2024, 1, 1),
        "namespace": types.SimpleNamespace(lr=np.float32(1)),
    }
    torch.save({"ema": STATE_DICT, **beside}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert equal(load_weights(tmp_path / "w.pt").state_dict, STATE_DICT)
    read = read_pt(tmp_path / "w.pt")
    plain = {key: read[key] for key in ("steps", "best", "loss", "done", "name", "big endian")}
    assert plain == {"steps": 400000, "best": 2.5, "loss": 0.25, "done": True, "name": "é", "big endian": 3}
    assert all(type(value) in (int, float, bool, str) for value in plain.values())
    assert str(read["path"]) == "/a/b" and read["namespace"].lr == 1 and read["when"].year == 2024


def test_numbers_of_numpy_1_and_2(tmp_path):
    content = {"ema": STATE_DICT, "steps": np.int64(4), "array": np.arange(3)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    written = (tmp_path / "w.pt").read_bytes()
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        (tmp_path / "w.pt").write_bytes(re.sub(rb"numpy\._?core\.multiarray", module, written))
        assert read_pt(tmp_path / "w.pt")["steps"] == 4


class Code:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("/tmp/sit-test-was-here"),))


class Setting:
    pass


@pytest.mark.parametrize(
    "what, name",
    [
        (Code(), "getattr"),
        (Setting(), "test_weights.Setting"),
        (np.array([None]), "numpy.dtype"),
        (torch.nn.SiLU(), "torch.nn"),
    ],
)
def test_what_is_no_plain_data_is_named_and_not_run(what, name, tmp_path):
    torch.save({"ema": STATE_DICT, "args": what}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"more than tensors and plain data .*{name}"):
        load_weights(tmp_path / "w.pt")
    assert not pathlib.Path("/tmp/sit-test-was-here").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_what_lies_in_the_place_of_weights_is_named(name, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2700000000\n"
    for text, problem in ((pointer, "git lfs pull"), ("<!DOCTYPE html><html>", "web page")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} is a.*{problem}"):
            load_weights(tmp_path / name)


# REPA.

REPA = dict(model="SiT-XL/2", prediction="v", enc_type="dinov2-vit-b", encoder_depth=1, num_classes=3, lr=1e-4)


def repa_weights(dtype=torch.float32, classes=3):
    """The EMA of REPA's train.py, a SiT that predicts no sigma, with a projector."""
    torch.manual_seed(3)
    model = SiT(input_size=8, hidden_size=384, depth=2, num_heads=6, num_classes=classes, learn_sigma=False)
    raw = {key: value.to(dtype) for key, value in randomise(model).state_dict().items()}
    raw["final_layer.linear.weight"] *= 3
    return raw | {"projectors.0.0.weight": torch.ones(8, 384), "projectors.0.0.bias": torch.zeros(8)}


def repa_network(raw, dtype):
    """(x, t, y) -> velocity as REPA defines both: t = 0 is data, 1 is noise, and the velocity is from data to noise."""
    model = SiT(input_size=8, hidden_size=384, depth=2, num_heads=6, num_classes=3, learn_sigma=False).to(dtype).eval()
    model.load_state_dict({key: value for key, value in raw.items() if not key.startswith("projectors.")})
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("path_type, path", [("linear", "Linear"), ("cosine", "GVP")])
def test_weights_of_repa_draw_what_they_draw_there(path_type, path, dtype, tolerance, tmp_path, capsys):
    raw = repa_weights(dtype)
    content = {
        "model": raw,
        "ema": raw,
        "opt": {},
        "args": argparse.Namespace(**REPA, path_type=path_type, resolution=8),
    }
    torch.save(content | {"steps": 400000}, tmp_path / "0400000.pt")
    pipeline = load_pipeline(tmp_path / "0400000.pt", CPU, vae="none")
    said = printed(capsys)
    assert "REPA" in said and "other way" in said and "converted" in said and "assumed" not in said
    assert (type(pipeline.transport.path).__name__, pipeline.transport.prediction) == (f"{path}Path", "velocity")
    assert pipeline.guided_channels is None  # REPA guides all channels
    model = pipeline.model.to(dtype)
    model.load_state_dict(download.find_model(tmp_path / "0400000.pt"))

    theirs, y = repa_network(raw, dtype), torch.tensor([0, 2, 3])
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    with torch.no_grad():
        # Their Euler sampler.
        x, times = noise, torch.linspace(1, 0, 21, dtype=torch.float64)
        for t, following in zip(times[:-1], times[1:], strict=True):
            x = x + (following - t).to(dtype) * theirs(x, t.to(dtype).repeat(3), y)
        transport = create_transport(path)
        ours = Sampler(transport).sample_ode(sampling_method="euler", num_steps=21)(noise, model, y=y)[-1]
        assert (ours - x).abs().max() < tolerance * x.abs().max() and (x - noise).abs().max() > 0.1

        # Their score of a velocity.
        t = torch.tensor([0.1, 0.5, 0.9], dtype=dtype)
        alpha, sigma, d_alpha, d_sigma = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        if path_type == "cosine":
            alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
            d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
        alpha, sigma, d_alpha, d_sigma, v = (
            *(part[:, None, None, None] for part in (alpha, sigma, d_alpha, d_sigma)),
            theirs(noise, t, y),
        )
        score = (alpha / d_alpha * v - noise) / (sigma**2 - alpha / d_alpha * d_sigma * sigma)
        ours = transport.get_score()(noise, 1 - t, model, y=y)
        assert (ours - score).abs().max() < tolerance * score.abs().max()


def test_bare_weights_of_repa_are_known_by_their_projectors(tmp_path, capsys):
    raw = repa_weights()
    torch.save(raw, tmp_path / "last.pt")
    pipeline = load_pipeline(tmp_path / "last.pt", CPU, vae="none")
    said = printed(capsys)
    assert "converted" in said and "assumed: --path-type Linear, --num-classes" in said
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([1, 3])
    with torch.no_grad():
        expected = -repa_network(raw, torch.float32)(x, 1 - t, y)
        assert (pipeline.model(x, t, y) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (
        type(load_pipeline(tmp_path / "last.pt", CPU, vae="none", path_type="GVP").transport.path).__name__ == "GVPPath"
    )
    # Its first checkpoints count the blocks behind the aligned one from 0 again.
    first = {key.replace("blocks.1.", "decoder_blocks.0."): value for key, value in raw.items()}
    torch.save(first, tmp_path / "last.pt")
    with torch.no_grad():
        model = load_pipeline(tmp_path / "last.pt", CPU, vae="none").model
        assert (model(x, t, y) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_weights_of_repa_keep_their_precision(tmp_path):
    raw = repa_weights(torch.float16)
    torch.save({"ema": raw, "args": {"path_type": "linear"}}, tmp_path / "w.pt")
    converted = load_weights(tmp_path / "w.pt").state_dict
    assert {value.dtype for value in converted.values()} == {torch.float16}
    assert torch.equal(converted["blocks.0.mlp.fc1.weight"], raw["blocks.0.mlp.fc1.weight"])


def test_what_repa_cannot_mean_is_refused(tmp_path):
    path = tmp_path / "0400000.pt"

    def refusal(extra=None, vae="none", **arguments):
        torch.save({"ema": repa_weights() | (extra or {}), "args": argparse.Namespace(**(REPA | arguments))}, path)
        with pytest.raises(ValueError, match="0400000.pt") as error:
            load_pipeline(path, CPU, vae=vae)
        return str(error.value)

    text = refusal(resolution=64)
    assert "REPA" in text and "other way" in text and "64" in text
    assert "prediction must be 'v'" in refusal(prediction="x")
    assert "not 'VP'" in refusal(path_type="VP")
    norms = {f"blocks.{i}.attn.{part}_norm.weight": torch.ones(64) for i in (0, 1) for part in "qk"}
    assert "q_norm" in refusal(norms, qk_norm=True) and "qk-norm" in refusal(norms, qk_norm=True)
    assert "bn.running_mean" in refusal({"bn.running_mean": torch.zeros(4)})


def test_a_run_starts_from_weights_of_repa_and_saves_a_sit(tmp_path, capsys):
    raw = repa_weights(classes=10)
    torch.save({"ema": raw, "args": argparse.Namespace(**REPA, path_type="linear")}, tmp_path / "repa.pt")
    model = dict(input_size=8, in_channels=4, hidden_size=384, depth=2, num_heads=6, num_classes=10, learn_sigma=False)
    transport = {"path_type": "Linear", "prediction": "velocity"}
    config = {"model": model, "transport": transport, "latents": {"vae": "none"}}
    given, notes = setup.initial_weights(config, 0, str(tmp_path / "repa.pt"), resume.Start())
    assert equal(given, load_weights(tmp_path / "repa.pt").state_dict) and "converted" in notes[0]
    network = SiT(**model)
    network.load_state_dict(given)
    folder = save(tmp_path / "run", network, network, {"step": 1, **config})
    weights = load_weights(folder / "ema.pt")
    assert weights.own and weights.notes == [] and equal(weights.state_dict, given)
    assert load_weights(folder.parent).notes == [f"the newest checkpoint of {folder.parent} is {folder.name}"]


# DiT and others.

DIT = dict(model="DiT-S/2", image_size=64, num_classes=3, vae="ema", epochs=1400, global_seed=0)


@pytest.mark.parametrize("kind", [argparse.Namespace, dict, types.SimpleNamespace])
def test_dit_is_refused_by_its_arguments(kind, tmp_path):
    torch.save({"model": STATE_DICT, "ema": STATE_DICT, "opt": {}, "args": kind(**DIT)}, tmp_path / "0050000.pt")
    for load in (load_weights, download.find_model, lambda path: load_pipeline(path, CPU, **GIVEN)):
        with pytest.raises(ValueError, match="0050000.pt is a checkpoint of DiT-S/2, not of a SiT"):
            load(tmp_path / "0050000.pt")


def test_other_models_are_warned_of_by_their_names(tmp_path, capsys, monkeypatch):
    hub = tmp_path / "models--facebook--DiT-XL-2-256" / "snapshots" / "abc"
    for folder, name in (
        (tmp_path, "DiT-XL-2-256x256.pt"),
        (tmp_path / "dit", "w.pt"),
        (tmp_path, "repa_last.pt"),
        (tmp_path, "SiT-XL-2-repa.pt"),
        (hub, "w.pt"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(STATE_DICT, folder / name)
        load_pipeline(folder / name, CPU, **GIVEN)
        said = printed(capsys).replace(str(folder / name), "")
        assert "warning" in said and ("REPA" if "repa" in name else "DiT") in said
    for name in ("SiT-XL-2-256x256.pt", "editor.pt", "condition.pt", "sit-not-dit.pt"):
        torch.save(STATE_DICT, tmp_path / name)
        load_pipeline(tmp_path / name, CPU, **GIVEN)
        assert "warning" not in printed(capsys)
    monkeypatch.chdir(tmp_path / "dit")
    load_pipeline("w.pt", CPU, **GIVEN)
    assert "warning" in printed(capsys)
    torch.save({"ema": STATE_DICT, "args": argparse.Namespace(model="SiT-S/2")}, tmp_path / "DiT.pt")
    load_pipeline(tmp_path / "DiT.pt", CPU, **GIVEN)
    assert "warning" not in printed(capsys)


FOREIGN = {
    "LightningDiT": {"blocks.0.mlp.w12.weight": (8, 4), "blocks.0.norm1.weight": (4,), "feat_rope.freqs_cos": (4, 4)},
    "RAE": {"s_embedder.proj.weight": (4, 4, 1, 1), "s_projector.weight": (4, 4)},
    "MDT": {"en_inblocks.0.attn.qkv.weight": (12, 4), "decoder_pos_embed": (1, 4, 4)},
    "REPA-E": {"bn.running_mean": (4,), "bn.running_var": (4,)},
    "qk-norm": {"blocks.0.attn.q_norm.weight": (4,), "blocks.0.attn.k_norm.weight": (4,)},
}


@pytest.mark.parametrize("project", FOREIGN)
def test_other_descendants_are_refused_by_what_is_foreign(project, tmp_path):
    more = {key: torch.ones(shape) for key, shape in FOREIGN[project].items()}
    torch.save({"ema": {"module." + key: value for key, value in (STATE_DICT | more).items()}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"w.pt does not fit.*{list(more)[0]}.*{project}"):
        load_pipeline(tmp_path / "w.pt", CPU, **GIVEN)
    torch.save(more, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"w.pt.*not of a SiT.*{project}"):
        load_weights(tmp_path / "w.pt")


def test_integer_sparse_and_empty_weights_are_refused(tmp_path):
    key = "final_layer.linear.weight"
    for value in ((STATE_DICT[key] * 100).to(torch.int8), STATE_DICT[key].to_sparse(), STATE_DICT[key].to("meta")):
        torch.save(STATE_DICT | {key: value}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=f"w.pt.*{key} is torch"):
            load_pipeline(tmp_path / "w.pt", CPU, **GIVEN)


# What would take too much memory or time.


def write_bombs(folder):
    """Write files of few bytes that ask for gigabytes. Return their paths."""
    shapes = {key: value.shape[:-2] + (10**6, 10**6)[-value.dim() :] for key, value in STATE_DICT.items()}
    wide = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    torch.save({"ema": wide}, folder / "shapes.pt")
    torch.save(STATE_DICT | {"pos_embed": torch.zeros(1).expand(1, 10**6, 10**6)}, folder / "one-shape.pt")
    wide = {key: torch.zeros(1).expand(value.shape[:-1] + (10**9,)) for key, value in repa_weights().items()}
    torch.save({"ema": wide, "args": {"path_type": "linear"}}, folder / "repa.pt")
    torch.save(STATE_DICT | {"blocks.999999999.attn.qkv.bias": torch.zeros(1)}, folder / "depth.pt")
    config = {"transport": VP, "latents": {"vae": "none"}}
    for key, value in (("hidden_size", 4 * 10**9), ("depth", 10**9), ("input_size", 10**12), ("mlp_ratio", 1e300)):
        described = config | {"model": META["config"] | {key: value}}
        safetensors.torch.save_file(STATE_DICT, folder / f"{key}.safetensors", {"sit_config": json.dumps(described)})
        for name in ("trainer_state.json", "config.json"):
            (folder / f"{key}-{name}").mkdir()
            torch.save(STATE_DICT, folder / f"{key}-{name}" / "ema.pt")
            (folder / f"{key}-{name}" / name).write_text(json.dumps(described))
    deep = "[" * 10**6 + "]" * 10**6
    safetensors.torch.save_file(STATE_DICT, folder / "deep.safetensors", {"sit_config": deep})
    for name in ("trainer_state.json", "config.json"):
        (folder / f"deep-{name}").mkdir()
        torch.save(STATE_DICT, folder / f"deep-{name}" / "ema.pt")
        (folder / f"deep-{name}" / name).write_text('{"model": ' + deep + "}")
    for name, content in (("lists.pt", b"\x80\x02](" + b"]" * 3 * 10**7 + b"e."), ("bytes.pt", bytes(2 * 10**8))):
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3")
    (folder / "old-lists.pt").write_bytes(b"\x80\x02](" + b"]" * 10**6 + b"e.")
    torch.save({"ema": {str(i): [] for i in range(150_000)}}, folder / "many.pt")
    content = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (6 << 30).to_bytes(5, "little") + b"\x85R."
    for name in ("data.pkl", "DATA.PKL"):  # PyTorch ignores the case
        with zipfile.ZipFile(folder / f"array-{name}.pt", "w") as archive:
            archive.writestr(f"archive/{name}", content)
            archive.writestr("archive/version", "3")
    header = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    (folder / "old-array.pt").write_bytes(b"".join(header) + content)
    (folder / "old-array-of-names.pt").write_bytes(b"".join(header) + pickle.dumps({}, 2) + content)
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return sorted(path for path in folder.iterdir())


LIMITED = """
import pathlib, resource, sys, time
from sampling.pipeline import load_pipeline
import torch
sys.path.insert(0, "tests")
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30),) * 2)
for name in sys.argv[1:]:
    start = time.process_time()
    try:
        load_pipeline(name, torch.device("cpu"), vae="none", num_heads=4)
        print("bomb", name, "LOADED")
    except ValueError as error:
        print(f"bomb {time.process_time() - start:.2f} {error}")
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_bombs_are_refused_in_one_line_with_little_memory_and_time(tmp_path):
    folder = tmp_path / "bombs"
    folder.mkdir()
    paths = write_bombs(folder)
    (tmp_path / "limited.py").write_text(LIMITED)
    result = run(tmp_path / "limited.py", *paths)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("bomb ")]
    assert len(lines) == len(paths)
    for line, path in zip(lines, paths, strict=True):
        _, seconds, text = line.split(" ", 2)
        assert path.name in text and "LOADED" not in line and float(seconds) < 3, line
    assert int(result.stdout.split("peak ")[1]) < 2 << 20  # KiB


# The official names.


def test_the_official_names_of_models():
    import models

    for name, network in models.SiT_models.items():
        assert getattr(models, name.replace("-", "_").replace("/", "_")) is network


def test_the_official_names_of_transports():
    from transport import ModelType, PathType, Transport, WeightType

    assert [member.name for member in ModelType] == ["NOISE", "SCORE", "VELOCITY"]
    assert [member.name for member in PathType] == ["LINEAR", "GVP", "VP"]
    assert [member.name for member in WeightType] == ["NONE", "VELOCITY", "LIKELIHOOD"]
    how = dict(model_type=ModelType.SCORE, path_type=PathType.GVP, loss_type=WeightType.LIKELIHOOD)
    transport = Transport(**how, train_eps=1e-3, sample_eps=0)
    assert (transport.model_type, transport.loss_type) == (ModelType.SCORE, WeightType.LIKELIHOOD)
    assert (transport.prediction, transport.loss_weight, transport.sample_eps) == ("score", "likelihood", 0)
    assert type(transport.path).__name__ == "GVPPath"
    velocity = create_transport(PathType.VP)
    assert (velocity.model_type, velocity.loss_type) == (ModelType.VELOCITY, WeightType.NONE)
    with pytest.raises(ValueError, match="unknown path type 'linear'"):
        create_transport("linear")


@pytest.mark.parametrize("path_type", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
def test_drift_and_score_equal_the_official_formulas(prediction, path_type):
    transport = create_transport(path_type, prediction)
    x, t = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    output, wide = torch.randn_like(x), t[:, None, None, None]
    (alpha, d_alpha), (sigma, d_sigma) = (
        f(wide) for f in (transport.path_sampler.compute_alpha_t, transport.path_sampler.compute_sigma_t)
    )
    variance = d_alpha / alpha * sigma**2 - sigma * d_sigma
    ratio = alpha / d_alpha
    score = {
        "score": output,
        "noise": -output / sigma,
        "velocity": (ratio * output - x) / (sigma**2 - ratio * d_sigma * sigma),
    }[prediction]
    drift = output if prediction == "velocity" else d_alpha / alpha * x + variance * score

    def model(x, t, y):
        assert y == 5
        return output

    torch.testing.assert_close(transport.get_drift()(x, t, model, y=5), drift)
    torch.testing.assert_close(transport.get_score()(x, t, model, y=5), score)
    mean, weight = transport.path_sampler.compute_drift(x, t)
    torch.testing.assert_close((-mean, weight), (d_alpha / alpha * x, variance))
    x0 = torch.randn_like(x)
    same, xt, ut = transport.path_sampler.plan(t, x0, x)
    assert same is t
    torch.testing.assert_close((xt, ut), (alpha * x + sigma * x0, d_alpha * x + d_sigma * x0))
    torch.testing.assert_close(
        transport.path_sampler.get_velocity_from_score(score, x, t), d_alpha / alpha * x + variance * score
    )
    velocity = d_alpha / alpha * x + variance * score
    torch.testing.assert_close(transport.path_sampler.get_score_from_velocity(velocity, x, t), score)
    torch.testing.assert_close(transport.path_sampler.get_noise_from_velocity(velocity, x, t), -sigma * score)
    assert transport.path_sampler.compute_diffusion(x, t, form="sigma", norm=2.0).shape == (3, 1, 1, 1)


def test_intervals_equal_the_official_ones():
    last = dict(sde=True, eval=True, last_step_size=0.04)
    for path, prediction, how, expected in [
        ("Linear", "velocity", {}, (0, 1)),
        ("GVP", "noise", {}, (1e-3, 1 - 1e-3)),
        ("VP", "velocity", {}, (0, 1 - 1e-5)),
        ("VP", "score", dict(eval=True), (0, 1 - 1e-3)),
        ("Linear", "noise", last, (1e-3, 0.96)),
        ("VP", "noise", last, (0, 0.96)),
        ("GVP", "score", dict(eval=True, reverse=True), (1 - 1e-3, 1e-3)),
    ]:
        transport = create_transport(path, prediction)
        interval = transport.check_interval(transport.train_eps, transport.sample_eps, **how)
        assert interval == pytest.approx(expected), (path, prediction, how)


def test_the_cells_of_the_official_notebook(tmp_path, monkeypatch):
    """As run_SiT.ipynb does it, with a tiny network in the place of SiT_XL_2, and without the autoencoder."""
    from transport import Sampler, create_transport

    torch.save(STATE_DICT, tmp_path / "SiT-XL-2-256x256.pt")
    model = tiny()
    model.load_state_dict(download.find_model(str(tmp_path / "SiT-XL-2-256x256.pt")))
    model.eval()
    sampler = Sampler(create_transport())
    n, null = 2, META["config"]["num_classes"]
    z = torch.randn(n, 4, 8, 8)
    z, y = torch.cat([z, z], 0), torch.cat([torch.tensor([0, 1]), torch.tensor([null] * n)], 0)
    sde = dict(sampling_method="Euler", diffusion_form="sigma", diffusion_norm=1.0, last_step_size=0.04, num_steps=4)
    ode = dict(sampling_method="dopri5", atol=1e-6, rtol=1e-3, num_steps=4, reverse=False)
    for sample_fn in (sampler.sample_sde(**sde), sampler.sample_ode(**ode)):
        samples = sample_fn(z, model.forward_with_cfg, y=y, cfg_scale=4)[-1]
        samples, _ = samples.chunk(2, dim=0)
        assert samples.shape == (n, 4, 8, 8) and samples.isfinite().all()
