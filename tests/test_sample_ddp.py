"""sample_ddp.py: the same images on any number of ranks, in any batches, after any stop."""

import json
import os
import pickle
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Script, run

from models import SiT
from sampling.draw import draw_labels
from sampling.shards import Shards, background, check_npz
from utils import files

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


def copy_folder(source, target):
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.npz", "two.npz.json"]
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
    kept = sum(len(np.load(path)) for path in there)
    assert 0 < kept < 100
    result = draw(*flags(digits_run, tmp_path / "killed.npz", mode, batch=7))
    assert f"{100 - kept} images in" in result.stdout
    images, labels = arrays(tmp_path / "killed.npz")
    expected, expected_labels = arrays(of_one_process / f"{mode}.npz")
    assert np.array_equal(labels, expected_labels) and np.abs(images.astype(int) - expected).max() <= 1
    before = (tmp_path / "killed.npz").stat().st_mtime_ns
    assert "exists, made with these settings" in draw(*words).stdout
    assert (tmp_path / "killed.npz").stat().st_mtime_ns == before


def test_other_settings_do_not_continue_existing_shards(digits_run, of_one_process, tmp_path):
    copy_folder(of_one_process, tmp_path)
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
    (tmp_path / "SDE.npz.json").unlink()
    result = draw(*flags(digits_run, tmp_path / "SDE.npz"), code=2)
    assert "SDE.npz.json, which says how it was made, does not" in result.stderr


def half_made(output):
    """Take a finished output back to what a kill would have left: two parts of ten. Returns (their folder, images)."""
    images, _ = arrays(output)
    description = json.loads(output.with_name(output.name + ".json").read_text())
    parts = output.with_name(output.name + ".parts")
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps(description))
    np.save(parts / "0000000-0000010.calls-20-40.npy", images[:10])
    np.save(parts / "0000010-0000020.calls-20-40.npy", images[10:20])
    output.unlink()
    return parts, images


def test_a_damaged_shard_is_drawn_again(digits_run, tmp_path):
    words = flags(digits_run, tmp_path / "a.npz", count=30, batch=10)
    draw(*words)
    parts, images = half_made(tmp_path / "a.npz")
    cut = parts / "0000000-0000010.calls-20-40.npy"
    cut.write_bytes(cut.read_bytes()[:-9])
    np.save(parts / "0000010-0000020.calls-20-40.npy", images[10:20, :4])  # of another size
    result = draw(*words)
    assert result.stdout.count("is damaged, and is drawn again") == 2 and "30 images in" in result.stdout
    assert np.array_equal(arrays(tmp_path / "a.npz")[0], images) and not parts.exists()


def test_pngs_and_counts_are_complete_after_a_stop(digits_run, tmp_path):
    """PNGs that an earlier call did not write, or that a kill left out; NFE are read from the shards' names."""
    words = flags(digits_run, tmp_path / "a.npz", count=30, batch=10)
    draw(*words)
    _, images = half_made(tmp_path / "a.npz")
    result = draw(*words, "--save-png")
    assert "10 images in" in result.stdout and "20 NFE (40 forward passes)" in result.stdout
    pngs = sorted((tmp_path / "a.pngs").iterdir())
    assert [path.name for path in pngs] == [f"{i:06d}.png" for i in range(30)]
    for path in pngs[5:]:
        path.unlink()
    result = draw(*words, "--save-png")
    assert "exists, made" in result.stdout
    assert all(np.array_equal(np.asarray(Image.open(path)), images[i, ..., 0]) for i, path in enumerate(pngs))


def test_one_process_at_a_time_writes_an_output(digits_run, tmp_path):
    slow = flags(digits_run, tmp_path / "a.npz", count=5000, batch=10)
    script = Script(*slow)
    while script.alive() and not (tmp_path / "a.npz.parts" / "settings.json").exists():
        time.sleep(0.001)
    result = draw(*slow, code=2)
    assert "another process is drawing" in result.stderr and result.stderr.count("\n") == 1
    assert script.alive()
    script.signal(signal.SIGKILL)
    script.wait()


