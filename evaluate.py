"""FID, sFID, Inception Score, precision and recall of samples, by the protocol of ADM's evaluation suite.

    python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py digits.npz --reference digits-folder --features pixels

Both are an .npz with arr_0 (uint8, N x H x W x C) or a folder of images; the reference may hold precomputed statistics
(mu, sigma, mu_s, sigma_s), as ADM's do. The network is torch-fidelity's Inception of 2015, with TensorFlow's resizing.
Precision and recall are taken in float32; ADM's suite compares distances in float16, which moves them by some points
and depends on the machine.
"""

import contextlib
import io
import json
import pathlib
import sys

import numpy as np
import torch
from tqdm import tqdm

import compute
import distributed
import files
import hub
import metrics
import options
from images import ImageBatches

WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256_PREFIX = "6726825d"  # which the file's name states
COMPARABLE_SAMPLES = 50_000
MOST_REFERENCES = 10_000  # for precision and recall
MOST_PIXELS = 4096  # numbers of an image whose own Fréchet distance is taken
SPATIAL_CHANNELS = 7
MONITOR_BATCH = 64


def build_parser():
    parser = options.Parser(description="FID, sFID, Inception Score, precision and recall, as ADM's suite has them.")
    parser.add_argument("samples", type=pathlib.Path, help=".npz with arr_0, or a folder of images")
    add = options.flag_group(parser, "evaluation")
    reference = ".npz with arr_0 or with statistics (mu, sigma, mu_s, sigma_s), or a folder of images"
    add("--reference", pathlib.Path, "PATH", reference, required=True)
    features = "inception, or pixels for small images that Inception says nothing about: their own figure, fd_pixels"
    add("--features", options.one_of("inception", "pixels"), "inception|pixels", features, default="inception")
    weights = "Inception's weights in torch-fidelity's layout (default: download them once)"
    add("--inception-weights", pathlib.Path, "FILE.pth", weights)
    add("--batch-size", options.integer(1), "N", "images at a time", default=64)
    add("--json", pathlib.Path, "FILE.json", "write figures and settings there")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with options.user_errors(parser):
        if args.json is not None:
            files.check_output("--json", args.json, inputs=(args.samples, args.reference))
        samples, reference = ImageBatches(args.samples), ImageBatches(args.reference, may_be_statistics=True)
        for images in (samples, reference):
            if len(images) < 2 and not images.statistics:
                raise ValueError(f"{images.path}: a covariance needs two images or more, not {len(images)}")
        if args.features == "pixels" and args.inception_weights is not None:
            raise ValueError("--inception-weights has no effect with --features pixels")
        evaluate = evaluate_pixels if args.features == "pixels" else evaluate_inception
        figures, caveats = evaluate(samples, reference, args)
    figures |= {
        "n_samples": len(samples),
        "n_reference": len(reference) or None,
        "caveats": caveats,
        "reference_sha256": files.sha256(args.reference) if args.reference.is_file() else None,
        "settings": {key: str(value) for key, value in vars(args).items() if value is not None},
    }
    for key in ("fid", "sfid", "inception_score", "precision", "recall", "fd_pixels", "fd_pixels_floor"):
        if key in figures:
            value = figures[key]
            print(f"{key:16} {'needs images in the reference' if value is None else f'{value:.4f}'}")
    print(f"{len(samples)} samples; {len(reference) or 'statistics, no'} reference images")
    if caveats:
        print(f"not comparable with published figures: {'; '.join(caveats)}")
    if args.json is not None:
        with files.written_whole(args.json) as partial:
            partial.write_text(json.dumps(figures, indent=2) + "\n")


