"""sweep.py: what is measured, the same bytes after any stop and on any ranks, and what is said of the best."""

import csv
import json
import math
import shlex
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Script, run

import sample_ddp
from data.sources import open_source
from evaluation.metrics import frechet_distance, moments, pixels
from evaluation.sweeps import coordinate, draw_heatmap, grid, star, statistics_of, within_noise, words_of
from models import SiT
from sampling.pipeline import Pipeline
from sweep import effective, settings_of
from transport import create_transport
from vae import PixelSpace

AXES = ["--cfg-scale", 1, 1.5, "--cfg-interval", "none", "0:0.7", "--solver", "heun2", "Euler"]
AXES += ["--num-sampling-steps", 5, "--diffusion-form", "sigma"]


def words(run_folder, output, *more):
    fixed = ["--num-samples", 100, "--seeds", 0, 3, "--batch-size", 16]
    return ["sweep.py", "--ckpt", run_folder, "--output-dir", output, *fixed, *more]


def sweep(*arguments, code=0, **more):
    result = run(*arguments, **more)
    assert result.returncode == code, result.stderr + result.stdout
    assert not code or (result.stderr.count("\n") == 1 and "error: " in result.stderr)
    return result


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(digits_run, tmp_path_factory):
    """The folder of a finished sweep, and what it printed."""
    folder = tmp_path_factory.mktemp("sweeps") / "finished"
    return folder, sweep(*words(digits_run, folder, *AXES)).stdout


def test_flags_without_effect_are_left_out_and_a_dry_run_writes_nothing(digits_run, tmp_path):
    more = ["--atol", 1e-4, 1e-5, "--solver", "heun2", "dopri5", "Heun", "--dry-run", "--max-images", 1000]
    output = sweep(*words(digits_run, tmp_path / "dry", *AXES, *more)).stdout.splitlines()
    guidance = ["--cfg-scale 1.0", "--cfg-scale 1.5", "--cfg-scale 1.5 --cfg-interval 0.0 0.7"]
    expected = [f"ODE --sampling-method heun2 --num-sampling-steps 5 {rule}: 8 NFE" for rule in guidance]
    for tolerance in ("0.0001", "1e-05"):
        start = f"ODE --sampling-method dopri5 --atol {tolerance}"
        expected += [f"{start} {rule}: as many NFE as its tolerances need" for rule in guidance]
    start = "SDE --sampling-method Heun --num-sampling-steps 5 --diffusion-form sigma"
    expected += [f"{start} {rule}: 9 NFE" for rule in guidance]
    assert output[1] == f"the newest checkpoint of {digits_run} is checkpoint-6" and output[2:-2] == expected
    cost = "1,000 images, 4,800 NFE and at most 8,000 forward passes"
    assert output[-2].startswith(f"5 combinations of 200 images: {cost}")
    assert output[-1] == "7 combinations beyond --max-images are not measured"
    assert not (tmp_path / "dry").exists()


def test_a_row_is_what_sample_ddp_draws_and_the_best_is_named_with_its_command(finished, digits_run, tmp_path):
    folder, output = finished
    rows = rows_of(folder)
    assert len(rows) == 6 and not any((folder / "images").iterdir())
    best = min(rows, key=lambda row: row["mean"])
    (line,) = (line for line in output.splitlines() if line.startswith("50,000 images"))
    command = shlex.split(line.split(": ", 1)[1])
    assert command[:2] == ["python", "sample_ddp.py"] and command[-1] == str(folder / f"best-{best['id']}.npz")
    sample_ddp.build_parser().parse_args(command[2:])
    real = np.stack([np.asarray(image) for image, _ in open_source("digits").examples])
    for seed, value in zip((0, 3), best["values"], strict=True):
        more = ["--num-fid-samples", 100, "--global-seed", seed, "--per-proc-batch-size", 16]
        result = run(*command[1:-1], tmp_path / f"{seed}.npz", *more)
        assert f"{best['nfe']} NFE ({best['forward_passes']} forward passes)" in result.stdout
        with np.load(tmp_path / f"{seed}.npz") as content:
            distance = frechet_distance(*moments(pixels(content["arr_0"])), *moments(pixels(real)))
        assert value == pytest.approx(distance, rel=1e-4)
    assert best["mean"] == pytest.approx(np.mean(best["values"]), rel=1e-4)
    assert best["std"] == pytest.approx(np.std(best["values"], ddof=1), rel=1e-3) and best["images"] == 200
    assert f"best: {shlex.join(command[2:-4])}: fd_pixels {best['mean']:.5g} ± {best['std']:.2g}" in output


