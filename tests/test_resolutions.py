"""Images that are no squares, and sampling and fine-tuning at another size than that of training."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from PIL import Image
from processes import run
from test_command_line import fail
from test_extract_latents import arguments

from data.images import ImageDataset, center_crop
from data.sources import open_source
from models import SiT
from sampling.draw import SampleSettings, describe, draw
from sampling.pipeline import load_pipeline
from training.resume import Start
from training.setup import initial_weights, resolve_config
from utils import tensor_files
from utils.command_line import size
from utils.sizes import is_size, scaled, size_name
from utils.tensor_files import read_safetensors, write_safetensors

CPU = torch.device("cpu")
TRANSPORT = dict(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None)
SMALL = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=2)
EULER = ["--sampling-method", "euler", "--num-sampling-steps", 3]


def test_sizes_as_words_and_as_plain_data():
    assert [size("64"), size("64x64"), size("64x96"), size("1e2")] == [64, 64, [64, 96], 100]
    assert [size_name(size(word)) for word in ("64", "64x96")] == ["64", "64x96"]
    assert [scaled(8, 4), scaled([8, 16], 2), scaled([16, 8], down=4), scaled((8, 8))] == [32, [16, 32], [4, 2], 8]
    assert [is_size(value) for value in (8, [8, 16], 0, True, "8", [8], [8, 0], None)] == [True] * 2 + [False] * 6
    for word in ("8x8x8", "8x", "x", "0", "8x0", "a", "8.5", "8*8"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be an integer"):
            size(word)


def noise_image(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("width, height", [(37, 91), (91, 37), (64, 64), (5, 9), (500, 20), (16, 8), (1, 900)])
def test_a_crop_to_two_sides(width, height):
    image = noise_image(width, height)
    assert np.array_equal(center_crop(image, (16, 16)), center_crop(image, 16))
    crop = np.asarray(center_crop(image, (8, 24)))
    assert crop.shape == (8, 24, 3)
    turned = np.asarray(center_crop(image.transpose(Image.Transpose.TRANSPOSE), (24, 8)))
    # PIL filters rows first, and rounds and clips in between, which shows on noise.
    assert np.abs(turned.transpose(1, 0, 2).astype(int) - crop).mean() < 1


def test_a_crop_of_its_own_size_and_of_twice_that():
    image = np.asarray(noise_image(24, 8))
    assert np.array_equal(center_crop(Image.fromarray(image), (8, 24)), image)
    twice = np.asarray(noise_image(50, 16))  # as high as needed, and wider: the middle 48 columns
    boxes = twice.reshape(8, 2, 25, 2, 3).mean((1, 3))[:, :24]
    assert np.abs(center_crop(Image.fromarray(twice), (8, 24)) - boxes).max() <= 1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of coloured images of 16 columns and 8 rows, bright at the left or at the right."""
    folder, rng = tmp_path_factory.mktemp("wide"), np.random.default_rng(0)
    for label, name in enumerate(("left", "right")):
        (folder / name).mkdir()
        for i in range(12):
            image = rng.integers(0, 100, (8, 16, 3), dtype=np.uint8)
            image[:, 8 * label : 8 * label + 8] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


FLAGS = [*TINY, "--image-size", "8x16", "--data-path"]


def train(folder, *more, code=0, **how):
    result = run("train.py", *FLAGS, *more, "--output-dir", folder, **how)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def wide_run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "wide"
    train(folder, images, "--max-steps", 4, "--sample-every", 4, "--eval-every", 4, "--eval-samples", 8)
    return folder


