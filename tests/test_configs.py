"""The recipes in configs/: each one's dry run needs no network and shows parameters, batch arithmetic and memory."""

import re

import pytest
import yaml
from processes import ROOT, run

PAPER = dict(
    lr=1e-4, weight_decay=0, global_batch_size=256, ema_decay=0.9999, path_type="Linear", prediction="velocity"
)
DRY_RUNS = {
    "digits": ("1,274,372", "1,200 steps of 128 images = micro-batch 128 x 1 ranks x 1 gradient accumulation steps"),
    "mnist": ("1,283,600", "7,200 steps of 64 images = micro-batch 64 x 1 ranks x 1 gradient accumulation steps"),
    "sit_s_2": (
        "32,963,360",
        "400,000 steps of 256 images = micro-batch 256 x 1 ranks x 1 gradient accumulation steps",
    ),
    "sit_b_2": (
        "130,512,416",
        "400,000 steps of 256 images = micro-batch 256 x 1 ranks x 1 gradient accumulation steps",
    ),
    "sit_l_2": (
        "458,102,816",
        "400,000 steps of 256 images = micro-batch 32 x 1 ranks x 8 gradient accumulation steps",
    ),
    "sit_xl_2": (
        "675,129,632",
        "7,000,000 steps of 256 images = micro-batch 32 x 1 ranks x 8 gradient accumulation steps",
    ),
}


def test_every_recipe_has_a_test():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == set(DRY_RUNS)


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_shows_what_a_recipe_takes(name, tmp_path):
    config = ROOT / "configs" / f"{name}.yaml"
    result = run("train.py", "--config", config, "--dry-run", cwd=tmp_path)  # with HF_HUB_OFFLINE=1
    assert result.returncode == 0, result.stderr
    parameters, arithmetic = DRY_RUNS[name]
    assert f"\n{parameters} parameters; " in result.stdout and f"\n{arithmetic}; one process, " in result.stdout
    memory = re.search(r"estimated peak memory of a rank: ([\d.]+) GiB = weights", result.stdout)
    assert memory and float(memory[1]) > 0
    assert not list(tmp_path.iterdir())
    if name not in ("digits", "mnist"):
        flags = yaml.safe_load(result.stdout.partition(f"\n{parameters} parameters; ")[0])
        assert flags | PAPER == flags and flags["data_path"] == "ILSVRC/imagenet-1k" and not flags["ema_warmup"]
        assert '"vae": "ema", "image_size": 256' in result.stdout and '"num_classes": 1000' in result.stdout


@pytest.mark.parametrize("name", DRY_RUNS)
def test_the_head_of_a_recipe_says_how_to_run_it_what_it_costs_and_what_to_expect(name):
    head = (ROOT / "configs" / f"{name}.yaml").read_text().partition("\ndata-path: ")[0]
    assert f"train.py --config configs/{name}.yaml" in head and "Expect" in head
    assert all(line.startswith("#") for line in head.splitlines())
    if name not in ("digits", "mnist"):
        assert "not measured" in head and "SiT paper, tables 1 and 8" in head
