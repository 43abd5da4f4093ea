"""Token routing: a random share of the tokens skips blocks in training, and joins again."""

import math

import pytest
import torch
from conftest import TINY, read_metrics
from processes import run
from test_resume import contents

from models import SiT, replace_tokens, select_tokens
from training import costs
from training.log import Meter
from training.losses import AuxiliaryLoss
from training.recipe import read_route
from training.step import EMA, Trainer, num_kept
from transport import create_transport

CPU = torch.device("cpu")
CONFIG = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=4, num_heads=4, num_classes=3)


def random_model(**more):
    """A SiT in training mode whose weights are random, so that no block is the identity."""
    torch.manual_seed(0)
    model = SiT(**CONFIG, **more)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def inputs(count, dtype=torch.float32):
    torch.manual_seed(1)
    y = torch.tensor([0, 1, 2] * count)[:count]
    return torch.randn(count, 2, 8, 8, dtype=dtype), torch.rand(count, dtype=dtype), y, torch.zeros(count, dtype=bool)


def kept_tokens(count, kept=7):
    return torch.rand(count, 16).argsort(1)[:, :kept].sort(1).values


def by_loop(model, x, t, y, route):
    """The routed output of one image after the other, where each block is given the kept tokens as a list."""
    start, end, kept = route
    outputs = []
    for i in range(len(x)):
        tokens = model.pos_embed + model.x_embedder(x[i : i + 1])
        c = model.t_embedder(t[i : i + 1]) + model.y_embedder.embedding_table(y[i : i + 1])
        rotation = model.rotation(tokens)
        for index, block in enumerate(model.blocks):
            if start <= index < end:
                of_kept = None if rotation is None else torch.stack([rotation[:, k] for k in kept[i]], dim=1)
                after = block(torch.stack([tokens[0, k] for k in kept[i]])[None], c, of_kept)
                tokens = tokens.clone()
                for place, k in enumerate(kept[i]):
                    tokens[0, k] = after[0, place]
            else:
                tokens = block(tokens, c, rotation)
        outputs.append(model.unpatchify(model.final_layer(tokens, c))[0, :2])
    return torch.stack(outputs)


@pytest.mark.parametrize("position", ["sincos", "rope"])
@pytest.mark.parametrize("start, end", [(0, 4), (1, 3), (3, 4)])
def test_kept_tokens_alone_go_through_the_blocks(start, end, position):
    model = random_model(position=position).double()
    (x, t, y, drop), route = inputs(3, torch.float64), (start, end, kept_tokens(3))
    torch.testing.assert_close(model(x, t, y, drop, route=route), by_loop(model, x, t, y, route), rtol=0, atol=1e-12)
    everything = torch.arange(16).expand(3, -1)
    whole = model(x, t, y, drop)
    torch.testing.assert_close(model(x, t, y, drop, route=(start, end, everything)), whole, rtol=0, atol=1e-12)


def test_tokens_that_skip_are_passed_on_and_so_is_their_gradient():
    x, kept = torch.randn(2, 16, 5, requires_grad=True), kept_tokens(2)
    skipped = torch.ones(2, 16, dtype=bool).scatter(1, kept, False)
    values = 3 * select_tokens(x, kept)
    joined, gradient = replace_tokens(x, kept, values), torch.randn(2, 16, 5)
    assert torch.equal(joined[skipped], x[skipped]) and torch.equal(joined[~skipped], 3 * x[~skipped])
    joined.backward(gradient)
    assert torch.equal(x.grad[skipped], gradient[skipped]) and torch.equal(x.grad[~skipped], 3 * gradient[~skipped])


def test_hidden_states_inside_a_route_are_of_the_kept_tokens():
    model, (x, t, y, drop), kept = random_model(), inputs(2), kept_tokens(2)
    _, states = model(x, t, y, drop, hidden_blocks=(0, 1, 2, 3), route=(1, 3, kept))
    assert [state.shape[1] for state in states] == [16, 7, 7, 16]


