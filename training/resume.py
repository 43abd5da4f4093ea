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

from data.labelled import labels_by_name, some_of
from models import SiT
from training.log import Metrics
from utils import checkpoint, distributed, files, posthoc
from utils.command_line import flag_name
from utils.weights import class_names

EXIT_DIVERGED = 3  # loss or gradient was not finite for too many steps in a row
# A signal or the end of a loader process stopped the run after a checkpoint; the same command resumes it (EX_TEMPFAIL).
EXIT_STOPPED = 75

# Flags that decide where a run is and where it resumes, not what it computes.
FLAGS_OF_PLACE = ("output_dir", "results_dir", "resume", "config", "dry_run", "num_workers", "verify")
COUNTS = ("bad_steps", "bad_in_a_row", "bad_images")  # in trainer_state.json


@dataclasses.dataclass
class Start:
    """Where a run starts: at a checkpoint's `folder` with its trainer `state`, or from step 0 if both are None."""

    folder: pathlib.Path | None = None
    state: dict | None = None
    damaged: list = dataclasses.field(default_factory=list)  # a line for each newer checkpoint that is damaged
    chosen: bool = False  # whether --resume names this checkpoint, so that no other will do

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
    if resume == "auto" and not existing and output_dir is not None:
        if aside := sorted(output_dir.glob("damaged-*-checkpoint-*")):
            advice = "give another --output-dir, or --resume never to begin at step 0"
            raise ValueError(f"{output_dir} holds no checkpoint but {aside[-1].name}; {advice}")
    if resume == "never" or (resume == "auto" and not existing):
        return Start()
    if resume == "auto":
        return _newest(output_dir, f"no checkpoint in {output_dir} is intact")
    if existing:  # the same command, typed again, resumes from its own checkpoints
        latest, damaged = checkpoint.find_latest(output_dir, read=_read_trainable)
        if latest is not None and checkpoint.read_state(latest)["args"].get("resume") == resume:
            return Start(latest, checkpoint.read_state(latest), damaged)
    folder = pathlib.Path(resume)
    if checkpoint.steps(folder):
        start = _newest(folder, f"no checkpoint of --resume {resume} is intact")
    elif not any((folder / name).exists() for name in (checkpoint.MANIFEST, checkpoint.STATE_FILE)):
        problem = " holds no checkpoint" if folder.is_dir() else ": no such folder"
        raise ValueError(f"--resume {resume}{problem}; give auto, never, a run folder or a checkpoint folder")
    else:
        start = Start(folder, _read_trainable(folder), chosen=True)
    own = start.folder.resolve().parent
    target = own if output_dir is None else output_dir.resolve()
    newer = [step for step in checkpoint.steps(target) if step > start.step]
    if newer and not (start.damaged and target == own):
        problem = f"{target} holds checkpoint-{max(newer)}, newer than {start.folder}"
        raise ValueError(f"{problem}; give another --output-dir")
    return start


def _newest(run_folder, problem, before=math.inf, damaged=()):
    """Return the `Start` at the newest intact checkpoint of a run, of a step below `before`. Raise ValueError if none.

    `damaged` are lines of newer ones."""
    folder, more = checkpoint.find_latest(run_folder, before=before, read=_read_trainable)
    damaged = [*damaged, *more]
    if folder is None:
        raise ValueError(f"{'; '.join(damaged)}; {problem}")
    return Start(folder, checkpoint.read_state(folder), damaged)


def _read_trainable(folder, names=None):
    """Return what `checkpoint.read_intact` does. Raise ValueError, too, if a run cannot resume from it."""
    state = checkpoint.read_intact(folder, names)
    with files.named(f"{folder / checkpoint.STATE_FILE} is damaged", (LookupError, TypeError, ValueError)):
        for key in ("step", "samples_seen", *COUNTS):
            if type(state[key]) is not int or state[key] < 0:
                raise ValueError(f"{key} is {state[key]!r}")
        if not isinstance(state["args"], dict):
            raise TypeError("args must be an object")
        float(state["model"].get("class_dropout_prob", 0))
        Metrics("cpu", state["window"])
    return state


