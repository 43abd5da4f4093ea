"""Where a run resumes, which folder it writes to, and how it is stopped."""

import contextlib
import dataclasses
import inspect
import itertools
import math
import os
import pathlib
import re
import signal
import time
import uuid

from models import SiT
from utils import checkpoint, distributed, files
from utils.command_line import flag_name

EXIT_DIVERGED = 3  # loss or gradient was not finite for too many steps in a row
EXIT_STOPPED = 75  # a signal stopped the run after a checkpoint; the same command resumes it (EX_TEMPFAIL)

# Flags that decide where a run is and where it resumes, not what it computes.
FLAGS_OF_PLACE = ("output_dir", "results_dir", "resume", "config", "dry_run")


@dataclasses.dataclass
class Start:
    """Where a run starts: at a checkpoint's `folder` with its trainer `state`, or from step 0 if both are None."""

    folder: pathlib.Path | None = None
    state: dict | None = None
    damaged: list = dataclasses.field(default_factory=list)  # a line for each newer checkpoint that is damaged

    @property
    def step(self):
        """Steps that the run has made."""
        return self.state["step"] if self.state else 0


def find_start(resume, output_dir):
    """Return the `Start` of a run in `output_dir`, which is None for a new folder.

    `resume` is 'auto' (the newest intact checkpoint in `output_dir`, or step 0), 'never' (step 0), or a run folder or
    checkpoint folder. Raise ValueError if no checkpoint is intact, or the run would overwrite another run's."""
    existing = checkpoint.steps(output_dir) if output_dir is not None else []
    if resume == "never" and existing:
        raise ValueError(f"--output-dir {output_dir} holds checkpoint-{max(existing)}; give another, or --resume auto")
    if resume == "never" or (resume == "auto" and not existing):
        return Start()
    if resume == "auto":
        return _newest(output_dir, f"no checkpoint in {output_dir} is intact")
    if existing:  # the same command, typed again, resumes from its own checkpoints
        latest, damaged = checkpoint.find_latest(output_dir)
        if latest is not None and checkpoint.read_state(latest)["args"]["resume"] == resume:
            return Start(latest, checkpoint.read_state(latest), damaged)
    folder = pathlib.Path(resume)
    if checkpoint.steps(folder):
        start = _newest(folder, f"no checkpoint of --resume {resume} is intact")
    elif not folder.is_dir():
        raise ValueError(f"--resume {resume}: no such folder; give auto, never, a run folder or a checkpoint folder")
    else:
        checkpoint.check(folder)
        start = Start(folder, checkpoint.read_state(folder))
    own = start.folder.resolve().parent
    target = own if output_dir is None else output_dir.resolve()
    newer = [step for step in checkpoint.steps(target) if step > start.step]
    if newer and not (start.damaged and target == own):
        problem = f"{target} holds checkpoint-{max(newer)}, newer than {start.folder}"
        raise ValueError(f"{problem}; give another --output-dir")
    return start


def _newest(run_folder, problem):
    """Return the `Start` at the newest intact checkpoint of a run. Raise ValueError if none is intact."""
    folder, damaged = checkpoint.find_latest(run_folder)
    if folder is None:
        raise ValueError(f"{'; '.join(damaged)}; {problem}")
    return Start(folder, checkpoint.read_state(folder), damaged)


def check_model(config, start):
    """Raise ValueError if a config of `setup.resolve_config` is of another model than the checkpoint to resume from.

    A checkpoint that lacks an argument of SiT was trained with that argument's default."""
    if start.state is None:
        return
    defaults = {key: p.default for key, p in inspect.signature(SiT).parameters.items()}

    def identity(config):
        # The share of dropped labels may change; the existence of a null class may not.
        model = defaults | config["model"]
        guidable = model["class_dropout_prob"] > 0
        transport = {key: config["transport"][key] for key in ("path_type", "prediction")}
        return model | {"class_dropout_prob": guidable} | transport

    now, then = identity(config), identity(start.state)
    for key in now | then:
        if now.get(key) != then.get(key):
            problem = f"{flag_name(key)}: {now.get(key)} was given, but {start.folder} was trained with {then.get(key)}"
            advice = "give another --output-dir, or --init-from to start a new run from its weights"
            raise ValueError(f"{problem}; {advice}")


