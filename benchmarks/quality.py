"""What training recipes reach for their images, seconds and operations: python benchmarks/quality.py --output-dir DIR

Each recipe trains on the digits and on mnist5k, as configs/ has them but shorter, once for each seed, which decides
batches, times and noise for all recipes alike. All runs take the operations of the base recipe's run; at twelve points
of each, the EMA draws --num-samples images, from the same labels and noise for all recipes, without guidance, as SiT
and its descendants are compared, and demo.py's Fréchet distance of pixels to all real images is taken. From these
curves come, against the base recipe of the same seed:

- by how much fewer images, seconds and operations reach the base recipe's last distance. A curve is interpolated
  between points in the logarithms of images and distance, and reaches what it first falls to;
- the distance at a third of the base recipe's operations, and at all of them.

They are geometric means over the seeds of the ratios, with Student's t interval of their logarithms, 95%. A run that
does not get there counts with its last point, and the ratio is marked as a bound, '<'. Of the encoder to align with, a
small classifier of the same images, the operations in training steps count, and those of its own training do not.

Results are lines of results.jsonl in --output-dir: stopped and typed again, also with more recipes or seeds, the same
command goes on. --speed measures the seconds, apart from the runs, recipe by recipe in turn. --report prints the tables
and draws the curves of what has been measured until then.
"""

import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
from typing import NamedTuple

import measuring
import numpy as np
import scipy.stats
import timm
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

import demo
import train
from data.sources import DATA_FLAGS, open_source
from evaluation.metrics import frechet_distance, moments
from models import SiT_models
from sampling.draw import NotFinite, generate, resolve_settings
from sampling.flags import ODE_DEFAULTS
from sampling.pipeline import load_pipeline
from training import costs, losses, setup
from training.recipe import read_recipe
from transport import create_transport
from utils import command_line, files
from utils.command_line import given, plain
from utils.precision import DTYPES
from utils.weights import TRANSPORT_KEYS

POINTS = 12  # of a run, at equal distances; a third of the operations is one of them
# One evaluation a step, and few: solver_curves.py has what that costs.
SOLVER = ODE_DEFAULTS | {"sampling_method": "ab3", "num_steps": 11}
BATCH_SIZE = 100  # images drawn at a time
NO_IMAGES = 1e6  # the distance of samples that are not finite
ENCODER_STEPS, SPEED_STEPS = 500, 40


class DataSet(NamedTuple):
    """What all recipes have in common on a data set."""

    flags: tuple  # of train.py
    steps: int  # of the base recipe


class Recipe(NamedTuple):
    """A training recipe: what it adds to the base recipe. Recipes of the same flags share a run."""

    flags: str = ""  # of train.py; {encoder} is the folder of an encoder that is trained on the same images
    ema: str = "ema"  # which draws
    internal_guidance: float = 1.0  # scale


class Run(NamedTuple):
    """A run of train.py."""

    data: str
    flags: str
    seed: int


DATA = {
    "digits": DataSet(("--config", str(measuring.ROOT / "configs" / "digits.yaml")), 600),
    "mnist5k": DataSet(("--config", str(measuring.ROOT / "configs" / "mnist.yaml")), 1200),
}
ALIGN = "--align {encoder} --align-block 2 --align-width 128"
RECIPES = {
    "base": Recipe(),
    "ema-0.05": Recipe(ema="0.05"),
    "ema-0.10": Recipe(ema="0.10"),
    "direction": Recipe("--direction-loss"),
    "modern": Recipe("--block modern"),
    "modern+direction": Recipe("--block modern --direction-loss"),
    "route": Recipe("--route 1 3 0.5"),
    "align": Recipe(ALIGN),
    "inner-head": Recipe("--inner-head 2"),
    "internal-guidance": Recipe("--inner-head 2", internal_guidance=1.5),
    "muon": Recipe("--optimizer muon"),
    "modern+direction+muon": Recipe("--block modern --direction-loss --optimizer muon"),
    "modern+direction+muon+ema-0.05": Recipe("--block modern --direction-loss --optimizer muon", ema="0.05"),
    "lr-4e-3": Recipe("--lr 4e-3"),  # twice the base recipe's
    "modern+direction+muon+lr-4e-3": Recipe("--block modern --direction-loss --optimizer muon --lr 4e-3"),
}
TOGETHER = f"--block modern --direction-loss --route 1 3 0.5 {ALIGN} --inner-head 2 --optimizer muon"
RECIPES["all"] = Recipe(TOGETHER)
RECIPES["all+ema-0.10+internal-guidance"] = Recipe(TOGETHER, ema="0.10", internal_guidance=1.5)
RESULTS, SPEEDS = "results.jsonl", "speed.jsonl"
KEYS = ("data", "seed", "step", *Recipe._fields)  # what tells results apart


