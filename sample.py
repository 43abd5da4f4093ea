"""Draw a grid of images from a checkpoint: python sample.py ODE|SDE --ckpt results/000-SiT-XL-2-Linear-velocity-None"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

import math
import pathlib

from sampling import flags, trajectory
from sampling.draw import describe, generate, resolve_settings, summary
from sampling.pipeline import default_labels, load_pipeline
from utils import distributed, files
from utils.command_line import Parser, flag_group, given, integer, path, user_errors
from utils.grids import check_grid_output, save_grid
from utils.precision import resolve_precision


def build_parser():
    parser = Parser("Draw a grid of images from a SiT.")
    flags.add_sampling_flags(parser)
    add = flag_group(parser, "images")
    add("--class-labels", integer(0), "LABEL", "classes (default: eight of ImageNet's, or the first ten)", nargs="+")
    add("--samples-per-class", integer(1), "N", "images of each label", default=1)
    add("--columns", integer(1), "N", "columns of the grid (default: by the number of images)")
    add("--batch-size", integer(1), "N", "images at a time", default=64)
    add("--seed", integer(0), "SEED", "seed; the noise of image i depends on it and i alone", default=0)
    add("--output", path, "FILE.png", "grid; FILE.json stores the settings", default=pathlib.Path("sample.png"))
    pictures = f"also write x_t and the predicted data over time, of the first {trajectory.MOST_IMAGES} images"
    add("--trajectory", path, "FILE.png|FILE.gif", pictures)
    return parser


def main():
    # Check the flags, load the weights.
    parser = build_parser()
    args = parser.parse_args()
    with user_errors(parser):
        mode, solver = flags.solver_settings(args.mode, given(args, flags.SOLVER_FLAGS))
        check_grid_output(args.output, inputs=(args.time_grid or ())[:1])
        if args.trajectory is not None:
            trajectory.check_output(args.trajectory, args.output)
        device = distributed.init()
        if distributed.rank() != 0:
            return distributed.shutdown()  # one process draws the grid
        precision = resolve_precision(args.precision, device, on_gpu="tf32")
        weights = given(args, flags.WEIGHTS_FLAGS + flags.GUIDE_FLAGS)
        pipeline = load_pipeline(args.ckpt, device, args.guided_channels, args.vae_precision, **weights)
        labels = args.class_labels or default_labels(pipeline.model.num_classes)
        if max(labels) >= pipeline.model.num_classes:
            most = pipeline.model.num_classes - 1
            raise ValueError(f"class label {max(labels)} is out of range: the model's are 0 to {most}")
        guided = args.cfg_scale, args.cfg_interval, args.seed, args.internal_guidance
        settings = resolve_settings(pipeline, mode, solver, *guided)
        given_for = mode, solver, settings.cfg_scale, pipeline.space.in_pixels
        notes = flags.grid_notes(args.time_grid, describe(pipeline, settings))
        for line in [*flags.without_effect(parser.changed, *given_for), *notes]:
            print(line, flush=True)

    # Draw, and write the grid and its settings.
    pipeline.speed_up(precision, args.compile)
    labels_of_images = labels * args.samples_per_class
    batch_size = min(args.batch_size, len(labels_of_images))
    record = None if args.trajectory is None else trajectory.Record(pipeline.transport)
    with user_errors(parser):
        images, counts = generate(pipeline, labels_of_images, settings, batch_size=batch_size, record=record)
    columns = args.columns or (len(labels) if args.samples_per_class > 1 else max(4, math.ceil(math.sqrt(len(labels)))))
    description = describe(pipeline, settings) | counts
    description |= given(args, ("ema", *flags.GUIDE_FLAGS))
    images_flags = {key: getattr(args, key) for key in ("ckpt", "samples_per_class", "batch_size")}
    with user_errors(parser), files.named(f"--output {args.output}"):
        with files.written_whole(args.output) as partial:
            save_grid(images, partial, min(columns, len(images)))
        files.write_json(args.output.with_suffix(".json"), description | images_flags | {"class_labels": labels})
    print(summary(description))
    print(args.output)
    if record is not None:
        with user_errors(parser), files.named(f"--trajectory {args.trajectory}"):
            shown = trajectory.write(args.trajectory, pipeline, record, images)
        print(f"{args.trajectory}: {shown} of {len(images)} images over time")


if __name__ == "__main__":
    main()
