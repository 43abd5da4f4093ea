"""Draw a grid of images from a checkpoint: python sample.py ODE|SDE --ckpt results/000-SiT-XL-2-Linear-velocity-None"""

import math
import pathlib

import compute
import distributed
import options
import sampling


def build_parser():
    parser = options.Parser(description="Draw a grid of images from a SiT.")
    sampling.add_weights_flags(parser)
    options.add_transport_flags(parser, from_checkpoint=True)
    options.add_solver_flags(parser)
    sampling.add_guidance_flags(parser)
    sampling.add_speed_flags(parser)
    add = options.flag_group(parser, "images")
    labels = "classes to draw (default: eight of ImageNet's for 1000 classes, else the first ten)"
    add("--class-labels", options.integer(0), "LABEL", labels, nargs="+")
    add("--samples-per-class", options.integer(1), "N", "images of each label", default=1)
    add("--columns", options.integer(1), "N", "columns of the grid (default: by the number of images)")
    add("--batch-size", options.integer(1), "N", "images at a time", default=64)
    add("--seed", options.integer(0), "SEED", "noise of image i depends on the seed and i alone", default=0)
    output = "the grid; FILE.json beside it says how it was made"
    add("--output", pathlib.Path, "FILE.png", output, default=pathlib.Path("sample.png"))
    return parser


def main():
    # Check the flags, load the weights.
    parser = build_parser()
    args = parser.parse_args()
    with options.user_errors(parser):
        mode, settings = options.solver_settings(args)
        sampling.check_output(args.output)
        device = distributed.init()
        if distributed.rank() != 0:
            return distributed.shutdown()  # a grid is one process's work
        precision = compute.resolve_precision(args.precision, device, on_gpu="tf32")
        pipeline = sampling.load_pipeline(
            args.ckpt, device, args.guided_channels, args.vae_precision, **sampling.given_flags(args)
        )
        labels = args.class_labels or sampling.default_labels(pipeline.model.num_classes)
        sampling.check_labels(labels, pipeline.model.num_classes)
        cfg_scale = sampling.resolve_cfg_scale(args.cfg_scale, pipeline.model)
        cfg_interval = sampling.resolve_cfg_interval(args.cfg_interval, cfg_scale)
        how = dict(mode=mode, settings=settings, cfg_scale=cfg_scale, cfg_interval=cfg_interval, seed=args.seed)
        sampling.make_sample_function(pipeline.transport, mode, settings, sampling.ImageNoise(0, [], device))

    # Draw, and write the grid with the settings beside it.
    sampling.speed_up(pipeline, precision, args.compile)
    labels_of_images = labels * args.samples_per_class
    with options.user_errors(parser):
        batch_size = min(args.batch_size, len(labels_of_images))
        drawn, counts = sampling.draw(pipeline, labels_of_images, batch_size=batch_size, **how)
        if not drawn.isfinite().all():
            raise ValueError("the network's output is not finite")
        images = sampling.decode(pipeline, drawn, batch_size)
    columns = args.columns or (len(labels) if args.samples_per_class > 1 else max(4, math.ceil(math.sqrt(len(labels)))))
    sampling.save_grid(images, args.output, min(columns, len(images)))
    description = sampling.describe(pipeline, **how) | counts
    sampling.save_description(
        {
            **description,
            "ckpt": args.ckpt,
            "class_labels": labels,
            "samples_per_class": args.samples_per_class,
            "batch_size": args.batch_size,
        },
        args.output.with_suffix(".json"),
    )
    print(sampling.summary(description))
    print(args.output)


if __name__ == "__main__":
    main()
