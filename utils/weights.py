"""The weights of a SiT from any source, with what is known about their training."""

import argparse
import dataclasses
import math
import pathlib
import warnings

import torch

from models import SIZES
from utils.checkpoint import STATE_FILE, check, find_latest, read_state, steps
from utils.tensor_files import read_pt, read_safetensors

TRANSPORT_KEYS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")


@dataclasses.dataclass
class Weights:
    """A state dict with what is known about its training."""

    state_dict: dict
    config: dict  # 'model' (arguments of SiT), 'transport' (of create_transport) and 'latents', as far as known
    own: bool  # whether it is of a checkpoint of train.py, whose config is complete
    path: pathlib.Path


def load_weights(path, ema="ema"):
    """Load the weights at `path`, EMA weights where there are any. Raise ValueError if nothing readable is there.

    `path` is a run folder (its latest checkpoint), a checkpoint folder, a .safetensors file, or a .pt file: a bare
    state dict or the official code's {'model', 'ema', 'opt', 'args'}. `ema` is the name of the EMA in a folder."""
    path, names = pathlib.Path(path), [f"{ema}.pt", STATE_FILE]
    newest = path if (path / STATE_FILE).is_file() else path / f"checkpoint-{max(steps(path), default=0)}"
    if ema != "ema" and (path.is_file() or (newest.is_dir() and not (newest / names[0]).is_file())):
        emas = ", ".join(sorted(file.stem for file in newest.glob("*.pt"))) or "none to choose from"
        raise ValueError(f"--ema {ema}: {path if path.is_file() else newest} has no such EMA; it has {emas}")
    if path.is_dir() and (path / STATE_FILE).is_file():
        check(path, names)
        path = path / f"{ema}.pt"
    elif path.is_dir():
        folder, problems = find_latest(path, names)
        if folder is None:
            nothing = f"no checkpoint in {path}: expected folders named checkpoint-STEP, or a {STATE_FILE}"
            raise ValueError("; ".join(problems) or nothing)
        for problem in problems:
            warnings.warn(f"{problem}; using {folder}", stacklevel=2)
        path = folder / f"{ema}.pt"
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}; give a run or checkpoint folder, a .pt or a .safetensors file")
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pt(path)
    parts = content if isinstance(content, dict) else {}
    weights = next((parts[key] for key in ("ema", "model", "state_dict") if isinstance(parts.get(key), dict)), parts)
    if not weights or not all(isinstance(key, str) and isinstance(weights[key], torch.Tensor) for key in weights):
        raise ValueError(f"{path} holds no state dict, neither bare nor under 'ema' or 'model'")
    state_dict = {key.removeprefix("module."): value for key, value in weights.items()}
    if (path.parent / STATE_FILE).is_file():
        return Weights(state_dict, read_state(path.parent), True, path)
    if "pos_embed" not in state_dict or "x_embedder.proj.weight" not in state_dict:
        raise ValueError(f"{path} holds a state dict, but not of a SiT: pos_embed or x_embedder.proj.weight is missing")
    arguments = vars(parts["args"]) if isinstance(parts.get("args"), argparse.Namespace) else {}
    transport = {key: arguments[key] for key in TRANSPORT_KEYS if key in arguments}
    latents = {key: arguments[key] for key in ("vae", "image_size") if key in arguments}
    config = {"transport": transport, "latents": latents, "model_name": arguments.get("model")}
    return Weights(state_dict, config, False, path)


def model_config_from_shapes(state_dict):
    """Return the arguments of SiT that the shapes of its weights determine. Raise ValueError if they are not a SiT's.

    A null class is assumed, as in all released weights. num_heads is missing unless the width is one of `SIZES`."""
    try:
        tokens, hidden_size = state_dict["pos_embed"].shape[1:]
        in_channels, patch_size = state_dict["x_embedder.proj.weight"].shape[1:3]
        input_size, outputs = math.isqrt(tokens) * patch_size, state_dict["final_layer.linear.weight"].shape[0]
        config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size)
        config["depth"] = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks."))
        config["mlp_ratio"] = state_dict["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size
        config["num_classes"] = state_dict["y_embedder.embedding_table.weight"].shape[0] - 1
        config["learn_sigma"] = outputs == 2 * in_channels * patch_size**2
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"the weights' names and shapes are not those of a SiT: {error}") from error
    heads = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    return config | ({"num_heads": heads[hidden_size]} if hidden_size in heads else {})
