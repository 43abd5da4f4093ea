"""Memory of training: python benchmarks/memory.py

First the estimates of `train.py --dry-run` beside measured peaks of this device, each in a process of its own: of all
tensors, and of what is taken from the system, with what the allocator wastes and libraries work in. Then the largest
batch of a GPU by the estimate, for sizes of GPUs and models.
"""

import json
import multiprocessing
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import measuring  # noqa: E402

from models import SiT, SiT_models  # noqa: E402
from training import costs
from training import step
from utils import command_line
from utils import distributed
from utils import files
from utils import precision

GPU_GIB = (24, 40, 80, 141)
USABLE = 0.92  # of a GPU: the rest is the CUDA context, the work space of kernels, what the allocator cannot use
LARGEST = 4096


def config_of(name, image_size):
    return dict(SiT_models[name].keywords, input_size=image_size // 8, in_channels=4, num_classes=1000)


def measured(of_tensors, model_config, batch_size, precision, grad_checkpoint):
    """Peak memory of three training steps in bytes: of all tensors, or what the process takes from the system."""
    device = distributed.init()
    precision.resolve_precision(precision, device, on_gpu="bf16")
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # libraries take their memory
    peak = (measuring.PeakOfTensors if of_tensors else measuring.PeakOfProcess)(device)
    with peak:
        train(device, model_config, batch_size, precision, grad_checkpoint)
    return peak.bytes


def train(device, model_config, batch_size, precision, grad_checkpoint):
    """Three steps on one batch, with the optimizer and the average of train.py."""
    model = SiT(**model_config).to(device).train()
    model.grad_checkpoint = grad_checkpoint
    precision.choose_attention(model, device, precision)
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = step.build_optimizer(model, 1e-4, (0.9, 0.999), 0.0)
    x = torch.randn(batch_size, model.in_channels, model.input_size, model.input_size, device=device)
    t, y = torch.rand(batch_size, device=device), torch.zeros(batch_size, dtype=torch.long, device=device)
    for _ in range(3):
        with precision.autocast(device, precision):
            output = model(x, t, y)
        loss = output.float().square().mean()
        loss.backward()
        step.step_optimizer(optimizer, loss.detach(), 1e-4)
        step.update_ema(ema, list(model.parameters()), 0.9999)


def estimate(model_config, batch_size, precision, grad_checkpoint, device):
    parts = costs.training_memory(model_config, batch_size, precision, grad_checkpoint, shards=1, device=device)
    return sum(parts.values())


def largest_batch(model_config, gib, grad_checkpoint):
    """The largest batch in bf16 whose estimate fits a GPU of so many GiB; 0: none does."""
    gpu = torch.device("cuda")
    one, two = (estimate(model_config, size, "bf16", grad_checkpoint, gpu) for size in (1, 2))  # linear in the batch
    room = USABLE * gib * 2**30 - (2 * one - two)
    return min(LARGEST, max(0, int(room // (two - one))))


def build_parser():
    parser = command_line.Parser(description="Memory of training: estimates beside measured peaks, and what fits GPUs.")
    add = command_line.flag_group(parser, "measurement")
    add("--models", command_line.one_of(*SiT_models), "NAME", "measured (default: SiT-S/2; XL/2, too, on a GPU)", nargs="+")
    add("--batch-sizes", command_line.integer(1), "N", "measured", nargs="+", default=[4, 16])
    add("--image-size", command_line.integer(16), "PIXELS", "latents are an eighth of it", default=256)
    add("--json", pathlib.Path, "FILE", "write the figures there, too")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        if args.json is not None:
            files.check_output("--json", args.json)
        if args.image_size % 8:
            raise ValueError(f"--image-size {args.image_size} is no multiple of 8")
        device = distributed.init()
        models = args.models or (["SiT-S/2", "SiT-XL/2"] if device.type == "cuda" else ["SiT-S/2"])
        for name in {*models, "SiT-S/2"}:  # that of the last table, too
            costs.num_parameters(config_of(name, args.image_size))  # is there such a model?
    print(f"images of {args.image_size}; {measuring.where(device)}\n")
    lines, figures = [], []
    cases = [
        (config_of(name, args.image_size), size, precision, grad_checkpoint)
        for name in models
        for size in args.batch_sizes
        for precision, grad_checkpoint in (("fp32", False), ("bf16", False), ("bf16", True))
    ]
    names = [name for name in models for _ in range(3 * len(args.batch_sizes))]
    for name, case in zip(names, cases, strict=True):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            tensors, taken = (pool.apply(measured, (of_tensors, *case)) for of_tensors in (True, False))
        guess = estimate(*case, device)
        _, size, precision, grad_checkpoint = case
        figures.append(dict(model=name, batch_size=size, precision=precision, grad_checkpoint=grad_checkpoint))
        figures[-1] |= dict(estimated=guess, tensors=tensors, taken=taken)
        again = "yes" if grad_checkpoint else "no"
        cells = [f"{tensors / 2**30:.2f} ({tensors / guess:.2f})", f"{taken / 2**30:.2f} ({taken / guess:.2f})"]
        lines.append([name, size, precision, again, f"{guess / 2**30:.2f}", *cells])
    columns = ["model", "batch", "precision", "--grad-checkpoint", "estimate, GiB", "tensors (ratio)", "taken (ratio)"]
    measuring.print_table(columns, lines)
    print(f"\nLargest batch of a GPU by the estimate, not measured: bf16, {USABLE:.0%} of the memory used;")
    print("in brackets with --grad-checkpoint; + for that number or more\n")

    def cell(config, gib):
        plain, again = (largest_batch(config, gib, grad_checkpoint) for grad_checkpoint in (False, True))
        return f"{plain} ({again}{'+' if again == LARGEST else ''})"

    sizes = {name: config_of(name, args.image_size) for name in SiT_models if name.endswith("/2")}
    fits = [[f"{gib} GB", *(cell(config, gib) for config in sizes.values())] for gib in GPU_GIB]
    measuring.print_table(["GPU", *sizes], fits)
    if args.json is not None:
        args.json.write_text(json.dumps({"where": measuring.where(device), "rows": figures}, indent=2))


if __name__ == "__main__":
    main()
