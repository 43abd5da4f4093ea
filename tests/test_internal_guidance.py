"""Internal guidance: a second head is trained by the main loss, and guides samples at no further evaluation."""

import json
import types

import pytest
import torch
from conftest import TINY, read_metrics
from processes import run
from test_routing import CPU, inputs, random_model

from models import SiT
from sampling.draw import SampleSettings, describe, draw, resolve_settings, summary
from sampling.guidance import Network, resolve_internal
from sampling.pipeline import Pipeline
from training import costs
from training.losses import InnerHead, build_losses
from transport import create_transport
from vae import PixelSpace

EULER = dict(sampling_method="euler", num_steps=5, atol=1e-6, rtol=1e-3, reverse=False)
CONFIG = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=4, num_heads=4, num_classes=3)


def pipeline_of(model, channels=None, **more):
    return Pipeline(model.eval(), create_transport(), PixelSpace(), CPU, channels, CONFIG, **more)


def test_the_head_changes_no_other_weight_and_weights_without_it_load_strictly():
    models = []
    for more in ({}, {"inner_head": 2}):
        torch.manual_seed(0)
        models.append(SiT(**CONFIG, **more))
    plain, headed = (model.state_dict() for model in models)
    assert {key for key in headed if key.startswith("inner_layer.")} == headed.keys() - plain.keys()
    assert all(torch.equal(value, headed[key]) for key, value in plain.items())
    x, t, y, drop = inputs(2)
    _, (patches,) = models[1](x, t, y, drop, hidden_blocks=("inner",))
    assert patches.shape == (2, 16, 2 * 2 * 4) and not patches.any()
    for blocks in (0, 4):
        with pytest.raises(ValueError, match="inner_head"):
            SiT(**CONFIG, inner_head=blocks)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("kept", [None, 5])