def runs_of(names, data, seeds):
    """Return the `Run`s of recipes of these names, seed by seed, so that pairs are there early."""
    flags = dict.fromkeys(RECIPES[name].flags for name in names)
    return [Run(*run) for run in ((d, f, s) for s in seeds for d in data for f in flags)]


def words_of(run, output_dir, precision):
    """Return the flags of train.py of a run, a tuple, without its steps. Snapshots of EMAs change no result."""
    more = [word.format(encoder=encoder_folder(run.data, output_dir)) for word in run.flags.split()]
    common = ["--precision", precision, "--sample-every", "0", "--ema-snapshots", "--global-seed", str(run.seed)]
    return (*DATA[run.data].flags, *common, *more)


@functools.cache
def flops_per_image(words):
    """Return the operations of one image in training, forward and backward, with these flags of train.py, a tuple."""
    args = train.build_parser().parse_args(words)
    source = open_source(**given(args, DATA_FLAGS))
    parts = (given(args, names) for names in (setup.model_options(), setup.SIZE_FLAGS, TRANSPORT_KEYS))
    config = setup.resolve_config(source, args.model, *parts, args.vae)
    model = setup.build_model(config)
    recipe = read_recipe(plain(args), model, create_transport(**config["transport"]), source)
    auxiliary = losses.build_losses(recipe.loss_builders, model, args.global_seed)
    return costs.training_flops(config["model"], recipe.route, auxiliary)


def points_of(run, output_dir, precision):
    """Return (steps between the points, images of a step, operations of an image) of a run.

    At a point, it has made the operations that the base recipe has at its point, to the nearest step."""
    words = words_of(run, output_dir, precision)
    base, flops = (flops_per_image(w) for w in (words_of(run._replace(flags=""), output_dir, precision), words))
    every = max(1, round(DATA[run.data].steps / POINTS * base / flops))
    return every, train.build_parser().parse_args(words).global_batch_size, flops


def encoder_folder(data, output_dir):
    return output_dir / f"encoder-{data}"


def train_encoder(data, output_dir, width=64, depth=3):
    """Train a classifier of the data's images, unless that is done: the encoder that recipes align with.

    It stands in for DINOv2, which has to be fetched: a small ViT of which each token is one of the SiT's."""
    folder, source = encoder_folder(data, output_dir), open_source(data)
    if folder.exists():
        return
    args = train.build_parser().parse_args(DATA[data].flags)
    images = torch.from_numpy(np.stack([np.asarray(image) for image, _ in source.examples]))
    images = images[:, None].expand(-1, 3, -1, -1) / 127.5 - 1  # (N, 3, H, H)
    labels = torch.as_tensor(np.asarray(source.labels))
    patch_size = args.patch_size or SiT_models[args.model].keywords["patch_size"]
    shape = dict(img_size=images.shape[-1], patch_size=patch_size, embed_dim=width, depth=depth, num_heads=4)
    shape |= dict(class_token=False, global_pool="avg", fc_norm=False)  # so that the loss sees every token
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=source.num_classes, **shape)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(ENCODER_STEPS):
        rows = torch.randint(len(labels), (args.global_batch_size,))
        loss = torch.nn.functional.cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    partial = files.partial_name(folder)
    files.remove(partial)
    timm.models.save_for_hf(network, partial, model_args=shape, safe_serialization=True)
    partial.rename(folder)
    print(f"{folder}: loss {loss:.3f} after {ENCODER_STEPS} steps of {args.global_batch_size} images", flush=True)


def run_folder(run, output_dir):
    name = re.sub(r"[^\w.]+", "-", f"{run.data} {run.flags}").strip("-")
    return output_dir / "runs" / f"{name}-{run.seed}"


