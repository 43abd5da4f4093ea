"""The files of a checkpoint: the one place that writes, finds and reads them.

    {output_dir}/checkpoint-{step}/
        model.safetensors     trained weights, whole, under the official keys
        ema.pt                their moving average: a plain state dict
        optimizer/            torch.distributed.checkpoint
        trainer_state.json    step, arguments, and what it takes to build the model, transport and latents again

A checkpoint is written under another name and renamed when all of it is on the disk, so a folder named checkpoint-* is
complete.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import pickle
import re
import shutil
import warnings
import zipfile

import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import distributed
import files
from models import SIZES

STATE_FILE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")
TRANSPORT_KEYS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")


@dataclasses.dataclass
class Weights:
    """Weights with what is known of how they were trained.

    `config` holds any of the parts 'model' (arguments of SiT), 'transport' (of create_transport) and 'latents' (vae,
    image_size, channels), complete for checkpoints of train.py; `own` says whether it is one.
    """

    state_dict: dict
    config: dict
    own: bool
    path: pathlib.Path


def save(output_dir, step, model, ema, optimizer, state):
    """Write checkpoint-{step} under `output_dir`; all ranks call it together.

    Args:
        model, ema: unwrapped modules, the same on all ranks.
        optimizer: the optimizer of `model`.
        state: what goes into trainer_state.json, plain data with the keys 'model', 'transport' and 'latents'.

    Returns:
        The folder's path.
    """
    final = pathlib.Path(output_dir) / f"checkpoint-{step}"
    with files.written_whole(final) if distributed.rank() == 0 else contextlib.nullcontext() as partial:
        partial = distributed.from_rank_zero(partial)
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what an earlier, killed attempt left
            partial.mkdir(parents=True)
        distributed.barrier()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake
            dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=partial / "optimizer")
        if distributed.rank() == 0:
            weights = {key: value.contiguous() for key, value in model.state_dict().items()}
            safetensors.torch.save_file(weights, partial / "model.safetensors")
            torch.save({key: value.cpu() for key, value in ema.state_dict().items()}, partial / "ema.pt")
            (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    distributed.barrier()
    return final


def find_latest(output_dir):
    """The folder of the highest step among the checkpoints in `output_dir`; None if there is none."""
    found = [path for path in pathlib.Path(output_dir).glob("checkpoint-*/") if NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(NAME.fullmatch(path.name)[1]), default=None)


def load_weights(path):
    """Read the weights that `path` names, EMA where there is one.

    Args:
        path: a run folder (its latest checkpoint), a checkpoint folder, a .safetensors file, or a .pt file: a bare
            state dict or the official code's {'model', 'ema', 'opt', 'args'}. Tensors and plain data are read, no code.

    Raises:
        ValueError: nothing readable is there; the message names the path and what is allowed.
    """
    path = pathlib.Path(path)
    if path.is_dir() and not (path / STATE_FILE).is_file():
        latest = find_latest(path)
        if latest is None:
            raise ValueError(f"no checkpoint in {path}: expected folders named checkpoint-STEP, or a {STATE_FILE}")
        path = latest
    if path.is_dir():
        path = path / "ema.pt"
    if not path.is_file():
        raise ValueError(
            f"no such checkpoint: {path}; give a run folder, a checkpoint folder, a .pt file or a .safetensors file"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    state_dict, config = _weights_and_arguments(content, path)
    own = (path.parent / STATE_FILE).is_file()
    if own:
        config = read_state(path.parent)
    return Weights(state_dict, config, own, path)


def load_into(model, state_dict, source):
    """Load a state dict into a model, every key of both. Raises ValueError, naming `source`, where they do not fit."""
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the model: {' '.join(str(error).split())[:300]}") from error


def read_state(folder):
    """trainer_state.json of a checkpoint folder, as a dict. Raises ValueError where it is not readable."""
    path = pathlib.Path(folder) / STATE_FILE
    try:
        state = json.loads(path.read_text())
        if not all(isinstance(state[part], dict) for part in ("model", "transport", "latents")):
            raise ValueError("the parts 'model', 'transport' and 'latents' must be there")
        for part, key in (("transport", "path_type"), ("transport", "prediction"), ("latents", "vae")):
            if not isinstance(state[part][key], str):
                raise ValueError(f"{key} must be a name, not {state[part][key]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not of train.py: {error}") from error
    return state


def _read_safetensors(path):
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error


def _read_pt(path):
    # The official code stores its arguments as a Namespace: plain data, so it is let in, and nothing else is.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain data, or is damaged; it was not loaded") from error
    except Exception as error:  # unpickling what is no pickle fails in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is not a readable PyTorch file: {reason}") from error


def _weights_and_arguments(content, path):
    """(state dict, config) from what a file holds: EMA first, then model, then the content itself."""
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
    if "pos_embed" not in state_dict or "x_embedder.proj.weight" not in state_dict:
        raise ValueError(f"{path} holds a state dict, but not of a SiT: pos_embed or x_embedder.proj.weight is missing")
    return state_dict, config


def _config_of_official_arguments(arguments):
    """The parts of a config that the official train.py's arguments tell."""
    transport = {key: arguments[key] for key in TRANSPORT_KEYS if key in arguments}
    latents = {key: arguments[key] for key in ("vae", "image_size") if key in arguments}
    return {"model": {}, "transport": transport, "latents": latents, "model_name": arguments.get("model")}


def model_config_from_shapes(state_dict):
    """The arguments of SiT that the shapes of its weights tell: all but num_heads, which a known width tells.

    A null class is taken to be there, as in all released weights. For a width that is not in `SIZES`, 'num_heads' is
    missing from the result. Raises ValueError for shapes that are not a SiT's.
    """
    try:
        return _model_config_from_shapes(state_dict)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"the weights' names and shapes are not those of a SiT: {error}") from error


def _model_config_from_shapes(state_dict):
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
    heads = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    return config | ({"num_heads": heads[hidden_size]} if hidden_size in heads else {})