class Monitor:
    """FID, or `fd_pixels` of small images, of samples that the ranks of a training run make together.

    Args:
        reference: `ImageBatches`, or an iterable of uint8 arrays (N, H, W, C), gone through once.
        image_shape: (H, W, C) of the samples.
        weights: a file of Inception's weights, or None: see `load_inception`. Of no use to small images.
        device: where Inception runs.

    Raises:
        ValueError: the reference is of another shape, or there are no weights.
    """

    def __init__(self, reference, image_shape, weights, device):
        self.device, self.network, self.verified = device, None, None
        self.dimensions = int(np.prod(image_shape))
        if self.dimensions > MOST_PIXELS:
            self.network, sha256 = load_inception(weights, device)
            self.verified = is_published(sha256)
            self.dimensions = 2048
        if isinstance(reference, ImageBatches):
            if reference.statistics and self.network is not None:
                self.of_reference = reference.statistics["mu"], reference.statistics["sigma"]
                return
            if reference.shape[1:3] != image_shape[:2] or (
                self.network is None and reference.shape[3:] != image_shape[2:]
            ):
                raise ValueError(f"{reference.path} does not hold images of {image_shape}")
            reference = reference.batches(MONITOR_BATCH)
        accumulated = metrics.Moments(self.dimensions)
        for batch in reference:
            accumulated.add(self._features(batch))
        self.of_reference = accumulated.result()

    @torch.no_grad()
    @compute.without_tf32()
    def _features(self, images):
        if self.network is None:
            return metrics.pixels(images)
        x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).to(self.device)
        return self.network(x.expand(-1, 3, -1, -1))[0].cpu().numpy()

    def figures(self, images):
        """Figures of the uint8 images (N, H, W, C) of all ranks; each calls this with its own.

        {'fid', 'n_samples', 'weights_verified', 'caveats'} or {'fd_pixels', 'n_samples'}.
        """
        accumulated = metrics.Moments(self.dimensions, self.of_reference[0])
        for start in range(0, len(images), MONITOR_BATCH):
            accumulated.add(self._features(images[start : start + MONITOR_BATCH]))
        accumulated.add_other_ranks(distributed.total)
        distance = metrics.frechet_distance(*accumulated.result(), *self.of_reference)
        figures = {"n_samples": accumulated.count}
        if self.network is None:
            return {"fd_pixels": distance} | figures
        more = {"weights_verified": self.verified, "caveats": caveats_of(self.verified, accumulated.count)}
        return {"fid": distance} | figures | more


def evaluate_pixels(samples, reference, args):
    """({'fd_pixels', 'fd_pixels_floor'}, caveats): Fréchet distances of pixels in [0, 1], the second real to real."""
    if samples.shape[1:] != reference.shape[1:]:
        there = f"images of {reference.shape[1:]}" if len(reference) else "statistics"
        raise ValueError(f"--features pixels: samples are {samples.shape[1:]}, and the reference holds {there}")
    dimensions = int(np.prod(samples.shape[1:]))
    if dimensions > MOST_PIXELS:
        raise ValueError(
            f"--features pixels is for small images of {MOST_PIXELS} numbers or less; these have {dimensions}"
        )
    of_samples, of_reference, *halves = (metrics.Moments(dimensions) for _ in range(4))
    for batch in samples.batches(args.batch_size):
        of_samples.add(metrics.pixels(batch))
    row = 0
    for batch in reference.batches(args.batch_size):
        rows = metrics.pixels(batch)
        of_reference.add(rows)
        for parity, half in enumerate(halves):
            half.add(rows[(row + parity) % 2 :: 2])
        row += len(rows)
    figures = {
        "fd_pixels": metrics.frechet_distance(*of_samples.result(), *of_reference.result()),
        "fd_pixels_floor": metrics.frechet_distance(*halves[0].result(), *halves[1].result()),
    }
    return figures, ["fd_pixels is a figure of this project; its floor is that of the reference's odd to even images"]


