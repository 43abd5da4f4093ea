"""The cost of training as tokens, parameters and ranks grow: python benchmarks/growth.py

Tokens and parameters: operations, counted, and the measured time of a step on this device. Ranks: the time of a step of
one process and of several on this machine, each with its own batch and one thread (weak scaling), and the bytes that a
rank hands to collective operations in a step, counted as they are called. From those bytes follows, on paper, the
traffic of up to 64 GPUs.
"""

import multiprocessing
import os
import socket

import measuring
import torch
import torch.distributed as dist
from steps import start_trainer, training_step
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from models import SiT_models
from training import costs
from utils import command_line, distributed
from utils.precision import resolve_precision

ON_PAPER = (8, 16, 64)  # ranks
IMAGE_SIZES = (256, 512, 1024)
PARTS = ("tokens", "parameters", "ranks")


def attention_flops(model_config):
    """Return the operations of one image's forward pass that are quadratic in the tokens: two products per block."""
    tokens = measuring.num_tokens(model_config)
    return 2 * 2 * tokens**2 * model_config["hidden_size"] * model_config["depth"]


def growth_line(name, image_size, batch_size, rounds, device, precision):
    """Return a table's line: counted operations of one image, the share of attention in them, and a measured step."""
    config = measuring.model_config(name, image_size)
    flops, step = costs.training_flops(config), training_step(start_trainer(config, device, precision), batch_size)
    step()  # warms up
    seconds = measuring.medians_in_turn({name: step}, rounds, 1, device)[name]
    return [
        name,
        image_size,
        measuring.num_tokens(config),
        f"{costs.num_parameters(config) / 1e6:.1f}",
        f"{flops / 1e9:.1f}",
        f"{3 * attention_flops(config) / flops:.1%}",
        f"{seconds / batch_size * 1e3:.0f}",
        f"{flops * batch_size / seconds / 1e9:.0f}",
    ]


class TrafficCounter(TorchDispatchMode):
    """Adds up, in `bytes`, the bytes of each collective operation: of the larger of its input and its output."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            size = max((tensor.nbytes for tensor in tensors), default=0)
            operation = function.overloadpacket.__name__.strip("_")
            self.bytes[operation] = self.bytes.get(operation, 0) + size
        return function(*args, **(kwargs or {}))


def _count_gradients(state, bucket):
    """Add up the bytes of the gradients, and reduce them to their mean as DDP does: a communication hook of DDP."""
    state["allreduce"] = state.get("allreduce", 0) + bucket.buffer().nbytes
    buffer = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])


def _rank_of_weak_scaling(rank, world_size, port, parallel, name, batch_size, rounds, results):
    """Put (rank, median seconds of a step, {operation: bytes}) of one process into the queue `results`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    device = distributed.init()
    torch.manual_seed(0)
    trainer, traffic = start_trainer(measuring.model_config(name, 256), device, "fp32", parallel), {}
    if isinstance(trainer.wrapped, DistributedDataParallel):
        trainer.wrapped.register_comm_hook(traffic, _count_gradients)  # dispatch does not see DDP's own calls
    step = training_step(trainer, batch_size)
    step()  # warms up, and DDP makes its buckets
    traffic.clear()
    with TrafficCounter() as counter:
        step()
    traffic = dict(traffic or counter.bytes)  # a copy: of this step alone
    results.put((rank, measuring.medians_in_turn({name: step}, rounds, 1, device)[name], traffic))
    distributed.shutdown()


