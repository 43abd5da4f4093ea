"""Features that metrics compare images by: those of Inception, of a ViT such as DINOv2, and the pixels themselves.

A class of features has `metric` and `kernel_metric`, the names of its Fréchet and kernel distance (or None); `kind`,
which marks its statistics on disk; `sizes`, the lengths of its sets of features; `axes`, how many axes of images
(H, W, C) must be as those of the reference; `sha256` of its weights, or None; and `comparability`. Called with
uint8 images (N, H, W, C), it returns its sets, tensors (N, size), and logits (N, K) or None. Weights are loaded when
first used: raise ValueError if they are missing or do not fit."""

import functools
import io
import math

import numpy as np
import timm
import torch
from huggingface_hub import constants
from PIL import Image

from evaluation.images import INCEPTION, POOL, SPATIAL, SPATIAL_CHANNELS
from utils import encoders, files, hub, tensor_files
from utils.precision import without_tf32

MOST_PIXELS = 4096  # numbers in an image for which the Fréchet distance of the pixels themselves is taken
WEIGHTS_SHA256_PREFIX = "6726825d"  # of Inception's published weights, stated by the file's name
COMPARABLE_SAMPLES = 50_000
DINOV2 = "vit_large_patch14_dinov2.lvd142m"  # in timm
VIT_SIZE = 224  # of images, as FD-DINOv2 is defined; DINOv2's own is 518


def pixels(images):
    """Return uint8 images (N, H, W, C) as float64 rows (N, H * W * C) in [0, 1]."""
    return np.asarray(images).reshape(len(images), -1) / 255


class Pixels:
    """The pixels of images of one small `shape` (H, W, C). Raise ValueError if it has over MOST_PIXELS numbers."""

    metric, kernel_metric, axes, sha256 = "fd_pixels", None, 3, None

    def __init__(self, shape):
        self.kind, self.sizes = f"pixels {'x'.join(map(str, shape))}", (math.prod(shape),)
        if self.sizes[0] > MOST_PIXELS:
            most = f"takes images of up to {MOST_PIXELS} numbers"
            raise ValueError(f"--features pixels {most}; these have {self.sizes[0]}")

    def __call__(self, images):
        return (torch.from_numpy(pixels(images)),), None

    def comparability(self, num_samples):
        """Return {'caveats': [str]}."""
        return {"caveats": ["fd_pixels is this project's own metric; its floor is even to odd images of the reference"]}


class Inception:
    """Inception of 2015, see `load_inception`: the pooled layer for FID, 17 x 17 x 7 numbers for sFID, and logits."""

    metric, kernel_metric, axes, kind, sizes = "fid", "kid", 2, INCEPTION, (POOL, SPATIAL)  # grey or coloured images

    def __init__(self, weights, device):
        self.weights, self.device = weights, device

    @functools.cached_property
    def _loaded(self):
        return load_inception(self.weights, self.device)

    @property
    def sha256(self):
        return self._loaded[1]

    @torch.no_grad()
    @without_tf32()
    def __call__(self, images):
        x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).to(self.device)  # (N, C, H, W)
        network, layers = self._loaded[0], []
        hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda *called: layers.append(called[2]))  # its output
        pool, logits = network(x.expand(-1, 3, -1, -1))
        hook.remove()
        if not (pool.isfinite().all() and logits.isfinite().all()):
            raise ValueError("Inception's features are not finite: its weights are damaged")
        return (pool, layers[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)), logits

    def comparability(self, num_samples):
        """Return {'weights_verified': bool, 'caveats': [str]}: why metrics are not comparable with published ones."""
        verified = self.sha256.startswith(WEIGHTS_SHA256_PREFIX)
        caveats = [] if verified else ["Inception's weights are not the published ones"]
        return {"weights_verified": verified, "caveats": caveats + _too_few(num_samples)}


def _too_few(num_samples):
    return [f"{num_samples} samples, not {COMPARABLE_SAMPLES}"] if num_samples < COMPARABLE_SAMPLES else []


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


