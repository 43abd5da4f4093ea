"""FID, sFID, Inception Score, precision and recall of samples, by the protocol of ADM's evaluation suite.

    python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py digits.npz --reference digits-folder --features pixels

Precision and recall are computed in float32; ADM's suite rounds distances to float16, which moves them by some points.
"""

import pathlib

from evaluation.images import ImageBatches
from evaluation.metrics import inception_metrics, pixel_metrics
from utils import distributed, files
from utils.command_line import Parser, flag_group, integer, one_of, user_errors


def main():
    parser = Parser("FID, sFID, Inception Score, precision and recall, as ADM's suite computes them.")
    parser.add_argument("samples", type=pathlib.Path, help=".npz with arr_0 (uint8, N x H x W x C) or folder of images")
    add = flag_group(parser, "evaluation")
    add("--reference", pathlib.Path, "PATH", "as samples, or ADM's mu, sigma, mu_s and sigma_s", required=True)
    features = "pixels: for images too small for Inception; the metric is then fd_pixels"
    add("--features", one_of("inception", "pixels"), "inception|pixels", features, default="inception")
    add("--inception-weights", pathlib.Path, "FILE.pth", "in torch-fidelity's layout (default: download them once)")
    add("--batch-size", integer(1), "N", "images at a time", default=64)
    add("--json", pathlib.Path, "FILE.json", "write metrics and settings to this file")
    args = parser.parse_args()
    with user_errors(parser):
        if args.json is not None:
            files.check_output("--json", args.json, inputs=(args.samples, args.reference))
        samples, reference = ImageBatches(args.samples), ImageBatches(args.reference, may_be_statistics=True)
        for images in (samples, reference):
            if len(images) < 2 and not images.statistics:
                raise ValueError(f"{images.path}: a covariance needs two images or more, not {len(images)}")
        if args.features == "inception":
            results = inception_metrics(samples, reference, args.inception_weights, args.batch_size, distributed.init())
        elif args.inception_weights is None:
            results = pixel_metrics(samples, reference, args.batch_size)
        else:
            raise ValueError("--inception-weights has no effect with --features pixels")
    for key, value in results.items():
        if value is None or isinstance(value, float):
            print(f"{key:16} {'needs images in the reference' if value is None else f'{value:.4f}'}")
    print(f"{len(samples)} samples; {len(reference) or 'statistics, no'} reference images")
    if results["caveats"]:
        print(f"not comparable with published metrics: {'; '.join(results['caveats'])}")
    if args.json is not None:
        results |= {"n_samples": len(samples), "n_reference": len(reference) or None}
        results["reference_sha256"] = files.sha256(args.reference) if args.reference.is_file() else None
        results["settings"] = {key: str(value) for key, value in vars(args).items() if value is not None}
        files.write_json(args.json, results)


if __name__ == "__main__":
    main()