def weak_scaling(world_size, parallel, name, batch_size, rounds):
    """Return (seconds of a step, {operation: bytes}) of rank 0 of so many processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = world_size, port, parallel, name, batch_size, rounds, results
    processes = [context.Process(target=_rank_of_weak_scaling, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    of_ranks = sorted(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return of_ranks[0][1:]


def print_growth(cases, batch_size, rounds, device, precision):
    """Print a table with a line for each case, (name of a model, image size)."""
    columns = ["model", "image size", "tokens", "parameters, M", "GFLOPs per image in training", "of which attention"]
    columns += ["ms per image", "GFLOP/s"]
    lines = (growth_line(*case, batch_size, rounds, device, precision) for case in cases)
    measuring.print_table(columns, lines)
    print()


def print_weak_scaling(name, ranks, batch_size, rounds):
    """Print a table of DDP and FSDP2. Return {parallel: bytes that a rank hands to collectives in a step}."""
    alone, _ = weak_scaling(1, "one process", name, batch_size, rounds)
    lines, volumes = [["one process", 1, f"{alone * 1e3:.0f}", "100%", None, None]], {}
    for parallel in ("ddp", "fsdp"):
        seconds, traffic = weak_scaling(ranks, parallel, name, batch_size, rounds)
        volumes[parallel] = sum(traffic.values())
        large = {operation: size for operation, size in sorted(traffic.items()) if size > 1e4}
        operations = ", ".join(f"{operation} {measuring.gib(size):.3f}" for operation, size in large.items())
        cells = f"{seconds * 1e3:.0f}", f"{alone / seconds:.0%}", f"{measuring.gib(volumes[parallel]):.3f}"
        lines.append([parallel, ranks, *cells, operations])
    print(f"{name}, fp32, one thread and {batch_size} images per rank, gloo on this machine's CPU")
    columns = ["parallel", "ranks", "ms per step", "efficiency", "GiB handed to collectives", "by operation, GiB"]
    measuring.print_table(columns, lines)
    return volumes


def print_traffic_on_paper(name, volumes):
    """Print what a rank of SiT-XL/2 would send, from the bytes that `name` handed to collectives."""
    small, large = (costs.num_parameters(measuring.model_config(model, 256)) for model in (name, "SiT-XL/2"))
    # A ring of N ranks sends (N - 1) / N of each byte: twice in an all-reduce, once in a gather or a scatter.
    ddp, fsdp = 2 * volumes["ddp"] * large / small, volumes["fsdp"] * large / small
    lines = []
    for ranks in ON_PAPER:
        sent = [volume * (ranks - 1) / ranks for volume in (ddp, fsdp)]
        lines.append(
            [ranks, *(f"{measuring.gib(size):.3f}" for size in sent), *(f"{size * 8 / 1e9:.0f}" for size in sent)]
        )
    print("\non paper, for SiT-XL/2 by the bytes per parameter counted above: GiB that a rank sends in a step")
    columns = ["ranks", "ddp", "fsdp (fp32)", "ddp: Gbit/s to do it in a second", "fsdp"]
    measuring.print_table(columns, lines)


def build_parser():
    parser = command_line.Parser("The cost of training as tokens, parameters and ranks grow.")
    add, at_least_one = command_line.flag_group(parser, "measurement"), command_line.integer(1)
    parts = f"what grows: {', '.join(PARTS)} (default: all)"
    add("--parts", command_line.one_of(*PARTS), "PART", parts, nargs="+")
    add("--batch-size", at_least_one, "N", "images per step (default: 32 on a GPU, 1 on a CPU)")
    add("--rounds", at_least_one, "N", "steps, whose median is printed", default=3)
    add("--ranks-model", command_line.one_of(*SiT_models), "NAME", "model of the part ranks", default="SiT-S/2")
    add("--ranks", command_line.integer(2), "N", "processes of the part ranks", default=2)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        device = distributed.init()
    batch_size, parts = args.batch_size or (32 if device.type == "cuda" else 1), args.parts or PARTS
    precision = resolve_precision(None, device, on_gpu="bf16")
    print(f"{precision}, steps of {batch_size} images; {measuring.machine(device)}\n")
    cases = {
        "tokens": [("SiT-S/2", size) for size in IMAGE_SIZES],
        "parameters": [(name, 256) for name in SiT_models if name.endswith("/2")],
    }
    for part in cases:
        if part in parts:
            print_growth(cases[part], batch_size, args.rounds, device, precision)
    if "ranks" in parts:
        volumes = print_weak_scaling(args.ranks_model, args.ranks, batch_size, args.rounds)
        print_traffic_on_paper(args.ranks_model, volumes)


if __name__ == "__main__":
    main()
