"""The second half of `make demo`: draw digits from a checkpoint, write the picture, and say how good they are.

Two metrics, each beside its value for real digits:
- recognised: the share of class-conditional samples that a classifier trained on real digits assigns to their class;
  beside it, the same for real digits that the classifier was not trained on.
- Fréchet distance of the pixels to real digits, which grows when samples lack variety, however well each is recognised;
  beside it, the distance between two sets of real digits, and the distance at total collapse, one image per class.
"""

import pathlib

import numpy as np
from sklearn.svm import SVC

from data.sources import open_source
from evaluation.metrics import frechet_distance, moments, pixels
from sampling.draw import SampleSettings, describe, generate, summary
from sampling.flags import ODE_DEFAULTS
from sampling.guidance import resolve_cfg_scale
from sampling.pipeline import load_pipeline
from utils import command_line, distributed, files, grids

HELD_OUT_PER_CLASS = 50


def split_real(source):
    """Return two parts of a source, the second with 50 images of each class, as (pixels (N, D), labels (N,)) each."""
    rows = pixels(np.stack([np.asarray(image) for image, _ in source.examples]))
    labels = np.array([label for _, label in source.examples])
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == c][:HELD_OUT_PER_CLASS] for c in range(source.num_classes)])
    rest = np.setdiff1d(order, held_out)
    return (rows[rest], labels[rest]), (rows[held_out], labels[held_out])


def judge(images, labels, real, held_out):
    """Return the metrics above of uint8 images (N, H, W, C) of classes `labels` (N,); the parts are `split_real`'s."""
    rows, classes = real
    classifier, of_real = SVC().fit(rows, classes), moments(rows)
    centres = np.stack([rows[classes == c].mean(0) for c in np.unique(classes)])

    def recognised(rows, labels):
        return float((classifier.predict(rows) == labels).mean())

    def distance(rows):
        return frechet_distance(*moments(rows), *of_real)

    return {
        "recognised": recognised(pixels(images), labels),
        "recognised_real": recognised(*held_out),
        "fd_pixels": distance(pixels(images)),
        "fd_pixels_real": distance(held_out[0]),
        "fd_pixels_collapsed": distance(centres[held_out[1]]),
    }


def main():
    parser = command_line.Parser("Draw digits from a checkpoint trained on them and say how good they are.")
    add = command_line.flag_group(parser, "demo")
    add("--ckpt", str, "PATH", "run folder or checkpoint folder of a run on the digits", required=True)
    add("--samples-per-class", command_line.integer(10), "N", "images of each class", default=50)
    add("--cfg-scale", command_line.number(), "S", "guidance scale", default=1.5)
    add("--seed", command_line.integer(0), "SEED", "noise of image i depends on the seed and i alone", default=0)
    add("--output", pathlib.Path, "FILE.png", "picture of 100 samples (default: digits.png in the folder of --ckpt)")
    args = parser.parse_args()
    output = args.output or pathlib.Path(args.ckpt) / "digits.png"
    with command_line.user_errors(parser):
        grids.check_grid_output(output)
        pipeline = load_pipeline(args.ckpt, distributed.init())
        if (*pipeline.latent_shape, pipeline.model.num_classes) != (1, 8, 8, 10):
            raise ValueError(f"--ckpt {args.ckpt} is not of a run on the digits")
        resolve_cfg_scale(args.cfg_scale, pipeline.model)

    labels = list(range(10)) * args.samples_per_class
    settings = SampleSettings("ODE", ODE_DEFAULTS | {"num_steps": 50}, args.cfg_scale, seed=args.seed)
    images, counts = generate(pipeline, labels, settings, batch_size=500)
    grids.save_grid(images[:100], output, columns=10)
    description = describe(pipeline, settings) | counts
    metrics = judge(images, np.array(labels), *split_real(open_source("digits")))
    files.write_json(output.with_suffix(".json"), description | metrics)

    print(summary(description))
    recognised, recognised_real, distance, floor, collapsed = metrics.values()
    print(f"recognised: {recognised:.1%} of {len(labels)} samples ({recognised_real:.1%} of held-out real digits)")
    print(f"Fréchet distance of pixels to real digits: {distance:.3f}", end=" ")
    print(f"(real to real {floor:.3f}, one image per class {collapsed:.3f})")
    print(f"picture: {output}")


if __name__ == "__main__":
    main()
