"""benchmarks/quality.py: statistics of known curves, its recipes, and a tiny measurement that goes on."""

import math

import numpy as np
import processes
import pytest
import quality
from conftest import TINY
from PIL import Image
from quality import Curve, Recipe


def power_law(scale, exponent, images, flops_per_image=2.0):
    """A curve fd = scale / images^exponent, straight in the logarithms."""
    images = np.asarray(images, float)
    return Curve(images, images * flops_per_image, scale * images**-exponent)


def test_a_curve_is_interpolated_in_the_logarithms():
    curve = power_law(8, 0.5, [100, 200, 400])
    for amount in (100, 150, 300, 400):
        assert quality.fd_at(curve.images, curve.fd, amount) == pytest.approx(8 * amount**-0.5)
        reached = quality.first_reach(curve.images, curve.fd, 8 * amount**-0.5)
        assert reached == (pytest.approx(amount), True)
    assert quality.first_reach(curve.images, curve.fd, 0.3) == (400, False)
    assert quality.first_reach(curve.images, curve.fd, 9.0) == (100, True)
    # A curve that rises again has reached what it first fell to.
    assert quality.first_reach(np.array([1, 2, 3, 4]), np.array([8, 2, 4, 1]), 2)[0] == 2


def test_ratios_have_the_interval_of_students_t():
    mean, low, high = quality.geometric([1.0, 2.0, 4.0])
    half = 4.302653 * math.log(2) / 3**0.5  # t of two degrees of freedom, from its table
    assert (mean, low, high) == pytest.approx((2, 2 * math.exp(-half), 2 * math.exp(half)))
    assert quality.geometric([3.0]) == (pytest.approx(3), None, None)
    assert quality.ratio_text([1.0, 1.0], 1.5, True) == "< 1.50 (1.50 to 1.50)"


def test_a_recipe_is_compared_with_the_base_recipe_of_its_seed():
    images = np.linspace(1000, 12_000, 12)
    base = power_law(8, 0.5, images)
    # A third of the images to each distance, at half more operations for each image.
    fast = power_law(8 * 3**-0.5, 0.5, images * 2 / 3, flops_per_image=3)
    result = quality.compare(base, fast)
    expected = {"images": 3, "flops": 2, "third": 2**-0.5, "all": 2**-0.5, "reached": True}
    assert result == pytest.approx(expected)
    assert quality.compare(base, base) == pytest.approx(dict.fromkeys(expected, 1))
    steep = quality.compare(base, power_law(80, 0.75, images))
    assert (steep["third"], steep["all"]) == pytest.approx((10 * 4000**-0.25, 10 * 12_000**-0.25))
    slow = quality.compare(base, power_law(16, 0.5, images))
    assert not slow["reached"] and slow["images"] == pytest.approx(1) and slow["all"] == pytest.approx(2)


def test_a_table_has_the_pairs_that_are_complete(monkeypatch):
    monkeypatch.setattr(quality, "RECIPES", {"base": Recipe(), "fast": Recipe("--fast"), "slow": Recipe("--slow")})

    def rows(recipe, seed, scale, points=quality.POINTS):
        curve = power_law(scale, 0.5, range(10, 10 * points + 10, 10))
        names = dict(data="digits", seed=seed, **recipe._asdict())
        return [
            names | dict(step=i, images=i, flops=2e9 * i, fd=fd) for i, fd in zip(curve.images, curve.fd, strict=True)
        ]

    fast, slow = Recipe("--fast"), Recipe("--slow")
    results = [*rows(Recipe(), 0, 8), *rows(Recipe(), 1, 6), *rows(fast, 0, 4), *rows(fast, 1, 3), *rows(fast, 2, 1)]
    results += [*rows(slow, 0, 9), *rows(slow, 1, 2, points=4)]
    curves = quality.curves_of(results[::-1])
    speeds = [
        dict(data="digits", flags=f, round=i, speed=s) for f, i, s in [("", 0, 50), ("", 1, 90), ("--fast", 1, 45)]
    ]
    base, fast, slow = quality.table_lines(curves, speeds, "digits")
    one = "1.00 (1.00 to 1.00)"
    assert base == ["base", "2.000", one, one, one, one, one, "2 of 2"]
    half, four, two = "0.50 (0.50 to 0.50)", "4.00 (4.00 to 4.00)", "2.00 (2.00 to 2.00)"
    assert fast == ["fast", "2.000", four, two, four, half, half, "2 of 2"]
    assert slow == ["slow", "2.000", "< 1.00", None, "< 1.00", "1.12", "1.12", "0 of 1"]


