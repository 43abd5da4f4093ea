"""The log of a run: text, metrics as lines of JSON, grids, and trackers (TensorBoard, Weights & Biases)."""

import contextlib
import errno
import functools
import importlib
import itertools
import json
import math
import resource
import sys
import time
import uuid

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.images import check_problems
from training import costs
from utils import distributed, files
from utils.grids import save_grid

TIME_BINS = 10  # of t in [0, 1], for the loss


class Metrics:
    """Means over a window of steps and all ranks, and numbers of a moment, for the next line of the log.

    `mean` and `point` may be called anywhere in the training loop, on all ranks. Sums stay on the device; ranks are
    reduced when the log is written. `saved` is `state()` of the window that a checkpoint cut."""

    def __init__(self, device, saved=None):
        self.device, self.points, self.pending, self.sums = device, {}, {}, {}
        if isinstance(saved, list):  # of older checkpoints: steps, images, loss, then images and loss by time
            losses, counts = saved[3 + TIME_BINS :], saved[3 : 3 + TIME_BINS]
            saved = {"loss": [[saved[2]], [saved[1]]], "loss_by_time": [losses, counts]}
        for name, sums in dict(saved or {}).items() if distributed.rank() == 0 else ():
            self.sums[name] = torch.tensor([list(map(float, row)) for row in sums], dtype=torch.float64).to(device)
            if self.sums[name].shape[:-1] != (2,):
                raise ValueError(f"the sums and counts of {name} are {sums!r}")

    def mean(self, name, values):
        """Add values, a number or a tensor of any shape, to the mean of a name."""
        values = torch.as_tensor(values, dtype=torch.float64, device=self.device).detach().flatten()
        sums = torch.stack([values.sum(), values.new_full((), len(values))])[:, None]
        self.pending[name] = self.pending.get(name, 0) + sums

    def mean_by_time(self, name, values, t):
        """Add values (M,) at times t (M,) to the means of `TIME_BINS` bins of time."""
        bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        members = (bins[:, None] == torch.arange(TIME_BINS, device=t.device)).double()
        sums = torch.stack([values.detach().double() @ members, members.sum(0)])
        self.pending[name] = self.pending.get(name, 0) + sums

    def point(self, name, value):
        """Set a number that the next line of the log shows as it is."""
        self.points[name] = value.item() if isinstance(value, torch.Tensor) else value

    def commit(self, bad):
        """Add the means of a step to the window, unless the tensor `bad` () is true."""
        for name, sums in self.pending.items():
            earlier = self.sums.get(name, sums)
            earlier = earlier if name in self.sums and earlier.shape == sums.shape else 0  # of a window of other code
            self.sums[name] = earlier + torch.where(bad, 0, sums)
        self.pending = {}

    def _reduced(self):
        """Return {name: sums and counts (2, K) over all ranks}. Waits for the device."""
        reduced = {}
        everywhere = distributed.gather({name: sums.shape[1] for name, sums in self.sums.items()})
        for name, size in sorted({item for names in everywhere for item in names.items()}):
            zeros = torch.zeros(2, size, dtype=torch.float64, device=self.device)
            reduced[name] = distributed.all_reduce(zeros + self.sums.get(name, 0))
        return reduced

    def take(self):
        """Return {name: mean, list of means or point}, where a mean of no values is None, and start a new window."""
        self.commit(torch.tensor(False, device=self.device))
        metrics = {}
        for name, sums in self._reduced().items():
            means = [total / count if count else None for total, count in sums.T.tolist()]
            metrics[name] = means if len(means) > 1 else means[0]
        metrics |= self.points
        self.sums, self.points = {}, {}
        return metrics

    def state(self):
        """Return the window as plain data, over all ranks; numbers that are not finite as text, for JSON."""
        self.commit(torch.tensor(False, device=self.device))

        def plain(row):
            return [number if math.isfinite(number) else str(number) for number in row]

        return {name: [plain(row) for row in sums.tolist()] for name, sums in self._reduced().items()}


