"""A sweep over settings: which combinations to measure, the file of their results, and the report of them.

A combination is {flag's key: value}; a flag that is not given is missing. A row is what results.jsonl holds of one:
its 'settings', the 'values' of the metric for each seed, their 'mean' and standard deviation 'std' (None for one seed),
'nfe', 'forward_passes' and 'images', and 'made_with', what else decided them; or, in place of these, its 'error'."""

import csv
import hashlib
import itertools
import json
import math
import shlex
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from evaluation.images import ImageBatches
from evaluation.metrics import BATCH_SIZE, Moments, Monitor, frechet_distance
from transport import SDE_METHODS
from utils import files
from utils.command_line import flag_name

DIGITS = 5  # of a metric: what differs behind them is the rounding of other numbers of threads
ADVICE = "give another --output-dir"
COUNTS = ("nfe", "forward_passes", "images")


def grid(axes):
    """Return all combinations of axes {key: values}; the last axis varies fastest. A value of None is a missing key."""
    products = (zip(axes, values, strict=True) for values in itertools.product(*axes.values()))
    return [{key: value for key, value in product if value is not None} for product in products]


def star(axes):
    """Return the first values of all axes, and the combinations that differ from them in one axis."""
    start = {key: values[:1] for key, values in axes.items()}
    return [c for key, values in axes.items() for c in grid(start | {key: values})] or [{}]


def coordinate(axes, measure):
    """Search one axis after the other, in their order, from the first values; the best value of an axis is kept.

    `measure(combination)` returns the metric, of which less is better, or None. Return the best combination."""
    best = {key: values[:1] for key, values in axes.items()}
    for key, values in axes.items():
        measured = [(measure(grid(best | {key: [value]})[0]), value) for value in values]
        finite = [pair for pair in measured if pair[0] is not None]
        best[key] = [min(finite, key=lambda pair: pair[0])[1]] if finite else best[key]
    return grid(best)[0]


def mode_of(combination):
    return "SDE" if combination.get("sampling_method") in SDE_METHODS else "ODE"


def flags_of(values):
    """Return {key: value} as flags of a command line; a value of True is a flag without a value."""
    pairs = ((flag_name(key), value if isinstance(value, list) else [value]) for key, value in values.items())
    return shlex.join(str(word) for flag, words in pairs for word in (flag, *words) if word is not True)


def words_of(combination):
    """Return a combination as sample_ddp.py's command line has it."""
    return f"{mode_of(combination)} {flags_of(combination)}".strip()


def identifier(combination):
    """Return 12 hexadecimal digits that name a combination."""
    return hashlib.sha256(json.dumps(combination, sort_keys=True).encode()).hexdigest()[:12]


def rounded(value):
    """Return a number to DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


class Results:
    """The rows in `folder`/results.jsonl, and the metric of `Monitor` that they hold; on rank 0 alone."""

    def __init__(self, folder):
        self.folder, self.path, self.rows = folder, folder / "results.jsonl", []

    def open(self, settings, open_reference, image_shape, weights, device):
        """Lock the folder, open the reference, and read the rows of an earlier call.

        `open_reference()` returns what `Monitor` takes. `settings` are those that all rows share. Raise ValueError if
        the folder's rows were made with others, or it cannot be written to."""
        with files.named(f"--output-dir {self.folder}"):
            files.lock(self.folder, f"another process sweeps in {self.folder}; wait for it, or {ADVICE}")
            self.monitor = Monitor(open_reference(), image_shape, weights, device)
            self.metric = self.monitor.features.metric
            mean, covariance = self.monitor.of_reference
            reference = f"mean {mean.mean():.6g}, variance {np.trace(covariance):.6g}"
            settings = settings | {"reference": reference, "inception_sha256": self.monitor.sha256}
            files.keep_settings(self.folder / "settings.json", settings, ADVICE, "sweep.py")
            with files.named(f"{self.path} is damaged", (ValueError, KeyError, TypeError)):
                lines = self.path.read_text().splitlines() if self.path.exists() else []
                self.rows = list(map(json.loads, lines))
                if any(row["id"] != identifier(row["settings"]) for row in self.rows):
                    raise ValueError("a row's settings are not those of its id")

    def find(self, combination, made_with):
        """Return the row of a combination; None if there is none. Raise ValueError if it was not made with these."""
        row = next((row for row in self.rows if row["id"] == identifier(combination)), None)
        for key, value in made_with.items() if row else ():
            if (earlier := row.get("made_with", made_with).get(key)) != value:
                raise ValueError(f"{self.path}: {row['id']} was made with {key} {earlier}, not {value}; {ADVICE}")
        return row

    def measure(self, path):
        """Return the metric of the images in an .npz. They are read in their order, however many ranks drew them."""
        features = self.monitor.features
        rows = (features(batch)[0][0].cpu() for batch in ImageBatches(path).batches(BATCH_SIZE))
        accumulated = Moments(features.sizes[0], rows, self.monitor.of_reference[0])
        return rounded(frechet_distance(*accumulated.result(), *self.monitor.of_reference))

    def append(self, row, text):
        """Add a row to the file, which is whole at any moment, and print it behind a text."""
        self.rows.append(row)
        with files.named(self.path), files.written_whole(self.path) as partial:
            partial.write_text("".join(files.to_json(row) + "\n" for row in self.rows))
        print(f"{text}: {shown(row, self.metric)}", flush=True)

    def report(self, num_samples, fixed, ranks):
        """Write the tables and the pictures, and return lines on the best row, its command, and the rows as good.

        `fixed` is {key: value} of the flags of all combinations."""
        measured, failed = ([row for row in self.rows if key in row] for key in ("mean", "error"))
        finished = sorted(measured, key=lambda row: row["mean"])
        with files.named(self.folder):
            write_tables(self.folder, [*finished, *failed], self.metric)
        lines = [f"failed: {words_of(row['settings'])}: {row['error']}" for row in failed]
        if not finished:
            return [*lines, "no combination has a metric"]
        with files.named(self.folder):
            draw_heatmap(self.folder / "heatmap.png", measured, self.metric)
            draw_curves(self.folder / "curves.png", measured, self.metric)
        best = finished[0]
        lines.append(f"best: {words_of(best['settings'])}: {shown(best, self.metric)}")
        if best["std"] is None:
            lines.append("one seed has no noise band: give more --seeds to see which others are as good")
        close = [row for row in finished[1:] if within_noise(best, row)]
        lines += [f"not distinguishable: {words_of(row['settings'])}: {shown(row, self.metric)}" for row in close]
        launcher = "python" if ranks == 1 else f"torchrun --nproc_per_node={ranks}"
        more = flags_of(fixed | {"output": self.folder / f"best-{best['id']}.npz"})
        lines.append(f"50,000 images with the best: {launcher} sample_ddp.py {words_of(best['settings'])} {more}")
        if self.monitor.sha256 and (caveats := self.monitor.features.comparability(num_samples)["caveats"]):
            lines.append(f"not comparable with published metrics: {'; '.join(caveats)}")
        return lines


