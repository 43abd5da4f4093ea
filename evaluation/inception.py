"""Inception of 2015, and what ADM's suite computes from its features: FID, sFID, Inception Score, precision, recall."""

import contextlib
import io
import math
import pathlib
import sys

import torch
from tqdm import tqdm

from evaluation.images import POOL, SPATIAL, SPATIAL_CHANNELS, STATISTICS
from evaluation.metrics import MOST_REFERENCES, Moments, frechet_distance, inception_score, precision_and_recall
from utils import files, hub
from utils.errors import named
from utils.precision import without_tf32

WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256_PREFIX = "6726825d"  # stated by the file's name
COMPARABLE_SAMPLES = 50_000


def load_inception(path, device):
    """Return torch-fidelity's Inception on `device` and the SHA-256 of its weights.

    `path` is a file in torch-fidelity's layout; None: the published weights, downloaded once. Raises ValueError if the
    weights are missing, cannot be downloaded or do not fit.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    name = f"--inception-weights {path}"
    if path is None:
        path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rsplit("/", 1)[1]
        name = f"{path} (delete it to download it again)"
        if not path.is_file():
            hub.require("Inception's weights", WEIGHTS_URL)
            with named("cannot fetch Inception's weights", Exception):
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256_PREFIX)
    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    with named(f"{name} holds no weights of this Inception", Exception):  # damaged files raise errors of many kinds
        # The library would unpickle any object, so it gets a copy of the tensors alone.
        safe = io.BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        with contextlib.redirect_stdout(sys.stderr):
            network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], safe)
    return network.to(device), files.sha256(path)


def comparability(sha256, num_samples):
    """Return {'weights_verified', 'caveats'}: are the weights the published ones, and why do metrics not compare?"""
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
    """Return pool features (N, 2048) and logits (N, 1008) of `ImageBatches`, on `device`, and their `STATISTICS`.

    Batches are read until `enough` images are. sFID's spatial features are the first seven channels of a 1 x 1 branch,
    17 x 17 x 7, row by row.
    """
    spatial, pools, logits = [], [], []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: spatial.append(output))
    pool_moments, spatial_moments = Moments(POOL), Moments(SPATIAL)
    with tqdm(total=len(images), unit=" images", disable=None) as bar:
        for batch in images.batches(batch_size):
            pool, unbiased = forward(network, batch, device)
            pools.append(pool)
            logits.append(unbiased)
            pool_moments.add(pool.cpu())
            spatial_moments.add(spatial.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).cpu())
            bar.update(len(batch))
            if pool_moments.count >= enough:
                break
    hook.remove()
    statistics = dict(zip(STATISTICS, (*pool_moments.result(), *spatial_moments.result()), strict=True))
    return torch.cat(pools), torch.cat(logits), statistics


def inception_metrics(samples, reference, weights, batch_size, device):
    """Return the metrics of ADM's suite for `ImageBatches`, with their caveats, as a dict.

    Precision and recall are None if the reference holds statistics and no images. `weights` is a path for
    `load_inception`. Raises ValueError if the images differ in size or Inception cannot be loaded.
    """
    sizes = samples.shape[1:3], reference.shape[1:3]
    if len(reference) and sizes[0] != sizes[1]:
        raise ValueError(f"{samples.path} holds images of {sizes[0]}, and {reference.path} of {sizes[1]}")
    network, sha256 = load_inception(weights, device)
    of_reference, precision, recall = reference.statistics, None, None
    if len(reference):
        enough = MOST_REFERENCES if of_reference else math.inf
        pool, _, statistics = features(network, reference, batch_size, device, enough)
        of_reference = of_reference or statistics
        pool = pool[:MOST_REFERENCES].clone()  # a view would keep all of it in memory
    sample_pool, logits, of_samples = features(network, samples, batch_size, device)
    if len(reference):
        precision, recall = precision_and_recall(pool, sample_pool)
    fid, sfid = (
        frechet_distance(of_samples[mean], of_samples[covariance], of_reference[mean], of_reference[covariance])
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
    )
    results = dict(fid=fid, sfid=sfid, inception_score=inception_score(logits), precision=precision, recall=recall)
    return results | {"weights_sha256": sha256} | comparability(sha256, len(samples))
