"""The order in which a run sees its examples, and loaders that keep it."""

import atexit
import collections
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing.connection
import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from data.images import PATIENCE, ImageDataset
from utils.distributed import ORDER_STREAM, generator, seed_from

MOST_TEMPORARY = 70  # bytes in the name of TMPDIR that leave room for the name of a socket, which has up to 107 in all
WORKER_GRACE_SECONDS = 30  # in which a worker process continues after SIGTERM


@dataclasses.dataclass
class GlobalBatchSampler:
    """An iterable of one rank's micro-batches, each a list of (index, flip) keys, step after step, without end.

    The order is one long sequence of permutations of the data, one per epoch, which depend on (seed, epoch) alone, so
    that no example is left out at an epoch's end. Each step takes the next global batch of it; each rank has a
    contiguous share of that, in micro-batches. What a step trains on is thus the same for any number of ranks, any
    micro-batch size, and after any restart."""

    num_examples: int
    global_batch_size: int  # over all ranks and gradient accumulation steps
    micro_batch_size: int  # global_batch_size is a multiple of micro_batch_size * world_size
    _: dataclasses.KW_ONLY
    seed: int
    rank: int
    world_size: int
    mirror: bool  # flip each example with probability 1/2 per epoch
    start: int = 0  # places of the sequence to pass over: the examples seen before the run was stopped

    def __iter__(self):
        @functools.lru_cache(maxsize=2)  # a step can reach over the end of an epoch
        def epoch_keys(epoch):
            g = generator("cpu", self.seed, ORDER_STREAM, epoch)
            order = torch.randperm(self.num_examples, generator=g).numpy()
            flips = torch.rand(self.num_examples, generator=g) < (0.5 if self.mirror else 0)
            return order, flips.numpy()  # not lists, which take 15 times the memory

        share = self.global_batch_size // self.world_size
        for first in itertools.count(self.start + self.rank * share, self.global_batch_size):
            for start in range(first, first + share, self.micro_batch_size):
                places = (divmod(place, self.num_examples) for place in range(start, start + self.micro_batch_size))
                yield [tuple(part[position].item() for part in epoch_keys(epoch)) for epoch, position in places]


def _streamed_batches(dataset, sampler, num_threads):
    """Yield one rank's micro-batches of a data set whose source is a stream; threads decode the images.

    Every rank reads the whole stream and decodes its own share, so that a step trains on the same examples for any
    number of ranks (except that a bad one is replaced by the next good one of the micro-batch)."""
    rows, size, waiting = _streamed_rows(dataset.source, sampler), sampler.micro_batch_size, []
    with ThreadPoolExecutor(max(1, num_threads)) as threads:
        while True:
            waiting.append(list(threads.map(lambda row: dataset.read(*row), itertools.islice(rows, size))))
            spare = next((item for item in waiting[-1] if not item["problems"]), None)
            if spare is not None:
                for items in waiting:
                    for i in reversed(range(size)):  # the next good item replaces a bad one, which keeps its problems
                        spare = spare if items[i]["problems"] else items[i]
                        items[i] = spare | {"problems": items[i]["problems"]}
                    yield _collate(items)
                waiting = []
            elif len(waiting) * size >= PATIENCE:
                raise ValueError(f"not one of {PATIENCE} examples is good; the first: {waiting[0][0]['problems'][0]}")


def _streamed_rows(source, sampler):
    """Yield (key, example, flip) of one rank's share of each global batch, step after step."""
    share = sampler.global_batch_size // sampler.world_size
    mine = range(sampler.rank * share, (sampler.rank + 1) * share)
    # Begin with the epoch in which the run starts, if the number of examples in an epoch is known.
    first = sampler.start // source.num_examples if source.num_examples else 0
    place = first * (source.num_examples or 0)
    for epoch in itertools.count(first):
        epoch_start, flips = place, np.random.default_rng([sampler.seed, ORDER_STREAM, epoch])
        for key, example in source.examples(seed_from(sampler.seed, ORDER_STREAM, epoch)):
            flip = sampler.mirror and flips.random() < 0.5
            if place >= sampler.start and (place - sampler.start) % sampler.global_batch_size in mine:
                yield key, example, flip
            place += 1
        if place == epoch_start:
            raise ValueError(f"the stream holds no rows: {source.name('...')}")


