"""Draw the samples that a FID is computed from, on one process or with torchrun on many.

    torchrun --nproc_per_node=8 sample_ddp.py SDE --ckpt runs/xl --cfg-scale 1.5 --output samples/xl.npz
    python evaluate.py samples/xl.npz --reference VIRTUAL_imagenet256_labeled.npz

Image i depends on the seed and i alone. Batches are kept beside the output until all are there, so that the same
command, typed again, draws what is missing.
"""

import json
import pathlib
import re
import shutil
import time

import numpy as np
from PIL import Image
from tqdm import tqdm

import compute
import distributed
import files
import options
import sampling

PART = re.compile(r"(\d+)-(\d+)\.npy")  # images from the first number up to, not including, the second
SETTINGS = "settings.json"

# What is behind the rows of the paper's tables for SiT-XL/2 at 256x256: 250 network calls each. The ODE's Heun is
# torchdiffeq's heun2, two calls a step. Rows: FID, sFID, Inception Score, precision, recall; None: not known here.
ODE_PROTOCOL = {"mode": "ODE", "sampling_method": "heun2", "num_sampling_steps": 126}
SDE_PROTOCOL = {"mode": "SDE", "sampling_method": "Euler", "num_sampling_steps": 250, "last_step_size": 0.04}
PROTOCOLS = {
    "paper-ode": (ODE_PROTOCOL | {"cfg_scale": 1.0}, None),
    "paper-sde": (SDE_PROTOCOL | {"cfg_scale": 1.0}, None),
    "paper-ode-cfg": (ODE_PROTOCOL | {"cfg_scale": 1.5}, "2.15, 4.60, 258.09, 0.81, 0.60"),
    "paper-sde-cfg": (SDE_PROTOCOL | {"cfg_scale": 1.5}, "2.06, 4.49, 277.50, 0.83, 0.59"),
}


def build_parser():
    parser = options.Parser(description="Draw many samples of a SiT into one .npz, as evaluations take them.")
    sampling.add_weights_flags(parser)
    options.add_transport_flags(parser, from_checkpoint=True)
    options.add_solver_flags(parser)
    sampling.add_guidance_flags(parser)
    sampling.add_speed_flags(parser)
    add = options.flag_group(parser, "images")
    add("--num-fid-samples", options.integer(1), "N", "images to draw", default=50_000)
    add("--per-proc-batch-size", options.integer(1), "N", "images at a time, per rank", default=32)
    add("--global-seed", options.integer(0), "SEED", "decides noise and label of image i, with i alone", default=0)
    balanced = "the same number of each class, in turn (default: labels uniform at random)"
    parser.add_argument("--balanced-labels", action="store_true", help=balanced)
    add("--sample-dir", pathlib.Path, "DIR", "where outputs with default names go", default=pathlib.Path("samples"))
    add("--output", pathlib.Path, "FILE.npz", "arr_0: images, arr_1: labels (default: named after the settings)")
    protocol = f"the settings behind a row of the paper's tables: {', '.join(PROTOCOLS)}"
    add("--protocol", options.one_of(*PROTOCOLS), "NAME", protocol)
    parser.add_argument("--save-png", action="store_true", help="write each image as a PNG, too, in FILE.pngs/")
    likelihood = "as in the official script; likelihood.py does it"
    parser.add_argument("--likelihood", action="store_true", help=likelihood)
    return parser


