"""sample_ddp.py: the same images on any number of ranks, in any batches, after any stop."""

import json
import signal
import time

import numpy as np
import pytest
from PIL import Image
from processes import Script, run

import files
import sample_ddp
import sampling

WAYS = {"ODE": ["ODE", "--num-sampling-steps", 20], "SDE": ["SDE", "--num-sampling-steps", 20]}


def flags(run_folder, output, mode="SDE", batch=50, count=100, **more):
    words = ["sample_ddp.py", *WAYS[mode], "--ckpt", run_folder, "--output", output, "--num-fid-samples", count]
    words += ["--per-proc-batch-size", batch, "--cfg-scale", 1.5]
    return words + [word for key, value in more.items() for word in (f"--{key.replace('_', '-')}", value)]


def draw(*words, processes=1, code=0):
    result = run(*words, processes=processes)
    assert result.returncode == code, result.stderr + result.stdout
    return result


def arrays(path):
    with np.load(path, allow_pickle=False) as content:
        assert set(content) == {"arr_0", "arr_1"}
        return content["arr_0"], content["arr_1"]


@pytest.fixture(scope="module")
def of_one_process(digits_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    for mode in WAYS:
        draw(*flags(digits_run, folder / f"{mode}.npz", mode))
    return folder


@pytest.mark.parametrize("mode", WAYS)
def test_ranks_and_batches_do_not_matter(mode, digits_run, of_one_process, tmp_path):
    result = draw(*flags(digits_run, tmp_path / "two.npz", mode, batch=7), processes=2)
    assert "100 images in" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.json", "two.npz"]
    images, labels = arrays(tmp_path / "two.npz")
    expected, expected_labels = arrays(of_one_process / f"{mode}.npz")
    assert images.dtype == np.uint8 and images.shape == (100, 8, 8, 1) and labels.dtype == np.int64
    assert np.array_equal(labels, expected_labels) and len(set(labels.tolist())) == 10
    assert np.abs(images.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", WAYS)
def test_what_was_killed_is_continued(mode, digits_run, of_one_process, tmp_path):
    words = flags(digits_run, tmp_path / "killed.npz", mode, batch=10)
    parts = tmp_path / "killed.npz.parts"
    script = Script(*words)
    while script.alive() and not list(parts.glob("*.npy")):
        time.sleep(0.001)
    script.signal(signal.SIGKILL)
    script.wait()
    there = {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    kept = sum(sample_ddp.load_part(path).shape[0] for path in there)
    assert 0 < kept < 100
    result = draw(*flags(digits_run, tmp_path / "killed.npz", mode, batch=7))
    assert f"{100 - kept} images in" in result.stdout
    images, labels = arrays(tmp_path / "killed.npz")
    expected, expected_labels = arrays(of_one_process / f"{mode}.npz")
    assert np.array_equal(labels, expected_labels) and np.abs(images.astype(int) - expected).max() <= 1
    before = (tmp_path / "killed.npz").stat().st_mtime_ns
    assert "is there, made with these settings" in draw(*words).stdout
    assert (tmp_path / "killed.npz").stat().st_mtime_ns == before


def test_other_settings_do_not_go_on_with_what_is_there(digits_run, of_one_process, tmp_path):
    for path in of_one_process.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for change, message in (
        (dict(cfg_scale=2), "made with cfg_scale 1.5, not 2.0"),
        (dict(global_seed=1), "made with seed 0, not 1"),
        (dict(count=50), "made with num_fid_samples 100, not 50"),
    ):
        result = draw(*flags(digits_run, tmp_path / "SDE.npz", **change), code=2)
        assert message in result.stderr and result.stderr.count("\n") == 1
    result = draw(*flags(digits_run / "checkpoint-3", tmp_path / "SDE.npz"), code=2)
    assert "made with weights_sha256" in result.stderr
    assert (tmp_path / "SDE.npz").read_bytes() == (of_one_process / "SDE.npz").read_bytes()
    (tmp_path / "SDE.json").unlink()
    result = draw(*flags(digits_run, tmp_path / "SDE.npz"), code=2)
    assert "nothing says how it was made" in result.stderr


def test_a_damaged_part_is_named(digits_run, tmp_path):
    parts = tmp_path / "a.npz.parts"
    words = flags(digits_run, tmp_path / "a.npz", count=30, batch=10)
    script = Script(*words)
    while script.alive() and not list(parts.glob("*.npy")):
        time.sleep(0.001)
    script.signal(signal.SIGKILL)
    script.wait()
    part = next(parts.glob("*.npy"))
    part.write_bytes(part.read_bytes()[:-9])
    result = draw(*words, code=2)
    assert f"{part} is damaged" in result.stderr and result.stderr.count("\n") == 1
    part.unlink()
    draw(*words)


def test_balanced_labels_and_pngs(digits_run, tmp_path):
    words = [*flags(digits_run, tmp_path / "b.npz", count=30), "--balanced-labels", "--save-png"]
    draw(*words)
    images, labels = arrays(tmp_path / "b.npz")
    assert np.bincount(labels).tolist() == [3] * 10
    for i in (0, 29):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "b.pngs" / f"{i:06d}.png")), images[i, ..., 0])
    description = json.loads((tmp_path / "b.json").read_text())
    assert (description["network_calls_per_image"], description["network_evaluations_per_image"]) == (20, 40)
    assert description["balanced_labels"] and description["cfg_scale"] == 1.5


