"""Images per second of training, from the official recipe to this project's: python benchmarks/train_speed.py

Every row does the same mathematics on the same batches from the same weights. The first is the official recipe in this
project's words: float32 weights, TF32 products on a GPU, AdamW as PyTorch makes it by default, an average that a Python
loop moves parameter by parameter, and the loss read in every step; batches and randomness come to it as to the others.
Those after it add what train.py does, one by one.

First each row trains a few steps, and its losses are held against the first row's. Then all rows are measured in turn,
round by round, each after a step to warm up; the figures are medians over rounds. All rows have one batch size; one for
which a row's memory is too small leaves the others (by the estimate, of SiT-XL/2 on 80 GB 64 fits all, and 128 those
in bf16). Batches are cached latents that lie in memory: what reading them costs, benchmarks/data_speed.py says.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import measuring  # noqa: E402

from models import SiT_models  # noqa: E402
from transport import create_transport  # noqa: E402
from training import costs
from training import log
from training import step
from utils import command_line
from utils import distributed
from utils import files
from utils import precision
import vae

PARTS = ("data", "forward", "backward", "optimizer", "average", "loss read")
LR, DECAY, DROPOUT = 1e-4, 0.9999, 0.1


@dataclasses.dataclass
class Row:
    """One setting. `fused`: fused AdamW, an average moved by one operation, and the loss read one step late."""

    name: str
    fused: bool = True
    precision: str = "fp32"
    compiled: str | None = None  # None, 'blocks' or 'model'
    grad_checkpoint: bool = False


def rows_for(device):
    """The rows that are measured on a device."""
    plain = "tf32" if device.type == "cuda" else "fp32"
    return [
        Row(f"official recipe, {plain}", fused=False, precision=plain),
        Row(f"{plain}, fused AdamW and average, loss read late", precision=plain),
        Row("... and bf16", precision="bf16"),
        Row("... and compiled blocks", precision="bf16", compiled="blocks"),
        Row("... and a compiled model (train.py --precision bf16 --compile)", precision="bf16", compiled="model"),
        Row("... and --grad-checkpoint", precision="bf16", compiled="model", grad_checkpoint=True),
    ]


class Trainer:
    """A model, its average and an optimizer of each kind, which the rows share: copies for each would not fit a GPU.

    One optimizer at a time has a state: `use` drops the other's.

    Args:
        model: a new SiT.
        batch_size: images per step.
    """

    def __init__(self, model, batch_size, device):
        self.device, self.batch_size = device, batch_size
        self.model = model.to(device).train()
        self.initial = [p.detach().cpu().clone() for p in model.parameters()]
        self.ema = [p.detach().clone() for p in model.parameters()]
        self.transport = create_transport()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = {
            False: torch.optim.AdamW(trained, lr=LR, weight_decay=0.0),
            True: step.build_optimizer(model, LR, (0.9, 0.999), 0.0),
        }
        self.space = vae.CachedSpace("none", device, torch.float32, 0.18215, 0.0)
        self.shape = (model.in_channels, model.input_size, model.input_size)
        self.forwards = {None: model.forward_embedded}
        precision.compile_training(model, "one process")
        self.forwards["model"] = model.forward_embedded
        self.eager_blocks = [block.forward for block in model.blocks]
        precision.compile_training(model, "fsdp")
        self.compiled_blocks = [block.forward for block in model.blocks]
        self.window, self.reader = log.LossWindow(device), distributed.LateReader(device)
        self.clock = measuring.Clock(device)

    def reset(self):
        """The initial weights, no optimizer state, and the first batch next."""
        with torch.no_grad():
            for p, average, initial in zip(self.model.parameters(), self.ema, self.initial, strict=True):
                p.copy_(initial)
                average.copy_(initial)
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        self.steps = 0
        self.batches = step.batches_on_device(self._loader(), self.space, self.device)

    def _loader(self):
        """Moments and labels as `data.make_loader` gives them for cached latents: eight batches, again and again."""
        g = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(8):
            moments = torch.randn(self.batch_size, 2, *self.shape, generator=g)
            moments[:, 1] = 0.1 * moments[:, 1].abs()
            labels = torch.randint(0, self.model.num_classes, (self.batch_size,), generator=g)
            moments /= self.space.scale
            if self.device.type == "cuda":
                moments, labels = moments.pin_memory(), labels.pin_memory()
            batches.append((moments, labels, []))
        yield from itertools.cycle(batches)

    def use(self, row):
        """Compute as a row says from here on."""
        precision.resolve_precision(row.precision, self.device, on_gpu="tf32")
        self.model.grad_checkpoint = row.grad_checkpoint
        if row.fused:
            precision.choose_attention(self.model, self.device, row.precision)
        else:
            for block in self.model.blocks:
                block.attn.fused_attn = True  # as timm has it
        blocks = self.compiled_blocks if row.compiled == "blocks" else self.eager_blocks
        for block, forward in zip(self.model.blocks, blocks, strict=True):
            block.forward = forward
        self.model.forward_embedded = self.forwards["model" if row.compiled == "model" else None]
        self.optimizers[not row.fused].state.clear()

    def step(self, row):
        """One step; the loss as a number for the official recipe, a tensor () otherwise."""
        mark = self.clock.mark
        mark(None)
        content, y, _ = next(self.batches)
        uniform, drop, x0, noise = step.draw_randomness(
            0, self.steps, self.batch_size, slice(None), self.shape, self.device
        )
        t, x1 = self.transport.times(uniform), self.space.draw(content, noise)
        mark("data")

        def network(x, t, **labels):
            with precision.autocast(self.device, row.precision):
                output = self.model(x, t, **labels)
            return output.float()

        kwargs = dict(y=y, force_drop_ids=drop < DROPOUT)
        losses = self.transport.training_losses(network, x1, kwargs, t=t, x0=x0)["loss"]
        loss = losses.mean()
        mark("forward")
        loss.backward()
        mark("backward")
        self.steps += 1
        return self._official_end(loss) if not row.fused else self._end(losses, t)

    def _official_end(self, loss):
        """Optimizer, average and log as the official script has them."""
        mark, optimizer = self.clock.mark, self.optimizers[False]
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")
        with torch.no_grad():
            for average, p in zip(self.ema, self.model.parameters(), strict=True):
                average.mul_(DECAY).add_(p, alpha=1 - DECAY)
        mark("average")
        loss = loss.item()
        mark("loss read")
        return loss

    def _end(self, losses, t):
        """Optimizer, average and log as train.py has them."""
        mark = self.clock.mark
        record = self.window.record(losses, t)
        loss = self.window.loss(record)
        norm, bad = step.step_optimizer(self.optimizers[True], loss, LR)
        mark("optimizer")
        step.update_ema(self.ema, list(self.model.parameters()), DECAY)
        mark("average")
        self.window.add(record, bad)
        self.reader.push(self.steps, torch.stack([loss, norm.to(loss)]))
        mark("loss read")
        return loss


class WaitCounter(TorchDispatchMode):
    """Counts the operations for which the host waits on a GPU: values are read, or shapes that depend on values."""

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
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


def host_waits(trainer, row):
    """How often a step of a row makes the host wait for the device; on a GPU "some" or "none", as CUDA sees it.

    Not counted: the wait for numbers of the step before, which train.py reads while the device computes the next.
    """
    if trainer.device.type == "cuda":
        trainer.use(row)
        trainer.step(row)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(row)
        except RuntimeError:
            trainer.model.zero_grad()
            return "some"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return "none"
    # A compiled forward pass is no matter of the host's; the mode would only have it compiled anew.
    uncompiled = dataclasses.replace(row, compiled=None)
    trainer.use(uncompiled)
    with WaitCounter() as counter:
        trainer.step(uncompiled)
    return counter.count or "none"


def losses_of(trainer, row, steps):
    """Losses of the first steps from the initial weights; None: the device has too little memory."""
    trainer.reset()
    trainer.use(row)
    start = time.perf_counter()
    try:
        losses = [float(trainer.step(row)) for _ in range(steps)]
    except torch.OutOfMemoryError:
        trainer.model.zero_grad()
        losses = None
    if losses is None:
        torch.cuda.empty_cache()
        return None
    print(f"{row.name}: {time.perf_counter() - start:.0f} s for {steps} steps, the first compiling", file=sys.stderr)
    return losses


def measure(trainer, rows, rounds, steps):
    """{row name: dict of figures}, medians over rounds, in each of which every row makes `steps` steps in turn."""
    seconds = {row.name: [] for row in rows}
    parts = {row.name: {part: [] for part in PARTS} for row in rows}
    memory = {}
    for _ in range(rounds):
        for row in rows:
            trainer.use(row)
            trainer.step(row)
            trainer.clock.parts()
            measuring.reset_peak_memory(trainer.device)
            (total,) = measuring.seconds_in_turn(
                {row.name: lambda row=row: trainer.step(row)}, 1, steps, trainer.device
            )[row.name]
            seconds[row.name].append(total)
            for part, duration in trainer.clock.parts():
                parts[row.name][part].append(duration)
            memory[row.name] = max(memory.get(row.name, 0), measuring.peak_memory(trainer.device))
    return {
        row.name: {
            "seconds": measuring.median(seconds[row.name]),
            "slowest": max(seconds[row.name]),
            "fastest": min(seconds[row.name]),
            "parts": {part: measuring.median(values) for part, values in parts[row.name].items()},
            "memory": memory[row.name],
        }
        for row in rows
    }


def build_parser():
    parser = command_line.Parser(description="Images per second of training, from the official recipe to this project's.")
    add = command_line.flag_group(parser, "measurement")
    names = "SiT-XL/2 on a GPU, SiT-S/2 on a CPU"
    add("--model", command_line.one_of(*SiT_models), "NAME", f"one of {', '.join(SiT_models)} (default: {names})")
    add("--image-size", command_line.integer(16), "PIXELS", "latents are an eighth of it", default=256)
    add("--batch-size", command_line.integer(1), "N", "images per step (default: 64 on a GPU, 8 on a CPU)")
    add("--rounds", command_line.integer(1), "N", "rounds over all rows", default=5)
    add("--steps", command_line.integer(1), "N", "steps of a row in a round (default: 10 on a GPU, 2 on a CPU)")
    add("--check-steps", command_line.integer(1), "N", "steps whose losses are compared", default=20)
    add("--rows", command_line.integer(0), "N", "rows to measure, of 0 to 5; the first is always", nargs="+")
    add("--json", pathlib.Path, "FILE", "write the figures there, too")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        if args.json is not None:
            files.check_output("--json", args.json)
        device = distributed.init()
        on_gpu = device.type == "cuda"
        name = args.model or ("SiT-XL/2" if on_gpu else "SiT-S/2")
        rows = measuring.choose(rows_for(device), args.rows)
        if args.image_size % 8:
            raise ValueError(f"--image-size {args.image_size} is no multiple of 8")
        torch.manual_seed(0)
        model = SiT_models[name](input_size=args.image_size // 8, num_classes=1000)
    batch_size, steps = args.batch_size or (64 if on_gpu else 8), args.steps or (10 if on_gpu else 2)
    trainer = Trainer(model, batch_size, device)

    # That all rows compute the same, and compile on the way; then how fast.
    losses = {row.name: losses_of(trainer, row, args.check_steps) for row in rows}
    official = losses[rows[0].name]
    fitting = [row for row in rows if losses[row.name] is not None]
    waits = {row.name: host_waits(trainer, row) for row in fitting}
    figures = measure(trainer, fitting, args.rounds, steps)

    # Say it.
    config = dict(SiT_models[name].keywords, input_size=args.image_size // 8)
    flops = costs.training_flops(config)
    base = official and figures[rows[0].name]["seconds"]
    lines = [[row.name, "out of memory"] for row in rows if row not in fitting]
    for row in fitting:
        f = figures[row.name]
        rate = batch_size / f["seconds"]
        peak = costs.peak_flops(device, row.precision)
        difference = official and max(abs(a - b) / b for a, b in zip(losses[row.name], official, strict=True))
        f |= {"images_per_second": rate, "ratio": base and base / f["seconds"], "loss_difference": difference}
        f |= {"mfu": peak and rate * flops / peak, "host_waits": waits[row.name]}
        lines.append(
            [
                row.name,
                f"{rate:.2f}",
                base and f"{f['ratio']:.2f}",
                f"{f['seconds'] * 1e3:.0f} ({f['fastest'] * 1e3:.0f} to {f['slowest'] * 1e3:.0f})",
                *(f"{f['parts'][part] * 1e3:.1f}" for part in PARTS),
                f"{rate * flops / 1e12:.2f}",
                f["mfu"] and f"{f['mfu']:.1%}",
                f"{f['memory'] / 2**30:.2f}",
                f["host_waits"],
                official and f"{difference:.1e}",
            ]
        )
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    print(f"{name} at {args.image_size}, {tokens} tokens, batches of {batch_size}; {measuring.where(device)}")
    print(f"{flops / 1e9:.1f} GFLOPs per image (forward and backward, two for each multiply-add)\n")
    columns = ["row", "images/s", "ratio", "ms per step (range)", *(f"{part}, ms" for part in PARTS)]
    columns += ["TFLOP/s", "MFU", "peak GiB", "host waits", f"loss difference in {args.check_steps} steps"]
    measuring.print_table(columns, lines)
    if not on_gpu:
        print("\non a GPU: not measured")
    if args.json is not None:
        settings = {"model": name, "image_size": args.image_size, "batch_size": batch_size}
        args.json.write_text(json.dumps({**settings, "where": measuring.where(device), "rows": figures}, indent=2))


if __name__ == "__main__":
    main()
