"""Processes and devices: everything here works in one process without torchrun, so that no script asks which it is."""

import contextlib
import datetime
import os
import pathlib
import threading
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

# What a seed is used for, so that the same number of an epoch and of a step do not draw the same.
ORDER_STREAM, STEP_STREAM = range(2)
# How long a rank waits for the others. One that died is noticed at once; this ends waiting for one that hangs, and
# leaves rank 0 time to write 50,000 images into one file.
TIMEOUT = datetime.timedelta(minutes=30)
# DDP cuts a compiled model where a bucket is full. A block of SiT-XL is 91 MiB, which PyTorch's 25 would cut in four.
DDP_BUCKET_MIB = 256


def init():
    """Join torchrun's process group, if this process belongs to one, and return this process's device.

    NCCL with one GPU per process (by LOCAL_RANK: the global rank is no device index on a second node), gloo on CPU, and
    for what is on the CPU in any case.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    use_cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK is {local_rank}, and this process sees {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps one store over its restarts, in which a rank must not find the addresses of ranks that died.
        launch = [os.environ.get(f"TORCHELASTIC_{key}", "") for key in ("RUN_ID", "RESTART_COUNT")]
        store = dist.PrefixStore("-".join(launch), store)
        where = dict(store=store, rank=rank, world_size=world_size, device_id=device if use_cuda else None)
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=TIMEOUT, **where)
    return device


def _end_with_launcher(launcher):
    """End this process when torchrun is gone: killed, it would leave ranks behind that write to the run's folder."""
    while os.getppid() == launcher and not _is_init(launcher):
        time.sleep(0.5)
    os._exit(1)


def _is_init(pid):
    """Whether a process is the system's first, which takes in orphans; in a container, that can be torchrun itself."""
    try:
        return pid == 1 and not pathlib.Path("/proc/1/comm").read_text().startswith(("python", "torchrun", "pt_"))
    except OSError:
        return False


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


def total(value):
    """The sum of a tensor over ranks, on every rank. The tensor itself may be changed."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(flag):
    """Whether `flag` is true on any rank, on every rank. Asked over the CPU, so that no rank waits for its GPU."""
    if not dist.is_initialized():
        return flag
    holder = torch.tensor(int(flag))
    dist.all_reduce(holder, dist.ReduceOp.MAX)
    return bool(holder)


def from_rank_zero(value):
    """Rank 0's value of a plain Python object, on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def from_all(value):
    """A list of every rank's value of a plain Python object, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(function, *args):
    """What `function(*args)` returns on rank 0, on every rank. A ValueError that it raises is raised on every rank."""
    result, problem = None, None
    if rank() == 0:
        try:
            result = function(*args)
        except ValueError as error:
            problem = str(error)
    result, problem = from_rank_zero((result, problem))
    if problem is not None:
        raise ValueError(problem)
    return result


def side_group():
    """A process group of all ranks for another thread's traffic on the CPU; None in one process."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None


def mesh(device, shard_size):
    """The ranks as (replicas, shards), for `shard`: groups of `shard_size` ranks in a row hold one model together.

    Args:
        shard_size: None: all ranks hold one model together.

    Raises:
        ValueError: the ranks do not divide into such groups.
    """
    shard_size = shard_size or world_size()
    if world_size() % shard_size:
        raise ValueError(f"--fsdp-shard-size {shard_size} does not divide the {world_size()} ranks")
    replicas = world_size() // shard_size
    if replicas == 1:
        return init_device_mesh(device.type, (shard_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, shard_size), mesh_dim_names=("replica", "shard"))


def shard(model, mesh, dtype=torch.float32):
    """Shard a SiT over ranks by FSDP2: each block is gathered when it computes and let go after.

    Args:
        model: on the meta device or another; changed in place.
        mesh: from `mesh`.
        dtype: of the gathered weights of blocks; the shards themselves, and gradients on their way, stay float32.
    """
    # Its output is a view; nothing changes it in place, of which FSDP2 warns at the first step.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    # What is the root's, embeddings and the final layer, stays float32, as autocast has the tensors between blocks.
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    high = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        # Also the root, which FSDP2 by default leaves gathered: an average must not be used stale.
        fully_shard(module, mesh=mesh, mp_policy=high if module is model else low, reshard_after_forward=True)
    register_fsdp_forward_method(model, "forward_with_cfg")


def replicate(model, device):
    """Wrap a model so that backward averages gradients over ranks (DDP); with one rank, the model itself."""
    if world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, bucket_cap_mb=DDP_BUCKET_MIB
    )


@contextlib.contextmanager
def accumulate(model, is_last):
    """Context of one micro batch's forward and backward: gradients travel between replicas with the last one alone.

    Between shards they travel each time: a rank has no room for whole gradients.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)
        yield
    elif isinstance(model, DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
    else:
        yield


def local(tensors):
    """This rank's part of each tensor, as a list: shards of those that are sharded, the others themselves."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def total_norm(gradients):
    """The 2-norm of all gradients together, over all shards: a plain tensor () on every rank."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def like_parameter(value, parameter):
    """A tensor () that is the same on all ranks, as an operation on `parameter` takes it: sharded ones want a mesh."""
    if not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


class LateReader:
    """Reads numbers off the device one step late, so that the host never waits for a step that it has just launched.

    On the CPU, where there is nothing to wait for, at once.
    """

    def __init__(self, device):
        self.late = device.type == "cuda"
        self.pending = []

    def push(self, step, values):
        """Send the tensor `values` of a step on its way; [(step, numbers)] of those that have arrived."""
        if not self.late:
            return [(step, values.tolist())]
        arrived = self.flush()
        there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        there.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((step, there, event))
        return arrived

    def flush(self):
        """[(step, numbers)] of all that are on their way; waits for them."""
        arrived = []
        for step, there, event in self.pending:
            event.synchronize()
            arrived.append((step, there.tolist()))
        self.pending = []
        return arrived


def seed_from(*key):
    """A 63-bit seed that depends on all of `key`, non-negative integers, without patterns between neighbouring keys."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(device, *key):
    """A `torch.Generator` on `device`, seeded from `key`."""
    return torch.Generator(device).manual_seed(seed_from(*key))
