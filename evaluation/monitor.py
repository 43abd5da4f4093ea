"""FID of samples while a model trains."""

import numpy as np

from evaluation.images import POOL, ImageBatches
from evaluation.inception import comparability, forward, load_inception
from evaluation.metrics import MOST_PIXELS, Moments, frechet_distance, pixels

BATCH_SIZE = 64  # images that go through Inception at a time


class Monitor:
    """Measures the samples that all ranks of a training run drew: FID, or `fd_pixels` for images up to MOST_PIXELS.

    Args:
        reference: `ImageBatches`, or an iterable of uint8 arrays (N, H, W, C), which is read once.
        image_shape: (H, W, C) of the samples. Raises ValueError if the reference is of another shape.
        weights, device: for `load_inception`.
    """

    def __init__(self, reference, image_shape, weights, device):
        self.dimensions, self.network, self.device = int(np.prod(image_shape)), None, device
        if self.dimensions > MOST_PIXELS:
            self.dimensions = POOL
            self.network, self.sha256 = load_inception(weights, device)
        if isinstance(reference, ImageBatches):
            if reference.statistics and self.network is not None:
                self.of_reference = reference.statistics["mu"], reference.statistics["sigma"]
                return
            axes = 3 if self.network is None else 2  # Inception takes grey images and coloured ones
            if reference.shape[1 : 1 + axes] != image_shape[:axes]:
                raise ValueError(f"{reference.path} does not hold images of {image_shape}")
            reference = reference.batches(BATCH_SIZE)
        accumulated = Moments(self.dimensions)
        for batch in reference:
            accumulated.add(self._features(batch))
        self.of_reference = accumulated.result()

    def _features(self, images):
        """Return the features (N, D) of uint8 images (N, H, W, C) on the CPU."""
        return pixels(images) if self.network is None else forward(self.network, images, self.device)[0].cpu()

    def metrics(self, images):
        """Return the metrics of all ranks' uint8 images (N, H, W, C); every rank calls this with its own.

        {'fid', 'n_samples', 'weights_verified', 'caveats'}, or {'fd_pixels', 'n_samples'} for small images.
        """
        accumulated = Moments(self.dimensions, self.of_reference[0])
        for start in range(0, len(images), BATCH_SIZE):
            accumulated.add(self._features(images[start : start + BATCH_SIZE]))
        accumulated.all_reduce()
        distance = frechet_distance(*accumulated.result(), *self.of_reference)
        if self.network is None:
            return {"fd_pixels": distance, "n_samples": accumulated.count}
        return {"fid": distance, "n_samples": accumulated.count} | comparability(self.sha256, accumulated.count)
