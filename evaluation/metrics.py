"""Metrics of sets of images: Fréchet distances, Inception Score, precision and recall, and FID while a model trains."""

import io
import itertools
import math

import numpy as np
import torch
from huggingface_hub import constants
from tqdm import tqdm

from evaluation.images import POOL, SPATIAL, SPATIAL_CHANNELS, ImageBatches
from utils import distributed, files, hub
from utils.precision import without_tf32

SPLIT = 5000  # images in each of the contiguous splits of the Inception Score, as in ADM's suite
NEIGHBOURS = 3  # precision and recall: a manifold reaches to the third neighbour, as in ADM's suite
MOST_REFERENCES = 10_000  # reference images that precision and recall are taken from
MOST_PIXELS = 4096  # numbers in an image for which the Fréchet distance of the pixels themselves is taken
WEIGHTS_SHA256_PREFIX = "6726825d"  # of Inception's published weights, stated by the file's name
COMPARABLE_SAMPLES = 50_000
BATCH_SIZE = 64  # images that go through the Inception of a `Monitor` at a time


def pixels(images):
    """Return uint8 images (N, H, W, C) as float64 rows (N, H * W * C) in [0, 1]."""
    return np.asarray(images).reshape(len(images), -1) / 255


class Moments:
    """Mean and covariance of rows (N, D) that come in batches, summed in float64 relative to `origin` (D,)."""

    def __init__(self, dimensions, batches=(), origin=None):
        self.count, self.origin = 0, origin
        self.sum, self.products = np.zeros(dimensions), np.zeros((dimensions, dimensions))
        for rows in batches:
            self.add(rows)

    def add(self, rows):
        """Add rows (N, D); N may be 0."""
        rows = np.asarray(rows, dtype=np.float64)
        if len(rows) == 0:
            return
        if self.origin is None:  # a point near the mean, so that products keep their digits
            self.origin = rows.mean(0)
        rows = rows - self.origin
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.products += rows.T @ rows

    def all_reduce(self):
        """Add the rows of all ranks. Every rank calls this, with the same origin."""
        packed = torch.from_numpy(np.concatenate([[self.count], self.sum, self.products.ravel()]))
        count, self.sum, products = np.split(distributed.all_reduce(packed).numpy(), [1, 1 + len(self.sum)])
        self.count, self.products = int(count[0]), products.reshape(self.products.shape)

    def result(self):
        """Return the mean (D,) and the covariance (D, D) over N - 1. Raise ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two images or more, not {self.count}")
        mean = self.sum / self.count
        return self.origin + mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)


def moments(rows):
    """Return the mean (D,) and the covariance (D, D) of rows (N, D)."""
    return Moments(rows.shape[1], [rows]).result()


def frechet_distance(mean_x, covariance_x, mean_y, covariance_y):
    """Return the Fréchet distance of two Gaussians (Heusel et al. 2017) with means (D,) and covariances (D, D).

    |mean_x - mean_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2). The last trace is the sum of the singular values of
    A_x^T A_y for any A with S = A A^T: real, and exact for singular covariances, without a small number added to them.
    """
    cross = torch.linalg.svdvals(_root(covariance_x).T @ _root(covariance_y)).sum().item()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(covariance_x) + np.trace(covariance_y) - 2 * cross)


def _root(covariance):
    """Return A (D, D) with A A^T = covariance: by Cholesky, or from the eigenvectors if that is near singular."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and factor.diagonal().min() ** 2 > 1e-10 * covariance.diagonal().max():
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -1e-3 * values[-1]:
        raise ValueError(f"a covariance has the eigenvalue {values[0]:.3g}; none can be below 0")
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]  # the square root would magnify it
    return vectors * torch.where(values > rounding, values, 0).sqrt()


def inception_score(logits):
    """Return the Inception Score (Salimans et al. 2016) of logits (N, K): exp(mean KL(p(y|x) || p(y))), over splits."""
    scores = []
    for split in torch.as_tensor(logits).split(SPLIT):
        log_p = torch.log_softmax(split.double(), dim=1)
        p = log_p.exp()
        divergence = torch.where(p > 0, p * (log_p - p.mean(0).log()), 0)  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores))