def statistics_of(values):
    """Return {'values', 'mean', 'std'} of the metric for each seed; std, over N - 1, is None for one seed."""
    std = rounded(statistics.stdev(values)) if len(values) > 1 else None
    return {"values": values, "mean": rounded(statistics.fmean(values)), "std": std}


def within_noise(best, row):
    """Return whether two rows differ by no more than the standard deviation over seeds of a difference of two."""
    return best["std"] is not None and row["mean"] - best["mean"] <= math.hypot(best["std"], row["std"])


def shown(row, metric):
    """Return a row's metric with its noise band, and its NFE, as a text."""
    if "error" in row:
        return f"error: {row['error']}"
    band = "" if row["std"] is None else f" ± {row['std']:.2g}"
    return f"{metric} {row['mean']:.{DIGITS}g}{band}, {row['nfe']} NFE ({row['forward_passes']} forward passes)"


def cell(value):
    """Return a value of an axis as a text; None is a flag that is missing."""
    return "-" if value is None else ":".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)


def keys_of(rows):
    """Return the keys that settings of any row have, in the order in which they come."""
    return list(dict.fromkeys(key for row in rows for key in row["settings"]))


def write_tables(folder, rows, metric):
    """Write table.csv and table.md of rows, one a line."""
    keys = keys_of(rows)
    table = [["id", *keys, metric, "std", *COUNTS, "error"]]
    for row in rows:
        columns = ("mean", "std", *COUNTS, "error")
        table.append([row["id"], *(cell(row["settings"].get(key)) for key in keys), *map(cell, map(row.get, columns))])
    with files.written_whole(folder / "table.csv") as partial, open(partial, "w", newline="") as file:
        csv.writer(file).writerows(table)
    lines = [[text.replace("|", "\\|") for text in line] for line in table]
    lines.insert(1, ["---"] * len(table[0]))
    with files.written_whole(folder / "table.md") as partial:
        partial.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def draw_heatmap(path, rows, metric):
    """Draw the metric over the two axes with the most values, the best over all others."""
    values = {key: {cell(row["settings"].get(key)) for row in rows} for key in keys_of(rows)}
    pair = [*sorted(values, key=lambda key: -len(values[key])), "", ""][:2]
    best = {}
    for row in rows:
        place = tuple(cell(row["settings"].get(key)) for key in pair)
        best[place] = min(best.get(place, math.inf), row["mean"])
    down, across = (list(dict.fromkeys(place[i] for place in best)) for i in range(2))
    image = np.array([[best.get((y, x), math.nan) for x in across] for y in down])
    figure = Figure(figsize=(3 + 0.9 * len(across), 2 + 0.5 * len(down)), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(image, cmap="viridis_r", aspect="auto"), label=metric)
    axes.set_xticks(range(len(across)), across, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(len(down)), down, parse_math=False)
    axes.set(ylabel=pair[0], xlabel=pair[1])
    for (y, x), value in np.ndenumerate(image):
        if math.isfinite(value):
            axes.text(x, y, f"{value:.4g}", ha="center", va="center", backgroundcolor=(1, 1, 1, 0.6))
    _save(figure, path)


def draw_curves(path, rows, metric):
    """Draw the best metric over NFE, a line for each solver, with bars of its standard deviation over seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, best = figure.subplots(), {}
    for row in sorted(rows, key=lambda row: -row["mean"]):  # the best last
        of_solver = best.setdefault(row["settings"].get("sampling_method", "default"), {})
        of_solver[row["nfe"]] = row["mean"], row["std"] or 0
    for solver, points in sorted(best.items()):
        nfe = sorted(points)
        mean, std = np.array([points[n] for n in nfe]).T
        axes.errorbar(nfe, mean, std, fmt="o-", capsize=3, label=solver)
    axes.set(xscale="log", yscale="log", xlabel="NFE", ylabel=metric)
    axes.set_xticks(sorted({n for points in best.values() for n in points}), minor=True)
    axes.xaxis.set(major_locator=NullLocator(), minor_formatter="{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(figure, path)


def _save(figure, path):
    with files.written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