def train_run(words, folder, threads):
    """Run train.py to its end, or go on with it, as a process of its own. Return its seconds of all cores.

    Raise RuntimeError with its last line if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, measuring.ROOT / "train.py", *words, "--output-dir", folder]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise RuntimeError(f"{' '.join(map(str, command))}: {lines[-1] if lines else result.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@functools.cache
def moments_of_real(data):
    """Return mean and covariance of the features of all real images, by which demo.py judges."""
    return moments(demo.features(np.stack([np.asarray(image) for image, _ in open_source(data).examples])))


def distance(checkpoint, recipe, data, seed, num_samples, precision):
    """Return the Fréchet distance of samples of a checkpoint to the real images, None if samples are not finite."""
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = load_pipeline(str(checkpoint), torch.device("cpu"), ema=recipe.ema)
    pipeline.speed_up(precision, False)
    internal = None if recipe.internal_guidance == 1 else [recipe.internal_guidance]
    settings = resolve_settings(pipeline, "ODE", SOLVER, 1.0, None, seed, internal)
    labels = [i % pipeline.model.num_classes for i in range(num_samples)]
    try:
        images, _ = generate(pipeline, labels, settings, batch_size=BATCH_SIZE, show_progress=False)
    except NotFinite:
        return None
    return frechet_distance(*moments(demo.features(images.numpy())), *moments_of_real(data))


def read_rows(path):
    """Return the results in a file, a line each. Lines that are empty or were cut off are left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_row(path, row):
    """Append a result to a file, at once, and on a new line even if the last one was cut off."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"\n{json.dumps(row)}".encode())


def key_of(row):
    return tuple(row[key] for key in KEYS)


def measure_run(run, recipes, output_dir, num_samples, precision, threads):
    """Train a run, and measure it at its points with what each of the recipes draws, unless that is done.

    Return a line of text, and whether it succeeded."""
    torch.set_num_threads(threads)
    every, batch_size, flops = points_of(run, output_dir, precision)
    done = {key_of(row) for row in read_rows(output_dir / RESULTS)}
    rows = [
        dict(data=run.data, seed=run.seed, step=every * k, **r._asdict()) for k in range(1, POINTS + 1) for r in recipes
    ]
    rows, folder = [row for row in rows if key_of(row) not in done], run_folder(run, output_dir)
    if not rows:
        return f"{folder.name}: done before", True
    length = ["--max-steps", every * POINTS, "--ckpt-every", every, "--log-every", every]
    try:
        cost = train_run([*words_of(run, output_dir, precision), *length], folder, threads)
    except RuntimeError as error:
        return f"FAILED: {error}", False
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for row in rows:
        recipe = Recipe(*(row[key] for key in Recipe._fields))
        checkpoint = folder / f"checkpoint-{row['step']}"
        fd = distance(checkpoint, recipe, run.data, run.seed, num_samples, precision)
        images = row["step"] * batch_size
        append_row(output_dir / RESULTS, row | {"images": images, "flops": images * flops, "fd": fd})
    files.remove(folder)
    drawing = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    last = measuring.cell(fd, "{:.4f}") or "not finite"
    return f"{folder.name}: {last} at the end; {cost:.0f} core-seconds of training, {drawing:.0f} of drawing", True


def measure_speed(runs, output_dir, precision, threads, rounds):
    """Time a few steps of the runs in turn, `rounds` times, unless that is done."""
    done = {(row["data"], row["flags"], row["round"]) for row in read_rows(output_dir / SPEEDS)}
    for i, run in itertools.product(range(rounds), runs):
        if (run.data, run.flags, i) in done:
            continue
        folder = output_dir / "runs" / "speed"
        files.remove(folder)
        length = ["--max-steps", SPEED_STEPS, "--log-every", SPEED_STEPS // 2]
        train_run([*words_of(run, output_dir, precision), *length], folder, threads)
        _, row = read_rows(folder / "metrics.jsonl")  # the first half warms up
        append_row(output_dir / SPEEDS, dict(data=run.data, flags=run.flags, round=i, speed=row["images_per_second"]))
        print(f"{run.data} {run.flags or 'base'}, round {i}: {row['images_per_second']:.0f} images/s", flush=True)
        files.remove(folder)


class Curve(NamedTuple):
    """The points of a run, in their order."""

    images: np.ndarray
    flops: np.ndarray
    fd: np.ndarray


def curves_of(rows):
    """Return {(data, recipe, seed): `Curve`} of the runs of which all points are there."""
    grouped = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        grouped.setdefault((row["data"], Recipe(*(row[key] for key in Recipe._fields)), row["seed"]), []).append(row)
    curves = {}
    for key, group in grouped.items():
        columns = [np.array([NO_IMAGES if r[c] is None else r[c] for r in group], float) for c in Curve._fields]
        if len(group) == POINTS:
            curves[key] = Curve(*columns)
    return curves


def first_reach(amounts, fd, target):
    """Return (the amount at which a curve first falls to a target, whether it does); the last amount if it does not.

    Between points, log fd is linear in log amount. The first amount if the curve begins below."""
    (reached,) = np.nonzero(fd <= target)
    if len(reached) == 0:
        return amounts[-1], False
    i = reached[0]
    if i == 0:
        return amounts[0], True
    (a, b), (high, low) = np.log(amounts[i - 1 : i + 1]), np.log(fd[i - 1 : i + 1])
    return np.exp(a + (b - a) * (high - np.log(target)) / (high - low)), True


def fd_at(amounts, fd, amount):
    """Return the distance of a curve at an amount, as `first_reach` interpolates; at an end beyond it."""
    return np.exp(np.interp(np.log(amount), np.log(amounts), np.log(fd)))


def geometric(ratios):
    """Return (geometric mean, low, high) of ratios, with the 95% interval of Student's t; of one, low is None."""
    logs = np.log(ratios)
    if len(logs) < 2:
        return np.exp(logs.mean()), None, None
    half = scipy.stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return tuple(np.exp(logs.mean() + np.array([0, -half, half])))


