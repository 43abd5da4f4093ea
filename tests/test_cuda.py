"""What runs on a CUDA GPU alone: streams, pinned memory, CUDA graphs, TF32, steps without waits; and as on a CPU.

`bash benchmarks/gpu.sh` begins with these tests; those that compile or start processes stand last."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import measuring
import memory
import numpy as np
import pytest
import torch
from conftest import TINY, load_golden
from processes import ROOT

from data import loader
from models import BLOCKS, SiT
from sampling.draw import GuidedModel, ImageNoise, SampleSettings, draw
from sampling.flags import ODE_DEFAULTS, SDE_DEFAULTS
from sampling.pipeline import Pipeline
from sampling.shards import background
from training import costs, log
from training.alignment import Alignment
from training.losses import DirectionLoss, InnerHead, build_losses
from training.muon import orthogonalize
from training.resume import FiniteCheck
from training.step import EMA, PowerEMA, Trainer, batches_on_device, draw_randomness
from transport import create_transport
from utils import checkpoint, distributed, posthoc
from utils.precision import autocast, compile_training, prepare_inference, resolve_precision, without_tf32
from vae import LatentSpace, PixelSpace

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PRECISIONS = ["fp32", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])]
SIZES = dict(input_size=8, in_channels=4, hidden_size=64, depth=3, num_heads=4, num_classes=10)
OPTIONS = {"plain": {}, "modern": BLOCKS["modern"]}
ROUTE, FEATURES, BATCH, LR = (1, 2, 0.5), 24, 8, 1e-3
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `deterministic`; read when the first product is made


@pytest.fixture(autouse=True)
def full_precision():
    resolve_precision("fp32", GPU, on_gpu="fp32")
    torch.manual_seed(0)
    yield
    resolve_precision("fp32", GPU, on_gpu="fp32")


@contextlib.contextmanager
def waits_are_errors():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def deterministic():
    """Context in which the gradient of attention, too, is summed in one order."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_model(**options):
    """A model on the CPU whose weights are random, also where training starts from zeros."""
    torch.manual_seed(0)
    model = SiT(**SIZES | options)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_trainer(device=GPU, precision="fp32", muon=False, folder=None, everything=False, **options):
    """A trainer that starts from random weights or a checkpoint; with `everything`, of all recipes together."""
    options |= {"inner_head": 2} if everything else {}
    with torch.device("meta"):
        model = SiT(**SIZES | options)
    transport = create_transport()
    builders = [
        functools.partial(InnerHead, transport=transport),
        lambda model: DirectionLoss(transport, 1.0),
        lambda model: Alignment(model, FEATURES, block=2, width=32, route=ROUTE),
    ]
    losses = build_losses(
        [lambda model, build=build: build(model) for build in builders] if everything else [], model, 0
    )
    emas = [EMA("ema", 0.9), *(PowerEMA(name, length) for name, length in posthoc.TRACKED.items())]
    how = "one process", None, dict(lr=LR, weight_decay=0.01, muon=muon), ROUTE if everything else None
    trainer = Trainer(model, transport, device, precision, emas, losses, *how)
    trainer.start(None if folder else random_model(**options).state_dict(), folder)
    return trainer


def draws(number, device):
    """Batch, x1, t, x0, drop and kept of a step, the same on all devices."""
    g = torch.Generator().manual_seed(number)
    x1, x0 = torch.randn(2, BATCH, 4, 8, 8, generator=g)
    t, drop = torch.rand(2, BATCH, generator=g)
    kept = torch.rand(BATCH, 16, generator=g).argsort(dim=1)[:, :8].sort(dim=1).values
    batch = {"y": torch.arange(BATCH), "features": torch.randn(BATCH, 16, FEATURES, generator=g)}
    batch, *rest = {key: value.to(device) for key, value in batch.items()}, x1, t, x0, drop < 0.3, kept
    return batch, *(value.to(device) for value in rest)


