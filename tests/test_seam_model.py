"""Seam: a model option is a keyword argument of SiT and its flag; here one that removes `pos_embed`."""

import json

import pytest
import torch
from conftest import TINY
from processes import run

SCRIPT = """
import functools
import inspect
import sys
import torch
import models


class ToySiT(models.SiT):
    def __init__(self, learned_positions=False, **sizes):
        super().__init__(**sizes)
        if learned_positions:
            self.positions = torch.nn.Parameter(self.pos_embed.data)
            del self.pos_embed

    def __getattr__(self, name):
        learned = name == "pos_embed" and "positions" in self._parameters
        return super().__getattr__("positions" if learned else name)


option = inspect.Parameter("learned_positions", inspect.Parameter.KEYWORD_ONLY, default=False)
ToySiT.__signature__ = inspect.Signature([*inspect.signature(models.SiT).parameters.values(), option])
models.SiT = ToySiT
models.SiT_models = {
    name: functools.partial(ToySiT, **size.keywords) for name, size in models.SiT_models.items()
}
import sample, train

plain = train.add_model_flags


def add_model_flags(parser):
    plain(parser)
    parser.add_argument("--learned-positions", action="store_true")


train.add_model_flags = add_model_flags
{"train": train, "sample": sample}[sys.argv.pop(1)].main()
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)

    def of(*arguments, code=0, **more):
        result = run(tmp_path / "toy.py", *arguments, **more)
        assert result.returncode == code, result.stderr + result.stdout
        return result

    return of


@pytest.mark.parametrize("parallel", [[], ["--parallel", "fsdp"]])
def test_an_option_is_stored_resumed_and_sampled(parallel, toy, tmp_path):
    flags = ["train", *TINY, "--ckpt-every", 2, *parallel, "--output-dir", tmp_path / "run"]
    ranks = 2 if parallel else 1
    toy(*flags, "--learned-positions", "--max-steps", 2, processes=ranks)
    assert "continuing from" in toy(*flags, "--learned-positions", "--max-steps", 4, processes=ranks).stdout
    folder = tmp_path / "run" / "checkpoint-4"
    assert json.loads((folder / "trainer_state.json").read_text())["model"]["learned_positions"]
    weights = torch.load(folder / "ema.pt", weights_only=True)
    assert "positions" in weights and "pos_embed" not in weights
    toy("sample", "--ckpt", tmp_path / "run", "--num-sampling-steps", 2, "--output", tmp_path / "grid.png")
    error = toy(*flags, "--max-steps", 6, code=2, processes=ranks).stderr
    assert "--learned-positions: False was given, but" in error


def test_a_checkpoint_of_before_the_option_resumes_as_what_it_was(digits_run, toy, tmp_path):
    flags = ["train", *TINY, "--resume", digits_run / "checkpoint-3", "--max-steps", 6, "--sample-every", 6]
    toy(*flags, "--output-dir", tmp_path / "run")
    for name in ("model.safetensors", "ema.pt"):
        ours, theirs = (folder / "checkpoint-6" / name for folder in (tmp_path / "run", digits_run))
        assert ours.read_bytes() == theirs.read_bytes()
    toy("sample", "--ckpt", digits_run, "--num-sampling-steps", 2, "--output", tmp_path / "grid.png")