def test_guidance_over_an_interval_is_counted(digits_run, tmp_path):
    result = draw(*flags(digits_run, tmp_path / "i.npz", count=4), "--cfg-interval", 0.5, 1)
    # 19 steps at t = 0, 0.96/19, ...: the last nine lie at 0.5 or later, and the last step at 0.96.
    times = np.linspace(0, 0.96, 20)
    guided = int((times >= 0.5).sum())
    assert f"20 network calls per image ({20 + guided} evaluations)" in result.stdout
    assert "guidance 1.5 on 1 of 1 channels for t in [0.5, 1]" in result.stdout


def test_a_protocol_holds_the_settings_of_the_paper(digits_run, tmp_path):
    words = ["sample_ddp.py", "--ckpt", digits_run, "--num-fid-samples", 2, "--output", tmp_path / "p.npz"]
    result = draw(*words, "--protocol", "paper-sde-cfg")
    assert "SDE Euler, 250 network calls per image (500 evaluations), guidance 1.5" in result.stdout
    assert "for SiT-XL/2 at 256x256: 2.06, 4.49, 277.50, 0.83, 0.59" in result.stdout
    result = draw(*words[:-1], tmp_path / "q.npz", "--protocol", "paper-ode")
    assert "ODE heun2, 250 network calls per image (250 evaluations), no guidance" in result.stdout
    result = draw(*words, "--protocol", "paper-ode", "--num-sampling-steps", 50, code=2)
    assert "--protocol paper-ode has --num-sampling-steps 126, not 50" in result.stderr


def test_likelihood_points_elsewhere(digits_run, tmp_path):
    result = draw(*flags(digits_run, tmp_path / "l.npz", mode="ODE"), "--likelihood", code=2)
    assert "likelihood.py" in result.stderr and result.stderr.count("\n") == 1


def test_labels_do_not_depend_on_how_many_there_are():
    some, more = (sampling.draw_labels(count, 1000, 3, False) for count in (100, 5000))
    assert np.array_equal(some, more[:100])
    assert not np.array_equal(some, sampling.draw_labels(100, 1000, 4, False))
    counts = np.bincount(sampling.draw_labels(50_000, 10, 0, False), minlength=10)
    assert abs(counts - 5000).max() < 4 * np.sqrt(5000 * 0.9)


def test_missing_ranges(tmp_path):
    for begin, end in ((10, 20), (25, 30)):
        (tmp_path / f"{begin:07d}-{end:07d}.npy").touch()
    (tmp_path / ".0000030-0000040.npy.partial").touch()
    expected = [(0, 8), (8, 10), (20, 25), (30, 38), (38, 40)]
    assert sample_ddp.missing_ranges(tmp_path, 40, 8) == expected


def test_an_npz_written_in_parts_is_the_array(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    with files.NpzWriter(tmp_path / "a.npz") as archive:
        archive.write_array("arr_0", (array[i : i + 7] for i in range(0, 50, 7)), 50)
        archive.write_array("arr_1", [np.arange(50)], 50)
    images, labels = arrays(tmp_path / "a.npz")
    assert np.array_equal(images, array) and np.array_equal(labels, np.arange(50))
    with files.NpzWriter(tmp_path / "b.npz") as archive, pytest.raises(ValueError, match="7 rows, and should have 8"):
        archive.write_array("arr_0", [array[:7]], 8)