def make_step(trainer, number, **changes):
    """Make a step. Return its main losses, those of the others, the gradient's norm and whether it was left out."""
    *arguments, kept = draws(number, trainer.device)
    arguments[1] = changes.get("x1", arguments[1])
    losses, others = trainer.forward_backward(*arguments, None if trainer.route is None else kept, number)
    return losses, others, *trainer.update(number, losses.mean(), LR)


def everything_in(trainer):
    """Copies of weights, EMAs and optimizer state: [(name, tensor)]."""
    modules = {"model": trainer.model, **trainer.ema_modules}
    named = [(f"{name}.{key}", value) for name, module in modules.items() for key, value in module.state_dict().items()]
    states = trainer.optimizer.state_dict()["state"].items()
    named += [(f"{number}.{key}", value) for number, state in states for key, value in sorted(state.items())]
    return [(name, value.clone()) for name, value in sorted(named, key=lambda pair: pair[0])]


def assert_same_bytes(ours, theirs):
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [name for (name, a), (_, b) in zip(ours, theirs, strict=True) if not torch.equal(a, b)] == []


def make_pipeline(device=GPU, **options):
    model = random_model(**options).to(device).eval().requires_grad_(False)
    return Pipeline(model, create_transport(), PixelSpace(), device, guided_channels=None)


def drawn(pipeline, settings, count=5, batch_size=64):
    return draw(pipeline, list(range(count)), settings, show_progress=False, batch_size=batch_size)[0].cpu()


@functools.cache
def why_no_compilation():
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=GPU))
    except Exception as error:  # of many kinds: no compiler, no Triton, an old GPU
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def needs_compilation():
    if why_no_compilation():
        pytest.skip(f"torch.compile does not work here: {why_no_compilation()}")


def test_float32_products_use_tf32_where_it_was_chosen():
    if torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip("this GPU has no TF32")
    x, eye = torch.full((256, 256), 1 + 2.0**-12, device=GPU), torch.eye(256, device=GPU)  # TF32 has 10 bits beyond 1

    def errors():
        convolved = torch.nn.functional.conv2d(x.reshape(1, 256, 16, 16), eye[:, :, None, None])
        return float((x @ eye - x).abs().max()), float((convolved.reshape(256, 256) - x).abs().max())

    assert max(errors()) < 2**-20
    for precision in ("tf32", "bf16"):
        resolve_precision(precision, GPU, on_gpu="fp32")
        product, convolution = errors()
        assert product == 2**-12 and convolution <= 2**-12
        with without_tf32():
            assert max(errors()) < 2**-20
        assert errors()[0] == 2**-12


@pytest.mark.parametrize("precision, most", [("fp32", 1e-5), ("tf32", 2**-8), ("bf16", 2**-6)])
def test_the_golden_values_come_out_on_a_gpu(precision, most):
    if precision == "bf16" and "bf16" not in PRECISIONS:
        pytest.skip("this GPU has no bf16")
    golden = load_golden("model.npz")
    model = SiT(**json.loads(golden["meta"])["config"]).eval().requires_grad_(False)
    weights = {key: value for key, value in golden.items() if key.startswith("state_dict/")}
    model.load_state_dict({key.removeprefix("state_dict/"): value for key, value in weights.items()})
    resolve_precision(precision, GPU, on_gpu="fp32")
    prepare_inference(model.to(GPU), GPU, precision, compiled=False)
    assert model.blocks[0].attn.fused_attn
    with autocast(GPU, precision):
        output = model(*(golden[key].to(GPU) for key in ("x", "t", "y")))
    error = (output.float().cpu() - golden["forward"]).norm() / golden["forward"].norm()
    assert error < most


