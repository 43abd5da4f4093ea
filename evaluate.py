"""FID, sFID, Inception Score, precision and recall of samples, by the protocol of ADM's evaluation suite.

    python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py digits.npz --reference digits-folder --features pixels

Samples and reference are each an .npz with arr_0 (uint8, N x H x W x C) or a folder of images; the reference may hold
precomputed statistics (mu, sigma, mu_s, sigma_s), as ADM's do. The network is torch-fidelity's Inception of 2015, with
TensorFlow's resizing. Precision and recall are computed in float32; ADM's suite compares distances in float16, which
moves them by some points and depends on the machine.
"""

import pathlib

from evaluation.images import ImageBatches
from evaluation.inception import inception_metrics
from evaluation.metrics import pixel_metrics
from utils import command_line, distributed, files

PRINTED = ("fid", "sfid", "inception_score", "precision", "recall", "fd_pixels", "fd_pixels_floor")


def build_parser():
    parser = command_line.Parser("FID, sFID, Inception Score, precision and recall, as ADM's suite computes them.")
    parser.add_argument("samples", type=pathlib.Path, help=".npz with arr_0, or a folder of images")
    add = command_line.flag_group(parser, "evaluation")
    reference = ".npz with arr_0 or with statistics (mu, sigma, mu_s, sigma_s), or a folder of images"
    add("--reference", pathlib.Path, "PATH", reference, required=True)
    features = "inception, or pixels for images too small for Inception: the metric is then fd_pixels"
    add("--features", command_line.one_of("inception", "pixels"), "inception|pixels", features, default="inception")
    weights = "Inception's weights in torch-fidelity's layout (default: download them once)"
    add("--inception-weights", pathlib.Path, "FILE.pth", weights)
    add("--batch-size", command_line.integer(1), "N", "images at a time", default=64)
    add("--json", pathlib.Path, "FILE.json", "write metrics and settings to this file")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        if args.json is not None:
            files.check_output("--json", args.json, inputs=(args.samples, args.reference))
        samples, reference = ImageBatches(args.samples), ImageBatches(args.reference, may_be_statistics=True)
        for images in (samples, reference):
            if len(images) < 2 and not images.statistics:
                raise ValueError(f"{images.path}: a covariance needs two images or more, not {len(images)}")
        if args.features == "inception":
            device = distributed.init()
            results = inception_metrics(samples, reference, args.inception_weights, args.batch_size, device)
        elif args.inception_weights is None:
            results = pixel_metrics(samples, reference, args.batch_size)
        else:
            raise ValueError("--inception-weights has no effect with --features pixels")
    results |= {
        "n_samples": len(samples),
        "n_reference": len(reference) or None,
        "reference_sha256": files.sha256(args.reference) if args.reference.is_file() else None,
        "settings": {key: str(value) for key, value in vars(args).items() if value is not None},
    }
    for key in PRINTED:
        if key in results:
            value = results[key]
            print(f"{key:16} {'needs images in the reference' if value is None else f'{value:.4f}'}")
    print(f"{len(samples)} samples; {len(reference) or 'statistics, no'} reference images")
    if results["caveats"]:
        print(f"not comparable with published results: {'; '.join(results['caveats'])}")
    if args.json is not None:
        files.write_json(args.json, results)


if __name__ == "__main__":
    main()
