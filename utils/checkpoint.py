"""The files of a checkpoint: write, find, check and load them.

    {output_dir}/checkpoint-{step}/
        model.safetensors     trained weights, whole, under the official keys, with the config in the metadata
        ema.pt                EMA weights: a plain state dict with the config beside it; one such file for each EMA
        optimizer/            torch.distributed.checkpoint: optimizer state, and weights of auxiliary losses
        trainer_state.json    step, arguments, and the config of model, transport and latents
        manifest.json         size and SHA-256 of each of these files

A checkpoint is written under another name and renamed when all of it is on the disk, so a folder named checkpoint-* was
complete; the manifest says whether it still is."""

import contextlib
import inspect
import math
import pathlib
import re
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException

import models
from utils import distributed, files, posthoc
from utils.sharded_files import METADATA, TensorReader, read_metadata
from utils.tensor_files import check_fit, read_pt, read_safetensors, write_pt, write_safetensors

STATE_FILE, MANIFEST = "trainer_state.json", "manifest.json"
WHOLE_FILES = ("model.safetensors", "ema.pt", STATE_FILE)
NAME = re.compile(r"checkpoint-(\d+)")


class Writer:
    """Writes the checkpoints of a run while training continues; all ranks make one and call it together.

    It keeps the newest `keep_last` (None: all) and those whose step is a multiple of `keep_every`. `report` is called
    on rank 0, from another thread, with a line of text for each checkpoint, written or failed. With `snapshots`, the
    name of a dtype, it writes those of `posthoc`, too, and keeps them all."""

    def __init__(self, output_dir, keep_last=None, keep_every=None, report=print, snapshots=None):
        self.output_dir, self.report, self.snapshots = pathlib.Path(output_dir), report, snapshots
        self.keep_last, self.keep_every = keep_last, keep_every
        # torch.distributed.checkpoint warns, from its own thread, that there is one process only.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        self.thread, self.pending, self.group = ThreadPoolExecutor(1), None, None
        if dist.is_initialized():  # another thread needs another group for its collectives
            self.group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT)
        if distributed.rank() == 0:
            for leftover in self.output_dir.glob(".checkpoint-*"):  # of a run that was killed
                files.remove(leftover)

    def save(self, step, model, emas, optimizer, state, losses=None):
        """Copy the content of checkpoint-{step}, begin to write it, and return the seconds for which training waited.

        `model` is not wrapped by DDP. `emas` is {name: module}, `losses` {name: (module, its optimizer or None)}, and
        `state` the content of trainer_state.json: plain data with the keys 'model', 'transport' and 'latents'."""
        start = time.perf_counter()
        self.finish()
        final = self.output_dir / f"checkpoint-{step}"
        weights = {"model": _whole(model)} | {name: _whole(ema) for name, ema in emas.items()}
        content, folder = _sharded_state(model, optimizer, losses or {}), files.partial_name(final) / "optimizer"
        sharded = dcp.async_save(content, checkpoint_id=folder, process_group=self.group)
        waited = time.perf_counter() - start
        if distributed.rank() == 0:
            self.pending = self.thread.submit(self._write, final, weights, state, sharded, start, waited)
        else:
            self.pending = self.thread.submit(sharded.exception)  # waits; rank 0 says whether all succeeded
        return waited

    def finish(self):
        """Wait until no checkpoint is being written. Return, on every rank, whether the last one succeeded, if any."""
        return distributed.broadcast(self.pending is None or self.pending.result())

    def _write(self, final, weights, state, sharded, start, waited):
        """Write the whole files, wait for the sharded ones, and rename the folder. Return whether that succeeded."""
        try:
            with files.written_whole(final) as partial:
                try:
                    partial.mkdir(parents=True, exist_ok=True)
                    config = embedded_config(state)
                    write_safetensors(partial / "model.safetensors", weights.pop("model"), config)
                    for name, ema in weights.items():
                        write_pt(partial / f"{name}.pt", ema, config)
                    if self.snapshots:  # before the checkpoint has its name, so that each has them
                        dtype = getattr(torch, self.snapshots)
                        for note in posthoc.write_snapshots(self.output_dir, state["step"], weights, config, dtype):
                            self.report(note)
                    (partial / STATE_FILE).write_text(files.to_json(state, indent=2) + "\n")
                finally:
                    sharded.exception()  # waits: nothing may be removed while others write there
                sharded.result()
                _write_manifest(partial)
        except (Exception, CheckpointException) as error:  # a full disk shows as one of many kinds
            self.report(f"{final.name} was not written: {_reason(error)}; earlier ones are intact")
            return False
        self._prune()
        seconds = time.perf_counter() - start
        self.report(f"checkpoint {final} written in {seconds:.2f} s, for {waited:.2f} s of which training waited")
        return True

    def _prune(self):
        """Remove the checkpoints that are not to be kept."""
        for step in sorted(steps(self.output_dir))[: -self.keep_last] if self.keep_last else ():
            if not self.keep_every or step % self.keep_every:
                removed = self.output_dir / f".checkpoint-{step}.removed"  # never half a checkpoint
                with contextlib.suppress(OSError):
                    shutil.rmtree((self.output_dir / f"checkpoint-{step}").rename(removed))


