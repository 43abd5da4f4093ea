"""train.py from its command line to its files."""

import json
import math
import resource
import sys
import time
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, read_metrics
from PIL import Image
from processes import run, torchrun
from test_data import bad_folder, write_images

from data.images import ImageDataset
from data.sources import open_source
from evaluation import metrics
from models import SiT
from sampling.draw import SampleSettings, draw_labels, generate
from sampling.flags import ODE_DEFAULTS, SDE_DEFAULTS
from sampling.pipeline import load_pipeline
from training.log import LeftOut, Meter, Metrics, RunLog, TensorBoard
from training.losses import AuxiliaryLoss, build_losses
from training.step import (
    EMA,
    Trainer,
    build_optimizer,
    check_emas,
    draw_randomness,
    learning_rate,
    step_optimizers,
    update_ema,
)
from transport import create_transport
from utils import checkpoint
from utils.grids import to_uint8
from utils.weights import load_weights


def test_the_files_of_a_run(digits_run):
    assert {path.name for path in digits_run.iterdir()} == {
        "checkpoint-3",
        "checkpoint-6",
        ".lock",
        "evaluations.jsonl",
        "log.txt",
        "metrics.jsonl",
        "samples",
    }
    metrics = read_metrics(digits_run)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["samples_seen"] for line in metrics] == [16 * step for step in range(1, 7)]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["images_per_second"] > 0 for line in metrics)
    # A new model predicts 0, and the mean square of x1 - x0 is 1 + that of the digits.
    assert metrics[0]["loss"] == pytest.approx(1.72, abs=0.2)
    log = (digits_run / "log.txt").read_text()
    assert (
        "16 images = micro-batch 16 x 1 ranks x 1 gradient accumulation steps" in log and "(step=0000006) loss" in log
    )
    grid = np.asarray(Image.open(digits_run / "samples" / "0000006.png"))
    assert grid.shape == (2 * 66 + 2, 10 * 66 + 2, 3) and grid.std() > 10


def test_trainer_state_says_how_to_build_everything_again(digits_run):
    state = json.loads((digits_run / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["step"] == 6 and state["samples_seen"] == 96 and state["epoch"] == pytest.approx(96 / 1797)
    assert state["seed"] == 0 and state["args"]["lr"] == 1e-3 and state["versions"]["torch"] == torch.__version__
    assert state["latents"] == {"vae": "none", "image_size": 8, "channels": 1}
    model = SiT(**state["model"])
    model.load_state_dict(load_weights(digits_run).state_dict)


def test_weights_train_and_the_ema_follows(digits_run):
    states = [load_weights(digits_run / f"checkpoint-6/{name}").state_dict for name in ("model.safetensors", "ema.pt")]
    earlier = load_weights(digits_run / "checkpoint-3/ema.pt").state_dict
    key = "final_layer.linear.weight"
    assert states[0][key].norm() > states[1][key].norm() > earlier[key].norm() > 0
    assert torch.equal(states[0]["pos_embed"], states[1]["pos_embed"])


def test_learning_rate_weight_decay_and_ema_are_those_of_the_flags(tmp_path):
    """Adam's first step has size lr for every weight with a gradient; weight decay shrinks the others; EMA follows."""
    flags = ["--max-steps", 1, "--lr", 0.01, "--weight-decay", 0.5, "--ema-decay", 0.75, "--no-ema-warmup"]
    losses(tmp_path, *flags, steps=1)
    trained, ema = (
        load_weights(tmp_path / "checkpoint-1" / name).state_dict for name in ("model.safetensors", "ema.pt")
    )
    torch.manual_seed(0)
    initial = SiT(**checkpoint.read_state(tmp_path / "checkpoint-1")["model"]).state_dict()
    key = "final_layer.linear.weight"  # zero at first, so nothing decays, and the only layer with a gradient
    used = trained[key] != 0
    torch.testing.assert_close(trained[key][used].abs(), torch.full_like(trained[key][used], 0.01), rtol=1e-3, atol=0)
    key = "blocks.0.attn.qkv.weight"  # behind closed gates: no gradient, so the decay is all that happens
    torch.testing.assert_close(trained[key], initial[key] * (1 - 0.01 * 0.5))
    for key in trained:
        torch.testing.assert_close(ema[key], 0.75 * initial[key] + 0.25 * trained[key])


def test_ema_is_the_recursion_of_its_definition():
    ema, parameters = [torch.randn(2, 2), torch.randn(3)], [torch.randn(2, 2), torch.randn(3)]
    expected = [0.9 * a + 0.1 * p for a, p in zip(ema, parameters, strict=True)]
    update_ema(ema, parameters, 0.9)
    torch.testing.assert_close(ema, expected)


def test_a_young_ema_forgets_faster():
    ema = EMA("ema", 0.9999)
    assert [ema.decay_at(step) for step in (0, 8)] == [2 / 11, 10 / 19]
    assert ema.decay_at(10**6) == EMA("ema", 0.9999, warmup=False).decay_at(0) == 0.9999


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 30, 2.0, 10, "cosine") for step in (0, 4, 9, 10, 20, 30)]
    np.testing.assert_allclose(rates, [0.2, 1.0, 2.0, 2.0, 1.0, 0.0], atol=1e-12)
    assert learning_rate(500, 1000, 2.0, 10, "constant") == 2.0


