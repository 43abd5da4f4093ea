"""demo.py: the judgement of digits, and what it prints."""

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run

import demo
from data.sources import open_source


# A mean of mnist5k's images is blurred: the classifier takes one of the ten for another digit.
@pytest.mark.parametrize("data, side, recognised, of_means", [("digits", 8, 0.97, 0.9), ("mnist5k", 16, 0.93, 0.85)])
def test_judge_tells_real_digits_from_noise_and_collapse(data, side, recognised, of_means):
    real, held_out = demo.split_real(open_source(data))
    rows, labels = held_out
    images = torch.from_numpy((rows * 255).astype(np.uint8)).reshape(-1, side, side, 1)

    def judge(images):
        return demo.judge(images, labels, real, held_out)

    results = judge(images)
    assert results["recognised"] == results["recognised_real"] > recognised
    assert results["fd_pixels"] == pytest.approx(results["fd_pixels_real"], rel=0.05)
    noise = judge(torch.randint(0, 256, images.shape, dtype=torch.uint8))
    assert noise["recognised"] < 0.3 and noise["fd_pixels"] > results["fd_pixels_collapsed"]
    # One real digit per class, 50 times each: all are recognised, and the distance is large.
    collapsed = judge(images[np.arange(500) // 50 * 50])
    assert collapsed["recognised"] > of_means
    assert collapsed["fd_pixels"] > 10 * results["fd_pixels_real"]


def test_large_images_are_judged_by_means_of_blocks():
    image = np.arange(32 * 32, dtype=np.uint8).reshape(1, 32, 32, 1)
    expected = [[image[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() / 255 for j in range(16)] for i in range(16)]
    np.testing.assert_allclose(demo.features(image), np.reshape(expected, (1, 256)))
    np.testing.assert_array_equal(demo.features(image[:, :8, :8]), image[:, :8, :8].reshape(1, 64) / 255)


def test_demo_prints_its_metrics_and_the_path_of_the_picture(digits_run, tmp_path):
    result = run("demo.py", "--ckpt", digits_run, "--samples-per-class", 10, "--output", tmp_path / "digits.png")
    assert result.returncode == 0, result.stderr
    assert "recognised: " in result.stdout and "of 100 samples" in result.stdout and "real to real" in result.stdout
    assert f"picture: {tmp_path / 'digits.png'}" in result.stdout
    assert Image.open(tmp_path / "digits.png").size == (10 * 66 + 2, 10 * 66 + 2)
