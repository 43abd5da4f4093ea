"""Quality over network evaluations of every solver, guided: python benchmarks/solver_curves.py --ckpt RUN --json FILE

RUN is one on the digits. All solvers draw the same labels from the same noise, and two numbers are measured:
- `fd_pixels`, the Fréchet distance of the samples' pixels to those of all digits;
- for ODEs, the root mean square distance of the end states to the reference, heun2 with 250 evaluations. It is free of
  the noise of a few samples, which `fd_pixels` has.

A solver of several evaluations a step makes the number of steps that comes nearest. Adaptive methods run over
--tolerances. torchdiffeq's Adams methods, whose evaluations depend on the data, make a quarter of the steps. Left out,
unless --solvers names them: scipy_solver, and fixed_adams, which is implicit_adams by another name.

--json keeps each result as it is measured: stopped and typed again, also with more solvers, numbers, grids or seeds,
the same command goes on. It prints and draws all results in the file of the first of --seeds, and the best of all.
--speed measures, in place of all that, images/s of a setting against the default SDE with 250 evaluations.
"""

import itertools
import pathlib
import statistics
import time
from typing import NamedTuple

import measuring
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from data.sources import open_source
from evaluation.metrics import frechet_distance, moments, pixels
from sampling import flags
from sampling.draw import NotFinite, SampleSettings, decode, draw, resolve_settings
from sampling.pipeline import load_pipeline
from transport import ADAPTIVE_ODE_METHODS, LAST_STEPS, ODE_METHODS, SDE_METHODS
from utils import command_line, distributed, files
from utils.precision import DTYPES, resolve_precision

NFES = (5, 6, 8, 10, 16, 25, 50, 100, 250)
FEW, MANY = 10, 250  # evaluations
MARGIN = 0.05  # within which a metric is as good as the reference's
REFERENCE = ("ODE heun2", "uniform", f"{MANY} NFE")
LEFT_OUT = ("scipy_solver", "fixed_adams")


class Setting(NamedTuple):
    """What is measured of one solver: names for the output, and arguments of `SampleSettings`."""

    label: str  # of the solver
    grid: str
    budget: str  # evaluations; where they depend on the data, time points or a tolerance
    mode: str
    solver: dict

    def key(self, seed):
        return f"{self.label}, {self.grid}, {self.budget}, seed {seed}"


def solvers_of(names, last_steps):
    """Yield (label, mode, solver) of ODE and SDE methods of these names, SDEs with each of the last steps."""
    for name in (name for name in ODE_METHODS if name in names):
        yield f"ODE {name}", "ODE", flags.ODE_DEFAULTS | {"sampling_method": name}
    for name in (name for name in SDE_METHODS if name in names):
        for step in last_steps:
            more = "" if step == "Mean" else f", last step {step or 'none'}"
            yield f"SDE {name}{more}", "SDE", flags.SDE_DEFAULTS | {"sampling_method": name, "last_step": step}


def settings_of(solvers, nfes, tolerances, grids, transport):
    """Yield the `Setting`s of (label, mode, solver)s. `grids` are those of `read_grids`."""
    for label, mode, solver in solvers:
        method = solver["sampling_method"]
        if method in ADAPTIVE_ODE_METHODS:
            for rtol in tolerances:
                accuracy = dict(rtol=rtol, atol=rtol / 1000, num_steps=2)
                yield Setting(label, "uniform", f"rtol {rtol:g}", mode, solver | accuracy)
            continue
        for name, grid, made_for in grids:
            fixed = isinstance(grid, list)
            if made_for not in (None, method):
                continue
            solver |= {} if name == "uniform" else {"time_grid": grid}
            steps = [len(grid)] if fixed else [nearest_steps(mode, solver, nfe, transport) for nfe in nfes]
            for num_steps in dict.fromkeys(steps):
                settings = solver | {"num_steps": num_steps}
                nfe = SampleSettings(mode, settings).sampler(transport).nfe
                yield Setting(label, name, f"{num_steps} times" if nfe is None else f"{nfe} NFE", mode, settings)


def read_grids(words):
    """Return (name, what `Sampler` takes, solver) of each word of --time-grid. Raise ValueError.

    A file of tune_grid.py is 'tuned', and for its solver alone; other grids are for all, which is None."""
    grids = []
    for word in words:
        grid, made = flags.read_time_grid([word])
        method = made.get("sampling_method")
        grids.append(("tuned" if method else pathlib.Path(word).stem, grid, method))
    return grids


