"""Pictures over time: the recorded states and predictions, and where they are in the picture."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from processes import run

import vae
from sampling.draw import SampleSettings, draw, generate
from sampling.flags import ODE_DEFAULTS, SDE_DEFAULTS
from sampling.pipeline import Pipeline
from sampling.trajectory import Record, draw_strips, write
from transport import PATHS, PREDICTIONS, create_transport

CPU = torch.device("cpu")
EULER = ODE_DEFAULTS | dict(sampling_method="euler", num_steps=5)
POINT = torch.linspace(-0.5, 0.5, 16).reshape(1, 1, 4, 4)


class ToPoint:
    """The exact network of data that is one image, `POINT` times one more than the label: it predicts that image."""

    in_channels, input_size, num_classes = 1, 4, 3

    def __init__(self, path, prediction):
        self.path, self.prediction = path, prediction

    def __call__(self, x, t, y):
        data = POINT * (1 + y[:, None, None, None])
        noise = (x - self.path.alpha(t) * data) / self.path.sigma(t)
        if self.prediction == "velocity":
            return self.path.d_alpha(t) * data + self.path.d_sigma(t) * noise
        return noise if self.prediction == "noise" else -noise / self.path.sigma(t)


def to_point(path="Linear", prediction="velocity", sample_eps=0.01):
    transport = create_transport(path, prediction, sample_eps=sample_eps)
    return Pipeline(ToPoint(transport.path, prediction), transport, vae.PixelSpace(), CPU, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "mode, solver",
    [
        ("ODE", EULER),
        ("ODE", EULER | {"reverse": True}),
        ("ODE", EULER | {"sampling_method": "heun2"}),
        ("ODE", ODE_DEFAULTS),
        ("SDE", SDE_DEFAULTS | {"num_steps": 5}),
    ],
)
def test_all_evaluations_are_recorded_and_none_is_added(path, prediction, mode, solver):
    pipeline, settings = to_point(path, prediction), SampleSettings(mode, solver)
    plain, counts = draw(pipeline, [0, 1, 2], settings)
    record = Record(pipeline.transport)
    drawn, same = draw(pipeline, [0, 1, 2], settings, record=record)
    assert torch.equal(drawn, plain) and same == counts == {"nfe": len(record.solves[0])} | {
        "forward_passes": counts["nfe"]
    }
    for t, (xt, data) in record.solves[0]:
        expected = POINT * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
        torch.testing.assert_close(data, expected, atol=2e-3, rtol=1e-3)
        assert 0 <= t < 0.991 and xt.shape == data.shape
    times = [t for t, _ in record.solves[0]]
    ends = (times[0], times[-1]) if solver.get("reverse") else (times[-1], times[0])
    assert ends[0] > 0.7 and ends[1] < 0.3


def test_states_are_those_of_the_solver():
    """Euler is exact on the straight lines of the Linear path: x_t = (1 - t) x0 + t x1."""
    pipeline, record = to_point(sample_eps=0.0), Record(create_transport())
    draw(pipeline, [1], SampleSettings("ODE", EULER), record=record)
    states = {t: xt for t, (xt, _) in record.solves[0]}
    assert sorted(states) == [0.0, 0.25, 0.5, 0.75]
    for t, xt in states.items():
        torch.testing.assert_close(xt, (1 - t) * states[0.0] + t * 2 * POINT)


def test_where_sigma_is_zero_the_state_is_the_data():
    """VP's d_sigma is infinite at t = 1, where nothing is left to predict."""
    path = create_transport("VP", sample_eps=0.0)
    model, x = Record(path).watch(lambda x, t, y: x, 2), torch.randn(2, 1, 4, 4)
    record = Record(path)
    record.watch(lambda x, t, y: torch.ones_like(x), 2)(x, torch.ones(2), None)
    assert torch.equal(record.solves[0][0][1], torch.stack([x, x])) and torch.equal(model(x, torch.ones(2), None), x)


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_the_first_images_are_shown_whatever_the_batches(batch_size):
    pipeline, record = to_point(sample_eps=1e-4), Record(create_transport(), most=5)
    settings, labels = SampleSettings("ODE", EULER | {"sampling_method": "heun2"}), [0, 1, 2, 1, 0, 2, 1]
    images, _ = generate(pipeline, labels, settings, batch_size=batch_size, record=record)
    assert record.spread(4).tolist() == [0, 2, 6, 7] and record.spread(99).tolist() == [0, 2, 4, 6, 7]
    times, pictures = record.strips(pipeline, images, [0, 7])
    assert times == pytest.approx([1e-4, 1 - 1e-4]) and pictures.shape == (2, 3, 5, 4, 4, 1)
    assert torch.equal(pictures[0, -1], images[:5]) and torch.equal(pictures[1, -1], images[:5])
    difference = pictures[1, 0].int() - images[:5].int()  # the prediction from noise is the data
    assert difference.abs().max() <= 2
    assert (pictures[0, 0].int() - images[:5].int()).abs().max() > 50


