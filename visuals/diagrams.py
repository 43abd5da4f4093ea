"""Draw the README's diagrams from runs on the digits, one for each path; start it in the repository's folder.

    for P in Linear GVP VP; do python train.py --config configs/digits.yaml --path-type $P --output-dir results/$P; done
    python -m visuals.diagrams results/Linear results/GVP results/VP

visuals/paths.png shows alpha and sigma of each path, and the loss of its velocity model over t. The targets differ, so
losses of two paths do not compare. visuals/trajectories.png shows digits along an ODE and an SDE of the first run."""

import json
import pathlib

import numpy as np
import torch
from matplotlib import pyplot

from sampling.draw import SampleSettings, generate
from sampling.pipeline import load_pipeline
from sampling.trajectory import Record, draw_strips
from transport import PATHS
from utils.command_line import Parser, user_errors

FOLDER = pathlib.Path(__file__).parent
CLASSES, CFG_SCALE = (2, 3, 5), 1.5
# Settings, and the indices of the evaluations that are shown, at t = 0, 0.12 ... 0.96.
SOLVERS = {
    "ODE": (dict(sampling_method="heun2", num_steps=101), range(0, 193, 24)),
    "SDE": (dict(sampling_method="Euler", diffusion_form="sigma", num_steps=97), range(0, 97, 12)),
}


def loss_over_time(run):
    """Return the mean loss in each bin of t, over the second half of a run."""
    lines = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    return np.mean([line["loss_by_time"] for line in lines[len(lines) // 2 :]], axis=0)


def draw_paths(paths, losses):
    """Draw visuals/paths.png from lists of paths and of their losses in each bin of t."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained", facecolor="white")
    t, names = torch.linspace(0, 1, 201, dtype=torch.float64), {kind: name for name, kind in PATHS.items()}
    for i, (path, loss) in enumerate(zip(paths, losses, strict=True)):
        left.plot(t, path.alpha(t), f"C{i}-", t, path.sigma(t), f"C{i}--")
        middles = (np.arange(len(loss)) + 0.5) / len(loss)
        right.plot(middles, loss, f"C{i}o-", markersize=4, label=names[type(path)])
    left.plot([], [], "-", color="grey", label="α(t), of the data $x_1$")
    left.plot([], [], "--", color="grey", label="σ(t), of the noise $x_0$")
    left.set(title="$x_t = α(t)\\, x_1 + σ(t)\\, x_0$", ylim=(-0.02, 1.2))
    left.legend(ncols=2, loc="upper center", frameon=False)
    right.set(title="velocity loss on the digits", yscale="log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set(xlabel="t (0: noise, 1: data)", xlim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "paths.png", dpi=110)


def draw_trajectories(pipeline):
    """Draw visuals/trajectories.png: an ODE and an SDE side by side, two rows for each class."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 3.7), layout="constrained", facecolor="white", sharey=True)
    for ax, (mode, (solver, shown)) in zip(axes, SOLVERS.items(), strict=True):
        record, labels = Record(pipeline.transport, most=max(CLASSES) + 1), range(max(CLASSES) + 1)
        images, _ = generate(pipeline, labels, SampleSettings(mode, solver, CFG_SCALE), record=record)
        times, pictures = record.strips(pipeline, images, shown)
        draw_strips(ax, [f"{t:.2g}" for t in (*times, 1)], pictures[:, :, list(CLASSES)])
        ax.set_title(mode)
    figure.savefig(FOLDER / "trajectories.png", dpi=110)


def main():
    parser = Parser("Draw visuals/paths.png and visuals/trajectories.png.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run on the digits that predicts velocities")
    runs = parser.parse_args().runs
    with user_errors(parser):
        pipelines = [load_pipeline(run, torch.device("cpu")) for run in runs]
    draw_paths([pipeline.transport.path for pipeline in pipelines], [loss_over_time(run) for run in runs])
    draw_trajectories(pipelines[0])


if __name__ == "__main__":
    main()
