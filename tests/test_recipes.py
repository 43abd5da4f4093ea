"""All techniques of training together: killed runs resume exactly on any ranks, and sampling needs --ckpt alone."""

import json
import pathlib
import random

import numpy as np
import pytest
from conftest import TINY, read_metrics
from processes import Script
from test_alignment import make_encoder
from test_resume import WAYS, contents, finish, kill, train

STEPS = 6
MICRO = {"ddp": ["--micro-batch-size", 4]}
LOSSES = ("loss", "loss_direction", "loss_alignment", "loss_inner_head")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    make_encoder(encoder := tmp_path_factory.mktemp("encoder"))
    recipe = "--block modern --direction-loss --route 1 3 0.5 --inner-head 2 --ema-snapshots float16 --optimizer muon"
    aligned = ["--align", encoder, "--align-width", 24]
    return [*TINY, "--depth", 4, *recipe.split(), *aligned, "--max-steps", STEPS, "--ckpt-every", 2]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """A function of the way to run that returns the folder of an uninterrupted run, made at its first call."""
    folders = {}

    def of(way):
        if way not in folders:
            folders[way] = tmp_path_factory.mktemp("runs")
            finish(train(folders[way], way, *MICRO.get(way, ()), flags=flags))
        return folders[way]

    return of


def results(folder):
    """Losses, the last checkpoint and the snapshots of EMAs."""
    curve = [[line[name] for name in LOSSES] for line in read_metrics(folder)]
    snapshots = {path.name: path.read_bytes() for path in folder.glob("ema-snapshots/*.safetensors")}
    return curve, contents(folder / f"checkpoint-{STEPS}"), snapshots


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_resumes_to_the_same_bytes_on_any_ranks(way, flags, uninterrupted, tmp_path):
    after = random.randrange(1, STEPS)
    flags = [*flags, *MICRO.get(way, ())]
    kill(train(tmp_path, way, flags=flags), tmp_path, after)
    finish(train(tmp_path, way, flags=flags))
    expected = results(uninterrupted(way))
    assert results(tmp_path) == expected and len(expected[2]) == 6, f"killed after step {after}"
    np.testing.assert_allclose(expected[0], results(uninterrupted("one process"))[0], atol=1e-4)


def test_samples_and_other_runs_need_the_checkpoint_alone(flags, uninterrupted, tmp_path):
    ckpt, few = ["--ckpt", uninterrupted("one process")], ["--num-sampling-steps", 3]
    guided = ["--ema", 0.13, "--sampling-method", "heun2", "--cfg-scale", 1.5, "--internal-guidance", 1.4]
    grids = tmp_path / "plain.png", tmp_path / "guided.png"
    for output, more in zip(grids, ([], guided), strict=True):
        finish(Script("sample.py", "ODE", *ckpt, *few, *more, "--output", output))
    assert grids[0].read_bytes() != grids[1].read_bytes()
    images = tmp_path / "images.npz"
    draw = ["sample_ddp.py", "ODE", *ckpt, *few, "--num-fid-samples", 12, "--output", images]
    finish(Script(*draw, *guided))
    assert np.load(images)["arr_0"].shape == (12, 8, 8, 1)
    assert json.loads(pathlib.Path(f"{images}.json").read_text())["ema"] == "0.13"
    assert "made with internal_guidance" in finish(Script(*draw, *guided[:-2]), code=2).stderr
    result = finish(Script("train.py", *flags, "--init-from", ckpt[1], "--output-dir", tmp_path / "next"))
    assert "recipe --route" in result.stdout and f"weights from {ckpt[1]}/checkpoint-{STEPS}/ema.pt" in result.stdout
    assert "initialised" not in result.stdout and len(read_metrics(tmp_path / "next")) == STEPS
