"""Images per second of guided sampling, from the official recipe to this project's: python benchmarks/sample_speed.py

Every row draws the same latents from the same noise by the same solver. The first is the official recipe in this
project's words: float32 weights, TF32 products on a GPU, guidance on a doubled batch whose halves both go through the
solver, and all of its states kept; its SDE steps make one network call, as here, where the official code makes two. The
rows after it add what sample_ddp.py does, one by one; the last two guide in an interval of times, which is another
thing to compute, and are there for what it saves.

Weights are random, and not zero where training begins with zeros; with --ckpt they are those of a checkpoint. Rows are
measured in turn, round by round; the figures are medians over rounds. The difference to the first row is relative, in
the 2-norm over all latents. --agreement compares precisions for other solvers, too; --halves the two ways to compute
the halves of guidance, in one batch as here or one after the other.
"""

import copy
import dataclasses
import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import measuring  # noqa: E402

from models import SiT_models  # noqa: E402
from transport import Sampler, create_transport  # noqa: E402
from sampling import draw
from sampling import flags
from sampling import guidance
from sampling import pipeline
from training import costs
from utils import command_line
from utils import distributed
from utils import files
from utils import precision
import vae

INTERVAL = (0.3, 0.8)  # of t


@dataclasses.dataclass
class Row:
    """One setting."""

    name: str
    precision: str
    compiled: bool = False
    interval: tuple = guidance.WHOLE
    official: bool = False


def rows_for(device):
    """The rows that are measured on a device."""
    plain = "tf32" if device.type == "cuda" else "fp32"
    return [
        Row(f"official recipe, {plain}", plain, official=True),
        Row(f"sample_ddp.py, {plain}", plain),
        Row("... --precision bf16", "bf16"),
        Row("... --precision bf16 --compile", "bf16", compiled=True),
        Row(f"{plain}, --cfg-interval {INTERVAL[0]} {INTERVAL[1]}", plain, interval=INTERVAL),
        Row(f"bf16, compiled, --cfg-interval {INTERVAL[0]} {INTERVAL[1]}", "bf16", compiled=True, interval=INTERVAL),
    ]


class OfficialSampling:
    """The official script's way to draw guided latents, with the noise of this project's images.

    Args:
        how: mode, settings, cfg_scale and seed, as `draw.draw` takes them.
    """

    def __init__(self, pipeline, labels, how):
        self.pipeline, self.labels, self.how = pipeline, labels, how

    @torch.no_grad()
    def __call__(self):
        """Latents (N, C, h, w)."""
        pipeline, how = self.pipeline, self.how
        precision.resolve_precision(pipeline.precision, pipeline.device, on_gpu="tf32")
        model, device, count = pipeline.model, pipeline.device, len(self.labels)
        noise = draw.ImageNoise(how["seed"], range(count), device)
        x = noise.draw((model.in_channels, model.input_size, model.input_size))
        y = torch.tensor(self.labels, device=device)
        y = torch.cat([y, torch.full_like(y, model.num_classes)])

        def randn_like(x):
            half = noise.randn_like(x[:count])
            return torch.cat([half, half])

        def model_fn(x, t, y):
            return model.forward_with_cfg(x, t, y, how["cfg_scale"], pipeline.guided_channels)

        sampler = Sampler(pipeline.transport)
        if how["mode"] == "SDE":
            sample = sampler.sample_sde(**how["settings"], trajectory=True, randn_like=randn_like)
        else:
            sample = sampler.sample_ode(**how["settings"], trajectory=True)
        return sample(torch.cat([x, x]), model_fn, y=y)[-1][:count]


def random_pipeline(name, input_size, device):
    """A model with random weights, also where training begins with zeros, in a space without autoencoder."""
    torch.manual_seed(0)
    model = SiT_models[name](input_size=input_size, num_classes=1000)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(device).eval().requires_grad_(False)
    space = vae.PixelSpace(model.in_channels)
    return pipeline.Pipeline(model, create_transport(), space, device, guided_channels=3)


def drawing(pipeline, row, labels, how):
    """A function that draws latents as a row says, with weights of its own."""
    own = dataclasses.replace(pipeline, model=copy.deepcopy(pipeline.model))
    if row.official:
        return OfficialSampling(own, labels, how)
    pipeline.speed_up(own, row.precision, row.compiled)
    more = dict(cfg_interval=row.interval, batch_size=len(labels), show_progress=False)

    def draw():
        precision.resolve_precision(row.precision, pipeline.device, on_gpu="tf32")
        return draw.draw(own, labels, **how, **more)[0]

    return draw


def difference(a, b):
    """Relative difference of a to b in the 2-norm."""
    return float((a - b).norm() / b.norm())


