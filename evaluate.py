"""FID, sFID, Inception Score, precision and recall of samples, by the protocol of ADM's evaluation suite, and more.

    python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py digits.npz --reference digits-folder --features pixels
    python evaluate.py samples.npz --reference imagenet-folder --features dinov2
    python evaluate.py my-images --save-statistics my-images.npz

Precision and recall are computed in float32; ADM's suite rounds distances to float16, which moved them by up to 0.11.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

from evaluation.features import DINOV2, Inception, Pixels, ViT
from evaluation.images import ImageBatches, write_statistics
from evaluation.metrics import check_reference, collect, network_metrics, pixel_metrics
from utils import distributed, files
from utils.command_line import Parser, flag_group, flag_name, given, integer, one_of, path, user_errors

FEATURES = {"inception": ("inception_weights",), "dinov2": ("feature_model", "feature_weights"), "pixels": ()}  # flags


def make_parser():
    """Return the parser of evaluate.py."""
    parser = Parser("FID, sFID, Inception Score, precision and recall, as ADM's suite computes them; KID; FD-DINOv2.")
    parser.add_argument("samples", type=path, help=".npz with arr_0 (uint8, N x H x W x C) or folder of images")
    add = flag_group(parser, "evaluation")
    add("--reference", path, "PATH", "as samples, or statistics: mu, sigma and, for sFID, mu_s and sigma_s")
    features = "dinov2: fd_dinov2; pixels: fd_pixels, for images too small for Inception"
    add("--features", one_of(*FEATURES), "|".join(FEATURES), features, default="inception")
    add("--inception-weights", path, "FILE.pth", "in torch-fidelity's layout (default: download them once)")
    add("--feature-model", str, "NAME", f"a ViT of timm for --features dinov2 (default: {DINOV2})")
    add("--feature-weights", path, "FILE", "its weights, .safetensors or .pth (default: timm's, downloaded once)")
    add("--batch-size", integer(1), "N", "images at a time", default=64)
    add("--save-statistics", path, "FILE.npz", "write statistics of the samples, which --reference takes; needs none")
    add("--json", path, "FILE.json", "write metrics and settings to this file")
    return parser


def check_flags(features, flags_of_features, outputs, inputs):
    """Raise ValueError if flags of features have no effect, or an output cannot be written; both are {key: value}."""
    for key in sorted(flags_of_features.keys() - set(FEATURES[features])):
        raise ValueError(f"{flag_name(key)} has no effect with --features {features}")
    for key, output in outputs.items():
        files.check_output(flag_name(key), output, inputs)
    if len({output.resolve() for output in outputs.values()}) < len(outputs):
        raise ValueError(f"{' and '.join(map(flag_name, outputs))} are one file")
    statistics = outputs.get("save_statistics")
    if statistics is not None and statistics.suffix != ".npz":
        raise ValueError(f"--save-statistics {statistics} must end in .npz")


def open_images(location, may_be_statistics):
    """Return the `ImageBatches` of a path, and print its notes. Raise ValueError if there are too few images."""
    images = ImageBatches(location, may_be_statistics)
    for line in images.notes:
        print(line, flush=True)
    if len(images) == 1 or not (len(images) or images.statistics):
        raise ValueError(f"{images.path}: a covariance needs two images or more, not {len(images)}")
    return images


def report(results, num_samples, num_references):
    """Print metrics, of how many images they are, and why they are not comparable with published ones."""
    for key, value in results.items():
        if value is None or isinstance(value, float):
            digits = ".4f" if value is None or abs(value) >= 0.01 else ".3g"  # a good KID is below 0.001
            print(f"{key:16} {'needs images in the reference' if value is None else format(value, digits)}")
    print(f"{num_samples} samples; {num_references or 'statistics, no'} reference images")
    if results["caveats"]:
        print(f"not comparable with published metrics: {'; '.join(results['caveats'])}")


def main():
    parser = make_parser()
    args = parser.parse_args()
    with user_errors(parser):
        if args.reference is None and (args.save_statistics is None or args.json is not None):
            raise ValueError("--reference is required, but for --save-statistics without --json")
        inputs = given(args, ("samples", "reference", "inception_weights", "feature_weights")).values()
        flags_of_features = given(args, (key for keys in FEATURES.values() for key in keys))
        check_flags(args.features, flags_of_features, given(args, ("json", "save_statistics")), inputs)
        device = distributed.init()
        if distributed.rank() != 0:
            return distributed.shutdown()  # one process evaluates
        print("reading", " and ".join(str(name) for name in (args.samples, args.reference) if name), flush=True)
        samples = open_images(args.samples, may_be_statistics=False)
        if args.features == "inception":
            features = Inception(args.inception_weights, device)
        elif args.features == "dinov2":
            features = ViT(args.feature_model, args.feature_weights, device)
        else:
            features = Pixels(samples.shape[1:])
        reference = None
        if args.reference is not None:
            reference = open_images(args.reference, may_be_statistics=True)
            check_reference(features, samples, reference)
        collected = collect(features, samples, args.batch_size)
        if args.save_statistics is not None:
            with files.named(f"--save-statistics {args.save_statistics}"):
                write_statistics(args.save_statistics, features.kind, collected.statistics)
            print(f"{args.save_statistics}: statistics of {len(samples)} images, {features.kind}", flush=True)
        if reference is None:
            return distributed.shutdown()
        metrics = pixel_metrics if args.features == "pixels" else network_metrics
        results = metrics(features, collected, reference, args.batch_size)
    report(results, len(samples), len(reference))
    if args.json is not None:
        results |= {"n_samples": len(samples), "n_reference": len(reference) or None}
        results["reference_sha256"] = files.sha256(args.reference) if args.reference.is_file() else None
        results["settings"] = {key: str(value) for key, value in vars(args).items() if value is not None}
        with user_errors(parser), files.named(f"--json {args.json}"):
            files.write_json(args.json, results)
    distributed.shutdown()


if __name__ == "__main__":
    main()
