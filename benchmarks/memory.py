"""Peak memory of training: python benchmarks/memory.py

First the estimates of `train.py --dry-run` beside peaks measured on this device, each in its own process, on a GPU both
in one: of all tensors, and of what is taken from the system, which includes what the allocator wastes and libraries
use. Then, by the estimate, the largest batch that fits GPUs of several sizes.
"""

import contextlib
import itertools
import multiprocessing

import measuring
import torch
from steps import start_trainer, training_step

from models import SiT_models
from training import costs
from utils import command_line, distributed
from utils.precision import resolve_precision

GPU_GIB = (24, 40, 80, 141)
USABLE = 0.92  # of a GPU; the rest is for CUDA, the workspace of kernels, and what the allocator wastes
LARGEST = 4096
SETTINGS = (("fp32", False), ("bf16", False), ("bf16", True))  # precision and gradient checkpointing
METERS = {"tensors": measuring.PeakOfTensors, "taken": measuring.PeakOfProcess}


def measured(names, model_config, batch_size, precision, grad_checkpoint):
    """Return {name: peak memory of `train` in bytes} by some of METERS, together."""
    device = distributed.init()
    resolve_precision(precision, device, on_gpu="bf16")
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # makes libraries allocate their memory
    with contextlib.ExitStack() as stack:
        peaks = {name: stack.enter_context(METERS[name](device)) for name in names}
        train(device, model_config, batch_size, precision, grad_checkpoint)
    return {name: peak.bytes for name, peak in peaks.items()}


def train(device, model_config, batch_size, precision, grad_checkpoint):
    """Make three training steps on one batch."""
    trainer = start_trainer(model_config, device, precision, grad_checkpoint=grad_checkpoint)
    step = training_step(trainer, batch_size)
    for _ in range(3):
        step()


def estimate(model_config, batch_size, precision, grad_checkpoint, device):
    """Return the estimate of --dry-run in bytes."""
    parts = costs.training_memory(model_config, batch_size, precision, grad_checkpoint, shards=1, device=device)
    return sum(parts.values())


def measure(model_config, batch_size, precision, grad_checkpoint, device):
    """Return a dict of the setting, its estimate and its measured peaks, in bytes."""
    setting = dict(batch_size=batch_size, precision=precision, grad_checkpoint=grad_checkpoint)
    peaks = {}
    # On a CPU the profiler that counts tensors takes memory of the process.
    for names in [tuple(METERS)] if device.type == "cuda" else [(name,) for name in METERS]:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks |= pool.apply(measured, (names, model_config), setting)
    return setting | {"estimate": estimate(model_config, **setting, device=device)} | peaks


def print_measured(rows):
    """Print a table of the results of `measure`, with the ratio of each peak to the estimate."""
    lines = []
    for row in rows:
        cells = (f"{measuring.gib(row[key]):.2f} ({row[key] / row['estimate']:.2f})" for key in ("tensors", "taken"))
        setting = row["model"], row["batch_size"], row["precision"], "yes" if row["grad_checkpoint"] else "no"
        lines.append([*setting, f"{measuring.gib(row['estimate']):.2f}", *cells])
    columns = ["model", "batch", "precision", "--grad-checkpoint", "estimate, GiB", "tensors (ratio)", "taken (ratio)"]
    measuring.print_table(columns, lines)


def fixed_and_per_image(model_config, grad_checkpoint):
    """Return the two terms of the estimate in bf16 on a GPU, which is linear in the batch size: bytes."""
    gpu = torch.device("cuda")
    one, two = (estimate(model_config, size, "bf16", grad_checkpoint, gpu) for size in (1, 2))
    return 2 * one - two, two - one


def largest_batch(fixed, per_image, gib):
    """Return, as text, the largest batch whose estimate fits a GPU of so many GiB; 0 if none does."""
    batch = int((USABLE * gib * 2**30 - fixed) // per_image)
    return f"{LARGEST}+" if batch >= LARGEST else f"{max(0, batch)}"


def print_largest_batches(image_size):
    """Print a table of the largest batches by GPU and model."""
    print(f"\nLargest batch of a GPU by the estimate, not measured: bf16, {USABLE:.0%} of the memory used;")
    print("in brackets with --grad-checkpoint; + for that number or more\n")
    configs = {name: measuring.model_config(name, image_size) for name in SiT_models if name.endswith("/2")}
    terms = [[fixed_and_per_image(config, again) for again in (False, True)] for config in configs.values()]
    lines = []
    for gib in GPU_GIB:
        cells = ([largest_batch(*pair, gib) for pair in pairs] for pairs in terms)
        lines.append([f"{gib} GB", *(f"{plain} ({again})" for plain, again in cells)])
    measuring.print_table(["GPU", *configs], lines)


def build_parser():
    parser = command_line.Parser("Peak memory of training: estimates, measured peaks, and the batches that fit GPUs.")
    add = command_line.flag_group(parser, "measurement")
    models = "models to measure (default: SiT-S/2; on a GPU SiT-XL/2, too)"
    add("--models", command_line.one_of(*SiT_models), "NAME", models, nargs="+")
    add("--batch-sizes", command_line.integer(1), "N", "batches to measure", nargs="+", default=[4, 16])
    add("--image-size", command_line.integer(16), "PIXELS", "latents are an eighth of it", default=256)
    measuring.add_json_flag(add)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        measuring.check_json(args.json)
        measuring.check_image_size(args.image_size)
        device = distributed.init()
        models = args.models or (["SiT-S/2", "SiT-XL/2"] if device.type == "cuda" else ["SiT-S/2"])
        for name in {*models, "SiT-S/2"}:  # fails where the size does not fit the patches, also of the last table
            costs.num_parameters(measuring.model_config(name, args.image_size))
    print(f"images of {args.image_size}; {measuring.machine(device)}\n")
    rows = []
    for name, size, (precision, again) in itertools.product(models, args.batch_sizes, SETTINGS):
        config = measuring.model_config(name, args.image_size)
        rows.append({"model": name, **measure(config, size, precision, again, device)})
    print_measured(rows)
    print_largest_batches(args.image_size)
    measuring.write_json(args.json, {"image_size": args.image_size}, rows, device)


if __name__ == "__main__":
    main()