def test_another_autoencoder_does_not_continue(small_vae, tmp_path):
    """The same weights with a VAE of other weights, or of another scale, make other images."""
    from diffusers import AutoencoderKL

    vae = small_vae()
    other = tmp_path / "other"
    model = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        model.decoder.conv_out.bias.add_(0.1)
    model.save_pretrained(other)
    scaled = small_vae(scaling_factor=0.5)
    torch.manual_seed(0)
    sizes = dict(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=4, num_classes=10)
    torch.save(SiT(**sizes).state_dict(), tmp_path / "model.pt")
    words = ["sample_ddp.py", "SDE", "--num-sampling-steps", 3, "--num-fid-samples", 4, "--output", tmp_path / "v.npz"]
    words += ["--ckpt", tmp_path / "model.pt", "--num-heads", 4]
    draw(*words, "--vae", vae)
    for different in (other, scaled):
        result = draw(*words, "--vae", different, code=2)
        assert "v.npz.json: made with vae" in result.stderr and result.stderr.count("\n") == 1
    result = draw(*words[:-1], 2, "--vae", vae, code=2)
    assert "made with model" in result.stderr


def test_weights_that_are_not_finite_draw_nothing(tmp_path):
    model = SiT(input_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=4, num_classes=10)
    torch.nn.init.constant_(model.final_layer.linear.bias, float("nan"))
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    words = ["--ckpt", tmp_path / "nan.pt", "--num-heads", 4, "--vae", "none", "--num-sampling-steps", 3]
    result = draw("sample_ddp.py", "SDE", *words, "--num-fid-samples", 4, "--output", tmp_path / "n.npz", code=2)
    assert "not finite" in result.stderr and not (tmp_path / "n.npz").exists()


def test_balanced_labels_and_pngs(digits_run, tmp_path):
    words = [*flags(digits_run, tmp_path / "b.npz", count=30), "--balanced-labels", "--save-png"]
    draw(*words)
    images, labels = arrays(tmp_path / "b.npz")
    assert np.bincount(labels).tolist() == [3] * 10
    for i in (0, 29):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "b.pngs" / f"{i:06d}.png")), images[i, ..., 0])
    description = json.loads((tmp_path / "b.npz.json").read_text())
    assert (description["nfe"], description["forward_passes"]) == (20, 40)
    assert description["balanced_labels"] and description["cfg_scale"] == 1.5


def test_guidance_over_an_interval_is_counted(digits_run, tmp_path):
    result = draw(*flags(digits_run, tmp_path / "i.npz", count=4), "--cfg-interval", 0.5, 1)
    # 19 steps at t = 0, 0.96/19, ...: the last nine lie at 0.5 or later, and the last step at 0.96.
    times = np.linspace(0, 0.96, 20)
    guided = int((times >= 0.5).sum())
    assert f"20 NFE ({20 + guided} forward passes)" in result.stdout
    assert "guidance 1.5 on 1 of 1 channels for t in [0.5, 1]" in result.stdout


def test_a_protocol_holds_the_settings_of_the_paper(digits_run, tmp_path):
    words = ["sample_ddp.py", "--ckpt", digits_run, "--num-fid-samples", 2, "--output", tmp_path / "p.npz"]
    result = draw(*words, "--protocol", "paper-sde-cfg")
    assert "SDE Euler, 250 NFE (500 forward passes), guidance 1.5" in result.stdout
    assert "for SiT-XL/2 at 256x256: 2.06, 4.49, 277.50, 0.83, 0.59; these samples do not compare" in result.stdout
    result = draw(*words[:-1], tmp_path / "q.npz", "--protocol", "paper-ode")
    assert "ODE heun2, 250 NFE (250 forward passes), no guidance" in result.stdout
    result = draw(*words, "--protocol", "paper-ode", "--num-sampling-steps", 50, code=2)
    assert "--protocol paper-ode has --num-sampling-steps 126, not 50" in result.stderr
    for more, message in (
        (["--num-sampling-steps", 250], "--num-sampling-steps 126, not 250"),  # the value without a protocol
        (["SDE"], "mode ODE, not SDE"),
        (["--time-shift", 3], "--time-shift None, not 3"),
        (["--sampling-method", "rk4"], "--sampling-method heun2, not rk4"),
    ):
        assert message in draw(*words, "--protocol", "paper-ode", *more, code=2).stderr


def test_likelihood_points_elsewhere(digits_run, tmp_path):
    result = draw(*flags(digits_run, tmp_path / "l.npz", mode="ODE"), "--likelihood", code=2)
    assert "likelihood.py" in result.stderr and result.stderr.count("\n") == 1


def test_labels_do_not_depend_on_their_number():
    some, more = (draw_labels(count, 1000, 3, False) for count in (100, 5000))
    assert np.array_equal(some, more[:100])
    assert not np.array_equal(some, draw_labels(100, 1000, 4, False))
    counts = np.bincount(draw_labels(50_000, 10, 0, False), minlength=10)
    assert abs(counts - 5000).max() < 4 * np.sqrt(5000 * 0.9)


