"""Fast paths compute what plain ones do, in no more memory, and without waits of the host; the benchmarks run."""

import copy
import ctypes
import dataclasses
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading

import measuring
import memory
import numpy as np
import pytest
import sample_speed
import torch
import train_speed
from conftest import TINY, load_golden, read_metrics
from processes import ROOT, run

from models import SiT, SiT_models
from sampling.draw import SampleSettings, draw
from sampling.flags import ODE_DEFAULTS, SDE_DEFAULTS
from sampling.pipeline import Pipeline
from sampling.shards import background
from training import costs
from training.step import batches_on_device
from transport import create_transport
from utils.distributed import keep_freed_memory
from utils.precision import autocast, choose_attention, compile_training, prepare_inference, without_tf32
from vae import PixelSpace

CPU = torch.device("cpu")
SIZES = dict(input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=10, learn_sigma=False)
SOLVERS = {
    "euler": ("ODE", ODE_DEFAULTS | {"sampling_method": "euler", "num_steps": 20}),
    "dopri5": ("ODE", ODE_DEFAULTS | {"num_steps": 2}),
    "SDE": ("SDE", SDE_DEFAULTS | {"num_steps": 20}),
}


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    model = SiT(**SIZES).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    return Pipeline(model, create_transport(), None, CPU, guided_channels=None)


def drawn_by(solver, pipeline, count=5, **more):
    settings = SampleSettings(*SOLVERS[solver], cfg_scale=1.5)
    return draw(pipeline, list(range(count)), settings, show_progress=False, **more)


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_in_bf16_agrees_within_its_rounding(pipeline, solver):
    expected, counts = drawn_by(solver, pipeline)
    pipeline.speed_up("bf16", compiled=False)
    drawn, counts_in_bf16 = drawn_by(solver, pipeline)
    assert drawn.dtype == torch.float32 and (solver == "dopri5" or counts == counts_in_bf16)
    assert pipeline.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    error = (drawn - expected).norm() / expected.norm()
    assert 0 < error < 2**-7  # bf16 has eight bits


def test_bf16_weights_compute_what_autocast_computes(pipeline):
    model, x, t, y = pipeline.model, torch.randn(3, 4, 8, 8), torch.full((1,), 0.3), torch.tensor([1, 2, 3])
    choose_attention(model, CPU, "bf16")
    with autocast(CPU, "bf16"):
        expected = model(x, t, y)
        prepare_inference(model, CPU, "bf16", compiled=False)
        assert torch.equal(model(x, t, y), expected)


def test_compiled_sampling_agrees_and_fills_its_last_batch(pipeline):
    expected, counts = drawn_by("SDE", pipeline)
    sizes = set()
    hook = pipeline.model.register_forward_pre_hook(lambda model, inputs: sizes.add((len(inputs[0]), len(inputs[1]))))
    pipeline.compiled = True
    drawn, _ = drawn_by("SDE", pipeline, batch_size=2)  # five images: batches of 2, 2 and 1
    assert sizes == {(4, 1)}  # guided, with one time for all
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    hook.remove()
    other = dataclasses.replace(pipeline, model=copy.deepcopy(pipeline.model))
    for parameter in other.model.parameters():
        parameter.neg_()
    expected_of_other, _ = drawn_by("SDE", other)
    for network, expectation in ((pipeline, expected), (other, expected_of_other)):  # what is compiled holds weights
        network.speed_up("fp32", compiled=True)
        drawn, counts_of_compiled = drawn_by("SDE", network, batch_size=2)
        assert counts_of_compiled == counts
        torch.testing.assert_close(drawn, expectation, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_used_again():
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(1 << 26)  # 256 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory(False)
    assert faults() > 4 * 2**28 / os.sysconf("SC_PAGE_SIZE") / 2
    keep_freed_memory()
    faults()
    assert faults() < 1000
    keep_freed_memory(False)
    assert faults() > 1000


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_fast_paths_agree_with_the_golden_values(compiled):
    golden = load_golden("model.npz")
    model = SiT(**json.loads(golden["meta"])["config"]).eval().requires_grad_(False)
    weights = {key: value for key, value in golden.items() if key.startswith("state_dict/")}
    model.load_state_dict({key.removeprefix("state_dict/"): value for key, value in weights.items()})
    prepare_inference(model, CPU, "fp32", compiled)
    assert not model.blocks[0].attn.fused_attn  # few tokens on a CPU
    output = model(golden["x"], golden["t"], golden["y"])
    torch.testing.assert_close(output, golden["forward"], atol=1e-5, rtol=0)
    scale = json.loads(golden["meta"])["cfg_scale"]
    output = model.forward_with_cfg(golden["cfg_x"], golden["cfg_t"], golden["cfg_y"], scale)
    torch.testing.assert_close(output, golden["forward_with_cfg"], atol=1e-5, rtol=0)


def test_tokens_are_contiguous_in_every_block(pipeline):
    """Otherwise each normalisation would copy its input first."""
    contiguous = []
    for block in pipeline.model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: contiguous.append(inputs[0].is_contiguous()))
    pipeline.model(torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([1, 2, 3]))
    assert contiguous == [True] * len(pipeline.model.blocks)