@pytest.mark.parametrize("options", OPTIONS)
def test_losses_and_gradients_are_those_of_a_cpu(options):
    results = []
    for device in (CPU, GPU):
        trainer = make_trainer(device, everything=True, **OPTIONS[options])
        *arguments, kept = draws(0, device)
        losses, others = trainer.forward_backward(*arguments, kept)
        gradients = {name: p.grad.cpu() for name, p in trainer.model.named_parameters() if p.grad is not None}
        results.append(({"main": losses.cpu()} | {name: loss.cpu() for name, loss in others.items()}, gradients))
    (losses, gradients), (losses_on_gpu, gradients_on_gpu) = results
    assert len(losses) == 4 and gradients.keys() == gradients_on_gpu.keys()
    torch.testing.assert_close(losses_on_gpu, losses, atol=1e-5, rtol=1e-4)
    largest = max(gradient.norm() for gradient in gradients.values())
    far = {
        name: float((gradients_on_gpu[name] - g).norm() / (g.norm() + 1e-3 * largest)) for name, g in gradients.items()
    }
    assert max(far.values()) < 1e-3, max(far, key=far.get)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_twenty_steps_have_the_losses_of_a_cpu_in_float32(precision):
    curves = []
    for device, name in ((CPU, "fp32"), (GPU, precision)):
        trainer = make_trainer(device, name)
        curves.append(torch.stack([make_step(trainer, number)[0].mean().cpu() for number in range(20)]))
    torch.testing.assert_close(curves[1], curves[0], atol=0, rtol=1e-4 if precision == "fp32" else 0.02)


def test_random_numbers_belong_to_places_and_noise_to_images():
    whole = draw_randomness(3, 5, 8, slice(None), (4, 8, 8), GPU)
    part = draw_randomness(3, 5, 8, slice(2, 4), (4, 8, 8), GPU)
    assert all(a.is_cuda and torch.equal(a[2:4], b) for a, b in zip(whole, part, strict=True))
    ours, theirs = (ImageNoise(0, range(4), device) for device in (GPU, CPU))
    for _ in range(3):  # the pinned memory of a draw may be used again
        assert torch.equal(ours.draw((4, 64, 64)).cpu(), theirs.draw((4, 64, 64)))


@pytest.mark.parametrize("method", ["ab2", "dopri5", "Euler", "dpmpp_2m_sde"])
def test_samples_are_those_of_a_cpu(method):
    if method == "dopri5":
        pytest.importorskip("torchdiffeq")
    mode, solver = ("SDE", SDE_DEFAULTS) if method in ("Euler", "dpmpp_2m_sde") else ("ODE", ODE_DEFAULTS)
    settings = SampleSettings(mode, solver | {"sampling_method": method, "num_steps": 10}, cfg_scale=1.5)
    on_cpu, on_gpu = (drawn(make_pipeline(device), settings) for device in (CPU, GPU))
    assert (on_gpu - on_cpu).norm() / on_cpu.norm() < (1e-2 if method == "dopri5" else 1e-4)  # its steps may differ


def test_a_solve_does_not_wait_for_the_gpu():
    pipeline, y = make_pipeline(), torch.arange(4, device=GPU)
    settings = SampleSettings("SDE", SDE_DEFAULTS | {"num_steps": 6}, cfg_scale=1.5)
    noise, bar = ImageNoise(0, range(4), GPU), contextlib.nullcontext()
    bar.update = lambda: None
    model = GuidedModel(pipeline, settings.rule(None), 4, bar)
    sample, x = settings.sampler(pipeline.transport, noise), noise.draw((4, 8, 8))
    sample(x, model, y=y)
    with waits_are_errors():
        sample(x, model, y=y)