def compare(base, other):
    """Return what a recipe needs and reaches against the base recipe of the same seed, two `Curve`s.

    'images' and 'flops' are the base recipe's to its last distance, over the other's; 'third' and 'all' are the other's
    distance over the base recipe's at a third and all of its operations."""
    target = base.fd[-1]
    result = {}
    for key in ("images", "flops"):
        needed, _ = first_reach(getattr(base, key), base.fd, target)
        amount, result["reached"] = first_reach(getattr(other, key), other.fd, target)
        result[key] = needed / amount
    for key, share in (("third", 1 / 3), ("all", 1)):
        flops = base.flops[-1] * share
        result[key] = fd_at(other.flops, other.fd, flops) / fd_at(base.flops, base.fd, flops)
    return result


def speed_ratios(speeds, data):
    """Return {flags: median over rounds of images/s over the base recipe's in the same round}."""
    of_data = {(row["flags"], row["round"]): row["speed"] for row in speeds if row["data"] == data}
    ratios = {}
    for (flags, i), speed in of_data.items():
        if ("", i) in of_data:
            ratios.setdefault(flags, []).append(speed / of_data["", i])
    return {flags: statistics.median(values) for flags, values in ratios.items()}


def ratio_text(ratios, factor=1.0, bound=False):
    """Return the geometric mean of ratios times a factor, with its interval, as text."""
    mean, low, high = (value and value * factor for value in geometric(ratios))
    interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
    return f"{'< ' if bound else ''}{mean:.2f}{interval}"


def table_lines(curves, speeds, data):
    """Return the lines of a data set's table: a recipe's name, and its cells."""
    lines, ratios = [], speed_ratios(speeds, data)
    for name, recipe in RECIPES.items():
        seeds = [s for d, r, s in curves if (d, r) == (data, recipe) and (data, RECIPES["base"], s) in curves]
        if not seeds:
            continue
        of_recipe = [curves[data, recipe, seed] for seed in seeds]
        pairs = [compare(curves[data, RECIPES["base"], s], c) for s, c in zip(seeds, of_recipe, strict=True)]
        column = {key: [pair[key] for pair in pairs] for key in pairs[0]}
        bound, speed = not all(column["reached"]), ratios.get(recipe.flags)
        cells = [f"{of_recipe[0].flops[0] / of_recipe[0].images[0] / 1e9:.3f}", ratio_text(column["images"], 1, bound)]
        cells.append(None if speed is None else ratio_text(column["images"], speed, bound))
        cells += [ratio_text(column["flops"], 1, bound), ratio_text(column["third"]), ratio_text(column["all"])]
        lines.append([name, *cells, f"{sum(column['reached'])} of {len(seeds)}"])
    return lines


