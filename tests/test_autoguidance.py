"""Autoguidance: the guide's part in the samples, its conversion, its cost, and which guides are taken."""

import argparse
import dataclasses
import functools
import json
import shutil
import types

import pytest
import torch
from processes import run

import vae
from models import SiT, SiT_models
from sampling import flags
from sampling.draw import SampleSettings, describe, draw, resolve_settings, summary
from sampling.guidance import resolve_cfg_scale
from sampling.pipeline import Pipeline, load_pipeline
from sampling.shards import Shards
from transport import PATHS, PREDICTIONS, create_transport
from utils.files import manifest_entry, read_json, write_json

CPU = torch.device("cpu")
EULER = flags.ODE_DEFAULTS | dict(sampling_method="euler", num_steps=5, time_shift=1.0)


class Closed:
    """A network that is a function of (x, t), for images of 2 channels; `rows` lists the size of each batch."""

    in_channels, input_size, num_classes = 2, 4, 3
    y_embedder = types.SimpleNamespace(embedding_table=types.SimpleNamespace(num_embeddings=3))  # no null class

    def __init__(self, function):
        self.function, self.rows = function, []

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        return self.function(x, t)


def guided(function, guide, transport=None, guide_transport=None, channels=None):
    transport = transport or create_transport()
    pipeline = Pipeline(Closed(function), transport, vae.PixelSpace(), CPU, channels)
    other = dataclasses.replace(pipeline, model=Closed(guide), transport=guide_transport or transport)
    return dataclasses.replace(pipeline, guide=other)


def drawn(pipeline, scale, count=3, interval=None, solver=EULER, **more):
    return draw(pipeline, [0] * count, resolve_settings(pipeline, "ODE", solver, scale, interval, 0), **more)


def test_linear_networks_are_extrapolated_on_the_guided_channels():
    """dx/dt = a x, guided by b x: Euler multiplies x by 1 + (b + W (a - b)) dt in each step."""
    a, b, scale = -0.5, 0.25, 3.0
    pipeline = guided(lambda x, t: a * x, lambda x, t: b * x, channels=1)
    x, _ = drawn(pipeline, scale)
    plain, counts = drawn(dataclasses.replace(pipeline, guide=None), 1.0)
    assert counts == {"nfe": 4, "forward_passes": 4}
    noise = plain / (1 + a / 4) ** 4
    torch.testing.assert_close(x[:, 0], noise[:, 0] * (1 + (b + scale * (a - b)) / 4) ** 4)
    torch.testing.assert_close(x[:, 1], plain[:, 1])