def endless_batches():
    """Batches of cached latents as `make_loader` gives them, in pinned memory."""
    for number in itertools.count():
        g = torch.Generator().manual_seed(number)
        moments, features = torch.rand(BATCH, 2, 4, 8, 8, generator=g), torch.rand(BATCH, 16, FEATURES, generator=g)
        batch = {"moments": moments, "features": features.half(), "y": torch.arange(BATCH)}
        yield {key: value.pin_memory() for key, value in batch.items()} | {"problems": [[]] * BATCH}


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_of_training_waits_for_the_gpu(options, precision, muon):
    """All of train.py's step, with every recipe, clipping, and latents that are scaled channel by channel."""
    trainer = make_trainer(GPU, precision, muon, everything=True, **OPTIONS[options])
    space = LatentSpace("ema", GPU, scale=[0.2, 0.3, 0.4, 0.5], shift=[0.0, 0.1, 0.2, 0.3])
    batches = batches_on_device(endless_batches(), space, GPU)
    metrics, finite = log.Metrics(GPU), FiniteCheck(GPU, 10, 0, 0, print)

    def step(number):
        where = 0, number, BATCH, slice(None)
        uniform, drop, x0, posterior_noise = draw_randomness(*where, trainer.model.latent_shape, GPU)
        kept, batch = trainer.draw_kept(*where), next(batches)
        x1, t = space.sample(batch["moments"], posterior_noise), trainer.transport.times(uniform)
        losses, others = trainer.forward_backward(batch, x1, t, x0, drop < 0.1, kept, number)
        metrics.mean_by_time("loss_by_time", losses, t)
        for name, value in ({"loss": losses} | others).items():
            metrics.mean(name, value)
        loss = losses.double().sum() / BATCH
        norm, bad = trainer.update(number, loss, LR, max_grad_norm=1.0)
        metrics.commit(bad)
        finite.push(number, torch.stack([loss, norm.to(loss)]), wait=False)

    for number in range(3):
        step(number)
    with waits_are_errors():
        for number in range(3, 6):
            step(number)
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device=GPU).item()
    assert metrics.take()["loss"] > 0


def test_numbers_are_read_one_step_late():
    reader, values = distributed.LateReader(GPU), [torch.tensor([i, i / 2], device=GPU) for i in (1.0, 2.0)]
    with waits_are_errors():
        assert reader.push(1, values[0]) == []
    assert reader.push(2, values[1]) == [(1, [1.0, 0.5])] and reader.flush() == [(2, [2.0, 1.0])]


def test_batches_are_copied_ahead_and_whole():
    """The host runs far ahead of the GPU here; memory that is used again too early would hold other numbers."""
    count, busy = 30, torch.randn(2048, 2048, device=GPU)

    def batches():
        for number in range(count + 1):  # the last is only copied
            images, y = torch.full((64, 4, 64, 64), float(number)), torch.full((64,), number)
            yield {"images": images.pin_memory(), "y": y.pin_memory(), "problems": [f"of {number}"]}

    class Doubled(PixelSpace):
        def moments(self, images, noise=None):
            assert torch.cuda.current_stream(GPU) != main
            return sum(itertools.repeat(images / 8, 16))  # work for the second stream

    main, found, problems = torch.cuda.current_stream(GPU), [], []
    for batch in batches_on_device(batches(), Doubled(), GPU):
        assert torch.cuda.current_stream(GPU) == main and "images" not in batch
        for _ in range(10):
            busy = torch.nn.functional.normalize(busy @ busy)
        found.append(torch.stack([batch["moments"].min(), batch["moments"].max(), 2.0 * batch["y"].max()]))
        problems += batch["problems"]
    expected = 2 * torch.arange(count).float()[:, None].expand(count, 3)
    assert torch.equal(torch.stack(found).cpu(), expected) and problems == [f"of {number}" for number in range(count)]


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return {"images": torch.full((4, 8, 8), float(key[0])), "y": key[0], "problems": []}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_pin_their_batches(num_workers):
    sampler = loader.GlobalBatchSampler(16, 4, 4, seed=0, rank=0, world_size=1, mirror=False)
    batches = loader.make_loader(Numbers(), sampler, num_workers, GPU)
    for batch in itertools.islice(batches, 5):
        assert batch["images"].is_pinned() and torch.equal(batch["images"][:, 0, 0, 0], batch["y"].float())
    batches.close()
    streamed = loader._one_ahead(({"y": torch.tensor([i]), "problems": [[]]} for i in itertools.count()), True)
    assert [(batch["y"].is_pinned(), int(batch["y"])) for batch in itertools.islice(streamed, 3)] == [
        (True, 0),
        (True, 1),
        (True, 2),
    ]