def test_a_run_on_wide_images(wide_run, images, tmp_path):
    """It resumes to the same bytes, trains the same on two ranks, and the grid shows wide images."""
    state = json.loads((wide_run / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["model"]["input_size"] == state["latents"]["image_size"] == state["args"]["image_size"] == [8, 16]
    picture = Image.open(wide_run / "samples" / "0000004.png")
    assert picture.size == (2 * (128 + 2) + 2, 2 * (64 + 2) + 2)
    assert np.isfinite(json.loads((wide_run / "evaluations.jsonl").read_text())["fd_pixels"])
    assert "as (3, 8, 16)" in (wide_run / "log.txt").read_text()
    for steps in (2, 4):
        train(tmp_path / "stopped", images, "--max-steps", steps)
    files = [folder / "checkpoint-4" / "ema.pt" for folder in (wide_run, tmp_path / "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    train(tmp_path / "two", images, "--max-steps", 4, processes=2)
    curves = [
        [line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (wide_run, tmp_path / "two")
    ]
    np.testing.assert_allclose(*curves, atol=1e-4)
    pixels = ImageDataset(open_source(str(images)), (8, 16), 3)[15, False]["images"]
    assert pixels.shape == (3, 8, 16) and pixels[:, :, :8].max() < 0 < pixels[:, :, 8:].min()


def test_samples_and_likelihoods_of_wide_images(wide_run, images, tmp_path):
    pictures = ["--output", tmp_path / "x.png", "--trajectory", tmp_path / "t.png"]
    result = run("sample.py", "ODE", "--ckpt", wide_run, *EULER, *pictures)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "x.png").size == (2 * (128 + 2) + 2, 64 + 4)
    words = ["--ckpt", wide_run, *EULER, "--cfg-scale", 1.5, "--num-fid-samples", 12, "--output", tmp_path / "x.npz"]
    result = run("sample_ddp.py", "ODE", *words)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "x.npz") as content:
        assert content["arr_0"].shape == (12, 8, 16, 3)
    assert json.loads((tmp_path / "x.npz.json").read_text())["model"]["input_size"] == [8, 16]
    result = run("likelihood.py", "--ckpt", wide_run, "--data-path", images, *EULER, "--num-examples", 4)
    assert result.returncode == 0 and float(re.search(r"bits_per_dim (\S+)", result.stdout)[1]) < 20, result.stderr


def test_wide_latents(images, small_vae, tmp_path):
    """A cache of them has both sides, and training on it is training on the images."""
    script = arguments(images, small_vae(), tmp_path / "latents")
    script[script.index("--image-size") + 1] = "8x16"
    result = run(*script)
    assert result.returncode == 0, result.stderr
    cache = open_source(str(tmp_path / "latents"))
    assert (cache.image_size, cache.latent_size, cache[0, True]["moments"].shape) == ([8, 16], [4, 8], (2, 4, 4, 8))
    (tmp_path / "latents" / "manifest.json").unlink()
    result = run(*(word for word in script if word not in ("--image-size", "8x16")))
    assert result.returncode == 0, result.stderr  # what was stopped continues with its size
    vae = script[script.index("--vae") + 1]
    flags = FLAGS.copy()
    flags[flags.index("--vae") + 1] = vae
    for folder, data in (("a", images), ("b", tmp_path / "latents")):
        result = run("train.py", *flags, data, "--max-steps", 3, "--output-dir", tmp_path / folder)
        assert result.returncode == 0, result.stderr
    curves = [[line["loss"] for line in read_metrics(tmp_path / folder)] for folder in ("a", "b")]
    np.testing.assert_allclose(*curves, atol=1e-5)
    result = run("likelihood.py", "--ckpt", tmp_path / "a", "--data-path", tmp_path / "latents", *EULER)
    assert result.returncode == 0, result.stderr


def checkpoint(path, **options):
    """The file of a SiT with weights that are all random, and it."""
    torch.manual_seed(0)
    model = SiT(**(SMALL | options)).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.2)
    config = {"model": SMALL | options, "transport": TRANSPORT, "data": {}, "step": 1}
    config["latents"] = {"vae": "none", "image_size": model.input_size, "channels": 3}
    write_safetensors(path, model.state_dict(), config)
    return model


@pytest.mark.parametrize("options", [{}, {"position": "rope"}])
def test_sampling_at_another_size_is_the_network_with_scaled_positions(options, tmp_path, capsys):
    trained = checkpoint(tmp_path / "model.safetensors", **options)
    pipeline = load_pipeline(str(tmp_path / "model.safetensors"), CPU, image_size=[16, 8])
    assert "positions resampled from 4 x 4 to 8 x 4 tokens" in capsys.readouterr().out
    assert pipeline.image_shape == (16, 8, 3) and pipeline.latent_shape == (3, 16, 8)
    positions = pipeline.model.pos_embed.unflatten(1, (8, 4))
    torch.testing.assert_close(positions[:, ::2], trained.pos_embed.unflatten(1, (4, 4)))  # row r is at r / 2

    expected = SiT(**(SMALL | options | dict(input_size=[16, 8], trained_size=8)))
    state = trained.state_dict() | {"pos_embed": expected.pos_embed}
    expected.load_state_dict(state)
    x, t, y = torch.randn(2, 3, 16, 8), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    assert torch.equal(pipeline.model(x, t, y), expected.eval()(x, t, y))
    unscaled = SiT(**(SMALL | options | dict(input_size=[16, 8])))
    unscaled.load_state_dict(trained.state_dict() | {"pos_embed": unscaled.pos_embed})
    assert (unscaled.eval()(x, t, y) - expected(x, t, y)).abs().max() > 0.1

    # Stored settings say both sizes; the size of training changes nothing.
    settings = SampleSettings(solver={"sampling_method": "euler", "num_steps": 3})
    description = json.loads(json.dumps(describe(pipeline, settings)))
    assert (description["model"]["input_size"], description["model"]["trained_size"]) == ([16, 8], 8)
    same = load_pipeline(str(tmp_path / "model.safetensors"), CPU, image_size=8)
    assert "resampled" not in capsys.readouterr().out and "trained_size" not in same.model_config
    plain = load_pipeline(str(tmp_path / "model.safetensors"), CPU)
    assert torch.equal(draw(plain, [0], settings)[0], draw(same, [0], settings)[0])


def test_a_model_trained_with_scaled_positions_keeps_their_scale(tmp_path):
    trained = checkpoint(tmp_path / "model.safetensors", input_size=16, trained_size=8)
    pipeline = load_pipeline(str(tmp_path / "model.safetensors"), CPU, image_size=8)
    assert pipeline.model_config["trained_size"] == 8
    torch.testing.assert_close(pipeline.model.pos_embed, SiT(**SMALL).pos_embed)
    assert torch.equal(pipeline.model.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)


def test_a_guide_draws_at_the_same_size(tmp_path):
    checkpoint(tmp_path / "model.safetensors")
    checkpoint(tmp_path / "guide.safetensors", depth=1)
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("model", "guide")]
    pipeline = load_pipeline(paths[0], CPU, guide_ckpt=paths[1], image_size=[8, 32])
    assert pipeline.guide.latent_shape == pipeline.latent_shape == (3, 8, 32)
    assert torch.equal(pipeline.guide.model.pos_embed, pipeline.model.pos_embed)
    checkpoint(tmp_path / "guide.safetensors", input_size=16)
    with pytest.raises(ValueError, match="its latent shape is"):
        load_pipeline(paths[0], CPU, guide_ckpt=paths[1])


def test_scripts_sample_at_another_size(digits_run, tmp_path):
    words = ["ODE", "--ckpt", digits_run, *EULER, "--cfg-scale", 1, "--image-size", "16"]
    result = run("sample_ddp.py", *words, "--num-fid-samples", 4, "--output", tmp_path / "x.npz")
    assert result.returncode == 0 and "positions resampled from 4 x 4 to 8 x 8 tokens" in result.stdout, result.stderr
    with np.load(tmp_path / "x.npz") as content:
        assert content["arr_0"].shape == (4, 16, 16, 1)
    stored = json.loads((tmp_path / "x.npz.json").read_text())
    assert (stored["model"]["input_size"], stored["model"]["trained_size"]) == (16, 8)
    words = ["--ckpt", digits_run, "--image-size", "8x12", "--solver", "euler", "--num-sampling-steps", 3]
    words += ["--cfg-scale", 1, "--num-samples", 4, "--output-dir", tmp_path / "sweep"]
    result = run("sweep.py", *words)
    assert result.returncode == 0 and "--image-size 8x12" in result.stdout, result.stderr


def config_of(images, init_from=None, image_size=16, **options):
    source = open_source(str(images))
    options = {key: SMALL[key] for key in ("patch_size", "hidden_size", "depth", "num_heads")} | options
    config = resolve_config(source, "SiT-S/2", options, {"image_size": image_size}, TRANSPORT, "none")
    return config, *initial_weights(config, 0, str(init_from), Start())


def test_fine_tuning_at_another_size(images, tmp_path):
    file = tmp_path / "model.safetensors"
    trained = checkpoint(file)
    config, weights, notes = config_of(images, file)
    assert torch.equal(weights["pos_embed"], SiT(**config["model"]).pos_embed) and "trained_size" not in config["model"]
    assert "positions are not those of the weights, which --trained-size 8 would scale to this input size" in notes
    config, weights, notes = config_of(images, file, trained_size=8)
    torch.testing.assert_close(weights["pos_embed"].unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2), trained.pos_embed)
    assert "positions of inputs of 16 are scaled to those of 8, as in the weights" in notes
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], trained.blocks[0].attn.qkv.weight)

    # As many tokens in another grid are at other positions.
    config, weights, notes = config_of(images, file, image_size=[4, 16])
    assert torch.equal(weights["pos_embed"], SiT(**config["model"]).pos_embed)
    assert any("positions are not those of the weights" in note for note in notes)
    assert not torch.equal(weights["pos_embed"], trained.pos_embed)
    config, _, notes = config_of(images, file, image_size=8, trained_size=8)
    assert "trained_size" not in config["model"] and not any("position" in note for note in notes)

    content = read_safetensors(file)
    config = tensor_files.config_of(content)
    for missing in ("pos_embed", "x_embedder.proj.weight"):
        write_safetensors(file, {key: value for key, value in content.items() if key != missing}, config)
        with pytest.raises(ValueError, match=missing):
            config_of(images, file)