def agreement(pipeline, labels, how, device):
    """Rows of a table: for each solver, how far bf16 and compilation are from this project's plain precision."""
    plain = rows_for(device)[1].precision
    solvers = {
        "SDE Euler": ("SDE", flags.SDE_DEFAULTS),
        "SDE Heun": ("SDE", flags.SDE_DEFAULTS | {"sampling_method": "Heun"}),
        "ODE euler": ("ODE", flags.ODE_DEFAULTS | {"sampling_method": "euler"}),
        "ODE heun2": ("ODE", flags.ODE_DEFAULTS | {"sampling_method": "heun2"}),
        "ODE dopri5": ("ODE", flags.ODE_DEFAULTS),
    }
    num_steps = how["settings"]["num_steps"]
    for solver, (mode, settings) in solvers.items():
        here = how | {"mode": mode, "settings": settings | {"num_steps": num_steps}}
        reference = drawing(pipeline, Row("plain", plain), labels, here)()
        cells = []
        for row in (Row("bf16", "bf16"), Row("compiled", plain, True), Row("both", "bf16", True)):
            drawn = drawing(pipeline, row, labels, here)()
            grey = [draw.decode(pipeline, x).int() for x in (drawn, reference)]
            off = (grey[0] - grey[1]).abs().float()
            cells.append(f"{difference(drawn, reference):.1e}; {off.mean():.2f}, {off.max():.0f}")
        yield [solver, *cells]


@torch.no_grad()
def halves(pipeline, batch_size, rounds):
    """Rows of a table: for some batch sizes, ms of a guided network call whose halves are one batch, and two."""
    model, device = pipeline.model, pipeline.device
    plain = rows_for(device)[1].precision
    for precision in (plain, "bf16"):
        own = dataclasses.replace(pipeline, model=copy.deepcopy(model))
        pipeline.speed_up(own, precision, False)
        for count in sorted({1, 4, batch_size}):
            x = torch.randn(2 * count, model.in_channels, model.input_size, model.input_size, device=device)
            t, y = torch.full((1,), 0.5, device=device), torch.zeros(2 * count, dtype=torch.long, device=device)

            def call(parts, own=own, precision=precision, x=x, t=t, y=y):
                precision.resolve_precision(precision, device, on_gpu="tf32")
                with precision.autocast(device, precision):
                    for some, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
                        own.model(some, t, labels)

            ways = {"one": lambda call=call: call(1), "two": lambda call=call: call(2)}
            measuring.seconds_in_turn(ways, 1, 1, device)  # warms up
            one, two = (measuring.median(s) for s in measuring.seconds_in_turn(ways, rounds, 5, device).values())
            yield [precision, count, f"{one * 1e3:.1f}", f"{two * 1e3:.1f}", f"{two / one:.2f}"]


