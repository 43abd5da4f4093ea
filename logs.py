"""The log of a run: lines on the terminal and in log.txt, figures as lines of JSON, and trackers that are asked for."""

import contextlib
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

import costs
import distributed
import files
import sampling

TIME_BINS = 10  # of t in [0, 1], for the loss


class LossWindow:
    """Losses since the last line of the log, by bins of t as well: sums over all ranks, which stay on the device.

    Args:
        saved: `state()` of the window that a stopped run had begun.
    """

    def __init__(self, device, saved=None):
        # Steps, images, loss; then images and loss of each bin.
        self.sums = torch.zeros(3 + 2 * TIME_BINS, dtype=torch.float64, device=device)
        if saved is not None:
            self.sums += torch.tensor(saved, dtype=torch.float64, device=device)

    @staticmethod
    def record(losses, t):
        """What losses (N,) at times t (N,) add to the sums, apart from the step."""
        losses = losses.detach().double()
        bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        members = (bins[:, None] == torch.arange(TIME_BINS, device=t.device)).double()
        step, images = losses.new_zeros(1), losses.new_full((1,), len(losses))
        return torch.cat([step, images, losses.sum()[None], members.sum(0), losses @ members])

    @staticmethod
    def loss(record):
        """Mean loss () of the images of a record."""
        return record[2] / record[1]

    def add(self, record, bad):
        """Add the records of a step, unless the tensor `bad` () is true."""
        record[0].fill_(1)
        self.sums += torch.where(bad, 0, record)

    def take(self):
        """(loss, [loss of each bin of t]), None where there was no image; and begin anew. Waits for the device."""
        steps, images, loss, *bins = self.sums.tolist()
        counts, losses = bins[:TIME_BINS], bins[TIME_BINS:]
        self.sums.zero_()
        by_time = [loss / count if count else None for count, loss in zip(counts, losses, strict=True)]
        return loss / images if images else None, by_time

    def state(self):
        """The sums as plain data. Waits for the device."""
        return self.sums.tolist()


