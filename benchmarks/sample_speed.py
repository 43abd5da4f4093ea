"""Throughput of guided sampling, from the official recipe to this project's: python benchmarks/sample_speed.py

Every row draws latents from the same noise by the same solver. The first row is the official recipe in this project's
code: float32 weights, TF32 products on a GPU, guidance on a doubled batch whose halves both go through the solver, and
all of its states kept. A step of its SDE makes one evaluation of the network, as here; the official code makes two. The
following rows add what sample_ddp.py does, one by one. The last two guide in an interval of times: they draw other
samples, and show what the interval saves.

Weights are random, also where training starts from zeros; --ckpt takes those of a checkpoint. Rows are measured in
turn, round by round, and the results are medians over rounds. The difference to the first row is relative, in the
2-norm over all latents. --agreement compares precisions for several solvers, --halves two ways to compute guidance.
"""

import copy
import dataclasses
import functools

import measuring
import torch

from models import SiT, SiT_models
from sampling import flags, guidance
from sampling.draw import ImageNoise, SampleSettings, decode, draw
from sampling.pipeline import Pipeline, load_pipeline
from training import costs
from transport import create_transport
from utils import command_line, distributed
from utils.precision import autocast, resolve_precision
from vae import PixelSpace

INTERVAL = (0.3, 0.8)  # of t


@dataclasses.dataclass
class Row:
    """One way to draw."""

    name: str
    precision: str
    compiled: bool = False
    interval: tuple = guidance.WHOLE
    official: bool = False


def rows_for(device):
    """Return the rows that are measured on a device."""
    plain = "tf32" if device.type == "cuda" else "fp32"
    return [
        Row(f"official recipe, {plain}", plain, official=True),
        Row(f"sample_ddp.py, {plain}", plain),
        Row("... --precision bf16", "bf16"),
        Row("... --precision bf16 --compile", "bf16", compiled=True),
        Row(f"{plain}, --cfg-interval {INTERVAL[0]} {INTERVAL[1]}", plain, interval=INTERVAL),
        Row(f"bf16, compiled, --cfg-interval {INTERVAL[0]} {INTERVAL[1]}", "bf16", compiled=True, interval=INTERVAL),
    ]