def test_missing_ranges(tmp_path):
    there = Shards(tmp_path / "a.npz", 40, (2, 2, 1))
    there.folder.mkdir()
    for begin, end in ((10, 20), (25, 30)):
        np.save(there.folder / f"{begin:07d}-{end:07d}.calls-3-6.npy", np.zeros((end - begin, 2, 2, 1), np.uint8))
    (there.folder / ".0000030-0000040.calls-3-6.npy.partial").touch()
    assert there.missing(8) == [(0, 8), (8, 10), (20, 25), (30, 38), (38, 40)]
    assert there.counts() == {"nfe": 3, "forward_passes": 6}


def test_an_npz_written_in_parts_is_the_array(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    with files.NpzWriter(tmp_path / "a.npz", "w") as archive:
        archive.write_array("arr_0", (array[i : i + 7] for i in range(0, 50, 7)), 50)
        archive.write_array("arr_1", [np.arange(50)], 50)
    images, labels = arrays(tmp_path / "a.npz")
    assert np.array_equal(images, array) and np.array_equal(labels, np.arange(50))
    with (
        files.NpzWriter(tmp_path / "b.npz", "w") as archive,
        pytest.raises(ValueError, match="7 rows, and should have 8"),
    ):
        archive.write_array("arr_0", [array[:7]], 8)
    with files.NpzWriter(tmp_path / "c.npz", "w") as archive, pytest.raises(ValueError, match="after rows of uint8"):
        archive.write_array("arr_0", [array[:7], array[7:, :2]], 50)


class Marker:
    """Written as a shard, it creates a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_shard_that_holds_other_things_is_removed_and_runs_no_code(tmp_path, capsys):
    shards = Shards(tmp_path / "a.npz", 50, (2, 2, 1))
    shards.folder.mkdir()
    contents = {
        "0000000-0000010": np.zeros((10, 2, 2, 1), np.uint8),
        "0000010-0000020": np.zeros((10, 2, 2, 1), np.int8),
        "0000020-0000030": np.zeros((9, 2, 2, 1), np.uint8),
    }
    for name, images in contents.items():
        np.save(shards.folder / f"{name}.calls-3-6.npy", images)
    objects = np.array([Marker(tmp_path / "ran")], dtype=object)
    np.save(shards.folder / "0000030-0000040.calls-3-6.npy", objects, allow_pickle=True)
    (shards.folder / "0000040-0000050.calls-3-6.npy").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    assert list(shards.intact()) == [(0, 10)]
    assert len(list(shards.folder.iterdir())) == 1 and not (tmp_path / "ran").exists()
    assert capsys.readouterr().out.count("is damaged, and is drawn again") == 4


def test_a_folder_of_other_files_is_not_drawn_into(tmp_path):
    shards = Shards(tmp_path / "a.npz", 4, (2, 2, 1))
    shards.folder.mkdir()
    (shards.folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        shards.prepare({"seed": 0}, save_png=False)
    (shards.folder / "thesis.txt").unlink()
    shards.pngs.mkdir()
    (shards.pngs / "mine.png").touch()
    with pytest.raises(ValueError, match="a.pngs is not empty"):
        shards.prepare({"seed": 0}, save_png=True)


def test_work_in_the_background_is_in_order_and_bounded_and_its_errors_are_raised():
    done, waiting = [], []

    def work(i):
        time.sleep(0.01)
        done.append(i)

    with background(torch.device("cpu")) as submit:
        for i in range(6):
            submit(work, i)
            waiting.append(i + 1 - len(done))
    assert done == [0, 1, 2, 3, 4, 5] and max(waiting) <= 3  # two wait, and one may be at work

    def fail():
        raise ValueError("the disk is full")

    for later in (0, 1, 5):  # an error of the last function, or of an earlier one
        with pytest.raises(ValueError, match="the disk is full"), background(torch.device("cpu")) as submit:
            for function in (fail, *[list] * later):
                submit(function)


def test_an_npz_is_whole_only_with_all_the_bytes_of_its_arrays(tmp_path):
    shapes = {"arr_0": (4, 2, 2, 1), "arr_1": (4,)}
    np.savez(tmp_path / "whole.npz", **{name: np.zeros(shape, np.uint8) for name, shape in shapes.items()})
    check_npz(tmp_path / "whole.npz", shapes)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "short.npz", "w") as short:
        for name in ("arr_0.npy", "arr_1.npy"):
            short.writestr(name, whole.read(name)[:-1])
    for name, wanted in (("short", shapes), ("whole", shapes | {"arr_2": (1,)}), ("whole", shapes | {"arr_1": (5,)})):
        with pytest.raises(ValueError, match=f"{name}.npz is damaged"):
            check_npz(tmp_path / f"{name}.npz", wanted)
