"""What only a GPU can show, in nine minutes at most: bash benchmarks/gpu.sh [--output DIR]

Parts run one after the other, what is worth most first, each in its own process and for a limited time: the CUDA tests,
throughput of training and sampling, ranks, memory, kernels. One that fails, takes too long or does not suit the machine
does not end the others. After every part DIR holds results.json, with the machine, each part's outcome and figures, and
results.md, tables for RESULTS.md; what a part prints is in DIR/PART.out and DIR/PART.err.

Exit code: 0; 1 if a part failed or took too long. Without a GPU every part is skipped, unless --rehearse runs them
on the CPU, as small as they go, to try the commands.
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from repository import ROOT

from utils import command_line, files

LAST_LINES = 20
LEAST_SECONDS = 15  # in which a part can show something
REHEARSAL_SECONDS = 300  # for each part, on a CPU that may be slow
GRACE_SECONDS = 10  # in which a process ends after SIGTERM: torchrun ends its ranks
LARGEST_BATCH = 256
SAMPLING_NFE = 250  # of the paper's SDE: 249 steps and the last one
LOSSES_AGREE = 1e-4  # relative, as the tests of ranks on a CPU have it
PACKAGES = ("timm", "torchdiffeq", "diffusers", "pytest")
MODELS = ("SiT-XL/2", "SiT-S/2", "SiT-B/2")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part: a command that writes figures as JSON, and what they say in one line.

    Attributes:
        name: of its files.
        seconds: in which it is to end.
        words: the command; '{json}' stands for the file that it writes.
        missing: why it cannot run on this machine; None: it can.
        left_out: what of it this machine cannot do.
        figures: a function of (the JSON, the text that the command printed) that returns a dict.
        summary: a function of the figures, and of all earlier parts' {name: figures}, that returns a line. It raises
            ValueError if they show an error.
    """

    name: str
    seconds: float
    words: tuple
    missing: str | None = None
    left_out: str | None = None
    figures: Callable = lambda content, text: content
    summary: Callable = lambda figures, earlier: ""


def probe():
    """Return a dict of the machine. It runs in a process of its own, so that this one holds no GPU memory."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    machine = {
        "gpus": gpus,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cpus": len(os.sched_getaffinity(0)),
        "missing": [name for name in PACKAGES if importlib.util.find_spec(name) is None],
    }
    if not gpus:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return machine | {"no_gpu": f"PyTorch, built {built}, finds no GPU"}
    properties = torch.cuda.get_device_properties(0)
    machine |= {
        "gpu": properties.name,
        "gib": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }
    with contextlib.suppress(Exception):  # then they are small
        machine["batch_sizes"] = {name: _fitting_batch(name, properties.total_memory) for name in MODELS}
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device="cuda"))
    except Exception as error:  # of many kinds: no compiler, no Triton, an old GPU
        machine["no_compilation"] = files.one_line(error)
    return machine


def _output(*words):
    """Return the first line that a command prints; None if it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        return result.stdout.strip().splitlines()[0]


def _fitting_batch(name, total_memory):
    """Return the largest power of two whose estimated memory in float32, the official recipe's, fits a GPU."""
    import measuring
    import memory
    import torch

    config = measuring.model_config(name, 256)
    one, two = (memory.estimate(config, size, "fp32", False, torch.device("cuda")) for size in (1, 2))
    most = int((memory.USABLE * total_memory - (2 * one - two)) / (two - one))
    return 2 ** (max(1, min(most, LARGEST_BATCH)).bit_length() - 1)


def make_parts(machine, rehearse):
    """Return the `Part`s for a machine, what is worth most first."""
    size = _sizes(machine, rehearse)
    largest, *smaller = train_parts(machine, size)
    listed = [
        tests_part(machine),
        largest,
        sample_part(machine, size),
        *ranks_parts(machine, size, rehearse),
        Part("memory", 100, ("memory.py", *size["memory"]), summary=memory_summary),
        *smaller,
        Part("kernels", 60, ("kernel_speed.py", *size["kernels"]), summary=kernels_summary),
    ]
    return [_complete(part, machine, rehearse) for part in listed]