def test_what_is_random_belongs_to_the_place_in_the_global_batch():
    def draw(step, start, end, seed=0):
        return draw_randomness(seed, step, 16, slice(start, end), (1, 8, 8), torch.device("cpu"))

    whole = draw(3, 0, 16)
    for part, tensor in zip(draw(3, 4, 9), whole, strict=True):
        assert torch.equal(part, tensor[4:9])
    for other in (draw(4, 0, 16), draw(3, 0, 16, seed=1)):
        assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    uniform, drop, x0, posterior = whole
    assert not torch.equal(uniform, drop) and not torch.equal(x0, posterior)


@pytest.fixture(scope="module")
def loss_curve_of_one_process(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("one"))


def losses(folder, *arguments, processes=1, steps=12):
    """The loss of each step of a tiny model on the digits."""
    result = run("train.py", *TINY, "--max-steps", steps, "--output-dir", folder, *arguments, processes=processes)
    assert result.returncode == 0, result.stderr
    return [line["loss"] for line in read_metrics(folder)]


@pytest.mark.parametrize(
    "arguments, processes",
    [(["--micro-batch-size", 4], 1), ([], 2), (["--micro-batch-size", 2, "--num-workers", 1], 2)],
)
def test_ranks_and_accumulation_do_not_change_the_loss_curve(arguments, processes, tmp_path, loss_curve_of_one_process):
    curve = losses(tmp_path, *arguments, processes=processes)
    assert len(curve) == 12 and len(set(curve)) == 12
    # The order of sums alone differs. A label dropped elsewhere shows as 1e-4 in so short a run.
    np.testing.assert_allclose(curve, loss_curve_of_one_process, atol=1e-5)