def test_guidance_is_combined_in_float32(pipeline):
    """The halves are rounded to bf16. Rounding their difference, too, would multiply that error by the scale."""
    x, y, scale = torch.randn(2, 4, 8, 8), torch.tensor([1, 2, 10, 10]), 7.3
    with torch.autocast("cpu", torch.bfloat16):
        halves = pipeline.model(torch.cat([x, x]), torch.full((4,), 0.3), y)
        guided = pipeline.model.forward_with_cfg(torch.cat([x, x]), torch.full((4,), 0.3), y, scale, None)
    assert halves.dtype == torch.bfloat16 and guided.dtype == torch.float32
    conditional, unconditional = halves.float().chunk(2)
    torch.testing.assert_close(guided[:2], unconditional + scale * (conditional - unconditional))


def test_without_tf32_restores_the_settings():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with without_tf32():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_one_time_for_all_images_is_embedded_once(pipeline):
    x, t, y = torch.randn(3, 4, 8, 8), torch.full((3,), 0.3), torch.tensor([1, 2, 3])
    torch.testing.assert_close(pipeline.model(x, t[:1], y), pipeline.model(x, t, y), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision, shift", [("fp32", 0.0), ("bf16", [0.0, 0.1, 0.2, 0.3])])
def test_no_step_of_training_makes_the_host_wait(precision, shift):
    runner = train_speed.Runner(SIZES, 4, CPU)
    runner.space.shift = shift
    runner.reset()
    official, ours = train_speed.Row("official", official=True), train_speed.Row("ours", precision=precision)
    assert train_speed.host_waits(runner, ours) == "none"
    assert train_speed.host_waits(runner, official) >= 1  # the counter counts


def test_all_rows_of_the_training_benchmark_compute_the_same():
    runner = train_speed.Runner(SIZES, 4, CPU)
    rows = [row for row in train_speed.rows_for(CPU) if row.compiled is None]
    rows.append(train_speed.Row("checkpointed", grad_checkpoint=True))
    official, fused, bf16, checkpointed = (torch.tensor(train_speed.losses_of(runner, row, 20)) for row in rows)
    torch.testing.assert_close(fused, official, atol=0, rtol=1e-5)
    torch.testing.assert_close(checkpointed, fused, atol=0, rtol=1e-5)
    torch.testing.assert_close(bf16, official, atol=0, rtol=0.01)
    assert not torch.equal(bf16, official)
    assert official[-4:].mean() < official[:4].mean()


def test_compiled_runs_in_bf16_continue_to_the_same_bytes(tmp_path):
    flags = [*TINY, "--depth", 1, "--compile", "--precision", "bf16", "--grad-checkpoint"]
    flags += ["--max-steps", 6, "--ckpt-every", 3]

    def train(folder):
        result = run("train.py", *flags, "--output-dir", tmp_path / folder)
        assert result.returncode == 0, result.stderr

    train("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    train("parts")
    assert "checkpoint-3, step 3" in (tmp_path / "parts" / "log.txt").read_text()
    for name in ("model.safetensors", "ema.pt"):
        whole, parts = ((tmp_path / folder / "checkpoint-6" / name).read_bytes() for folder in ("whole", "parts"))
        assert whole == parts
    whole, parts = ([line["loss"] for line in read_metrics(tmp_path / folder)] for folder in ("whole", "parts"))
    assert len(whole) == 6 and whole == parts


def test_compiled_gradients_do_not_depend_on_the_order_of_threads():
    """The gradients of many images of few classes are summed in the label embedding's table, by two threads."""
    torch.manual_seed(0)
    model = SiT(**dict(SIZES, depth=1)).train()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    compile_training(model, "one process")
    inputs = torch.randn(128, 4, 8, 8), torch.rand(128), torch.randint(0, 10, (128,)), torch.rand(128) < 0.1
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(8):
            model.zero_grad()
            model(*inputs).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    finally:
        torch.set_num_threads(threads)
    assert gradients[0][0].any()
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


def test_sample_ddp_in_bf16_compiled(digits_run, tmp_path):
    words = ["sample_ddp.py", "SDE", "--ckpt", digits_run, "--num-fid-samples", 20, "--num-sampling-steps", 4]
    words += ["--cfg-scale", 1.5, "--per-proc-batch-size", 8]
    for name, more in (("plain", []), ("fast", ["--precision", "bf16", "--compile"])):
        result = run(*words, *more, "--output", tmp_path / f"{name}.npz")
        assert result.returncode == 0, result.stderr
    plain, fast = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("plain", "fast"))
    difference = abs(plain - fast)
    assert 0 < difference.max() and difference.mean() < 1  # grey levels
    assert json.loads((tmp_path / "fast.npz.json").read_text())["precision"] == "bf16"
    result = run(*words, "--output", tmp_path / "fast.npz")
    assert result.returncode == 2 and "precision 'bf16', not 'fp32'" in result.stderr


def test_tf32_is_refused_without_a_gpu(digits_run):
    result = run("sample.py", "--ckpt", digits_run, "--precision", "tf32")
    assert result.returncode == 2 and "tf32 needs a CUDA GPU" in result.stderr


def test_background_work_is_done_in_order_and_its_errors_are_raised():
    done, thread = [], set()
    with background(CPU) as submit:
        for i in range(5):
            submit(lambda i=i: (done.append(i), thread.add(threading.current_thread())))
    assert done == [0, 1, 2, 3, 4] and threading.current_thread() not in thread
    with pytest.raises(FileNotFoundError), background(CPU) as submit:
        submit(lambda: open("/does/not/exist"))


def test_batches_on_a_cpu_are_those_of_the_loader():
    batches = [{"images": torch.full((2, 3), i), "y": torch.tensor([i, i]), "problems": [[], []]} for i in range(3)]
    originals = [dict(batch) for batch in batches]
    space = PixelSpace()
    on_device = list(batches_on_device((batch for batch in batches), space, CPU))
    for ours, theirs in zip(on_device, originals, strict=True):
        assert ours["moments"] is theirs["images"] and ours["y"] is theirs["y"] and "images" not in ours


def test_the_benchmarks_run_and_claim_nothing_of_gpus(tmp_path, monkeypatch, capsys):
    def benchmark(script, *words):
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, words)])
        script.main()
        return capsys.readouterr().out

    tiny = functools.partial(SiT, hidden_size=48, depth=2, num_heads=4, patch_size=2)
    monkeypatch.setitem(SiT_models, "SiT-tiny/2", tiny)
    small = ["--model", "SiT-tiny/2", "--image-size", 64, "--batch-size", 2, "--rounds", 1]
    text = benchmark(train_speed, *small, "--steps", 1, "--check-steps", 2, "--rows", 1, 2, "--json", tmp_path / "t")
    assert "on a GPU: not measured" in text
    rows = json.loads((tmp_path / "t").read_text())["rows"]
    names = list(rows)
    assert len(rows) == 3 and rows[names[0]]["ratio"] == 1 and rows[names[1]]["host_waits"] == "none"
    assert rows[names[0]]["mfu"] is None and all(row["loss_difference"] < 0.01 for row in rows.values())
    text = benchmark(sample_speed, *small, "--rows", 1, 2, 4, "--json", tmp_path / "s")
    assert "on a GPU: not measured" in text
    official, plain, bf16, interval = json.loads((tmp_path / "s").read_text())["rows"].values()
    assert plain["difference"] < 1e-4 and 1e-4 < bf16["difference"] < 0.05 and interval["difference"] is None


