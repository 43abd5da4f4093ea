"""Metrics of sets of images: Fréchet distance, Inception Score, precision and recall."""

import numpy as np
import torch

from utils import distributed

SPLIT = 5000  # images in a split of the Inception Score, as in ADM's suite
NEIGHBOURS = 3  # precision and recall: a manifold reaches to the third neighbour, as in ADM's suite
MOST_REFERENCES = 10_000  # reference images that precision and recall are taken from
MOST_PIXELS = 4096  # numbers in an image for which the Fréchet distance of the pixels themselves is taken


def pixels(images):
    """Return uint8 images (N, H, W, C) as float64 rows (N, H * W * C) in [0, 1]."""
    return np.asarray(images).reshape(len(images), -1) / 255


class Moments:
    """Mean and covariance of rows (N, D) that come in batches, accumulated in float64.

    Products are summed relative to `origin` (D,), a point near the mean, so that they keep their digits; None: the mean
    of the first batch.
    """

    def __init__(self, dimensions, origin=None):
        self.count, self.origin = 0, origin
        self.sum, self.products = np.zeros(dimensions), np.zeros((dimensions, dimensions))

    def add(self, rows):
        """Add rows (N, D); N may be 0."""
        rows = np.asarray(rows, dtype=np.float64)
        if len(rows) == 0:
            return
        if self.origin is None:
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
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return self.origin + mean, covariance


def moments(rows):
    """Return the mean (D,) and the covariance (D, D) of rows (N, D)."""
    accumulated = Moments(rows.shape[1])
    accumulated.add(rows)
    return accumulated.result()


def frechet_distance(mean_x, covariance_x, mean_y, covariance_y):
    """Return the Fréchet distance of two Gaussians (Heusel et al. 2017) with means (D,) and covariances (D, D).

    |mean_x - mean_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2). The last trace is the sum of the singular values of
    A_x^T A_y for any A with S = A A^T: real, and exact for singular covariances, where a matrix square root needs a
    small number added. 0 for equal Gaussians.
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
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]  # the square root would magnify it
    return vectors * torch.where(values > rounding, values, 0).sqrt()


def pixel_metrics(samples, reference, batch_size):
    """Return {'fd_pixels', 'fd_pixels_floor', 'caveats'} of `ImageBatches`: Fréchet distances of pixels in [0, 1].

    The floor is the distance between the reference's even and odd images. Raises ValueError if the images differ in
    shape or hold more than MOST_PIXELS numbers.
    """
    shape, other = samples.shape[1:], reference.shape[1:]
    if shape != other:
        raise ValueError(f"--features pixels: samples are {shape}, and reference images {other or 'are missing'}")
    dimensions = int(np.prod(shape))
    if dimensions > MOST_PIXELS:
        raise ValueError(f"--features pixels takes images of up to {MOST_PIXELS} numbers; these have {dimensions}")
    of_samples, of_reference, even, odd = (Moments(dimensions) for _ in range(4))
    for batch in samples.batches(batch_size):
        of_samples.add(pixels(batch))
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


def inception_score(logits):
    """Return the Inception Score (Salimans et al. 2016) of logits (N, K), as ADM's suite without the last layer's bias.

    exp(mean KL(p(y|x) || p(y))) of contiguous splits of 5,000, averaged over splits.
    """
    scores = []
    for split in torch.as_tensor(logits).split(SPLIT):
        log_p = torch.log_softmax(split.double(), dim=1)
        p = log_p.exp()
        divergence = torch.where(p > 0, p * (log_p - p.mean(0).log()), 0)  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores))


def precision_and_recall(reference, samples, block=2000):
    """Return improved precision and recall (Kynkäänniemi et al. 2019) of float32 features (M, D) and (N, D).

    Precision is the share of samples that lie within the third-neighbour distance of any reference image; recall is
    the share of reference images that lie within that of any sample. Distances are computed `block` rows at a time.
    """
    return _share_inside(samples, reference, block), _share_inside(reference, samples, block)


def _share_inside(points, centres, block):
    """Return the share of points (M, D) that lie within the third-neighbour distance of any of the centres (N, D)."""
    k = min(NEIGHBOURS + 1, len(centres))  # each centre is its own nearest one
    radii = [_squared_distances(part, centres).kthvalue(k, dim=1).values for part in centres.split(block)]
    radii = torch.cat(radii)  # (N,), squared
    inside = [(_squared_distances(part, centres) <= radii).any(1) for part in points.split(block)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(x, y):
    return ((x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * x @ y.T).clamp(min=0)