def main():
    # Check the flags, load the weights, see what is there.
    parser = build_parser()
    args = parser.parse_args()
    with options.user_errors(parser):
        if args.likelihood:
            raise ValueError(
                "--likelihood needs data; python likelihood.py --ckpt ... --data-path ... computes bits/dim"
            )
        if args.protocol is not None:
            apply_protocol(args, parser)
        settings = options.solver_settings(args)
        device = distributed.init()
        precision = compute.resolve_precision(args.precision, device, on_gpu="tf32")
        pipeline = sampling.load_pipeline(
            args.ckpt, device, args.guided_channels, args.vae_precision, **sampling.given_flags(args)
        )
        cfg_scale = sampling.resolve_cfg_scale(args.cfg_scale, pipeline.model)
        cfg_interval = sampling.resolve_cfg_interval(args.cfg_interval, cfg_scale)
        how = dict(
            mode=args.mode, settings=settings, cfg_scale=cfg_scale, cfg_interval=cfg_interval, seed=args.global_seed
        )
        sampling.make_sample_function(pipeline.transport, args.mode, settings, sampling.ImageNoise(0, [], device))
        labels = sampling.draw_labels(
            args.num_fid_samples, pipeline.model.num_classes, args.global_seed, args.balanced_labels
        )
        identity = {
            "weights_sha256": sampling.weights_digest(pipeline.model),
            "vae_precision": args.vae_precision,
            "balanced_labels": args.balanced_labels,
            "num_fid_samples": args.num_fid_samples,
        }
        sampling.speed_up(pipeline, precision, args.compile)
        identity |= sampling.describe(pipeline, **how)
        output = args.output or args.sample_dir / default_name(args, identity)
        state = distributed.on_rank_zero(prepare, output, identity, args.save_png)
        if state == "done":
            if distributed.rank() == 0:
                print(f"{output} is there, made with these settings")
            return distributed.shutdown()

    # Draw what is missing, each rank its share.
    parts = parts_folder(output)
    group = sampling.solver_group(settings, args.per_proc_batch_size)
    missing = distributed.on_rank_zero(missing_ranges, parts, args.num_fid_samples, group)
    mine = missing[distributed.rank() :: distributed.world_size()]
    start, most = time.perf_counter(), {}
    total = sum(end - begin for begin, end in mine)
    with tqdm(total=total, unit=" images", disable=None if distributed.rank() == 0 else True) as bar:

        def finish(drawn, begin):
            images = sampling.decode(pipeline, drawn, args.per_proc_batch_size).numpy()
            write_part(output, images, begin, args.save_png)
            bar.update(len(images))

        background = sampling.Background(device)
        for begin, end in mine:
            with options.user_errors(parser):
                drawn, counts = sampling.draw(
                    pipeline,
                    labels[begin:end].tolist(),
                    **how,
                    first_index=begin,
                    batch_size=args.per_proc_batch_size,
                    show_progress=False,
                )
            background.submit(finish, drawn, begin)
            most = {key: max(value, most.get(key, 0)) for key, value in counts.items()}
        background.close()
    seconds = time.perf_counter() - start

    # Put the parts together.
    everyone = distributed.from_all(most)
    most = {key: max((counts[key] for counts in everyone if counts), default=None) for key in sampling.COUNTS}
    seconds = max(distributed.from_all(seconds))
    description = {**identity, **most, "ckpt": args.ckpt}
    with options.user_errors(parser):
        distributed.on_rank_zero(write_output, output, labels, description)
    if distributed.rank() == 0:
        drawn = sum(end - begin for begin, end in missing)
        print(sampling.summary(description))
        if args.protocol is not None:
            row = PROTOCOLS[args.protocol][1]
            figures = "is not recorded here" if row is None else f"for SiT-XL/2 at 256x256: {row}"
            print(f"the paper's row (FID, sFID, Inception Score, precision, recall) by {args.protocol} {figures}")
        print(f"{drawn} images in {seconds:.1f} s, {drawn / seconds:.2f} images/s")
        print(output)
    distributed.shutdown()


def apply_protocol(args, parser):
    """Give the flags the values of --protocol. Raises ValueError for one that was given another value."""
    for name, value in PROTOCOLS[args.protocol][0].items():
        if getattr(args, name) not in (parser.get_default(name), value):
            flag = name if name == "mode" else f"--{name.replace('_', '-')}"
            raise ValueError(f"--protocol {args.protocol} has {flag} {value}, not {getattr(args, name)}")
        setattr(args, name, value)