class ViT:
    """The class token behind the last norm of a ViT of timm; of DINOv2's ViT-L/14, for FD-DINOv2 (Stein et al. 2023).

    As in the authors' dgm-eval: images are resized to 224 x 224 by PIL (bicubic, antialiased, rounded to uint8), and
    position embeddings as in Meta's own code (see `resample_positions`). `weights` is a file of timm, or of Meta's
    networks without registers, .safetensors or .pth; None is timm's on the hub. `sha256` is of the tensors, whichever
    kind of file they are in, and marks the statistics. Raise ValueError if `name` is no ViT with a class token."""

    metric, kernel_metric, axes = "fd_dinov2", "kd_dinov2", 2

    def __init__(self, name, weights, device):
        self.weights, self.device = weights, device
        with files.named(f"--feature-model {name}", RuntimeError):
            self.name = encoders.full_name(DINOV2 if name is None else name)

    @functools.cached_property
    def _loaded(self):
        with files.named(f"--feature-model {self.name} is no ViT of timm", Exception):  # raises errors of many kinds
            network = timm.create_model(self.name, num_classes=0, img_size=VIT_SIZE)
            if not isinstance(network, timm.models.VisionTransformer) or network.cls_token is None:
                raise ValueError(f"{type(network).__name__} has no class token that is known")
        path = self.weights
        if path is None:
            path = encoders.weights_of(network, self.name, "give --feature-weights")
        with files.named(f"{path} holds no weights of {self.name}", Exception):
            tensors, digest = encoders.read_weights(path)
            if "pos_embed" in tensors:
                grid, registers = network.patch_embed.grid_size, network.reg_token is not None
                tensors["pos_embed"] = resample_positions(tensors["pos_embed"], grid[0], registers)
            tensor_files.check_fit(network.state_dict(), tensors, "it")
            network.load_state_dict(tensors)
        return network.eval().to(self.device), digest

    @property
    def sha256(self):
        return self._loaded[1]

    @property
    def kind(self):
        return f"dinov2 {self.name} {self.sha256[:8]}"

    @property
    def sizes(self):
        return (self._loaded[0].num_features,)

    @torch.no_grad()
    @without_tf32()
    def __call__(self, images):
        network, size = self._loaded[0], (VIT_SIZE, VIT_SIZE)
        coloured = (
            Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).convert("RGB") for image in images
        )
        resized = np.stack([np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in coloured])
        x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device) / 255  # (N, 3, 224, 224)
        mean, std = (x.new_tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
        features = network.forward_features((x - mean) / std)[:, 0]  # (N, D)
        if not features.isfinite().all():
            raise ValueError(f"the features of {self.name} are not finite: its weights are damaged")
        return (features,), None

    def comparability(self, num_samples):
        """Return {'feature_model': str, 'caveats': [str]}: why metrics are not comparable with published ones."""
        caveats = [] if self.name == DINOV2 else [f"features are those of {self.name}, not of {DINOV2}"]
        caveats += ["--feature-weights may not be the published ones"] if self.weights is not None else []
        return {"feature_model": self.name, "caveats": caveats + _too_few(num_samples)}


def resample_positions(embedding, side, registers=False):
    """Return position embeddings (1, P + S * S, D) of P other tokens and S x S patches for side x side patches.

    As the `dinov2_vitl14` of Meta's hub does: bicubic without antialiasing, on a grid (side + 0.1) / S as fine. With
    `registers`, as its `dinov2_vitl14_reg` and timm do: antialiased, side / S."""
    old = math.isqrt(embedding.shape[1])
    if old == side:
        return embedding
    others, grid = embedding.split([embedding.shape[1] - old**2, old**2], dim=1)
    grid = grid.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, S, S)
    how = dict(size=(side, side), antialias=True) if registers else dict(scale_factor=((side + 0.1) / old,) * 2)
    grid = torch.nn.functional.interpolate(grid, mode="bicubic", **how)
    return torch.cat([others, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
