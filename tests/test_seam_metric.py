"""Seam: a number in the log, at a point or averaged over a window and all ranks, is one call in the loop."""

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from processes import run

SCRIPT = """
import train
from training import log, step

whole = log.Metrics.commit


def commit(self, bad):  # stands for a line in the loop
    if "loss" in self.pending:
        self.mean("squared", self.pending["loss"][0] ** 2)
        self.point("constant", 7)
    whole(self, bad)


log.Metrics.commit = commit
if __name__ == "__main__":
    train.main()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_windowed_metric_is_averaged_over_steps_and_ranks_and_resumes(ranks, tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)
    flags = [*TINY, "--log-every", 4, "--ckpt-every", 2, "--parallel", "ddp"]
    for folder, steps in (("whole", 8), ("parts", 6), ("parts", 8)):
        arguments = [*flags, "--max-steps", steps, "--output-dir", tmp_path / folder]
        result = run(tmp_path / "toy.py", *arguments, processes=ranks)
        assert result.returncode == 0, result.stderr
    whole, parts = (
        {line["step"]: (line["squared"], line["constant"], line["loss"]) for line in read_metrics(tmp_path / folder)}
        for folder in ("whole", "parts")
    )
    np.testing.assert_allclose(whole[4], parts[4], rtol=1e-6)
    assert whole[8][1] == 7 and whole[8][0] > 0
    # The window of steps 5 to 8 was cut by the checkpoint of step 6, on which a run of 6 steps ends with a line.
    assert set(parts) == {4, 6, 8}


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
