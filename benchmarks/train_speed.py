"""Throughput of training, from the official recipe to this project's: python benchmarks/train_speed.py

Every row computes the same on the same batches from the same weights. The first row is the official recipe in this
project's code: float32 weights, TF32 products on a GPU, AdamW with PyTorch's defaults, a Python loop that updates the
EMA parameter by parameter, and the loss read in every step. Its batches and random numbers are made as for the other
rows. Each following row adds something that train.py does.

First each row trains for a few steps, and its losses are compared with the first row's. Then all rows are measured in
turn, round by round, each after a warm-up step; the results are medians over rounds. All rows have the same batch size.
A row that does not fit into memory is left out (by the estimate, SiT-XL/2 on 80 GB fits batches of 64 in all rows, and
of 128 in bf16). With --route or --align-width each row is measured a second time, with token routing or aligned
features: the ratio is then that of its images/s to the row above, and its losses, which differ, are not compared.
Batches are cached latents in memory; benchmarks/data_speed.py measures how fast they are read.
"""

import dataclasses
import functools
import itertools
import sys
import time

import measuring
import torch
from steps import DECAY, DROPOUT, LR, start_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from models import SiT_models
from training import costs
from training.alignment import Alignment
from training.log import Metrics
from training.recipe import read_route
from training.resume import FiniteCheck
from training.step import EMA, batches_on_device, build_optimizer, draw_randomness
from utils import command_line, distributed, precision
from vae import LatentSpace

FEATURES = 768  # of a patch: those of DINOv2-B, which REPA aligns with
PARTS = ("data", "forward", "backward", "optimizer", "EMA", "loss read")


@dataclasses.dataclass
class Row:
    """One way to train.

    Attributes:
        official: default AdamW, EMA parameter by parameter, loss read in every step; else as train.py does it.
        compiled: None, 'blocks' or 'model'.
        route: None, or (FROM, TO, share) as `Trainer` takes it.
        aligned: whether hidden states are aligned with features.
    """

    name: str
    official: bool = False
    precision: str = "fp32"
    compiled: str | None = None
    grad_checkpoint: bool = False
    route: tuple | None = None
    aligned: bool = False

    @property
    def is_option(self):
        """Whether it is compared with the row above, without the option."""
        return self.aligned or self.route is not None


def rows_for(device):
    """Return the rows that are measured on a device."""
    plain = "tf32" if device.type == "cuda" else "fp32"
    return [
        Row(f"official recipe, {plain}", official=True, precision=plain),
        Row(f"{plain}, fused AdamW and EMA, loss read late", precision=plain),
        Row("... and bf16", precision="bf16"),
        Row("... and compiled blocks", precision="bf16", compiled="blocks"),
        Row("... and a compiled model (train.py --precision bf16 --compile)", precision="bf16", compiled="model"),
        Row("... and --grad-checkpoint", precision="bf16", compiled="model", grad_checkpoint=True),
    ]


class TimedTransport:
    """A transport for `Trainer` that marks the end of the forward pass."""

    def __init__(self, transport, clock):
        self.transport, self.clock, self.times = transport, clock, transport.times

    def training_losses(self, *args, **kwargs):
        result = self.transport.training_losses(*args, **kwargs)
        self.clock.mark("forward")
        return result


class TimedEMA(EMA):
    """An EMA of constant decay that marks the end of the optimizer's step, which comes before its own."""

    def __init__(self, clock):
        super().__init__("ema", DECAY, warmup=False)
        self.clock = clock

    def decay_at(self, step):
        self.clock.mark("optimizer")
        return super().decay_at(step)


