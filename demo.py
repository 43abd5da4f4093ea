"""The second half of `make demo`: draw digits from a checkpoint, write the picture, and say how good they are.

- recognised: the share of samples that a classifier of real digits assigns to their class; beside it, that of real
  digits that the classifier was not trained on.
- Fréchet distance of pixels to real digits, which grows when samples lack variety, however well each is recognised;
  beside it, those of other real digits and of total collapse, one image per class.

Both see images of more than 16 pixels as means of blocks: the distance of 500 real images of mnist5k to the others is
10% of that of total collapse at 32x32 pixels, 6% at 16x16, and the classifier is as good."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

import pathlib

import numpy as np
from sklearn.svm import SVC

from data.sources import open_source
from evaluation.metrics import frechet_distance, moments, pixels
from sampling.draw import describe, generate, resolve_settings, summary
from sampling.flags import ODE_DEFAULTS
from sampling.pipeline import load_pipeline
from utils import command_line, distributed, files, grids

DATA = {(1, 8, 8, 10): "digits", (1, 32, 32, 10): "mnist5k"}  # by the latent shape and the classes of a run on them
MOST_SIDE = 16  # pixels
# 16 NFE; on the digits dopri5 makes 56, for the same metrics.
SOLVER = ODE_DEFAULTS | {"sampling_method": "ab4", "num_steps": 17}


def features(images):
    """Return uint8 images (N, H, H) or (N, H, H, 1) as rows (N, D) in [0, 1], of MOST_SIDE x MOST_SIDE means at most.

    H is at most MOST_SIDE, or a multiple of it."""
    block = max(1, images.shape[1] // MOST_SIDE)
    side = images.shape[1] // block
    return pixels(images).reshape(-1, side, block, side, block).mean((2, 4)).reshape(-1, side**2)


def split_real(source, count=50):
    """Return two parts of a source, the second with `count` images a class, each as (rows (N, D), labels (N,))."""
    rows = features(np.stack([np.asarray(image) for image, _ in source.examples]))
    labels = np.array([label for _, label in source.examples])
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == c][:count] for c in range(source.num_classes)])
    rest = np.setdiff1d(order, held_out)
    return (rows[rest], labels[rest]), (rows[held_out], labels[held_out])


def judge(images, labels, real, held_out):
    """Return the metrics above of uint8 images (N, H, H, 1) of classes `labels` (N,); the parts are `split_real`'s."""
    (rows, classes), (held_out_rows, held_out_classes) = real, held_out
    classifier, of_real = SVC().fit(rows, classes), moments(rows)
    centres = np.stack([rows[classes == c].mean(0) for c in np.unique(classes)])
    return {
        "recognised": classifier.score(features(images), labels),
        "recognised_real": classifier.score(held_out_rows, held_out_classes),
        "fd_pixels": frechet_distance(*moments(features(images)), *of_real),
        "fd_pixels_real": frechet_distance(*moments(held_out_rows), *of_real),
        "fd_pixels_collapsed": frechet_distance(*moments(centres[held_out_classes]), *of_real),
    }


def main():
    parser = command_line.Parser("Draw digits from a checkpoint trained on them and say how good they are.")
    add = command_line.flag_group(parser, "demo")
    add(
        "--ckpt", command_line.location, "PATH", "run or checkpoint folder of a run on digits or mnist5k", required=True
    )
    add("--samples-per-class", command_line.integer(10), "N", "images of each class", default=50)
    add("--cfg-scale", command_line.number(), "S", "guidance scale", default=1.5)
    add("--seed", command_line.integer(0), "SEED", "noise of image i depends on the seed and i alone", default=0)
    add("--output", command_line.path, "FILE.png", "picture of 100 samples (default: digits.png in --ckpt)")
    args = parser.parse_args()
    output = args.output or pathlib.Path(args.ckpt) / "digits.png"
    with command_line.user_errors(parser):
        grids.check_grid_output(output)
        pipeline = load_pipeline(args.ckpt, distributed.init())
        data = DATA.get((*pipeline.latent_shape, pipeline.model.num_classes))
        if data is None:
            raise ValueError(f"--ckpt {args.ckpt} is not of a run on {' or '.join(DATA.values())}")
        source = open_source(data)
        settings = resolve_settings(pipeline, "ODE", SOLVER, args.cfg_scale, None, args.seed)

        labels = list(range(10)) * args.samples_per_class
        images, counts = generate(pipeline, labels, settings, batch_size=100)
    description = describe(pipeline, settings) | counts
    metrics = judge(images, np.array(labels), *split_real(source))
    with command_line.user_errors(parser), files.named(f"--output {output}"):
        with files.written_whole(output) as partial:
            grids.save_grid(images[:100], partial, columns=10)
        files.write_json(output.with_suffix(".json"), description | metrics)
    recognised, recognised_real, distance, floor, collapsed = metrics.values()
    print(summary(description))
    print(f"recognised: {recognised:.1%} of {len(labels)} samples ({recognised_real:.1%} of held-out real digits)")
    print(f"Fréchet distance of pixels: {distance:.3f} (real to real {floor:.3f}, one image per class {collapsed:.3f})")
    print(f"picture: {output}")


if __name__ == "__main__":
    main()