def test_a_fine_tuned_run_samples_at_its_own_size(digits_run, tmp_path):
    flags = [*TINY, "--image-size", 16, "--trained-size", 8, "--init-from", digits_run, "--max-steps", 2]
    result = run("train.py", *flags, "--output-dir", tmp_path / "run")
    assert result.returncode == 0 and "are scaled to those of 8" in result.stdout, result.stderr
    pipeline = load_pipeline(str(tmp_path / "run"), CPU)
    assert pipeline.latent_shape == (1, 16, 16) and pipeline.model_config["trained_size"] == 8


def test_mistakes(digits_run, images, small_vae, tmp_path, capsys, monkeypatch):
    def message(script, *words):
        return fail(script, words, capsys, monkeypatch)

    runs = [*TINY, "--data-path", images, "--output-dir", tmp_path / "run"]
    assert "must be an integer, or HEIGHTxWIDTH such as 64x96, not '8x8x8'" in message(
        "train", *runs, "--image-size", "8x8x8"
    )
    assert "--image-size 8x15 does not divide: it must be a multiple of 2" in message(
        "train", *runs, "--image-size", "8x15"
    )
    contradiction = ["--image-size", "8x16", "--input-size", "16x8"]
    assert "--image-size 8x16 contradicts --input-size 16x8" in message("train", *runs, *contradiction)
    assert "trained_size 7 is not a multiple" in message("train", *runs, "--image-size", "8", "--trained-size", 7)
    sample = ["--ckpt", digits_run, "--output", tmp_path / "x.png"]
    line = "--image-size 8x9 contradicts the weights, which make 8 pixels; another size must be a multiple of 2"
    assert line in message("sample", *sample, "--image-size", "8x9")
    script = arguments(images, small_vae(), tmp_path / "latents")[1:]
    script[script.index("--image-size") + 1] = "8x15"
    assert "--image-size 8x15 does not divide: it must be a multiple of 2" in message("extract_latents", *script)
    checkpoint(tmp_path / "model.safetensors", position="sincos")
    model = SiT(**SMALL)
    torch.nn.init.normal_(model.pos_embed)
    torch.save(model.state_dict(), tmp_path / "learned.pt")
    flags = ["--ckpt", tmp_path / "learned.pt", "--vae", "none", "--num-heads", 4, "--image-size", 16]
    assert "their positions are no sines and cosines" in message("sample", *flags)
