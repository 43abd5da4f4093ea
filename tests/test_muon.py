"""Muon: its matrices against singular values, its steps against formulas, and its runs on any number of ranks."""

import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from processes import run
from test_resume import WAYS, contents

from models import SiT
from training.costs import training_memory
from training.muon import COEFFICIENTS, orthogonalize, orthogonalize_together
from training.step import build_optimizer, step_optimizers

SMALL = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3)
MATRICES = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1, "adaLN_modulation.1": 6}


def polar(matrix):
    """U p(S) V^T by the singular values of a matrix (R, C): p is the polynomial, five times, of S / |S|."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_singular_values_become_nearly_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    s = torch.logspace(0, -2, 16, dtype=torch.float64)  # down to more than 0.002 of the norm
    matrices = 1e-9 * u * s @ v  # and of any size
    result = orthogonalize(matrices)
    torch.testing.assert_close(result, torch.stack([polar(matrix) for matrix in matrices]))
    values = torch.linalg.svdvals(result)
    assert 0.68 < values.min() and values.max() < 1.21
    torch.testing.assert_close(orthogonalize(matrices.float()).double(), result, atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalize(matrices.bfloat16()).double(), result, atol=0.1, rtol=0)
    assert (orthogonalize(torch.zeros(1, *shape)) == 0).all()


def test_a_weight_of_several_matrices_is_each_of_them():
    torch.manual_seed(0)
    updates = torch.randn(2, 48, 16, dtype=torch.float64)
    expected = torch.stack([torch.cat([polar(part) for part in update.chunk(3)]) for update in updates])
    torch.testing.assert_close(orthogonalize_together(updates, torch.empty(48, 16), 3), expected)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_every_trained_parameter_is_in_one_group(mlp):
    model = SiT(**SMALL, mlp=mlp)
    optimizer = build_optimizer(model, muon=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(found) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    counts = MATRICES | ({"mlp.fc1": 2} if mlp == "swiglu" else {})
    expected = {f"blocks.{block}.{name}.weight": count for block in range(2) for name, count in counts.items()}
    groups = [group for group in optimizer.param_groups if group["matrices"]]
    assert {names[p]: group["matrices"] for group in groups for p in group["params"]} == expected
    assert all(len({parameter.shape for parameter in group["params"]}) == 1 for group in groups)
    assert type(build_optimizer(torch.nn.Linear(2, 2), muon=True)) is torch.optim.AdamW  # of an auxiliary loss


def test_the_matrices_need_half_of_the_memory():
    sizes, estimates = [], []
    for muon in (False, True):
        model = SiT(**SMALL)
        optimizer = build_optimizer(model, muon=muon)
        give_gradients(model)
        optimizer.step()
        sizes.append(sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim()))
        how = dict(precision="fp32", grad_checkpoint=False, shards=1, device=torch.device("cpu"), muon=muon)
        estimates.append(training_memory(SMALL, 1, **how)["optimizer"])
    assert estimates[0] - estimates[1] == sizes[0] - sizes[1] > 0


def give_gradients(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def test_steps_are_those_of_the_formulas():
    """Matrices move by 0.2 sqrt(longer side) of U V^T, after their decay; everything else as with AdamW alone."""
    torch.manual_seed(0)
    model = SiT(**SMALL).double()
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reference, momenta, how = copy.deepcopy(model), {}, dict(weight_decay=0.1, betas=(0.9, 0.95))
    optimizers = [build_optimizer(model, **how, muon=True), build_optimizer(reference, **how)]
    counts = {f"blocks.{block}.{name}.weight": count for block in range(2) for name, count in MATRICES.items()}
    for lr in (0.1, 0.05, 0.2):
        give_gradients(model)
        for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            if parameter.requires_grad:
                other.grad = parameter.grad.clone()
            if name in counts:
                momenta[name] = 0.95 * momenta.get(name, 0) + parameter.grad
                parts = (parameter.grad + 0.95 * momenta[name]).chunk(counts[name])
                move = torch.cat([0.2 * max(part.shape) ** 0.5 * polar(part) for part in parts])
                expected[name] = expected[name] * (1 - lr * 0.1) - lr * move
        for optimizer in optimizers:
            step_optimizers([optimizer], torch.tensor(1.0), lr)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if name in counts:
            torch.testing.assert_close(parameter, expected[name])
        else:
            assert torch.equal(parameter, other), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    torch.manual_seed(0)
    model = SiT(**SMALL)
    optimizer = build_optimizer(model, weight_decay=0.1, muon=True)

    def state():
        tensors = [value for values in optimizer.state.values() for value in values.values()]
        return [tensor.numpy().tobytes() for tensor in (*map(torch.detach, model.parameters()), *tensors)]

    for part in (None, "loss", "blocks.1.attn.qkv.weight", "t_embedder.mlp.0.bias"):
        give_gradients(model)
        if part in dict(model.named_parameters()):
            model.get_parameter(part).grad[0] = bad
        before = state()
        _, left_out = step_optimizers([optimizer], torch.tensor(bad if part == "loss" else 1.0), 0.1, 1.0)
        assert left_out == (part is not None) and (state() == before) == (part is not None), part
        assert all(parameter.grad is None for parameter in model.parameters())


FLAGS = [*TINY, "--optimizer", "muon", "--global-batch-size", 12, "--max-steps", 8, "--ckpt-every", 4]
FLAGS += ["--weight-decay", 0.1, "--max-grad-norm", 1, "--lr-schedule", "cosine", "--warmup-steps", 2]
FLAGS += ["--mlp", "swiglu"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{way to run: folder of a run of 8 steps, with a checkpoint in the middle}."""
    folders = {way: tmp_path_factory.mktemp("muon") / "run" for way in WAYS}
    for way, folder in folders.items():
        result = run("train.py", *FLAGS, *WAYS[way], "--output-dir", folder, processes=1 if way == "one process" else 2)
        assert result.returncode == 0, result.stderr
    return folders