def test_the_guide_is_evaluated_where_it_guides_and_counted():
    pipeline = guided(lambda x, t: -x, lambda x, t: x)
    networks = pipeline.model, pipeline.guide.model
    for scale, interval, batch_size, rows, passes in (
        (2.0, None, 64, 4 * [3], 8),
        (2.0, None, 2, 4 * [2] + 4 * [1], 8),
        (2.0, (0.2, 0.5), 64, 2 * [3], 6),  # t = 0, 0.25, 0.5, 0.75
        (1.0, None, 64, [], 4),
    ):
        networks[1].rows.clear()
        _, counts = drawn(pipeline, scale, interval=interval, batch_size=batch_size)
        assert networks[1].rows == rows and counts == {"nfe": 4, "forward_passes": passes}
    inside, _ = drawn(pipeline, 2.0, interval=(0.2, 0.5))
    # -x outside and x + 2 (-x - x) = -3 x inside, after two and two steps of 1/4.
    outside, _ = drawn(pipeline, 1.0)
    torch.testing.assert_close(inside, outside / 0.75**2 * 0.25**2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("its", PREDICTIONS)
def test_a_guide_with_another_prediction_is_converted(path, prediction, its):
    """For Gaussian data all three predictions are known: such a guide of the same data is no guidance."""
    transport, other = (create_transport(path, p, sample_eps=0.01) for p in (prediction, its))
    coefficients, std = transport.path, 0.5

    def velocity(x, t):
        alpha, sigma, d_alpha, d_sigma = (
            getattr(coefficients, name)(t) for name in ("alpha", "sigma", "d_alpha", "d_sigma")
        )
        return (d_alpha * alpha * std**2 + d_sigma * sigma) / (alpha**2 * std**2 + sigma**2) * x

    def network(kind):
        return lambda x, t: getattr(create_transport(path, "velocity"), kind)(velocity(x, t), x, t)

    pipeline = guided(network(prediction), network(its), transport, other)
    plain, _ = drawn(pipeline, 1.0)
    torch.testing.assert_close(drawn(pipeline, 3.0)[0], plain, rtol=1e-3, atol=1e-3)
    # And one of other data is not, which would hide a guide that is not used.
    pipeline.guide.model.function = lambda x, t: network(its)(0.9 * x, t)
    assert (drawn(pipeline, 3.0)[0] - plain).abs().max() > 0.05


def test_a_conversion_that_is_singular_is_refused():
    noise = create_transport(prediction="noise")
    pipeline = guided(lambda x, t: x, lambda x, t: x, None, noise)
    for interval in (None, (0.0, 0.5)):
        with pytest.raises(ValueError, match="predicts noise, which gives no velocity, .* at t = 0; .*--sample-eps"):
            drawn(pipeline, 2.0, interval=interval)
    drawn(pipeline, 2.0, interval=(0.1, 1.0))
    drawn(pipeline, 1.0)
    drawn(dataclasses.replace(pipeline, transport=create_transport(sample_eps=1e-3)), 2.0)
    times = [0.1, 0.5, 0.9]
    drawn(pipeline, 2.0, solver=EULER | {"time_grid": times, "num_steps": 3})
    with pytest.raises(ValueError, match="at t = 0;"):
        drawn(pipeline, 2.0, solver=EULER | {"time_grid": [0.0, *times], "num_steps": 4})


def tiny(seed, num_classes=3, **more):
    torch.manual_seed(seed)
    sizes = dict(input_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=4, learn_sigma=False)
    model = SiT(**sizes | more, num_classes=num_classes).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.0 if name == "pos_embed" else 0.1)
    return Pipeline(model, create_transport(), vae.PixelSpace(), CPU, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode, solver", [("ODE", EULER), ("SDE", flags.SDE_DEFAULTS | {"num_steps": 5})])
def test_the_model_as_its_own_guide_is_no_guidance(mode, solver, precision):
    same = dataclasses.replace(tiny(0), guide=tiny(0))
    other = dataclasses.replace(tiny(0), guide=tiny(1, depth=2, patch_size=4, class_dropout_prob=0.0))
    for pipeline in (same, other):
        pipeline.speed_up(precision, compiled=False)
        assert pipeline.guide.precision == precision
        assert pipeline.guide.model.blocks[0].mlp.fc1.weight.dtype == pipeline.model.blocks[0].mlp.fc1.weight.dtype
    plain, by_itself, by_other = (
        draw(pipeline, [0, 1, 2], SampleSettings(mode, solver, scale))[0]
        for pipeline, scale in ((same, 1.0), (same, 3.0), (other, 3.0))
    )
    assert torch.equal(plain, by_itself) and not torch.allclose(plain, by_other, atol=0.1)


def test_both_networks_are_compiled_and_get_whole_batches(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # traced alone, in seconds
    plain, compiled = (dataclasses.replace(tiny(0), guide=tiny(1)) for _ in range(2))
    compiled.speed_up("fp32", compiled=True)
    assert compiled.compiled and compiled.guide.compiled
    sizes = []
    for pipeline in (compiled, compiled.guide):
        forward = pipeline.model.forward_embedded
        assert hasattr(forward, "_torchdynamo_orig_callable")
        pipeline.model.forward_embedded = lambda x, *more, f=forward: sizes.append(len(x)) or f(x, *more)
    settings = SampleSettings("ODE", EULER, 2.0)
    (expected, counts), (x, same) = (draw(p, [0, 1, 2, 0, 1], settings, batch_size=3) for p in (plain, compiled))
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
    assert counts == same == {"nfe": 4, "forward_passes": 8} and set(sizes) == {3}


def test_the_default_scale_and_a_model_without_a_null_class():
    with torch.device("meta"):
        models = [SiT(depth=1, class_dropout_prob=p) for p in (0.1, 0.0)]
    for model in models:
        assert resolve_cfg_scale(None, model, models[0]) == 2 and resolve_cfg_scale(1.5, model, models[0]) == 1.5


@pytest.fixture(scope="module")
def by_step_3(digits_run):
    return load_pipeline(digits_run, CPU, guide_ckpt=digits_run / "checkpoint-3")


def test_a_guide_tells_settings_apart_and_none_changes_none(by_step_3, digits_run, tmp_path):
    alone = load_pipeline(digits_run, CPU)
    itself = load_pipeline(digits_run, CPU, guide_ckpt=digits_run)
    plain, of_step_3, of_itself, unused = (
        describe(pipeline, resolve_settings(pipeline, "ODE", EULER, scale, None, 0)) | pipeline.digests()
        for pipeline, scale in ((alone, 2.0), (by_step_3, 2.0), (itself, 2.0), (by_step_3, 1.0))
    )
    assert of_itself["guide_sha256"] == plain["weights_sha256"] != of_step_3["guide_sha256"]
    assert of_step_3.keys() - plain.keys() == {"guide", "guide_sha256"} and "guide" not in unused
    for i, first in enumerate((plain, of_step_3, of_itself)):
        shards = Shards(tmp_path / f"{i}.npz", 2, (8, 8, 1))
        for settings in (first, plain, of_step_3, of_itself):
            if settings == first:
                assert not shards.prepare(settings, False)
                continue
            with pytest.raises(ValueError, match=f"{i}.npz.parts/settings.json: made with .*guide"):
                shards.prepare(settings, False)


def test_the_summary_names_guide_and_time_grid(by_step_3):
    def line(pipeline, more):
        settings = resolve_settings(pipeline, "ODE", EULER | more, 2.0, [0.5, 1.0], 0)
        return summary(describe(pipeline, settings) | {"nfe": 4, "forward_passes": 6, "guide_ckpt": "runs/early"})

    rule = "4 NFE (6 forward passes), autoguidance 2 by runs/early on 1 of 1 channels for t in [0.5, 1], fp32"
    assert line(by_step_3, {}) == f"ODE euler, {rule}, Linear velocity"
    assert line(by_step_3, {"time_grid": "edm"}) == f"ODE euler, edm grid, {rule}, Linear velocity"
    times = [0.0, 0.5, 1.0]
    assert line(by_step_3, {"time_grid": times, "num_steps": 3}) == f"ODE euler, 3 given times, {rule}, Linear velocity"


def official(folder, arguments, size=8, **more):
    """The path of a file as the official code writes it, of a model of another size than the digits'."""
    torch.manual_seed(1)
    more = dict(num_classes=10, in_channels=1, learn_sigma=False) | more
    model = SiT_models["SiT-S/4"](input_size=size, depth=1, **more)
    path = folder / "guide.pt"
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "args": argparse.Namespace(**arguments)}, path)
    return path


