"""An `AutoencoderKL` of diffusers, in a folder or on the hub: found, its config and its weights checked, and loaded."""

import contextlib
import logging
import os
import warnings

import torch

from utils import hub
from utils.files import named, read_json

# Of autoencoders, which a damaged config can exceed; the known ones have 84 million parameters.
MOST_CHANNELS, MOST_LAYERS, MOST_PARAMETERS = 4096, 16, 1 << 28


def folder_of(path):
    """Return the folder of an autoencoder: `path`, or vae/ in the folder of a pipeline."""
    inside = os.path.join(path, "vae")
    is_pipeline = os.path.isfile(os.path.join(inside, "config.json"))
    return inside if is_pipeline and not os.path.isfile(os.path.join(path, "config.json")) else path


def geometry(config):
    """Return (downsampling, channels) of a config."""
    return 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]


def scale_and_shift(config):
    """Return (scale, shift) of latents. Raise ValueError if a config's numbers make none.

    diffusers' pipelines take (latent - latents_mean) * scaling_factor / latents_std where a config has these lists."""
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
    if not _finite([scale, shift]) or scale == 0:
        given = f"not {repr(scale)[:40]} and {repr(shift)[:40]}"
        raise ValueError(f"scaling_factor and shift_factor must be numbers, the first not 0, {given}")
    lists, channels = (config.get("latents_mean"), config.get("latents_std")), config["latent_channels"]
    if lists == (None, None):
        return scale, shift
    if not all(isinstance(values, (list, tuple)) and len(values) == channels and _finite(values) for values in lists):
        raise ValueError(f"latents_mean and latents_std must be lists of {channels} numbers, or both null")
    if shift or min(lists[1]) <= 0:
        raise ValueError("latents_std must be above 0, and without a shift_factor beside it")
    return [scale / value for value in lists[1]], list(lists[0])


def _finite(values):
    return all(type(value) in (int, float) and abs(value) < 1e30 for value in values)


def _check(config):
    """Raise ValueError if a config is not of an AutoencoderKL of images, or asks for absurd sizes."""
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ValueError(f"its config.json says {kind}, and only AutoencoderKL is read")
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= MOST_LAYERS:
        raise ValueError(f"block_out_channels in its config.json must be a list of numbers, not {repr(blocks)[:80]}")
    sizes = [("latent_channels", config.get("latent_channels"), MOST_CHANNELS)]
    sizes += [("layers_per_block", config.get("layers_per_block", 1), MOST_LAYERS)]
    for key, value, most in (*sizes, *(("block_out_channels", value, MOST_CHANNELS) for value in blocks)):
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{key} in its config.json must be an integer from 1 to {most}, not {repr(value)[:80]}")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise ValueError(f"{key} in its config.json is {repr(config[key])[:80]}, and images have 3 channels")
    scale_and_shift(config)


@contextlib.contextmanager
def _problems(name):
    """Context that turns any error into a ValueError of one line that names --vae: damage has many forms."""
    allowed = "'ema', 'mse', a hub name, a folder of diffusers' AutoencoderKL, and 'none' for pixel space"
    with named(f"cannot load the VAE {name!r}; allowed are {allowed}", Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of its own calls to the hub
        yield


def locate(name):
    """Return (folder or repository, folder in it, config) of an autoencoder. Raise ValueError if there is none."""
    with _problems(name):
        if os.path.exists(name):
            if not os.path.isdir(name):
                raise ValueError("it is a file, and not the folder that diffusers' save_pretrained writes")
            name, inside, path = folder_of(name), "", os.path.join(folder_of(name), "config.json")
            if not os.path.exists(path):
                raise ValueError("the folder has no config.json, and none in vae/")
        else:
            name, inside, path = hub.find_config(name)
        config = read_json(path)
        _check(config)
        return name, inside, config


def load(name, dtype):
    """Return the AutoencoderKL that `name`, a folder or a hub name, means, from there or the hub's cache.

    Raise ValueError if there is none, or its config or its weights are damaged."""
    from diffusers import AutoencoderKL  # takes seconds to import, and pixel space does not need it

    place, inside, config = locate(name)
    # The way to load with little memory needs another package, and warns of that on every load.
    options = dict(subfolder=inside or None, torch_dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True)
    with _problems(name):
        logging.getLogger("diffusers").setLevel(logging.CRITICAL)  # what it says of an error is said here
        with named("its config.json makes no autoencoder", Exception), torch.device("meta"):
            count = sum(p.numel() for p in AutoencoderKL.from_config(config).parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(f"its config.json asks for {count:,} parameters; at most {MOST_PARAMETERS:,} are read")
        try:
            model, info = AutoencoderKL.from_pretrained(place, local_files_only=True, **options)
        except OSError:
            if os.path.exists(place):
                raise
            by_hand = "give the folder of a copy"
            model, info = hub.fetch(f"the VAE {place}", by_hand, AutoencoderKL.from_pretrained, place, **options)
        # Of the loss that it was trained with there may be weights, too.
        own = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        odd = sorted(info["missing_keys"]) or sorted(key for key in info["unexpected_keys"] if key.startswith(own))
        if odd:
            raise ValueError(f"its weights are not those of its config.json: {odd[0]} and {len(odd) - 1} more differ")
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("its weights are not finite")
        return model