class Meter:
    """Measures throughput and the time spent on what is no training, since the last line of the log."""

    def __init__(self, model_config, device, precision, route=None, losses=()):
        self.device, self.losses, self.peak = device, losses, costs.peak_flops(device, precision)
        self.flops_of = functools.cache(lambda active: costs.training_flops(model_config, route, active))
        self._start()

    def _start(self):
        self.start, self.seconds = time.perf_counter(), {"waiting": 0.0, "paused": 0.0}
        self.images, self.flops = 0, 0

    def add(self, images, step):
        """Count the images of a step after `step` others, which decide the auxiliary losses that are computed."""
        self.images += images
        self.flops += images * self.flops_of(tuple(loss for loss in self.losses if loss.is_active(step)))

    @contextlib.contextmanager
    def timing(self, kind):
        """Context of 'waiting' for data, or of training 'paused' to sample, whose time does not count."""
        start = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - start

    def take(self):
        """Return images/s, the share of time spent waiting for data, peak memory in GiB and MFU, and start again."""
        seconds = time.perf_counter() - self.start - self.seconds["paused"]
        rate = self.images / seconds
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        mfu = self.peak and self.flops / (seconds * self.peak * distributed.world_size())
        wait = self.seconds["waiting"] / seconds
        self._start()
        return {"images_per_second": rate, "data_wait": wait, "memory_gib": memory / 2**30, "mfu": mfu}


class LeftOut:
    """Counts and names the examples that are left out, on all ranks; without `skip` one is an error.

    `count` were left out before; `lines` say what was left out when the data were opened."""

    def __init__(self, count, skip, lines):
        self.count, self.skip = count, skip
        self.lines = [f"left out {line}" for line in lines if distributed.rank() == 0]

    def add(self, step, problems):
        """Take the problems of a micro-batch, a list of lines for each place. Raise ValueError without `skip`."""
        self.lines += [f"(step={step:07d}) left out {line}" for line in check_problems(problems, self.skip)]

    def report(self, write_line):
        """Write the lines of all ranks since the last call, and count them."""
        for line in itertools.chain(*distributed.gather(self.lines)):
            self.count += 1
            write_line(line)
        self.lines = []


class RunLog:
    """Writes the log of a run on rank 0; does nothing on other ranks.

    Metrics of steps after `step`, where the run starts and which it will repeat, are removed. The first file that
    cannot be written, on a full disk for example, is reported, and the run continues."""

    def __init__(self, output_dir, step, trackers):
        self.active, self.trackers, self.reported = distributed.rank() == 0, trackers, False
        self.output_dir = output_dir
        if not self.active:
            return
        paths = [output_dir / name for name in ("log.txt", "metrics.jsonl", "evaluations.jsonl")]
        how = dict(buffering=1, encoding="utf-8", errors="backslashreplace")  # whatever the locale, and any file's name
        try:
            for path in paths[1:]:
                if path.exists():
                    _keep_until(path, step)
            self.text, self.metrics_file, self.evaluations = (files.open_own(path, "a", **how) for path in paths)
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be written: {error.strerror}") from error

    def line(self, text):
        """Write a line of text."""
        if self.active:
            with self._continuing("the terminal"):
                tqdm.write(text)
                sys.stdout.flush()  # a log that is piped to a file is watched too
            with self._continuing(self.text.name):
                self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, metrics):
        """Write metrics up to metrics['step']; None means unknown, and a list holds means by time."""
        if not self.active:
            return
        loss = "no finite loss" if metrics["loss"] is None else f"loss {metrics['loss']:.4f}"
        mfu = "" if metrics["mfu"] is None else f", {metrics['mfu']:.1%} MFU"
        self.line(
            f"(step={metrics['step']:07d}) {loss}, gradient norm {metrics['gradient_norm'] or math.nan:.3f}, "
            f"{metrics['images_per_second']:.1f} images/s{mfu}, {metrics['data_wait']:.0%} of the time waiting for data"
        )
        with self._continuing(self.metrics_file.name):
            self.metrics_file.write(files.to_json(metrics) + "\n")
        numbers = dict(metrics)
        for name, values in metrics.items():
            if isinstance(values, list):
                numbers |= {f"{name}/{b / len(values):.1f}": value for b, value in enumerate(values)}
        self._track("metrics", _finite(numbers, (int, float)), metrics["step"])

    def grid(self, images, columns, step):
        """Write uint8 images (N, H, W, C) as samples/STEP.png; None are images that are not finite."""
        if self.active and images is None:
            self.line(f"(step={step:07d}) no grid: the samples are not finite")
        elif self.active:
            path = self.output_dir / "samples" / f"{step:07d}.png"
            with self._continuing(path):
                path.parent.mkdir(exist_ok=True)
                if path.parent.is_symlink():
                    raise OSError(errno.ELOOP, "samples is a symbolic link, which is not written through")
                with files.written_whole(path) as partial, files.open_own(partial, "wb") as file:
                    save_grid(images, file, columns)
                self.line(f"(step={step:07d}) samples {path}")
                self._track("grid", path, step)

    def evaluation(self, step, metrics):
        """Write metrics of EMA samples: a line of text, and one of evaluations.jsonl; None is unknown."""
        if self.active:
            numbers = _finite(metrics, float)
            texts = [f"{key} {value:.4f}" for key, value in numbers.items()]
            texts += [f"no {key}: the samples are not finite" for key, value in metrics.items() if value is None]
            text = ", ".join(texts)
            caveats = "; ".join(metrics.get("caveats", ()))
            caveats = f"; not comparable with published metrics: {caveats}" if caveats else ""
            self.line(f"(step={step:07d}) {text} of {metrics['n_samples']} samples{caveats}")
            with self._continuing(self.evaluations.name):
                self.evaluations.write(files.to_json({"step": step, **metrics}) + "\n")
            self._track("metrics", numbers, step)

    def close(self):
        self._track("close")
        for file in (self.text, self.metrics_file, self.evaluations) if self.active else ():
            with self._continuing(file.name):
                file.close()

    def _track(self, method, *arguments):
        for tracker in self.trackers:
            with self._continuing(type(tracker).__name__):
                getattr(tracker, method)(*arguments)

    @contextlib.contextmanager
    def _continuing(self, name):
        try:
            yield
        except OSError as error:
            if not self.reported:
                with contextlib.suppress(OSError):
                    print(f"{name} cannot be written: {error.strerror}; training continues", file=sys.stderr)
            self.reported = True


