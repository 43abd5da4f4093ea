"""The files of a checkpoint: write, find, check and resume them.

    {output_dir}/checkpoint-{step}/
        model.safetensors     trained weights, whole, under the official keys
        ema.pt                EMA weights: a plain state dict; one such file for each EMA
        optimizer/            torch.distributed.checkpoint: optimizer state, and weights of auxiliary losses
        trainer_state.json    step, arguments, and the config of model, transport and latents
        manifest.json         size and SHA-256 of each of these files

A checkpoint is written under another name and renamed when all of it is on the disk, so a folder named checkpoint-* was
complete; the manifest says whether it still is.
"""

import contextlib
import json
import pathlib
import re
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

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

from utils import distributed, files
from utils.errors import named, one_line
from utils.tensor_files import read_pt, read_safetensors

STATE_FILE = "trainer_state.json"
MANIFEST = "manifest.json"
WHOLE_FILES = ("model.safetensors", "ema.pt", STATE_FILE)
NAME = re.compile(r"checkpoint-(\d+)")


class Writer:
    """Writes the checkpoints of a run while training continues; all ranks make one and call it together.

    Args:
        output_dir: the run's folder.
        keep_last: keep this many of the newest checkpoints; None: all.
        keep_every: keep those whose step is a multiple of this, too; None: no others.
        report: called on rank 0, from another thread, with a line of text for each checkpoint, written or failed.
    """

    def __init__(self, output_dir, keep_last=None, keep_every=None, report=print):
        self.output_dir = pathlib.Path(output_dir)
        self.keep_last, self.keep_every, self.report = keep_last, keep_every, report
        # torch.distributed.checkpoint warns, from its own thread, that there is one process only.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        self.group = distributed.side_group()
        self.thread = ThreadPoolExecutor(1)
        self.pending = None
        if distributed.rank() == 0:
            for leftover in self.output_dir.glob(".checkpoint-*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step, model, emas, optimizer, state, losses=None):
        """Copy the content of checkpoint-{step}, and begin to write it. Wait until the one before is written.

        Args:
            model: the module that is trained, not wrapped by DDP.
            emas: {name: module}; each is written to NAME.pt.
            optimizer: the optimizer of `model`.
            state: content of trainer_state.json, plain data with the keys 'model', 'transport' and 'latents'.
            losses: {name: (module, its optimizer or None)} of auxiliary losses.

        Returns:
            Seconds that this call took, for which training waited.
        """
        start = time.perf_counter()
        self.finish()
        final = self.output_dir / f"checkpoint-{step}"
        try:
            partial = distributed.on_rank_zero(_make_partial, final)
        except ValueError as error:
            self.pending = self.thread.submit(self._report_failure, final, error)
            return time.perf_counter() - start
        weights = {"model": _whole(model)} | {name: _whole(ema) for name, ema in emas.items()}
        sharded = dcp.async_save(
            _sharded_state(model, optimizer, losses or {}),
            checkpoint_id=partial / "optimizer",
            process_group=self.group,
        )
        waited = time.perf_counter() - start
        self.pending = self.thread.submit(self._write, final, weights, state, sharded, start, waited)
        return waited

    def finish(self):
        """Wait until no checkpoint is being written. Return, on every rank, whether the last one succeeded, if any."""
        written = self.pending is None or self.pending.result()
        return distributed.broadcast(written)

    def _write(self, final, weights, state, sharded, start, waited):
        """Write the whole files, wait for the sharded ones, and rename the folder. Runs in the thread."""
        partial, problem = files.partial_name(final), None
        try:
            try:
                if distributed.rank() == 0:
                    safetensors.torch.save_file(weights.pop("model"), partial / "model.safetensors")
                    for name, ema in weights.items():
                        torch.save(ema, partial / f"{name}.pt")
                    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
            finally:
                sharded.exception()  # waits: nothing may be removed while others write there
            sharded.result()
            if distributed.rank() == 0:
                _write_manifest(partial)
                files.publish(partial, final)
        except (Exception, CheckpointException) as error:  # a full disk shows as one of many kinds
            problem = error
            if isinstance(error, CheckpointException):  # holds the error of each rank, with tracebacks
                problem = next(iter(error.failures.values()))[0]
        if distributed.rank() != 0:
            return problem is None
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
            return self._report_failure(final, problem)
        self._prune()
        seconds = time.perf_counter() - start
        self.report(f"checkpoint {final} written in {seconds:.2f} s, for {waited:.2f} s of which training waited")
        return True

    def _report_failure(self, final, problem):
        if distributed.rank() == 0:
            self.report(
                f"{final.name} was not written: {one_line(problem)}; training continues, earlier ones are intact"
            )
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
    """Make the folder under whose name a checkpoint is written. Raise ValueError if that fails."""
    partial = files.partial_name(final)
    with named(partial):
        partial.mkdir(parents=True)
    return partial


def _whole(model):
    """Return a copy of the whole state dict in rank 0's memory, gathered from all shards."""
    copied = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    on_cpu = next(model.parameters()).device.type == "cpu"  # then it is the model's own memory, which will change
    return {key: value.clone() if on_cpu else value for key, value in copied.items()}


def _sharded_state(model, optimizer, losses):
    """Return what is written by torch.distributed.checkpoint, as this rank's shards."""
    content = {"state": get_optimizer_state_dict(model, optimizer)["state"]}
    for name, (module, loss_optimizer) in losses.items():
        content[f"losses.{name}"] = {"weights": get_model_state_dict(module)}
        if loss_optimizer is not None:
            content[f"losses.{name}"]["state"] = get_optimizer_state_dict(module, loss_optimizer)["state"]
    return content


def _write_manifest(folder):
    """Write the manifest. Raise ValueError if a file that another rank wrote is missing."""
    shards = dcp.FileSystemReader(folder / "optimizer").read_metadata().storage_data.values()
    for name in {shard.relative_path for shard in shards}:
        if not (folder / "optimizer" / name).is_file():
            raise ValueError(f"{folder / 'optimizer' / name} is missing: all ranks must write to one storage")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    entries = {path.relative_to(folder).as_posix(): files.manifest_entry(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n")


def check(folder, names=None):
    """Raise ValueError naming the first file of a checkpoint that is missing or differs from the manifest.

    Args:
        names: the files to check; None: all that the manifest names.
    """
    folder = pathlib.Path(folder)
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: dict(entries[name]) for name in names or {*entries, *WHOLE_FILES}}
        problems = (files.problem_with(folder / name, entry) for name, entry in expected.items())
        problem = next(filter(None, problems), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is missing or damaged ({error})") from error
    if problem:
        raise ValueError(problem)


def steps(output_dir):
    """Return the steps of the checkpoints in a run's folder."""
    names = (NAME.fullmatch(path.name) for path in pathlib.Path(output_dir).glob("checkpoint-*/"))
    return [int(match[1]) for match in names if match]


def find_latest(output_dir, names=None):
    """Return (folder, problems): the newest intact checkpoint of a run, and a line for each newer, damaged one.

    Args:
        names: the files that must be intact; None: all.
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


def read_state(folder):
    """Return trainer_state.json of a checkpoint folder as a dict. Raise ValueError if it is damaged."""
    path = pathlib.Path(folder) / STATE_FILE
    with named(f"{path} is damaged or not of train.py", (OSError, ValueError, KeyError, TypeError)):
        state = json.loads(path.read_text())
        if not all(isinstance(state[part], dict) for part in ("model", "transport", "latents")):
            raise ValueError("'model', 'transport' and 'latents' must be objects")
        for part, key in (("transport", "path_type"), ("transport", "prediction"), ("latents", "vae")):
            if not isinstance(state[part][key], str):
                raise ValueError(f"{key} must be a name, not {state[part][key]!r}")
    return state


def load_training(folder, model, emas, optimizer, losses=None):
    """Load weights, EMAs, optimizer state and auxiliary losses of a checkpoint; all ranks call it together.

    Args:
        folder: an intact checkpoint (`check`), which all ranks can read.
        model, emas, optimizer, losses: as for `Writer.save`, on any number of ranks, sharded or not.

    Returns:
        A line for each EMA or auxiliary loss that the checkpoint lacks: an EMA starts from the trained weights, a loss
        keeps its initial weights.

    Raises:
        ValueError: the weights are of another model.
    """
    rank, notes = distributed.rank(), []
    weights = read_safetensors(folder / "model.safetensors") if rank == 0 else {}
    place(model, weights, folder / "model.safetensors")
    for name, ema in emas.items():
        path = folder / f"{name}.pt"
        if path.is_file():
            place(ema, read_pt(path) if rank == 0 else {}, path)
        else:
            place(ema, weights, folder / "model.safetensors")
            notes.append(f"the checkpoint has no EMA {name!r}: it starts from the trained weights")
    saved = dcp.FileSystemReader(folder / "optimizer").read_metadata().state_dict_metadata
    losses, missing = dict(losses or {}), []
    for name in list(losses):
        if not any(key.startswith(f"losses.{name}.") for key in saved):
            missing.append(name)
            del losses[name]
    notes += [f"the checkpoint has no loss {name!r}: it keeps its initial weights" for name in missing]
    content = _sharded_state(model, optimizer, losses)  # in the shapes and shards of this run
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(content, checkpoint_id=folder / "optimizer")
    _set_optimizer_state(model, optimizer, content["state"])
    for name, (module, loss_optimizer) in losses.items():
        set_model_state_dict(module, content[f"losses.{name}"]["weights"])
        if loss_optimizer is not None:
            _set_optimizer_state(module, loss_optimizer, content[f"losses.{name}"]["state"])
    return notes


def _set_optimizer_state(model, optimizer, state):
    """Give an optimizer this rank's shards of its state; learning rate and betas stay those of the flags."""
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer) | {"state": state})


def place(model, state_dict, source):
    """Load rank 0's whole state dict into a model, sharded or not; other ranks' `state_dict` is ignored.

    Raises:
        ValueError: on every rank, naming `source`, if it does not fit.
    """
    distributed.on_rank_zero(check_fit, model.state_dict(), state_dict, source)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    # A copy, because the library replaces the tensors of the dict by shards.
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
    """Load a state dict into a model of this process. Raise ValueError, naming `source`, if it does not fit."""
    check_fit(model.state_dict(), state_dict, source)
    model.load_state_dict(state_dict)
