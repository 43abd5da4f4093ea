"""Ranks, devices and sharding. Every function works without a process group, too, so no script asks if there is one."""

import contextlib
import ctypes
import datetime
import os
import pathlib
import threading
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

# Streams of random numbers, so that epoch n and step n, with the same seed, draw different ones.
ORDER_STREAM, STEP_STREAM, ROUTE_STREAM = range(3)
# How long a rank waits for one that hangs (one that dies is noticed at once) or writes 50,000 images into one file.
TIMEOUT = datetime.timedelta(minutes=30)
# DDP cuts a compiled model where a bucket is full. A block of SiT-XL is 91 MiB, which PyTorch's 25 would cut in four.
DDP_BUCKET_MIB = 256
# Parameters of glibc's mallopt: freed memory at the heap's end that goes back to the system, smallest block that is
# mapped by itself, most of such blocks. Their usual values are those that glibc comes to after blocks of some MiB.
MALLOC = {"trim_threshold": (-1, 64 << 20), "mmap_threshold": (-3, 32 << 20), "mmap_max": (-4, 1 << 16)}


def init():
    """Join torchrun's process group, if there is one. Return the device: with GPUs, the one of this LOCAL_RANK."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    use_cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if use_cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK is {local_rank}, and this process sees {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps one store over its restarts; a prefix hides the addresses of ranks that died.
        launch = [os.environ.get(f"TORCHELASTIC_{key}", "") for key in ("RUN_ID", "RESTART_COUNT")]
        store = dist.PrefixStore("-".join(launch), store)
        where = dict(store=store, rank=rank, world_size=world_size, device_id=device if use_cuda else None)
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=TIMEOUT, **where)
    return device


def keep_freed_memory(kept=True):
    """Keep the memory of freed tensors for the next ones; not `kept`: give it back to the system, as by default.

    Memory from the system is filled with zeros page by page, which took an eighth of a training step on a CPU. Where
    the C library is not glibc, nothing is done."""
    library, values = ctypes.CDLL(None), {name: usual for name, (_, usual) in MALLOC.items()}
    with contextlib.suppress(AttributeError):
        for name, value in (values | ({"trim_threshold": -1, "mmap_max": 0} if kept else {})).items():
            library.mallopt(MALLOC[name][0], value)
        if not kept:
            library.malloc_trim(0)


def _end_with_launcher(launcher):
    """End this process when torchrun is gone: a killed torchrun leaves ranks behind that write to the run's folder."""
    gone = False
    if launcher == 1:  # torchrun itself in a container, else init, which adopts orphans
        with contextlib.suppress(OSError):
            gone = not pathlib.Path("/proc/1/comm").read_text().startswith(("python", "torchrun", "pt_"))
    while os.getppid() == launcher and not gone:
        time.sleep(0.5)
    os._exit(1)


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


def any_rank(*flags):
    """Return, on every rank, whether a flag is true on any; of several, a list.

    A CPU tensor is reduced, so no rank waits for its GPU."""
    found = [count > 0 for count in all_reduce(torch.tensor([int(flag) for flag in flags])).tolist()]
    return found if len(found) > 1 else found[0]


def broadcast(value):
    """Return rank 0's Python object on every rank."""
    holder = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather(value):
    """Return a list of every rank's Python object, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
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


def mesh(device, shard_size):
    """Return the mesh for `shard`: FSDP over groups of `shard_size` consecutive ranks (None: all), and replicas."""
    shard_size = shard_size or world_size()
    if world_size() % shard_size:
        raise ValueError(f"--fsdp-shard-size {shard_size} does not divide the {world_size()} ranks")
    replicas = world_size() // shard_size
    shape = {"shard": shard_size} if replicas == 1 else {"replica": replicas, "shard": shard_size}
    return dist.init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))


def shard(model, mesh, dtype=torch.float32):
    """Shard a module, which may be on the meta device, over the ranks of `mesh` by FSDP2, in place.

    Each module in its `blocks`, if it has them, is gathered while it computes, in `dtype`; all else is float32."""
    # FSDP2 warns of an output that is a view, lest it is changed in place; the model's is, and nothing changes it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for module in (*getattr(model, "blocks", ()), model):
        # The other weights, of embeddings and the final layer, stay float32, like the tensors between blocks.
        param_dtype = torch.float32 if module is model else dtype
        policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # FSDP2 leaves the root gathered by default; an EMA that stayed gathered would be used stale.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if hasattr(model, "forward_with_cfg"):
        register_fsdp_forward_method(model, "forward_with_cfg")


def replicate(model, device):
    """Wrap a model in DDP; return it as it is with one rank, or where nothing in it is trained."""
    if world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, bucket_cap_mb=DDP_BUCKET_MIB)


@contextlib.contextmanager
def accumulate(modules, is_last):
    """Context of a micro-batch's forward and backward: replicas reduce gradients with the last micro-batch alone.

    Shards reduce them with each micro-batch: a rank has no room for whole gradients."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(is_last)
        elif isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = is_last  # as `no_sync` does
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
    """Copies numbers from a GPU to the host one step late, so that the host does not wait; from a CPU at once."""

    def __init__(self, device):
        self.late, self.pending = device.type == "cuda", []

    def push(self, step, values):
        """Begin to copy the tensor `values` of a step. Return [(step, numbers)] of the steps pushed before."""
        if not self.late:
            return [(step, values.tolist())]
        earlier = self.flush()
        copy = values.to("cpu", non_blocking=True)  # pinned
        self.pending.append((step, copy, torch.cuda.current_stream().record_event()))
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
