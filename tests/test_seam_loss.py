"""Seam: a loss beside the main one, with a parameter, that reads a hidden state and the images, in a file outside."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from processes import run
from test_data import write_images
from test_resume import WAYS, contents

SCRIPT = '''
from torch import nn
import train
from training.losses import AuxiliaryLoss


class Brightness(AuxiliaryLoss):
    """Predict the brightness of the image from the tokens after block 1."""

    name, weight, hidden_blocks, reads_images = "brightness", 0.5, (1,), True

    def __init__(self, model):
        super().__init__()
        self.head = nn.Linear(model.blocks[0].attn.qkv.in_features, 1)

    def forward(self, batch, t, xt, output, hidden):
        predicted = self.head(hidden[1].mean(1))[:, 0]
        return (predicted - batch["images"].flatten(1).mean(1)) ** 2


if __name__ == "__main__":
    train.main(loss_builders=[Brightness])
'''
CURVES = {}


@pytest.mark.parametrize("way", WAYS)
def test_an_auxiliary_loss_trains_is_saved_and_resumes_exactly(way, tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    ranks = 1 if way == "one process" else 2
    flags = [*TINY, "--ckpt-every", 5, *WAYS[way]]
    for folder, steps in (("whole", 10), ("parts", 5), ("parts", 10)):
        arguments = [*flags, "--max-steps", steps, "--output-dir", tmp_path / folder]
        result = run(tmp_path / "toy.py", *arguments, processes=ranks)
        assert result.returncode == 0, result.stderr
    assert "continuing from" in result.stdout
    whole, parts = (contents(tmp_path / folder / "checkpoint-10") for folder in ("whole", "parts"))
    assert whole == parts and "losses.brightness.weights.head.weight" in whole[1]
    assert any(key.startswith("losses.brightness.state.head.weight.exp_avg") for key in whole[1])
    assert not any("head" in key for key in torch.load(tmp_path / "whole/checkpoint-10/ema.pt", weights_only=True))
    lines = read_metrics(tmp_path / "whole")
    curve = [[line["loss"], line["loss_brightness"]] for line in lines]
    assert curve[-1][1] < 0.7 * curve[0][1]  # brightness is easy to learn
    CURVES[way] = curve
    np.testing.assert_allclose(curve, CURVES["one process"], atol=1e-4)
    result = run(
        "sample.py", "--ckpt", tmp_path / "whole", "--output", tmp_path / "grid.png", "--num-sampling-steps", 2
    )
    assert result.returncode == 0, result.stderr


def test_a_loss_reads_images_beside_cached_latents(small_vae, tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    images = write_images(tmp_path / "images", {"cat": [(16, 16)] * 8, "dog": [(16, 16)] * 8})
    vae = ["--vae", small_vae()]
    flags = [*TINY, *vae, "--global-batch-size", 8, "--max-steps", 2]
    for folder, more in (("with", ["--keep-images"]), ("without", [])):
        extract = ["--data-path", images, *vae, "--image-size", 16, "--output", tmp_path / folder]
        assert run("extract_latents.py", *extract, "--num-workers", 0, *more).returncode == 0
    losses = {}
    for name, data in (("images", [images, "--image-size", 16]), ("cached", [tmp_path / "with"])):
        arguments = [*flags, "--no-horizontal-flip", "--output-dir", tmp_path / name, "--data-path", *data]
        result = run(tmp_path / "toy.py", *arguments)
        assert result.returncode == 0, result.stderr
        losses[name] = [line["loss_brightness"] for line in read_metrics(tmp_path / name)]
    np.testing.assert_allclose(losses["cached"], losses["images"], rtol=1e-4)
    result = run(tmp_path / "toy.py", *flags, "--data-path", tmp_path / "without", "--output-dir", tmp_path / "no")
    assert result.returncode == 2 and "--keep-images" in result.stderr and result.stderr.count("\n") == 1
    assert json.loads((tmp_path / "with" / "manifest.json").read_text())["keep_images"]
