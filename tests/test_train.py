"""train.py from its command line to its files."""

import json
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY, read_metrics
from PIL import Image
from processes import run, torchrun
from test_data import bad_folder, write_images

import train
from data.images import ImageDataset
from data.sources import open_source
from evaluation import metrics
from models import SiT
from sampling.draw import SampleSettings, draw_labels, generate
from sampling.pipeline import load_pipeline
from training.log import RunLog, TensorBoard
from training.step import EMA, draw_randomness, learning_rate, update_ema
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


@pytest.mark.parametrize("processes, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_samples_are_evaluated_during_training_by_all_ranks(processes, parallel, tmp_path):
    """An untrained model draws nearly noise: far from the digits, and as far for any number of ranks."""
    flags = ["--eval-every", 2, "--eval-samples", 101, "--max-steps", 4, "--parallel", parallel]
    result = run("train.py", *TINY, *flags, "--output-dir", tmp_path, processes=processes)
    assert result.returncode == 0, result.stderr
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [2, 4]
    dataset = ImageDataset(open_source("digits"), 8, 1)
    real = torch.stack([dataset[i, False]["images"] for i in range(1797)])
    pixels = to_uint8(real).flatten(1).numpy() / 255
    pipeline = load_pipeline(tmp_path, torch.device("cpu"))
    labels = draw_labels(101, 10, 0, balanced=False).tolist()
    images, _ = generate(pipeline, labels, SampleSettings("ODE", train.SOLVER))
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
