"""Weights of a SiT from any source: checkpoints of train.py, of the official code, and bare state dicts."""

import argparse
import dataclasses
import math
import pathlib
import warnings

import torch

from models import SIZES
from utils import checkpoint
from utils.checkpoint import STATE_FILE
from utils.tensor_files import read_pt, read_safetensors

TRANSPORT_KEYS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")


@dataclasses.dataclass
class Weights:
    """A state dict with what is known about its training.

    Attributes:
        config: any of 'model' (arguments of SiT), 'transport' (of create_transport) and 'latents' (vae, image_size,
            channels); complete for checkpoints of train.py.
        own: whether it is a checkpoint of train.py.
    """

    state_dict: dict
    config: dict
    own: bool
    path: pathlib.Path


def load_weights(path, ema="ema"):
    """Load the weights at `path`, EMA weights where there are any.

    Args:
        path: a run folder (its latest checkpoint), a checkpoint folder, a .safetensors file, or a .pt file: a bare
            state dict or the official code's {'model', 'ema', 'opt', 'args'}.
        ema: name of the EMA of a run or checkpoint folder.

    Raises:
        ValueError: nothing readable is at `path`; the message names it and what is allowed.
    """
    path, names = pathlib.Path(path), [f"{ema}.pt", STATE_FILE]
    if path.is_dir():
        folder = path
        if not (path / STATE_FILE).is_file():
            folder, problems = checkpoint.find_latest(path, names)
            if folder is None:
                expected = f"expected folders named checkpoint-STEP, or a {STATE_FILE}"
                raise ValueError("; ".join(problems) or f"no checkpoint in {path}: {expected}")
            for problem in problems:
                warnings.warn(f"{problem}; using {folder}", stacklevel=2)
        else:
            checkpoint.check(folder, names)
        path = folder / f"{ema}.pt"
    if not path.is_file():
        raise ValueError(
            f"no such checkpoint: {path}; give a run folder, a checkpoint folder, a .pt file or a .safetensors file"
        )
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pt(path)
    own = (path.parent / STATE_FILE).is_file()
    state_dict, config = _state_dict_and_config(content, path, own)
    return Weights(state_dict, checkpoint.read_state(path.parent) if own else config, own, path)


def _state_dict_and_config(content, path, own):
    """Return (state dict, config) of a file's content: its EMA, else its model, else the content itself."""
    config = {}
    if isinstance(content, dict) and isinstance(content.get("args"), argparse.Namespace):
        config = _config_of_official_arguments(vars(content["args"]))
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{path} holds no state dict, neither bare nor under 'ema' or 'model'")
    state_dict = {key.removeprefix("module."): value for key, value in content.items()}
    if not own and ("pos_embed" not in state_dict or "x_embedder.proj.weight" not in state_dict):
        raise ValueError(f"{path} holds a state dict, but not of a SiT: pos_embed or x_embedder.proj.weight is missing")
    return state_dict, config


def _config_of_official_arguments(arguments):
    """Return the config that the official train.py's arguments hold."""
    transport = {key: arguments[key] for key in TRANSPORT_KEYS if key in arguments}
    latents = {key: arguments[key] for key in ("vae", "image_size") if key in arguments}
    return {"model": {}, "transport": transport, "latents": latents, "model_name": arguments.get("model")}


def model_config_from_shapes(state_dict):
    """Return the arguments of SiT that the shapes of its weights determine.

    All but num_heads, which is known for the widths in `SIZES` and missing otherwise. A null class is assumed, as in
    all released weights. Raise ValueError for shapes that are not a SiT's.
    """
    try:
        tokens, hidden_size = state_dict["pos_embed"].shape[1:]
        in_channels, patch_size = state_dict["x_embedder.proj.weight"].shape[1:3]
        outputs = state_dict["final_layer.linear.weight"].shape[0]
        config = dict(
            input_size=math.isqrt(tokens) * patch_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
            mlp_ratio=state_dict["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
            num_classes=state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
            learn_sigma=outputs == 2 * in_channels * patch_size**2,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"the weights' names and shapes are not those of a SiT: {error}") from error
    heads = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    return config | ({"num_heads": heads[hidden_size]} if hidden_size in heads else {})
