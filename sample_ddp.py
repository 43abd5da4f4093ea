"""Draw the samples that a FID is computed from, on one process or with torchrun on many.

    torchrun --nproc_per_node=8 sample_ddp.py SDE --ckpt runs/xl --cfg-scale 1.5 --output samples/xl.npz
    python evaluate.py samples/xl.npz --reference VIRTUAL_imagenet256_labeled.npz

Image i depends on the seed and i alone. Batches are kept beside the output until all are there, so that the same
command, typed again, draws what is missing.
"""

import pathlib
import time

from tqdm import tqdm

import compute
import distributed
import options
import sampling
from parts import DONE, Parts

# What is behind the rows of the paper's tables for SiT-XL/2 at 256x256: 250 network calls each. The ODE's Heun is
# torchdiffeq's heun2, two calls a step. Rows: FID, sFID, Inception Score, precision, recall.
ODE_PROTOCOL = {"mode": "ODE", "num_sampling_steps": 126, **options.ODE_DEFAULTS, "sampling_method": "heun2"}
SDE_PROTOCOL = {"mode": "SDE", "num_sampling_steps": 250, **options.SDE_DEFAULTS}
PROTOCOLS = {
    "paper-ode": (ODE_PROTOCOL | {"cfg_scale": 1.0}, "9.35, 6.38, 126.06, 0.67, 0.68"),
    "paper-sde": (SDE_PROTOCOL | {"cfg_scale": 1.0}, "8.26, 6.32, 131.65, 0.68, 0.67"),
    "paper-ode-cfg": (ODE_PROTOCOL | {"cfg_scale": 1.5}, "2.15, 4.60, 258.09, 0.81, 0.60"),
    "paper-sde-cfg": (SDE_PROTOCOL | {"cfg_scale": 1.5}, "2.06, 4.49, 277.50, 0.83, 0.59"),
}
NOT_IN_PROTOCOLS = ("time_shift", "cfg_interval")  # none has them
PAPERS_MODEL = dict(hidden_size=1152, depth=28, patch_size=2, input_size=32, in_channels=4, num_classes=1000)
PAPERS_COUNT = 50_000


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
            apply_protocol(args)
        mode, settings = options.solver_settings(args)
        device = distributed.init()
        precision = compute.resolve_precision(args.precision, device, on_gpu="tf32")
        pipeline = sampling.load_pipeline(
            args.ckpt, device, args.guided_channels, args.vae_precision, **sampling.given_flags(args)
        )
        cfg_scale = sampling.resolve_cfg_scale(args.cfg_scale, pipeline.model)
        cfg_interval = sampling.resolve_cfg_interval(args.cfg_interval, cfg_scale)
        how = dict(mode=mode, settings=settings, cfg_scale=cfg_scale, cfg_interval=cfg_interval, seed=args.global_seed)
        sampling.make_sample_function(pipeline.transport, mode, settings, sampling.ImageNoise(0, [], device))
        count = args.num_fid_samples
        labels = sampling.draw_labels(count, pipeline.model.num_classes, args.global_seed, args.balanced_labels)
        digests = sampling.digests(pipeline)
        sampling.speed_up(pipeline, precision, args.compile)
        identity = {
            **sampling.describe(pipeline, **how),
            **digests,
            "vae_precision": args.vae_precision,
            "balanced_labels": args.balanced_labels,
            "num_fid_samples": count,
        }
        output = args.output or args.sample_dir / default_name(args, identity)
        parts = Parts(output, count, pipeline.image_shape)
        state = distributed.on_rank_zero(parts.prepare, identity, args.save_png)
        if args.save_png:
            distributed.on_rank_zero(parts.write_pngs_of_what_is_there)
        if state == DONE:
            if distributed.rank() == 0:
                print(f"{output} is there, made with these settings")
            return distributed.shutdown()

    # Draw what is missing, each rank its share.
    world_size = distributed.world_size()
    missing = distributed.on_rank_zero(parts.missing, sampling.solver_group(settings, args.per_proc_batch_size))
    mine = missing[distributed.rank() :: world_size]
    start, total = time.perf_counter(), sum(end - begin for begin, end in missing)
    with (
        options.user_errors(parser),
        tqdm(total=total, unit=" images", disable=None if distributed.rank() == 0 else True) as bar,
        sampling.Background(device) as background,
    ):

        def finish(drawn, begin, counts):
            if not drawn.isfinite().all():
                raise ValueError(f"the network's output is not finite for images {begin} to {begin + len(drawn) - 1}")
            images = sampling.decode(pipeline, drawn, args.per_proc_batch_size).numpy()
            parts.write(images, begin, counts, args.save_png)
            bar.update(min(len(images) * world_size, total - bar.n))  # the other ranks are about as far

        for begin, end in mine:
            drawn, counts = sampling.draw(
                pipeline,
                labels[begin:end].tolist(),
                **how,
                first_index=begin,
                batch_size=args.per_proc_batch_size,
                show_progress=False,
            )
            background.submit(finish, drawn, begin, counts)
    distributed.barrier()
    seconds = time.perf_counter() - start

    # Put the parts together.
    with options.user_errors(parser):
        description = distributed.on_rank_zero(
            put_together, parts, labels, identity | {"ckpt": args.ckpt, "vae_name": pipeline.space.name}
        )
    if distributed.rank() == 0:
        print(sampling.summary(description))
        if args.protocol is not None:
            print(papers_row(args.protocol, pipeline.model_config, count))
        print(f"{total} images in {seconds:.1f} s, {total / seconds:.2f} images/s")
        print(output)
    distributed.shutdown()


def put_together(parts, labels, description):
    """Write the output; its description, with what the parts say."""
    counts = dict(zip(sampling.COUNTS, parts.counts(), strict=True))
    parts.finish(labels, description | counts)
    return description | counts


def apply_protocol(args):
    """Give the flags the values of --protocol. Raises ValueError for one that was given another value."""
    settings = PROTOCOLS[args.protocol][0] | dict.fromkeys(NOT_IN_PROTOCOLS)
    for name, value in settings.items():
        given = getattr(args, name)
        if given is not None and given != value:
            flag = name if name == "mode" else f"--{name.replace('_', '-')}"
            raise ValueError(f"--protocol {args.protocol} has {flag} {value}, not {given}")
        setattr(args, name, value)


def papers_row(protocol, model_config, count):
    """A line: the row of the paper's table that a protocol stands for, and whether these samples compare with it."""
    figures = "FID, sFID, Inception Score, precision, recall"
    line = f"the paper's row ({figures}) for SiT-XL/2 at 256x256: {PROTOCOLS[protocol][1]}"
    if count != PAPERS_COUNT or any(model_config[key] != value for key, value in PAPERS_MODEL.items()):
        line += f"; these samples do not compare with it: they are not {PAPERS_COUNT} of that model"
    return line


def default_name(args, identity):
    """A file name that tells the settings that people compare."""
    ckpt = pathlib.Path(args.ckpt or f"{args.model or 'SiT-XL/2'}-{args.image_size or 256}".replace("/", "-"))
    steps = f"{identity['sampling_method']}-{identity['num_steps']}"
    name = f"{ckpt.name or 'model'}-{identity['mode']}-{steps}-cfg-{identity['cfg_scale']:g}-seed-{args.global_seed}"
    return f"{name}-{args.num_fid_samples}.npz"


if __name__ == "__main__":
    main()
