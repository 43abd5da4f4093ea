"""Figures of merit from features of images: Fréchet distance, Inception Score, precision and recall."""

import numpy as np
import torch

SPLIT = 5000  # images of a split of the Inception Score, in ADM's suite
NEIGHBOURS = 3  # the manifold of precision and recall reaches to the third neighbour, in ADM's suite


def pixels(images):
    """uint8 images (N, H, W, C) as rows (N, H W C) of numbers in [0, 1], in float64."""
    return np.asarray(images).reshape(len(images), -1) / 255


class Moments:
    """Mean and covariance of rows that come in batches, in float64.

    Args:
        dimensions: D.
        origin: (D,) a point near the mean, about which products are summed, so that they lose no digits to it; None:
            the mean of the first batch.
    """

    def __init__(self, dimensions, origin=None):
        self.count = 0
        self.sum = np.zeros(dimensions)
        self.products = np.zeros((dimensions, dimensions))
        self.origin = origin

    def add(self, rows):
        """Add rows (N, D)."""
        rows = np.asarray(rows, dtype=np.float64)
        if self.origin is None:
            self.origin = rows.mean(0)
        rows = rows - self.origin
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.products += rows.T @ rows

    def add_other_ranks(self, total):
        """Add the rows of all ranks, which call this with the same origin; `total` sums a tensor over ranks."""
        together = np.concatenate([[self.count], self.sum, self.products.ravel()])
        together = total(torch.from_numpy(together)).numpy()
        self.count, self.sum = int(together[0]), together[1 : 1 + len(self.sum)]
        self.products = together[1 + len(self.sum) :].reshape(self.products.shape)

    def result(self):
        """(mean (D,), covariance (D, D)), the latter with N - 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two images or more, not {self.count}")
        mean = self.sum / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return self.origin + mean, covariance


def moments(rows):
    """(mean (D,), covariance (D, D)) of rows (N, D)."""
    accumulated = Moments(rows.shape[1])
    accumulated.add(rows)
    return accumulated.result()


def frechet_distance(mean_x, covariance_x, mean_y, covariance_y):
    """Fréchet distance between two Gaussians (Heusel et al. 2017), from means (D,) and covariances (D, D).

    |mean_x - mean_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2). The last trace is the sum of the singular values of
    A_x^T A_y for any A with S = A A^T: real, and exact for singular covariances, where a matrix square root needs a
    small number added. 0 for equal Gaussians.
    """
    cross = torch.linalg.svdvals(_root(covariance_x).T @ _root(covariance_y)).sum().item()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(covariance_x) + np.trace(covariance_y) - 2 * cross)


def _root(covariance):
    """A tensor A (D, D) with A A^T = covariance: by Cholesky, or where that is near singular from the eigenvectors."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and factor.diagonal().min() ** 2 > 1e-10 * covariance.diagonal().max():
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]  # a root would make much of it
    return vectors * torch.where(values > rounding, values, 0).sqrt()


def inception_score(logits):
    """Inception Score (Salimans et al. 2016) of logits (N, K), without the last layer's bias, as ADM's suite takes it.

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
    """Improved precision and recall (Kynkäänniemi et al. 2019) of float32 features (M, D) and (N, D) on one device.

    Precision: the share of samples that lie within the third neighbour's distance of any reference image; recall: the
    share of reference images that lie so near to any sample.
    """
    radii_of_reference, radii_of_samples = (_radii(features, block) for features in (reference, samples))
    precision = _share_inside(samples, reference, radii_of_reference, block)
    recall = _share_inside(reference, samples, radii_of_samples, block)
    return precision, recall


def _squared_distances(x, y):
    return ((x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * x @ y.T).clamp(min=0)


def _radii(features, block):
    """Squared distance (N,) of each row to its third neighbour, itself not counted."""
    k = min(NEIGHBOURS + 1, len(features))
    parts = (_squared_distances(part, features).kthvalue(k, dim=1).values for part in features.split(block))
    return torch.cat(list(parts))


def _share_inside(points, centres, radii, block):
    """The share of points that lie within its radius of any centre."""
    inside = [(_squared_distances(part, centres) <= radii).any(1) for part in points.split(block)]
    return torch.cat(inside).double().mean().item()