def load(trainer, start, weights, config, *how):
    """Give the trainer the checkpoint of a start, or its initial `weights`; all ranks call this together.

    Where the checkpoint does not load, use the one before it. Return (the `Start` that was used, the trainer's notes).
    Raise ValueError if none loads, or one is of another model than `config` or of another auxiliary loss; `how` is
    passed on to the trainer."""

    def before(problem):
        damaged = [*start.damaged, problem]
        return _newest(start.folder.parent, f"no checkpoint in {start.folder.parent} loads", start.step, damaged)

    while True:
        check_model(config, start)
        try:
            return start, trainer.start(weights, start.folder, *how)
        except ValueError as error:
            if start.folder is None or start.chosen or isinstance(error, checkpoint.OtherLoss):
                raise
            start = distributed.on_rank_zero(before, str(error))


def check_model(config, start, optimizer=None):
    """Raise ValueError if a config of `setup.resolve_config` is of another model than the checkpoint to resume from.

    A checkpoint that lacks an argument of SiT was trained with that argument's default. The state of another optimizer
    than `optimizer` does not serve, either; None: any does."""
    if start.state is None:
        return
    names, known = class_names(config), class_names(start.state)
    advice = "give another --output-dir, or --init-from to start a new run from its weights"
    if labels_by_name(names, known, f"{start.folder} cannot continue; {advice}: the data") is not None:
        problem = next((f"lack {name!r}" for name in known if name not in names), "are in another order")
        raise ValueError(f"the classes of the data {problem}, and {start.folder} has {some_of(known)}; {advice}")
    defaults = {key: p.default for key, p in inspect.signature(SiT).parameters.items()}

    def identity(config):
        # The share of dropped labels may change; the existence of a null class may not.
        model = defaults | config["model"]
        guidable = model["class_dropout_prob"] > 0
        transport = {key: config["transport"][key] for key in ("path_type", "prediction")}
        return model | {"class_dropout_prob": guidable} | transport

    now, then = identity(config), identity(start.state)
    if optimizer is not None:
        now["optimizer"], then["optimizer"] = optimizer, start.state["args"].get("optimizer", "adamw")
    for key in now | then:
        if now.get(key) != then.get(key):
            problem = f"{flag_name(key)}: {now.get(key)} was given, but {start.folder} was trained with {then.get(key)}"
            raise ValueError(f"{problem}; {advice}")


def changes(flags, num_examples, start):
    """Return a line for each of `flags`, {key: value}, and for the number of examples, if the checkpoint differs."""
    if start.state is None:
        return []
    then, epoch = start.state["args"], start.state.get("epoch")
    lines = [
        f"{flag_name(key)} was {then[key]} until now, and is {value}"
        for key, value in flags.items()
        if key not in FLAGS_OF_PLACE and key in then and then[key] != value
    ]
    known = isinstance(epoch, float) and epoch > 0 and num_examples is not None  # not of streams
    if known and (earlier := round(start.state["samples_seen"] / epoch)) != num_examples:
        lines.append(f"the data had {earlier:,} examples until now, and have {num_examples:,}: another order begins")
    return lines


def choose_folder(output_dir, resume, start, results_dir, name):
    """Return the run's folder: --output-dir, that of the checkpoint to resume, or a new, numbered one."""
    if output_dir is not None:
        return output_dir
    if resume not in ("auto", "never"):
        return start.folder.resolve().parent
    numbers = [re.match(r"(\d{3,})-", path.name) for path in results_dir.glob("*/")]
    number = max((int(match[1]) + 1 for match in numbers if match), default=0)
    return results_dir / f"{number:03d}-{name}"