def changed_flags(flags, start):
    """Return a line for each of `flags`, {key: value}, that differs from those stored in the checkpoint."""
    then = start.state["args"] if start.state else {}
    return [
        f"{flag_name(key)} was {then[key]} until now, and is {value}"
        for key, value in flags.items()
        if key not in FLAGS_OF_PLACE and key in then and then[key] != value
    ]


def choose_folder(output_dir, resume, start, results_dir, name):
    """Return the run's folder: --output-dir, that of the checkpoint to resume, or a new, numbered one."""
    if output_dir is not None:
        return output_dir
    if resume not in ("auto", "never"):
        return start.folder.resolve().parent
    numbers = [re.match(r"(\d{3,})-", path.name) for path in results_dir.glob("*/")]
    number = max((int(match[1]) + 1 for match in numbers if match), default=0)
    return results_dir / f"{number:03d}-{name}"


def claim_folder(output_dir, resume):
    """Make and lock the run's folder, on all ranks together. Return the `Start`, which another run may have moved.

    Raise ValueError if another run writes to the folder, it cannot be written to, or ranks see different folders."""
    token = distributed.on_rank_zero(_lock_folder, output_dir)
    seen, deadline = distributed.rank() == 0, time.monotonic() + 10  # rank 0 would release its lock by closing the file
    while not seen and time.monotonic() < deadline:  # some file systems show a new file late
        with contextlib.suppress(OSError):
            seen = (output_dir / files.LOCK).read_text() == token
        time.sleep(0 if seen else 0.2)
    if distributed.any_rank(not seen):
        raise ValueError(f"the run's folder {output_dir} is not the same for all ranks; it must be on shared storage")
    return distributed.on_rank_zero(find_start, resume, output_dir)


def _lock_folder(output_dir):
    """Lock the run's folder until this process ends. Return a token in it, by which ranks recognise the folder."""
    with files.named(f"the run's folder {output_dir} cannot be made or written to"):
        output_dir.mkdir(parents=True, exist_ok=True)
        problem = f"another run is writing to {output_dir}; wait for it, or give another --output-dir"
        lock, token = files.lock(output_dir, problem), uuid.uuid4().hex
        lock.truncate(0)
        lock.write(token)
        lock.flush()
    return token


def set_aside(start, output_dir):
    """Rename the damaged checkpoints after the start, whose names the run will need."""
    for step in checkpoint.steps(output_dir) if start.state else ():
        if step > start.step:
            folder = output_dir / f"checkpoint-{step}"
            names = (folder.with_name(f"damaged-{n}-{folder.name}") for n in itertools.count())
            folder.rename(next(name for name in names if not name.exists()))


def catch_stop_signals():
    """Return a list to which SIGTERM and SIGINT are appended from now on, so that the step can be finished and saved.

    A second signal changes nothing: torchrun and schedulers send both, or one twice."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(signal.Signals(number).name))
    return caught


class FiniteCheck:
    """Counts the steps that are left out because loss or gradient is not finite.

    After `most` in a row the run is `diverged`. On a GPU it reads one step late. `report` is called with lines of text.
    """

    def __init__(self, device, most, bad_steps, in_a_row, report):
        self.reader = distributed.LateReader(device)
        self.most, self.bad_steps, self.in_a_row, self.report = most, bad_steps, in_a_row, report
        self.diverged = False

    def push(self, step, loss_and_norm, wait):
        """Take a step's loss and gradient norm, a tensor (2,); with `wait`, read it now."""
        known = self.reader.push(step, loss_and_norm)
        for late_step, (loss, norm) in known + (self.reader.flush() if wait else []):
            if math.isfinite(loss) and math.isfinite(norm):
                self.in_a_row = 0
                continue
            self.bad_steps, self.in_a_row = self.bad_steps + 1, self.in_a_row + 1
            numbers = f"loss {loss}, gradient norm {norm}"
            self.report(f"(step={late_step:07d}) left out: not finite ({numbers}), {self.in_a_row} in a row")
            if self.in_a_row >= self.most:
                self.diverged = True
                self.report(
                    f"stopped at step {late_step}: --max-bad-steps {self.most} in a row were not finite "
                    f"({numbers}); the last good checkpoint is untouched"
                )


def check_restarts(output_dir, resume):
    """Raise ValueError if torchrun may restart this command and it would not resume from its own checkpoints."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and output_dir is None:
        raise ValueError("--max-restarts needs --output-dir: without it, each restart would use another folder")
    if restarts and resume == "never":
        raise ValueError("--max-restarts does not go with --resume never, which would not resume at a restart")