def reference_of(transport):
    """Return the `Setting` of the reference."""
    (reference,) = settings_of(solvers_of(["heun2"], []), [MANY], [], read_grids(["uniform"]), transport)
    return reference


def nearest_steps(mode, solver, nfe, transport):
    """Return the number of time points for which a solver of fixed steps comes nearest to `nfe` evaluations."""

    def distance(num_steps):
        made = SampleSettings(mode, solver | {"num_steps": num_steps}).sampler(transport).nfe
        return abs((4 * (num_steps - 1) if made is None else made) - nfe)

    return min(range(2, nfe + 3), key=distance)


class Measurement:
    """Draws samples of settings and measures them. The end states of the reference are kept beside --json, per seed."""

    def __init__(self, pipeline, num_samples, batch_size, cfg_scale, json):
        self.pipeline, self.batch_size, self.cfg_scale, self.json = pipeline, batch_size, cfg_scale, json
        self.labels = [i % pipeline.model.num_classes for i in range(num_samples)]
        images = np.stack([np.asarray(image) for image, _ in open_source("digits").examples])
        self.of_real = moments(pixels(images))

    def draw(self, setting, seed, labels=None):
        """Return (latents (N, C, h, w), NFE) of a setting."""
        settings = resolve_settings(self.pipeline, setting.mode, setting.solver, self.cfg_scale, None, seed)
        labels = self.labels if labels is None else labels
        drawn, counts = draw(self.pipeline, labels, settings, batch_size=self.batch_size, show_progress=False)
        return drawn, counts["nfe"]

    def reference(self, seed):
        """Return the file of the reference's end states."""
        return self.json.with_suffix(f".seed{seed}.npy")

    def row(self, setting, seed):
        """Return the results of a setting as plain data; `fd_pixels` is None if samples are not finite.

        The reference must be the first."""
        start, path = time.perf_counter(), self.reference(seed)
        drawn, nfe = self.draw(setting, seed)
        if setting[:3] == REFERENCE:
            with files.written_whole(path) as partial, open(partial, "wb") as file:
                np.save(file, drawn.cpu().numpy())
        try:
            fd_pixels = frechet_distance(*moments(pixels(decode(self.pipeline, drawn).numpy())), *self.of_real)
        except NotFinite:
            fd_pixels = None
        distance = (drawn.cpu() - torch.from_numpy(np.load(path))).square().mean().sqrt().item()
        return {
            "solver": setting.label,
            "time_grid": setting.grid,
            "budget": setting.budget,
            "seed": seed,
            "nfe": nfe,
            "fd_pixels": fd_pixels,
            "distance": distance if setting.mode == "ODE" else None,
            "seconds": time.perf_counter() - start,
        }


def points(rows):
    """Return {(solver, grid): [results, by NFE]} of rows, each the mean over the seeds of the numbers in them.

    A result has, too, 'ratios', those of `fd_pixels` to the reference of the same seed, and 'deviation', that of
    `fd_pixels` over the seeds, or None."""
    reference = {row["seed"]: row["fd_pixels"] for row in rows if identity(row) == REFERENCE}
    grouped, curves = {}, {}
    for row in (row for row in rows if row["fd_pixels"] is not None):
        grouped.setdefault(identity(row), []).append(row)
    for (solver, grid, _), group in grouped.items():
        values = [row["fd_pixels"] for row in group]
        result = {
            "nfe": round(statistics.mean(row["nfe"] for row in group)),
            "fd_pixels": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "distance": None if group[0]["distance"] is None else statistics.mean(row["distance"] for row in group),
            "ratios": [row["fd_pixels"] / reference[row["seed"]] for row in group],
        }
        curves.setdefault((solver, grid), []).append(result)
    return {curve: sorted(results, key=lambda result: result["nfe"]) for curve, results in curves.items()}


def identity(row):
    return row["solver"], row["time_grid"], row["budget"]


def is_as_good(result):
    """Return whether `fd_pixels` is at most the margin above the reference's, in the mean over the seeds."""
    return statistics.mean(result["ratios"]) <= 1 + MARGIN


def print_curves(curves, key):
    """Print a table of 'fd_pixels' or 'distance', a column for each of NFES: that which is nearest to a result's."""
    lines = []
    for (solver, grid), results in curves.items():
        cells = {}
        for result in (result for result in results if result[key] is not None):
            column = min(NFES, key=lambda nfe: abs(np.log(nfe / result["nfe"])))
            if column not in cells or abs(result["nfe"] - column) < abs(cells[column]["nfe"] - column):
                cells[column] = result
        texts = [
            cells[column] and cell_text(cells[column], key, column) if column in cells else None for column in NFES
        ]
        if cells:
            lines.append([solver, grid, *texts])
    measuring.print_table(["solver", "grid", *map(str, NFES)], lines)