class Runner:
    """Makes training steps as rows say, with one `Trainer` for all: a copy for each row would not fit into a GPU.

    Only one of the two optimizers, the official recipe's and the trainer's, has a state at a time: `use` drops the
    other's.

    Args:
        model_config: arguments of SiT.
        batch_size: images per step.
        align_width: of the projector of rows that are aligned; None: there are none.
    """

    def __init__(self, model_config, batch_size, device, align_width=None):
        self.device, self.batch_size, self.clock = device, batch_size, measuring.Clock(device)
        self.trainer = start_trainer(model_config, device, "fp32")
        self.trainer.transport = TimedTransport(self.trainer.transport, self.clock)
        self.trainer.emas = [TimedEMA(self.clock)]
        self.model = model = self.trainer.model
        self.initial = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.alignment = align_width and Alignment(model, FEATURES, width=align_width).to(device)
        self.alignment_optimizer = align_width and build_optimizer(self.alignment, LR)
        self.official_optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        self.space = LatentSpace("ema", device, scale=0.18215, shift=0.0)  # its autoencoder is never loaded
        self.shape = model.latent_shape
        self.forwards = {None: model.forward_embedded}
        precision.compile_training(model, "one process")
        self.forwards["model"] = model.forward_embedded
        self.block_forwards = {None: [block.forward for block in model.blocks]}
        precision.compile_training(model, "fsdp")
        self.block_forwards["blocks"] = [block.forward for block in model.blocks]

    def reset(self):
        """Restore the initial weights, clear the optimizers, and start with the first batch."""
        self.trainer.start(self.initial)
        for optimizer in (self.official_optimizer, self.trainer.optimizer):
            optimizer.state.clear()
        self.steps = 0
        self.batches = batches_on_device(self._loader(), self.space, self.device)
        self.metrics, self.finite = Metrics(self.device), FiniteCheck(self.device, 10, 0, 0, print)

    def _loader(self):
        """Yield batches as `data.loader.make_loader` yields cached latents: eight, over and over."""
        g = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(8):
            moments = torch.randn(self.batch_size, 2, *self.shape, generator=g)
            moments[:, 1] = 0.1 * moments[:, 1].abs()
            y = torch.randint(0, self.model.num_classes, (self.batch_size,), generator=g)
            batch = {"moments": moments / self.space.scale, "y": y}
            if self.alignment:
                shape = (self.batch_size, self.model.pos_embed.shape[1], FEATURES)
                batch["features"] = torch.randn(shape, generator=g).half()
            if self.device.type == "cuda":
                batch = {key: value.pin_memory() for key, value in batch.items()}
            batches.append(batch | {"problems": []})
        yield from itertools.cycle(batches)

    def use(self, row):
        """Set the trainer to a row."""
        precision.resolve_precision(row.precision, self.device, on_gpu="tf32")
        if self.device.type == "cpu":
            distributed.keep_freed_memory(not row.official)
        self.trainer.precision, self.trainer.route = row.precision, row.route
        self.model.grad_checkpoint = row.grad_checkpoint
        self.trainer.losses = self.trainer.wrapped_losses = [self.alignment] if row.aligned else []
        self.trainer.loss_optimizers = {"alignment": self.alignment_optimizer} if row.aligned else {}
        precision.choose_attention(self.model, self.device, row.precision)
        forwards = self.block_forwards["blocks" if row.compiled == "blocks" else None]
        for block, forward in zip(self.model.blocks, forwards, strict=True):
            block.forward = forward
            block.attn.fused_attn |= row.official  # timm's default
        self.model.forward_embedded = self.forwards["model" if row.compiled == "model" else None]
        (self.trainer.optimizer if row.official else self.official_optimizer).state.clear()

    def step(self, row):
        """Make a step. Return its loss: a number for the official recipe, a tensor () otherwise."""
        trainer, mark = self.trainer, self.clock.mark
        mark(None)
        batch = next(self.batches)
        where = 0, self.steps, self.batch_size, slice(None)
        uniform, drop, x0, posterior_noise = draw_randomness(*where, self.shape, self.device)
        kept = trainer.draw_kept(*where)
        t, x1 = trainer.transport.times(uniform), self.space.sample(batch["moments"], posterior_noise)
        mark("data")
        losses, _ = trainer.forward_backward(batch, x1, t, x0, drop < DROPOUT, kept)
        mark("backward")
        self.steps += 1
        loss = self._official_update(losses) if row.official else self._update(losses, t)
        mark("loss read")
        return loss

    def _official_update(self, losses):
        """Step optimizer and EMA, and read the loss, as the official script does."""
        self.official_optimizer.step()
        self.official_optimizer.zero_grad()
        self.clock.mark("optimizer")
        ema = self.trainer.ema_modules["ema"]
        with torch.no_grad():
            for average, p in zip(ema.parameters(), self.model.parameters(), strict=True):
                average.mul_(DECAY).add_(p, alpha=1 - DECAY)
        self.clock.mark("EMA")
        return losses.mean().item()

    def _update(self, losses, t):
        """Step optimizer and EMA, and collect metrics, as train.py does."""
        self.metrics.mean("loss", losses)
        self.metrics.mean_by_time("loss_by_time", losses, t)
        loss = losses.double().mean()
        norm, bad = self.trainer.update(self.steps - 1, loss, LR)
        self.clock.mark("EMA")
        self.metrics.commit(bad)
        self.finite.push(self.steps, torch.stack([loss, norm.to(loss)]), wait=False)
        return loss


