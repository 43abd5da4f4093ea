"""Draw the samples for a FID, on one process or with torchrun on many.

    torchrun --nproc_per_node=8 sample_ddp.py SDE --ckpt runs/xl --cfg-scale 1.5 --output samples/xl.npz
    python evaluate.py samples/xl.npz --reference VIRTUAL_imagenet256_labeled.npz

Image i depends on (seed, i) alone. Stopped and typed again, the same command draws the missing images."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

import pathlib
import time

import numpy as np

from evaluation.images import ImageBatches
from sampling import flags
from sampling.draw import describe, draw_labels, resolve_settings, summary
from sampling.pipeline import load_pipeline
from sampling.shards import Shards, draw_missing
from utils import distributed
from utils.command_line import Parser, flag_group, flag_name, given, integer, one_of, path, user_errors
from utils.files import named
from utils.precision import resolve_precision
from utils.sizes import size_name

# The settings of the paper's tables for SiT-XL/2 at 256x256, at 250 NFE; the ODE's Heun is torchdiffeq's heun2, two
# evaluations per step. Rows: FID, sFID, Inception Score, precision, recall.
ODE_PROTOCOL = {"mode": "ODE", "num_sampling_steps": 126, **flags.ODE_DEFAULTS, "sampling_method": "heun2"}
SDE_PROTOCOL = {"mode": "SDE", "num_sampling_steps": 250, **flags.SDE_DEFAULTS}
PROTOCOLS = {
    "paper-ode": (ODE_PROTOCOL | {"cfg_scale": 1.0}, "9.35, 6.38, 126.06, 0.67, 0.68"),
    "paper-sde": (SDE_PROTOCOL | {"cfg_scale": 1.0}, "8.26, 6.32, 131.65, 0.68, 0.67"),
    "paper-ode-cfg": (ODE_PROTOCOL | {"cfg_scale": 1.5}, "2.15, 4.60, 258.09, 0.81, 0.60"),
    "paper-sde-cfg": (SDE_PROTOCOL | {"cfg_scale": 1.5}, "2.06, 4.49, 277.50, 0.83, 0.59"),
}
NOT_IN_PROTOCOLS = ("time_grid", "time_shift", "cfg_interval", "internal_guidance", *flags.GUIDE_FLAGS)
PAPER_MODEL = dict(hidden_size=1152, depth=28, patch_size=2, input_size=32, in_channels=4, num_classes=1000)
PAPER_COUNT = 50_000


def build_parser():
    parser = Parser("Draw many samples of a SiT into one .npz for evaluation.")
    flags.add_sampling_flags(parser)
    add = flag_group(parser, "images")
    add("--num-fid-samples", integer(1), "N", "images to draw", default=50_000)
    add("--per-proc-batch-size", integer(1), "N", "images at a time, per rank", default=32)
    add("--global-seed", integer(0), "SEED", "seed; noise and label of image i depend on it and i alone", default=0)
    add("--balanced-labels", None, None, "draw each class in turn (default: labels uniform at random)")
    add("--sample-dir", path, "DIR", "folder of outputs with default names", default=pathlib.Path("samples"))
    add("--output", path, "FILE.npz", "arr_0: images, arr_1: labels (default: named after the settings)")
    add("--protocol", one_of(*PROTOCOLS), "NAME", f"settings of a row of the paper's tables: {', '.join(PROTOCOLS)}")
    add("--save-png", None, None, "write each image as a PNG, too, in FILE.pngs/")
    add("--likelihood", None, None, "as in the official script; here likelihood.py computes it")
    return parser


def main():
    # Check the flags, load the weights, find the shards of an earlier call.
    parser = build_parser()
    args = parser.parse_args()
    with user_errors(parser):
        if args.likelihood:
            raise ValueError("--likelihood needs data: python likelihood.py --ckpt ... --data-path ...")
        if args.protocol is not None:
            vars(args).update(protocol_settings(args.protocol, vars(args)))
        mode, solver = flags.solver_settings(args.mode, given(args, flags.SOLVER_FLAGS))
        device = distributed.init()
        precision = resolve_precision(args.precision, device, on_gpu="tf32")
        weights = given(args, flags.WEIGHTS_FLAGS + flags.GUIDE_FLAGS)
        pipeline = load_pipeline(args.ckpt, device, args.guided_channels, args.vae_precision, **weights)
        guided = args.cfg_scale, args.cfg_interval, args.global_seed, args.internal_guidance
        settings = resolve_settings(pipeline, mode, solver, *guided)
        if distributed.rank() == 0:
            given_for = mode, solver, settings.cfg_scale, pipeline.space.in_pixels
            more = [(args.output is not None, ("sample_dir",), "beside --output")]
            notes = flags.grid_notes(args.time_grid, describe(pipeline, settings))
            for line in [*flags.without_effect(parser.changed, *given_for, more), *notes]:
                print(line, flush=True)
        count, digests = args.num_fid_samples, pipeline.digests()
        pipeline.speed_up(precision, args.compile)
        identity = describe(pipeline, settings) | digests | dict(vae_precision=args.vae_precision)
        identity |= dict(balanced_labels=args.balanced_labels, num_fid_samples=count)
        ckpt = args.ckpt or f"{args.model or 'SiT-XL/2'}-{size_name(args.image_size or 256)}".replace("/", "-")
        solver_text = f"{mode}-{solver['sampling_method']}-{solver['num_steps']}-cfg-{settings.cfg_scale:g}"
        solver_text += f"-by-{pathlib.Path(args.guide_ckpt).name}" if args.guide_ckpt else ""
        solver_text += "".join(f"-ig-{word:g}" for word in (settings.internal_guidance or ())[:1])
        name = f"{pathlib.Path(ckpt).name or 'model'}-{solver_text}-seed-{args.global_seed}-{count}.npz"
        output = args.output or args.sample_dir / name
        shards = Shards(output, count, pipeline.image_shape)
        complete = distributed.on_rank_zero(shards.prepare, identity, args.save_png)
        if args.save_png:
            distributed.on_rank_zero(write_existing_pngs, shards, complete)
        if complete:
            if distributed.rank() == 0:
                print(f"{output} exists, made with these settings")
            return distributed.shutdown()

    # Draw the missing images, each rank its share, and put the shards together.
    labels = draw_labels(count, pipeline.model.num_classes, args.global_seed, args.balanced_labels)
    start = time.perf_counter()
    with user_errors(parser):
        total = draw_missing(shards, pipeline, labels, settings, args.per_proc_batch_size, args.save_png)
        distributed.barrier()
        seconds = time.perf_counter() - start
        identity |= {"ckpt": args.ckpt, "vae_name": pipeline.space.name} | given(args, ("ema", *flags.GUIDE_FLAGS))
        description = distributed.on_rank_zero(shards.finish, labels, identity)
    if distributed.rank() == 0:
        print(summary(description))
        if args.protocol is not None:
            print(paper_row(args.protocol, pipeline.model_config, count))
        print(f"{total} images in {seconds:.1f} s, {total / seconds:.2f} images/s")
        print(output)
    distributed.shutdown()


def write_existing_pngs(shards, complete):
    """Write the PNGs of images that an earlier call drew without --save-png."""
    with named(shards.pngs):
        if complete:
            for i, images in enumerate(ImageBatches(shards.output).batches(256)):
                shards.write_pngs(images, 256 * i)
            return
        for (begin, _), path in shards.intact().items():
            shards.write_pngs(np.load(path, allow_pickle=False), begin)


def protocol_settings(protocol, given):
    """Return {key: value} of a protocol's settings. Raise ValueError for a flag that was given another value."""
    settings = PROTOCOLS[protocol][0] | dict.fromkeys(NOT_IN_PROTOCOLS)
    for key, value in settings.items():
        if given[key] not in (None, value):
            flag = key if key == "mode" else flag_name(key)
            raise ValueError(f"--protocol {protocol} has {flag} {value}, not {given[key]}")
    return settings


def paper_row(protocol, model_config, count):
    """Return a line: the protocol's row of the paper's table, and whether these samples compare with it."""
    metrics = "FID, sFID, Inception Score, precision, recall"
    line = f"the paper's row ({metrics}) for SiT-XL/2 at 256x256: {PROTOCOLS[protocol][1]}"
    if count != PAPER_COUNT or any(model_config[key] != value for key, value in PAPER_MODEL.items()):
        line += f"; these samples do not compare with it: they are not {PAPER_COUNT} of that model"
    return line


if __name__ == "__main__":
    main()