def _complete(part, machine, rehearse):
    """Return a part with its whole command, and with a reason if this machine cannot run it."""
    words, reason = part.words, part.missing
    if words[0].endswith(".py"):
        words = (sys.executable, f"benchmarks/{words[0]}", *words[1:], "--json", "{json}")
    if "timm" in machine["missing"]:
        reason = reason or "needs the package timm"
    if not machine["gpus"] and (not rehearse or part.name == "tests"):
        reason = f"needs a GPU: {machine['no_gpu']}"
    seconds = REHEARSAL_SECONDS if rehearse else part.seconds
    return dataclasses.replace(part, words=tuple(map(str, words)), missing=reason, seconds=seconds)


def _sizes(machine, rehearse):
    """Return what parts measure: {kind: flags}, and the batch size of each model."""
    if rehearse:
        small = ["--image-size", 64]
        return {
            "models": dict.fromkeys(MODELS, ("SiT-S/2", 2)),
            "train": [*small, "--rounds", 1, "--steps", 1, "--check-steps", 2],
            "sample": [*small, "--model", "SiT-S/2", "--batch-size", 2, "--num-sampling-steps", 3, "--rounds", 1],
            "ranks": [*small, "--model", "SiT-S/2", "--batch-size", 1, "--rounds", 1, "--check-steps", 2],
            "memory": [*small, "--models", "SiT-S/2", "--batch-sizes", 2],
            "kernels": ["--size", "S", "--tokens", 16, "--batch-size", 1, "--rounds", 1, "--repeats", 1],
        }
    batches = machine.get("batch_sizes") or dict.fromkeys(MODELS, 16)
    large = "SiT-XL/2" if batches["SiT-XL/2"] >= 8 else "SiT-S/2"
    return {
        "models": {name: (name, batch) for name, batch in batches.items()},
        "train": ["--rounds", 3, "--steps", 5, "--check-steps", 5],
        "sample": ["--model", large, "--num-sampling-steps", 26, "--rounds", 2],
        "ranks": ["--model", large, "--batch-size", min(32, batches[large])],
        "memory": ["--models", large, "--batch-sizes", min(16, batches[large])],
        "kernels": ["--repeats", 20],
    }


def _rows(machine, compiled):
    """Return (--rows, what is left out): official recipe, bf16 and `compiled`, or what this machine can do of it."""
    if not machine.get("bf16"):
        return ["--rows", 0, 1], "bf16: this device has none" if machine["gpus"] else None
    if "no_compilation" in machine:
        return ["--rows", 0, 2], f"compiled rows: {machine['no_compilation']}"
    return ["--rows", 0, 2, compiled], None


def tests_part(machine):
    missing = "needs the package pytest" if "pytest" in machine["missing"] else None
    words = sys.executable, "-m", "pytest", "-vv", "-rs", "--color=no", "--tb=short", "-p", "no:cacheprovider"
    words = *words, "tests/test_cuda.py"
    return Part("tests", 170, words, missing, figures=read_tests, summary=tests_summary)


def train_parts(machine, size):
    parts = []
    rows, left_out = _rows(machine, compiled=4)
    for model in MODELS:
        name, batch = size["models"][model]
        words = "train_speed.py", "--model", name, "--batch-size", batch, *size["train"], *rows
        short = f"train-{model.removeprefix('SiT-').replace('/', '-')}"
        parts.append(Part(short, 190 if model == MODELS[0] else 90, words, None, left_out, summary=train_summary))
    return parts


def sample_part(machine, size):
    rows, left_out = _rows(machine, compiled=3)
    words = "sample_speed.py", *size["sample"], *rows
    return Part("sample", 120, words, None, left_out, read_samples, sample_summary)