class WaitCounter(TorchDispatchMode):
    """Counts operations for which the host waits on a GPU.

    They read values, have a shape that depends on values, or make a tensor of Python numbers.
    """

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.lift_fresh.default,
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        self.count += masked or function in self.WAITING
        return function(*args, **(kwargs or {}))


def host_waits(runner, row):
    """Return how often a step of a row makes the host wait, or "none"; on a GPU "some" or "none", by CUDA's own check.

    Not counted is the wait for the numbers of the step before, which train.py reads while the GPU computes the next.
    """
    on_gpu = runner.device.type == "cuda"
    # On a CPU, compilation does not change what the host waits for, and the counter would cause another one.
    row = row if on_gpu else dataclasses.replace(row, compiled=None)
    runner.use(row)
    runner.step(row)  # creates the optimizer's state
    if not on_gpu:
        with WaitCounter() as counter:
            runner.step(row)
        return counter.count or "none"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.step(row)
    except RuntimeError:
        runner.model.zero_grad()
        return "some"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def losses_of(runner, row, steps):
    """Return the losses of the first steps from the initial weights; None if the device has too little memory."""
    runner.reset()
    runner.use(row)
    start = time.perf_counter()
    try:
        losses = [float(runner.step(row)) for _ in range(steps)]
    except torch.OutOfMemoryError:
        runner.model.zero_grad()
        losses = None
    if losses is None:  # outside the handler, where the exception keeps tensors alive
        torch.cuda.empty_cache()
        return None
    what = f"{steps} steps and compilation" if row.compiled else f"{steps} steps"
    print(f"{row.name}: {time.perf_counter() - start:.0f} s for {what}", file=sys.stderr)
    return losses


def measure(runner, rows, rounds, steps):
    """Return {row name: dict of results}, medians over rounds, in each of which every row makes `steps` steps."""
    seconds = {row.name: [] for row in rows}
    parts = {row.name: {part: [] for part in PARTS} for row in rows}
    memory = dict.fromkeys(seconds, 0)
    for _, row in itertools.product(range(rounds), rows):
        runner.use(row)
        runner.step(row)
        runner.clock.parts()
        measuring.reset_peak_memory(runner.device)
        step = {row.name: functools.partial(runner.step, row)}
        seconds[row.name] += measuring.seconds_in_turn(step, 1, steps, runner.device)[row.name]
        for part, duration in runner.clock.parts():
            parts[row.name][part].append(duration)
        memory[row.name] = max(memory[row.name], measuring.peak_memory(runner.device))
    return {
        name: {
            "images_per_second": runner.batch_size / measuring.median(values),
            "seconds_per_step": measuring.median(values),
            "fastest_and_slowest": [min(values), max(values)],
            "seconds_by_part": {part: measuring.median(durations) for part, durations in parts[name].items()},
            "peak_memory_bytes": memory[name],
        }
        for name, values in seconds.items()
    }


def add_comparisons(results, rows, losses, flops, device):
    """Add to the results of rows their throughput and losses relative to the first row's, FLOP/s and MFU.

    `flops` are those of an image of each row. A comparison is None if the first row does not fit into memory, and MFU
    if the device's peak is not known.
    """
    first = results.get(rows[0].name)
    for above, row in zip([rows[0], *rows], rows, strict=False):
        if row.name not in results:
            continue
        result, peak = results[row.name], costs.peak_flops(device, row.precision)
        rate, base = result["images_per_second"], results.get(above.name) if row.is_option else first
        compares = first and not row.is_option
        pairs = zip(losses[row.name], losses[rows[0].name], strict=True) if compares else None
        result |= {
            "ratio": base and rate / base["images_per_second"],
            "loss_difference": pairs and max(abs(a - b) / b for a, b in pairs),
            "flops_per_second": rate * flops[row.name],
            "mfu": peak and rate * flops[row.name] / peak,
        }


