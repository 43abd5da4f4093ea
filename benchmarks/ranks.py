"""A training step of one rank of many, real or simulated: the collectives that it starts, and its memory.

The simulation runs the same code on tensors without data in a process group without peers.
"""

import collections
import contextlib
import functools
import weakref
from unittest import mock

import measuring
import torch
import torch.distributed as dist
from steps import DECAY, LR, training_step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import SiT
from training.step import EMA, Trainer
from transport import create_transport
from utils import checkpoint, distributed
from utils.precision import choose_attention

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = KINDS = ("all-reduce", "all-gather", "reduce-scatter")
# Operators: the kind, and which argument is the whole tensor, or a list of them.
COLLECTIVES = {
    "c10d::allreduce_": (ALL_REDUCE, 0),
    "_c10d_functional::all_reduce": (ALL_REDUCE, 0),
    "c10d::_allgather_base_": (ALL_GATHER, 0),
    "c10d::_reduce_scatter_base_": (REDUCE_SCATTER, 1),
}
STATES = ("weights", "gradients", "optimizer", "EMA")

# shard_size: ranks that share a model under FSDP; 1 for DDP.
Setting = collections.namedtuple("Setting", "mode gpus shard_size batch_size grad_checkpoint")
# phase: 'forward', 'backward' or 'update'; ranks: those that take part; size: bytes of the whole tensor.
Collective = collections.namedtuple("Collective", "phase kind ranks size")


class Ledger(TorchDispatchMode):
    """Context that records the collectives of a step, and the bytes of live tensors, real or without data.

    Attributes, from `start_step` on:
        collectives: list of `Collective`s in the order of their start.
        before, activations, peak: bytes that live before the step, what its forward pass adds, and the peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.phase = {}, 0, None
        self.resize = mock.patch.object(torch.UntypedStorage, "resize_", self._resizing(torch.UntypedStorage.resize_))

    def __enter__(self):
        self.resize.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.resize.stop()
        return super().__exit__(*exception)

    def start_step(self):
        self.phase, self.collectives, self.activations = "forward", [], None
        self.before = self.peak = self.live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it calls operators of local tensors, which come here
        if self.phase is not None:
            in_backward = torch._C._current_graph_task_id() >= 0
            if self.phase == "forward" and in_backward:
                self.phase, self.activations = "backward", self.live - self.before
            elif self.phase == "backward" and not in_backward:
                self.phase = "update"
            self._record(function, args)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    weakref.finalize(storage, self._forget, storage._cdata)
                    self._set_size(storage)
        return result

    def _record(self, function, arguments):
        name = function._schema.name
        if name in COLLECTIVES:
            kind, position = COLLECTIVES[name]
            size = sum(tensor.nbytes for tensor in tree_leaves(arguments[position]))
            group = CollectiveOp.get_process_group(function, arguments)
            self.collectives.append(Collective(self.phase, kind, tuple(dist.get_process_group_ranks(group)), size))
        elif function in collective_ops - sync_ops:
            raise RuntimeError(f"the bytes of {name} are not known")

    def _resizing(self, resize):
        def resize_and_count(storage, size):
            resize(storage, size)
            if storage._cdata in self.sizes:
                self._set_size(storage)
            return storage

        return resize_and_count

    def _set_size(self, storage):
        self.live += storage.nbytes() - self.sizes.get(storage._cdata, 0)
        self.sizes[storage._cdata] = storage.nbytes()
        if self.phase is not None:
            self.peak = max(self.peak, self.live)

    def _forget(self, address):
        self.live -= self.sizes.pop(address)


@contextlib.contextmanager
def without_data():
    """Context in which trainers are built and make steps on tensors that have no data."""
    ddp, replace = nn.parallel.distributed, mock.patch.object
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(replace(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        # What would move, load or compare data.
        stack.enter_context(replace(nn.Module, "to_empty", lambda module, device: module))
        stack.enter_context(replace(checkpoint, "place", lambda *arguments: None))
        stack.enter_context(replace(ddp, "_verify_param_shape_across_processes", lambda *arguments: None))
        stack.enter_context(replace(ddp, "_sync_module_states", lambda **arguments: None))
        # DDP starts with one bucket, and cuts it after a step, in an order that it agrees on with its peers.
        assign = functools.partial(assign_to_buckets, dist._compute_bucket_assignment_by_size)
        stack.enter_context(replace(dist, "_compute_bucket_assignment_by_size", assign))
        stack.enter_context(replace(dist.Reducer, "_rebuild_buckets", lambda reducer: False))
        yield


def assign_to_buckets(assign, parameters, limits, is_sparse):
    """Return DDP's buckets of gradients and their limits after the first step, by the function that it calls.

    The order in which gradients are ready is taken to be that of the parameters, reversed."""
    limit = distributed.DDP_BUCKET_MIB * 2**20
    buckets, limits = assign(parameters[::-1], [limit], is_sparse)
    return [[len(parameters) - 1 - index for index in bucket] for bucket in reversed(buckets)], limits[::-1]


def reduce_bucket(group, bucket):
    """Do what DDP does with a full bucket of gradients: it cannot read the result of a group without peers."""
    buffer = bucket.buffer().div_(distributed.world_size())
    dist.all_reduce(buffer)
    future = torch.futures.Future()
    future.set_result(buffer)
    return future


def tensor_bytes(tensors):
    """Return the bytes of this rank's part of tensors."""
    return sum(tensor.nbytes for tensor in distributed.local(tensors))


