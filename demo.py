"""The second half of `make demo`: draw digits from a checkpoint, write the picture, and say how good they are.

Two figures, each beside what real digits give:
- recognised: the share of class-conditional samples that a classifier trained on real digits takes for their class;
  beside it, the same for real digits that it was not trained on.
- Fréchet distance of the pixels to real digits, which grows when samples lack variety, however well each is recognised;
  beside it, the distance between two sets of real digits, and what total collapse (one image per class) would give.
"""

import pathlib

import numpy as np
import torch
from sklearn.svm import SVC

import data
import distributed
import metrics
import options
import sampling

HELD_OUT_PER_CLASS = 50


def split_digits():
    """Real digits as ((pixels, labels) to compare with, (pixels, labels) held out: 50 of each class).

    Pixels are (N, 64) float64 in [0, 1].
    """
    source = data.open_source("digits")
    pixels = metrics.pixels(torch.stack([torch.from_numpy(np.array(image))[..., None] for image, _ in source.examples]))
    labels = np.array([label for _, label in source.examples])
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == c][:HELD_OUT_PER_CLASS] for c in range(source.num_classes)])
    rest = np.setdiff1d(order, held_out)
    return (pixels[rest], labels[rest]), (pixels[held_out], labels[held_out])


def judge(images, labels):
    """The figures of the module's head for uint8 images (N, 8, 8, 1) of the classes `labels` (N,)."""
    samples = metrics.pixels(images)
    (real, real_labels), (held_out, held_out_labels) = split_digits()
    classifier = SVC().fit(real, real_labels)
    centres = np.stack([real[real_labels == c].mean(0) for c in range(10)])
    of_real = metrics.moments(real)
    return {
        "recognised": float((classifier.predict(samples) == labels).mean()),
        "recognised_real": float((classifier.predict(held_out) == held_out_labels).mean()),
        "fd_pixels": metrics.frechet_distance(*metrics.moments(samples), *of_real),
        "fd_pixels_real": metrics.frechet_distance(*metrics.moments(held_out), *of_real),
        "fd_pixels_collapsed": metrics.frechet_distance(*metrics.moments(centres[held_out_labels]), *of_real),
    }


def main():
    parser = options.Parser(description="Draw digits from a checkpoint trained on them and say how good they are.")
    add = options.flag_group(parser, "demo")
    add("--ckpt", str, "PATH", "run folder or checkpoint folder of a run on the digits", required=True)
    add("--samples-per-class", options.integer(10), "N", "images of each class", default=50)
    add("--cfg-scale", options.number(), "S", "guidance scale", default=1.5)
    add("--seed", options.integer(0), "SEED", "noise of image i depends on the seed and i alone", default=0)
    add("--output", pathlib.Path, "FILE.png", "picture of 100 samples (default: digits.png in the folder of --ckpt)")
    args = parser.parse_args()
    output = args.output or pathlib.Path(args.ckpt) / "digits.png"
    with options.user_errors(parser):
        sampling.check_output(output)
        pipeline = sampling.load_pipeline(args.ckpt, distributed.init())
        if (pipeline.model.input_size, pipeline.model.in_channels, pipeline.model.num_classes) != (8, 1, 10):
            raise ValueError(f"--ckpt {args.ckpt} is not of a run on the digits")
        sampling.resolve_cfg_scale(args.cfg_scale, pipeline.model)

    labels = list(range(10)) * args.samples_per_class
    how = dict(mode="ODE", settings=options.ODE_DEFAULTS | {"num_steps": 50}, cfg_scale=args.cfg_scale, seed=args.seed)
    images, counts = sampling.generate(pipeline, labels, batch_size=500, **how)
    sampling.save_grid(images[:100], output, columns=10)
    description = sampling.describe(pipeline, **how) | counts
    figures = judge(images, np.array(labels))
    sampling.save_description({**description, **figures}, output.with_suffix(".json"))

    print(sampling.summary(description))
    print(
        f"recognised: {figures['recognised']:.1%} of {len(labels)} samples "
        f"({figures['recognised_real']:.1%} of held-out real digits)"
    )
    print(
        f"Fréchet distance of pixels to real digits: {figures['fd_pixels']:.3f} "
        f"(real to real {figures['fd_pixels_real']:.3f}, one image per class {figures['fd_pixels_collapsed']:.3f})"
    )
    print(f"picture: {output}")


if __name__ == "__main__":
    main()
