"""Communication and memory of training on many GPUs, computed, not measured: python benchmarks/cluster.py

It simulates a training step of rank 0 of 8 to 64, by `ranks.py`, and counts what the rank sends and what it keeps in
memory. Times follow from these bytes, the operations and the stated speeds of links and GPUs. Under torchrun, as
`torchrun --nproc_per_node=4 benchmarks/cluster.py --model SiT-S/2 --global-batch-size 16 --gpus-per-node 2`, it
compares the simulation with real steps of these ranks.
"""

import collections
import dataclasses
import itertools
import warnings

import measuring
import torch
import torch.distributed as dist
from ranks import ALL_GATHER, ALL_REDUCE, KINDS, REDUCE_SCATTER, STATES, Setting, count_step, simulate

from models import SiT, SiT_models
from training import costs
from utils import command_line, distributed

GPU = torch.device("cuda")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Speeds that times are computed from, in bytes, operations and seconds; each node has `node_size` GPUs."""

    node_size: int
    link: float  # bytes per second that a GPU sends to others of its node
    network: float  # and to other nodes
    hop: float  # latency of a step of a ring in a node in seconds
    network_hop: float
    flops: float  # of a GPU per second, in training without communication

    def nodes(self, collective):
        return len({rank // self.node_size for rank in collective.ranks})

    def seconds(self, collective):
        """Return the time of a collective as a ring of its ranks, as NCCL's model has it (src/graph/tuning.cc)."""
        n, nodes = len(collective.ranks), self.nodes(collective)
        # Rings run side by side, and each leaves a node by the link of another GPU.
        speed = self.link if nodes == 1 else min(self.link, self.network * n / nodes)
        hops = (n - nodes) * self.hop + (nodes - 1) * self.network_hop
        return sent(collective) / speed + hops * (2 if collective.kind == ALL_REDUCE else 1)

    def step(self, collectives, flops):
        """Return ({phase: seconds} of computing, the same of communication, those of a step with overlap).

        `flops` are a rank's operations, a third of them in the forward pass. All communication overlaps its pass but
        the first all-gather of the forward pass, the last reduction of the backward pass, and that of the update. What
        stays in a node runs beside what leaves it."""
        computing = {"forward": flops / self.flops / 3, "backward": flops / self.flops * 2 / 3, "update": 0}
        communication, total = {}, 0
        for phase in computing:
            started = [collective for collective in collectives if collective.phase == phase]
            sums = [sum(self.seconds(c) for c in started if (self.nodes(c) > 1) == leaves) for leaves in (False, True)]
            alone = self.seconds(started[0 if phase == "forward" else -1]) if started else 0
            communication[phase] = max(sums)
            total += alone + max(computing[phase], communication[phase] - alone)
        return computing, communication, total


def sent(collective):
    """Return the bytes that each rank of a ring sends: all parts of the tensor but one, for an all-reduce twice."""
    n = len(collective.ranks)
    return (2 if collective.kind == ALL_REDUCE else 1) * (n - 1) / n * collective.size


def closed_form(config, setting):
    """Return {kind: bytes that each rank sends in a step}, without padding and norms, by the number of parameters.

    Gradients are float32. FSDP gathers the blocks in bf16 and all else in float32, for each of the two passes."""
    with torch.device("meta"):
        model = SiT(**config)
    blocks, everything = (sum(p.numel() for p in module.parameters()) for module in (model.blocks, model))
    gradients = 4 * (everything - model.pos_embed.numel())
    others, replicas = 1 - 1 / setting.shard_size, setting.gpus // setting.shard_size
    return {
        ALL_REDUCE: 2 * (1 - 1 / replicas) * gradients / setting.shard_size,
        ALL_GATHER: 2 * others * (2 * blocks + 4 * (everything - blocks)),
        REDUCE_SCATTER: others * gradients,
    }