def test_torchrun_itself(tmp_path, loss_curve_of_one_process):
    result = torchrun("train.py", *TINY, "--max-steps", 3, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    curve = [line["loss"] for line in read_metrics(tmp_path)]
    np.testing.assert_allclose(curve, loss_curve_of_one_process[:3], atol=1e-5)


def test_the_seed_changes_the_loss_curve(tmp_path, loss_curve_of_one_process):
    curve = losses(tmp_path, "--global-seed", 1)
    assert np.abs(np.subtract(curve, loss_curve_of_one_process)).min() > 1e-4


@pytest.mark.parametrize("path_type, prediction", [("GVP", "noise"), ("VP", "score")])
def test_images_in_class_folders_through_an_autoencoder(path_type, prediction, small_vae, tmp_path):
    """Training, a grid and sampling on colour images, with a VAE that the test makes."""
    images = write_images(tmp_path / "images", {"cat": [(20, 17)] * 5, "dog": [(16, 40)] * 4, "fox": [(16, 16)] * 3})
    arguments = [*TINY, "--data-path", images, "--vae", small_vae(), "--image-size", 16, "--max-steps", 2]
    arguments += ["--path-type", path_type, "--prediction", prediction, "--sample-every", 2]
    result = run("train.py", *arguments, "--results-dir", tmp_path / "results")
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name == f"000-SiT-S-2-{path_type}-{prediction}-None"
    assert Image.open(folder / "samples" / "0000002.png").size == (3 * 66 + 2, 2 * 66 + 2)
    state = checkpoint.read_state(folder / "checkpoint-2")
    assert state["model"]["num_classes"] == 3 and state["model"]["in_channels"] == 4
    result = run("sample.py", "SDE", "--ckpt", folder, "--num-sampling-steps", 5, "--output", tmp_path / "grid.png")
    assert result.returncode == 0, result.stderr
    assert "SDE Euler, 5 NFE (10 forward passes), guidance 4 on 4 of 4 channels" in result.stdout
    # The same weights start another run, in a folder numbered after the first.
    result = run("train.py", *arguments, "--results-dir", tmp_path / "results", "--init-from", folder)
    assert result.returncode == 0, result.stderr
    assert {path.name[:3] for path in (tmp_path / "results").iterdir()} == {"000", "001"}


def test_bad_images_stop_the_run_or_are_counted(tmp_path):
    images = bad_folder(tmp_path / "images")
    arguments = [*TINY, "--data-path", images, "--image-size", 8, "--max-steps", 2, "--num-workers", 1]
    result = run("train.py", *arguments, "--output-dir", tmp_path / "stopped")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "the image cannot be read" in result.stderr and "--skip-bad-images" in result.stderr
    result = run("train.py", *arguments, "--output-dir", tmp_path / "skipped", "--skip-bad-images")
    assert result.returncode == 0, result.stderr
    # 32 examples of 7: each bad one four or five times.
    assert 8 <= read_metrics(tmp_path / "skipped")[-1]["bad_images"] <= 10
    log = (tmp_path / "skipped" / "log.txt").read_text()
    assert "left out" in log and "a/1.png" in log and "b/2.png" in log


def test_training_on_a_stream_for_any_number_of_ranks(tmp_path):
    import datasets

    digits = open_source("digits").examples[:50]
    features = datasets.Features({"img": datasets.Image(), "digit": datasets.Value("int64")})
    columns = {"img": [image for image, _ in digits], "digit": [label for _, label in digits]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "digits.parquet")
    path = ["--data-path", tmp_path / "digits.parquet", "--image-key", "img", "--label-key", "digit", "--streaming"]
    result = run("train.py", *TINY, *path, "--max-steps", 2, "--output-dir", tmp_path / "no")
    assert result.returncode == 2 and "--num-classes is missing" in result.stderr
    curves = [
        losses(tmp_path / str(n), *path, "--num-classes", 10, "--image-size", 8, processes=n, steps=4) for n in (1, 2)
    ]
    np.testing.assert_allclose(*curves, atol=1e-5)


def test_training_from_given_weights_starts_where_they_are(digits_run, tmp_path, loss_curve_of_one_process):
    first = losses(tmp_path, "--ckpt", digits_run)[0]
    # The same batch, noise and times as a new model's first step, so the six steps of the weights show.
    assert first < loss_curve_of_one_process[0] - 0.005


def test_weights_of_other_classes_and_sizes_start_a_run(digits_run, small_vae, tmp_path):
    """--init-from keeps all that does not depend on the classes; a position embedding is a function of the size."""
    images = write_images(tmp_path / "images", {"cat": [(16, 16)] * 8, "dog": [(16, 16)] * 8})
    flags = [*TINY, "--data-path", images, "--vae", small_vae(latent_channels=1), "--image-size", 32, "--max-steps", 1]
    result = run("train.py", *flags, "--lr", 1e-9, "--output-dir", tmp_path / "run", "--init-from", digits_run)
    assert result.returncode == 0, result.stderr
    assert "y_embedder.embedding_table.weight is (11, 32) in the weights and (3, 32) here" in result.stdout
    assert "pos_embed is (1, 16, 32) in the weights and (1, 64, 32) here" in result.stdout
    before = load_weights(digits_run).state_dict
    after = load_weights(tmp_path / "run" / "checkpoint-1" / "model.safetensors").state_dict
    for key in before.keys() - {"pos_embed", "y_embedder.embedding_table.weight"}:
        torch.testing.assert_close(after[key], before[key], atol=1e-6, rtol=0)


def test_bf16_follows_fp32(tmp_path, loss_curve_of_one_process):
    curve = losses(tmp_path, "--precision", "bf16")
    difference = np.abs(np.subtract(curve, loss_curve_of_one_process))
    assert 0 < difference.max() < 0.02  # of about 1.6
    weights = safetensors.torch.load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    key = "blocks.0.mlp.fc1.weight"  # master weights: rounding to bf16 would have lost most of what 12 steps changed
    assert not torch.equal(weights[key], weights[key].bfloat16().float())


def test_checkpointed_activations_change_nothing(tmp_path, loss_curve_of_one_process):
    np.testing.assert_allclose(losses(tmp_path, "--grad-checkpoint"), loss_curve_of_one_process, atol=1e-6)


def test_compiled_training_has_the_same_losses(tmp_path, loss_curve_of_one_process):
    np.testing.assert_allclose(losses(tmp_path, "--compile", steps=6), loss_curve_of_one_process[:6], atol=1e-3)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize(
    "path_type, prediction, weight",
    [("Linear", "velocity", None), ("GVP", "noise", "velocity"), ("VP", "score", "likelihood")],
)
def test_model_and_loss_are_one_graph(path_type, prediction, weight, grad_checkpoint):
    model = SiT(input_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=4, num_classes=10)
    model.grad_checkpoint = grad_checkpoint
    transport = create_transport(path_type, prediction, weight)

    def loss(x1, t, x0, y, drop):
        kwargs = dict(y=y, force_drop_ids=drop)
        return transport.training_losses(model, x1, kwargs, t=t, x0=x0)["loss"].mean()

    torch.manual_seed(0)
    x1, x0 = torch.randn(2, 4, 1, 8, 8)
    arguments = x1, torch.rand(4), x0, torch.randint(0, 10, (4,)), torch.rand(4) < 0.5
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(loss)(*arguments)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0), explanation.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")  # a graph break would be an error
    torch.testing.assert_close(compiled(*arguments), loss(*arguments))


