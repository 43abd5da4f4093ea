"""benchmarks/solver_curves.py: its numbers of steps, its comparison with the reference, and a tiny run that goes on."""

import json

import numpy as np
import pytest
import solver_curves
import torch
from PIL import Image

from sampling.draw import SampleSettings
from sampling.pipeline import load_pipeline
from transport import ODE_METHODS, SDE_METHODS, create_transport


def settings_of(names, nfes, grids=("uniform",), last_steps=("Mean",)):
    solvers = solver_curves.solvers_of(names, last_steps)
    grids = solver_curves.read_grids(list(grids))
    return list(solver_curves.settings_of(solvers, nfes, [0.1], grids, create_transport()))


def test_every_solver_is_measured_at_the_nearest_number_of_steps():
    settings = settings_of([*ODE_METHODS, *SDE_METHODS], [5, 6, 16])
    assert {setting.solver["sampling_method"] for setting in settings} == {*ODE_METHODS, *SDE_METHODS}
    budgets = {}
    for setting in settings:
        budgets.setdefault(setting.label, []).append(setting.budget)
        made = SampleSettings(setting.mode, setting.solver).sampler(create_transport()).nfe
        assert made is None or setting.budget == f"{made} NFE"
    assert budgets["ODE euler"] == budgets["SDE Euler"] == ["5 NFE", "6 NFE", "16 NFE"]
    assert budgets["ODE heun2"] == ["4 NFE", "6 NFE", "16 NFE"]
    assert budgets["ODE rk4"] == ["4 NFE", "16 NFE"]
    assert budgets["ODE explicit_adams"] == ["2 times", "5 times"] and budgets["ODE dopri5"] == ["rtol 0.1"]


def test_a_tuned_grid_is_measured_with_its_solver_alone(tmp_path):
    (tmp_path / "ours.json").write_text(json.dumps({"times": [0, 0.2, 1], "sampling_method": "euler"}))
    settings = settings_of(["euler", "heun2"], [5], [tmp_path / "ours.json", "logsnr"])
    assert [(s.label, s.grid, s.budget) for s in settings] == [
        ("ODE euler", "tuned", "2 NFE"),
        ("ODE euler", "logsnr", "5 NFE"),
        ("ODE heun2", "logsnr", "4 NFE"),
    ]
    assert settings[0].solver["time_grid"] == [0, 0.2, 1] and settings[1].solver["time_grid"] == "logsnr"


def test_results_are_compared_with_the_reference_of_the_same_seed():
    def row(solver, budget, seed, nfe, fd_pixels):
        names = dict(solver=solver, time_grid="uniform", budget=budget, seed=seed)
        return names | dict(nfe=nfe, fd_pixels=fd_pixels, distance=0.5 * seed)

    rows = [row("ODE heun2", "250 NFE", 0, 250, 0.2), row("ODE heun2", "250 NFE", 1, 250, 0.4)]
    rows += [row("ODE ab2", "8 NFE", 0, 8, 0.22), row("ODE ab2", "8 NFE", 1, 8, 0.38)]
    rows += [row("ODE euler", "8 NFE", 0, 8, 0.22)]
    curves = solver_curves.points(rows)
    (ab2,), (euler,) = curves["ODE ab2", "uniform"], curves["ODE euler", "uniform"]
    assert ab2["ratios"] == pytest.approx([1.1, 0.95]) and ab2["fd_pixels"] == pytest.approx(0.3)
    assert ab2["distance"] == 0.25 and ab2["deviation"] == pytest.approx(0.16 / 2**0.5)
    assert solver_curves.is_as_good(ab2) and not solver_curves.is_as_good(euler)
    first, second = solver_curves.best_lines(curves)
    assert first == "ODE ab2, uniform, 8 NFE: 0.3000 ± 0.1131, 1.025 (0.950 to 1.100 in 2 seeds)"
    assert second == "ODE euler, uniform, 8 NFE: 0.2200, 1.100 (one seed)"


def test_the_curves_go_on_from_their_file(digits_run, tmp_path, monkeypatch, capsys):
    def curves(*words):
        flags = ["--ckpt", digits_run, "--json", tmp_path / "c.json", "--num-samples", 20, "--nfe", 5, 8]
        monkeypatch.setattr("sys.argv", ["solver_curves", *map(str, [*flags, *words])])
        solver_curves.main()
        return capsys.readouterr().out

    curves("--solvers", "euler")
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    reference, *others = rows.values()
    assert reference["nfe"] == 250 and reference["distance"] == 0
    assert [row["nfe"] for row in others] == [5, 8] and all(row["distance"] > 0 for row in others)
    more = ["--solvers", "euler", "dopri5", "Euler", "--tolerances", 0.1, "--output", tmp_path / "c.png"]
    text = curves(*more)
    assert "euler, uniform, 5 NFE, seed 0: fd" not in text and "SDE Euler, uniform, 8 NFE, seed 0: fd" in text
    assert f"| ODE euler | uniform | {others[0]['distance']:.1e} |" in text
    assert f"| **{reference['fd_pixels']:.3f}** |" in text  # as good as itself
    assert Image.open(tmp_path / "c.png").width == 792 and (tmp_path / "c.png").stat().st_size < 100_000
    later = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert len(later) == 6 and list(later.values())[:3] == [reference, *others]
    monkeypatch.setattr(solver_curves.Measurement, "row", None)  # nothing is left to measure
    table = text[text.index("\nFréchet") :]
    assert curves(*more).endswith(table)
    for words in (["--cfg-scale", 2], ["--speed", 1]):
        with pytest.raises(SystemExit) as error:
            curves(*words)
        assert error.value.code == 2
    lines = curves("--solvers", "ab2", "--nfe", 8, "--speed", 1).splitlines()
    assert lines[-2].startswith("| SDE Euler, the default | 250 | ") and lines[-1].startswith("| ODE ab2 | 8 | ")


def test_samples_that_are_not_finite_are_said_and_left_out(digits_run, tmp_path):
    pipeline = load_pipeline(digits_run, torch.device("cpu"))
    measurement = solver_curves.Measurement(pipeline, 20, 20, 1.5, tmp_path / "c.json")
    (euler,) = settings_of(["euler"], [5])
    measurement.draw = lambda setting, seed: (torch.full((20, 1, 8, 8), torch.inf), 5)
    np.save(measurement.reference(0), np.zeros((20, 1, 8, 8)))
    row = measurement.row(euler, 0)
    assert row["fd_pixels"] is None and solver_curves.points([row]) == {}
