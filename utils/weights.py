"""The weights of a SiT from any source, with what is known about their training."""

import argparse
import dataclasses
import math
import pathlib
import types
import warnings

import torch

import models
from utils import files, foreign, posthoc
from utils.checkpoint import MANIFEST, STATE_FILE, check, check_config, find_latest, paths, read_state
from utils.hub import WEIGHTS_SUFFIXES
from utils.tensor_files import check_expansion, check_fit, config_of, read_pt, read_safetensors

TRANSPORT_KEYS = foreign.TRANSPORT_KEYS
# Where a .pt file may hold its EMA, and its trained weights.
EMA_KEYS = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")
KEYS = (*EMA_KEYS, "model", "state_dict", "model_state_dict", "module")
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
ANCHOR = "x_embedder.proj.weight"  # a weight that every SiT has
MOST_BLOCKS = 1000
ARGUMENTS = (dict, argparse.Namespace, types.SimpleNamespace)


@dataclasses.dataclass
class Weights:
    """A state dict with what is known about its training."""

    state_dict: dict
    config: dict  # 'model' (arguments of SiT), 'transport' (of create_transport), 'latents', 'data', as far as known
    own: bool  # whether they are of train.py, whose config is complete
    path: pathlib.Path
    guided_channels: int | str = 3  # that their project guides by default: a number or 'all'
    notes: list = dataclasses.field(default_factory=list)  # lines for the user


def load_weights(path, ema="ema"):
    """Load the weights at `path`, EMA weights where there are any. Raise ValueError if nothing readable is there.

    `path` is a run folder (its latest checkpoint), a checkpoint folder, a folder with one file of weights, or a file: a
    .safetensors, or a .pt with a bare state dict or the official code's {'model', 'ema', 'opt', 'args'}. `ema` is the
    name of the EMA in a folder, or the sigma_rel of one that is reconstructed there, see `posthoc`."""
    sigma_rel = posthoc.length_of(ema)
    if sigma_rel is None:
        path, notes = _find_file(pathlib.Path(path), ema)
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_pt(path)
    else:
        with files.named(f"EMA {ema} needs a run with --ema-snapshots", ValueError):
            path, notes = _find_file(pathlib.Path(path), next(iter(posthoc.TRACKED)))
            step = read_state(path.parent).get("step")
        content, note = posthoc.reconstruct(path.parent.resolve().parent, step, sigma_rel)
        notes = [*notes, note]
    parts = content if isinstance(content, dict) else {}
    found = _find_state_dict(parts)
    if found is None:
        raise ValueError(f"{path} holds no state dict, neither bare nor under 'ema' or 'model'")
    emas = {key: part for key, part in parts.items() if "ema" in str(key) and isinstance(part, (dict, list)) and part}
    if emas and found is not content and _find_state_dict(emas) is None:
        problem = f"what it holds as {', '.join(map(str, emas))} is no state dict under a known name"
        notes.append(f"{path}: {problem}; the trained weights are used")
    check_expansion(path, sum(value.numel() * value.element_size() for value in found.values()))
    state_dict = _without_prefixes(found, path)
    config = _own_config(path, found, content is found)
    if config is not None:
        return Weights(state_dict, config, True, path, "all", notes)
    arguments = next((parts[key] for key in ("args", "config") if isinstance(parts.get(key), ARGUMENTS)), {})
    arguments = arguments if isinstance(arguments, dict) else vars(arguments)
    state_dict, config, guided_channels, more = foreign.adapt(state_dict, arguments, path)
    if "pos_embed" not in state_dict or ANCHOR not in state_dict:
        missing = f"pos_embed or {ANCHOR} is missing{foreign.mark_of(state_dict)}"
        raise ValueError(f"{path} holds a state dict, but not of a SiT: {missing}")
    return Weights(state_dict, config, False, path, guided_channels, [*notes, *more])


