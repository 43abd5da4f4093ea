"""What training costs as tokens, parameters and ranks grow: python benchmarks/growth.py

Tokens and parameters: operations counted from the model, and the time of a step on this device beside them. Ranks: the
time of a step of one and of more processes on this machine, each with its own batch and one thread (weak scaling), and
the bytes that a rank hands to collective operations in a step, counted as they are called. From those bytes follows, on
paper, what 64 GPUs exchange.
"""

import multiprocessing
import os
import pathlib
import socket
import sys

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import measuring  # noqa: E402

from models import SiT, SiT_models  # noqa: E402
from training import costs
from training import step
from utils import command_line
from utils import distributed
from utils import precision

ON_PAPER = (8, 16, 64)  # ranks
IMAGE_SIZES = (256, 512, 1024)


def config_of(name, image_size):
    return dict(SiT_models[name].keywords, input_size=image_size // 8, in_channels=4, num_classes=1000)


def attention_flops(model_config):
    """Operations of one image's forward pass that grow with the square of the tokens: two products in each block."""
    tokens = (model_config["input_size"] // model_config["patch_size"]) ** 2
    return 2 * 2 * tokens**2 * model_config["hidden_size"] * model_config["depth"]


def training_step(model, batch_size, device, precision):
    """A function that makes a training step on random latents, with the optimizer and the average of train.py."""
    plain = getattr(model, "module", model)
    precision.choose_attention(plain, device, precision)
    x = torch.randn(batch_size, plain.in_channels, plain.input_size, plain.input_size, device=device)
    t, y = torch.rand(batch_size, device=device), torch.zeros(batch_size, dtype=torch.long, device=device)
    optimizer = step.build_optimizer(model, 1e-4, (0.9, 0.999), 0.0)
    weights = distributed.local(plain.parameters())
    ema = [p.detach().clone() for p in weights]

    def step():
        with precision.autocast(device, precision):
            output = model(x, t, y)
        loss = output.float().square().mean()
        loss.backward()
        step.step_optimizer(optimizer, loss.detach(), 1e-4)
        step.update_ema(ema, weights, 0.9999)

    return step


def seconds_of_step(name, image_size, batch_size, rounds, device, precision):
    step = training_step(SiT(**config_of(name, image_size)).to(device).train(), batch_size, device, precision)
    step()
    return measuring.median(measuring.seconds_in_turn({name: step}, rounds, 1, device)[name])


def growth_line(name, image_size, args, device, precision):
    """Cells of a row: operations of one image, the share of attention, and a measured step of one batch."""
    config = config_of(name, image_size)
    flops = costs.training_flops(config)
    seconds = seconds_of_step(name, image_size, args.batch_size, args.rounds, device, precision)
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    share = 3 * attention_flops(config) / flops
    figures = [f"{flops / 1e9:.1f}", f"{share:.1%}", f"{seconds / args.batch_size * 1e3:.0f}"]
    rate = flops * args.batch_size / seconds / 1e9
    return [name, image_size, tokens, f"{costs.num_parameters(config) / 1e6:.1f}", *figures, f"{rate:.0f}"]


class TrafficCounter(TorchDispatchMode):
    """Sums the bytes of the tensors handed to collective operations: what each gathers to, scatters, or sums."""

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
    """A communication hook of DDP: sums the bytes of the gradients, and takes their average as DDP does."""
    state["allreduce"] = state.get("allreduce", 0) + bucket.buffer().nbytes
    buffer = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])


