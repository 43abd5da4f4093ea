"""Metrics of sets of images: Fréchet and kernel distances, Inception Score, precision and recall, FID in training."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from evaluation.features import MOST_PIXELS, Inception, Pixels, pixels
from evaluation.images import ImageBatches
from utils import distributed

SPLIT = 5000  # images in each of the contiguous splits of the Inception Score, as in ADM's suite
NEIGHBOURS = 3  # precision and recall: a manifold reaches to the third neighbour, as in ADM's suite
MOST_REFERENCES = 10_000  # reference images that precision and recall are taken from
MOST_KERNEL_ROWS = 10_000  # images of either set that the kernel distance is taken from
BATCH_SIZE = 64  # images that go through the Inception of a `Monitor` at a time


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
    """Return A (D, R) with A A^T = covariance: by Cholesky, or from the eigenvectors if that is near singular."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and factor.diagonal().min() ** 2 > 1e-10 * covariance.diagonal().max():
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -1e-3 * values[-1]:
        raise ValueError(f"a covariance has the eigenvalue {values[0]:.3g}; none can be below 0")
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]  # the square root would magnify it
    kept = values > rounding  # of N < D images, N - 1: fewer columns make the singular values cheaper
    return vectors[:, kept] * values[kept].sqrt()


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


def kernel_distance(x, y, block=2000):
    """Return the squared MMD of features (M, D) and (N, D) with the kernel (x . y / D + 1)^3 (Bińkowski et al. 2018).

    On Inception's features it is KID. The estimate is unbiased: 0 in expectation for equal distributions, so at times
    negative. It is from all pairs, in float64 and blocks of rows; the usual mean over random subsets has the same
    expectation and more variance. Of more than MOST_KERNEL_ROWS rows, that many are taken, evenly spaced, since files
    may be sorted by class: two sets of 10,000 x 2048 take 1.2e12 floating-point operations."""
    counts = [min(len(rows), MOST_KERNEL_ROWS) for rows in (x, y)]
    x, y = (rows[torch.arange(n) * len(rows) // n].double() for rows, n in zip((x, y), counts, strict=True))

    def total(a, b):
        return sum(((part @ b.T / b.shape[1] + 1) ** 3).sum().item() for part in a.split(block))

    def within(a):  # the mean over pairs of two different rows
        with_themselves = (((a**2).mean(1) + 1) ** 3).sum().item()
        return (total(a, a) - with_themselves) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))


class Collected(NamedTuple):
    """What `collect` returns: features (N, D), logits (N, K), each or None, and means and covariances."""

    rows: torch.Tensor | None
    logits: torch.Tensor | None
    statistics: tuple


def collect(features, images, batch_size, enough=math.inf):
    """Return the `Collected` of the first `enough` images of `ImageBatches`; statistics are of whole batches.

    They are (mean, covariance) of each set of the `features`, one behind the other, as in STATISTICS. Pixels are not
    kept as rows."""
    enough = min(enough, len(images))
    count = math.ceil(enough / batch_size)
    batches = itertools.islice(images.batches(batch_size), count)
    accumulated, kept = [Moments(size) for size in features.sizes], []
    for batch in tqdm(batches, total=count, unit=" batches", disable=None):
        sets, logits = features(batch)
        for of_set, rows in zip(accumulated, sets, strict=True):
            of_set.add(rows.cpu())
        kept.append((sets[0] if features.kernel_metric else None, logits))
    rows, logits = (None if parts[0] is None else torch.cat(parts)[:enough] for parts in zip(*kept, strict=True))
    return Collected(rows, logits, sum((of_set.result() for of_set in accumulated), ()))


def check_reference(features, samples, reference):
    """Raise ValueError unless `ImageBatches` to compare hold images of one size, or statistics of these features."""
    reference.statistics_of(features)
    size, other = samples.shape[1 : 1 + features.axes], reference.shape[1 : 1 + features.axes]
    if len(reference) and size != other:
        raise ValueError(f"{samples.path} holds images of {size}, and {reference.path} of {other}")