def _reason(error):
    """Return an error as one line; of the library's, which holds that of each rank with its traceback, the first."""
    return files.one_line(next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error)


def _whole(model):
    """Return a copy of the whole state dict in rank 0's memory, gathered from all shards."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    copied = dcp_state.get_model_state_dict(model, options=options)
    on_cpu = next(model.parameters()).device.type == "cpu"  # then it is the model's own memory, which will change
    return {key: value.clone() if on_cpu else value for key, value in copied.items()}


def _sharded_state(model, optimizer, losses):
    """Return what torch.distributed.checkpoint writes and reads, as this rank's shards."""
    content = {"state": dcp_state.get_optimizer_state_dict(model, optimizer)["state"]}
    for name, (module, its_optimizer) in losses.items():
        part = content[f"losses.{name}"] = {"weights": dcp_state.get_model_state_dict(module)}
        if its_optimizer is not None:
            part["state"] = dcp_state.get_optimizer_state_dict(module, its_optimizer)["state"]
    return content


def _write_manifest(folder):
    """Write the manifest. Raise ValueError if a file that another rank wrote is missing."""
    read_metadata(folder / "optimizer")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    entries = {path.relative_to(folder).as_posix(): files.manifest_entry(path) for path in paths}
    (folder / MANIFEST).write_text(files.to_json({"files": entries}, indent=2) + "\n")


def check(folder, names=None):
    """Raise ValueError naming the first of a checkpoint's files `names` that is not as in the manifest.

    Without `names`, check all files, and that the optimizer's hold tensors alone."""
    folder = pathlib.Path(folder)
    with files.named(f"{folder / MANIFEST} is missing or damaged", (LookupError, TypeError, ValueError)):
        entries = files.read_json(folder / MANIFEST)["files"]
        expected = {name: dict(entries[name]) for name in names or {*entries, *WHOLE_FILES, f"optimizer/{METADATA}"}}
        if outside := [name for name in expected if {"..", "/"} & {*pathlib.PurePosixPath(name).parts}]:
            raise ValueError(f"{outside[0]} is not in the folder")
    problems = (files.problem_with(folder / name, entry) for name, entry in expected.items())
    if problem := next(filter(None, problems), None):
        raise ValueError(problem)
    if names is None:
        read_metadata(folder / "optimizer")


def paths(output_dir):
    """Return [(step, path)] of what is named as a checkpoint in a run's folder, the newest step first."""
    matches = ((NAME.fullmatch(path.name), path) for path in pathlib.Path(output_dir).glob("checkpoint-*"))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def steps(output_dir):
    """Return the steps of what is named as a checkpoint in a run's folder."""
    return sorted({step for step, _ in paths(output_dir)})


def read_intact(folder, names=None):
    """Return the trainer state of a checkpoint that passes `check(folder, names)`.

    Raise ValueError if it does not, or if it was made at another step than its name says."""
    check(folder, names)
    state = read_state(folder)
    if NAME.fullmatch(folder.name) and folder.name != f"checkpoint-{state.get('step', folder.name[11:])}":
        raise ValueError(f"{folder} is not what its name says: it is of step {state['step']}")
    return state


def find_latest(output_dir, names=None, before=math.inf, read=read_intact):
    """Return the newest folder of a step below `before` that `read(folder, names)` raises no ValueError for, or None.

    Return also a line for each newer, damaged one."""
    problems = []
    for step, folder in paths(output_dir):
        try:
            if step < before:
                read(folder, names)
                return folder, problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems


def read_state(folder):
    """Return trainer_state.json of a checkpoint folder as a dict. Raise ValueError if it is damaged."""
    path = pathlib.Path(folder) / STATE_FILE
    state = files.read_json(path)
    check_config(state, path)
    return state