def _find_file(path, ema):
    """Return (the file of weights that `path` means, lines for the user). Raise ValueError if there is none."""
    if path.is_file():
        _refuse_ema(ema, path)
        return path, []
    if not path.is_dir():
        raise ValueError(f"no such checkpoint: {path}; give a run or checkpoint folder, a .pt or a .safetensors file")
    names, is_checkpoint = [f"{ema}.pt", STATE_FILE], (path / STATE_FILE).is_file()
    folders = [path] if is_checkpoint else [folder for _, folder in paths(path)]
    if not folders:
        return _only_file(path, ema), []
    if not (folders[0] / names[0]).is_file():
        _refuse_ema(ema, folders[0])
    unverified = [folder for folder in folders if not (folder / MANIFEST).is_file()]
    if is_checkpoint and not unverified:
        check(path, names)
        return path / names[0], []
    folder, problems = (None, []) if is_checkpoint else find_latest(path, names)
    for problem in problems if folder is not None else ():
        warnings.warn(f"{problem}; using {folder}", stacklevel=3)
    if folder is not None:
        return folder / names[0], [f"the newest checkpoint of {path} is {folder.name}"]
    # Of a checkpoint that was copied to share its weights, often not all files were.
    files_of = [folder / name for folder in unverified[:1] for name in (names[0], "model.safetensors")]
    file = next((file for file in files_of if file.is_file()), None)
    if file is None:
        raise ValueError("; ".join(problems) or f"{path} holds neither {names[0]} nor model.safetensors")
    notes = [f"{file.parent} has no {MANIFEST}: {file.name} was not verified"]
    return file, notes + ([] if file.name == names[0] else [f"it has no {names[0]}: the trained weights are used"])


def _refuse_ema(ema, path):
    """Raise ValueError that a file or folder has not the EMA that was asked for by another name than the default."""
    if ema != "ema":
        emas = ", ".join(sorted(file.stem for file in path.glob("*.pt"))) or "none to choose from"
        raise ValueError(f"EMA {ema}: {path} has no such EMA; it has {emas}")


def _only_file(folder, ema):
    """Return the one file of weights in a folder, or its EMA. Raise ValueError unless there is one."""
    if (folder / f"{ema}.pt").is_file():
        return folder / f"{ema}.pt"
    _refuse_ema(ema, folder)
    inside = sorted([*folder.glob("[!.]*"), *folder.glob("checkpoints/[!.]*")])  # the official code's
    found = [path for path in inside if path.suffix in WEIGHTS_SUFFIXES and path.is_file()]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(path.relative_to(folder)) for path in found)
    if found:
        raise ValueError(f"{folder} holds several files of weights; give one of them: {names}")
    expected = f"folders named checkpoint-STEP, a {STATE_FILE}, or one file of weights ({', '.join(WEIGHTS_SUFFIXES)})"
    pipeline = "; it is a pipeline of diffusers" if (folder / "model_index.json").is_file() else ""
    raise ValueError(f"no checkpoint in {folder}: expected {expected}{pipeline}")


def _find_state_dict(parts, depth=2):
    """Return the state dict in what a .pt file holds, EMA first; None if there is none."""
    if parts and all(isinstance(key, str) and isinstance(parts[key], torch.Tensor) for key in parts):
        return parts
    inner = [parts[key] for key in KEYS if isinstance(parts.get(key), dict)] if depth else []
    return next(filter(None, (_find_state_dict(part, depth - 1) for part in inner)), None)


def _without_prefixes(state_dict, path):
    """Return a state dict under the names of SiT, without those that wrappers (DDP, torch.compile, ...) put before."""
    names = {key: key for key in state_dict if key != "n_averaged"}  # of torch's AveragedModel
    for wrapper in WRAPPERS:
        names = {key: name.replace(wrapper, "") for key, name in names.items()}
    anchors = [name for name in names.values() if f".{name}".endswith(f".{ANCHOR}")]
    prefix = anchors[0].removesuffix(ANCHOR) if len(anchors) == 1 else ""
    if all(name.startswith(prefix) for name in names.values()):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path} holds weights twice, with and without the prefix of a wrapper such as {WRAPPERS[0]}")
    return {name: state_dict[key] for key, name in names.items()}