def test_gradients_are_scaled_to_the_norm(tmp_path):
    """Adam does not see a constant factor, but its second moment does: norm^2 (1 - beta2) after a step."""
    losses(tmp_path, "--max-grad-norm", 0.01, steps=1)
    norm = read_metrics(tmp_path)[0]["gradient_norm"]
    assert norm > 1  # the log has it as it was
    optimizer = torch.distributed.checkpoint.FileSystemReader(tmp_path / "checkpoint-1" / "optimizer")
    keys = [key for key in optimizer.read_metadata().state_dict_metadata if key.endswith(".exp_avg_sq")]
    state = {key: torch.empty(optimizer.read_metadata().state_dict_metadata[key].size) for key in keys}
    torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path / "checkpoint-1" / "optimizer", no_dist=True)
    total = sum(value.double().sum().item() for value in state.values())
    assert total == pytest.approx(0.01**2 * 0.001, rel=1e-3)


def test_the_loss_by_time_is_a_part_of_the_loss(tmp_path):
    result = run("train.py", *TINY, "--max-steps", 5, "--log-every", 5, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = read_metrics(tmp_path)
    uniform = torch.cat(
        [draw_randomness(0, step, 16, slice(0, 16), (1, 8, 8), torch.device("cpu"))[0] for step in range(5)]
    )
    shares = torch.histc(uniform, 10, 0, 1) / 80
    expected = sum(share.item() * value for share, value in zip(shares, line["loss_by_time"], strict=True) if share)
    assert expected == pytest.approx(line["loss"], rel=1e-5)
    assert line["memory_gib"] > 0 and line["mfu"] is None


@pytest.mark.parametrize(
    "processes, parallel, method, num_steps",
    [(1, "ddp", None, 26), (2, "ddp", "unipc", 9), (2, "fsdp", "dpmpp_2m_sde", 9)],
)
def test_samples_are_evaluated_during_training_by_all_ranks(processes, parallel, method, num_steps, tmp_path):
    """An untrained model draws nearly noise: far from the digits, and as far for any number of ranks."""
    flags = ["--eval-every", 2, "--eval-samples", 101, "--max-steps", 4, "--parallel", parallel]
    flags += ["--eval-sampling-method", method, "--eval-num-sampling-steps", num_steps] if method else []
    result = run("train.py", *TINY, *flags, "--output-dir", tmp_path, processes=processes)
    assert result.returncode == 0, result.stderr
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [2, 4]
    dataset = ImageDataset(open_source("digits"), 8, 1)
    real = torch.stack([dataset[i, False]["images"] for i in range(1797)])
    pixels = to_uint8(real).flatten(1).numpy() / 255
    pipeline = load_pipeline(tmp_path, torch.device("cpu"))
    labels = draw_labels(101, 10, 0, balanced=False).tolist()
    mode, solver = ("SDE", SDE_DEFAULTS) if method == "dpmpp_2m_sde" else ("ODE", ODE_DEFAULTS)
    solver = solver | dict(sampling_method=method or "heun2", num_steps=num_steps)
    images, _ = generate(pipeline, labels, SampleSettings(mode, solver))
    rows = images.flatten(1).numpy() / 255
    expected = metrics.frechet_distance(*metrics.moments(rows), *metrics.moments(pixels))
    assert evaluations[-1]["fd_pixels"] == pytest.approx(expected, rel=1e-3) and expected > 1


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path):
    flags = ["--data-path", "digits", "--vae", "none", "--dry-run", "--micro-batch-size", 64, "--grad-checkpoint"]
    result = run("train.py", *flags, "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "model: SiT-XL/2" in result.stdout and "lr: 0.0001" in result.stdout
    assert "673,671,176 parameters" in result.stdout
    assert "9,827 steps of 256 images = micro-batch 64 x 1 ranks x 4 gradient accumulation steps" in result.stdout
    assert "weights 2.51, gradients 2.51, optimizer 5.02, EMA 2.51" in result.stdout
    assert not (tmp_path / "run").exists()


def test_trackers_are_asked_for_by_name(capsys, monkeypatch, tmp_path):
    from test_command_line import fail

    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}[package], None)
        flags = [*TINY, "--max-steps", 1, f"--{package}", "--output-dir", tmp_path / "run"]
        assert f"--{package} needs the package {package}" in fail("train", flags, capsys, monkeypatch)
    assert not (tmp_path / "run").exists()