def pixel_metrics(features, samples, reference, batch_size):
    """Return {'fd_pixels', 'fd_pixels_floor', 'caveats'} of `Collected` samples and `ImageBatches`, by `Pixels`.

    Without reference images, the floor is None."""
    y, floor = tuple(reference.statistics_of(features).values()), None
    if len(reference):
        of_reference, even, odd = (Moments(features.sizes[0]) for _ in range(3))
        for batch in reference.batches(batch_size):
            rows, parity = pixels(batch), of_reference.count % 2
            of_reference.add(rows)
            even.add(rows[parity::2])
            odd.add(rows[1 - parity :: 2])
        y, floor = y or of_reference.result(), frechet_distance(*even.result(), *odd.result())
    results = {"fd_pixels": frechet_distance(*samples.statistics, *y), "fd_pixels_floor": floor}
    return results | features.comparability(None)


def network_metrics(features, samples, reference, batch_size):
    """Return metrics of `Collected` samples and `ImageBatches`, and their caveats, by the features of a network.

    They are the Fréchet and the kernel distance and, with Inception, the other metrics of ADM's suite. Without
    reference images, the kernel distance, precision and recall are None, as is sFID with mu and sigma alone."""
    x, y, real = samples.statistics, tuple(reference.statistics_of(features).values()), None
    if len(reference):
        enough = MOST_REFERENCES if len(y) == len(x) else math.inf
        real, _, statistics = collect(features, reference, batch_size, enough)
        y += statistics[len(y) :]
    results = {features.metric: frechet_distance(*x[:2], *y[:2])}
    if samples.logits is not None:
        results["sfid"] = frechet_distance(*x[2:], *y[2:]) if len(y) == len(x) else None
        results["inception_score"] = inception_score(samples.logits)
        shares = (None, None) if real is None else precision_and_recall(real[:MOST_REFERENCES], samples.rows)
        results |= zip(("precision", "recall"), shares, strict=True)
    results[features.kernel_metric] = None if real is None else kernel_distance(samples.rows, real)
    return results | {"weights_sha256": features.sha256} | features.comparability(len(samples.rows))


class Monitor:
    """Measures samples that all ranks drew against a reference: FID, or `fd_pixels` for images up to MOST_PIXELS.

    `reference` is `ImageBatches`, or an iterable of uint8 arrays (N, H, W, C), which is read once; `image_shape` is
    (H, W, C) of the samples. Raise ValueError if the reference is of another shape or Inception cannot be loaded."""

    def __init__(self, reference, image_shape, weights, device):
        self.features = Pixels(image_shape) if math.prod(image_shape) <= MOST_PIXELS else Inception(weights, device)
        self.sha256 = self.features.sha256
        if isinstance(reference, ImageBatches):
            if statistics := reference.statistics_of(self.features):
                self.of_reference = statistics["mu"], statistics["sigma"]
                return
            if reference.shape[1 : 1 + self.features.axes] != image_shape[: self.features.axes]:
                raise ValueError(f"{reference.path} does not hold images of {image_shape}")
            reference = reference.batches(BATCH_SIZE)
        self.of_reference = self._moments(reference).result()

    def _moments(self, batches, origin=None):
        rows = (self.features(batch)[0][0].cpu() for batch in batches)
        return Moments(self.features.sizes[0], rows, origin)

    def metrics(self, images):
        """Return {'fid' or 'fd_pixels', 'n_samples', ...} of all ranks' uint8 images (N, H, W, C); all call this.

        With None for images, on all ranks, the metric is None."""
        if images is None:
            return {self.features.metric: None, "n_samples": 0}
        batches = (images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE))
        accumulated = self._moments(batches, self.of_reference[0])
        accumulated.all_reduce()
        distance, count = frechet_distance(*accumulated.result(), *self.of_reference), accumulated.count
        results = {self.features.metric: distance, "n_samples": count}
        return results if self.sha256 is None else results | self.features.comparability(count)