class Meter:
    """Measures the time of training since the last line of the log, and what it was spent on.

    Args:
        model_config: arguments of SiT, whose operations are counted.
        device, precision: decide the peak that the operations are held against.
    """

    def __init__(self, model_config, device, precision):
        self.device = device
        self.flops_per_image = costs.training_flops(model_config)
        self.peak = costs.peak_flops(device, precision)
        self._begin()

    def _begin(self):
        self.start, self.images, self.waited, self.paused = time.perf_counter(), 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Around what waits for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def pause(self):
        """Around what is not training, whose time does not count."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def step(self, images):
        """A step is done, of so many images over all ranks."""
        self.images += images

    def take(self):
        """Figures since the last call, and begin anew: images/s, share of waiting, peak memory in GiB, and MFU."""
        seconds = time.perf_counter() - self.start - self.paused
        rate = self.images / seconds
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        figures = {
            "images_per_second": rate,
            "data_wait": self.waited / seconds,
            "memory_gib": memory / 2**30,
            "mfu": self.peak and rate * self.flops_per_image / (self.peak * distributed.world_size()),
        }
        self._begin()
        return figures


class RunLog:
    """Writes the log of a run on rank 0; on other ranks, does nothing.

    A log that cannot be written, on a full disk for one, is said so once and does not end the run.

    Args:
        output_dir: the run's folder.
        step: where the run continues; figures of later steps, which it will repeat, are taken out of the .jsonl files.
        trackers: of `open_trackers`.
    """

    def __init__(self, output_dir, step, trackers):
        self.active = distributed.rank() == 0
        self.trackers = trackers
        self.broken = False
        self.output_dir = output_dir
        if not self.active:
            return
        try:
            for name in ("metrics.jsonl", "evaluations.jsonl"):
                if (output_dir / name).exists():
                    _keep_until(output_dir / name, step)
            self.text = open(output_dir / "log.txt", "a", buffering=1)
            self.figures = open(output_dir / "metrics.jsonl", "a", buffering=1)
            self.evaluations = open(output_dir / "evaluations.jsonl", "a", buffering=1)
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be written: {error.strerror}") from error

    def line(self, text):
        """A line of text."""
        if self.active:
            with self._going_on("the terminal"):
                tqdm.write(text)
                sys.stdout.flush()  # a log that is piped to a file is watched too
            self._write(self.text, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, **figures):
        """Figures of the steps since the last call, 'step' the last of them; None is 'not known'."""
        if not self.active:
            return
        loss = "no finite loss" if figures["loss"] is None else f"loss {figures['loss']:.4f}"
        mfu = "" if figures["mfu"] is None else f", {figures['mfu']:.1%} MFU"
        self.line(
            f"(step={figures['step']:07d}) {loss}, gradient norm {figures['gradient_norm'] or math.nan:.3f}, "
            f"{figures['images_per_second']:.1f} images/s{mfu}, {figures['data_wait']:.0%} of the time waiting for data"
        )
        self._write(self.figures, json.dumps(figures) + "\n")
        numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
        for b, value in enumerate(figures["loss_by_time"]):
            if value is not None:
                numbers[f"loss_by_time/{b / TIME_BINS:.1f}"] = value
        self._track("figures", numbers, figures["step"])

    def grid(self, images, columns, step):
        """Write uint8 images (N, H, W, C) as samples/STEP.png."""
        if self.active:
            path = self.output_dir / "samples" / f"{step:07d}.png"
            with self._going_on(path):
                path.parent.mkdir(exist_ok=True)
                sampling.save_grid(images, path, columns)
                self.line(f"(step={step:07d}) samples {path}")
                self._track("picture", path, step)

    def evaluation(self, step, figures):
        """Figures of samples of the average at a step: a line, and one of evaluations.jsonl."""
        if self.active:
            numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
            text = ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
            text += f" of {figures['n_samples']} samples"
            if figures.get("caveats"):
                text += f"; not comparable with published figures: {'; '.join(figures['caveats'])}"
            self.line(f"(step={step:07d}) {text}")
            self._write(self.evaluations, json.dumps({"step": step, **figures}) + "\n")
            self._track("figures", numbers, step)

    def close(self):
        self._track("close")
        for file in (self.text, self.figures, self.evaluations) if self.active else ():
            with self._going_on(file.name):
                file.close()

    def _track(self, method, *arguments):
        for tracker in self.trackers:
            with self._going_on(type(tracker).__name__):
                getattr(tracker, method)(*arguments)

    def _write(self, file, text):
        with self._going_on(file.name):
            file.write(text)

    @contextlib.contextmanager
    def _going_on(self, name):
        """Around what writes to `name`: if it cannot, that is said once, and the run goes on."""
        try:
            yield
        except OSError as error:
            if not self.broken:
                with contextlib.suppress(OSError):
                    print(f"{name} cannot be written: {error.strerror}; training goes on", file=sys.stderr)
            self.broken = True


def _keep_until(path, step):
    """Take the lines of later steps out of a .jsonl file, and a line that a killed run left half-written."""
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            continue
    with files.written_whole(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in kept))


class TensorBoard:
    """Figures and pictures for TensorBoard, in the folder tensorboard/ of the run."""

    def __init__(self, writer_class, output_dir, step):
        self.writer = writer_class(output_dir / "tensorboard", purge_step=step + 1)

    def figures(self, numbers, step):
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)

    def picture(self, path, step):
        self.writer.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """Figures and pictures for Weights & Biases: WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE (offline) are honoured."""

    def __init__(self, wandb, output_dir, config):
        self.wandb = wandb
        # The same id continues the same run.
        id_file = output_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        run_id = id_file.read_text()
        self.run = wandb.init(name=output_dir.name, id=run_id, dir=output_dir, config=config, resume="allow")

    def figures(self, numbers, step):
        self.run.log(numbers, step=step)

    def picture(self, path, step):
        self.run.log({"samples": self.wandb.Image(str(path))}, step=step)

    def close(self):
        self.run.finish()


def import_trackers(tensorboard, wandb):
    """The packages that are asked for, by flag, imported now and not before. Raises ValueError if one is not there."""
    packages = {}
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
        packages["tensorboard"] = SummaryWriter
    if wandb:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("--wandb needs the package wandb: pip install wandb") from error
        packages["wandb"] = wandb
    return packages


def open_trackers(packages, output_dir, step, config):
    """Begin to log to what `import_trackers` gave, on rank 0; a list for `RunLog`."""
    if distributed.rank() != 0:
        return []
    trackers = []
    if "tensorboard" in packages:
        trackers.append(TensorBoard(packages["tensorboard"], output_dir, step))
    if "wandb" in packages:
        trackers.append(WeightsAndBiases(packages["wandb"], output_dir, config))
    return trackers
