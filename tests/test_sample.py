"""sample.py, demo.py and the room they share."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run
from tqdm import tqdm

import vae
from models import SiT, SiT_models
from sampling.draw import GuidedModel, ImageNoise, SampleSettings, generate
from sampling.flags import ODE_DEFAULTS, SDE_DEFAULTS
from sampling.guidance import WHOLE, resolve_cfg_scale
from sampling.pipeline import Pipeline, load_pipeline
from utils import checkpoint
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
    monkeypatch.setattr(vae, "LatentSpace", lambda vae, device, dtype: vae)
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