def ranks_parts(machine, size, rehearse):
    """Return the parts of one process, of DDP and FSDP2 on a power of two of GPUs, and of FSDP2 on one, by NCCL."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words, nccl = ["benchmarks/rank_speed.py", *size["ranks"], "--json", "{json}"], machine.get("nccl")
    ranks = 2 if rehearse else 2 ** (max(2, min(8, machine["gpus"])).bit_length() - 1)
    lack = None if nccl or rehearse else "PyTorch was built without NCCL"
    few = None if machine["gpus"] >= 2 or rehearse else "needs two GPUs, and this machine has one"

    def part(parallel, count, missing):
        name = f"{parallel}-{count}".replace("one process-1", "one-process")
        launched = [sys.executable] if parallel == "one process" else [*launch, f"--nproc_per_node={count}"]
        return Part(name, 60, (*launched, *words, "--parallel", parallel), missing, summary=ranks_summary)

    several = [part(parallel, ranks, few or lack) for parallel in ("ddp", "fsdp")]
    return [part("one process", 1, None), *several, part("fsdp", 1, lack)]


def read_tests(content, text):
    """Return the number of tests of each outcome, and the names of those that failed, of pytest's lines so far."""
    outcomes = re.findall(r"^\S+::(.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    counts = {kind: sum(outcome == kind for _, outcome in outcomes) for kind in ("PASSED", "FAILED", "SKIPPED")}
    bad = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    reasons = re.findall(r"^SKIPPED (.+)$", text, re.MULTILINE)
    return {kind.lower(): count for kind, count in counts.items()} | {"names": bad, "skipped_why": reasons}


def tests_summary(figures, earlier):
    names = f" ({', '.join(figures['names'])})" if figures["names"] else ""
    return f"{figures['passed']} tests passed, {len(figures['names'])} failed{names}, {figures['skipped']} skipped"


def train_summary(figures, earlier):
    rows = figures["rows"]
    best = max(rows, key=lambda name: rows[name]["images_per_second"])
    row, worst = rows[best], max((row["loss_difference"] or 0 for row in rows.values()), default=0)
    ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} times the official recipe"
    mfu = "" if row["mfu"] is None else f", {row['mfu']:.1%} MFU"
    waits = f"host waits: {row['host_waits']}"
    return f"{row['images_per_second']:.1f} images/s{mfu}{ratio} ({best}); losses differ by {worst:.1e}; {waits}"


def read_samples(content, text):
    """Add to each row the seconds of an image by the paper's SDE, in proportion to the evaluations."""
    for row in content["rows"].values():
        row["seconds_per_image_of_250"] = SAMPLING_NFE / content["nfe"] / row["images_per_second"]
    return content


def sample_summary(figures, earlier):
    rows = figures["rows"]
    best = min(rows, key=lambda name: rows[name]["seconds_per_image_of_250"])
    row = rows[best]
    mfu = "" if row["mfu"] is None else f", {row['mfu']:.1%} MFU"
    seconds, nfe = row["seconds_per_image_of_250"], figures["nfe"]
    text = f"{seconds:.3f} s per image of {SAMPLING_NFE} NFE, extrapolated from {nfe}{mfu}"
    return f"{text}, {row['ratio']:.2f} times the official recipe ({best})"


def ranks_summary(figures, earlier):
    ((parallel, row),) = figures["rows"].items()
    text = f"{row['ranks']} ranks, {row['images_per_second']:.1f} images/s"
    reference = earlier.get("one-process")
    if parallel == "one process" or reference is None:
        return text
    (alone,) = reference["rows"].values()
    worst = max(abs(a - b) / b for a, b in zip(row["losses"], alone["losses"], strict=True))
    if worst > LOSSES_AGREE:
        raise ValueError(f"losses differ from those of one process by {worst:.1e}; they should by {LOSSES_AGREE}")
    efficiency = row["images_per_second"] / row["ranks"] / alone["images_per_second"]
    return f"{text}, {efficiency:.0%} of one process's a rank; losses differ from its by {worst:.1e}"