def print_table(curves, speeds, data):
    base = [curve for (d, recipe, _), curve in curves.items() if (d, recipe) == (data, RECIPES["base"])]
    if not base:
        return
    third, last = (geometric([c.fd[i] for c in base])[0] for i in (POINTS // 3 - 1, -1))
    images = f"{base[0].images[-1]:,.0f} images, {base[0].flops[-1] / 1e12:.1f} TFLOPs"
    print(f"\n{data}: the base recipe's distance is {third:.3f} at a third and {last:.3f} at the end of {images}\n")
    columns = ["recipe", "GFLOPs per image", "fewer images", "fewer seconds", "fewer operations"]
    columns += ["distance at a third of the operations", "at all", "seeds that get there"]
    measuring.print_table(columns, table_lines(curves, speeds, data))


def draw_curves(curves, path):
    """Draw the geometric mean over the seeds of each recipe, over images and over operations, to a PNG."""
    data = [name for name in DATA if any(key[0] == name for key in curves)]
    figure = Figure(figsize=(12, 4.5 * len(data)), layout="constrained", facecolor="white")
    for of_data, name in zip(figure.subplots(len(data), 2, squeeze=False), data, strict=True):
        for (axes, amount), (i, (label, recipe)) in itertools.product(
            zip(of_data, ("images", "flops"), strict=True), enumerate(RECIPES.items())
        ):
            group = [curve for (d, r, _), curve in curves.items() if (d, r) == (name, recipe)]
            if group:
                fd = np.exp(np.mean([np.log(curve.fd) for curve in group], 0))
                style = dict(color=colormaps["tab20"](i), linewidth=2.2 if label == "base" else 1.2, marker=".")
                axes.plot(getattr(group[0], amount), fd, label=label, **style)
        for axes, text in zip(of_data, ("images", "operations"), strict=True):
            axes.set(
                xlabel=f"{text} in training", title=f"{name}: Fréchet distance of pixels", xscale="log", yscale="log"
            )
            axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=8)
    with files.written_whole(path) as partial:
        figure.savefig(partial, dpi=72, format="png", pil_kwargs={"optimize": True})


def build_parser():
    parser = command_line.Parser("What training recipes reach for their images, seconds and operations.")
    add, at_least_one = command_line.flag_group(parser, "measurement"), command_line.integer(1)
    add("--output-dir", command_line.path, "DIR", "results; those that it holds are not measured again", required=True)
    add("--data", command_line.one_of(*DATA), "NAME", "data sets (default: all)", nargs="+")
    add(
        "--recipes",
        command_line.one_of(*RECIPES),
        "NAME",
        f"beside base: {', '.join(RECIPES)} (default: all)",
        nargs="+",
    )
    add("--seeds", command_line.integer(0), "SEED", "of weights, batches and noise (default: 0 to 4)", nargs="+")
    add("--num-samples", command_line.integer(10), "N", "images drawn at a point", default=500)
    precision = "of training and drawing; bf16 saves half of the time on CPUs that have it"
    add("--precision", command_line.one_of(*DTYPES), "|".join(DTYPES), precision, default="bf16")
    add("--jobs", at_least_one, "N", "runs at a time", default=1)
    add("--threads", at_least_one, "N", "of a run", default=1)
    add("--speed", at_least_one, "ROUNDS", "time the recipes in place of measuring what they reach")
    add("--report", None, None, "only print the tables and draw the curves")
    add("--output", command_line.path, "FILE.png", "draw the curves to this file")
    return parser


def settings_of(num_samples, precision):
    """Return what decides results, beside what these say themselves."""
    settings = {"num_samples": num_samples, "precision": precision, "solver": SOLVER}
    for name, data in DATA.items():
        parser = train.build_parser()
        flags = plain(parser.parse_args(data.flags))
        settings[name] = {"steps": data.steps} | {key: flags[key] for key in sorted(parser.changed - {"config"})}
    return settings


def measure(runs, names, output_dir, num_samples, precision, jobs, threads):
    """Measure the runs for the recipes of these names. Return whether all succeeded."""
    recipes = [[recipe for recipe in map(RECIPES.get, names) if recipe.flags == run.flags] for run in runs]
    how = (itertools.repeat(value) for value in (output_dir, num_samples, precision, threads))
    succeeded = True
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for line, good in (pool.map if jobs > 1 else map)(measure_run, runs, recipes, *how):
            print(line, flush=True)
            succeeded &= good
    return succeeded


def main():
    parser = build_parser()
    args = parser.parse_args()
    names, output_dir = list(dict.fromkeys(["base", *(args.recipes or RECIPES)])), args.output_dir.resolve()
    data = args.data or list(DATA)
    succeeded = True
    with command_line.user_errors(parser):
        if args.output is not None:
            files.check_output("--output", args.output)
        if not args.report:
            files.lock(output_dir, f"{output_dir} is in use by another process")
            settings = settings_of(args.num_samples, args.precision)
            files.keep_settings(output_dir / "settings.json", settings, "give another --output-dir", "quality.py")
    runs = runs_of(names, data, args.seeds or range(5))
    if not args.report:
        print(measuring.machine(torch.device("cpu")))
        torch.set_num_threads(args.threads)
        for name in dict.fromkeys(run.data for run in runs if "{encoder}" in run.flags):
            train_encoder(name, output_dir)
        if args.speed:
            measure_speed(runs_of(names, data, [0]), output_dir, args.precision, args.threads, args.speed)
        else:
            how = args.num_samples, args.precision, args.jobs, args.threads
            succeeded = measure(runs, names, output_dir, *how)
    curves, speeds = curves_of(read_rows(output_dir / RESULTS)), read_rows(output_dir / SPEEDS)
    for name in data:
        print_table(curves, speeds, name)
    if args.output is not None and curves:
        draw_curves(curves, args.output)
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