def claim_folder(output_dir, resume, numbered=False):
    """Make and lock the run's folder, on all ranks together. Return it and the `Start`; other runs may have moved both.

    A new folder that is `numbered` is of this run alone: where another run made it meanwhile, the next number is taken.
    Raise ValueError if another run writes to the folder, it cannot be written to, or ranks see different folders."""
    output_dir, token = distributed.on_rank_zero(_lock_folder, output_dir, numbered and resume in ("auto", "never"))
    seen, deadline = distributed.rank() == 0, time.monotonic() + 10  # rank 0 would release its lock by closing the file
    while not seen and time.monotonic() < deadline:  # some file systems show a new file late
        with contextlib.suppress(OSError):
            seen = (output_dir / files.LOCK).read_text() == token
        time.sleep(0 if seen else 0.2)
    if distributed.any_rank(not seen):
        raise ValueError(f"the run's folder {output_dir} is not the same for all ranks; it must be on shared storage")
    return output_dir, distributed.on_rank_zero(find_start, resume, output_dir)


def _lock_folder(output_dir, numbered):
    """Lock the run's folder until this process ends. Return it, and the token in it by which ranks recognise it."""
    with files.named(f"the run's folder {output_dir} cannot be made or written to"):
        while numbered:
            output_dir.parent.mkdir(parents=True, exist_ok=True)
            try:
                output_dir.mkdir()
                numbered = False
            except FileExistsError:
                number, _, name = output_dir.name.partition("-")
                output_dir = output_dir.with_name(f"{int(number) + 1:03d}-{name}")
        problem = f"another run is writing to {output_dir}; wait for it, or give another --output-dir"
        lock, token = files.lock(output_dir, problem), uuid.uuid4().hex
        lock.truncate(0)
        lock.write(token)
        lock.flush()
    return output_dir, token


def set_aside(start, output_dir):
    """Rename the damaged checkpoints after the start, whose names the run will need; leave EMA snapshots up to it."""
    posthoc.carry_over(start.folder and start.folder.resolve().parent, output_dir, start.step)
    for step, folder in checkpoint.paths(output_dir) if start.state else ():
        if step > start.step:
            names = (folder.with_name(f"damaged-{n}-{folder.name}") for n in itertools.count())
            folder.rename(next(name for name in names if not os.path.lexists(name)))


class Stop:
    """Notices that a run is to stop before its last step.

    `stopping` says that it saves a checkpoint first, for the `reasons`, lines of text to which SIGTERM and SIGINT are
    added from now on; a second signal changes nothing, because torchrun and schedulers send both, or one twice. `lost`
    says that the run's folder was removed, moved or replaced, so that another run could write to its path."""

    def __init__(self, output_dir):
        self.output_dir, self.folder, self.next_look = output_dir, os.stat(output_dir), 0.0
        self.reasons, self.stopping, self.lost = [], False, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.reasons.append(signal.Signals(number).name))

    def check(self, at_once):
        """Return whether the run is to stop, on all ranks together; look at the folder each second, or `at_once`."""
        lost = False
        if distributed.rank() == 0 and (at_once or time.monotonic() > self.next_look):
            lost, self.next_look = not self._has_folder(), time.monotonic() + 1
        self.stopping, self.lost = distributed.any_rank(bool(self.reasons), lost)
        return self.stopping or self.lost

    def _has_folder(self):
        if files.is_locked(self.output_dir):
            return True
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(os.stat(self.output_dir), self.folder):  # only the lock's file was removed
                files.lock(self.output_dir, "another run has the lock", patience=0)
                return True
        return False

    def report(self, step, write_line):
        """Write a line on why the run stops at a step, if it is for one of these reasons; all ranks call this."""
        if self.lost:
            write_line(f"the run's folder {self.output_dir} was removed or replaced: stopped at step {step}, not saved")
        elif self.stopping:
            reason = sum(distributed.gather(self.reasons), [])[0]
            write_line(f"{reason}: stopping at step {step}; the same command resumes the run")


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
