"""FID, sFID, Inception Score, precision and recall of samples, by the protocol of ADM's evaluation suite.

    python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py digits.npz --reference digits-folder --features pixels

Precision and recall are computed in float32; ADM's suite rounds distances to float16, which moves them by some points.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

from evaluation.images import ImageBatches
from evaluation.metrics import inception_metrics, pixel_metrics
from utils import distributed, files
from utils.command_line import Parser, flag_group, integer, one_of, path, user_errors


def main():
    parser = Parser("FID, sFID, Inception Score, precision and recall, as ADM's suite computes them.")
    parser.add_argument("samples", type=path, help=".npz with arr_0 (uint8, N x H x W x C) or folder of images")
    add = flag_group(parser, "evaluation")
    statistics = "as samples, or statistics: mu, sigma and, for sFID, mu_s and sigma_s"
    add("--reference", path, "PATH", statistics, required=True)
    features = "pixels: for images too small for Inception; the metric is then fd_pixels"
    add("--features", one_of("inception", "pixels"), "inception|pixels", features, default="inception")
    add("--inception-weights", path, "FILE.pth", "in torch-fidelity's layout (default: download them once)")
    add("--batch-size", integer(1), "N", "images at a time", default=64)
    add("--json", path, "FILE.json", "write metrics and settings to this file")
    args = parser.parse_args()
    with user_errors(parser):
        if args.features == "pixels" and args.inception_weights is not None:
            raise ValueError("--inception-weights has no effect with --features pixels")
        if args.json is not None:
            files.check_output("--json", args.json, inputs=(args.samples, args.reference))
        device = distributed.init()
        if distributed.rank() != 0:
            return distributed.shutdown()  # one process evaluates
        print(f"reading {args.samples} and {args.reference}", flush=True)
        samples, reference = ImageBatches(args.samples), ImageBatches(args.reference, may_be_statistics=True)
        for images in (samples, reference):
            for line in images.notes:
                print(line, flush=True)
            if len(images) < 2 and not images.statistics:
                raise ValueError(f"{images.path}: a covariance needs two images or more, not {len(images)}")
        if args.features == "inception":
            results = inception_metrics(samples, reference, args.inception_weights, args.batch_size, device)
        else:
            results = pixel_metrics(samples, reference, args.batch_size)
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
        with user_errors(parser), files.named(f"--json {args.json}"):
            files.write_json(args.json, results)
    distributed.shutdown()


if __name__ == "__main__":
    main()
