"""The space that the network works in: an autoencoder's latents, scaled and shifted to unit variance, or pixels.

Images are float tensors (N, 3, H, W) in [-1, 1]; in pixel space they have the channels of the data. Scale and shift are
applied in this file alone.
"""

import functools
import pathlib
import warnings

import torch

from utils import hub
from utils.errors import named

RELEASED_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
RELEASED_GEOMETRY = (8, 4)  # downsampling and channels, so that sizes can be checked without network access
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLICE_PIXELS = 32 * 256 * 256  # pixels that go through the autoencoder at a time


class PixelSpace:
    """The images themselves, with the methods of `LatentSpace` and no autoencoder."""

    in_pixels, name = True, "none"
    downsampling, scale, shift = 1, 1.0, 0.0

    def __init__(self, channels):
        self.channels = channels

    def moments(self, images, noise=None):
        """Return the images, as `sample`, `encode` and `decode` do."""
        return images

    sample = encode = decode = moments


class LatentSpace:
    """The latent space of a frozen `diffusers.AutoencoderKL`. Raise ValueError if that cannot be loaded.

    Args:
        vae: 'ema', 'mse', a hub name, or a folder that `save_pretrained` wrote.
        device: where the autoencoder runs.
        dtype: precision that it runs in; inputs and outputs are float32.
        scale, shift: as in its config. If both are given, the autoencoder is loaded at its first use: training on
            cached latents needs it to decode alone.
    """

    in_pixels = False

    def __init__(self, vae, device, dtype=torch.float32, scale=None, shift=None):
        self.vae, self.device, self.dtype = vae, device, dtype
        self.name = _resolve(vae)
        if scale is None or shift is None:
            config = self.load().config
            scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        self.scale, self.shift = scale, shift

    def load(self):
        """Return the autoencoder; load it if it is not loaded yet. Raise ValueError if it cannot be loaded."""
        return self.model

    @functools.cached_property
    def model(self):
        """The autoencoder."""
        # The way to load with little memory needs another package, and warns of that on every load.
        model = _from_hub_or_folder("from_pretrained", self.vae, torch_dtype=self.dtype, low_cpu_mem_usage=False)
        # Convolutions are faster with channels last on GPUs.
        layout = torch.channels_last if torch.device(self.device).type == "cuda" else torch.contiguous_format
        return model.to(self.device, memory_format=layout).eval().requires_grad_(False)

    @property
    def downsampling(self):
        """Side of an image divided by the side of its latent."""
        return _geometry(self.model.config)[0]

    @property
    def channels(self):
        """Channels of a latent."""
        return _geometry(self.model.config)[1]

    @torch.no_grad()
    def moments(self, images):
        """Return the posterior's mean and standard deviation, unscaled: float32 (N, 2, channels, h, w)."""

        def moments_of_slice(images):
            posterior = self.model.encode(images.to(self.dtype)).latent_dist
            return torch.stack([posterior.mean, posterior.std], dim=1).float()

        return _in_slices(moments_of_slice, images, images.shape[-2:])

    def sample(self, moments, noise=None):
        """Sample latents (N, channels, h, w), scaled and shifted, from the posteriors that `moments` returned.

        `noise` is standard normal in the shape of the latents; None draws it from PyTorch's default generator.
        """
        mean, std = moments.unbind(1)
        noise = torch.randn_like(mean) if noise is None else noise
        return (mean + std * noise - self.shift) * self.scale

    def encode(self, images, noise=None):
        """Return latents of images: `sample` of their `moments`."""
        return self.sample(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, latents):
        """Return images (N, 3, H, W), about in [-1, 1], of latents (N, channels, h, w)."""

        def decode_slice(latents):
            return self.model.decode((latents / self.scale + self.shift).to(self.dtype)).sample.float()

        return _in_slices(decode_slice, latents, [side * self.downsampling for side in latents.shape[-2:]])


def _in_slices(function, batch, image_shape):
    """Return function(batch), computed for a few images at a time, so that memory does not grow with the batch."""
    size = max(1, SLICE_PIXELS // (image_shape[0] * image_shape[1]))
    return torch.cat([function(part) for part in batch.split(size)])


def open_space(vae, pixel_channels, device, dtype=torch.float32):
    """Return the space that --vae names: `PixelSpace(pixel_channels)` for 'none', else a `LatentSpace`."""
    return PixelSpace(pixel_channels) if vae == "none" else LatentSpace(vae, device, dtype)


def same_vae(one, other):
    """Return whether two values of --vae name the same autoencoder."""
    return one == other or _resolve(one) == _resolve(other)


def _resolve(vae):
    return str(pathlib.Path(vae).resolve()) if pathlib.Path(vae).is_dir() else RELEASED_VAES.get(vae, vae)


def geometry(vae, pixel_channels):
    """Return (downsampling, channels) of the space that --vae names, without its weights. Raise ValueError."""
    if vae == "none":
        return 1, pixel_channels
    if vae in RELEASED_VAES:
        return RELEASED_GEOMETRY
    return _geometry(_from_hub_or_folder("load_config", vae))


def _geometry(config):
    return 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]


def _from_hub_or_folder(method, vae, **options):
    """Return AutoencoderKL.method(vae, **options), from a folder, the hub's cache or the hub. Raise ValueError."""
    from diffusers import AutoencoderKL  # takes seconds to import, and pixel space does not need it

    load, name = getattr(AutoencoderKL, method), RELEASED_VAES.get(vae, vae)
    allowed = "'ema', 'mse', a hub name, a folder of diffusers' AutoencoderKL, and 'none' for pixel space"
    problem = f"cannot load the VAE {vae!r}; allowed are {allowed}"
    with named(problem, (OSError, ValueError, KeyError, TypeError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of its own calls to the hub
        try:
            return load(name, local_files_only=True, **options)
        except OSError:
            if pathlib.Path(name).exists():
                raise
            hub.require(f"the VAE {name}")
            return load(name, **options)