def _collate(items):
    """Stack the tensors and numbers of items; "problems" becomes a list of the items' lists."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    return {key: values if key == "problems" else default_collate(values) for key, values in batch.items()}


def make_loader(dataset, sampler, num_workers, device, report=None):
    """Return a generator of micro-batches on the CPU: {key: stacked tensors (M, ...), "problems": list of M lists}.

    `num_workers` processes read the data set at the keys that `sampler` lists. The images of a stream, whose `sampler`
    is a `GlobalBatchSampler`, are decoded by as many threads. Memory is pinned if the batches' `device` is a GPU.

    If a process ends, killed for want of memory for example, `report` is called with a line that says so, and this
    process reads the batches from there on; without `report`, the line is that of a ValueError."""
    pin_memory = device.type == "cuda"
    if isinstance(dataset, ImageDataset) and dataset.source.streamed:
        # Threads: `datasets` would divide the files among processes, and the order would depend on their number.
        return _one_ahead(_streamed_batches(dataset, sampler, num_workers), pin_memory)
    if num_workers and len(os.fsencode(tempfile.gettempdir())) > MOST_TEMPORARY:
        tempfile.tempdir = "/tmp"  # processes hand over tensors through sockets in TMPDIR
    options = dict(num_workers=num_workers, worker_init_fn=_outlast_stop_signals, pin_memory=pin_memory)
    batches = _without_ended_processes(dataset, sampler, options, report)
    atexit.register(batches.close)  # ends the workers before multiprocessing waits for them
    return batches


def _one_ahead(batches, pin_memory):
    """Yield an endless iterator's batches, while a thread computes the next one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches)
        while True:
            batch = following.result()
            following = thread.submit(next, batches)
            yield {key: x.pin_memory() if pin_memory and key != "problems" else x for key, x in batch.items()}


def _without_ended_processes(dataset, sampler, options, report):
    """Yield the batches of a DataLoader with these options, and do without its processes when one of them has ended.

    Raise a process's ValueError without its traceback in its text."""
    waiting, keys, workers, others = collections.deque(), iter(sampler), [], multiprocessing.active_children()

    load = functools.partial(DataLoader, dataset, collate_fn=_collate)

    def noted():
        for key in keys:
            waiting.append(key)  # until its batch is there
            yield key

    try:
        batches = iter(load(batch_sampler=noted(), **options))
        if options["num_workers"]:
            workers = [process for process in multiprocessing.active_children() if process not in others]
            with contextlib.suppress(ValueError):  # in another thread
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error anywhere in a step
        for batch in batches:
            waiting.popleft()
            yield batch
        return
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    except (RuntimeError, OSError, EOFError) as error:  # of which kind depends on what was under way
        ended = multiprocessing.connection.wait([process.sentinel for process in workers], timeout=1)
        for process in workers:
            process.join(1 if process.sentinel in ended else 0)
        codes = {process.exitcode for process in workers} - {None, 0}
        if not codes and "DataLoader worker" not in str(error):
            raise
        problem = _why_ended(min(codes, default=0), options["num_workers"])
        if report is None:
            raise ValueError(problem) from error
        report(problem)
        del batches  # ends the other processes
    yield from load(batch_sampler=itertools.chain(waiting, keys), num_workers=0, pin_memory=options["pin_memory"])


def _why_ended(code, num_workers):
    """Return a line on a loader process that ended with an exit code, which is negative for a signal."""
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    causes = {signal.SIGKILL: "the system was out of memory", signal.SIGBUS: "/dev/shm is full"}
    cause = f", perhaps because {causes[-code]}" if -code in causes else ""
    return f"a loader process ended {how}{cause}; try fewer than --num-workers {num_workers}, or 0"


def _outlast_stop_signals(worker):
    """Let a worker outlast a signal to all processes: the main process finishes its step first, and needs the batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS))