def default_name(args, identity):
    """A file name that tells the settings that people compare."""
    ckpt = pathlib.Path(args.ckpt or f"{args.model or 'SiT-XL/2'}-{args.image_size or 256}".replace("/", "-"))
    steps = f"{identity['sampling_method']}-{identity['num_steps']}"
    name = f"{ckpt.name or 'model'}-{args.mode}-{steps}-cfg-{identity['cfg_scale']:g}-seed-{args.global_seed}"
    return f"{name}-{args.num_fid_samples}.npz"


def parts_folder(output):
    return output.with_name(output.name + ".parts")


def prepare(output, identity, save_png):
    """Make the folder of parts, or check that what is there was made with the same settings.

    Returns:
        'done' if the output is there, else 'begun'.

    Raises:
        ValueError: what is there was made with other settings, or is not of this script; or nothing can be made there.
    """
    if output.suffix != ".npz":
        raise ValueError(f"--output {output} must end in .npz")
    parts, description = parts_folder(output), output.with_suffix(".json")
    try:
        if output.exists():
            if not description.is_file():
                raise ValueError(f"{output} is there, and nothing says how it was made; give another --output")
            check_same(description, identity)
            return "done"
        if (parts / SETTINGS).is_file():
            check_same(parts / SETTINGS, identity)
        elif parts.exists() and any(parts.iterdir()):
            raise ValueError(f"{parts} is not empty, and what is there is not of sample_ddp.py")
        else:
            parts.mkdir(parents=True, exist_ok=True)
            with files.written_whole(parts / SETTINGS) as partial:
                partial.write_text(json.dumps(identity, indent=2) + "\n")
        if save_png:
            output.with_suffix(".pngs").mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: {error.strerror}") from error
    return "begun"


def check_same(path, identity):
    """Raise ValueError naming the first setting that differs from those in a JSON file."""
    try:
        there = json.loads(path.read_text())
        different = [key for key, value in identity.items() if there.get(key) != value]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if different:
        key = different[0]
        raise ValueError(f"{path}: made with {key} {there.get(key)!r}, not {identity[key]!r}; give another --output")


def missing_ranges(parts, count, group):
    """The ranges (begin, end) of images that no part holds, none longer than a group."""
    there = sorted(tuple(map(int, match.groups())) for match in map(PART.fullmatch, names(parts)) if match)
    ranges, begin = [], 0
    for first, last in (*there, (count, count)):
        ranges += [(i, min(i + group, first)) for i in range(begin, first, group)]
        begin = last
    return ranges


def names(folder):
    return [path.name for path in folder.iterdir()]


def write_part(output, images, begin, save_png):
    """Write images (N, H, W, C), the first of which has the number `begin`: as a part, and as PNGs if asked for."""
    end = begin + len(images)
    if save_png:
        for i, image in enumerate(images, begin):
            pixels = image[..., 0] if image.shape[-1] == 1 else image
            Image.fromarray(pixels).save(output.with_suffix(".pngs") / f"{i:06d}.png")
    path = parts_folder(output) / f"{begin:07d}-{end:07d}.npy"
    with files.written_whole(path) as partial, open(partial, "wb") as file:
        np.save(file, images)


def write_output(output, labels, description):
    """Write parts and labels as one .npz, part by part, and how they were made; then remove the parts.

    Raises:
        ValueError: a part is damaged.
    """
    parts = parts_folder(output)
    sampling.save_description(description, output.with_suffix(".json"))
    with files.written_whole(output) as partial:
        with files.NpzWriter(partial) as archive:
            paths = sorted(parts / name for name in names(parts) if PART.fullmatch(name))
            archive.write_array("arr_0", (load_part(path) for path in paths), len(labels))
            archive.write_array("arr_1", [labels], len(labels))
    shutil.rmtree(parts)


def load_part(path):
    begin, end = map(int, PART.fullmatch(path.name).groups())
    try:
        images = np.load(path, allow_pickle=False)
        if len(images) != end - begin or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"it holds {images.dtype} {images.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; without it, the same command draws it again") from error
    return images


if __name__ == "__main__":
    main()
