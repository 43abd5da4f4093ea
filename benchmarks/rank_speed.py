"""Training on the ranks that torchrun starts: torchrun --nproc_per_node=8 benchmarks/rank_speed.py --parallel fsdp

First the losses of a few steps of SiT-S/2 in float32, on the same global batches and from the same weights whatever the
ranks: those of DDP and FSDP2 on any number of ranks agree to rounding with those of one process, which plain `python`
starts. Then the throughput of --model, bf16 on a GPU that has it, not compiled; each rank has its own batch (weak
scaling). FSDP2 runs on one rank, too, unlike in train.py.
"""

import measuring
import torch
from steps import DROPOUT, start_trainer, training_step

from models import SiT_models
from training import costs
from training.step import draw_randomness
from utils import command_line, distributed
from utils.precision import resolve_precision

CHECKED_BATCH, CHECKED_LR = 16, 1e-3  # of all ranks together


def checked_losses(trainer, steps):
    """Return the losses of the first steps, means over the global batch; all ranks call this together."""
    rank, share = distributed.rank(), CHECKED_BATCH // distributed.world_size()
    places, device, losses = slice(rank * share, (rank + 1) * share), trainer.device, []
    y = torch.arange(CHECKED_BATCH, device=device)[places]
    for step in range(steps):
        where = 0, step, CHECKED_BATCH, places
        uniform, drop, x0, x1 = draw_randomness(*where, trainer.model.latent_shape, device)
        values, _ = trainer.forward_backward({"y": y}, x1, trainer.transport.times(uniform), x0, drop < DROPOUT)
        loss = distributed.all_reduce(values.double().sum()) / CHECKED_BATCH
        trainer.update(step, loss, CHECKED_LR)
        losses.append(loss.item())
    return losses


def throughput(model_config, batch_size, rounds, device, precision, parallel):
    """Return a dict of the throughput of all ranks, and the peak memory of this one."""
    measuring.reset_peak_memory(device)
    step = training_step(start_trainer(model_config, device, precision, parallel), batch_size)
    for _ in range(2):
        step()  # warms up, and DDP makes its buckets
    seconds = measuring.medians_in_turn({"step": step}, rounds, 1, device)["step"]
    rate, peak = batch_size * distributed.world_size() / seconds, costs.peak_flops(device, precision)
    flops = rate * costs.training_flops(model_config)
    return {
        "precision": precision,
        "images_per_second": rate,
        "seconds_per_step": seconds,
        "mfu": peak and flops / (peak * distributed.world_size()),
        "peak_memory_bytes": measuring.peak_memory(device),
    }


def build_parser():
    parser = command_line.Parser("Losses and throughput of training on the ranks that torchrun starts.")
    add, at_least_one = command_line.flag_group(parser, "measurement"), command_line.integer(1)
    kinds = "one process", "ddp", "fsdp"
    add("--parallel", command_line.one_of(*kinds), "|".join(kinds), "how ranks share a model", default=kinds[0])
    names = "SiT-XL/2 on a GPU, SiT-S/2 on a CPU"
    add("--model", command_line.one_of(*SiT_models), "NAME", f"one of {', '.join(SiT_models)} (default: {names})")
    add("--image-size", command_line.integer(16), "PIXELS", "latents are an eighth of it", default=256)
    add("--batch-size", at_least_one, "N", "images per step of each rank (default: 32 on a GPU, 1 on a CPU)")
    add("--rounds", at_least_one, "N", "steps, whose median is printed", default=5)
    add("--check-steps", at_least_one, "N", "steps whose losses are printed", default=6)
    measuring.add_json_flag(add)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        measuring.check_json(args.json)
        measuring.check_image_size(args.image_size)
        device, ranks = distributed.init(), distributed.world_size()
        if (args.parallel == "one process") != (not torch.distributed.is_initialized()) or CHECKED_BATCH % ranks:
            raise ValueError(f"--parallel ddp and fsdp need torchrun, with 1, 2, 4, 8 or 16 ranks, not {ranks}")
    on_gpu = device.type == "cuda"
    name, batch_size = args.model or ("SiT-XL/2" if on_gpu else "SiT-S/2"), args.batch_size or (32 if on_gpu else 1)

    torch.manual_seed(0)
    resolve_precision("fp32", device, on_gpu="fp32")
    trainer = start_trainer(measuring.model_config("SiT-S/2", args.image_size), device, "fp32", args.parallel)
    result = {"ranks": ranks, "losses": checked_losses(trainer, args.check_steps)}
    del trainer
    precision = resolve_precision(None, device, on_gpu="bf16")
    how = args.rounds, device, precision, args.parallel
    result |= throughput(measuring.model_config(name, args.image_size), batch_size, *how)
    if distributed.rank() == 0:
        print(f"{name} at {args.image_size}, {precision}, batches of {batch_size} a rank; {measuring.machine(device)}")
        print(f"SiT-S/2, fp32, losses of the first steps: {', '.join(f'{loss:.6f}' for loss in result['losses'])}\n")
        rate, milliseconds = f"{result['images_per_second']:.2f}", f"{result['seconds_per_step'] * 1e3:.0f}"
        memory, mfu = measuring.gib(result["peak_memory_bytes"]), measuring.cell(result["mfu"], "{:.1%}")
        columns = ["parallel", "ranks", "images/s", "ms per step", "MFU", "peak memory of a rank, GiB"]
        measuring.print_table(columns, [[args.parallel, ranks, rate, milliseconds, mfu, f"{memory:.2f}"]])
        settings = {"model": name, "image_size": args.image_size, "batch_size": batch_size}
        measuring.write_json(args.json, settings, {args.parallel: result}, device)
    distributed.shutdown()


if __name__ == "__main__":
    main()