def print_results(rows, results, check_steps):
    """Print a table of the results, with a line for each row that did not fit into memory."""
    columns = ["row", "images/s", "ratio", "ms per step (range)", *(f"{part}, ms" for part in PARTS)]
    columns += ["TFLOP/s", "MFU", "peak memory, GiB", "host waits", f"loss difference in {check_steps} steps"]
    lines = [[row.name, "out of memory"] for row in rows if row.name not in results]
    for name, result in results.items():
        milliseconds = (x * 1e3 for x in (result["seconds_per_step"], *result["fastest_and_slowest"]))
        lines.append(
            [
                name,
                f"{result['images_per_second']:.2f}",
                measuring.cell(result["ratio"], "{:.2f}"),
                "{:.0f} ({:.0f} to {:.0f})".format(*milliseconds),
                *(f"{result['seconds_by_part'][part] * 1e3:.1f}" for part in PARTS),
                f"{result['flops_per_second'] / 1e12:.2f}",
                measuring.cell(result["mfu"], "{:.1%}"),
                f"{measuring.gib(result['peak_memory_bytes']):.2f}",
                result["host_waits"],
                measuring.cell(result["loss_difference"], "{:.1e}"),
            ]
        )
    measuring.print_table(columns, lines)


def build_parser():
    parser = command_line.Parser("Throughput of training, from the official recipe to this project's.")
    add = command_line.flag_group(parser, "measurement")
    at_least_one = command_line.integer(1)
    names = "SiT-XL/2 on a GPU, SiT-S/2 on a CPU"
    add("--model", command_line.one_of(*SiT_models), "NAME", f"one of {', '.join(SiT_models)} (default: {names})")
    add("--image-size", command_line.integer(16), "PIXELS", "latents are an eighth of it", default=256)
    add("--batch-size", at_least_one, "N", "images per step (default: 64 on a GPU, 8 on a CPU)")
    add("--rounds", at_least_one, "N", "rounds over all rows", default=5)
    add("--steps", at_least_one, "N", "steps of a row in a round (default: 10 on a GPU, 2 on a CPU)")
    add("--check-steps", at_least_one, "N", "steps whose losses are compared", default=20)
    add("--rows", command_line.integer(0), "N", "rows to measure, of 0 to 5; the first is always measured", nargs="+")
    route = "measure each row a second time, in which a share of the tokens skips blocks, as in train.py"
    add("--route", command_line.number(0), ("FROM", "TO", "SHARE"), route, nargs=3)
    align = "measure each row a second time, with cached features aligned by --align's MLP of this width"
    add("--align-width", at_least_one, "N", align)
    measuring.add_json_flag(add)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        measuring.check_json(args.json)
        measuring.check_image_size(args.image_size)
        device = distributed.init()
        on_gpu = device.type == "cuda"
        rows = measuring.choose(rows_for(device), args.rows)
        name = args.model or ("SiT-XL/2" if on_gpu else "SiT-S/2")
        config = measuring.model_config(name, args.image_size)
        route, aligned = read_route(args.route, config["depth"]), args.align_width is not None
        if option := ", routed" * (route is not None) + ", aligned" * aligned:
            how = dict(route=route, aligned=aligned)
            pairs = ((row, dataclasses.replace(row, name=f"{row.name}{option}", **how)) for row in rows)
            rows = list(itertools.chain(*pairs))
    batch_size, steps = args.batch_size or (64 if on_gpu else 8), args.steps or (10 if on_gpu else 2)
    torch.manual_seed(0)
    runner = Runner(config, batch_size, device, args.align_width)
    parts = {row.name: [runner.alignment] if row.aligned else [] for row in rows}
    flops = {row.name: costs.training_flops(config, row.route, parts[row.name]) for row in rows}

    # Check that all rows compute the same, which also compiles; then measure how fast they do.
    losses = {row.name: losses_of(runner, row, args.check_steps) for row in rows}
    fitting = [row for row in rows if losses[row.name] is not None]
    waits = {row.name: host_waits(runner, row) for row in fitting}
    results = measure(runner, fitting, args.rounds, steps)
    add_comparisons(results, rows, losses, flops, device)
    for row_name, count in waits.items():
        results[row_name]["host_waits"] = count

    tokens = measuring.num_tokens(config)
    print(f"{name} at {args.image_size}, {tokens} tokens, batches of {batch_size}; {measuring.machine(device)}")
    least, most = (f"{pick(flops.values()) / 1e9:.1f}" for pick in (min, max))
    both = f"{most}, routed {least}," if route else most if least == most else f"{least}, aligned {most},"
    print(f"{both} GFLOPs per image (forward and backward, two per multiply-add)\n")
    print_results(rows, results, args.check_steps)
    if not on_gpu:
        print("\non a GPU: not measured")
    settings = {"model": name, "image_size": args.image_size, "batch_size": batch_size}
    measuring.write_json(args.json, settings, results, device)


if __name__ == "__main__":
    main()
