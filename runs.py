"""A run from outside: which folder is its own, where it continues, and how it is asked to stop."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import time
import uuid

import checkpoint
import distributed
import files

EXIT_DIVERGED = 3  # the loss was not finite for too many steps in a row
EXIT_STOPPED = 75  # a signal asked it to stop, and it saved first; the same command continues (EX_TEMPFAIL)

# Flags that say where and how a run goes on, not what it computes.
NOT_OF_THE_RUN = ("output_dir", "results_dir", "resume", "config", "dry_run")


@dataclasses.dataclass
class Start:
    """Where a run starts: at a checkpoint's `folder` and its trainer `state`, or anew if both are None."""

    folder: pathlib.Path | None = None
    state: dict | None = None
    damaged: list = dataclasses.field(default_factory=list)  # what is wrong with checkpoints that are newer


def find_start(resume, output_dir):
    """Where a run starts.

    Args:
        resume: 'auto' (from the newest intact checkpoint in `output_dir`, anew if it has none), 'never' (anew), or a
            run folder or checkpoint folder.
        output_dir: the run's folder; None: a new one.

    Raises:
        ValueError: nothing intact is there, or the run would write over checkpoints that are not its own.
    """
    holds = output_dir is not None and checkpoint.steps(output_dir)
    if resume == "never":
        if holds:
            raise ValueError(f"--output-dir {output_dir} holds checkpoint-{max(holds)}; give another, or --resume auto")
        return Start()
    if resume == "auto":
        if not holds:
            return Start()
        folder, damaged = checkpoint.find_latest(output_dir)
        if folder is None:
            raise ValueError(f"{'; '.join(damaged)}; no checkpoint in {output_dir} is intact")
        return Start(folder, checkpoint.read_state(folder), damaged)
    if holds:  # the same command, typed again, goes on with what it has made itself
        latest, damaged = checkpoint.find_latest(output_dir)
        if latest is not None and checkpoint.read_state(latest)["args"]["resume"] == resume:
            return Start(latest, checkpoint.read_state(latest), damaged)
    folder, damaged = pathlib.Path(resume), []
    if checkpoint.steps(folder):
        folder, damaged = checkpoint.find_latest(folder)
        if folder is None:
            raise ValueError(f"--resume {resume}: {'; '.join(damaged)}")
    elif not folder.is_dir():
        raise ValueError(f"--resume {resume}: no such folder; give auto, never, a run folder or a checkpoint folder")
    checkpoint.check(folder)
    state = checkpoint.read_state(folder)
    own = folder.resolve().parent
    target = own if output_dir is None else output_dir.resolve()
    newer = [step for step in checkpoint.steps(target) if step > state["step"]]
    if newer and not (damaged and target == own):
        raise ValueError(f"{target} holds checkpoint-{max(newer)}, newer than {folder}; give another --output-dir")
    return Start(folder, state, damaged)


def check_model(config, start):
    """Raise ValueError where the flags ask for another model than the one that the run continues with.

    Args:
        config: 'model' and 'transport' as `train.resolve_config` gives them.
    """

    def meaning(config):
        # The share of dropped labels may change; whether there is a null class may not.
        guidable = config["model"]["class_dropout_prob"] > 0
        transport = {key: config["transport"][key] for key in ("path_type", "prediction")}
        return config["model"] | {"class_dropout_prob": guidable} | transport

    now, then = meaning(config), meaning(start.state)
    for key in now:
        if now[key] != then.get(key):
            raise ValueError(
                f"--{key.replace('_', '-')}: {now[key]} is asked for, but {start.folder} was trained with "
                f"{then.get(key)}; give another --output-dir, or --init-from to start a new run from its weights"
            )


def plain(flags):
    """Parsed flags as data that JSON and YAML can hold."""
    return {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in flags.items()}


def changed_flags(args, start):
    """A line for each flag that is not as it was when the checkpoint was written."""
    then = start.state["args"]
    return [
        f"--{key.replace('_', '-')} was {then[key]} until now, and is {value}"
        for key, value in plain(vars(args)).items()
        if key not in NOT_OF_THE_RUN and key in then and then[key] != value
    ]


def choose_folder(args, start):
    """The run's folder: --output-dir, that of the checkpoint to continue from, or a new numbered one."""
    if args.output_dir is not None:
        return args.output_dir
    if args.resume not in ("auto", "never"):
        return start.folder.resolve().parent
    numbers = [re.match(r"(\d{3,})-", path.name) for path in args.results_dir.glob("*/")]
    number = max((int(match[1]) + 1 for match in numbers if match), default=0)
    return args.results_dir / (
        f"{number:03d}-{args.model.replace('/', '-')}-{args.path_type}-{args.prediction}-{args.loss_weight}"
    )


def take_folder(output_dir):
    """Make the run's folder and hold it until this process ends, so that no second run writes there.

    Returns:
        A token that lies in the folder, by which ranks can tell that they see the same one.

    Raises:
        ValueError: the folder cannot be made or written to, or another run holds it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = files.hold(
            output_dir, f"another run is writing to {output_dir}; wait for it, or give another --output-dir"
        )
    except OSError as error:
        raise ValueError(f"the run's folder {output_dir} cannot be made or written to: {error.strerror}") from error
    token = uuid.uuid4().hex
    try:
        lock.truncate(0)
        lock.write(token)
        lock.flush()
    except OSError as error:
        raise ValueError(f"the run's folder {output_dir} cannot be written to: {error.strerror}") from error
    return token


def sees_folder(output_dir, token):
    """Whether this rank finds rank 0's token in the run's folder, some time for caches of file systems given."""
    if distributed.rank() == 0:
        return True  # and to close the file that holds the lock, after reading it, would give the lock up
    for _ in range(50):
        with contextlib.suppress(OSError):
            if (output_dir / files.LOCK).read_text() == token:
                return True
        time.sleep(0.2)
    return False


def set_aside(start, output_dir):
    """Rename the checkpoints after the start, which `find_start` found damaged: the run will need their names."""
    for step in checkpoint.steps(output_dir) if start.state else ():
        if step > start.state["step"]:
            folder = output_dir / f"checkpoint-{step}"
            names = (folder.with_name(f"damaged-{n}-{folder.name}") for n in itertools.count())
            folder.rename(next(name for name in names if not name.exists()))


class StopRequest:
    """Remembers SIGTERM and SIGINT, so that the step that is being made can be finished and saved.

    Once more is no different: torchrun and schedulers send both, or one twice.
    """

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.signal = signal.Signals(number)


def check_restarts(output_dir, resume):
    """Raise ValueError if torchrun will start this command again and it would not go on with its own checkpoints."""
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        return
    if output_dir is None:
        raise ValueError("--max-restarts needs --output-dir: without, each start would have a folder of its own")
    if resume == "never":
        raise ValueError("--max-restarts does not go with --resume never, which would not go on at a restart")
