"""The space that the network works in: an autoencoder's latents, scaled and shifted to unit variance, or pixels.

Images are float tensors (N, 3, H, W) in [-1, 1]; in pixel space they have the channels of the data. Scale and shift are
applied in this file alone."""

import functools
import math
import os

import torch

from utils import autoencoder

RELEASED_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
UNKNOWN_VAE = "unknown"  # in place of a name: of latents whose files do not say which autoencoder made them
RELEASED_GEOMETRY = (8, 4)  # downsampling and channels, so that sizes can be checked without network access
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLICE_PIXELS = 32 * 256 * 256  # pixels that go through the autoencoder at a time: memory does not grow with the batch


class PixelSpace:
    """The images themselves, with the methods of `LatentSpace` and no autoencoder."""

    in_pixels, name, downsampling = True, "none", 1

    def moments(self, images, noise=None):
        """Return the images, as `sample` and `decode` do."""
        return images

    sample = decode = moments


class LatentSpace:
    """The latent space of a frozen `diffusers.AutoencoderKL`. Raise ValueError if that cannot be loaded.

    `vae` is 'ema', 'mse', a hub name, or a folder that `save_pretrained` wrote, of the autoencoder or of a pipeline. It
    runs on `device` in `dtype`; inputs and outputs are float32. The network gets (latent - shift) * scale, each of the
    two a float, or a list of one per channel. If `scale` and `shift` are given, as in its config, it is loaded at its
    first use: training on cached latents needs it to decode alone."""

    in_pixels = False

    def __init__(self, vae, device, dtype=torch.float32, scale=None, shift=None):
        self.vae, self.name, self.device, self.dtype, self.model = vae, full_name(vae), device, dtype, None
        if scale is None or shift is None:
            scale, shift = autoencoder.scale_and_shift(self.load().config)
        self.scale, self.shift = scale, shift

    def load(self):
        """Return the autoencoder, loaded at the first call. Raise ValueError if it cannot be loaded."""
        if self.model is None:
            model = autoencoder.load(_name(self.vae), self.dtype)
            # Convolutions are faster with channels last on GPUs.
            layout = torch.channels_last if torch.device(self.device).type == "cuda" else torch.contiguous_format
            self.model = model.to(self.device, memory_format=layout).eval().requires_grad_(False)
        return self.model

    @property
    def downsampling(self):
        """Side of an image divided by the side of its latent."""
        return autoencoder.geometry(self.load().config)[0]

    @torch.no_grad()
    def moments(self, images):
        """Return the posterior's mean and standard deviation, unscaled: float32 (N, 2, channels, h, w)."""
        posteriors = (self.load().encode(part.to(self.dtype)).latent_dist for part in _slices(images))
        return torch.cat([torch.stack([p.mean, p.std], dim=1).float() for p in posteriors])

    def sample(self, moments, noise=None):
        """Sample scaled latents from posteriors; `noise` is standard normal (N, channels, h, w), drawn if None."""
        mean, std = moments.unbind(1)
        noise = torch.randn_like(mean) if noise is None else noise
        return (mean + std * noise - _per_channel(self.shift, mean)) * _per_channel(self.scale, mean)

    @torch.no_grad()
    def decode(self, latents):
        """Return images (N, 3, H, W), about in [-1, 1], of latents (N, channels, h, w)."""
        latents = latents / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)
        parts = _slices(latents, self.downsampling)
        return torch.cat([self.load().decode(part.to(self.dtype)).sample.float() for part in parts])


def _per_channel(value, latents):
    """Return a float as it is, and a list of one per channel as a tensor (C, 1, 1) for latents (N, C, h, w)."""
    return _column(tuple(value), latents.dtype, latents.device) if isinstance(value, list) else value


@functools.cache
@torch.inference_mode(False)  # what it is made in may differ from where it is used again
def _column(values, dtype, device):
    """Return numbers as a tensor (C, 1, 1), made once: while it is copied to a GPU, the host waits."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def _slices(batch, downsampling=1):
    """Return a batch (N, C, H, W), of images or of what is `downsampling` times smaller, in parts of `SLICE_PIXELS`."""
    return batch.split(max(1, SLICE_PIXELS // (math.prod(batch.shape[-2:]) * downsampling**2)))


def open_space(vae, device, dtype=torch.float32, scale=None, shift=None):
    """Return the space that --vae names: a `PixelSpace` for 'none', else a `LatentSpace`, loaded."""
    if vae == "none":
        return PixelSpace()
    space = LatentSpace(vae, device, dtype, scale, shift)
    space.load()
    return space


def full_name(vae):
    """Return the one name of an autoencoder that --vae may name in several ways: its absolute path or hub name."""
    return os.path.realpath(autoencoder.folder_of(vae)) if os.path.isdir(vae) else RELEASED_VAES.get(vae, vae)


def _name(vae):
    """Return the folder or hub name that --vae means. Raise ValueError if it is unknown."""
    if vae == UNKNOWN_VAE:
        raise ValueError("the latents do not say which VAE made them; give --vae (to train without: --sample-every 0)")
    return RELEASED_VAES.get(vae, vae)


def geometry(vae, pixel_channels):
    """Return (downsampling, channels) of the space that --vae names, without its weights. Raise ValueError."""
    if vae == "none":
        return 1, pixel_channels
    return RELEASED_GEOMETRY if vae in RELEASED_VAES else autoencoder.geometry(autoencoder.locate(_name(vae))[2])
