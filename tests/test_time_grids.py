"""Time grids: closed forms, and what a list of times or a file does to samplers and flags."""

import itertools
import json
import math

import pytest
import torch
from conftest import GaussianNetwork

import sample
from sampling.flags import SOLVER_FLAGS, add_solver_flags, grid_notes, solver_settings, without_effect
from sampling.shards import Shards
from transport import PATHS, TIME_GRIDS, Sampler, create_transport
from transport.path import Path
from transport.time_grids import LOGSNR_EPS
from utils.command_line import Parser, given

INTERVALS = [(0.0, 1.0), (0.0, 0.96), (1e-3, 1 - 1e-3), (0.0, 5e-4), (0.0, 0.01), (0.2, 0.3), (0.999, 1.0)]


class Squared(Path):
    """A path that no grid knows of."""

    def alpha(self, t):
        return t**2

    def sigma(self, t):
        return 1 - t


def levels(path, times):
    return torch.log(path.alpha(times) / path.sigma(times))


@pytest.mark.parametrize("kind", [*PATHS.values(), Squared])
@pytest.mark.parametrize("t0, t1", INTERVALS)
def test_every_grid_has_exact_ends_and_increases(kind, t0, t1):
    for (name, grid), num_steps in itertools.product(TIME_GRIDS.items(), (2, 3, 4, 10, 77, 1000)):
        times = grid(kind(), t0, t1, num_steps)
        assert times.dtype == torch.float64 and times.shape == (num_steps,), name
        assert (times[0], times[-1]) == (t0, t1) and (times.diff() > 0).all(), name


@pytest.mark.parametrize("kind", [*PATHS.values(), Squared])
def test_logsnr_is_even_in_the_log_snr_and_cuts_singular_ends_alone(kind):
    path, ends = kind(), torch.tensor([LOGSNR_EPS, 0.01, 1 - LOGSNR_EPS, 0.98], dtype=torch.float64)
    first, low, last, high = levels(path, ends).tolist()
    if kind is PATHS["VP"]:  # regular at noise
        first = levels(path, torch.zeros(1, dtype=torch.float64)).item()
    for t0, t1, expected in ((0.01, 0.98, (low, high)), (0.0, 1.0, (first, last))):
        inner = levels(path, TIME_GRIDS["logsnr"](path, t0, t1, 12))[1:-1]
        even = torch.linspace(*expected, 12, dtype=torch.float64)[1:-1]
        torch.testing.assert_close(inner, even, rtol=0, atol=1e-9)


def test_edm_is_the_formula_of_the_paper():
    """sigma_i = (80^(1/7) + i / (n - 1) (0.002^(1/7) - 80^(1/7)))^7, and t from sigma / alpha in closed form."""
    n = 18
    sigma = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(1, n - 1)]
    for path_type, of_sigma in (("Linear", lambda s: 1 / (1 + s)), ("GVP", lambda s: 2 / math.pi * math.atan(1 / s))):
        times = TIME_GRIDS["edm"](PATHS[path_type](), 0.0, 1.0, n)
        torch.testing.assert_close(times[1:-1].tolist(), [of_sigma(s) for s in sigma], rtol=1e-9, atol=0)
    path = PATHS["VP"]()
    times = TIME_GRIDS["edm"](path, 0.0, 1.0, n)[1:-1]
    torch.testing.assert_close((-levels(path, times)).exp().tolist(), sigma, rtol=1e-9, atol=0)
    # Of the levels, those between the ends: from t = 0.5 on, sigma / alpha of the Linear path is at most 1.
    times = TIME_GRIDS["edm"](PATHS["Linear"](), 0.5, 0.9, 3)
    assert times[1].item() == pytest.approx(1 / (1 + ((1 + (1 / 9) ** (1 / 7)) / 2) ** 7))