def rank_of_weak_scaling(rank, world_size, port, parallel, name, batch_size, rounds, results):
    """One process: median seconds of its step, and the bytes of its collectives."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    device = distributed.init()
    torch.manual_seed(0)
    model = SiT(**config_of(name, 256)).train()
    traffic = {}
    if parallel == "fsdp":
        distributed.shard(model, distributed.mesh(device, None))
    elif world_size > 1:
        model = distributed.replicate(model, device)
        model.register_comm_hook(traffic, _count_gradients)
    step = training_step(model, batch_size, device, "fp32")
    step()  # warms up, and DDP makes its buckets
    traffic.clear()
    with TrafficCounter() as counter:
        step()
    traffic = dict(traffic or counter.bytes)  # of this one step
    seconds = measuring.seconds_in_turn({name: step}, rounds, 1, device)[name]
    results.put((rank, measuring.median(seconds), traffic))
    distributed.shutdown()


def weak_scaling(world_size, parallel, name, batch_size, rounds):
    """(seconds of a step, {operation: bytes}) of rank 0 of so many processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (world_size, port, parallel, name, batch_size, rounds, results)
    processes = [context.Process(target=rank_of_weak_scaling, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    of_ranks = sorted(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return of_ranks[0][1:]


def gib(size):
    return f"{size / 2**30:.3f}"


def build_parser():
    parser = command_line.Parser(description="What training costs as tokens, parameters and ranks grow.")
    add = command_line.flag_group(parser, "measurement")
    add("--parts", command_line.one_of("tokens", "parameters", "ranks"), "PART", "what to let grow", nargs="+")
    add("--batch-size", command_line.integer(1), "N", "images per step (default: 32 on a GPU, 1 on a CPU)")
    add("--rounds", command_line.integer(1), "N", "steps, of which the median is taken", default=3)
    add("--ranks-model", command_line.one_of(*SiT_models), "NAME", "model of the part ranks", default="SiT-S/2")
    add("--ranks", command_line.integer(2), "N", "processes of the part ranks", default=2)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        device = distributed.init()
    args.batch_size = args.batch_size or (32 if device.type == "cuda" else 1)
    parts = args.parts or ["tokens", "parameters", "ranks"]
    precision = precision.resolve_precision(None, device, on_gpu="bf16")
    print(f"{precision}, steps of {args.batch_size} images; {measuring.where(device)}\n")
    columns = ["model", "image size", "tokens", "parameters, M", "GFLOPs per image in training", "of which attention"]
    columns += ["ms per image", "GFLOP/s"]
    if "tokens" in parts:
        measuring.print_table(columns, (growth_line("SiT-S/2", size, args, device, precision) for size in IMAGE_SIZES))
        print()
    if "parameters" in parts:
        names = [name for name in SiT_models if name.endswith("/2")]
        measuring.print_table(columns, (growth_line(name, 256, args, device, precision) for name in names))
        print()
    if "ranks" not in parts:
        return
    name, how = args.ranks_model, (args.ranks_model, args.batch_size, args.rounds)
    alone, _ = weak_scaling(1, "one process", *how)
    lines, volumes = [["one process", 1, f"{alone * 1e3:.0f}", "100%", None, None]], {}
    for parallel in ("ddp", "fsdp"):
        seconds, traffic = weak_scaling(args.ranks, parallel, *how)
        volumes[parallel] = sum(size for size in traffic.values())
        operations = ", ".join(f"{operation} {gib(size)}" for operation, size in sorted(traffic.items()) if size > 1e4)
        efficiency = f"{alone / seconds:.0%}"
        lines.append([parallel, args.ranks, f"{seconds * 1e3:.0f}", efficiency, gib(volumes[parallel]), operations])
    print(f"{name}, fp32, one thread and {args.batch_size} images per rank, gloo on this machine's CPU")
    columns = ["parallel", "ranks", "ms per step", "efficiency", "GiB handed to collectives", "by operation, GiB"]
    measuring.print_table(columns, lines)

    # All-reduce moves each byte twice (N - 1) / N times over a rank's link, gathering and scattering once.
    bytes_per_parameter = {key: size / costs.num_parameters(config_of(name, 256)) for key, size in volumes.items()}
    big = costs.num_parameters(config_of("SiT-XL/2", 256))
    print("\non paper, for SiT-XL/2 by the bytes per parameter counted above: GiB that a rank sends in a step")
    paper = []
    for ranks in ON_PAPER:
        share = (ranks - 1) / ranks
        sent = [bytes_per_parameter["ddp"] * big * 2 * share, bytes_per_parameter["fsdp"] * big * share]
        paper.append([ranks, *map(gib, sent), *(f"{size * 8 / 1e9:.0f}" for size in sent)])
    columns = ["ranks", "ddp", "fsdp (fp32)", "ddp: Gbit/s to do it in a second", "fsdp"]
    measuring.print_table(columns, paper)


if __name__ == "__main__":
    main()