def precision_and_recall(reference, samples, block=2000):
    """Return improved precision and recall (Kynkäänniemi et al. 2019) of features (M, D) and (N, D), by blocks of rows.

    Precision is the share of samples that lie within the third-neighbour distance of any reference image; recall is
    the share of reference images that lie within that of any sample."""
    return _share_inside(samples, reference, block), _share_inside(reference, samples, block)


def _share_inside(points, centres, block):
    """Return the share of points (M, D) that lie within the third-neighbour distance of any of the centres (N, D)."""
    k = min(NEIGHBOURS + 1, len(centres))  # each centre is its own nearest one
    radii = torch.cat([_squared_distances(part, centres).kthvalue(k).values for part in centres.split(block)])  # (N,)
    inside = [(_squared_distances(part, centres) <= radii).any(1) for part in points.split(block)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(x, y):
    return ((x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * x @ y.T).clamp(min=0)


def pixel_metrics(samples, reference, batch_size):
    """Return {'fd_pixels', 'fd_pixels_floor', 'caveats'}. Raise ValueError unless all images are of one small shape."""
    shape, other = samples.shape[1:], reference.shape[1:]
    if shape != other:
        raise ValueError(f"--features pixels: samples are {shape}, and reference images {other or 'are missing'}")
    dimensions = math.prod(shape)
    if dimensions > MOST_PIXELS:
        raise ValueError(f"--features pixels takes images of up to {MOST_PIXELS} numbers; these have {dimensions}")
    of_samples = Moments(dimensions, map(pixels, samples.batches(batch_size)))
    of_reference, even, odd = (Moments(dimensions) for _ in range(3))
    for batch in reference.batches(batch_size):
        rows, parity = pixels(batch), of_reference.count % 2
        of_reference.add(rows)
        even.add(rows[parity::2])
        odd.add(rows[1 - parity :: 2])
    return {
        "fd_pixels": frechet_distance(*of_samples.result(), *of_reference.result()),
        "fd_pixels_floor": frechet_distance(*even.result(), *odd.result()),
        "caveats": ["fd_pixels is this project's own metric; its floor is even to odd images of the reference"],
    }


def load_inception(path, device):
    """Return torch-fidelity's Inception of 2015 on `device`, and the SHA-256 of its weights in the file `path`.

    None is the published weights, downloaded once. Raise ValueError if they are missing or do not fit."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    name = f"--inception-weights {path}"
    if path is None:
        path = hub.cache_of_urls() / URL_INCEPTION_V3.rsplit("/", 1)[1]
        name = f"{path} (delete it to download it again)"
        if not path.is_file():
            what = f"Inception's weights, {URL_INCEPTION_V3} (or give a copy by --inception-weights)"
            if constants.HF_HUB_OFFLINE:
                raise ValueError(f"cannot fetch {what}: HF_HUB_OFFLINE is set, and they are not in {path.parent}")
            hub.download(URL_INCEPTION_V3, path, what, WEIGHTS_SHA256_PREFIX)
    with files.named(f"{name} holds no weights of this Inception", Exception):  # damaged files fail in many ways
        # The library would unpickle any object, so it gets a copy of the tensors alone.
        safe = io.BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], safe)
    return network.to(device), files.sha256(path)


def comparability(sha256, num_samples):
    """Return {'weights_verified': bool, 'caveats': [str]}: why metrics are not comparable with published ones."""
    verified = sha256.startswith(WEIGHTS_SHA256_PREFIX)
    caveats = [] if verified else ["Inception's weights are not the published ones"]
    if num_samples < COMPARABLE_SAMPLES:
        caveats.append(f"{num_samples} samples, not {COMPARABLE_SAMPLES}")
    return {"weights_verified": verified, "caveats": caveats}


@torch.no_grad()
@without_tf32()
def forward(network, images, device):
    """Return Inception's pool features (N, 2048) and its logits without bias (N, 1008) of uint8 images (N, H, W, C)."""
    x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).to(device)  # (N, C, H, W)
    pool, logits = network(x.expand(-1, 3, -1, -1))
    if not (pool.isfinite().all() and logits.isfinite().all()):
        raise ValueError("Inception's features are not finite: its weights are damaged")
    return pool, logits


def features(network, images, batch_size, device, enough=math.inf):
    """Return pool features (N, 2048), logits (N, 1008) and the four STATISTICS of `enough` images of `ImageBatches`."""
    spatial = Moments(SPATIAL)

    def add_spatial(module, inputs, output):  # sFID's features, 17 x 17 x 7, row by row
        spatial.add(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).cpu())

    hook = network.Mixed_6d.branch1x1.register_forward_hook(add_spatial)
    count = math.ceil(min(enough, len(images)) / batch_size)
    batches = tqdm(itertools.islice(images.batches(batch_size), count), total=count, unit=" batches", disable=None)
    pools, logits = zip(*(forward(network, batch, device) for batch in batches), strict=True)
    hook.remove()
    pooled = Moments(POOL, (pool.cpu() for pool in pools))
    return torch.cat(pools), torch.cat(logits), (*pooled.result(), *spatial.result())


