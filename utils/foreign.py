"""Weights of other projects: which are described, converted, warned of and refused."""

import re

import torch

from models import TimestepEmbedder

TRANSPORT_KEYS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")
# The names of REPA (github.com/sihyun-yu/REPA) for paths, and arguments of its train.py that no SiT has.
REPA_PATHS = {"linear": "Linear", "cosine": "GVP"}
REPA_ARGUMENTS = ("enc_type", "encoder_depth", "proj_coeff")
DIT = ": DiT predicts noise at times from 0 to 999, and draws nothing but noise as a SiT"
REPA = "weights of REPA, whose time runs the other way, from data (t = 0) to noise"
# Parts of names of weights, and the model that has them. None of them is a SiT.
MARKS = {
    "projectors.": "REPA",
    "bn.running_": "REPA-E, which normalises latents in the model",
    "s_embedder.": "RAE or DDT",
    "feat_rope.": "LightningDiT",
    "mlp.w12.": "LightningDiT",
    "en_inblocks.": "MDT",
    "decoder_pos_embed": "MDT or MaskDiT",
    "transformer_blocks.": "a model of diffusers",
    "joint_blocks.": "MMDiT",
    ".q_norm.": "a model with normalised queries and keys (qk-norm)",
}


def mark_of(names):
    """Return ' (it looks like ...)' if one of the weights' names says of which other model they are, else ''."""
    found = next((model for mark, model in MARKS.items() if any(mark in name for name in names)), None)
    return f" (it looks like {found})" if found else ""


def adapt(state_dict, arguments, path):
    """Return (state dict, config as far as known, guided channels, notes) of weights that train.py did not write.

    `arguments` are those that the weights were trained with, as far as their file says. Notes are lines for the user.
    Raise ValueError if they are not of a SiT."""
    name = str(arguments.get("model"))[:80]
    if "dit" in name.lower():
        why = DIT if name.lower().startswith("dit") else ""
        raise ValueError(f"{path} is a checkpoint of {name}, not of a SiT{why}")
    known = {key: value for key, value in arguments.items() if isinstance(value, (str, int, float))}
    transport = {key: known[key] for key in TRANSPORT_KEYS if key in known}
    latents = {key: known[key] for key, kind in (("vae", str), ("image_size", int)) if isinstance(known.get(key), kind)}
    config = {"transport": transport, "latents": latents}
    config |= {"model_name": known.get("model"), "num_classes": known.get("num_classes")}
    named = transport.get("path_type") in REPA_PATHS or transport.get("prediction") == "v"
    has_projectors = any(key.startswith("projectors.") for key in state_dict)
    if named or has_projectors or any(key in arguments for key in REPA_ARGUMENTS):
        return *_adapt_repa(state_dict, known, config, path), "all", [f"{path}: {REPA}; they were converted"]
    return state_dict, config, 3, [] if arguments else _warning_of_name(path)


def _warning_of_name(path):
    """Return a line for the user if the names of a file and its folder say that it is not of a SiT."""
    path = path.absolute()
    repository = [part for part in path.parts if part.startswith("models--")]  # the folder of the hub's cache
    for name in (path.name, path.parent.name, *repository):
        other = re.search(r"(?<![a-z])(dit|repa)(?![a-z])", name, re.IGNORECASE)
        is_repa = other and other[1].lower() == "repa"  # whose files are called SiT, too
        if is_repa or (other and "sit" not in (path.name + name).lower()):
            kind, why = "DiT", DIT
            if is_repa:
                kind, why = "REPA", ", whose time runs the other way: without projectors, it is not converted"
            return [f"warning: {path} is named like weights of {kind}, and is read as a SiT's{why}"]
    return []


def _adapt_repa(state_dict, known, config, path):
    """Return (state dict, config) of REPA's weights as those of a SiT. Raise ValueError for other predictions."""
    transport, latents = config["transport"], config["latents"]
    if transport.get("prediction", "v") not in ("v", "velocity"):
        raise ValueError(f"{path}: {REPA}; its prediction must be 'v', not {transport['prediction']!r}")
    if transport.get("path_type", "linear") not in REPA_PATHS:
        raise ValueError(f"{path}: {REPA}; its path must be linear or cosine, not {transport['path_type']!r}")
    transport = {"prediction": "velocity"}
    if "path_type" in known:
        transport["path_type"] = REPA_PATHS[known["path_type"]]
    if "resolution" in known:
        latents = latents | {"image_size": known["resolution"]}
    kept = {key: value for key, value in state_dict.items() if not key.startswith("projectors.")}
    if any(key.startswith("decoder_blocks.") for key in kept):  # its first checkpoints count them from 0 again
        encoder = len({key.split(".")[1] for key in kept if key.startswith("blocks.")})
        later = re.compile(r"decoder_blocks\.(\d+)")
        kept = {later.sub(lambda match: f"blocks.{encoder + int(match[1])}", key): value for key, value in kept.items()}
    return reverse_time(kept), config | {"transport": transport, "latents": latents, "project": REPA}


def reverse_time(state_dict):
    """Return weights whose output at time t is minus that of the given weights at time 1 - t.

    So x_t = (1 - t) x + t noise with velocity noise - x becomes this project's path. Time enters the network as cos(ft)
    and sin(ft) alone, which the first layer of its embedding mixes: those of f(1 - t) are a rotation of those of ft.
    Computed in float64; the weights keep their dtype."""
    state_dict = dict(state_dict)
    key = "t_embedder.mlp.0.weight"
    if key in state_dict:
        weight = state_dict[key].double()
        one = torch.ones(1, dtype=torch.float64)
        cos, sin = TimestepEmbedder.timestep_embedding(one, weight.shape[1]).chunk(2, dim=1)
        of_cos, of_sin = weight.chunk(2, dim=1)
        rotated = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
        state_dict[key] = rotated.to(state_dict[key].dtype)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if key in state_dict:
            state_dict[key] = -state_dict[key]
    return state_dict