def memory_summary(figures, earlier):
    ratios = [row["tensors"] / row["estimate"] for row in figures["rows"]]
    return f"peak of tensors / estimate: {min(ratios):.2f} to {max(ratios):.2f}"


def kernels_summary(figures, earlier):
    name, seconds = min(figures["rows"]["forward and backward"].items(), key=lambda item: item[1])
    return f"fastest attention, forward and backward: {name}, {seconds * 1e3:.2f} ms"


def run_all(parts, folder, machine, seconds, start):
    """Run parts until `seconds` after `start`, and write the results after each. Return the results of the parts."""
    results, earlier = [], {}
    for part in parts:
        left = seconds - (time.monotonic() - start)
        if part.missing is None and left < LEAST_SECONDS:
            part = dataclasses.replace(part, missing="no time was left")
        print(f"{part.name}: ", end="", flush=True)
        result = run_part(part, folder, min(part.seconds, left), earlier)
        results.append(result)
        earlier |= {part.name: result["figures"]} if result["figures"] else {}
        print(f"{result['outcome']}, {result['seconds']:.0f} s: {result['says']}", flush=True)
        write_results(folder, machine, results, time.monotonic() - start)
    return results


def run_part(part, folder, seconds, earlier):
    """Run a part's command for at most so many seconds. Return its result as plain data."""
    json_file, out, err = (folder / f"{part.name}{ending}" for ending in (".json", ".out", ".err"))
    words = [str(json_file) if word == "{json}" else word for word in part.words]
    result = {"name": part.name, "command": " ".join(part.words), "outcome": "skipped", "says": part.missing}
    result |= {"left_out": part.left_out, "returncode": None, "seconds": 0.0, "figures": None, "last_lines": []}
    if part.missing is not None:
        return result
    start = time.monotonic()
    code = run_for(words, out, err, seconds)
    text = out.read_text(errors="replace")
    lines = [*err.read_text(errors="replace").splitlines(), *text.splitlines()]
    result |= {"seconds": time.monotonic() - start, "returncode": code, "last_lines": lines[-LAST_LINES:]}
    result["outcome"] = "timed out" if code is None else "failed" if code else "passed"
    error = f"ended after {seconds:.0f} s" if code is None else f"exit code {code}: {_last_error(err, out)}"
    try:
        content = files.read_json(json_file) if json_file.exists() else {}
        result["figures"] = part.figures(content, text) or None
        result["says"] = part.summary(result["figures"] or {}, earlier)
    except (ValueError, LookupError, TypeError) as problem:  # also of a command that did not come to its figures
        result["outcome"] = "failed" if code == 0 else result["outcome"]
        error = error if code != 0 else files.one_line(problem)
        return result | {"says": error}
    return result | ({} if code == 0 else {"says": "; ".join(filter(None, (error, result["says"])))})


def _last_error(*paths):
    """Return the last line of the first of these files that is not empty."""
    texts = (path.read_text(errors="replace").strip() for path in paths)
    return next((text.splitlines()[-1] for text in texts if text), "it printed nothing")