def test_steps_that_were_not_taken_are_left_out():
    """Two tries of a step from 0.2, to 0.8 and to 0.5, each of whose ends is evaluated twice."""
    tries = [0.0, 0.2, 0.2, 0.4, 0.8, 0.8, 0.3, 0.5, 0.5, 0.7, 1.0]
    for times in (tries, [1 - t for t in tries]):
        record = Record(create_transport())
        record.solves = [[(t, None) for t in times]]
        assert record.spread(99).tolist() == [0, 2, 6, 8, 9, 10]
        assert record.spread(3).tolist() == [0, 6, 10] and record.spread(1).tolist() == [0]


@pytest.mark.parametrize("num_steps", [5, 2])
def test_a_reverse_solve_ends_with_the_last_prediction_beside_the_noise(num_steps):
    pipeline, record = to_point(), Record(create_transport())
    solver = EULER | {"reverse": True, "num_steps": num_steps}
    images, _ = generate(pipeline, [0, 1], SampleSettings("ODE", solver), record=record)
    times, pictures = record.strips(pipeline, images, range(num_steps - 1))
    assert times == sorted(times, reverse=True) and torch.equal(pictures[0, -1], images)
    assert torch.equal(pictures[1, -1], pictures[1, -2]) and not torch.equal(pictures[1, -1], images)


@pytest.mark.parametrize("side, gap, channels", [(4, 1, 1), (32, 2, 3)])
def test_every_picture_is_at_its_place(side, gap, channels):
    pictures = torch.randint(0, 255, (2, 4, 3, side, side, channels), dtype=torch.uint8)
    axes = Figure().subplots()
    draw_strips(axes, ["0", "0.5", "1", "end"], pictures)
    mosaic = axes.images[0].get_array()
    step = side + gap
    for k, s, n in np.ndindex(2, 4, 3):
        row, column = n * (2 * step + 2 * gap) + k * step, s * step
        tile = mosaic[row : row + side, column : column + side]
        assert np.array_equal(tile, pictures[k, s, n].expand(-1, -1, 3))
        assert axes.get_yticks()[2 * n + k] == row + (side - 1) / 2
        assert axes.get_xticks()[s] == column + (side - 1) / 2
    assert np.unique(mosaic[side : side + gap]).tolist() == [255]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.5", "1", "end"]


def test_latents_are_decoded(small_vae, tmp_path):
    space = vae.LatentSpace(small_vae(latent_channels=1), CPU)
    pipeline = dataclasses.replace(to_point(sample_eps=1e-4), space=space)
    record = Record(pipeline.transport)
    images, _ = generate(pipeline, [0, 1], SampleSettings("ODE", EULER), record=record)
    _, pictures = record.strips(pipeline, images, record.spread(12))
    assert pictures.shape == (2, 5, 2, 8, 8, 3)
    assert (pictures[1].int() - images.int()).abs().max() <= 2  # the same latent, in all columns
    assert write(tmp_path / "latents.png", pipeline, record, images) == 2


def test_a_gif_has_a_frame_for_each_time_and_ends_with_the_images(tmp_path):
    pipeline, record = to_point(), Record(create_transport())
    images, _ = generate(pipeline, [0, 1, 2], SampleSettings("ODE", EULER), record=record)
    assert write(tmp_path / "a.gif", pipeline, record, images) == 3
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (4 * 66 + 2, 2 * 66 + 2)
        gif.seek(4)
        last, durations = np.asarray(gif.convert("L"), dtype=int), gif.info["duration"]
    assert durations == 2000
    for n, k in np.ndindex(3, 2):
        row, column = 2 + n // 2 * 66, 2 + (2 * (n % 2) + k) * 66
        shown = last[row + 8 : row + 64 : 16, column + 8 : column + 64 : 16]
        assert np.abs(shown - images[n, :, :, 0].numpy()).max() <= 8  # a GIF has few colours


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_the_script_writes_pictures_beside_the_same_grid(suffix, digits_run, tmp_path):
    words = "--sampling-method heun2 --num-sampling-steps 20 --batch-size 4 --cfg-scale 2".split()
    for folder, more in (("a", []), ("b", ["--trajectory", f"over.{suffix}"])):
        (tmp_path / folder).mkdir()
        result = run("sample.py", "--ckpt", digits_run, *words, *more, cwd=tmp_path / folder)
        assert result.returncode == 0, result.stderr
    assert f"over.{suffix}: 8 of 10 images over time" in result.stdout
    for name in ("sample.png", "sample.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "b" / "sample.json").read_text())["nfe"] == 38
    with Image.open(tmp_path / "b" / f"over.{suffix}") as picture:
        assert picture.n_frames > 10 if suffix == "gif" else picture.size == (2100, 2790)  # a GIF joins equal frames


@pytest.mark.parametrize(
    "name, problem",
    [("a.jpg", "must end in .png or .gif"), ("no/a.png", "does not exist"), ("no/../sample.png", "is --output, too")],
)
def test_bad_names_are_refused_before_weights_are_loaded(name, problem, digits_run, tmp_path):
    result = run("sample.py", "--ckpt", digits_run, "--trajectory", name, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and problem in result.stderr
    assert "loading" not in result.stdout and not list(tmp_path.iterdir())
