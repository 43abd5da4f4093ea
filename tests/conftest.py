"""What several test files need: golden values, networks with exact answers, a small autoencoder, a finished run."""

import json
import pathlib

import numpy as np
import pytest
import torch
from processes import run

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load_golden(name):
    """A file of golden values as {key: tensor, or str for text}."""
    with np.load(GOLDEN / name) as file:
        return {key: str(file[key]) if file[key].dtype.kind == "U" else torch.from_numpy(file[key]) for key in file}


class GaussianNetwork:
    """The exact network for data N(mean, std^2 I): what training would converge to, in closed form.

    x_t is N(alpha mean, (alpha std)^2 + sigma^2), jointly Gaussian with x0 and x1, so every conditional mean is linear.
    """

    def __init__(self, transport, mean=0.5, std=0.7):
        self.transport, self.mean, self.std = transport, mean, std
        self.calls, self.times = 0, []

    def __call__(self, x, t):
        self.calls += 1
        self.times.append(t)
        assert t.shape == (len(x),) and t.dtype == x.dtype
        path = self.transport.path
        shape = (-1, *[1] * (x.dim() - 1))
        # In double precision: the network is the exact one, and its rounding is not what the tests are about.
        t = t.double().reshape(shape)
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = (alpha * self.std) ** 2 + sigma**2
        score = -(x.double() - alpha * self.mean) / variance
        noise = -sigma * score
        if self.transport.prediction == "score":
            output = score
        elif self.transport.prediction == "noise":
            output = noise
        else:
            data = self.mean + alpha * self.std**2 * (x.double() - alpha * self.mean) / variance
            output = path.d_alpha(t) * data + path.d_sigma(t) * noise
        return output.to(x.dtype)


def read_metrics(folder):
    """The lines of metrics.jsonl in a run's folder."""
    return [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]


TINY = (
    "--data-path digits --vae none --model SiT-S/2 --hidden-size 32 --depth 2 --num-heads 4 --num-workers 0 "
    "--global-batch-size 16 --lr 1e-3 --ema-decay 0.9 --log-every 1 --sample-every 0"
).split()


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a short run of a tiny model on the digits, with checkpoints at steps 3 and 6 and one grid."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    arguments = [*TINY, "--max-steps", 6, "--ckpt-every", 3, "--sample-every", 6, "--output-dir", folder]
    result = run("train.py", *arguments)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def small_vae(tmp_path_factory):
    """A function that makes a small `diffusers.AutoencoderKL` from changes to its config, and gives its folder."""

    def make(levels=2, **config):
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(8,) * levels,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            **config,
        )
        folder = tmp_path_factory.mktemp("vae")
        model.save_pretrained(folder)
        return folder

    return make