def check_config(config, source):
    """Raise ValueError naming `source` unless a config has the parts and names that every model needs."""
    with files.named(f"{source} is damaged or not of train.py", (ValueError, KeyError, TypeError)):
        if not all(isinstance(config[part], dict) for part in ("model", "transport", "latents")):
            raise ValueError("'model', 'transport' and 'latents' must be objects")
        for part, key in (("transport", "path_type"), ("transport", "prediction"), ("latents", "vae")):
            if not isinstance(config[part][key], str):
                raise ValueError(f"{key} must be a name, not {config[part][key]!r}")


def embedded_config(state):
    """Return what weights say of themselves: the config of a trainer state, and its step."""
    config = {key: state[key] for key in ("model", "transport", "latents", "data", "step") if key in state}
    return config | {"model": without_defaults(state["model"])}


def without_defaults(model):
    """Return arguments of SiT without the options that are off, so that bytes are those of before they were written.

    Options follow `learn_sigma` in the signature; an option that has its default is off."""
    defaults = {key: option.default for key, option in inspect.signature(models.SiT).parameters.items()}
    options = list(defaults)[list(defaults).index("learn_sigma") + 1 :]
    return {key: value for key, value in model.items() if key not in options or value != defaults[key]}


class OtherLoss(ValueError):
    """An auxiliary loss has other weights than a checkpoint, which is intact."""


def load_training(folder, model, emas, optimizer, losses=None):
    """Load an intact checkpoint, which all ranks can read, into what `Writer.save` takes; all ranks call it together.

    The number of ranks and sharding may differ. Return a line for each EMA that the checkpoint lacks, which starts
    from the trained weights, and each loss, which keeps its initial weights. Raise ValueError if weights do not fit;
    OtherLoss if those are a loss's."""
    path, notes, known = folder / "model.safetensors", [], {}
    weights = _read_on_rank_zero(read_safetensors, path)
    place(model, weights, path)
    for name, ema in emas.items():
        ema_path = folder / f"{name}.pt"
        if ema_path.is_file():
            place(ema, _read_on_rank_zero(read_pt, ema_path), ema_path)
        else:
            place(ema, weights, path)
            notes.append(f"the checkpoint has no EMA {name!r}: it starts from the trained weights")
    reader = TensorReader(folder / "optimizer")
    saved = distributed.on_rank_zero(lambda: reader.read_metadata().state_dict_metadata)
    for name, loss in (losses or {}).items():
        prefix, own = f"losses.{name}.weights.", loss[0].state_dict()
        there = {key: getattr(entry, "size", None) for key, entry in saved.items() if key.startswith(prefix)}
        if not there:
            notes.append(f"the checkpoint has no loss {name!r}: it keeps its initial weights")
        elif there != {prefix + key: value.shape for key, value in own.items()}:
            advice = "give the flags that it was trained with, or --init-from to start a new run"
            raise OtherLoss(f"loss {name!r} of {folder} has weights of other shapes; {advice}")
        else:
            known[name] = loss
    content = _sharded_state(model, optimizer, known)  # in the shapes and shards of this run
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    try:
        dcp.load(content, storage_reader=reader)
    except CheckpointException as error:  # raised on all ranks
        raise ValueError(f"{folder / 'optimizer'} does not load: {_reason(error)}") from error
    for name, (module, _) in known.items():
        dcp_state.set_model_state_dict(module, content[f"losses.{name}"]["weights"])
    parts = [(content, model, optimizer), *((content[f"losses.{name}"], *loss) for name, loss in known.items())]
    for part, module, its_optimizer in parts:
        if its_optimizer is not None:  # learning rate and betas stay those of the flags
            current = dcp_state.get_optimizer_state_dict(module, its_optimizer)
            dcp_state.set_optimizer_state_dict(module, its_optimizer, current | {"state": part["state"]})
    return notes


def _read_on_rank_zero(read, path):
    """Return rank 0's `read(path)`, a state dict; {} on other ranks. Raise ValueError on all ranks if it is none."""
    content = {}

    def fill():
        value = read(path)
        if not isinstance(value, dict) or not all(isinstance(part, torch.Tensor) for part in value.values()):
            raise ValueError(f"{path} is no state dict")
        content.update(value)

    distributed.on_rank_zero(fill)
    return content


def place(model, state_dict, source):
    """Load rank 0's whole state dict into a model, sharded or not. Raise ValueError on all ranks if it does not fit."""
    distributed.on_rank_zero(check_fit, model.state_dict(), state_dict, source)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    # A copy, because the library replaces the tensors of the dict by shards.
    dcp_state.set_model_state_dict(model, dict(state_dict) if distributed.rank() == 0 else {}, options=options)
