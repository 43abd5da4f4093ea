"""Seam: a guidance rule is one function of (network, x, t, y)."""

import functools

import pytest
import torch

from models import SiT
from sampling.draw import SampleSettings, draw, summary
from sampling.pipeline import Pipeline
from transport import create_transport


def mix_of_classes(network, x, t, y, weight):
    """Mix the prediction for the label with that for the next label: two forward passes, one after the other."""
    return weight * network(x, t, y) + (1 - weight) * network(x, t, (y + 1) % network.num_classes)


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    model = SiT(input_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=4, num_classes=3).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(std=0.1)
    return Pipeline(model, create_transport(), None, torch.device("cpu"), guided_channels=None)


@pytest.mark.parametrize("mode, nfe", [("ODE", 4), ("SDE", 5)])
def test_a_rule_is_drawn_with_and_its_forward_passes_are_counted(pipeline, mode, nfe):
    solver = {"sampling_method": mode.capitalize().replace("Ode", "euler").replace("Sde", "Euler"), "num_steps": 5}
    rule = functools.partial(mix_of_classes, weight=0.25)
    drawn, counts = draw(pipeline, [0, 1, 2], SampleSettings(mode, solver, guidance=rule), batch_size=2)
    assert counts == {"nfe": nfe, "forward_passes": 2 * nfe}
    # The same rule inside the model, without guidance.
    plain = pipeline.model.forward
    pipeline.model.forward = lambda x, t, y: 0.25 * plain(x, t, y) + 0.75 * plain(x, t, (y + 1) % 3)
    expected, counts = draw(pipeline, [0, 1, 2], SampleSettings(mode, solver))
    torch.testing.assert_close(drawn, expected)
    assert counts["forward_passes"] == nfe
    text = summary({"mode": mode, "precision": "fp32", "guidance": "mine", **solver, **counts})
    assert text == f"{mode} {solver['sampling_method']}, {nfe} NFE ({nfe} forward passes), mine, fp32"
