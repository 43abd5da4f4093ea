"""Seam: a second EMA is one entry in a list: it is updated, saved, resumed, and sampled by name."""

import pytest
import torch
from conftest import TINY
from processes import run
from test_resume import WAYS

SCRIPT = """
import train
from training.step import EMA


class Recent(EMA):
    def decay_at(self, step):
        return 0.5 if step % 2 else 0.8


if __name__ == "__main__":
    train.main(extra_emas=[Recent("recent", 0.5)])
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_second_ema_is_saved_resumed_and_sampled(way, tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    ranks = 1 if way == "one process" else 2
    flags = [*TINY, "--no-ema-warmup", "--ckpt-every", 1, *WAYS[way]]
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        arguments = [*flags, "--max-steps", steps, "--output-dir", tmp_path / folder]
        result = run(tmp_path / "toy.py", *arguments, processes=ranks)
        assert result.returncode == 0, result.stderr
    for name in ("ema.pt", "recent.pt"):
        whole, parts = ((tmp_path / folder / "checkpoint-4" / name).read_bytes() for folder in ("whole", "parts"))
        assert whole == parts
    # The recursion, from the weights that each step's checkpoint holds.
    from utils.tensor_files import read_pt, read_safetensors

    folders = [tmp_path / "whole" / f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    expected = read_pt(folders[0] / "recent.pt")
    for step, folder in enumerate(folders[1:], 1):
        decay, weights = 0.5 if step % 2 else 0.8, read_safetensors(folder / "model.safetensors")
        expected = {key: decay * value + (1 - decay) * weights[key] for key, value in expected.items()}
    torch.testing.assert_close(read_pt(folders[-1] / "recent.pt"), expected)
    words = ["sample.py", "--ckpt", tmp_path / "whole", "--num-sampling-steps", 2, "--sampling-method", "euler"]
    for name in ("ema", "recent"):
        result = run(*words, "--ema", name, "--output", tmp_path / f"{name}.png")
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "ema.png").read_bytes() != (tmp_path / "recent.png").read_bytes()
    result = run(*words, "--ema", "other")
    assert result.returncode == 2 and "has no such EMA; it has ema, recent" in result.stderr
    result = run(*words[:2], tmp_path / "whole" / "checkpoint-4" / "ema.pt", "--ema", "recent")
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_a_checkpoint_without_the_ema_resumes_and_says_so(digits_run, tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    arguments = [*TINY, "--resume", digits_run / "checkpoint-3", "--max-steps", 4, "--output-dir", tmp_path / "run"]
    result = run(tmp_path / "toy.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "the checkpoint has no EMA 'recent': it starts from the trained weights" in result.stdout


@pytest.mark.parametrize("name", ["model", "ema", "a/b", ""])
def test_names_of_emas_that_checkpoints_cannot_hold_are_refused(name, tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT.replace('"recent"', repr(name)))
    result = run(tmp_path / "toy.py", *TINY, "--output-dir", tmp_path / "run")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