def test_weights_without_a_config_guide_as_the_model_was_trained(digits_run, tmp_path, capsys):
    for more in ({}, {"class_dropout_prob": 0.0}):
        guide = load_pipeline(digits_run, CPU, guide_ckpt=official(tmp_path, {}, **more)).guide
        assert (guide.model_config["hidden_size"], guide.model.num_classes) == (384, 10)
        assert (guide.transport.prediction, guide.latent_shape) == ("velocity", (1, 8, 8))
        assert "does not say how it was trained; assumed: as the model" in capsys.readouterr().out
    path = official(tmp_path, dict(path_type="Linear", prediction="score", vae="none", num_classes=10))
    assert load_pipeline(digits_run, CPU, guide_ckpt=path).guide.transport.prediction == "score"
    assert "assumed" not in capsys.readouterr().out


def test_attention_heads_that_are_given_are_not_those_of_a_guide_of_known_width(digits_run, tmp_path):
    pipeline = load_pipeline(digits_run, CPU, guide_ckpt=official(tmp_path, {}), num_heads=4)
    assert (pipeline.model_config["num_heads"], pipeline.guide.model_config["num_heads"]) == (4, 6)


def test_a_guide_of_latents_with_another_scale_is_refused(digits_run, tmp_path):
    shutil.copytree(digits_run / "checkpoint-3", tmp_path / "checkpoint-3")
    state, manifest = (tmp_path / "checkpoint-3" / name for name in ("trainer_state.json", "manifest.json"))
    content = read_json(state)
    content["latents"] |= {"scale": 0.5, "shift": 0.0}
    state.write_text(json.dumps(content))
    entries = read_json(manifest)
    entries["files"]["trainer_state.json"] = manifest_entry(state)
    write_json(manifest, entries)
    with pytest.raises(ValueError, match=r"its latents' \(scale, shift\) is \(0.5, 0.0\), the model's \(None, None\)"):
        load_pipeline(digits_run, CPU, guide_ckpt=tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    "problem, arguments, more",
    [
        (r"latent shape is \(1, 16, 16\), the model's \(1, 8, 8\)", {}, {"size": 16}),
        (r"latent shape is \(3, 8, 8\), the model's \(1, 8, 8\)", {}, {"in_channels": 3}),
        ("number of classes is 4, the model's 10", {}, {"num_classes": 4}),
        ("number of classes is 11, the model's 10", {}, {"num_classes": 11}),
        ("path is GVP, the model's Linear", {"path_type": "GVP"}, {}),
        ("VAE is stabilityai/sd-vae-ft-ema, the model's none", {"vae": "ema"}, {}),
    ],
)
def test_a_guide_of_something_else_is_refused(problem, arguments, more, digits_run, tmp_path):
    path = official(tmp_path, arguments, **more)
    with pytest.raises(ValueError, match=f"--guide-ckpt {path} cannot guide this model: its {problem}"):
        load_pipeline(digits_run, CPU, guide_ckpt=path)


