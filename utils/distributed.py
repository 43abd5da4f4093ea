"""Ranks, devices and sharding. Every function works without a process group, too, so no script asks if there is one."""

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

# Streams of random numbers, so that epoch n and step n, with the same seed, draw different ones.
ORDER_STREAM, STEP_STREAM = range(2)
# How long a rank waits for the others. A rank that dies is noticed at once; this is for ranks that hang, and leaves
# rank 0 time to write 50,000 images into one file.
TIMEOUT = datetime.timedelta(minutes=30)
# DDP cuts a compiled model where a bucket is full. A block of SiT-XL is 91 MiB, which PyTorch's 25 would cut in four.
DDP_BUCKET_MIB = 256


def init():
    """Join torchrun's process group, if there is one, and return this process's device.

    The backend is NCCL for CUDA tensors and gloo for CPU tensors. The GPU is chosen by LOCAL_RANK: the global rank is
    no device index on a second node.
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
        # torchrun keeps one store over its restarts; a prefix hides the addresses of ranks that died.
        launch = [os.environ.get(f"TORCHELASTIC_{key}", "") for key in ("RUN_ID", "RESTART_COUNT")]
        store = dist.PrefixStore("-".join(launch), store)
        where = dict(store=store, rank=rank, world_size=world_size, device_id=device if use_cuda else None)
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=TIMEOUT, **where)
    return device


def _end_with_launcher(launcher):
    """End this process when torchrun is gone: a killed torchrun leaves ranks behind that write to the run's folder."""
    while os.getppid() == launcher and not _is_init(launcher):
        time.sleep(0.5)
    os._exit(1)


def _is_init(pid):
    """Return whether a process is init, which adopts orphans; in a container, process 1 can be torchrun itself."""
    try:
        return pid == 1 and not pathlib.Path("/proc/1/comm").read_text().startswith(("python", "torchrun", "pt_"))
    except OSError:
        return False


def shutdown():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Return the global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until all ranks call this."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor):
    """Return the sum of a tensor over ranks, on every rank. The tensor is changed in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag):
    """Return, on every rank, whether `flag` is true on any. A CPU tensor is reduced, so no rank waits for its GPU."""
    if not dist.is_initialized():
        return flag
    holder = torch.tensor(int(flag))
    dist.all_reduce(holder, dist.ReduceOp.MAX)
    return bool(holder)


def broadcast(value):
    """Return rank 0's Python object on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather(value):
    """Return a list of every rank's Python object, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(function, *args):
    """Call `function(*args)` on rank 0, and return its result, or raise its ValueError, on every rank."""
    result, problem = None, None
    if rank() == 0:
        try:
            result = function(*args)
        except ValueError as error:
            problem = str(error)
    result, problem = broadcast((result, problem))
    if problem is not None:
        raise ValueError(problem)
    return result


def side_group():
    """Return a gloo process group of all ranks, for collectives of another thread; None without a process group."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None


def mesh(device, shard_size):
    """Return the mesh for `shard`: FSDP over groups of `shard_size` consecutive ranks, and replicas of groups (HSDP).

    Args:
        shard_size: None: one group of all ranks.

    Raises:
        ValueError: the ranks do not divide into groups of this size.
    """
    shard_size = shard_size or world_size()
    if world_size() % shard_size:
        raise ValueError(f"--fsdp-shard-size {shard_size} does not divide the {world_size()} ranks")
    replicas = world_size() // shard_size
    if replicas == 1:
        return init_device_mesh(device.type, (shard_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, shard_size), mesh_dim_names=("replica", "shard"))


def shard(model, mesh, dtype=torch.float32):
    """Shard a module over ranks by FSDP2, in place. The weights of a block are gathered while it computes.

    Args:
        model: on any device, meta included. Modules in its `blocks`, if it has them, are gathered one by one.
        mesh: from `mesh`.
        dtype: of the gathered weights of blocks; the shards and the reduced gradients are float32.
    """
    # FSDP2 warns of an output that is a view, lest it is changed in place; the model's is, and nothing changes it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    # The root's own weights, embeddings and final layer, stay float32, like the tensors between blocks under autocast.
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    high = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*getattr(model, "blocks", ()), model):
        # FSDP2 leaves the root gathered by default; an EMA that stayed gathered would be used stale.
        fully_shard(module, mesh=mesh, mp_policy=high if module is model else low, reshard_after_forward=True)
    if hasattr(model, "forward_with_cfg"):
        register_fsdp_forward_method(model, "forward_with_cfg")


def replicate(model, device):
    """Wrap a model in DDP; return it as it is with one rank, or where nothing in it is trained."""
    if world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, bucket_cap_mb=DDP_BUCKET_MIB
    )


@contextlib.contextmanager
def accumulate(modules, is_last):
    """Context of a micro-batch's forward and backward: replicas reduce gradients with the last micro-batch alone.

    Shards reduce them with each micro-batch: a rank has no room for whole gradients.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(is_last)
            elif isinstance(module, DistributedDataParallel) and not is_last:
                stack.enter_context(module.no_sync())
        yield


def local(tensors):
    """Return this rank's part of each tensor, as a list: the local shard of a DTensor, any other tensor itself."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def total_norm(gradients):
    """Return the 2-norm of all gradients together, over all shards: a plain tensor () on every rank."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def like_parameter(value, parameter):
    """Return a tensor () that is equal on all ranks, replicated over the mesh of `parameter` if that is sharded."""
    if not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


class LateReader:
    """Copies numbers from a GPU to the host one step late, so that the host never waits for the step just launched.

    On a CPU the numbers are read at once.
    """

    def __init__(self, device):
        self.late = device.type == "cuda"
        self.pending = []

    def push(self, step, values):
        """Begin to copy the tensor `values` of a step. Return [(step, numbers)] of the steps pushed before."""
        if not self.late:
            return [(step, values.tolist())]
        earlier = self.flush()
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((step, copy, event))
        return earlier

    def flush(self):
        """Wait for all copies that have begun, and return [(step, numbers)]."""
        pending, self.pending = self.pending, []
        for _, _, event in pending:
            event.synchronize()
        return [(step, copy.tolist()) for step, copy, _ in pending]


def seed_from(*key):
    """Return a 63-bit seed from non-negative integers; neighbouring keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(device, *key):
    """Return a `torch.Generator` on `device`, seeded from `key`."""
    return torch.Generator(device).manual_seed(seed_from(*key))
