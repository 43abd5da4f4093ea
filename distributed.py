"""Processes and devices: everything here works in one process without torchrun, so that no script asks which it is."""

import contextlib
import os

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# What a seed is used for, so that the same number of an epoch and of a step do not draw the same.
ORDER_STREAM, STEP_STREAM = range(2)


def init():
    """Join torchrun's process group, if this process belongs to one, and return this process's device.

    NCCL with one GPU per process (by LOCAL_RANK: the global rank is no device index on a second node), gloo on CPU.
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", device_id=device if use_cuda else None)
    return device


def shutdown():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def mean(value):
    """Average a tensor over ranks; all ranks get the result."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def from_rank_zero(value):
    """Rank 0's value of a plain Python object, on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def data_parallel(model, device):
    """Wrap a model so that backward averages gradients over ranks; with one rank, the model itself."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def accumulate(model, is_last):
    """Context of one micro batch's forward and backward: gradients travel between ranks with the last one alone."""
    if is_last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def seed_from(*key):
    """A 63-bit seed that depends on all of `key`, non-negative integers, without patterns between neighbouring keys."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(device, *key):
    """A `torch.Generator` on `device`, seeded from `key`."""
    return torch.Generator(device).manual_seed(seed_from(*key))