def test_metrics_and_grids_reach_the_trackers(tmp_path):
    """A stand-in that records its calls: neither tracker is among the requirements."""

    class Writer:
        def __init__(self, folder, purge_step):
            self.calls = [(str(folder), purge_step)]

        def add_scalar(self, *call):
            self.calls.append(call)

        def add_image(self, tag, picture, step, dataformats):
            self.calls.append((tag, picture.shape, step, dataformats))

        def close(self):
            self.calls.append("closed")

    tracker = TensorBoard(types.SimpleNamespace(SummaryWriter=Writer), tmp_path, 7, {})
    log = RunLog(tmp_path, 7, [tracker])
    metrics = dict(loss=1.5, gradient_norm=2.0, images_per_second=3.0, data_wait=0.1, mfu=None, bad_steps=0)
    log.metrics(metrics | dict(step=8, loss_by_time=[None, 0.5] + [None] * 8))
    log.grid(torch.zeros(6, 64, 64, 1, dtype=torch.uint8), 3, 8)
    log.close()
    calls = tracker.writer.calls
    assert calls[0] == (str(tmp_path / "tensorboard"), 8) and calls[-1] == "closed"
    assert (
        ("loss", 1.5, 8) in calls
        and ("loss_by_time/0.1", 0.5, 8) in calls
        and ("samples", (134, 200, 3), 8, "HWC") in calls
    )
    assert not any(entry[0] in ("mfu", "loss_by_time/0.0") for entry in calls)


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path, capsys):
    log = RunLog(tmp_path, 0, [])
    log.text.close()
    log.text = open("/dev/full", "a", buffering=1)
    log.line("one")
    log.line("two")
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n" and captured.err.count("cannot be written: No space left on device") == 1