def test_every_recipe_has_flags_of_train(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "ENCODER_STEPS", 1)
    quality.train_encoder("digits", tmp_path)
    runs = quality.runs_of(quality.RECIPES, ["digits"], [0])
    flops = {run.flags: quality.flops_per_image(quality.words_of(run, tmp_path, "fp32")) for run in runs}
    of = {name: flops[recipe.flags] / flops[""] for name, recipe in quality.RECIPES.items()}
    assert of["direction"] == of["muon"] == 1 and abs(of["modern"] - 1) < 0.02
    assert of["route"] < 0.9 and of["align"] > 1 and 1 < of["inner-head"] < 1.1
    # A run of a recipe with fewer operations takes more steps.
    every, batch_size, _ = quality.points_of(quality.Run("mnist5k", "--route 1 3 0.5", 0), tmp_path, "fp32")
    assert batch_size == 64 and every > quality.DATA["mnist5k"].steps / quality.POINTS


@pytest.fixture
def measure(monkeypatch, tmp_path, capsys):
    """A function that runs quality.py with these flags on a tiny model, and returns what it prints."""
    tiny = {"digits": quality.DataSet((*TINY, "--class-dropout-prob", "0.2"), 4)}
    recipes = {"base": Recipe(), "ema-0.10": Recipe(ema="0.10"), "align": Recipe("--align {encoder} --align-width 8")}
    values = dict(DATA=tiny, RECIPES=recipes, POINTS=2, ENCODER_STEPS=1, SPEED_STEPS=2)
    for name, value in values.items():
        monkeypatch.setattr(quality, name, value)
    monkeypatch.setattr(quality.subprocess, "run", lambda words, **_: processes.run(*words[1:]))

    def run(*words):
        flags = ["--output-dir", tmp_path / "out", "--num-samples", 20, "--precision", "fp32", "--seeds", 0, *words]
        monkeypatch.setattr("sys.argv", ["quality", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            quality.main()
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return run


def test_a_measurement_goes_on_and_ends_with_a_table_and_curves(measure, monkeypatch, tmp_path):
    results, distance = tmp_path / "out" / "results.jsonl", quality.distance

    def interrupted(*arguments):
        if len(quality.read_rows(results)) == 3:
            raise KeyboardInterrupt
        return distance(*arguments)

    monkeypatch.setattr(quality, "distance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure("--recipes", "ema-0.10")
    checkpoints = [path.name for path in (tmp_path / "out" / "runs" / "digits-0").glob("checkpoint-*")]
    assert sorted(checkpoints) == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.setattr(quality, "distance", distance)
    before = results.read_text()
    results.write_text(before + '\n{"data": "dig')  # a line that was cut off
    code, text, _ = measure("--output", tmp_path / "curves.png")
    assert code == 0 and results.read_text().startswith(before) and not list((tmp_path / "out" / "runs").iterdir())
    assert "| ema-0.10 | 0.0" in text and "| align | 0.0" in text and "digits-0: " in text and "1 of 1 |" in text
    assert Image.open(tmp_path / "curves.png").width == 864
    rows = quality.read_rows(results)
    assert [(r["ema"], r["step"], r["images"]) for r in rows[:4]] == [
        ("ema", 2, 32),
        ("0.10", 2, 32),
        ("ema", 4, 64),
        ("0.10", 4, 64),
    ]
    assert len(rows) == 6 and rows[-1]["flops"] == pytest.approx(rows[3]["flops"], rel=0.5)
    monkeypatch.setattr(quality, "train_run", None)  # nothing is left to do
    assert "digits-0: done before" in measure()[1] and quality.read_rows(results) == rows


def test_a_run_that_fails_is_said_and_others_go_on(measure, monkeypatch):
    failed = processes.Finished(1, "", "a traceback\nits last line")
    monkeypatch.setattr(quality.subprocess, "run", lambda words, **_: failed)
    code, text, _ = measure()
    assert code == 1 and text.count("FAILED: ") == 2 and text.count(": its last line") == 2


def test_speeds_are_measured_in_turn(measure, tmp_path):
    code, text, _ = measure("--recipes", "align", "--speed", 1)
    rows = quality.read_rows(tmp_path / "out" / "speed.jsonl")
    assert code == 0 and [row["flags"] != "" for row in rows] == [False, True] and all(row["speed"] > 0 for row in rows)
    assert measure("--recipes", "align", "--speed", 1)[0] == 0  # is done before
    assert quality.read_rows(tmp_path / "out" / "speed.jsonl") == rows
    code, _, error = measure("--num-samples", 30)
    assert code == 2 and "num_samples 20, not 30; give another --output-dir" in error