@pytest.mark.parametrize("method", ["heun2", "dopri5"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_list_of_the_uniform_times_draws_the_same_bytes(method, reverse):
    transport = create_transport("VP", "noise")
    network, x = GaussianNetwork(transport), torch.randn(5, 3)
    times = torch.linspace(*transport.ode_interval(), 7, dtype=torch.float64).tolist()
    samples = [
        Sampler(transport).sample_ode(sampling_method=method, reverse=reverse, trajectory=True, **grid)
        for grid in (dict(num_steps=7), dict(time_grid=times), dict(time_grid=tuple(times), num_steps=50))
    ]
    expected, *others = (sample(x, network) for sample in samples)
    assert all(torch.equal(states, expected) for states in others)
    assert len({sample.nfe for sample in samples}) == 1


def test_a_solver_goes_through_the_times_of_its_grid_in_both_directions():
    transport, x = create_transport("GVP"), torch.randn(2, 3, dtype=torch.float64)
    for grid, reverse in itertools.product(("logsnr", "edm", [0.0, 0.3, 0.35, 1.0]), (False, True)):
        network = GaussianNetwork(transport)
        how = dict(sampling_method="euler", num_steps=4, time_grid=grid, reverse=reverse)
        sample = Sampler(transport).sample_ode(**how)
        sample(x, network)
        times = TIME_GRIDS[grid](transport.path, 0.0, 1.0, 4) if isinstance(grid, str) else torch.tensor(grid).double()
        expected = times.flip(0) if reverse else times
        torch.testing.assert_close(torch.stack(network.times)[:, 0], expected[:-1])
        assert network.calls == sample.nfe == 3


def test_the_last_step_of_an_sde_starts_at_the_last_time():
    sampler, x = Sampler(create_transport()), torch.randn(2, 3, dtype=torch.float64)
    for times, last_step in (([0.1, 0.5, 0.7], "Euler"), ([0.1, 0.5, 1.0], None), ([0.1, 0.5, 0.7], None)):
        network = GaussianNetwork(sampler.transport)
        sample = sampler.sample_sde(time_grid=times, last_step=last_step)
        assert sample(x, network).isfinite().all() and network.calls == sample.nfe
        evaluated = times if last_step else times[:-1]
        torch.testing.assert_close(torch.stack(network.times)[:, 0].tolist(), evaluated)
    with pytest.raises(ValueError, match="the time grid ends at 1, where the last step leads"):
        sampler.sample_sde(time_grid=[0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    "grid, message",
    [
        ("cosine", "unknown time grid 'cosine'; choose from uniform, logsnr, edm"),
        ([0.5], "two times or more"),
        ([], "two times or more"),
        ([0, 0.5, 0.5], "0.5 follows 0.5"),
        ([0, 0.7, 0.5], "0.5 follows 0.7"),
        ([0, math.nan, 1], "numbers in .0, 1., not nan"),
        ([0, 1.5], "not 1.5"),
        ([0, True], "not True"),
        ([0, "1"], "not '1'"),
    ],
)
def test_a_bad_grid_is_named(grid, message):
    for method in ("sample_ode", "sample_sde"):
        with pytest.raises(ValueError, match=message):
            getattr(Sampler(create_transport()), method)(time_grid=grid)


def test_a_list_must_keep_off_singular_ends_and_no_shift_moves_it():
    for path_type, times, t in (("Linear", [0.0, 0.5, 0.9], 0), ("VP", [0.1, 0.5, 1.0], 1)):
        sampler = Sampler(create_transport(path_type, "noise"))
        with pytest.raises(ValueError, match=f"the time grid evaluates the drift at t = {t}, where it is singular"):
            sampler.sample_ode(time_grid=times)
    sampler.sample_ode(time_grid=[0.1, 0.9])
    for grid in ("edm", [0.1, 0.9]):
        with pytest.raises(ValueError, match="time_shift moves the points of the uniform grid"):
            sampler.sample_ode(time_grid=grid, time_shift=2.0)


# ---------------------------------------------------------------------------------------------- flags


def settings_of(words, mode="ODE"):
    parser = Parser("")
    add_solver_flags(parser)
    method = "" if mode == "SDE" or "--sampling-method" in words else " --sampling-method rk4"
    return solver_settings(mode, given(parser.parse_args(f"{mode} {words}{method}".split()), SOLVER_FLAGS))[1]


def test_the_grid_is_in_the_settings_if_it_is_not_uniform(tmp_path):
    path = tmp_path / "grid.json"
    path.write_text('{"times": [0, 0.25, 1], "path": "VPPath"}')
    plain = settings_of("")
    assert settings_of("--time-grid uniform") == plain and "time_grid" not in plain
    assert settings_of("--time-grid edm --num-sampling-steps 9") == plain | {"time_grid": "edm", "num_steps": 9}
    listed = plain | {"time_grid": [0.0, 0.25, 1.0], "num_steps": 3}
    for words in ("0 0.25 1", "0 .25 1 --num-sampling-steps 3", str(path)):
        assert settings_of(f"--time-grid {words}") == listed
    path.write_text("[0, 0.25, 1]")
    assert settings_of(f"--time-grid {path}") == listed
    Sampler(create_transport()).sample_ode(**listed)
    assert solver_settings("ODE", {"sampling_method": "rk4", "time_grid": "logsnr"})[1]["time_grid"] == "logsnr"


@pytest.mark.parametrize(
    "words, message",
    [
        ("cosine", "unknown time grid; choose from uniform, logsnr, edm, a JSON file"),
        ("edm logsnr", "unknown time grid"),
        ("0.5", "two times or more"),
        ("0 nan 1", "not nan"),
        ("0 1.5", "not 1.5"),
        ("-0.5 1", "not -0.5"),
        ("1 0", "0.0 follows 1.0"),
        ("0 0.5 1 --num-sampling-steps 4", "--num-sampling-steps 4: --time-grid has 3 times"),
        ("edm --time-shift 2", "--time-shift has no effect on a --time-grid other than uniform"),
        ("edm --sampling-method dopri5", "--time-grid has no effect on dopri5"),
        ("missing.json", "missing.json: there is no such file"),
        ("FILE 7", "holds no object"),
        ("FILE {", "is damaged"),
        ("FILE {}", "holds no list of 'times'"),
        ('FILE {"times":"01"}', "holds no list of 'times'"),
        ('FILE {"times":[0,true]}', "not True"),
        ('FILE {"times":[0,NaN]}', "not nan"),
        ("FILE [0,0]", "0 follows 0"),
    ],
)
def test_a_bad_time_grid_is_one_line(tmp_path, words, message):
    name, _, content = words.partition(" ")
    if name == "FILE":
        (tmp_path / "grid.json").write_text(content)
        words = str(tmp_path / "grid.json")
    with pytest.raises(ValueError, match=message) as error:
        settings_of(f"--time-grid {words}")
    assert "\n" not in str(error.value)


def test_a_bad_time_grid_ends_a_script_before_the_weights_are_loaded(monkeypatch, capsys):
    words = "sample.py --ckpt nowhere --sampling-method euler --time-grid 0 2"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit) as end:
        sample.main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and "--time-grid 0 2" in printed.err and "loading" not in printed.out


def test_a_file_for_another_solver_is_noted(tmp_path):
    path = tmp_path / "grid.json"
    made = {"path": "LinearPath", "prediction": "velocity", "mode": "ODE", "sampling_method": "ab2"}
    path.write_text(json.dumps(made | {"times": [0, 1], "cfg_scale": 1.5}))
    now = made | {"cfg_scale": 1.5, "cfg_interval": None}
    assert grid_notes([str(path)], now) == grid_notes(None, now) == grid_notes(["edm"], now) == []
    (line,) = grid_notes([str(path)], now | {"path": "VPPath", "cfg_scale": 2.0})
    assert line == f"--time-grid {path} was made for path LinearPath, cfg_scale 1.5"
    (line,) = grid_notes([str(path)], now | {"internal_guidance": [1.4, 0.0, 1.0]})
    assert line == f"--time-grid {path} was made for internal_guidance None"


def test_flags_that_a_list_of_times_leaves_without_effect():
    for words, useless in (("0 0.5 0.9", 2), ("edm", 0)):
        solver = settings_of(f"--time-grid {words}", "SDE")
        assert len(without_effect({"last_step_size", "sample_eps"}, "SDE", solver)) == useless


def test_samples_of_another_grid_are_not_continued(tmp_path):
    for first, then in (({"time_grid": "edm"}, {}), ({}, {"time_grid": "edm"})):
        output = tmp_path / f"{len(first)}.npz"
        Shards(output, 4, (8, 8, 1)).prepare({"seed": 0} | first, False)
        Shards(output, 4, (8, 8, 1)).prepare({"seed": 0} | first, False)
        with pytest.raises(ValueError, match="time_grid"):
            Shards(output, 4, (8, 8, 1)).prepare({"seed": 0} | then, False)