def test_a_mean_is_over_all_values_of_the_window_and_leaves_bad_steps_out():
    good, bad = torch.tensor(False), torch.tensor(True)
    metrics = Metrics(torch.device("cpu"))
    for values, step in (([1.0, 2.0], good), ([100.0], bad), ([6.0], good)):
        metrics.mean("loss", torch.tensor(values))
        metrics.mean_by_time("by_time", torch.tensor(values), torch.tensor([0.0, 1.0][: len(values)]))
        metrics.commit(step)
    metrics.point("lr", torch.tensor(0.5))
    later = Metrics(torch.device("cpu"), json.loads(json.dumps(metrics.state())))  # as a checkpoint keeps it
    assert metrics.take() == {"loss": 3.0, "by_time": [3.5, *[None] * 8, 2.0], "lr": 0.5}
    later.mean("loss", 7)
    assert later.take() == {"loss": 4.0, "by_time": [3.5, *[None] * 8, 2.0]}
    assert later.take() == {}


def test_throughput_is_of_the_time_spent_on_training(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    config = dict(input_size=8, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=2)
    meter = Meter(config, torch.device("cpu"), "fp32")
    for kind, seconds in (("waiting", 2), ("paused", 30), ("waiting", 1)):
        with meter.timing(kind):
            clock[0] += seconds
    clock[0] += 7
    meter.add(80, step=0)
    taken = meter.take()
    assert (taken["images_per_second"], taken["data_wait"], taken["mfu"]) == (8.0, 0.3, None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    assert taken["memory_gib"] == pytest.approx(peak, rel=0.01)
    meter.peak, meter.flops_of = 1000.0, lambda losses: 20.0
    meter.add(100, step=1)
    clock[0] += 4
    taken = meter.take()
    assert (taken["images_per_second"], taken["data_wait"], taken["mfu"]) == (25.0, 0.0, 0.5)


def test_steps_of_losses_or_gradients_that_are_not_finite_are_left_out():
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(layer, lr=1.0)

    def step(gradient, loss=1.0, **more):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        norm, bad = step_optimizers([optimizer], torch.tensor(loss), 0.125, **more)
        assert all(parameter.grad is None for parameter in layer.parameters())
        return norm.item(), bad.item()

    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for gradient, loss in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)):
        assert step(gradient, loss)[1]
        assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    norm, bad = step(2.0)
    assert norm == pytest.approx(2 * 8**0.5) and not bad  # of 6 weights and 2 biases
    for a, b in zip(before, layer.parameters(), strict=True):
        torch.testing.assert_close(b, a - 0.125)
    # A gradient is made shorter, never longer: Adam's second moment shows by how much.
    moment = optimizer.state[layer.bias]["exp_avg_sq"]
    for most, size in ((1.0, 8**-0.5), (100.0, 2.0)):
        earlier = moment.clone()
        assert step(2.0, max_grad_norm=most)[0] == pytest.approx(2 * 8**0.5)
        torch.testing.assert_close(moment, 0.999 * earlier + 0.001 * size**2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("names", [("ema", "ema"), ("model",), ("a/b",), ("",), (".ema",)])
def test_names_of_emas_are_names_of_files(names):
    assert len(check_emas([EMA("ema", 0.9), EMA("ema-0.99", 0.99)])) == 2
    with pytest.raises(ValueError, match="EMAs must have different names"):
        check_emas([EMA(name, 0.9) for name in names])


def test_auxiliary_losses_have_different_names_and_read_blocks_that_exist():
    class Loss(AuxiliaryLoss):
        def __init__(self, model, name, *blocks):
            super().__init__()
            self.name, self.hidden_blocks, self.head = name, blocks, torch.nn.Linear(2, 2)

    model = SiT(hidden_size=4, depth=2, num_heads=1, num_classes=2)

    def build(*losses, seed=0):
        return build_losses([lambda model, loss=loss: Loss(model, *loss) for loss in losses], model, seed)

    state = torch.get_rng_state()
    first, again, other = (build(("a", 0, 1), ("b",), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)  # the images and the noise of a run do not change
    assert torch.equal(first[0].head.weight, again[0].head.weight)
    assert not torch.equal(first[0].head.weight, other[0].head.weight)
    for losses, message in (([("a",), ("a",)], "different names"), ([("a", 2)], "blocks"), ([("a", -1)], "blocks")):
        with pytest.raises(ValueError, match=message):
            build(*losses)


def test_what_is_left_out_is_counted_and_named_once():
    lines = []
    left_out = LeftOut(3, True, ["the folder a"])
    left_out.add(7, [[], ["image 1", "image 2"], []])
    left_out.report(lines.append)
    left_out.report(lines.append)
    assert left_out.count == 6 and len(lines) == 3
    assert "the folder a" in lines[0] and lines[1:] == [f"(step=0000007) left out image {i}" for i in (1, 2)]
    with pytest.raises(ValueError, match="image 1"):
        LeftOut(0, False, []).add(7, [["image 1"]])


class Shrink(AuxiliaryLoss):
    """Half of the mean square of the tokens after block 0 counts, beside the main loss."""

    name, weight, hidden_blocks = "shrink", 0.5, (0,)

    def forward(self, batch, t, xt, output, hidden):
        return hidden[0].square().mean((1, 2))


def test_gradients_of_micro_batches_add_up_to_that_of_the_mean_loss():
    sizes = dict(input_size=4, in_channels=1, hidden_size=8, depth=2, num_heads=2, num_classes=3, learn_sigma=False)
    with torch.device("meta"):
        model = SiT(**sizes)
    weights = {key: torch.randn(value.shape) * 0.3 for key, value in SiT(**sizes).state_dict().items()}
    transport, cpu = create_transport(), torch.device("cpu")
    emas = [EMA("ema", 0.75, warmup=False), EMA("young", 0.9)]
    trainer = Trainer(model, transport, cpu, "fp32", emas, [Shrink()], "one process", None, dict(lr=1.0))
    trainer.start(weights)
    x1, x0, t, y = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4), torch.rand(6), torch.tensor([0, 1, 2] * 2)
    drop = torch.tensor([True, False] * 3)
    reference = SiT(**sizes).train()
    reference.load_state_dict(weights)
    xt, ut = transport.path.interpolate(t, x0, x1)
    output, (hidden,) = reference(xt, t, y, drop, hidden_blocks=(0,))
    main, auxiliary = (output - ut).square().mean((1, 2, 3)), hidden.square().mean((1, 2))
    (main + 0.5 * auxiliary).mean().backward()
    losses = []
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        losses.append(trainer.forward_backward({"y": y[part]}, x1[part], t[part], x0[part], drop[part], accumulation=3))
    torch.testing.assert_close(torch.cat([loss for loss, _ in losses]), main.detach())
    torch.testing.assert_close(torch.cat([more["shrink"] for _, more in losses]), auxiliary.detach())
    for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, msg=name)
    trainer.update(8, main.mean(), 0.5)
    key = "final_layer.linear.bias"
    new = model.state_dict()[key]
    torch.testing.assert_close((new - weights[key])[:4].abs(), torch.full((4,), 0.5), rtol=1e-3, atol=0)
    for name, decay in (("ema", 0.75), ("young", 10 / 19)):
        expected = decay * weights[key] + (1 - decay) * new
        torch.testing.assert_close(trainer.ema_modules[name].state_dict()[key], expected)


def test_every_grid_of_a_run_is_written(tmp_path):
    log = RunLog(tmp_path, 0, [])
    for step in (1, 2):
        log.grid(torch.zeros(1, 8, 8, 1, dtype=torch.uint8), 1, step)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"0000001.png", "0000002.png"}
    log.close()


def test_a_line_of_an_evaluation_says_what_is_not_comparable(tmp_path, capsys):
    log = RunLog(tmp_path, 0, [])
    log.evaluation(5, {"fid": 1.25, "n_samples": 8, "caveats": ["8 samples, not 50000"]})
    log.evaluation(6, {"fid": 2.5, "n_samples": 9, "caveats": []})
    log.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("(step=0000005) fid 1.2500 of 8 samples; not comparable")
    assert first.endswith(": 8 samples, not 50000") and second == "(step=0000006) fid 2.5000 of 9 samples"
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["fid"], line["n_samples"]) for line in lines] == [(5, 1.25, 8), (6, 2.5, 9)]


def test_lines_of_steps_that_are_repeated_are_removed(tmp_path):
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
        (tmp_path / name).write_text("\n".join([*lines, '{"step": 2, "lo']))
    RunLog(tmp_path, 3, []).close()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2, 3]