def evaluate_inception(samples, reference, args):
    """The figures of ADM's suite as a dict, and why they would not be comparable."""
    if len(reference) and samples.shape[1:3] != reference.shape[1:3]:
        raise ValueError(
            f"{samples.path} holds images of {samples.shape[1:3]}, and {reference.path} of {reference.shape[1:3]}"
        )
    device = distributed.init()
    network, sha256 = load_inception(args.inception_weights, device)
    verified = is_published(sha256)
    if reference.statistics:
        s = reference.statistics
        of_reference, spatial_of_reference = (s["mu"], s["sigma"]), (s["mu_s"], s["sigma_s"])
        pool = features(network, reference, args.batch_size, device, MOST_REFERENCES)[0] if len(reference) else None
    else:
        pool, _, of_reference, spatial_of_reference = features(network, reference, args.batch_size, device)
        pool = pool[:MOST_REFERENCES].clone()  # without the rest, which a view would hold
    sample_pool, logits, of_samples, spatial_of_samples = features(network, samples, args.batch_size, device)
    precision, recall = (None, None) if pool is None else metrics.precision_and_recall(pool, sample_pool)
    figures = {
        "fid": metrics.frechet_distance(*of_samples, *of_reference),
        "sfid": metrics.frechet_distance(*spatial_of_samples, *spatial_of_reference),
        "inception_score": metrics.inception_score(logits),
        "precision": precision,
        "recall": recall,
        "weights_sha256": sha256,
        "weights_verified": verified,
    }
    return figures, caveats_of(verified, len(samples))


def caveats_of(verified, num_samples):
    """Why figures do not compare with published ones: a list of reasons."""
    reasons = [] if verified else ["Inception's weights are not the published ones"]
    if num_samples < COMPARABLE_SAMPLES:
        reasons.append(f"{num_samples} samples, and they are of {COMPARABLE_SAMPLES}")
    return reasons


def is_published(sha256):
    """Whether the SHA-256 of a file of weights is that of the published ones."""
    return sha256.startswith(WEIGHTS_SHA256_PREFIX)


def load_inception(path, device):
    """(torch-fidelity's Inception, SHA-256 of its weights). Raises ValueError where there are none."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    named = f"--inception-weights {path}"
    if path is None:
        path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rsplit("/", 1)[1]
        if not path.is_file():
            hub.require("Inception's weights", WEIGHTS_URL)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256_PREFIX)
        named = f"{path}, to be deleted and fetched again,"
    if not path.is_file():
        raise ValueError(f"{named}: no such file")
    try:
        # Read as tensors and nothing else, and handed on from memory: the library itself would unpickle anything.
        safe = io.BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        with contextlib.redirect_stdout(sys.stderr):
            network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], safe)
    except Exception as error:  # unpickling what is no pickle fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{named} holds no weights of this Inception: {reason}") from error
    return network.to(device), files.sha256(path)


@torch.no_grad()
@compute.without_tf32()
def features(network, images, batch_size, device, most=None):
    """(pool features (N, 2048) float32, logits (N, 1008), moments of the pool features, moments of the spatial ones).

    The spatial features of sFID are the first seven channels of a 1x1 branch, 17 x 17 x 7, row by row.
    """
    spatial = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: spatial.append(output))
    pools, logits = [], []
    pool_moments, spatial_moments = metrics.Moments(2048), metrics.Moments(17 * 17 * SPATIAL_CHANNELS)
    total = len(images) if most is None else min(most, len(images))
    with tqdm(total=total, unit=" images", disable=None) as bar:
        for batch in images.batches(batch_size, most):
            x = torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).to(device)
            pool, unbiased = network(x.expand(-1, 3, -1, -1))
            if not (pool.isfinite().all() and unbiased.isfinite().all()):
                raise ValueError("Inception's features are not finite: its weights are damaged")
            corner = spatial.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            pools.append(pool)
            logits.append(unbiased)
            pool_moments.add(pool.cpu())
            spatial_moments.add(corner.cpu())
            bar.update(len(batch))
    hook.remove()
    return torch.cat(pools), torch.cat(logits), pool_moments.result(), spatial_moments.result()


if __name__ == "__main__":
    main()
