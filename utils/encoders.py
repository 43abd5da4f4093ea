"""Image encoders of timm: their names and weights, and frozen features of the patches of images."""

import contextlib
import hashlib
import os
import pathlib

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from utils import files, hub, tensor_files

WEIGHTS = "model.safetensors"
DINOV2 = "vit_base_patch14_dinov2.lvd142m"  # that REPA aligns with
KINDS = f"a model of timm with patch tokens, or a folder of one (config.json, {WEIGHTS})"


def full_name(name):
    """Return a model's name in timm with its tag. Raise RuntimeError if timm does not know the model or the tag."""
    config = timm.models.get_pretrained_cfg(name)
    return f"{config.architecture}.{config.tag}" if config and config.tag else name


def is_same(encoder, name, sha256):
    """Return whether an encoder, a folder or a name in timm, has weights of this SHA-256, or this full name."""
    if os.path.isdir(encoder):
        return read_weights(pathlib.Path(encoder) / WEIGHTS)[1] == sha256
    with contextlib.suppress(RuntimeError):
        return encoder == name or full_name(encoder) == name
    return False


def weights_of(network, name, by_hand):
    """Return the path of the weights of a network that timm made, fetched once. Raise ValueError, with `by_hand`."""
    if not (repository := network.pretrained_cfg.get("hf_hub_id")):
        raise ValueError(f"timm has no weights of {name}: {by_hand}")
    return hub.resolve(f"{repository}/{WEIGHTS}")


def read_weights(path):
    """Return the tensors of an encoder, {key: tensor}, and their SHA-256, whichever kind of file they are in.

    Meta's files have a token for masks beside the network's, and those of classifiers have a head: both are left out.
    Raise ValueError if the file cannot be read."""
    read = tensor_files.read_safetensors if path.suffix == ".safetensors" else tensor_files.read_pt
    tensors = {key: v for key, v in read(path).items() if key != "mask_token" and not key.startswith("head")}
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(tensors[key].detach().float().numpy().tobytes())
    return tensors, digest.hexdigest()


class PatchEncoder:
    """Features of the patches of images by a frozen model of timm, one for each place of a grid (h, w).

    `encoder` is the model's name, or a folder that `timm.models.save_for_hf` wrote with safetensors. Images are resized
    (bicubic, antialiased) to `size`, the grid times the patch size, and position embeddings are resampled as timm does.
    `width` is the number of features, and `flops` the operations for an image. Raise ValueError if there is no such
    model, or it does not give one token for each patch."""

    def __init__(self, encoder, grid):
        self.grid, self.network = tuple(grid), None
        self.folder = pathlib.Path(encoder) if os.path.isdir(encoder) else None
        architecture, options, self.normalisation = encoder, {}, {}
        with files.named(f"{encoder} is not {KINDS}", Exception):  # of many kinds
            if self.folder is not None:
                if not (self.folder / "config.json").is_file():
                    raise ValueError("it has no config.json")
                if not (self.folder / WEIGHTS).is_file():
                    raise ValueError(
                        f"it has no {WEIGHTS}, which timm.models.save_for_hf(..., safe_serialization=True) writes"
                    )
                config = files.read_json(self.folder / "config.json")
                if "architecture" not in config:
                    raise ValueError("its config.json names no architecture, as timm's does")
                architecture, options = config["architecture"], config.get("model_args", {})
                self.normalisation = config.get("pretrained_cfg", config)
            self.name = full_name(architecture) if self.folder is None else str(self.folder.resolve())
            self.options = {"model_name": architecture, **options, "num_classes": 0}
            with torch.device("meta"):
                network = timm.create_model(**self.options)
                if not hasattr(network, "patch_embed"):
                    raise ValueError(f"{type(network).__name__} has no patches")
                self.size = tuple(side * network.feature_info[-1]["reduction"] for side in self.grid)
                self.options["img_size"] = self.size
                network = timm.create_model(**self.options).eval()
                with FlopCounterMode(display=False) as counter:
                    tokens = network.forward_features(torch.empty(1, 3, *self.size))
            patches = self.grid[0] * self.grid[1]
            if tokens.shape[1:-1] != (patches + getattr(network, "num_prefix_tokens", 0),):
                raise ValueError(f"{type(network).__name__} has no token for each of {patches} patches")
        self.normalisation = network.pretrained_cfg | self.normalisation
        self.width, self.flops, self._described = tokens.shape[-1], counter.get_total_flops(), network

    def path(self):
        """Return the path of the weights, fetched once. Raise ValueError if they cannot be fetched."""
        if self.folder is not None:
            return self.folder / WEIGHTS
        with files.named(f"the weights of {self.name}, in place of which a folder can be given", ValueError):
            return weights_of(self._described, self.name, f"give a folder of one (config.json, {WEIGHTS})")

    def load(self):
        """Load the weights, and return their SHA-256. Raise ValueError if they cannot be fetched or do not fit."""
        path = self.path()
        with files.named(f"{path} holds no weights of {self.name}", Exception):
            tensors, digest = read_weights(path)
            overlay = {"state_dict": dict(tensors)}
            network = timm.create_model(**self.options, pretrained=True, pretrained_cfg_overlay=overlay)
            if missing := [key for key in network.state_dict() if key not in tensors]:
                raise ValueError(f"it lacks {missing[0]}")
            network.pretrained_cfg.pop("state_dict", None)
        self.network = network.eval().requires_grad_(False)
        return digest

    @torch.no_grad()
    def __call__(self, images):
        """Return features (N, h * w, width), row by row, of images (N, 1 or 3, H, W) in [-1, 1] on any device.

        They are behind the network's last norm, without class and register tokens."""
        x = images.expand(-1, 3, -1, -1)
        x = torch.nn.functional.interpolate(x, self.size, mode="bicubic", antialias=True)  # (N, 3, height, width)
        mean, std = (x.new_tensor(self.normalisation[key])[:, None, None] for key in ("mean", "std"))
        tokens = self.network.to(x.device).forward_features(((x + 1) / 2 - mean) / std)  # (N, P + h * w, width)
        return tokens[:, -self.grid[0] * self.grid[1] :].to(x.dtype)
