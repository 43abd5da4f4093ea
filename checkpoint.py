"""The files of a checkpoint: the one place that writes, finds, checks and reads them.

    {output_dir}/checkpoint-{step}/
        model.safetensors     trained weights, whole, under the official keys
        ema.pt                their moving average: a plain state dict
        optimizer/            torch.distributed.checkpoint: loads on any number of ranks, sharded or not
        trainer_state.json    step, arguments, and what it takes to build the model, transport and latents again
        manifest.json         size and SHA-256 of each of these files

A checkpoint is written under another name and renamed when all of it is on the disk, so a folder named checkpoint-* was
complete; the manifest tells whether it still is.
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
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import distributed
import files
from models import SIZES

STATE_FILE = "trainer_state.json"
MANIFEST = "manifest.json"
WHOLE_FILES = ("model.safetensors", "ema.pt", STATE_FILE)
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


class Writer:
    """Writes the checkpoints of a run while training goes on; all ranks make one and call it together.

    Args:
        output_dir: the run's folder.
        keep_last: keep this many of the newest checkpoints; None: all.
        keep_every: keep those of steps that this divides, too; None: no others.
        report: called with a line of text, on rank 0, when a checkpoint is written or was not; from another thread.
    """

    def __init__(self, output_dir, keep_last=None, keep_every=None, report=print):
        self.output_dir = pathlib.Path(output_dir)
        self.keep_last, self.keep_every, self.report = keep_last, keep_every, report
        # One process is no mistake. Not for a block alone: the library says so from a thread of its own.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        self.group = distributed.side_group()
        self.thread = ThreadPoolExecutor(1)
        self.pending = None
        if distributed.rank() == 0:
            for leftover in self.output_dir.glob(".checkpoint-*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step, model, ema, optimizer, state):
        """Copy what checkpoint-{step} holds, and begin to write it. Waits until the one before is written.

        Args:
            model, ema: modules that are not wrapped by DDP.
            optimizer: the optimizer of `model`.
            state: what goes into trainer_state.json, plain data with the keys 'model', 'transport' and 'latents'.

        Returns:
            Seconds that this call took, for which training waited.
        """
        start = time.perf_counter()
        self.finish()
        final = self.output_dir / f"checkpoint-{step}"
        try:
            partial = distributed.on_rank_zero(_make_partial, final)
        except ValueError as error:
            self.pending = self.thread.submit(self._note, f"{final.name} was not written: {error}")
            return time.perf_counter() - start
        weights, average = _whole(model), _whole(ema)
        sharded = dcp.async_save(
            {"state": get_optimizer_state_dict(model, optimizer)["state"]},
            checkpoint_id=partial / "optimizer",
            process_group=self.group,
        )
        waited = time.perf_counter() - start
        self.pending = self.thread.submit(self._write, final, weights, average, state, sharded, start, waited)
        return waited

    def finish(self):
        """Wait until no checkpoint is being written.

        Returns:
            On every rank, whether the last one was written; True if there was none.
        """
        written = self.pending is None or self.pending.result()
        return distributed.from_rank_zero(written)

    def _write(self, final, weights, average, state, sharded, start, waited):
        """In the background: write the whole files, wait for the sharded ones, and make it a checkpoint."""
        partial, problem = files.partial_name(final), None
        try:
            try:
                if distributed.rank() == 0:
                    safetensors.torch.save_file(weights, partial / "model.safetensors")
                    torch.save(average, partial / "ema.pt")
                    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
            finally:
                sharded.exception()  # waits: nothing may be removed while others write there
            sharded.result()
            if distributed.rank() == 0:
                _write_manifest(partial)
                files.publish(partial, final)
        except (Exception, CheckpointException) as error:  # a full disk shows as one of many kinds
            if isinstance(error, CheckpointException):  # holds what each rank met, with tracebacks
                error = next(iter(error.failures.values()))[0]
            problem = " ".join(str(error).split())[:300] or type(error).__name__
        if distributed.rank() != 0:
            return problem is None
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
            return self._note(f"{final.name} was not written: {problem}; training goes on, earlier ones are whole")
        self._prune()
        seconds = time.perf_counter() - start
        self.report(f"checkpoint {final} written in {seconds:.2f} s, for {waited:.2f} s of which training waited")
        return True

    def _note(self, problem):
        if distributed.rank() == 0:
            self.report(problem)
        return False

    def _prune(self):
        """Remove the checkpoints that are not to be kept."""
        old = sorted(steps(self.output_dir))[: -self.keep_last] if self.keep_last else []
        for step in old:
            if not self.keep_every or step % self.keep_every:
                folder = self.output_dir / f"checkpoint-{step}"
                removed = folder.with_name(f".{folder.name}.removed")  # never half a checkpoint
                with contextlib.suppress(OSError):
                    shutil.rmtree(folder.rename(removed))


def _make_partial(final):
    """The folder, made anew, under whose name a checkpoint is written. Raises ValueError."""
    partial = files.partial_name(final)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{partial}: {error.strerror}") from error
    return partial


def _whole(model):
    """A copy of the whole state dict in rank 0's memory, shards brought together; on other ranks, nothing of use."""
    copied = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    on_cpu = next(model.parameters()).device.type == "cpu"  # then it is the model's own memory, which will change
    return {key: value.clone() if on_cpu else value for key, value in copied.items()}