def test_background_work_waits_for_what_it_reads():
    main, done, eye = torch.cuda.current_stream(GPU), [], torch.eye(1024, device=GPU)

    def read(number, x):
        assert torch.cuda.current_stream(GPU) != main and threading.current_thread() is not threading.main_thread()
        done.append((number, float(x.min()), float(x.max())))

    with background(GPU) as submit:
        for number in range(8):
            x = torch.full((1024, 1024), float(number), device=GPU)
            for _ in range(30):
                x = x @ eye
            submit(read, number, x)
            del x
    assert done == [(number, number, number) for number in range(8)]


@pytest.mark.parametrize("muon", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(muon):
    trainer = make_trainer(muon=muon)
    for number in range(2):
        assert not make_step(trainer, number)[-1]

    def content():
        return [(name, value) for name, value in everything_in(trainer) if not name.startswith(("ema.", "power-"))]

    before = content()
    assert make_step(trainer, 2, x1=torch.full((BATCH, 4, 8, 8), torch.nan, device=GPU))[-1]
    assert_same_bytes(content(), before)
    make_step(trainer, 3)
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(content(), before, strict=True))


def test_muon_orthogonalises_in_bf16():
    u, _, v = torch.linalg.svd(torch.randn(3, 48, 64, dtype=torch.float64), full_matrices=False)
    matrices = u * torch.logspace(0, -2, 48, dtype=torch.float64) @ v
    result = orthogonalize(matrices.to(GPU, torch.bfloat16))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double().cpu(), orthogonalize(matrices), atol=0.1, rtol=0)


def test_muon_moves_weights_as_on_a_cpu():
    moved = []
    for device in (CPU, GPU):
        trainer = make_trainer(device, muon=True)
        before = copy.deepcopy(trainer.model.state_dict())
        make_step(trainer, 0)
        moved.append({key: (value - before[key]).cpu() for key, value in trainer.model.state_dict().items()})
    for key, ours in moved[1].items():
        similarity = torch.nn.functional.cosine_similarity(ours.flatten(), moved[0][key].flatten(), dim=0)
        # The products of matrices are bf16 here and float32 there: small singular values of the gradient are noise.
        assert not ours.any() or similarity > (0.85 if "blocks" in key and key.endswith("weight") else 0.99), key


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_checkpoint_is_of_its_moment_and_resumes_to_the_same_bytes(tmp_path, precision, muon):
    state = {"step": 3, "model": SIZES, "transport": {"path_type": "Linear", "prediction": "velocity"}}
    state |= {"latents": {"vae": "none"}}
    with deterministic():
        trainer = make_trainer(GPU, precision, muon)
        for number in range(3):
            make_step(trainer, number)
        saved, writer = everything_in(trainer), checkpoint.Writer(tmp_path)
        writer.save(3, **trainer.checkpointed(), state=state)
        for number in range(3, 8):
            make_step(trainer, number)  # while the checkpoint is being written
        assert writer.finish()
        resumed = make_trainer(GPU, precision, muon, tmp_path / "checkpoint-3")
        assert_same_bytes(everything_in(resumed), saved)
        assert all(value.is_cuda for _, value in everything_in(resumed))  # fused AdamW counts its steps there
        for number in range(3, 8):
            make_step(resumed, number)
        assert_same_bytes(everything_in(resumed), everything_in(trainer))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_estimated_memory_is_that_of_the_tensors(precision):
    config = measuring.model_config("SiT-S/2", 256)
    with measuring.PeakOfTensors(GPU) as peak:
        memory.train(GPU, config, 32, precision, grad_checkpoint=False)
    estimate = sum(costs.training_memory(config, 32, precision, False, shards=1, device=GPU).values())
    assert 0.75 < peak.bytes / estimate < 1.25


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_autoencoder_has_channels_last_and_computes_what_it_does_on_a_cpu(small_vae, dtype, most):
    pytest.importorskip("diffusers")
    images, (on_cpu, on_gpu) = torch.rand(3, 3, 32, 32) * 2 - 1, ([], [])
    folder = str(small_vae())
    for device, results, its in ((CPU, on_cpu, torch.float32), (GPU, on_gpu, dtype)):
        space = LatentSpace(folder, device, its)
        moments = space.moments(images.to(device))
        results += [moments, space.decode(space.sample(moments, torch.zeros_like(moments[:, 0])))]
    weight = space.load().encoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.dtype == dtype
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.dtype == torch.float32 and (ours.cpu() - theirs).norm() / theirs.norm() < most