def losses(folder):
    return [line["loss"] for line in read_metrics(folder)]


def resume(first, folder, *more, processes):
    """Continue a run from its checkpoint in the middle, in another folder."""
    shutil.copytree(first / "checkpoint-4", folder / "checkpoint-4")
    result = run("train.py", *FLAGS, *more, "--output-dir", folder, processes=processes)
    assert result.returncode == 0 and "continuing from" in result.stdout, result.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumes_to_the_same_bytes(way, whole, tmp_path):
    resume(whole[way], tmp_path, *WAYS[way], processes=1 if way == "one process" else 2)
    expected, found = (contents(folder / "checkpoint-8") for folder in (whole[way], tmp_path))
    assert found == expected
    keys = {key for key in found[1] if key.startswith("state.blocks.0.attn.qkv.weight")}
    assert keys == {"state.blocks.0.attn.qkv.weight.momentum"}
    np.testing.assert_allclose(losses(whole[way]), losses(whole["one process"]), atol=1e-4)


FSDP = ["--parallel", "fsdp"]
OTHERS = [("ddp", [], 1), ("one process", FSDP, 3), ("fsdp", [*FSDP, "--fsdp-shard-size", 2], 4)]


@pytest.mark.parametrize("first, flags, processes", OTHERS)
def test_a_run_resumes_on_other_ranks(first, flags, processes, whole, tmp_path):
    """Three share 2 weights of each kind, and rows that 3 does not divide."""
    resume(whole[first], tmp_path, *flags, processes=processes)
    np.testing.assert_allclose(losses(tmp_path), losses(whole["one process"])[4:], atol=1e-4)


def test_the_state_of_another_optimizer_is_refused(whole, digits_run):
    pairs = (whole["one process"], [*FLAGS, "--optimizer", "adamw"]), (digits_run, [*TINY, "--optimizer", "muon"])
    for folder, flags in pairs:
        result = run("train.py", *flags, "--max-steps", 20, "--output-dir", folder)
        assert result.returncode == 2 and "--optimizer" in result.stderr and result.stderr.count("\n") == 1
        assert "was trained with" in result.stderr
