"""The order in which a run sees its examples, and loaders that keep it."""

import atexit
import dataclasses
import functools
import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from data.images import PATIENCE
from utils.distributed import ORDER_STREAM, generator, seed_from

WORKER_GRACE_SECONDS = 30  # in which a worker process continues after SIGTERM


@dataclasses.dataclass
class GlobalBatchSampler:
    """An iterable of one rank's micro-batches, each a list of (index, flip) keys, step after step, without end.

    The order is one long sequence: a permutation of the data for each epoch, which depends on (seed, epoch) alone, one
    after the other, so that no example is left out at an epoch's end. Each step takes the next global batch of it; each
    rank has a contiguous share of that, in micro-batches. What a step trains on is thus the same for any number of
    ranks, any micro-batch size, and after any restart.
    """

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
        # A step can reach over the end of an epoch, so the orders of two are kept.
        epoch_keys = functools.lru_cache(maxsize=2)(self._epoch_keys)
        share = self.global_batch_size // self.world_size
        for step_start in itertools.count(self.start, self.global_batch_size):
            first = step_start + self.rank * share
            for start in range(first, first + share, self.micro_batch_size):
                places = (divmod(place, self.num_examples) for place in range(start, start + self.micro_batch_size))
                yield [epoch_keys(epoch)[position] for epoch, position in places]

    def _epoch_keys(self, epoch):
        g = generator("cpu", self.seed, ORDER_STREAM, epoch)
        order = torch.randperm(self.num_examples, generator=g).tolist()
        flips = (torch.rand(self.num_examples, generator=g) < 0.5).tolist() if self.mirror else [False] * len(order)
        return list(zip(order, flips, strict=True))


class StreamedBatches(IterableDataset):
    """An iterable of one rank's micro-batches of a streamed source, step after step, without end; see `make_loader`.

    It stands for an `ImageDataset` with a `GlobalBatchSampler`, and takes the sampler's settings: every rank reads the
    whole stream and decodes its own share, so that a step trains on the same examples for any number of ranks (except
    that a bad one is replaced by the next good one of the micro-batch). Each epoch has another order. `threads` is the
    number of threads that decode images.
    """

    def __init__(self, source, reader, sampler, threads):
        self.source, self.reader, self.sampler, self.threads = source, reader, sampler, threads

    def __iter__(self):
        # Threads, not worker processes: `datasets` would divide the files among those, and the order would depend on
        # their number. One thread runs a micro-batch ahead.
        with ThreadPoolExecutor(1) as thread:
            batches = self._batches()
            following = thread.submit(next, batches)
            while True:
                batch = following.result()
                following = thread.submit(next, batches)
                yield batch

    def _batches(self):
        s = self.sampler
        share = s.global_batch_size // s.world_size
        rows, waiting = [], []
        with ThreadPoolExecutor(max(1, self.threads)) as threads:
            for place, *row in self._places():
                within = (place - s.start) % s.global_batch_size
                if place < s.start or not s.rank * share <= within < (s.rank + 1) * share:
                    continue
                rows.append(row)
                if len(rows) < s.micro_batch_size:
                    continue
                waiting.append(list(threads.map(self._read, rows)))
                rows = []
                spare = next((item for item in waiting[-1] if "y" in item), None)
                if spare is not None:
                    yield from (_collate(_replace_bad(items, spare)) for items in waiting)
                    waiting = []
                elif len(waiting) * s.micro_batch_size >= PATIENCE:
                    raise ValueError(
                        f"not one of {PATIENCE} examples is good; the first: {waiting[0][0]['problems'][0]}"
                    )

    def _places(self):
        """Yield (place, key, example, flip) of the endless sequence of epochs, from that in which the run starts."""
        first = self.sampler.start // self.source.num_examples if self.source.num_examples else 0
        place = first * (self.source.num_examples or 0)
        for epoch in itertools.count(first):
            start = place
            flips = np.random.default_rng([self.sampler.seed, ORDER_STREAM, epoch])
            for key, example in self.source.examples(seed_from(self.sampler.seed, ORDER_STREAM, epoch)):
                yield place, key, example, self.sampler.mirror and flips.random() < 0.5
                place += 1
            if place == start:
                raise ValueError(f"the stream holds no rows: {self.source.name('...')}")

    def _read(self, row):
        key, example, flip = row
        try:
            return self.reader.read(example, flip, self.source.name(key)) | {"problems": []}
        except ValueError as error:
            return {"problems": [str(error)]}


def _replace_bad(items, spare):
    """Replace each bad item by the next good one, or by `spare` if there is none, but keep its problems."""
    replaced = []
    for item in reversed(items):
        spare = item if "y" in item else spare
        replaced.append(spare | {"problems": item["problems"]})
    return replaced[::-1]


def _collate(items):
    """Stack the tensors and numbers of items; "problems" becomes a list of the items' lists."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    return {key: values if key == "problems" else default_collate(values) for key, values in batch.items()}


def make_loader(dataset, sampler, num_workers, device):
    """Return a generator of micro-batches on the CPU: {key: stacked tensors (M, ...), "problems": list of M lists}.

    `num_workers` processes read the data set at the keys that `sampler` lists; `StreamedBatches` needs neither. Memory
    is pinned if `device`, to which batches will be copied, is a GPU.
    """
    pin_memory = device.type == "cuda"
    if isinstance(dataset, StreamedBatches):
        loader = DataLoader(dataset, batch_size=None, pin_memory=pin_memory)
    else:
        workers = dict(num_workers=num_workers, worker_init_fn=_outlast_stop_signals)
        loader = DataLoader(dataset, batch_sampler=sampler, pin_memory=pin_memory, collate_fn=_collate, **workers)
    batches = _with_plain_errors(loader)
    atexit.register(batches.close)  # ends the workers before multiprocessing waits for them
    return batches


def _with_plain_errors(loader):
    """Yield the loader's batches; raise a worker's ValueError without the worker's traceback in its text."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _outlast_stop_signals(worker):
    """Let a worker outlast a signal to all processes: the main process finishes its step first, and needs the batch."""

    def end_later(number, frame):
        timer = threading.Timer(WORKER_GRACE_SECONDS, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)