def _write_manifest(folder):
    """Write the manifest. Raises ValueError if what other ranks wrote is not here."""
    shards = dcp.FileSystemReader(folder / "optimizer").read_metadata().storage_data.values()
    for name in {shard.relative_path for shard in shards}:
        if not (folder / "optimizer" / name).is_file():
            raise ValueError(f"{folder / 'optimizer' / name} is missing: all ranks must write to one storage")
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n")


def check(folder, names=None):
    """Raise ValueError naming the first file of a checkpoint that is missing or is not what the manifest says.

    Args:
        names: the files to look at; None: all that the manifest names.
    """
    folder = pathlib.Path(folder)
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {
            name: (entries[name]["bytes"], entries[name]["sha256"]) for name in names or {*entries, *WHOLE_FILES}
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is missing or damaged ({error})") from error
    for name, (size, sha256) in expected.items():
        path = folder / name
        try:
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            if path.stat().st_size != size or files.sha256(path) != sha256:
                raise ValueError(f"{path} is damaged: its size or checksum is not the manifest's")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def steps(output_dir):
    """The steps of the checkpoints in a run's folder."""
    names = (NAME.fullmatch(path.name) for path in pathlib.Path(output_dir).glob("checkpoint-*/"))
    return [int(match[1]) for match in names if match]


def find_latest(output_dir, names=None):
    """The newest checkpoint in a run's folder that is intact.

    Args:
        names: the files that must be intact; None: all.

    Returns:
        (folder, problems): None if there is none; a line for each newer one that is damaged.
    """
    problems = []
    for step in sorted(steps(output_dir), reverse=True):
        folder = pathlib.Path(output_dir) / f"checkpoint-{step}"
        try:
            check(folder, names)
            return folder, problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems


def load_training(folder, model, ema, optimizer):
    """Put a checkpoint's weights, average and optimizer state where training left them; all ranks call it together.

    Args:
        folder: of an intact checkpoint (`check`), which all ranks can read.
        model, ema, optimizer: as for `Writer.save`, on any number of ranks, sharded or not.

    Raises:
        ValueError: the weights are not of this model.
    """
    weights = average = {}
    if distributed.rank() == 0:
        weights = _read_safetensors(folder / "model.safetensors")
        average = _read_pt(folder / "ema.pt")
    place(model, weights, folder / "model.safetensors")
    place(ema, average, folder / "ema.pt")
    state = get_optimizer_state_dict(model, optimizer)  # zeros, in the shapes and shards of this run
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load({"state": state["state"]}, checkpoint_id=folder / "optimizer")
    set_optimizer_state_dict(model, optimizer, state)


def place(model, state_dict, source):
    """Give a model the weights that rank 0 has, whole; other ranks' `state_dict` is not looked at.

    Raises:
        ValueError: on every rank, naming `source`, if they do not fit.
    """
    distributed.on_rank_zero(check_fit, model.state_dict(), state_dict, source)
    several = dist.is_initialized()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    # A copy, because the library puts shards in the place of what it is given.
    set_model_state_dict(model, dict(state_dict) if distributed.rank() == 0 else {}, options=options)


def check_fit(expected, state_dict, source):
    """Raise ValueError, naming `source`, unless a state dict has the names and shapes of the expected one."""
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    given = {key: tuple(value.shape) for key, value in state_dict.items()}
    for key in shapes.keys() | given.keys():
        if shapes.get(key) != given.get(key):
            raise ValueError(
                f"{source} does not fit the model: {key} is {given.get(key)}, and must be {shapes.get(key)}"
            )


def load_into(model, state_dict, source):
    """Load a state dict into a model of this process. Raises ValueError, naming `source`, where they do not fit."""
    check_fit(model.state_dict(), state_dict, source)
    model.load_state_dict(state_dict)


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
        latest, problems = find_latest(path, names=["ema.pt", STATE_FILE])
        if latest is None:
            expected = f"expected folders named checkpoint-STEP, or a {STATE_FILE}"
            raise ValueError("; ".join(problems) or f"no checkpoint in {path}: {expected}")
        for problem in problems:
            warnings.warn(f"{problem}; using {latest}", stacklevel=2)
        path = latest / "ema.pt"
    elif path.is_dir():
        check(path, names=["ema.pt", STATE_FILE])
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
