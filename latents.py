"""The space that the network works in: VAE latents, scaled and shifted to unit variance, or pixels as they are.

Images are float tensors (N, 3, H, W) in [-1, 1] (in pixel space with the channels of the data). Nothing outside this
file knows of scaling factors, shifts or the size of a latent.
"""

import functools
import pathlib
import warnings

import torch

import hub

# The autoencoders of the released models, by their short names. Their geometry stands here so that sizes can be checked
# without the network.
RELEASED_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
RELEASED_GEOMETRY = (8, 4)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLICE_PIXELS = 32 * 256 * 256  # pixels that go through the autoencoder at a time


class Space:
    """What the network works in. `prepare` makes of images what `draw` takes, and `draw` is where noise comes in."""

    in_pixels = False

    def encode(self, images, noise=None):
        """Latents (N, channels, h, w) of images, or of what stands for them; see `draw`."""
        return self.draw(self.prepare(images), noise)


class PixelSpace(Space):
    """No autoencoder: what is trained on and drawn are the images themselves."""

    downsampling = 1
    in_pixels = True
    name = "none"

    def __init__(self, channels):
        self.channels = channels

    def prepare(self, images):
        return images

    def draw(self, images, noise=None):
        return images

    def decode(self, latents):
        return latents


class AutoencoderSpace(Space):
    """The latent space of a frozen `diffusers.AutoencoderKL`.

    Args:
        vae: 'ema', 'mse', a hub name, or a folder that `save_pretrained` wrote.
        device: where to run it.
        dtype: precision to run it in; what goes in and comes out is float32.

    Raises:
        ValueError: the autoencoder is neither here nor reachable.
    """

    def __init__(self, vae, device, dtype=torch.float32):
        from diffusers import AutoencoderKL  # takes seconds to import, and pixel space does without

        # Its way to load with little memory needs another package, and says so on every load.
        load = functools.partial(AutoencoderKL.from_pretrained, torch_dtype=dtype, low_cpu_mem_usage=False)
        model = _from_hub_or_folder(load, vae)
        # Where convolutions are fast with channels last, which is on GPUs.
        layout = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
        self.model = model.to(device, memory_format=layout).eval().requires_grad_(False)
        self.name = _resolve(vae)
        self.dtype = dtype
        self.downsampling, self.channels = _geometry(self.model.config)
        self.scale = self.model.config.scaling_factor
        self.shift = self.model.config.get("shift_factor") or 0.0

    @torch.no_grad()
    def moments(self, images):
        """Posterior mean and standard deviation of images (N, 3, H, W), unscaled: float32 (N, 2, channels, h, w)."""

        def moments_of_slice(images):
            posterior = self.model.encode(images.to(self.dtype)).latent_dist
            return torch.stack([posterior.mean, posterior.std], dim=1).float()

        return _in_slices(moments_of_slice, images, images.shape[-2:])

    def prepare(self, images):
        """What `draw` takes, of images (N, 3, H, W): their posterior's moments, in which nothing is random."""
        return self.moments(images)

    def draw(self, moments, noise=None):
        """Draw latents (N, channels, H / downsampling, W / downsampling) from the posterior moments of images.

        `noise` is standard normal in the shape of the latents; None draws it here.
        """
        return draw(moments, noise, self.scale, self.shift)

    @torch.no_grad()
    def decode(self, latents):
        """Images (N, 3, H, W), about [-1, 1], from latents."""

        def decode_slice(latents):
            return self.model.decode((latents / self.scale + self.shift).to(self.dtype)).sample.float()

        height, width = (side * self.downsampling for side in latents.shape[-2:])
        return _in_slices(decode_slice, latents, (height, width))


class CachedSpace(Space):
    """A latent space whose encoding extract_latents.py did beforehand; the autoencoder is loaded to decode alone.

    Args:
        vae, device, dtype: as for `AutoencoderSpace`.
        scale, shift: as the autoencoder's config has them.
    """

    def __init__(self, vae, device, dtype, scale, shift):
        self.arguments = (vae, device, dtype)
        self.name = _resolve(vae)
        self.scale = scale
        self.shift = shift
        self.autoencoder = None

    def load_decoder(self):
        """Load the autoencoder, unless it is there. Raises ValueError."""
        self.autoencoder = self.autoencoder or AutoencoderSpace(*self.arguments)

    def prepare(self, moments):
        """The posterior moments (N, 2, channels, h, w) of cached images, as they are."""
        return moments

    def draw(self, moments, noise=None):
        """Draw latents (N, channels, h, w) from the posterior moments (N, 2, channels, h, w) of cached images."""
        return draw(moments, noise, self.scale, self.shift)

    def decode(self, latents):
        self.load_decoder()
        return self.autoencoder.decode(latents)


def draw(moments, noise, scale, shift):
    """Scaled and shifted latents (N, C, h, w) from posterior moments (N, 2, C, h, w): mean + std noise."""
    mean, std = moments.unbind(1)
    noise = torch.randn_like(mean) if noise is None else noise
    return (mean + std * noise - shift) * scale


def _in_slices(function, batch, image_shape):
    """function(batch) a few images at a time, so that memory does not grow with the batch."""
    size = max(1, SLICE_PIXELS // (image_shape[0] * image_shape[1]))
    return torch.cat([function(part) for part in batch.split(size)])


def open_space(vae, pixel_channels, device, dtype=torch.float32):
    """The space that `--vae` names: 'none' for pixels with `pixel_channels` channels, else an autoencoder's latents."""
    return PixelSpace(pixel_channels) if vae == "none" else AutoencoderSpace(vae, device, dtype)


def same_vae(one, other):
    """Whether two values of --vae name the same autoencoder."""
    return one == other or _resolve(one) == _resolve(other)


def _resolve(vae):
    return str(pathlib.Path(vae).resolve()) if pathlib.Path(vae).is_dir() else RELEASED_VAES.get(vae, vae)


def geometry(vae, pixel_channels):
    """(downsampling, channels) of the space that `--vae` names, without loading weights. Raises ValueError as above."""
    if vae == "none":
        return 1, pixel_channels
    if vae in RELEASED_VAES:
        return RELEASED_GEOMETRY
    from diffusers import AutoencoderKL

    return _geometry(_from_hub_or_folder(AutoencoderKL.load_config, vae))


def _geometry(config):
    return 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]


def _from_hub_or_folder(load, vae):
    """load(name of the VAE), from a folder or the hub's cache if it is there, else from the hub. Raises ValueError."""
    name = RELEASED_VAES.get(vae, vae)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers about its own calls of the hub
            try:
                return load(name, local_files_only=True)
            except OSError:
                if pathlib.Path(name).exists():
                    raise
                hub.require(f"the VAE {name}")
                return load(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot load the VAE {vae!r}: {' '.join(str(error).split())} - allowed are 'ema', 'mse', a hub name, a "
            "folder of diffusers' AutoencoderKL, and 'none' for pixel space"
        ) from error
