"""What the benchmarks share: timing, peak memory, flags, tables and JSON.

Every benchmark imports this module first, because it puts the repository on the import path.
"""

import contextlib
import ctypes
import datetime
import itertools
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from repository import ROOT

from models import SiT_models
from utils import files

CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")
DOWNSAMPLING, LATENT_CHANNELS = 8, 4  # of the released models


class Clock:
    """Times the parts of a step without making the host wait: on a GPU by CUDA events, which `parts` reads."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.marks = []

    def mark(self, part):
        """Mark the end of the part `part`; None marks the start of a step."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def parts(self):
        """Return [(part, seconds)] of all marks since the last call. Wait for the device."""
        marks, self.marks = self.marks, []
        if self.on_gpu:
            torch.cuda.synchronize()
        return [
            (part, start.elapsed_time(end) / 1e3 if self.on_gpu else end - start)
            for (_, start), (part, end) in itertools.pairwise(marks)
            if part is not None
        ]


def synchronize(device):
    """Wait until a GPU has done its work; return at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_in_turn(rows, rounds, repeats, device):
    """Return {name: list over rounds of the seconds of one call}; a round calls each row `repeats` times, in turn.

    Args:
        rows: {name: function without arguments}.
    """
    seconds = {name: [] for name in rows}
    for _ in range(rounds):
        for name, function in rows.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def medians_in_turn(rows, rounds, repeats, device):
    """Return {name: median over rounds of the seconds of one call}; see `seconds_in_turn`."""
    return {name: median(values) for name, values in seconds_in_turn(rows, rounds, repeats, device).items()}


def median(values):
    return statistics.median(values)


def reset_peak_memory(device):
    """Start a new measurement of `peak_memory`; on a CPU this needs Linux, and does nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with contextlib.suppress(AttributeError):  # glibc has it
            ctypes.CDLL(None).malloc_trim(0)  # what `distributed.keep_freed_memory` has kept
        CLEAR_REFS.write_text("5")


def memory_of_tensors(device):
    """Return the bytes of all tensors on a GPU; 0 on a CPU, where `peak_memory` counts the whole process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(device):
    """Return the peak memory in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class PeakOfProcess:
    """Context that measures, in `bytes`, the peak of a CPU process's growth, or of what a GPU's allocator holds."""

    def __init__(self, device):
        self.device, self.bytes = device, None

    def __enter__(self):
        reset_peak_memory(self.device)
        self.before = peak_memory(self.device)
        return self

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_reserved(self.device)
        else:
            self.bytes = peak_memory(self.device) - self.before


class PeakOfTensors:
    """Context that measures, in `bytes`, the peak memory of all tensors made in it.

    On a CPU it uses PyTorch's profiler, which takes memory itself.
    """

    def __init__(self, device):
        self.device, self.bytes = device, None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # on a CPU it would print warnings about GPUs
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.profile.__enter__()
        return self

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self.profile.__exit__(*exception)
        changes = [event for event in self.profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        self.bytes = max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def run_script(name, *flags):
    """Run a script of the project to its end, without its output. Raise CalledProcessError if it fails."""
    words = [sys.executable, ROOT / name, *map(str, flags)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def model_config(name, image_size):
    """Return the arguments of SiT of a named model for the latents of ImageNet's images."""
    sizes = dict(input_size=image_size // DOWNSAMPLING, in_channels=LATENT_CHANNELS, num_classes=1000)
    return SiT_models[name].keywords | sizes


def num_tokens(config):
    """Return the number of tokens of SiT(**config)."""
    return (config["input_size"] // config["patch_size"]) ** 2


def check_image_size(image_size):
    """Raise ValueError if images of this size have no latents."""
    if image_size % DOWNSAMPLING:
        raise ValueError(f"--image-size {image_size} is no multiple of {DOWNSAMPLING}")


def choose(rows, numbers):
    """Return the rows of these numbers, and the first, with which they are compared; None: all. Raise ValueError."""
    if numbers is None:
        return rows
    if max(numbers) >= len(rows):
        raise ValueError(f"--rows {max(numbers)}: there are rows 0 to {len(rows) - 1}")
    return [row for i, row in enumerate(rows) if i == 0 or i in numbers]


def add_json_flag(add):
    """Add --json by the function that `command_line.flag_group` returned."""
    add("--json", pathlib.Path, "FILE", "write the results to this file, too")


def check_json(path):
    """Raise ValueError if --json names a file that cannot be written."""
    if path is not None:
        files.check_output("--json", path)


def write_json(path, settings, rows, device):
    """Write settings, machine and rows to the file of --json, if that was given."""
    if path is not None:
        files.write_json(path, {**settings, "machine": machine(device), "rows": rows})


def machine(device):
    """Return one line on device, PyTorch and date."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{torch.get_num_threads()} threads of {platform.machine()} ({capability}), no GPU"
    return f"{name}, torch {torch.__version__}, {datetime.date.today()}"


def gib(size):
    """Return bytes in GiB."""
    return size / 2**30


def cell(value, text):
    """Return a value in a format such as '{:.2f}'; None, which `print_table` shows as a dash, if there is none."""
    return None if value is None else text.format(value)


def print_table(columns, rows):
    """Print a Markdown table. A cell that is None, or missing at the end of a row, is a dash."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        row = [*row, *[None] * (len(columns) - len(row))]
        print("| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |")