def build_parser():
    parser = command_line.Parser(description="Images per second of guided sampling, from the official recipe to this one.")
    add = command_line.flag_group(parser, "measurement")
    names = "SiT-XL/2 on a GPU, SiT-S/2 on a CPU"
    add("--model", command_line.one_of(*SiT_models), "NAME", f"one of {', '.join(SiT_models)} (default: {names})")
    add("--ckpt", str, "PATH", "weights of a checkpoint of train.py, in place of random ones of --model")
    add("--image-size", command_line.integer(16), "PIXELS", "latents are an eighth of it (default: 256)")
    add("--batch-size", command_line.integer(1), "N", "images at a time (default: 32 on a GPU, 4 on a CPU)")
    add("--mode", command_line.one_of("SDE", "ODE"), "SDE|ODE", "SDE: Euler-Maruyama; ODE: heun2", default="SDE")
    steps = "time points (default: 250 on a GPU, 5 on a CPU, where an image takes as much longer as it has more steps)"
    add("--num-sampling-steps", command_line.integer(2), "N", steps)
    add("--cfg-scale", command_line.number(), "S", "guidance scale", default=1.5)
    add("--rounds", command_line.integer(1), "N", "rounds over all rows (default: 3 on a GPU, 5 on a CPU)")
    add("--rows", command_line.integer(0), "N", "rows to measure, of 0 to 5; the first is always", nargs="+")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--agreement", action="store_true", help="compare precisions for several solvers, not speed")
    instead.add_argument("--halves", action="store_true", help="compare guidance in one batch and in two, no more")
    add("--json", pathlib.Path, "FILE", "write the figures there, too")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        if args.json is not None:
            files.check_output("--json", args.json)
        if args.ckpt is not None and (args.model is not None or args.image_size is not None):
            raise ValueError("--ckpt says the model and its size itself; leave out --model and --image-size")
        image_size = args.image_size or 256
        if image_size % 8:
            raise ValueError(f"--image-size {image_size} is no multiple of 8")
        device = distributed.init()
        on_gpu = device.type == "cuda"
        name = args.model or ("SiT-XL/2" if on_gpu else "SiT-S/2")
        rows = measuring.choose(rows_for(device), args.rows)
        if args.ckpt is None:
            pipeline = random_pipeline(name, image_size // 8, device)
        else:
            name, pipeline = args.ckpt, pipeline.load_pipeline(args.ckpt, device)
        if guidance.resolve_cfg_scale(args.cfg_scale, pipeline.model) == 1:
            raise ValueError("--cfg-scale 1 is no guidance, and guided sampling is what is measured")
    model = pipeline.model
    num_steps = args.num_sampling_steps or (250 if on_gpu else 5)
    settings = flags.SDE_DEFAULTS
    if args.mode == "ODE":
        settings = flags.ODE_DEFAULTS | {"sampling_method": "heun2"}
    how = dict(mode=args.mode, settings=settings | {"num_steps": num_steps}, cfg_scale=args.cfg_scale, seed=0)
    batch_size = args.batch_size or (32 if on_gpu else 4)
    labels = [(37 * i) % model.num_classes for i in range(batch_size)]
    pipeline.precision = rows[0].precision
    tokens = (model.input_size // model.patch_size) ** 2
    print(f"{name}, {tokens} tokens, {batch_size} images at a time; {measuring.where(device)}")
    how_text = f"{args.mode} {settings['sampling_method']}, {num_steps} time points, guidance {args.cfg_scale:g}"
    rounds = args.rounds or (3 if on_gpu else 5)
    if args.halves:
        print("a guided network call, eager: both halves in one batch, and one after the other\n")
        columns = ["precision", "images", "one batch, ms", "two batches, ms", "ratio"]
        return measuring.print_table(columns, halves(pipeline, batch_size, rounds))
    if args.agreement:
        print(f"{num_steps} time points, guidance {args.cfg_scale:g}: relative difference of latents;")
        print("of decoded pixels in grey levels, mean and largest\n")
        columns = ["solver", *(f"{what} to {rows[0].precision}" for what in ("bf16", "compiled", "both"))]
        return measuring.print_table(columns, agreement(pipeline, labels, how, device))

    # That all rows draw the same, with warming up and compiling on the way; then how fast.
    functions, drawn, memory = {}, {}, {}
    for row in rows:
        of_the_others = measuring.memory_of_tensors(device)
        functions[row.name] = drawing(pipeline, row, labels, how)
        drawn[row.name] = functions[row.name]()
        measuring.reset_peak_memory(device)
        functions[row.name]()
        # A CPU's peak is the whole process's, and the memory of a recorded graph is not allocated anew by a call.
        if on_gpu and not row.compiled:
            memory[row.name] = measuring.peak_memory(device) - of_the_others
    seconds = measuring.seconds_in_turn(functions, rounds, 1, device)

    # Say it.
    calls = draw.make_sample_function(
        pipeline.transport, args.mode, how["settings"], draw.ImageNoise(0, [], device)
    ).network_calls
    config = dict(SiT_models[name].keywords, input_size=image_size // 8) if args.ckpt is None else None
    base = measuring.median(seconds[rows[0].name])
    figures, lines = {}, []
    for row in rows:
        median = measuring.median(seconds[row.name])
        rate, whole = batch_size / median, row.interval == guidance.WHOLE
        off = difference(drawn[row.name], drawn[rows[0].name]) if whole else None
        # The matrix products of both halves in every call, whether or not a row computes them.
        flops = config and costs.forward_flops(config) * 2 * calls * rate if whole else None
        peak = costs.peak_flops(device, row.precision)
        figures[row.name] = {"images_per_second": rate, "ratio": base / median, "seconds": median, "difference": off}
        figures[row.name] |= {"mfu": peak and flops and flops / peak, "memory": memory.get(row.name)}
        lines.append(
            [
                row.name,
                f"{rate:.3f}",
                f"{base / median:.2f}",
                f"{median:.2f} ({min(seconds[row.name]):.2f} to {max(seconds[row.name]):.2f})",
                f"{median / calls * 1e3:.1f}",
                flops and f"{flops / 1e12:.2f}",
                peak and flops and f"{flops / peak:.1%}",
                f"{memory[row.name] / 2**30:.2f}" if row.name in memory else None,
                off if off is None else f"{off:.1e}",
            ]
        )
    print(f"{how_text}: {calls} network calls; without decoding\n")
    columns = ["row", "images/s", "ratio", "s per batch (range)", "ms per call", "TFLOP/s", "MFU", "peak GiB"]
    measuring.print_table([*columns, "difference"], lines)
    if not on_gpu:
        print("\non a GPU: not measured")
    if args.json is not None:
        args.json.write_text(json.dumps({"model": name, "where": measuring.where(device), "rows": figures}, indent=2))


if __name__ == "__main__":
    main()