def cell_text(result, key, column):
    """Return a result as text: bold if it is as good as the reference, with its NFE if these are not the column's."""
    text = f"{result[key]:.3f}" if key == "fd_pixels" else f"{result[key]:.1e}"
    if key == "fd_pixels" and is_as_good(result):
        text = f"**{text}**"
    return text if result["nfe"] == column else f"{text} ({result['nfe']})"


def best_lines(curves, most=5):
    """Return lines on the settings of at most FEW evaluations with the lowest `fd_pixels`, the best first."""
    few = [(curve, result) for curve, results in curves.items() for result in results if result["nfe"] <= FEW]
    few.sort(key=lambda pair: statistics.mean(pair[1]["ratios"]))
    lines = []
    for (solver, grid), result in few[:most]:
        ratios, spread = result["ratios"], result["deviation"]
        band = f"{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} seeds" if spread is not None else "one seed"
        deviation = "" if spread is None else f" ± {spread:.4f}"
        name = f"{solver}, {grid}, {result['nfe']} NFE"
        lines.append(f"{name}: {result['fd_pixels']:.4f}{deviation}, {statistics.mean(ratios):.3f} ({band})")
    return lines


def draw_curves(curves, path):
    """Draw both measures over NFE to a PNG. The band is the reference's `fd_pixels`, with the margin on both sides."""
    figure = Figure(figsize=(11, 5), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    band = next(r["fd_pixels"] for r in curves[REFERENCE[:2]] if r["nfe"] == MANY)
    left.axhspan(band * (1 - MARGIN), band * (1 + MARGIN), color="0.85", label=f"heun2, {MANY} NFE, ±{MARGIN:.0%}")
    for i, ((solver, grid), results) in enumerate(curves.items()):
        label = solver if grid == "uniform" else f"{solver}, {grid}"
        # One evaluation a step, from the history of a solve: what the picture is about.
        is_multistep = isinstance((ODE_METHODS | SDE_METHODS)[solver.split()[1].rstrip(",")][0], type)
        width, marker = (1.8, "o") if is_multistep else (0.8, "s")
        style = dict(color=colormaps["tab20"](i % 20), marker=marker, markersize=2 * width + 1, linewidth=width)
        style["linestyle"] = "--" if solver.startswith("SDE") else "-"
        left.plot([r["nfe"] for r in results], [r["fd_pixels"] for r in results], label=label, **style)
        known = [(r["nfe"], r["distance"]) for r in results if r["distance"]]  # the reference's own is 0
        right.plot(*zip(*known, strict=True) if known else ((), ()), **style)
    left.set(title="Fréchet distance of pixels to real digits")
    right.set(title=f"end states: distance to heun2, {MANY} NFE")
    for axes in (left, right):
        axes.set(xlabel="NFE", xscale="log", yscale="log", xticks=NFES, xticklabels=NFES)
        axes.xaxis.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(0.7 * band, 3 * band)  # what lies higher is no choice
    right.set_ylim(top=0.5)
    left.yaxis.set_minor_formatter("{x:g}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    with files.written_whole(path) as partial:
        figure.savefig(partial, dpi=72, format="png", pil_kwargs={"optimize": True})


def print_speed(measurement, setting, rounds):
    """Print a table of images/s of a batch by a setting and by the default SDE, measured in turn."""
    sde = "SDE", flags.SDE_DEFAULTS | {"num_steps": MANY}
    rows = {row.label: row for row in (Setting("SDE Euler, the default", "uniform", "", *sde), setting)}
    labels = measurement.labels[: measurement.batch_size]
    nfe = {name: measurement.draw(row, 0, labels)[1] for name, row in rows.items()}  # warms up, too
    ways = {name: lambda row=row: measurement.draw(row, 0, labels) for name, row in rows.items()}
    seconds = measuring.medians_in_turn(ways, rounds, 1, measurement.pipeline.device)
    first = next(iter(seconds.values()))
    lines = [[name, nfe[name], f"{len(labels) / s:.1f}", f"{first / s:.1f}"] for name, s in seconds.items()]
    measuring.print_table(["solver", "NFE", "images/s", "ratio"], lines)


def build_parser():
    parser = command_line.Parser("Quality over network evaluations of every solver, on a run on the digits.")
    add, at_least_one = command_line.flag_group(parser, "measurement"), command_line.integer(1)
    add("--ckpt", command_line.location, "PATH", "run or checkpoint folder of a run on the digits", required=True)
    add("--json", command_line.path, "FILE.json", "results; those that it holds are not measured again", required=True)
    add("--output", command_line.path, "FILE.png", "draw the curves to this file")
    names = command_line.one_of(*ODE_METHODS, *SDE_METHODS)
    add("--solvers", names, "METHOD", f"methods to measure (default: all but {' and '.join(LEFT_OUT)})", nargs="+")
    add("--nfe", command_line.integer(2), "N", "evaluations", default=NFES, nargs="+")
    tolerance = command_line.number(0, exclude_minimum=True)
    add("--tolerances", tolerance, "RTOL", "of adaptive methods", default=(0.1, 0.01, 1e-3, 1e-4), nargs="+")
    grid = "as --time-grid of sample.py, but no list of times; one or more"
    add("--time-grid", command_line.location, "NAME|FILE.json", grid, default=("uniform",), nargs="+")
    steps = "last steps of the SDEs"
    add("--last-step", command_line.one_of(*LAST_STEPS), "STEP", steps, default=("Mean",), nargs="+")
    add("--seeds", command_line.integer(0), "SEED", "seeds of the noise", default=(0,), nargs="+")
    add("--num-samples", command_line.integer(10), "N", "images of each setting", default=1000)
    add("--batch-size", at_least_one, "N", "images at a time", default=100)
    add("--cfg-scale", command_line.number(), "S", "guidance scale", default=1.5)
    add("--precision", command_line.one_of(*DTYPES), "|".join(DTYPES), "of the model (default: as sample.py)")
    add("--compile", None, None, "compile the model")
    add("--speed", at_least_one, "ROUNDS", "time the only setting that the flags describe, in place of all else")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        for flag, path in (("--json", args.json), ("--output", args.output)):
            if path is not None:
                files.check_output(flag, path)
        device = distributed.init()
        precision = resolve_precision(args.precision, device, on_gpu="tf32")
        pipeline = load_pipeline(args.ckpt, device)
        if (*pipeline.latent_shape, pipeline.model.num_classes) != (1, 8, 8, 10):
            raise ValueError(f"--ckpt {args.ckpt} is not of a run on the digits")
        settings = {"cfg_scale": args.cfg_scale, "num_samples": args.num_samples, "precision": precision}
        settings |= {"weights": pipeline.digests()["weights_sha256"]}
        if args.json.exists():
            files.check_same_settings(args.json, settings, "give another --json")
        rows = files.read_json(args.json)["rows"] if args.json.exists() else {}
        names = args.solvers or {*ODE_METHODS, *SDE_METHODS}.difference(LEFT_OUT)
        solvers, grids = solvers_of(names, args.last_step), read_grids(args.time_grid)
        wanted = list(settings_of(solvers, args.nfe, args.tolerances, grids, pipeline.transport))
        if args.speed and len(wanted) != 1:
            raise ValueError(f"--speed takes one setting, and the other flags describe {len(wanted)}")
    pipeline.speed_up(precision, args.compile)
    measurement = Measurement(pipeline, args.num_samples, args.batch_size, args.cfg_scale, args.json)
    print(measuring.machine(device))
    if args.speed:
        return print_speed(measurement, wanted[0], args.speed)
    for seed, setting in itertools.product(args.seeds, [reference_of(pipeline.transport), *wanted]):
        if setting.key(seed) not in rows or not measurement.reference(seed).exists():
            rows[setting.key(seed)] = row = measurement.row(setting, seed)
            measuring.write_json(args.json, settings, rows, device)
            fd_pixels = measuring.cell(row["fd_pixels"], "{:.4f}") or "not finite"
            print(f"{setting.key(seed)}: fd_pixels {fd_pixels}, {row['seconds']:.1f} s", flush=True)
    curves = points([row for row in rows.values() if row["seed"] == args.seeds[0]])
    for key, name in (("fd_pixels", "Fréchet distance of pixels"), ("distance", "distance of end states")):
        print(f"\n{name} by NFE\n")
        print_curves(curves, key)
    print(f"\nat most {FEW} NFE: Fréchet distance of pixels, and its ratio to {' '.join(REFERENCE)}")
    print("\n".join(best_lines(points(list(rows.values())))))
    if args.output is not None:
        draw_curves(curves, args.output)


if __name__ == "__main__":
    main()