def count_step(config, setting, device, attention_device):
    """Make training steps of SiT(**config) in bf16, without data in a group without peers. Return a dict of counts.

    It has what `Ledger` records of the last but one step as 'collectives', 'activations', 'growth' (of the peak) and
    'peak'; as 'allocated' the last step's growth by the allocator; and the bytes of this rank's part of each of STATES.
    `attention_device` decides the kernel of attention."""
    is_simulated, gradients = dist.get_backend() == "fake", []
    mesh, parallel = None, "ddp"
    if setting.shard_size > 1:
        mesh, parallel = distributed.mesh(device, setting.shard_size), "fsdp"
    with without_data() if is_simulated else contextlib.nullcontext(), Ledger() as ledger:
        how = [EMA("ema", DECAY)], [], parallel, mesh, dict(lr=LR)
        trainer = Trainer(SiT(**config), create_transport(), device, "bf16", *how)
        weights = None if is_simulated else SiT(**config).state_dict()
        trainer.start(weights, grad_checkpoint=setting.grad_checkpoint)
        del weights
        choose_attention(trainer.model, attention_device, "bf16")
        if is_simulated and mesh is None:
            trainer.wrapped.register_comm_hook(None, reduce_bucket)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer.register_step_pre_hook(lambda *_: gradients.append(tensor_bytes(p.grad for p in trained)))
        step = training_step(trainer, setting.batch_size)
        for _ in range(1 if is_simulated else 2):  # DDP cuts its buckets at the start of the second
            step()
        ledger.start_step()
        step()
        counts = {"collectives": ledger.collectives, "activations": ledger.activations, "peak": ledger.peak}
        counts |= {"growth": ledger.peak - ledger.before, "gradients": gradients[-1]}
        states = tree_leaves(list(trainer.optimizer.state.values()))
        for name, tensors in (("weights", trainer.parameters), ("optimizer", states), ("EMA", *trainer.ema_parameters)):
            counts[name] = tensor_bytes(tensors)
    if not is_simulated:
        before = measuring.memory_of_tensors(device)
        with measuring.PeakOfTensors(device) as measured:
            step()
        counts["allocated"] = measured.bytes - before
    return counts


def simulate(config, setting, attention_device):
    """Return the counts of `count_step` for rank 0, by simulation."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setting.gpus)
    try:
        return count_step(config, setting, torch.device("cpu"), attention_device)
    finally:
        distributed.shutdown()