@pytest.mark.skipif(not measuring.CLEAR_REFS.exists(), reason="resetting the peak needs Linux")
def test_peak_memory_can_be_reset():
    big = torch.ones(1 << 26)  # 256 MiB
    del big
    measuring.reset_peak_memory(CPU)
    before = measuring.peak_memory(CPU)
    big = torch.ones(1 << 26)
    assert measuring.peak_memory(CPU) - before > 200 * 2**20 and big.all()


@pytest.mark.parametrize("precision, grad_checkpoint", [("fp32", False), ("bf16", False), ("bf16", True)])
def test_estimated_memory_is_that_of_the_tensors(precision, grad_checkpoint):
    """Most of it is activations here, which one process frees while it computes gradients; the estimate adds both."""
    with measuring.PeakOfTensors(CPU) as counted:
        big = torch.ones(1 << 20)
        del big
        torch.ones(1 << 18)
    assert counted.bytes == pytest.approx(4 << 20, rel=0.01)
    config = dict(SIZES, depth=6, patch_size=2)
    with measuring.PeakOfTensors(CPU) as peak:
        memory.train(CPU, config, 512, precision, grad_checkpoint)
    estimate = sum(costs.training_memory(config, 512, precision, grad_checkpoint, shards=1, device=CPU).values())
    assert 0.9 < peak.bytes / estimate < 1.1


def test_sampling_takes_no_more_memory_for_more_steps(tmp_path):
    """The peak of a whole process, in which 250 states of 2 MiB would be more than all the rest if they were kept."""
    script = tmp_path / "peak.py"
    script.write_text(
        "import measuring, torch\n"
        "from transport import Sampler, create_transport\n"
        "for num_steps in (10, 250):\n"
        "    sample = Sampler(create_transport()).sample_sde(num_steps=num_steps, diffusion_form='sigma')\n"
        "    sample(torch.randn(512, 4, 16, 16), lambda x, t: x)\n"
        "    print(measuring.peak_memory(torch.device('cpu')))\n"
    )
    # As for a benchmark that is run from another folder: `measuring` puts the repository on the import path.
    options = dict(env={"PYTHONPATH": str(ROOT / "benchmarks"), "PATH": "/usr/bin:/bin"}, cwd=tmp_path)
    output = subprocess.run([sys.executable, script], **options, capture_output=True, check=True, text=True).stdout
    peak, peak_of_more_steps = map(int, output.split())
    assert peak_of_more_steps < 1.05 * peak