def test_cuda_graphs_draw_what_the_network_does():
    """Guided, by the inner head, too, and with two batch sizes in a solve; the last batch is odd."""
    needs_compilation()
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    plain = SampleSettings("SDE", SDE_DEFAULTS | {"num_steps": 8}, cfg_scale=1.5)
    ways = [plain, dataclasses.replace(plain, internal_guidance=(1.4, 0.0, 1.0))]
    ways += [dataclasses.replace(plain, cfg_interval=(0.3, 0.8))]
    pipeline = make_pipeline(depth=2, inner_head=1)
    expected = [drawn(pipeline, way) for way in ways]
    pipeline.speed_up("fp32", compiled=True)
    for _ in range(2):  # the second time, no pass is recorded
        for way, images in zip(ways, expected, strict=True):
            assert (drawn(pipeline, way, batch_size=2) - images).norm() / images.norm() < 1e-4
    assert (drawn(pipeline, plain, batch_size=5) - expected[0]).norm() / expected[0].norm() < 1e-4
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped


def test_cuda_graphs_of_two_networks_do_not_overwrite_each_other():
    needs_compilation()
    pipeline = make_pipeline(depth=2)
    pipeline.guide = make_pipeline(depth=1, hidden_size=32)
    settings = SampleSettings("SDE", SDE_DEFAULTS | {"num_steps": 8}, cfg_scale=2.0)
    expected = drawn(pipeline, settings)
    pipeline.speed_up("fp32", compiled=True)
    for _ in range(2):
        images = drawn(pipeline, settings, batch_size=2)
        assert (images - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_compiled_model_trains_alike(precision):
    needs_compilation()
    curves = []
    for compiled in (False, True):
        trainer = make_trainer(GPU, precision, everything=True, **BLOCKS["modern"])
        if compiled:
            compile_training(trainer.model, "one process")
        curves.append(torch.stack([make_step(trainer, number)[0].mean() for number in range(6)]))
    torch.testing.assert_close(curves[1], curves[0], atol=0, rtol=1e-4 if precision == "fp32" else 0.02)


def train(folder, data, *more):
    """Start train.py with deterministic kernels."""
    code = "import runpy, sys, torch; torch.use_deterministic_algorithms(True); sys.argv = sys.argv[1:]"
    code = f"{code}; sys.path.insert(0, '.'); runpy.run_path('train.py', run_name='__main__')"
    flags = [*TINY, "--data-path", data, "--max-steps", 120, "--ckpt-every", 20, "--output-dir", folder, *more]
    words = [sys.executable, "-c", code, "train.py", *map(str, flags)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    data = tmp_path / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    np.savez(data, arr_0=pixels, arr_1=np.arange(64) % 10)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = [train(folder, data) for folder in (whole, killed)]
    while not (killed / "checkpoint-20").exists() and runs[1].poll() is None:
        time.sleep(0.02)
    assert runs[1].poll() is None, runs[1].stderr.read()
    runs[1].send_signal(signal.SIGKILL)
    runs[1].communicate()
    for run in (runs[0], train(killed, data)):
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert "continuing from" in (killed / "log.txt").read_text()
    for name in ("model.safetensors", "ema.pt"):
        ours, theirs = ((folder / "checkpoint-120" / name).read_bytes() for folder in (killed, whole))
        assert ours == theirs