def test_tables_and_pictures_show_all_rows(finished):
    folder, _ = finished
    with open(folder / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    means = [float(line["fd_pixels"]) for line in table]
    assert means == sorted(row["mean"] for row in rows_of(folder))
    assert {(line["sampling_method"], line["diffusion_form"]) for line in table} == {("heun2", "-"), ("Euler", "sigma")}
    markdown = (folder / "table.md").read_text().splitlines()
    assert len(markdown) == 8 and markdown[2].split(" | ")[1:3] == [table[0]["sampling_method"], "5"]
    for name in ("heatmap.png", "curves.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 100 and len(np.unique(np.asarray(image.convert("L")))) > 20


def test_a_guide_has_an_effect_on_a_model_without_a_null_class():
    with torch.device("meta"):
        model = SiT(depth=1, class_dropout_prob=0.0)
    outline = Pipeline(model, create_transport(), PixelSpace(), torch.device("cpu"), None)
    for more in ({}, {"cfg_scale": 2.0}, {"cfg_interval": [0.0, 0.7]}):
        combination = {"guide_ckpt": "early", "sampling_method": "euler", **more}
        assert effective(outline, combination) == combination and settings_of(outline, combination).cfg_scale == 2
    assert effective(outline, {"guide_ckpt": "early", "cfg_scale": 1.0}) == {"cfg_scale": 1.0}


def test_a_heat_map_shows_names_of_files_as_they_are(tmp_path):
    rows = [{"settings": {"guide_ckpt": name}, "mean": 1.0} for name in ("a$b_{$", "runs/$1_^$/x")]
    draw_heatmap(tmp_path / "a.png", rows, "fid")
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_on_other_ranks_it_ends_with_the_same_bytes(processes, finished, digits_run, tmp_path):
    folder, _ = finished
    arguments = words(digits_run, tmp_path / "killed", *AXES)
    script = Script(*arguments, processes=processes)
    results, images = tmp_path / "killed" / "results.jsonl", tmp_path / "killed" / "images"
    while script.alive() and not (results.exists() and list(images.glob("*.parts/*.npy"))):
        time.sleep(0.001)
    script.signal(signal.SIGKILL)
    script.wait()
    kept = len(rows_of(tmp_path / "killed"))
    assert 0 < kept < 6
    again = sweep(*arguments, processes=3 - processes).stdout
    assert f"[{kept + 1}/6] " in again and f"[{kept}/6] " not in again
    assert results.read_bytes() == (folder / "results.jsonl").read_bytes() and not any(images.iterdir())
    for name in ("table.md", "table.csv", "heatmap.png", "curves.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (folder / name).read_bytes()


def test_more_values_continue_and_other_settings_do_not(finished, digits_run):
    folder, _ = finished
    before = (folder / "results.jsonl").read_bytes()
    for more, message in (
        (["--seeds", 0], "made with seeds [0, 3], not [0]"),
        (["--ckpt", digits_run / "checkpoint-3"], "was made with weights_sha256"),
        (["--reference", digits_run / "samples"], "does not hold images of (8, 8, 1)"),
    ):
        assert message in sweep(*words(digits_run, folder, *AXES, *more), code=2).stderr
    assert (folder / "results.jsonl").read_bytes() == before
    output = sweep(*words(digits_run, folder, *AXES, "--cfg-scale", 1, 1.5, 2, "--max-images", 1400)).stdout
    assert output.count("/7] ") == 2  # of the first seven of ten, five were there
    assert (folder / "results.jsonl").read_bytes().startswith(before) and len(rows_of(folder)) == 8


def test_what_fails_is_a_row_and_the_others_go_on(digits_run, tmp_path):
    """An EMA that is missing, guidance whose samples are infinite, and a grid beyond the singular end."""
    axes = ["--ema", "slow", "ema", "--cfg-scale", 1e38, 1, "--solver", "euler", "--num-sampling-steps", 3]
    result = sweep(*words(digits_run, tmp_path / "f", *axes, "--seeds", 0), processes=2)
    rows = rows_of(tmp_path / "f")
    assert ["error" in row for row in rows] == [True, True, True, False]
    assert "no such EMA" in rows[0]["error"] and rows[2]["error"] == "the samples are not finite"
    assert result.stdout.count("failed: ODE --ema slow") == 2 and result.stdout.count("failed: ") == 3
    assert "best: ODE --ema ema" in result.stdout and "one seed has no noise band" in result.stdout
    assert not any((tmp_path / "f" / "images").iterdir())
    assert "not finite" in (tmp_path / "f" / "table.md").read_text()


def test_axes_are_searched_one_after_the_other_from_the_best_so_far(digits_run, tmp_path):
    axes = {"a": [0, 1, 2, 3], "b": [None, 5, 7], "c": [1, 2]}
    asked = []

    def measure(combination):
        asked.append(combination)
        a, b, c = combination["a"], combination.get("b", 0), combination["c"]
        return None if a == 3 else (a - 1) ** 2 + (b - 5) ** 2 + (c - 2) ** 2

    assert coordinate(axes, measure) == {"a": 1, "b": 5, "c": 2}
    expected = [dict(a=a, c=1) for a in range(4)] + [dict(a=1, c=1), dict(a=1, b=5, c=1), dict(a=1, b=7, c=1)]
    assert asked == [*expected, dict(a=1, b=5, c=1), dict(a=1, b=5, c=2)]
    assert words_of({}) == "ODE" and words_of({"sampling_method": "Euler"}) == "SDE --sampling-method Euler"
    assert len(grid(axes)) == math.prod(map(len, axes.values())) and len(star(axes)) == 9
    more = ["--solver", "euler", "heun2", "--num-sampling-steps", 3, 5, "--cfg-scale", 1, 2, "--coordinate"]
    output = sweep(*words(digits_run, tmp_path / "c", *more)).stdout
    assert "at most 4 combinations of 200 images: 800 images" in output
    chosen, settings = rows_of(tmp_path / "c"), [row["settings"] for row in rows_of(tmp_path / "c")]
    assert [list(s.values()) for s in settings[:2]] == [["euler", 3, 1.0], ["heun2", 3, 1.0]]
    solver = min(chosen[:2], key=lambda row: row["mean"])["settings"]["sampling_method"]
    assert list(settings[2].values()) == [solver, 5, 1.0] and settings[3]["cfg_scale"] == 2 and len(settings) == 4


@pytest.mark.parametrize(
    "more, message",
    [
        (["--solver", "heun3", "magic"], "argument --solver: unknown value 'magic'"),
        (["--num-sampling-steps", 5, -1], "must be an integer of 2 or more, not '-1'"),
        (["--cfg-interval", "0.7:0.2"], "must be none or LO:HI with LO below HI, not '0.7:0.2'"),
        (["--diffusion-form", "round"], "unknown value 'round'"),
        (["--time-grid", "uniform", "square"], "--time-grid square: unknown time grid"),
        (["--guide-ckpt", "none", "not-there.pt"], "no such checkpoint"),
        (["--ckpt", "not-there.pt"], "no such checkpoint"),
        (["--ema", "slow"], "no such EMA"),
        (["--reference", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--seeds", 1, 1], "--seeds 1 1: a seed comes twice"),
        (["--max-images", 199], "--max-images 199: one combination takes 200"),
    ],
)
def test_wrong_flags_are_said_before_any_image_is_drawn(more, message, digits_run, tmp_path):
    assert message in sweep(*words(digits_run, tmp_path / "w", *AXES, *more), code=2).stderr
    assert not (tmp_path / "w" / "images").exists()


def test_the_noise_band_is_that_of_a_difference():
    best, near, far = (statistics_of([x, x + 0.3]) for x in (1.0, 1.29, 1.31))
    assert best == {"values": [1.0, 1.3], "mean": 1.15, "std": 0.21213}
    assert within_noise(best, near) and not within_noise(best, far)
    assert not within_noise(statistics_of([1.0]), statistics_of([1.0]))
