"""What the benchmarks share: rows that are measured in turn, times by part, peak memory, and tables."""

import datetime
import itertools
import os
import pathlib
import platform
import resource
import statistics
import sys
import time

import torch

CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")


class Clock:
    """Times the parts of something that is done again and again, without making the host wait.

    On a GPU by events in its stream, whose times are read in `parts`; on a CPU by the clock.
    """

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.marks = []

    def mark(self, part):
        """The part `part` ends here; None: something begins here."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def parts(self):
        """[(part, seconds)] of all that was marked; waits for the device, and begins anew."""
        marks, self.marks = self.marks, []
        if self.on_gpu:
            torch.cuda.synchronize()
        return [
            (part, begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin)
            for (_, begin), (part, end) in zip(marks, marks[1:], strict=False)
            if part is not None
        ]


def choose(rows, numbers):
    """The rows of these numbers, and the first, to which the others are held; None: all. Raises ValueError."""
    if numbers is None:
        return rows
    if max(numbers) >= len(rows):
        raise ValueError(f"--rows {max(numbers)}: there are rows 0 to {len(rows) - 1}")
    return [row for i, row in enumerate(rows) if i == 0 or i in numbers]


def synchronize(device):
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device):
    """Begin to measure `peak_memory` anew, where the system can (on a CPU: Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def memory_of_tensors(device):
    """Bytes of the tensors on a GPU now; 0 on a CPU, where `peak_memory` is the process's in any case."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(device):
    """Bytes that were in use at most: tensors on a GPU; on a CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class PeakOfProcess:
    """Context after which `bytes` is what the process took at its peak; on a GPU, with what its allocator keeps."""

    def __init__(self, device):
        self.device = device
        self.bytes = None

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
    """Context after which `bytes` is what all tensors made in it took together at their peak.

    On a CPU this is PyTorch's profiler, which takes memory itself.
    """

    def __init__(self, device):
        self.device = device
        self.bytes = None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print about GPUs that are not there
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


def seconds_in_turn(rows, rounds, repeats, device):
    """Seconds of one call of each row, a list over rounds: in every round each row is called `repeats` times in turn.

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


def where(device):
    """One line: machine, PyTorch and date, as every table needs them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{torch.get_num_threads()} threads of {platform.machine()} ({capability}), no GPU"
    return f"{name}, torch {torch.__version__}, {datetime.date.today()}"


def print_table(columns, rows):
    """A Markdown table of cells, which are turned into text; None is a dash, and a row may end early."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        row = [*row, *[None] * (len(columns) - len(row))]
        print("| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |")


def median(values):
    return statistics.median(values)
