"""Seam: a number in the log, at a point or averaged over a window and all ranks, is one call in the loop."""

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from processes import run

SCRIPT = """
import train
from training import log

plain = log.Metrics.mean


def mean(self, name, values):
    plain(self, name, values)
    if name == "loss":  # what follows stands for two lines in the loop
        plain(self, "squared", values**2)
        self.point("constant", 7)


log.Metrics.mean = mean
if __name__ == "__main__":
    train.main()
"""
SQUARED = {}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_windowed_metric_is_averaged_over_steps_and_ranks_and_resumes(ranks, tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    flags = [*TINY, "--max-steps", 8, "--log-every", 4, "--ckpt-every", 2, "--parallel", "ddp"]
    # The second run resumes at step 6, in the middle of the window of steps 5 to 8.
    for folder, more in (("whole", []), ("parts", ["--resume", tmp_path / "whole" / "checkpoint-6"])):
        result = run(tmp_path / "toy.py", *flags, *more, "--output-dir", tmp_path / folder, processes=ranks)
        assert result.returncode == 0, result.stderr
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert [line["step"] for line in whole] == [4, 8] and [line["step"] for line in parts] == [8]
    assert whole[1]["constant"] == parts[0]["constant"] == 7
    for key in ("loss", "squared"):
        assert parts[0][key] == pytest.approx(whole[1][key], rel=1e-12)
    assert all(line["squared"] > line["loss"] ** 2 for line in whole)
    SQUARED[ranks] = [line["squared"] for line in whole]
    np.testing.assert_allclose(SQUARED[ranks], SQUARED[1], rtol=1e-5)


def test_means_leave_out_bad_steps_and_points_are_as_they_are():
    from training.log import Metrics

    metrics = Metrics(torch.device("cpu"))
    for values, bad in (([1.0, 2.0], False), ([float("nan")], True), ([6.0], False)):
        metrics.mean("a", torch.tensor(values))
        metrics.commit(torch.tensor(bad))
    metrics.point("b", 5)
    again = Metrics(torch.device("cpu"), metrics.state())
    assert metrics.take() == {"a": 3.0, "b": 5} and again.take() == {"a": 3.0}
    metrics.mean("a", 4)
    assert metrics.take() == {"a": 4.0}


def test_a_checkpoint_holds_means_that_came_after_the_step():
    from training.log import Metrics

    metrics = Metrics(torch.device("cpu"))
    metrics.mean("a", 1.0)
    metrics.commit(torch.tensor(False))
    metrics.mean("a", 3.0)
    metrics.point("b", torch.tensor(2.0))
    assert Metrics(torch.device("cpu"), metrics.state()).take() == {"a": 2.0}
    assert metrics.take() == {"a": 2.0, "b": 2.0}
