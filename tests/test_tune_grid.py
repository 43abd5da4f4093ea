"""tune_grid.py: its dynamic programming against all choices, the true error of its grids, its file and its flags."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import GaussianNetwork
from test_sampler import exact_flow

import sample
import tune_grid
from transport import Sampler, create_transport
from tune_grid import Solves, least_sum, moved, solver_to_tune, tune


def test_the_least_sum_equals_that_of_all_choices():
    rng = np.random.default_rng(0)
    for num_steps in (1, 2, 4, 8):
        cost = np.where(np.triu(np.ones((9, 9)), 1) > 0, rng.random((9, 9)), np.inf)
        choices = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), num_steps - 1)]
        sums = [sum(cost[step] for step in itertools.pairwise(choice)) for choice in choices]
        assert least_sum(cost, num_steps) == choices[int(np.argmin(sums))]


def test_points_are_moved_to_where_the_error_is_least_and_never_past_each_other():
    def error(indices):
        assert indices[0] == 0 and indices[-1] == 30 and all(a < b for a, b in itertools.pairwise(indices))
        return sum((index - target) ** 2 for index, target in zip(indices, (0, 3, 4, 25, 30), strict=True))

    assert moved(error, (0, 10, 11, 12, 30)) == ((0, 3, 4, 25, 30), 0)


def solves(path_type, prediction, method, num_steps, std=0.05):
    transport = create_transport(path_type, prediction)
    noise = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Solves(transport, GaussianNetwork(transport, std=std), noise, method, num_steps)


def test_an_error_is_that_of_the_sampler_and_outputs_are_computed_once():
    for method, nfe in (("euler", 1), ("heun2", 2), ("ab2", 1)):
        made = solves("GVP", "noise", method, 6)
        calls = made.model.calls
        indices = (0, 7, 20, 33, len(made.times) - 1)
        error = made.error(indices)
        assert made.model.calls - calls == 4 * nfe
        sample_ode = Sampler(made.sampler.transport).sample_ode
        end = sample_ode(sampling_method=method, time_grid=[made.times[i] for i in indices])(
            made.states[0], GaussianNetwork(made.sampler.transport, std=0.05)
        )[-1]
        assert error == pytest.approx((end - made.states[-1]).square().mean().item(), rel=1e-12)
        assert made.error(indices) == error and made.model.calls - calls == 4 * nfe
        made.error((*indices[:3], 34, indices[-1]))  # the steps up to index 20 are known
        assert made.model.calls - calls == (4 + 2) * nfe - 1


@pytest.mark.parametrize(
    "path_type, prediction, method",
    [("Linear", "velocity", "heun2"), ("GVP", "noise", "ab2"), ("VP", "score", "heun2"), ("VP", "velocity", "euler")],
)
def test_a_tuned_grid_has_less_than_half_the_true_error_of_the_uniform_one(path_type, prediction, method):
    """Of fresh noise, against the exact flow. The data's std is small, so most of the flow lies near an end."""
    made = solves(path_type, prediction, method, 7)
    times, errors = tune(made, 7)
    transport = made.sampler.transport
    t0, t1 = transport.ode_interval()
    assert len(times) == 7 and (times[0], times[-1]) == (t0, t1)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    true = []
    for how in (dict(time_grid=times), dict(num_steps=7)):
        sample_ode = Sampler(transport).sample_ode(sampling_method=method, **how)
        end = sample_ode(x, GaussianNetwork(transport, std=0.05))[-1]
        true.append((end - exact_flow(transport.path, x, t0, t1, std=0.05)).square().mean().item())
    assert true[0] < true[1] / 2 and errors["error"] < errors["error_of_uniform"] / 2
    assert true == pytest.approx(list(errors.values()), rel=0.7)


def call(script, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, words)])
    script.main()


def test_the_file_is_the_same_for_the_same_seed_and_samples_are_drawn_with_it(
    digits_run, tmp_path, monkeypatch, capsys
):
    solver = ["--ckpt", digits_run, "--cfg-scale", 1.5, "--sampling-method", "ab2"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = ["--output", tmp_path / f"{name}.json", "--seed", seed, "--num-samples", 4]
        call(tune_grid, monkeypatch, *solver, "--num-sampling-steps", 4, *output)
    assert "error of ab2 at 4 times: " in capsys.readouterr().out
    files = [(tmp_path / f"{name}.json").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    made = json.loads(files[0])
    assert made["times"][0] == 0 and made["times"][-1] == 1 and len(made["times"]) == made["num_steps"] == 4
    assert (made["path"], made["prediction"], made["sampling_method"]) == ("LinearPath", "velocity", "ab2")
    assert made["cfg_scale"] == 1.5 and len(made["weights_sha256"]) == 64
    assert made["error"] <= made["error_of_uniform"]
    grid = ["--time-grid", tmp_path / "a.json", "--output", tmp_path / "sample.png", "--class-labels", 0]
    for words, noted in ((solver, False), ([*solver[:-1], "heun2"], True)):
        call(sample, monkeypatch, *words, *grid)
        assert ("was made for sampling_method ab2" in capsys.readouterr().out) == noted
    with pytest.raises(SystemExit):
        call(sample, monkeypatch, *solver, *grid, "--output", tmp_path / "a.png")
    assert (tmp_path / "a.json").read_bytes() == files[0] and "is an input" in capsys.readouterr().err
    assert json.loads((tmp_path / "sample.json").read_text())["time_grid"] == made["times"]


@pytest.mark.parametrize(
    "mode, flags, message",
    [
        ("ODE", {}, "--num-sampling-steps"),
        ("ODE", {"num_sampling_steps": 8}, "dopri5 has no fixed number of evaluations a step; choose from euler"),
        ("ODE", {"num_sampling_steps": 8, "sampling_method": "explicit_adams"}, "has no fixed number"),
        ("ODE", {"num_sampling_steps": 51, "sampling_method": "euler"}, "at most 50"),
        ("ODE", {"num_sampling_steps": 8, "sampling_method": "ab5"}, "ab5"),
        ("ODE", {"num_sampling_steps": 8, "time_grid": ["edm"]}, "--time-grid has no effect"),
        ("ODE", {"num_sampling_steps": 8, "time_shift": 2.0}, "--time-shift has no effect"),
        ("ODE", {"num_sampling_steps": 8, "reverse": True}, "--reverse has no effect"),
        ("SDE", {"num_sampling_steps": 8}, "a grid is tuned for an ODE"),
    ],
)
def test_what_has_no_grid_to_tune_is_one_line(mode, flags, message):
    with pytest.raises(ValueError, match=message):
        solver_to_tune(mode, flags)


def test_bad_flags_end_with_code_2_before_the_weights_are_loaded(tmp_path, monkeypatch, capsys):
    good = ["--ckpt", "nowhere", "--sampling-method", "euler", "--num-sampling-steps", 4]
    for words, problem in ((["SDE", *good], "SDE"), ([*good, "--output", tmp_path / "a" / "b.json"], "does not exist")):
        with pytest.raises(SystemExit) as end:
            call(tune_grid, monkeypatch, *words)
        printed = capsys.readouterr()
        assert end.value.code == 2 and problem in printed.err and printed.err.count("\n") == 1
        assert "loading" not in printed.out