def _own_config(path, state_dict, is_bare):
    """Return the config that train.py stored in a file or beside it; None for weights of others.

    Raise ValueError if it is damaged, or if two of them contradict each other."""
    config, state_file, hub_file = config_of(state_dict), path.parent / STATE_FILE, path.parent / "config.json"
    if config is not None:
        check_config(config, path)
    if is_bare and state_file.is_file():
        state = read_state(path.parent)
        if config is not None:
            pairs = [(config[part], state[part]) for part in ("model", "transport", "latents")]
            pairs.append(({"class_names": class_names(config)}, {"class_names": class_names(state)}))
            for key, value, other in ((key, here[key], there.get(key)) for here, there in pairs for key in here):
                if other != value:
                    given = f"{key} is {str(other)[:80]}, and {str(value)[:80]} in {path.name}"
                    raise ValueError(f"{state_file} is damaged, or of other weights: {given}")
        return state
    if config is None and hub_file.is_file():
        described = files.read_json(hub_file)
        if all(isinstance(described.get(part), dict) for part in ("model", "transport", "latents")):
            check_config(described, hub_file)
            return described
    return config


def build_on_meta(network, arguments):
    """Return network(**arguments) without memory for its weights. Raise ValueError if weights do not fill all of it."""
    with torch.device("meta"):
        model = network(**arguments)
    if missing := dict(model.named_buffers()).keys() - model.state_dict().keys():
        raise ValueError(f"the model's buffers must be persistent: {', '.join(missing)}")
    return model


def build_model(arguments, weights):
    """Return the SiT of `weights` on the meta device. Raise ValueError if the weights do not fit it."""
    state_dict = weights.state_dict
    if arguments["depth"] > min(len(state_dict), MOST_BLOCKS):
        count = f"{len(state_dict)} weights for {arguments['depth']} blocks"
        raise ValueError(f"{weights.path} does not fit the model: it has {count}")
    model = build_on_meta(models.SiT, arguments)
    expected = model.state_dict()
    hint = foreign.mark_of([key for key in state_dict if key not in expected])
    check_fit(expected, state_dict, weights.path, hint)
    return model


def model_config_from_shapes(state_dict, num_classes=None):
    """Return the arguments of SiT that the shapes of its weights determine. Raise ValueError if they are not a SiT's.

    A null class is assumed, as in all released weights, unless there are embeddings of `num_classes` alone. num_heads
    is missing unless the width is one of `SIZES`."""
    try:
        tokens, hidden_size = state_dict["pos_embed"].shape[1:]
        in_channels, patch_size = state_dict[ANCHOR].shape[1:3]
        input_size, outputs = math.isqrt(tokens) * patch_size, state_dict["final_layer.linear.weight"].shape[0]
        config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size)
        config["depth"] = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks."))
        width, joined = state_dict["blocks.0.mlp.fc1.weight"].shape[0], state_dict["blocks.0.mlp.fc2.weight"].shape[1]
        if width != joined:
            raise ValueError("their MLP is a SwiGLU's; of such blocks, train.py's checkpoints alone say all")
        config["mlp_ratio"] = width / hidden_size
        rows = state_dict["y_embedder.embedding_table.weight"].shape[0]
        config |= {"num_classes": rows, "class_dropout_prob": 0.0} if rows == num_classes else {"num_classes": rows - 1}
        config["learn_sigma"] = outputs == 2 * in_channels * patch_size**2
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        mark = foreign.mark_of(state_dict)
        raise ValueError(f"the weights' names and shapes are not those of a SiT{mark}: {error}") from error
    heads = {size["hidden_size"]: size["num_heads"] for size in models.SIZES.values()}
    return config | ({"num_heads": heads[hidden_size]} if hidden_size in heads else {})


def class_names(config):
    """Return the class names of a checkpoint's config: a list of str; None if it has none, as old ones have not."""
    data = config.get("data")
    names = data.get("class_names") if isinstance(data, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