def test_the_loss_of_the_head_is_the_main_loss_of_its_patches(prediction, kept):
    model, transport = random_model(inner_head=2).double(), create_transport("GVP", prediction, "velocity")
    loss = InnerHead(model, transport, 0.5)
    (x0, t, y, drop), x1 = inputs(3, torch.float64), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    tokens = torch.arange(16).expand(3, -1) if kept is None else torch.rand(3, 16).argsort(1)[:, :kept].sort(1).values
    route = None if kept is None else (1, 3, tokens)
    xt, ut = transport.path.interpolate(t, x0, x1)
    _, (patches,) = model(xt, t, y, drop, hidden_blocks=("inner",), route=route)
    values = loss({"x0": x0, "x1": x1, "kept": None if kept is None else tokens}, t, xt, None, {"inner": patches})
    for i in range(3):
        errors = []
        for place, token in enumerate(tokens[i].tolist()):
            row, column = 2 * (token // 4), 2 * (token % 4)
            window = (i, slice(None), slice(row, row + 2), slice(column, column + 2))
            predicted = patches[i, place].reshape(2, 2, 4).permute(2, 0, 1)[:2]
            if prediction == "velocity":
                errors.append((predicted - ut[window]) ** 2)
            else:
                scale = transport.path.sigma(t)[i] if prediction == "score" else -1
                weight = (transport.path.wronskian(t) / transport.path.alpha(t))[i] ** 2
                errors.append(weight * (scale * predicted + x0[window]) ** 2)
        assert values[i].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_a_loss_that_reads_a_head_needs_one():
    with pytest.raises(ValueError, match="inner_head"):
        build_losses([lambda model: InnerHead(model, create_transport())], random_model(), 0)


def test_operations_of_the_head_by_hand():
    config, loss = CONFIG | {"inner_head": 2}, types.SimpleNamespace(hidden_blocks=("inner",), flops=0)
    head = 2 * 32 * 2 * 32 + 2 * 16 * 32 * 16
    assert costs.training_flops(config) == costs.training_flops(CONFIG)
    assert costs.training_flops(config, losses=[loss]) == costs.training_flops(CONFIG) + 3 * head


class Stub(torch.nn.Module):
    """A network in closed form: the output is x + y, and the inner head's is x / 2 + 3 y; null is the class 3."""

    in_channels, num_classes, inner_head, latent_shape = 2, 3, 1, (2, 8, 8)
    input_size = 8

    def __init__(self):
        super().__init__()
        self.y_embedder = types.SimpleNamespace(embedding_table=torch.nn.Embedding(4, 1))
        self.asked = []

    def unpatchify(self, patches):
        return patches.unflatten(1, (2, 8, 8))

    def forward(self, x, t, y, hidden_blocks=()):
        self.asked.append(bool(hidden_blocks))
        y = y[:, None, None, None]
        return (x + y, [(x / 2 + 3 * y).flatten(1)]) if hidden_blocks else x + y


@pytest.mark.parametrize("channels", [None, 1])
def test_the_output_is_extrapolated_from_the_head_before_other_guidance(channels):
    pipeline, (x, _, y, _) = pipeline_of(Stub(), channels), inputs(3)
    labels = y[:, None, None, None].float()
    guided = {name: x / 2 + 3 * c + 1.5 * (x / 2 - 2 * c) for name, c in (("y", labels), ("null", 3.0))}
    plain = {"y": x + labels, "null": x + 3.0}

    def expected(scale, internal):
        of = guided if internal else plain
        whole = of["null"] + scale * (of["y"] - of["null"])
        return whole if channels is None else torch.cat([whole[:, :1], plain["y"][:, 1:]], dim=1)

    for scale in (1.0, 2.5):
        rule = SampleSettings(cfg_scale=scale).rule(channels)
        network = Network(pipeline, internal=(1.5, 0.2, 0.7))
        for time, inside in ((0.1, False), (0.2, True), (0.5, True), (0.8, False)):
            output = rule(network, x, torch.tensor([time], dtype=torch.float64), y)
            torch.testing.assert_close(output, expected(scale, inside))
    assert network.rows == 4 * 2 * len(x)  # two for each evaluation with classifier-free guidance, and no more
    half = SampleSettings(cfg_scale=2.5, cfg_interval=(0.6, 1.0)).rule(channels)
    torch.testing.assert_close(half(network, x, torch.tensor([0.5]), y), expected(1.0, True))


def test_autoguidance_guides_what_the_head_has_guided():
    pipeline, (x, _, y, _) = pipeline_of(Stub()), inputs(3)
    pipeline.guide = pipeline_of(Stub())
    labels = y[:, None, None, None].float()
    internal = x / 2 + 3 * labels + 1.5 * (x / 2 - 2 * labels)
    network = Network(pipeline, internal=(1.5, 0.0, 1.0))
    output = SampleSettings(cfg_scale=2.0).rule(None, has_guide=True)(network, x, torch.tensor([0.5]), y)
    torch.testing.assert_close(output, 2 * internal - (x + labels))
    assert pipeline.guide.model.asked == [False]


def drawn(pipeline, *words, cfg_scale=1.0, method="euler"):
    how = EULER | {"sampling_method": method}
    settings = resolve_settings(pipeline, "ODE", how, cfg_scale, None, 0, list(words) or None)
    return *draw(pipeline, [0, 1, 2, 0], settings, batch_size=2, show_progress=False), settings


def test_a_scale_of_one_draws_the_same_at_the_same_cost():
    pipeline = pipeline_of(random_model(inner_head=2))
    plain, counts, settings = drawn(pipeline)
    one, _, of_one = drawn(pipeline, 1.0, 0.0, 0.5)
    assert torch.equal(plain, one) and describe(pipeline, settings) == describe(pipeline, of_one)
    assert "internal_guidance" not in describe(pipeline, settings)
    guided, of_guided, settings = drawn(pipeline, 1.5)
    assert not torch.equal(plain, guided) and counts == of_guided == {"nfe": 4, "forward_passes": 4}
    description = describe(pipeline, settings) | of_guided
    assert description["internal_guidance"] == [1.5, 0.0, 1.0] and description["guided_channels"] == 2
    assert "forward passes), internal guidance 1.5, fp32" in summary(description)
    assert "for t in [0, 0.5]" in summary(describe(pipeline, drawn(pipeline, 1.5, 0.0, 0.5)[2]) | counts)


def test_an_unguided_call_does_not_compute_the_head_and_a_compiled_one_gives_the_same():
    calls, pipeline = [], pipeline_of(random_model(inner_head=2))
    pipeline.model.inner_layer.register_forward_hook(lambda *_: calls.append(1))
    drawn(pipeline)
    assert not calls
    expected, counts, _ = drawn(pipeline, 1.5, 0.0, 0.5, cfg_scale=2.0)
    assert len(calls) == 3 * 2 and counts["forward_passes"] == 2 * counts["nfe"]  # times 0, 1/4, 1/2; two batches
    forward = pipeline.model.forward_embedded
    pipeline.model.forward_embedded = torch.compile(forward, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(drawn(pipeline, 1.5, 0.0, 0.5, cfg_scale=2.0)[0], expected)


def test_words_that_do_not_fit_are_refused():
    headed, plain = random_model(inner_head=2), random_model()
    assert resolve_internal([1.4], headed) == (1.4, 0.0, 1.0) and resolve_internal(None, plain) is None
    assert resolve_internal([1.4, 0.1, 0.6], headed) == (1.4, 0.1, 0.6)
    for words, message in (([1.4, 0.1], "W or W LO HI"), ([1.4, 0.6, 0.1], "LO must lie below HI")):
        with pytest.raises(ValueError, match=message):
            resolve_internal(words, headed)
    with pytest.raises(ValueError, match="--internal-guidance 1.4 needs a model with an inner head"):
        resolve_internal([1.4], plain)


@pytest.fixture(scope="module")
def headed_run(tmp_path_factory):
    """The folder of a routed run with a head. (How such runs resume, on any ranks: test_recipes.py.)"""
    folder = tmp_path_factory.mktemp("runs") / "headed"
    headed = ["--depth", 3, "--inner-head", 2, "--route", 1, 3, 0.5, "--max-steps", 6, "--lr", 0.01]
    result = run("train.py", *TINY, *headed, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_trains_its_head(headed_run):
    ema = torch.load(headed_run / "checkpoint-6/ema.pt", weights_only=True)
    assert "inner_layer.linear.weight" in ema and ema["inner_layer.linear.weight"].any()
    first = read_metrics(headed_run)[0]
    assert first["loss"] == pytest.approx(first["loss_inner_head"], rel=0.2)  # both heads predict 0 at first


def test_sampling_scripts_guide_by_the_head(headed_run, digits_run, tmp_path):
    ckpt, grid = headed_run, tmp_path / "grid.png"
    flags = ["--num-sampling-steps", 3, "--sampling-method", "euler", "--cfg-scale", 1]
    result = run("sample.py", "--ckpt", ckpt, "--output", grid, *flags, "--internal-guidance", 1.5, 0, 0.7)
    assert result.returncode == 0 and "internal guidance 1.5 for t in [0, 0.7]" in result.stdout, result.stderr
    assert json.loads(grid.with_suffix(".json").read_text())["internal_guidance"] == [1.5, 0.0, 0.7]
    result = run("sample.py", "--ckpt", digits_run, "--output", grid, *flags, "--internal-guidance", 1.5)
    assert result.returncode == 2 and "inner head" in result.stderr and result.stderr.count("\n") == 1
    axes = ["--solver", "euler", *flags[:2], *flags[4:], "--internal-guidance", "none", 1.2, "2:0:0.5"]
    result = run("sweep.py", "--ckpt", ckpt, *axes, "--num-samples", 20, "--output-dir", tmp_path / "sweep")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "sweep/results.jsonl").read_text().splitlines()]
    assert [row["settings"].get("internal_guidance") for row in rows] == [None, [1.2], [2.0, 0.0, 0.5]]
    assert len({row["mean"] for row in rows}) == 3