def inception_metrics(samples, reference, weights, batch_size, device):
    """Return the metrics of ADM's suite for `ImageBatches`, and their caveats; `weights` is as for `load_inception`.

    Without reference images, precision and recall are None, as sFID is if the statistics are mu and sigma alone. Raise
    ValueError if images differ in size or weights fail."""
    size, other = samples.shape[1:3], reference.shape[1:3]
    if len(reference) and size != other:
        raise ValueError(f"{samples.path} holds images of {size}, and {reference.path} of {other}")
    network, sha256 = load_inception(weights, device)
    pool, logits, x = features(network, samples, batch_size, device)
    y, sfid, precision, recall = tuple(reference.statistics.values()), None, None, None
    if len(reference):
        enough = MOST_REFERENCES if len(y) == len(x) else math.inf
        real_pool, _, statistics = features(network, reference, batch_size, device, enough)
        precision, recall = precision_and_recall(real_pool[:MOST_REFERENCES], pool)
        y += statistics[len(y) :]
    fid = frechet_distance(*x[:2], *y[:2])
    if len(y) == len(x):
        sfid = frechet_distance(*x[2:], *y[2:])
    score = inception_score(logits)
    results = dict(fid=fid, sfid=sfid, inception_score=score, precision=precision, recall=recall, weights_sha256=sha256)
    return results | comparability(sha256, len(samples))


class Monitor:
    """Measures samples that all ranks drew against a reference: FID, or `fd_pixels` for images up to MOST_PIXELS.

    `reference` is `ImageBatches`, or an iterable of uint8 arrays (N, H, W, C), which is read once; `image_shape` is
    (H, W, C) of the samples. Raise ValueError if the reference is of another shape or Inception cannot be loaded."""

    def __init__(self, reference, image_shape, weights, device):
        self.dimensions, self.features, self.sha256 = math.prod(image_shape), pixels, None
        if self.dimensions > MOST_PIXELS:
            network, self.sha256 = load_inception(weights, device)
            self.dimensions, self.features = POOL, lambda images: forward(network, images, device)[0].cpu()
        if isinstance(reference, ImageBatches):
            if reference.statistics and self.sha256:
                self.of_reference = reference.statistics["mu"], reference.statistics["sigma"]
                return
            axes = 2 if self.sha256 else 3  # Inception takes grey images and coloured ones
            if reference.shape[1 : 1 + axes] != image_shape[:axes]:
                raise ValueError(f"{reference.path} does not hold images of {image_shape}")
            reference = reference.batches(BATCH_SIZE)
        self.of_reference = Moments(self.dimensions, map(self.features, reference)).result()

    def metrics(self, images):
        """Return {'fid' or 'fd_pixels', 'n_samples', ...} of all ranks' uint8 images (N, H, W, C); all call this.

        With None for images, on all ranks, the metric is None."""
        if images is None:
            return {"fd_pixels" if self.sha256 is None else "fid": None, "n_samples": 0}
        batches = (images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE))
        accumulated = Moments(self.dimensions, map(self.features, batches), self.of_reference[0])
        accumulated.all_reduce()
        distance, count = frechet_distance(*accumulated.result(), *self.of_reference), accumulated.count
        if self.sha256 is None:
            return {"fd_pixels": distance, "n_samples": count}
        return {"fid": distance, "n_samples": count} | comparability(self.sha256, count)