def run_for(words, out, err, seconds):
    """Run a command, its output in two files, for at most so many seconds. Return its exit code; None: it was ended."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with open(out, "w") as stdout, open(err, "w") as stderr:
        where = dict(cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        process = subprocess.Popen(words, **where, start_new_session=True)
        try:
            return process.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:  # beyond its time, or this process is being ended
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                        os.killpg(process.pid, number)
                        process.wait(GRACE_SECONDS)


def write_results(folder, machine, results, seconds):
    """Write results.json and results.md."""
    commit = _output("git", "rev-parse", "HEAD")
    changed = commit and _output("git", "status", "--porcelain", "--untracked-files=no") is not None
    head = {"date": f"{datetime.date.today()}", "commit": commit, "changed": changed, "seconds": seconds}
    files.write_json(folder / "results.json", head | {"machine": machine, "parts": results})
    with files.written_whole(folder / "results.md") as partial:
        partial.write_text("\n".join(markdown(head, machine, results, folder)) + "\n")


def markdown(head, machine, results, folder):
    """Yield the lines of results.md: the machine, a table of all parts, and what each part printed."""
    version = f"{(head['commit'] or 'unknown')[:12]}{' with changes' if head['changed'] else ''}"
    yield f"`bash benchmarks/gpu.sh`, {head['date']}, {head['seconds']:.0f} s; commit {version}"
    if machine["gpus"]:
        software = "torch {torch}, CUDA {cuda}, driver {driver}, cuDNN {cudnn}, NCCL {nccl}".format_map(machine)
        yield f"{machine['gpus']} x {machine['gpu']}, {machine['gib']:.0f} GiB; {software}; {machine['cpus']} CPUs"
    else:
        yield f"no GPU; torch {machine['torch']}; {machine['cpus']} CPUs"
    yield from ("", "| part | outcome | s | figures |", "|---|---|---|---|")
    for result in results:
        says = "; ".join(filter(None, (result["says"], result["left_out"] and f"left out {result['left_out']}")))
        yield f"| {result['name']} | {result['outcome']} | {result['seconds']:.0f} | {says.replace('|', '/')} |"
    for result in results:
        if result["outcome"] != "skipped" and result["name"] != "tests":
            command = result["command"].replace(sys.executable, "python").replace(" --json {json}", "")
            yield from ("", f"### {result['name']}", "", f"`{command}`", "")
            yield (folder / f"{result['name']}.out").read_text(errors="replace").strip()


def build_parser():
    parser = command_line.Parser("Tests and benchmarks that only a GPU can show, in nine minutes at most.")
    add = command_line.flag_group(parser, "run")
    default = "results/gpu-DATE-TIME"
    add("--output", command_line.path, "DIR", f"folder of the results, which is made (default: {default})")
    add("--seconds", command_line.integer(1), "N", "time for all parts together", default=500)
    add("--parts", str, "NAME", "parts to run, in their order (default: all)", nargs="+")
    add("--rehearse", None, None, "on a CPU, run the parts as small as they go, but for the tests: no measurement")
    add("--probe", command_line.path, "FILE", "write what is known of the machine to a file, and nothing else")
    return parser


def find_machine(folder):
    """Return what `probe` finds; without a GPU if it fails, and why."""
    file, out, err = (folder / f"machine{ending}" for ending in (".json", ".out", ".err"))
    code = run_for([sys.executable, __file__, "--probe", str(file)], out, err, 100)
    if file.exists():
        return json.loads(file.read_text())
    why = "it took too long" if code is None else _last_error(err, out)
    unknown = {"gpus": 0, "torch": "unknown", "cpus": os.cpu_count(), "missing": []}
    return unknown | {"no_gpu": f"looking at the machine failed: {why}", "failed": True}


def main():
    parser = build_parser()
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `run_for` then ends the part that runs
    if args.probe is not None:
        return files.write_json(args.probe, probe())
    folder = args.output or ROOT / "results" / f"gpu-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    start = time.monotonic()
    with command_line.user_errors(parser):
        folder = folder.resolve()  # commands run in the repository
        folder.mkdir(parents=True, exist_ok=True)
        machine = find_machine(folder)
        parts = make_parts(machine, args.rehearse)
        if unknown := set(args.parts or ()) - {part.name for part in parts}:
            names = ", ".join(part.name for part in parts)
            raise ValueError(f"--parts {min(unknown)}: there is no such part; choose from {names}")
    parts = [part for part in parts if not args.parts or part.name in args.parts]
    results = run_all(parts, folder, machine, args.seconds, start)
    print(f"results in {folder}")
    bad = any(result["outcome"] in ("failed", "timed out") for result in results)
    sys.exit(int(bad or machine.get("failed", False)))


if __name__ == "__main__":
    main()
