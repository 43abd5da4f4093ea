"""Find the sampling settings with the best metric: draw samples of each combination, and measure them.

    torchrun --nproc_per_node=8 sweep.py --ckpt runs/xl --cfg-scale 1 1.25 1.5 2 --cfg-interval none 0:0.7 \\
        --solver heun2 dpmpp_2m --num-sampling-steps 11 26 --reference REFERENCE.npz --output-dir sweeps/xl

DIR/results.jsonl has a line per combination, table.md and table.csv the same sorted, heatmap.png and curves.png show
them. Stopped and typed again, also with more values or on other ranks, the same command goes on.
A combination that fails is a line with its error (without the line, it is tried again); the others go on."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from data.images import small_images
from data.sources import DATA_FLAGS, Source, open_source
from evaluation.features import MOST_PIXELS
from evaluation.images import ImageBatches
from evaluation.metrics import MOST_REFERENCES
from evaluation.sweeps import Results, coordinate, grid, identifier, mode_of, star, statistics_of, words_of
from models import SiT
from sampling import flags
from sampling.draw import NotFinite, SampleSettings, describe, draw_labels, resolve_settings
from sampling.pipeline import Pipeline, load_pipeline
from sampling.shards import Shards, draw_missing
from transport import DIFFUSION_FORMS, ODE_METHODS, SDE_METHODS
from utils import distributed, hub
from utils.command_line import (
    Parser,
    flag_group,
    flag_name,
    given,
    integer,
    location,
    number,
    one_of,
    path,
    user_errors,
)
from utils.files import one_line, read_json
from utils.precision import resolve_precision
from utils.sizes import size_name
from utils.weights import build_on_meta, load_weights

# Flags that are axes, in the order of the search. Those of the networks come first, so that each is loaded once.
NETWORKS = ("ema", *flags.GUIDE_FLAGS)
SOLVER = ("sampling_method", *(key for key in flags.SOLVER_FLAGS if key not in ("sampling_method", "reverse")))
AXES = (*NETWORKS, *SOLVER, "cfg_scale", "cfg_interval", "internal_guidance")
LEFT_OUT = ("help", "mode", "reverse", "train_eps", "loss_weight")  # flags of sample_ddp.py without use here
WEIGHTS = tuple(key for key in flags.WEIGHTS_FLAGS if key not in (*AXES, *LEFT_OUT))
FIXED = ("ckpt", *WEIGHTS, "guided_channels", "precision", "vae_precision", "compile", "balanced_labels")
OPTIONS = ("num_samples", "seeds", "balanced_labels", "vae_precision", "keep_images")  # that all rows share,
DESCRIBED = ("model", "path", "prediction", "sample_eps", "precision", "guided_channels")  # and of `describe`


def interval(text):
    """Return an interval of guidance LO:HI as [LO, HI]; None for 'none'."""
    words = text.split(":")
    ends = [number(0, closed=1)(end) for end in words] if len(words) == 2 else None
    if text != "none" and not (ends and ends[0] < ends[1]):
        raise argparse.ArgumentTypeError(f"must be none or LO:HI with LO below HI, not {text!r}")
    return ends


def internal_guidance(text):
    """Return internal guidance W or W:LO:HI as a list of its numbers; None for 'none'."""
    return None if text == "none" else [number()(word) for word in text.split(":")]


TYPES = {  # where they are not those of sample_ddp.py
    "sampling_method": (one_of(*ODE_METHODS, *SDE_METHODS), "METHOD"),
    "diffusion_form": (one_of(*DIFFUSION_FORMS), "FORM"),
    "time_grid": (location, "NAME|FILE.json"),
    "cfg_interval": (interval, "none|LO:HI"),
    "internal_guidance": (internal_guidance, "none|W|W:LO:HI"),
    "guide_ckpt": (lambda text: None if text == "none" else location(text), "none|PATH|NAME|URL"),
}


def build_parser():
    parser, single = Parser("Measure samples of all combinations of settings, and name the best."), Parser("")
    flags.add_sampling_flags(single)
    actions = {action.dest: action for action in single._actions if action.dest not in LEFT_OUT}
    text = "Each takes one value or more. Where a value has no effect it is left out, and equal combinations are one."
    group = parser.add_argument_group("axes", text)
    for action in map(actions.pop, AXES):
        action.type, action.metavar = TYPES.get(action.dest, (action.type, action.metavar))
        action.nargs, action.option_strings = "+", [flag_name(action.dest).replace("sampling-method", "solver")]
        group._add_action(action)
    group = parser.add_argument_group("as in sample_ddp.py, for all combinations")
    for action in actions.values():
        group._add_action(action)
    add = flag_group(parser, "sweep")
    add("--output-dir", path, "DIR", "folder of the results; the same command continues in it", required=True)
    statistics = "as for evaluate.py; FID, or fd_pixels for small images (default: the training images, if small)"
    add("--reference", path, "PATH", statistics)
    add("--inception-weights", path, "FILE.pth", "see evaluate.py (default: download them once)")
    add("--num-samples", integer(2), "N", "images for each combination and seed", default=5000)
    add("--seeds", integer(0), "SEED", "the noise band is the standard deviation over them", default=[0], nargs="+")
    add("--coordinate", None, None, "not all combinations: one axis after the other as listed, from the best so far")
    add("--max-images", integer(1), "N", "stop before the combination that would make more images in all")
    add("--batch-size", integer(1), "N", "images at a time, per rank", default=64)
    add("--balanced-labels", None, None, "draw each class in turn (default: labels uniform at random)")
    add("--keep-images", None, None, "keep the .npz of each combination and seed, in DIR/images/")
    add("--dry-run", None, None, "print each combination with its NFE, and exit")
    return parser


def main():
    # Check the flags, load the first network, and print the plan.
    parser = build_parser()
    args = parser.parse_args()
    with user_errors(parser):
        axes, options = given(args, AXES), {key: vars(args)[key] for key in OPTIONS}
        if len(set(args.seeds)) < len(args.seeds):
            raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: a seed comes twice")
        for guide in filter(None, axes.get("guide_ckpt", ())):
            hub.resolve(guide)
        device = distributed.init()
        how = resolve_precision(args.precision, device, on_gpu="tf32"), args.compile
        more = args.ckpt, device, args.guided_channels, args.vae_precision
        load = functools.partial(load_pipeline, *more, **given(args, WEIGHTS))
        sweep = Sweep(load, how, Results(args.output_dir), options, args.batch_size)
        outline, ema = sweep.open(axes)
        effects = [effective(outline, combination) for combination in (star if args.coordinate else grid)(axes)]
        plan = list({identifier(combination): combination for combination in effects}.values())
        longest = 1 + sum(len(values) - 1 for values in axes.values()) if args.coordinate else len(plan)
        of_each = args.num_samples * len(args.seeds)
        sweep.most = min(longest, (args.max_images or math.inf) // of_each)
        if not sweep.most:
            raise ValueError(f"--max-images {args.max_images}: one combination takes {of_each}")
        if distributed.rank() == 0:
            rules = [(math.prod(outline.image_shape) <= MOST_PIXELS, ("inception_weights",), "on images this small")]
            changed = parser.changed & {"inception_weights", "vae_precision"}
            for line in flags.without_effect(changed, "ODE", flags.ODE_DEFAULTS, None, outline.space.in_pixels, rules):
                print(line)
            print_plan(outline, plan, sweep.most, of_each, args.coordinate, args.dry_run)
        if args.dry_run:
            return distributed.shutdown()

        # Open the reference and the results of an earlier call, measure the combinations, and report.
        described = describe(outline, SampleSettings(cfg_scale=2.0))  # of any guidance
        shared = {key: described[key] for key in DESCRIBED} | options
        reference = functools.partial(open_reference, args.reference, args.ckpt, ema, outline)
        where = outline.image_shape, args.inception_weights, device
        distributed.on_rank_zero(sweep.results.open, shared, reference, *where)
        if args.coordinate:
            coordinate(axes, sweep)
        else:
            for combination in plan:
                sweep(combination)
        if distributed.rank() == 0:
            fixed = {key: vars(args)[key] for key in FIXED if key in parser.changed}
            fixed |= {"image_size": size_name(args.image_size)} if args.image_size else {}
            for line in sweep.results.report(args.num_samples, fixed, distributed.world_size()):
                print(line)
    distributed.shutdown()


def settings_of(pipeline, combination):
    """Return the `SampleSettings` of a combination, with seed 0. Raise ValueError if its values do not fit."""
    if pipeline.guide is None and "guide_ckpt" in combination:  # the outline, which has no network
        pipeline = dataclasses.replace(pipeline, guide=pipeline)
    solver = {key: combination[key] for key in SOLVER if key in combination}
    mode, solver = flags.solver_settings(mode_of(combination), solver)
    guided = (combination.get(key) for key in ("cfg_scale", "cfg_interval"))
    return resolve_settings(pipeline, mode, solver, *guided, 0, combination.get("internal_guidance"))


def effective(outline, combination):
    """Return a combination without the flags that have no effect on it, by the rules of sample_ddp.py."""
    given_times = not isinstance(flags.read_time_grid(combination.get("time_grid", "uniform"))[0], str)
    idle = {"num_sampling_steps"} if given_times else {}
    while True:
        combination = {key: value for key, value in combination.items() if key not in idle}
        try:
            settings = settings_of(outline, combination)
            lines = flags.without_effect(combination.keys(), settings.mode, settings.solver, settings.cfg_scale)
        except ValueError as error:
            lines = [str(error)]
        idle = {key for key in combination if any(line.startswith(f"{flag_name(key)} has no effect") for line in lines)}
        if not idle:
            return combination


def print_plan(outline, plan, most, of_each, is_search, each):
    """Print the images and evaluations of the first `most` combinations of a plan and, if asked for, each one."""
    counts = []  # (NFE, the most forward passes) of an image of each combination
    for combination in plan:
        try:
            settings = settings_of(outline, combination)
            nfe = settings.sampler(outline.transport).nfe
            text = "as many NFE as its tolerances need" if nfe is None else f"{nfe} NFE"
            counts.append((nfe or 0, (nfe or 0) * (2 if settings.cfg_scale != 1 else 1)))
        except ValueError as error:
            text = f"error: {error}"
            counts.append((0, 0))
        if each:
            print(f"{words_of(combination)}: {text}")
    if is_search:
        counts = [tuple(map(max, zip(*counts, strict=True)))] * most
    nfe, passes = (f"{of_each * sum(column):,}" for column in zip(*counts[:most], strict=True))
    cost = f"{most * of_each:,} images, {nfe} NFE and at most {passes} forward passes with the solvers of fixed steps"
    print(f"{'at most ' * is_search}{most} combinations of {of_each:,} images: {cost}")
    if most < len(plan) and not is_search:
        print(f"{len(plan) - most} combinations beyond --max-images are not measured")


def open_reference(reference, ckpt, ema, outline):
    """Return what `Monitor` takes as its reference: `ImageBatches`, or the small images that a network was trained on.

    Raise ValueError if none is given, and the checkpoint does not name such images."""
    if reference is not None:
        images = ImageBatches(reference, may_be_statistics=True)
        for line in images.notes:
            print(line, flush=True)
        return images
    *image_size, channels = outline.image_shape
    if math.prod(outline.image_shape) <= MOST_PIXELS:
        trained = load_weights(hub.resolve(ckpt), ema).config.get("args") or {}
        if trained.get("data_path") and not trained.get("streaming"):
            source = open_source(**{key: trained[key] for key in DATA_FLAGS if trained.get(key) is not None})
            if isinstance(source, Source) and not source.streamed:
                return small_images(source, image_size, channels, outline.model.num_classes, MOST_REFERENCES)
    raise ValueError("--reference is needed: the checkpoint names no training data of small images")


def attempt(function, *arguments):
    """Call a function on all ranks. Return (its result, None), or (None, a line) if it failed on any of them.

    Files that cannot be written are no such failure: they end the sweep."""
    result = problem = None
    try:
        result = function(*arguments)
    except NotFinite:
        problem = "the samples are not finite"
    except (ValueError, RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error.__cause__, OSError):
            raise
        problem = one_line(error)
    problem = next(filter(None, distributed.gather(problem)), None)
    return (result, None) if problem is None else (None, problem)


@dataclasses.dataclass
class Sweep:
    """Measures combinations; all ranks call it together. It returns the metric, or None if it has none.

    `load(**networks)` returns a `Pipeline`, of which one at a time is in memory; `how` is as for its `speed_up`, and
    `options` are OPTIONS. At most `most` combinations are measured, including those of earlier calls."""

    load: Callable
    how: tuple
    results: Results
    options: dict
    batch_size: int
    most: float = math.inf
    outline: Pipeline | None = None  # without weights
    asked: set = dataclasses.field(default_factory=set)
    loaded: dict = dataclasses.field(default_factory=dict)

    def networks(self, combination):
        """Return a combination's pipeline and its digests."""
        values = {key: combination[key] for key in NETWORKS if key in combination}
        if (key := str(values)) not in self.loaded:
            self.loaded.clear()
            pipeline = self.load(**values)
            digests = pipeline.digests()
            if self.how[1] and pipeline.device.type == "cpu":
                torch.compiler.reset()  # what is compiled there holds weights
            pipeline.speed_up(*self.how)
            self.loaded[key] = pipeline, digests
        return self.loaded[key]

    def open(self, axes):
        """Return the `outline` and the EMA's name of the first networks that load. Raise ValueError if none does."""
        problems = []
        for values in grid({key: axes[key] for key in NETWORKS if key in axes}):
            try:
                pipeline, _ = self.networks(values)
                network = build_on_meta(SiT, pipeline.model_config)
                self.outline = dataclasses.replace(pipeline, model=network, guide=None)
                return self.outline, values.get("ema", "ema")
            except ValueError as error:
                problems.append(error)
        raise problems[0]

    def __call__(self, combination):
        combination = effective(self.outline, combination)
        name = identifier(combination)
        if len(self.asked | {name}) > self.most:
            return None
        self.asked.add(name)
        loaded, problem = attempt(self._prepare, combination)
        row = distributed.on_rank_zero(self.results.find, combination, loaded[1] if loaded else {})
        folder, seeds, count = self.results.folder / "images", self.options["seeds"], self.options["num_samples"]
        shards = {seed: Shards(folder / f"{name}-seed-{seed}.npz", count, self.outline.image_shape) for seed in seeds}
        if row is None:
            content = {"error": problem} if problem else self._measure(shards, *loaded)
            row = {"id": name, "settings": combination} | content
            text = f"[{len(self.asked)}/{self.most}] {words_of(combination)}"
            distributed.on_rank_zero(self.results.append, row, text)
        if distributed.rank() == 0 and ("error" in row or not self.options["keep_images"]):
            for of_seed in shards.values():
                of_seed.remove()
        return row.get("mean")

    def _prepare(self, combination):
        """Return a combination's pipeline, what its images are made with, and its settings."""
        pipeline, digests = self.networks(combination)
        settings = settings_of(pipeline, combination)
        times = {key: value for key, value in settings.solver.items() if key == "time_grid"}  # as its file has them
        return pipeline, digests | times, settings

    def _measure(self, shards, pipeline, made_with, settings):
        """Draw the images of each seed into its `Shards`. Return what a row holds of them, or of the first failure."""
        values, counts, options = [], [], self.options
        for seed, of_seed in shards.items():
            settings = dataclasses.replace(settings, seed=seed)
            labels = draw_labels(of_seed.count, pipeline.model.num_classes, seed, options["balanced_labels"])
            identity = describe(pipeline, settings) | made_with | {"vae_precision": options["vae_precision"]}
            identity |= dict(balanced_labels=options["balanced_labels"], num_fid_samples=of_seed.count)
            if not distributed.on_rank_zero(of_seed.prepare, identity, False, False):
                _, problem = attempt(draw_missing, of_seed, pipeline, labels, settings, self.batch_size)
                if problem:
                    return {"error": problem}
                distributed.on_rank_zero(of_seed.finish, labels, identity)
            counts.append(distributed.on_rank_zero(read_json, of_seed.description))
            values.append(distributed.on_rank_zero(self.results.measure, of_seed.output))
        most = {key: max(count[key] for count in counts) for key in ("nfe", "forward_passes")}
        return statistics_of(values) | most | {"images": sum(s.count for s in shards.values()), "made_with": made_with}


if __name__ == "__main__":
    main()