def _finite(metrics, kinds):
    """Return what of {name: value} is a finite number of these kinds."""
    return {key: value for key, value in metrics.items() if isinstance(value, kinds) and math.isfinite(value)}


def _keep_until(path, step):
    """Remove the lines of later steps from a .jsonl file, and a line that a killed run left incomplete."""
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            kept += [line] if json.loads(line)["step"] <= step else []
    with files.written_whole(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in kept))


class TensorBoard:
    """Metrics and grids for TensorBoard, in the folder tensorboard/ of the run."""

    def __init__(self, module, output_dir, step, config):
        self.writer = module.SummaryWriter(output_dir / "tensorboard", purge_step=step + 1)
        self.close = self.writer.close

    def metrics(self, numbers, step):
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)

    def grid(self, path, step):
        self.writer.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")


class WeightsAndBiases:
    """Metrics and grids for Weights & Biases, which reads WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE (offline)."""

    def __init__(self, module, output_dir, step, config):
        id_file = output_dir / "wandb_id.txt"  # the same id continues the same run
        if not id_file.exists():
            with files.open_own(id_file, "w") as file:
                file.write(uuid.uuid4().hex[:12])
        where = dict(name=output_dir.name, id=id_file.read_text(), dir=output_dir)
        self.run, self.image = module.init(**where, config=config, resume="allow"), module.Image
        self.close = self.run.finish

    def metrics(self, numbers, step):
        self.run.log(numbers, step=step)

    def grid(self, path, step):
        self.run.log({"samples": self.image(str(path))}, step=step)


TRACKERS = {"tensorboard": (TensorBoard, "torch.utils.tensorboard"), "wandb": (WeightsAndBiases, "wandb")}


def import_trackers(names):
    """Return, on rank 0, a function (output_dir, step, config) per name in TRACKERS that opens the tracker.

    Raise ValueError if its package is not installed."""
    openers = []
    for name in names if distributed.rank() == 0 else ():
        tracker, module = TRACKERS[name]
        try:
            imported = importlib.import_module(module)
            if getattr(imported, "__file__", None) is None:
                raise ImportError(f"{name}/ is a folder here, such as an earlier run's, and not the package")
            openers.append(functools.partial(tracker, imported))
        except ImportError as error:
            raise ValueError(f"--{name} needs the package {name}: pip install {name}") from error
    return openers