def test_checkpointed_and_compiled_blocks_give_the_same():
    model, (x, t, y, drop), route = random_model(), inputs(2), (1, 3, kept_tokens(2))

    def gradient(forward):
        model.zero_grad()
        forward(x, t, y, drop, route=route).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradient(model)
    model.grad_checkpoint = True
    torch.testing.assert_close(gradient(model), expected)
    model.grad_checkpoint = False
    model.forward_embedded = torch.compile(model.forward_embedded, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(gradient(model), expected)


def trainer_of(route):
    with torch.device("meta"):
        model = SiT(**CONFIG)
    trainer = Trainer(model, create_transport(), CPU, "fp32", [EMA("ema", 0.9)], [], "one process", None, {}, route)
    trainer.start(random_model().state_dict())
    return trainer


def test_which_tokens_are_kept_belongs_to_seed_step_and_place():
    trainer = trainer_of((1, 3, 0.5))
    whole = trainer.draw_kept(0, 3, 64, slice(None))
    assert whole.shape == (64, 8) and (whole.diff(dim=1) > 0).all() and whole.min() >= 0 and whole.max() == 15
    parts = [trainer.draw_kept(0, 3, 64, slice(start, start + 16)) for start in range(0, 64, 16)]
    assert torch.equal(torch.cat(parts), whole)
    for other in (trainer.draw_kept(1, 3, 64, slice(None)), trainer.draw_kept(0, 4, 64, slice(None)), whole.flip(0)):
        assert not torch.equal(other, whole)
    counts = torch.cat([trainer.draw_kept(0, step, 64, slice(None)) for step in range(40)]).flatten().bincount()
    assert (counts / (40 * 64) - 0.5).abs().max() < 0.05  # five standard deviations


def test_the_share_that_skips():
    assert [num_kept(share, 16) for share in (0.0, 0.02, 0.5, 0.75, 0.99)] == [16, 16, 8, 4, 1]
    assert trainer_of((1, 3, 0.02)).draw_kept(0, 0, 4, slice(None)) is None
    assert read_route([1.0, 3.0, 0.0], 4) is None and read_route([0.0, 4.0, 0.75], 4) == (0, 4, 0.75)
    for words in ([3.0, 3.0, 0.5], [0.0, 5.0, 0.5], [0.5, 3.0, 0.5], [0.0, 3.0, 1.0]):
        with pytest.raises(ValueError, match="0 <= FROM < TO <= 4"):
            read_route(words, 4)


class Projector(AuxiliaryLoss):
    until, flops, saved_bytes = 5, 1000, 64

    def __init__(self):
        super().__init__()
        self.trained, self.frozen = torch.nn.Linear(3, 5), torch.nn.Linear(2, 2).requires_grad_(False)


def test_operations_and_memory_of_a_recipe_by_hand():
    width, routed = 32, (1, 3, 0.5)

    def block(tokens):
        return 2 * tokens * width * 12 * width + 4 * tokens**2 * width + 2 * width * 6 * width

    whole, loss = costs.training_flops(CONFIG), Projector()
    assert whole - costs.training_flops(CONFIG, routed) == 3 * 2 * (block(16) - block(8))
    assert costs.training_flops(CONFIG, routed, [loss]) == costs.training_flops(CONFIG, routed) + 1000
    how = CONFIG, 8, "fp32", False, 2, CPU
    plain, more = costs.training_memory(*how), costs.training_memory(*how, 3, [loss], routed)
    assert more["EMA"] == 3 * plain["EMA"] and more["gradients"] == plain["gradients"] + 4 * 20 / 2
    assert more["weights"] == plain["weights"] + 4 * 20 / 2 + 4 * 6
    saved = [costs.saved_bytes(CONFIG, 8, "fp32", False, CPU, route) for route in (None, routed)]
    assert more["activations"] == saved[1] + 8 * 64 and saved[1] < 0.85 * saved[0]
    meter = Meter(CONFIG, CPU, "fp32", routed, [loss])
    for step in (4, 5):
        meter.add(10, step)
    assert meter.flops == 20 * costs.training_flops(CONFIG, routed) + 10 * 1000


def test_a_share_of_zero_is_no_routing_and_more_is_some(tmp_path):
    for name, route in (("none", []), ("zero", ["--route", 1, 3, 0]), ("half", ["--route", 1, 3, 0.5])):
        result = run("train.py", *TINY, "--depth", 4, "--max-steps", 4, *route, "--output-dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
    none, zero, half = (contents(tmp_path / name / "checkpoint-4") for name in ("none", "zero", "half"))
    assert none == zero and none != half
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path / "half"))


def test_a_dry_run_counts_the_route_and_a_bad_one_is_refused():
    def plan(*route):
        result = run("train.py", *TINY, "--depth", 4, "--dry-run", *route)
        line = next(line for line in result.stdout.splitlines() if "GFLOPs" in line)
        return float(line.split()[0])

    assert plan("--route", 1, 3, 0.5) < plan()
    result = run("train.py", *TINY, "--dry-run", "--route", 1, 3, 0.5)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--route 1 3 0.5" in result.stderr