def all_settings(gpus, global_batch_size, node_size):
    """Return the `Setting`s of a number of GPUs; HSDP where there are several nodes. Raise ValueError if none fit."""
    if gpus < 2 or gpus > node_size and gpus % node_size:
        raise ValueError(f"{gpus} GPUs are neither 2 to {node_size}, as --gpus-per-node says, nor a multiple of it")
    if global_batch_size % gpus:
        raise ValueError(f"--global-batch-size {global_batch_size} does not divide by {gpus} GPUs")
    modes = {"DDP": 1, "FSDP2": gpus} | ({"HSDP": node_size} if gpus > node_size else {})
    pairs = itertools.product(modes.items(), (False, True))
    return [Setting(mode, gpus, shards, global_batch_size // gpus, again) for (mode, shards), again in pairs]


def summary(counts):
    """Return counts with {'phase kind of ranks': [number, bytes sent]} in place of a list of collectives."""
    groups = collections.defaultdict(lambda: [0, 0])
    for collective in counts["collectives"]:
        group = groups[f"{collective.phase} {collective.kind} of {len(collective.ranks)}"]
        group[:] = group[0] + 1, group[1] + sent(collective)
    return counts | {"collectives": groups}


def compare(config, settings, device):
    """Return, on rank 0, [setting with counts 'real', in this process group, and 'simulated']; then leave the group."""
    rows = [{**setting._asdict(), "real": summary(count_step(config, setting, device, device))} for setting in settings]
    is_first = distributed.rank() == 0
    distributed.shutdown()
    for row, setting in zip(rows, settings, strict=True):
        row["simulated"] = summary(simulate(config, setting, device)) if is_first else None
    return rows if is_first else []


def print_comparison(rows):
    """Print a table of the results of `compare`."""
    lines = []
    for row in rows:
        real, simulated = row["real"], row["simulated"]
        equal = (all(real[key] == simulated[key] for key in keys) for keys in (["collectives"], STATES))
        pairs = (("activations", "activations"), ("growth", "growth"), ("growth", "allocated"))
        ratios = (f"{simulated[key] / real[other]:.3f}" for key, other in pairs)
        how = row["mode"], "yes" if row["grad_checkpoint"] else "no"
        lines.append([*how, *("equal" if same else "DIFFERENT" for same in equal), *ratios])
    columns = ["", "--grad-checkpoint", "collectives", "bytes of states", "activations", "growth of the peak"]
    print("Simulated beside real: equal, or simulated / real\n")
    measuring.print_table([*columns, "growth of the allocator's peak"], lines)


def print_memory(rows, config):
    """Print a table of a rank's memory, with that of gradient checkpointing in brackets."""
    lines = []
    for (setting, counts), (_, again) in zip(rows[::2], rows[1::2], strict=True):
        sizes = [[counts[key]] for key in STATES] + [[counts[key], again[key]] for key in ("activations", "peak")]
        how = setting.batch_size, "bf16"
        sizes.append([costs.training_memory(config, *how, ckpt, setting.shard_size, GPU) for ckpt in (False, True)])
        sizes[-1] = [sum(parts.values()) for parts in sizes[-1]]
        texts = [[f"{measuring.gib(size):.2f}" for size in pair] for pair in sizes]
        lines.append([setting.gpus, setting.mode, setting.batch_size, *(" / ".join(pair) for pair in texts)])
    print("GiB on rank 0, bf16, by simulation; behind the / with --grad-checkpoint\n")
    columns = ["GPUs", "", "images per GPU", *STATES, "activations", "peak", "estimate of --dry-run"]
    measuring.print_table(columns, lines)


def print_communication(rows, config, cluster):
    """Print a table of what a rank sends in a step, and how long that takes beside the computing."""
    lines, flops_per_image = [], costs.training_flops(config)
    for setting, counts in rows[::2]:
        collectives, flops = counts["collectives"], flops_per_image * setting.batch_size
        amounts = [sum(sent(c) for c in collectives if c.kind == kind) for kind in KINDS]
        ratio = sum(closed_form(config, setting).values()) / sum(amounts)
        computing, communication, total = cluster.step(collectives, flops)
        halved = [c._replace(size=c.size / (1 if c.kind == ALL_GATHER else 2)) for c in collectives]
        compute, totals = sum(computing.values()), (total, sum(communication.values()), cluster.step(halved, flops)[2])
        totals = (totals[0], compute + totals[1], totals[2])
        passes = (
            f"{1e3 * times['forward']:.1f} + {1e3 * times['backward']:.1f}" for times in (computing, communication)
        )
        lines.append([setting.gpus, setting.mode, setting.batch_size, len(collectives)])
        lines[-1] += [*(f"{amount / 1e9:.2f}" for amount in amounts), f"{ratio:.4f}", *passes]
        lines[-1] += [f"{compute / seconds:.0%}" for seconds in totals]
    print(
        "\nSent by a rank in a step, by simulation; times, forward + backward, computed, not measured: each GPU sends"
    )
    print(f"{cluster.link / 1e9:g} GB/s in its node and {cluster.network / 1e9:g} to others, ring steps take", end=" ")
    hops = f"{1e6 * cluster.hop:g} and {1e6 * cluster.network_hop:g} microseconds"
    print(f"{hops}, and it computes at {cluster.flops / 1e12:g} TFLOP/s\n")
    columns = ["GPUs", "", "images per GPU", "collectives", *(f"{kind}, GB" for kind in KINDS), "closed form / counted"]
    columns += ["computing, ms", "communication, ms", "efficiency", "without overlap", "bf16 gradients"]
    measuring.print_table(columns, lines)


def build_parser():
    parser = command_line.Parser("Communication and memory of training on many GPUs, computed, not measured.")
    add = command_line.flag_group(parser, "training")
    integer, positive = command_line.integer(1), command_line.number(0, exclude_minimum=True)
    add("--model", command_line.one_of(*SiT_models), "NAME", "the model", default="SiT-XL/2")
    add("--depth", integer, "N", "number of blocks (default: the model's)")
    add("--image-size", command_line.integer(16), "PIXELS", "latents are an eighth of it", default=256)
    add("--gpus", integer, "N", "numbers of GPUs; under torchrun its ranks", nargs="+", default=[8, 16, 32, 64])
    add("--global-batch-size", integer, "N", "images per step", nargs="+", default=[256])
    add = command_line.flag_group(parser, "cluster", "The defaults are those of H100 nodes.")
    add("--gpus-per-node", integer, "N", "GPUs of a node, and ranks that share a model in HSDP", default=8)
    add("--link", positive, "GB/S", "from a GPU to those of its node, each way", default=450)
    add("--network", positive, "GB/S", "from a GPU to other nodes, each way", default=50)
    hops = "latency of a step of a ring in a node and between nodes (default: NCCL's for its protocol LL128)"
    add("--hops", command_line.number(0), "MICROSECONDS", hops, nargs=2, default=[1.9, 4.0])
    add("--teraflops", positive, "N", "peak of a GPU in bf16", default=989)
    add("--mfu", command_line.number(0, closed=1, exclude_minimum=True), "R", "share of it that is used", default=0.4)
    measuring.add_json_flag(add)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        measuring.check_json(args.json)
        measuring.check_image_size(args.image_size)
        config = measuring.model_config(args.model, args.image_size)
        config |= {} if args.depth is None else {"depth": args.depth}
        costs.num_parameters(config)  # fails where sizes do not fit
        device = distributed.init()
        is_real = dist.is_initialized()
        pairs = itertools.product([distributed.world_size()] if is_real else args.gpus, args.global_batch_size)
        settings = [setting for pair in pairs for setting in all_settings(*pair, args.gpus_per_node)]
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    if is_real:
        rows = compare(config, settings, device)
        if rows:
            print_comparison(rows)
    else:
        rows = [(setting, simulate(config, setting, GPU)) for setting in settings]
        hops = (microseconds / 1e6 for microseconds in args.hops)
        speeds = 1e9 * args.link, 1e9 * args.network, *hops, 1e12 * args.teraflops * args.mfu
        print_memory(rows, config)
        print_communication(rows, config, Cluster(args.gpus_per_node, *speeds))
        rows = [{**setting._asdict(), **summary(counts)} for setting, counts in rows]
    if rows:
        measuring.write_json(args.json, command_line.plain(args), rows, device)


if __name__ == "__main__":
    main()
