"""sample.py, demo.py and the room they share."""

import argparse
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run
from tqdm import tqdm

import vae
from models import SiT, SiT_models
from sampling.draw import GuidedModel, ImageNoise, SampleSettings, decode, draw_labels, generate, resolve_settings
from sampling.flags import ODE_DEFAULTS, SDE_DEFAULTS, add_sampling_flags, solver_settings
from sampling.guidance import WHOLE, in_interval, resolve_cfg_scale
from sampling.pipeline import Pipeline, default_labels, load_pipeline
from transport import create_transport
from utils import checkpoint
from utils.command_line import Parser
from utils.grids import save_grid, to_uint8
from utils.weights import load_weights

CPU = torch.device("cpu")
EULER = ODE_DEFAULTS | {"sampling_method": "euler", "num_steps": 4}
SDE = SDE_DEFAULTS | {"num_steps": 4}


@pytest.fixture(scope="module")
def pipeline(digits_run):
    return load_pipeline(digits_run, CPU)


def images_of(pipeline, labels, mode="ODE", solver=EULER, cfg_scale=2.0, seed=0, cfg_interval=WHOLE, **more):
    settings = SampleSettings(mode, solver, cfg_scale, cfg_interval, seed)
    return generate(pipeline, labels, settings, **more)


def test_a_checkpoint_of_train_needs_no_other_flag(digits_run, tmp_path):
    result = run("sample.py", "--ckpt", digits_run, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (
        "ODE dopri5" in result.stdout and "fp32" in result.stdout and "guidance 4 on 1 of 1 channels" in result.stdout
    )
    assert Image.open(tmp_path / "sample.png").size == (4 * 66 + 2, 3 * 66 + 2)
    description = json.loads((tmp_path / "sample.json").read_text())
    assert description["nfe"] > 10 and description["class_labels"] == list(range(10))
    assert (description["mode"], description["sampling_method"], description["cfg_scale"]) == ("ODE", "dopri5", 4.0)


def test_the_pipeline_is_what_was_trained(pipeline, digits_run):
    assert (pipeline.transport.prediction, pipeline.guided_channels) == ("velocity", None)
    ema = torch.load(digits_run / "checkpoint-6" / "ema.pt", weights_only=True)
    for key, value in pipeline.model.state_dict().items():
        assert torch.equal(value, ema[key])
    assert not pipeline.model.training


@pytest.mark.parametrize("mode, settings", [("ODE", EULER), ("SDE", SDE), ("SDE", {**SDE, "sampling_method": "Heun"})])
def test_an_image_depends_on_seed_and_index_alone(pipeline, mode, settings):
    labels = [3, 1, 4, 1, 5, 9, 2]
    images, _ = images_of(pipeline, labels, mode, settings)
    assert images.shape == (7, 8, 8, 1) and images.dtype == torch.uint8
    in_batches, _ = images_of(pipeline, labels, mode, settings, batch_size=3)
    from_the_third, _ = images_of(pipeline, labels[2:], mode, settings, first_index=2)
    for other in (in_batches, from_the_third):
        difference = images[-len(other) :].int() - other.int()
        assert difference.abs().max() <= 1  # sums in another order may round to the next grey level
    assert not torch.equal(images, images_of(pipeline, labels, mode, settings, seed=1)[0])
    assert not torch.equal(images[1], images[3])  # the same label, another index


def test_evaluations_are_counted(pipeline):
    def counts(*arguments, **more):
        return tuple(images_of(pipeline, *arguments, **more)[1].values())

    assert counts([0, 1]) == (3, 6)
    assert counts([0, 1], cfg_scale=1.0) == (3, 3)
    assert counts([0, 1], solver={**EULER, "sampling_method": "rk4"}, batch_size=1) == (12, 24)
    assert counts([0], "SDE", SDE) == (4, 8)
    # Times 0, 1/3 and 2/3: one of the three lies inside.
    assert counts([0, 1], cfg_interval=(0.3, 0.6), batch_size=1) == (3, 4)


def test_guidance_equals_its_formula_and_scale_one_runs_no_unconditional_half(pipeline):
    torch.manual_seed(0)
    model = SiT(input_size=8, in_channels=4, hidden_size=32, depth=1, num_heads=4, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        x, t, y = torch.randn(3, 4, 8, 8), torch.full((3,), 0.3), torch.tensor([1, 2, 3])

        def guided(*arguments, channels=None):
            settings = SampleSettings(cfg_scale=arguments[0], cfg_interval=arguments[1] if arguments[1:] else WHOLE)
            bar = tqdm(disable=True)
            return GuidedModel(Pipeline(model, None, None, CPU, channels), settings.rule(channels), 64, bar)

        conditional, unconditional = model(x, t, y), model(x, t, torch.full_like(y, 10))
        expected = unconditional + 3 * (conditional - unconditional)
        torch.testing.assert_close(guided(3.0)(x, t, y), expected, atol=1e-5, rtol=1e-5)
        expected[:, 3:] = conditional[:, 3:]
        torch.testing.assert_close(guided(3.0, channels=3)(x, t, y), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(guided(1.0)(x, t, y), conditional)
        inside, outside = (guided(3.0, interval) for interval in ((0.2, 0.4), (0.4, 1.0)))
        torch.testing.assert_close(inside(x, t, y), guided(3.0)(x, t, y))
        torch.testing.assert_close(outside(x, t, y), model(x, t, y))
        assert (inside.forward_passes, outside.forward_passes) == (2, 1)


def test_noise_is_standard_normal_and_independent_between_images():
    noise = ImageNoise(0, range(64), CPU).draw((4, 32, 32))
    assert noise.mean().abs() < 0.01 and abs(noise.std() - 1) < 0.01
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(64)
    assert correlation.abs().max() < 0.1
    stream = ImageNoise(0, [5], CPU)
    first, second = stream.draw((4, 32, 32)), stream.randn_like(noise[:1].double())
    assert torch.equal(first[0], noise[5]) and not torch.equal(first.double(), second)
    assert second.dtype == torch.float64


def test_uint8_rounds_and_clamps():
    grey = torch.tensor([0, 1, 127, 128, 254, 255])
    exact = (grey / 127.5 - 1).reshape(1, 1, 1, 6)
    assert to_uint8(exact).flatten().tolist() == grey.tolist()
    for off in (-0.49, 0.49):
        assert to_uint8(exact + off / 127.5).flatten().tolist() == grey.tolist()
    assert to_uint8(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_the_grid_holds_the_images_in_rows(tmp_path):
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 8, 8, 1) * 40
    save_grid(images, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert [[int(grid[34 + 66 * r, 34 + 66 * c, 0]) for c in range(3)] for r in range(2)] == [
        [0, 40, 80],
        [120, 160, 200],
    ]


DAMAGES = {
    "missing part": lambda state: state.pop("model"),
    "unknown argument": lambda state: state["model"].update(width=3),
    "wrong type": lambda state: state["model"].update(depth="two"),
    "other depth": lambda state: state["model"].update(depth=3),
    "unknown path": lambda state: state["transport"].update(path_type="Cubic"),
    "not a dict": lambda state: state.update(transport=[1]),
    "no heads": lambda state: state["model"].pop("num_heads"),
    "no channels": lambda state: state["model"].pop("in_channels"),
    "no prediction": lambda state: state["transport"].pop("prediction"),
    "path is a list": lambda state: state["transport"].update(path_type=["VP"]),
    "vae is a number": lambda state: state["latents"].update(vae=3),
    "eps is a text": lambda state: state["transport"].update(sample_eps="x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_trainer_state_is_named(damage, digits_run, tmp_path):
    state = checkpoint.read_state(digits_run / "checkpoint-6")
    DAMAGES[damage](state)
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "ema.pt").write_bytes((digits_run / "checkpoint-6" / "ema.pt").read_bytes())
    with pytest.raises(ValueError, match="damaged|does not fit|unknown path type"):
        load_pipeline(tmp_path, CPU)


def official_file(folder, arguments):
    torch.manual_seed(0)
    model = SiT_models["SiT-S/8"](input_size=8, num_classes=6, learn_sigma=False, depth=1)
    path = folder / "official.pt"
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "args": argparse.Namespace(**arguments)}, path)
    return path


def test_official_checkpoints_bring_their_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "open_space", lambda vae, *more: vae)
    path = official_file(tmp_path, dict(path_type="VP", prediction="score", vae="mse", image_size=64, lr=1e-4))
    pipeline = load_pipeline(path, CPU)
    assert (pipeline.transport.prediction, pipeline.transport.sample_eps) == ("score", 1e-3)
    assert pipeline.space == "mse" and pipeline.guided_channels == 3
    assert load_pipeline(path, CPU, "all", sample_eps=0.01).transport.sample_eps == 0.01
    with pytest.raises(ValueError, match="--path-type GVP contradicts"):
        load_pipeline(path, CPU, path_type="GVP")


def test_bare_weights_are_described_by_flags(digits_run, tmp_path):
    path = tmp_path / "bare.pt"
    torch.save(load_weights(digits_run).state_dict, path)
    given = dict(num_heads=4, vae="none")
    pipeline = load_pipeline(path, CPU, **given, path_type="GVP", prediction="noise")
    assert pipeline.transport.prediction == "noise" and pipeline.model.num_classes == 10
    with pytest.raises(ValueError, match="--vae ema makes 4"):
        load_pipeline(path, CPU, num_heads=4)


def test_guidance_scale_by_default_and_without_a_null_class():
    with torch.device("meta"):
        with_null, without = SiT(depth=1), SiT(depth=1, class_dropout_prob=0.0)
    assert resolve_cfg_scale(None, with_null) == 4 and resolve_cfg_scale(None, without) == 1
    assert resolve_cfg_scale(1.5, with_null) == 1.5 and resolve_cfg_scale(1.0, without) == 1
    with pytest.raises(ValueError, match="null class"):
        resolve_cfg_scale(1.5, without)


@pytest.mark.parametrize(
    "flag, allowed, refused",
    [
        ("--num-classes", ["1"], ["0", "-1", "1.5"]),
        ("--num-heads", ["1"], ["0"]),
        ("--image-size", ["1"], ["0"]),
        ("--guided-channels", ["1", "all"], ["0", "none"]),
        ("--num-sampling-steps", ["2"], ["1"]),
        ("--time-shift", ["0.1", "3"], ["0", "-1"]),
        ("--atol", ["1e-9"], ["0", "nan"]),
        ("--rtol", ["1e-9"], ["0", "inf"]),
        ("--diffusion-norm", ["0", "9"], ["-0.1"]),
        ("--last-step-size", ["0.001", "0.999"], ["0", "1"]),
        ("--train-eps", ["0", "0.499"], ["0.5", "-0.1"]),
        ("--sample-eps", ["0", "0.499"], ["0.5", "-0.1"]),
        ("--cfg-interval", ["0 1"], ["0 1.01", "-0.1 1"]),
        ("--cfg-scale", ["0", "7.5"], ["nan", "all"]),
        ("--precision", ["fp32", "bf16"], ["fp16"]),
        ("--vae-precision", ["fp32", "bf16"], ["tf32"]),
    ],
)
def test_the_range_of_every_number(flag, allowed, refused, capsys):
    parser = Parser("")
    add_sampling_flags(parser)
    for text in allowed:
        parser.parse_args([flag, *text.split()])
    for text in refused:
        with pytest.raises(SystemExit):
            parser.parse_args([flag, *text.split()])
        assert f"argument {flag}: must be a" in capsys.readouterr().err or flag.endswith("precision")


def test_labels_and_noise_of_a_seed_stay_what_they_are_and_share_no_stream():
    """These numbers may never change: a seed would mean other samples."""
    assert draw_labels(6, 1000, 0, False).tolist() == [889, 449, 25, 391, 767, 576]
    assert draw_labels(12, 5, 0, True).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    noise = ImageNoise(0, [0, 7], CPU).draw((2,))
    torch.testing.assert_close(noise, torch.tensor([[1.1176220, -1.3871249], [-1.5634333, 0.0549674]]))
    torch.testing.assert_close(ImageNoise(3, [0], CPU).draw((1,), "random"), torch.tensor([[0.8115045]]))


@pytest.fixture
def small_sizes(monkeypatch):
    """SiT-S/8 and SiT-S/4, cut to one block of width 24."""
    for patch_size in (8, 4):
        size = functools.partial(SiT, patch_size=patch_size, hidden_size=24, depth=1, num_heads=6)
        monkeypatch.setitem(SiT_models, f"SiT-S/{patch_size}", size)


def test_a_model_s_name_describes_weights_and_must_agree_with_them(tmp_path, small_sizes):
    model = SiT_models["SiT-S/8"](input_size=8, in_channels=1, num_classes=6)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    official = {"ema": model.state_dict(), "args": argparse.Namespace(model="SiT-S/8", path_type="GVP")}
    torch.save(official, tmp_path / "official.pt")
    with pytest.raises(ValueError, match="give --num-heads"):
        load_pipeline(tmp_path / "bare.pt", CPU, vae="none")
    for name, given in (("bare.pt", dict(model="SiT-S/8")), ("official.pt", {}), ("official.pt", dict(num_heads=6))):
        assert load_pipeline(tmp_path / name, CPU, vae="none", **given).model_config["num_heads"] == 6
        with pytest.raises(ValueError, match="--model SiT-S/4 contradicts the weights.* patch_size is 8, not 4"):
            load_pipeline(tmp_path / name, CPU, vae="none", model="SiT-S/4")


def test_shapes_and_digests_are_those_of_the_space(small_vae, pipeline):
    """Latents of two channels are decoded to three channels of twice the side; pixels have the channels of the data."""
    model = SiT(input_size=4, in_channels=2, hidden_size=8, depth=1, num_heads=1, num_classes=3)
    spaces = [vae.LatentSpace(small_vae(latent_channels=2, scaling_factor=f), CPU) for f in (0.5, 0.25)]
    first, second = (Pipeline(model, create_transport(), space, CPU, None) for space in spaces)
    assert (first.latent_shape, first.image_shape) == ((2, 4, 4), (8, 8, 3))
    assert (pipeline.latent_shape, pipeline.image_shape) == ((1, 8, 8), (8, 8, 1))
    settings = SampleSettings("ODE", EULER, cfg_scale=1.0)
    assert generate(first, [0], settings)[0].shape == (1, 8, 8, 3)
    assert pipeline.digests()["vae"] == {}
    digests = first.digests()
    assert digests["vae"]["scale"] == 0.5 and digests["weights_sha256"] == second.digests()["weights_sha256"]
    assert digests["vae"]["sha256"] == second.digests()["vae"]["sha256"] != digests["weights_sha256"]
    with torch.no_grad():
        model.pos_embed[0, 0, 0] += 1
    assert first.digests()["weights_sha256"] != digests["weights_sha256"]


def test_the_image_size_is_that_of_decoded_images(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "open_space", lambda vae, *more: vae)
    path = official_file(tmp_path, dict(vae="ema"))
    assert load_pipeline(path, CPU, image_size=64).model.input_size == 8
    with pytest.raises(ValueError, match="--image-size 8 contradicts the weights, which make 64 pixels"):
        load_pipeline(path, CPU, image_size=8)


@pytest.mark.parametrize(
    "mode, method, sizes", [("ODE", "dopri5", (64, 64)), ("ODE", "rk4", (3, 100)), ("SDE", "Heun", (3, 100))]
)
def test_an_adaptive_solver_takes_the_same_images_at_a_time_whatever_the_batch(mode, method, sizes):
    settings = SampleSettings(mode, {"sampling_method": method})
    assert tuple(settings.group_size(batch_size) for batch_size in (3, 100)) == sizes


def test_an_interval_of_guidance_includes_its_ends():
    for t, expected in ((0.24, "plain"), (0.25, "guided"), (0.5, "guided"), (0.51, "plain")):
        rule, network = (lambda *arguments, name=name: name for name in ("guided", "plain"))
        assert in_interval(network, None, torch.tensor([t]), None, rule=rule, low=0.25, high=0.5) == expected


def test_a_compiled_network_gets_whole_batches_of_the_right_labels(pipeline):
    seen = []

    def rule(network, x, t, y):
        seen.append(y.tolist())
        return network(x, t, y)

    x, t, y = torch.randn(5, 1, 8, 8), torch.full((5,), 0.3), torch.tensor([1, 2, 3, 4, 5])
    plain, whole = (
        GuidedModel(dataclasses.replace(pipeline, compiled=compiled), rule, 3, tqdm(disable=True))
        for compiled in (False, True)
    )
    torch.testing.assert_close(whole(x, t, y), plain(x, t, y), atol=1e-5, rtol=1e-5)
    assert seen == [[1, 2, 3], [4, 5, 5], [1, 2, 3], [4, 5]]
    assert (whole.nfe, whole.forward_passes, plain.forward_passes) == (1, 1, 1)
    torch.testing.assert_close(whole(x[:3], t, y[:3]), plain(x[:3], t, y[:3]), atol=1e-5, rtol=1e-5)


def test_without_a_checkpoint_the_released_weights_are_asked_for(monkeypatch):
    def resolve(name):
        raise ValueError(f"asked for {name}")

    monkeypatch.setattr("utils.hub.resolve", resolve)
    for given, name in (({}, "SiT-XL/2-256"), (dict(model="SiT-B/4", image_size=512), "SiT-B/4-512")):
        with pytest.raises(ValueError, match=f"asked for {name}"):
            load_pipeline(None, CPU, **given)


def test_images_that_are_not_finite_are_refused_whether_network_or_autoencoder_made_them(pipeline):
    class Space(vae.PixelSpace):
        def decode(self, latents):
            return latents / 0

    images = torch.rand(5, 1, 8, 8)
    assert decode(pipeline, images, 2).shape == (5, 8, 8, 1)
    with pytest.raises(ValueError, match="not finite"):
        decode(dataclasses.replace(pipeline, space=Space()), images, 2)
    images[4, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        decode(pipeline, images, 2)


def test_the_classes_of_a_grid():
    """Those of the official sample.py for ImageNet; otherwise the first ten."""
    assert default_labels(1000) == [207, 360, 387, 974, 88, 979, 417, 279]
    assert default_labels(3) == [0, 1, 2] and default_labels(999) == list(range(10))


def test_the_defaults_of_the_flags_are_those_of_help():
    grid = dict(num_steps=250, time_shift=1.0)
    ode = dict(sampling_method="dopri5", atol=1e-6, rtol=1e-3, reverse=False) | grid
    sde = dict(sampling_method="Euler", diffusion_form="sigma", diffusion_norm=1.0, last_step="Mean") | grid
    assert solver_settings(None, {}) == solver_settings("ODE", {}) == ("ODE", ode)
    assert solver_settings("SDE", {}) == ("SDE", sde | dict(last_step_size=0.04))
    with pytest.raises(ValueError, match="--rtol has no effect on SDE"):
        solver_settings("SDE", {"rtol": 1e-4})
    assert solver_settings("ODE", {"sampling_method": "rk4", "time_shift": 3.0})[1]["time_shift"] == 3.0


def test_settings_of_flags(pipeline):
    def resolve(cfg_scale, cfg_interval):
        return resolve_settings(pipeline, "ODE", EULER, cfg_scale, cfg_interval, 5)

    assert resolve(None, None) == SampleSettings("ODE", EULER, 4.0, WHOLE, 5)
    assert resolve(2.0, [0.25, 0.5]) == SampleSettings("ODE", EULER, 2.0, (0.25, 0.5), 5)
    assert resolve(1.0, None).cfg_scale == 1
    for scale, interval in ((1.0, [0.25, 0.5]), (2.0, [0.5, 0.5]), (2.0, [0.5, 0.25])):
        with pytest.raises(ValueError, match="--cfg-interval"):
            resolve(scale, interval)