def test_the_scripts_take_a_guide_and_say_what_is_wrong(digits_run, tmp_path):
    early = digits_run / "checkpoint-3"
    solver = ["--sampling-method", "euler", "--num-sampling-steps", 5]
    words = ["--ckpt", digits_run, *solver, "--guide-ckpt", early]
    result = run("sample.py", *words, cwd=tmp_path)
    assert f"4 NFE (8 forward passes), autoguidance 2 by {early} on 1 of 1 channels" in result.stdout, result.stderr
    result = run("sample_ddp.py", *words, "--num-fid-samples", 4, "--cfg-scale", 1, cwd=tmp_path)
    assert "4 NFE (4 forward passes), no guidance" in result.stdout, result.stderr
    assert "--guide-ckpt has no effect with --cfg-scale 1" in result.stdout
    assert (tmp_path / "samples" / "digits-ODE-euler-5-cfg-1-by-checkpoint-3-seed-0-4.npz").is_file()
    result = run("sample.py", *words, "--guide-ema", "other", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "EMA other: " in result.stderr


def test_flags_of_a_guide_without_effect_are_named():
    def named(changed, scale):
        lines = flags.without_effect(changed, "ODE", EULER, scale)
        return {line.split()[0] for line in lines}

    both = {"guide_ckpt", "guide_ema"}
    assert named(both, 2.0) == set() and named(both, 1.0) == {"--guide-ckpt", "--guide-ema"}
    assert named({"guide_ema"}, 2.0) == {"--guide-ema"}