class TwiceTheNoise(ImageNoise):
    """Noise for the official doubled batch, whose halves get the same."""

    def randn_like(self, x):
        half = super().randn_like(x[: len(x) // 2])
        return torch.cat([half, half])


@torch.no_grad()
def draw_as_official(pipeline, labels, settings):
    """Return latents (N, C, h, w), drawn as the official script does from the noise of this project's images."""
    model, device = pipeline.model, pipeline.device
    noise = TwiceTheNoise(settings.seed, range(len(labels)), device)
    x, y = noise.draw(pipeline.latent_shape), torch.tensor(labels, device=device)
    labels_and_null = torch.cat([y, torch.full_like(y, model.num_classes)])

    def guided(x, t, y):
        return model.forward_with_cfg(x, t, y, settings.cfg_scale, pipeline.guided_channels)

    keeping_all = dataclasses.replace(settings, solver=settings.solver | {"trajectory": True})
    sample = keeping_all.sampler(pipeline.transport, noise)
    return sample(torch.cat([x, x]), guided, y=labels_and_null)[-1][: len(labels)]


def random_pipeline(model_config, device):
    """Return a pipeline in pixel space whose weights are random, also where training starts from zeros."""
    torch.manual_seed(0)
    model = SiT(**model_config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(device).eval().requires_grad_(False)
    space = PixelSpace()
    return Pipeline(model, create_transport(), space, device, guided_channels=3, model_config=model_config)


def drawing(pipeline, row, labels, settings):
    """Return a function that draws latents as a row says, with a copy of the weights."""
    pipeline = dataclasses.replace(pipeline, model=copy.deepcopy(pipeline.model))
    if row.official:
        function = functools.partial(draw_as_official, pipeline, labels, settings)
    else:
        pipeline.speed_up(row.precision, row.compiled)
        settings = dataclasses.replace(settings, cfg_interval=row.interval)

        def function():
            return draw(pipeline, labels, settings, batch_size=len(labels), show_progress=False)[0]

    def drawn():
        resolve_precision(row.precision, pipeline.device, on_gpu="tf32")  # a global setting, which rows differ in
        if pipeline.device.type == "cpu":
            distributed.keep_freed_memory(not row.official)
        return function()

    return drawn


def difference(a, b):
    """Return the relative difference of a to b in the 2-norm."""
    return float((a - b).norm() / b.norm())


def agreement_lines(pipeline, labels, settings):
    """Yield, for each solver, a table's line: how much bf16 and compilation change what fp32, or TF32, draws."""
    plain, num_steps = rows_for(pipeline.device)[1].precision, settings.solver["num_steps"]
    solvers = {
        "SDE Euler": ("SDE", flags.SDE_DEFAULTS),
        "SDE Heun": ("SDE", flags.SDE_DEFAULTS | {"sampling_method": "Heun"}),
        "ODE euler": ("ODE", flags.ODE_DEFAULTS | {"sampling_method": "euler"}),
        "ODE heun2": ("ODE", flags.ODE_DEFAULTS | {"sampling_method": "heun2"}),
        "ODE dopri5": ("ODE", flags.ODE_DEFAULTS),
    }
    for name, (mode, solver) in solvers.items():
        settings = dataclasses.replace(settings, mode=mode, solver=solver | {"num_steps": num_steps})
        reference = drawing(pipeline, Row("plain", plain), labels, settings)()
        cells = []
        for row in (Row("bf16", "bf16"), Row("compiled", plain, True), Row("both", "bf16", True)):
            drawn = drawing(pipeline, row, labels, settings)()
            levels = (decode(pipeline, drawn).int() - decode(pipeline, reference).int()).abs().float()
            cells.append(f"{difference(drawn, reference):.1e}; {levels.mean():.2f}, {levels.max():.0f}")
        yield [name, *cells]


@torch.no_grad()
def halves_lines(pipeline, batch_size, rounds):
    """Yield a table's lines: ms of a guided evaluation whose halves are one batch and two, for several batch sizes."""
    model, device = pipeline.model, pipeline.device
    for precision in (rows_for(device)[1].precision, "bf16"):
        fast = dataclasses.replace(pipeline, model=copy.deepcopy(model))
        fast.speed_up(precision, compiled=False)
        resolve_precision(precision, device, on_gpu="tf32")
        for count in sorted({1, 4, batch_size}):
            x = torch.randn(2 * count, *pipeline.latent_shape, device=device)
            t, y = torch.full((1,), 0.5, device=device), torch.zeros(2 * count, dtype=torch.long, device=device)

            def evaluate(batches, network=fast.model, precision=precision, x=x, t=t, y=y):
                with autocast(device, precision):
                    for part, labels in zip(x.chunk(batches), y.chunk(batches), strict=True):
                        network(part, t, labels)

            ways = {batches: functools.partial(evaluate, batches) for batches in (1, 2)}
            measuring.seconds_in_turn(ways, 1, 1, device)  # warms up
            one, two = measuring.medians_in_turn(ways, rounds, 5, device).values()
            yield [precision, count, f"{one * 1e3:.1f}", f"{two * 1e3:.1f}", f"{two / one:.2f}"]


def measure(pipeline, rows, labels, settings, rounds):
    """Draw as each row says, to compare and to warm up, then measure all rows in turn.

    Return ({row name: latents}, {row name: peak memory in bytes}, {row name: list of seconds}). Memory is measured on a
    GPU alone, since a CPU's is the whole process's, and not for compiled rows, whose CUDA graphs allocate theirs once.
    """
    functions, drawn, memory, device = {}, {}, {}, pipeline.device
    for row in rows:
        before = measuring.memory_of_tensors(device)
        functions[row.name] = drawing(pipeline, row, labels, settings)
        drawn[row.name] = functions[row.name]()
        measuring.reset_peak_memory(device)
        functions[row.name]()
        if device.type == "cuda" and not row.compiled:
            memory[row.name] = measuring.peak_memory(device) - before
    return drawn, memory, measuring.seconds_in_turn(functions, rounds, 1, device)


def results_of(rows, drawn, memory, seconds, model_config, nfe, device):
    """Return {row name: dict of results}; difference and FLOP/s are None for guidance in an interval.

    FLOP/s count both halves of guidance in each of the `nfe` evaluations, whether or not a row computes both.
    """
    results, first = {}, rows[0].name
    for row in rows:
        name, median = row.name, measuring.median(seconds[row.name])
        compares, peak = row.interval == guidance.WHOLE, costs.peak_flops(device, row.precision)
        rate = len(drawn[name]) / median
        flops = rate * 2 * nfe * costs.forward_flops(model_config) if compares else None
        results[name] = {
            "images_per_second": rate,
            "ratio": measuring.median(seconds[first]) / median,
            "seconds_per_batch": median,
            "fastest_and_slowest": [min(seconds[name]), max(seconds[name])],
            "flops_per_second": flops,
            "mfu": flops / peak if flops and peak else None,
            "peak_memory_bytes": memory.get(name),
            "difference": difference(drawn[name], drawn[first]) if compares else None,
        }
    return results


def print_results(results, nfe):
    """Print a table of the results."""
    columns = ["row", "images/s", "ratio", "s per batch (range)", "ms per evaluation", "TFLOP/s", "MFU"]
    lines = []
    for name, result in results.items():
        median, (fastest, slowest) = result["seconds_per_batch"], result["fastest_and_slowest"]
        flops, memory = result["flops_per_second"], result["peak_memory_bytes"]
        lines.append(
            [
                name,
                f"{result['images_per_second']:.3f}",
                f"{result['ratio']:.2f}",
                f"{median:.2f} ({fastest:.2f} to {slowest:.2f})",
                f"{median / nfe * 1e3:.1f}",
                flops and f"{flops / 1e12:.2f}",
                measuring.cell(result["mfu"], "{:.1%}"),
                memory and f"{measuring.gib(memory):.2f}",
                measuring.cell(result["difference"], "{:.1e}"),
            ]
        )
    measuring.print_table([*columns, "peak memory, GiB", "difference"], lines)


def build_parser():
    parser = command_line.Parser("Throughput of guided sampling, from the official recipe to this project's.")
    add, at_least_one = command_line.flag_group(parser, "measurement"), command_line.integer(1)
    names = "SiT-XL/2 on a GPU, SiT-S/2 on a CPU"
    add("--model", command_line.one_of(*SiT_models), "NAME", f"one of {', '.join(SiT_models)} (default: {names})")
    add("--ckpt", str, "PATH", "weights of a checkpoint of train.py, in place of random ones of --model")
    add("--image-size", command_line.integer(16), "PIXELS", "latents are an eighth of it (default: 256)")
    add("--batch-size", at_least_one, "N", "images at a time (default: 32 on a GPU, 4 on a CPU)")
    add("--mode", command_line.one_of("SDE", "ODE"), "SDE|ODE", "SDE: Euler-Maruyama; ODE: heun2", default="SDE")
    steps = "time points (default: 250 on a GPU, 5 on a CPU); the time of an image is proportional to their number"
    add("--num-sampling-steps", command_line.integer(2), "N", steps)
    add("--cfg-scale", command_line.number(), "S", "guidance scale", default=1.5)
    add("--rounds", at_least_one, "N", "rounds over all rows (default: 3 on a GPU, 5 on a CPU)")
    add("--rows", command_line.integer(0), "N", "rows to measure, of 0 to 5; the first is always measured", nargs="+")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--agreement", action="store_true", help="compare precisions for several solvers, not speed")
    instead.add_argument("--halves", action="store_true", help="compare guidance in one batch and in two, nothing else")
    measuring.add_json_flag(add)
    return parser


def open_pipeline(ckpt, model_name, image_size, device):
    """Return (name for the output, pipeline) of --ckpt, or of random weights. Raise ValueError if flags contradict."""
    if ckpt is not None:
        if model_name is not None or image_size is not None:
            raise ValueError("--ckpt determines model and size; leave out --model and --image-size")
        return ckpt, load_pipeline(ckpt, device)
    image_size = image_size or 256
    measuring.check_image_size(image_size)
    model_name = model_name or ("SiT-XL/2" if device.type == "cuda" else "SiT-S/2")
    return model_name, random_pipeline(measuring.model_config(model_name, image_size), device)


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        measuring.check_json(args.json)
        device = distributed.init()
        on_gpu = device.type == "cuda"
        rows = measuring.choose(rows_for(device), args.rows)
        name, pipeline = open_pipeline(args.ckpt, args.model, args.image_size, device)
        if guidance.resolve_cfg_scale(args.cfg_scale, pipeline.model) == 1:
            raise ValueError("--cfg-scale 1 is no guidance, and this measures guided sampling")
    pipeline.precision = rows[0].precision
    num_steps, rounds = args.num_sampling_steps or (250 if on_gpu else 5), args.rounds or (3 if on_gpu else 5)
    solver = flags.SDE_DEFAULTS if args.mode == "SDE" else flags.ODE_DEFAULTS | {"sampling_method": "heun2"}
    settings = SampleSettings(args.mode, solver | {"num_steps": num_steps}, args.cfg_scale)
    batch_size, config = args.batch_size or (32 if on_gpu else 4), pipeline.model_config
    labels = [(37 * i) % pipeline.model.num_classes for i in range(batch_size)]
    images = f"{measuring.num_tokens(config)} tokens, {batch_size} images at a time"
    print(f"{name}, {images}; {measuring.machine(device)}")
    if args.halves:
        print("a guided evaluation, not compiled: both halves in one batch, and one after the other\n")
        columns = ["precision", "images", "one batch, ms", "two batches, ms", "ratio"]
        return measuring.print_table(columns, halves_lines(pipeline, batch_size, rounds))
    if args.agreement:
        print(f"{num_steps} time points, guidance {args.cfg_scale:g}: relative difference of latents;")
        print("then mean and largest difference of decoded pixels in grey levels\n")
        columns = ["solver", *(f"{what} to {rows[0].precision}" for what in ("bf16", "compiled", "both"))]
        return measuring.print_table(columns, agreement_lines(pipeline, labels, settings))
    measured = measure(pipeline, rows, labels, settings, rounds)
    nfe = settings.sampler(pipeline.transport).nfe
    results = results_of(rows, *measured, config, nfe, device)
    how = f"{args.mode} {solver['sampling_method']}, {num_steps} time points, guidance {args.cfg_scale:g}"
    print(f"{how}: {nfe} NFE; without decoding\n")
    print_results(results, nfe)
    if not on_gpu:
        print("\non a GPU: not measured")
    measuring.write_json(args.json, {"model": name, "batch_size": batch_size, "nfe": nfe}, results, device)


if __name__ == "__main__":
    main()
