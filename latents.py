"""The space that the network works in: VAE latents, scaled and shifted to unit variance, or pixels as they are.

Images are float tensors (N, 3, H, W) in [-1, 1] (in pixel space with the channels of the data). Nothing outside this
file knows of scaling factors, shifts or the size of a latent.
"""

import pathlib
import warnings

import torch

import hub

# The autoencoders of the released models, by their short names. Their geometry stands here so that sizes can be checked
# without the network.
RELEASED_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
RELEASED_GEOMETRY = (8, 4)


class PixelSpace:
    """No autoencoder: encode and decode return their input."""

    downsampling = 1

    def __init__(self, channels):
        self.channels = channels

    def encode(self, images, noise=None):
        return images

    def decode(self, latents):
        return latents


class AutoencoderSpace:
    """The latent space of a frozen `diffusers.AutoencoderKL`.

    Args:
        vae: 'ema', 'mse', a hub name, or a folder that `save_pretrained` wrote.
        device: where to run it.

    Raises:
        ValueError: the autoencoder is neither here nor reachable.
    """

    def __init__(self, vae, device):
        from diffusers import AutoencoderKL  # takes seconds to import, and pixel space does without

        model = _from_hub_or_folder(AutoencoderKL.from_pretrained, vae)
        self.model = model.to(device).eval().requires_grad_(False)
        self.downsampling, self.channels = _geometry(self.model.config)
        self.scale = self.model.config.scaling_factor
        self.shift = self.model.config.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode(self, images, noise=None):
        """Draw latents (N, channels, H / downsampling, W / downsampling) from the posterior of images (N, 3, H, W).

        `noise` is standard normal in the shape of the latents; None draws it here.
        """
        posterior = self.model.encode(images).latent_dist
        if noise is None:
            noise = torch.randn_like(posterior.mean)
        return (posterior.mean + posterior.std * noise - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Images (N, 3, H, W), about [-1, 1], from latents."""
        return self.model.decode(latents / self.scale + self.shift).sample


def open_space(vae, pixel_channels, device):
    """The space that `--vae` names: 'none' for pixels with `pixel_channels` channels, else an autoencoder's latents."""
    return PixelSpace(pixel_channels) if vae == "none" else AutoencoderSpace(vae, device)


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
