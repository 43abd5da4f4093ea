"""Representation alignment: its loss against plain formulas, the encoder's input, cached features, runs and errors."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY, read_metrics
from PIL import Image
from processes import run
from test_command_line import fail
from test_data import write_images
from test_resume import contents
from torch.utils.flop_counter import FlopCounterMode

from data.cached import CachedLatents
from models import SiT, SiT_models
from training.alignment import Alignment, default_block
from training.step import EMA, Trainer
from transport import create_transport
from utils import checkpoint
from utils.encoders import PatchEncoder

FLAGS = [*TINY, "--align-width", 24]


def make_encoder(folder, seed=0, **more):
    """A small ViT of timm in a folder: two registers, patches of 4, trained on 16 x 16."""
    torch.manual_seed(seed)
    options = dict(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, reg_tokens=2, num_classes=0) | more
    network = timm.create_model("vit_tiny_patch16_224", **options).eval()
    for parameter in network.parameters():  # biases and norms too, which start at 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    timm.models.save_for_hf(network, folder, model_args=options, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    (folder / "config.json").write_text(json.dumps(config))
    return network


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The network, and its folder."""
    folder = tmp_path_factory.mktemp("encoder")
    return make_encoder(folder), folder


def small_model():
    return SiT(input_size=8, patch_size=2, in_channels=1, hidden_size=12, depth=6, num_heads=2, num_classes=3)


def plain_loss(loss, x, features, kept, kind):
    """1 - mean cosine of each sample, token by token."""
    weights, total = dict(loss.projector.named_parameters()), []
    for m in range(len(x)):
        target, state, cosines = features[m], x[m], []
        if kind == "conv":
            centred = target - target.sum(0) / 16
            target = centred / ((centred**2).sum(0) / 15).sqrt()
        for place in range(len(state)):
            if kind == "conv":
                row, column, z = place // 4, place % 4, weights["bias"]
                for i in range(3):
                    for j in range(3):
                        if 0 <= row + i - 1 < 4 and 0 <= column + j - 1 < 4:
                            z = z + weights["weight"][:, :, i, j] @ state[(row + i - 1) * 4 + column + j - 1]
                wanted = target[place]
            else:
                z = state[place]
                for layer in (0, 2, 4):
                    z = weights[f"{layer}.weight"] @ z + weights[f"{layer}.bias"]
                    z = z / (1 + torch.exp(-z)) if layer < 4 else z
                wanted = target[kept[m, place] if kind == "routed" else place]
            cosines.append((z * wanted).sum() / ((z * z).sum() * (wanted * wanted).sum()).sqrt())
        total.append(1 - sum(cosines) / len(cosines))
    return torch.stack(total)


@pytest.mark.parametrize("kind", ["mlp", "conv", "routed"])
def test_loss_and_gradient_equal_the_formula(kind):
    route = (1, 4, 0.5) if kind == "routed" else None
    projector = "conv" if kind == "conv" else "mlp"
    loss = Alignment(small_model(), size=5, block=3, projector=projector, width=7, route=route).double()
    g = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(16, generator=g)[:8].sort().values for _ in range(3)])
    x = torch.randn(3, 8 if kind == "routed" else 16, 12, generator=g, dtype=torch.float64, requires_grad=True)
    features = torch.randn(3, 16, 5, generator=g, dtype=torch.float64)
    inputs, results = [x, *loss.parameters()], []
    for values in (
        loss({"features": features, "kept": kept}, None, None, None, {2: x}),
        plain_loss(loss, x, features, kept, kind),
    ):
        results.append([values, *torch.autograd.grad(values.sum(), inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    assert results[0][0].shape == (3,) and loss.hidden_blocks == (2,)


def test_default_blocks_are_those_of_the_paper():
    depths = {size: SiT_models[f"SiT-{size}/2"].keywords["depth"] for size in ("B", "L", "XL")}
    assert {size: default_block(depth) for size, depth in depths.items()} == {"B": 4, "L": 8, "XL": 8}
    assert default_block(1) == default_block(2) == 1


@pytest.mark.parametrize("grid, shape", [((4, 4), (3, 40, 24)), ((3, 5), (1, 8, 8))])
def test_the_encoder_sees_resized_normalised_images(grid, shape, encoder):
    network, folder = encoder
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    patches = PatchEncoder(str(folder), grid)
    patches.load()
    height, width = grid[0] * 4, grid[1] * 4
    assert patches.size == (height, width) and patches.width == 16
    planes = []
    for image in images:
        channels = [Image.fromarray(((image[c % shape[0]] + 1) / 2).numpy()) for c in range(3)]
        channels = [np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
        planes.append([(channels[c] - (0.4, 0.5, 0.6)[c]) / (0.2, 0.25, 0.3)[c] for c in range(3)])
    x = torch.tensor(np.array(planes), dtype=torch.float32)
    with torch.no_grad():
        others = [network.cls_token, network.reg_token]
        tokens = torch.cat([*(part.expand(2, -1, -1) for part in others), network.patch_embed.proj(x).flatten(2).mT], 1)
        positions = timm.layers.resample_abs_pos_embed(network.pos_embed, list(grid), num_prefix_tokens=3)
        expected = network.norm(network.blocks(tokens + positions))[:, 3:]
    torch.testing.assert_close(patches(images), expected, rtol=1e-3, atol=1e-4)
    count, tokens = grid[0] * grid[1], grid[0] * grid[1] + 3
    assert patches.flops == 2 * count * 48 * 16 + 2 * (2 * tokens * 12 * 16**2 + 4 * tokens**2 * 16)  # two blocks


def test_operations_are_counted(encoder):
    """Three times the projector's forward pass, and the encoder's once."""
    for how in (dict(width=9), dict(projector="conv"), dict(width=9, route=(0, 3, 0.25), block=2)):
        loss = Alignment(small_model(), 5, **how)
        tokens = 12 if "route" in how else 16
        x = torch.randn(1, tokens, 12, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            batch = {"features": torch.randn(1, 16, 5), "kept": torch.arange(tokens)[None]}
            loss(batch, None, None, None, {0: x}).sum().backward()
        assert counter.get_total_flops() == loss.flops > 0
    patches = PatchEncoder(str(encoder[1]), (4, 4))
    assert Alignment(small_model(), 16, encoder=patches).flops == Alignment(small_model(), 16).flops + patches.flops


def test_a_run_resumes_exactly_ends_the_loss_and_samples_without_it(encoder, tmp_path):
    """(With more ranks: test_recipes.py.)"""
    flags = [*FLAGS, "--align", encoder[1], "--align-until", 4, "--ckpt-every", 3]
    for folder, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        result = run("train.py", *flags, "--max-steps", steps, "--output-dir", tmp_path / folder)
        assert result.returncode == 0, result.stderr
    whole, parts = (contents(tmp_path / folder / "checkpoint-6") for folder in ("whole", "parts"))
    assert whole == parts and "losses.alignment.weights.projector.0.weight" in whole[1]
    assert not any("network" in key or "encoder" in key for key in whole[1])
    for file in ("ema.pt", "model.safetensors"):
        path = tmp_path / "whole/checkpoint-6" / file
        read = safetensors.torch.load_file if file == "model.safetensors" else torch.load
        assert not any("projector" in key or "encoder" in key for key in read(path))
    lines = read_metrics(tmp_path / "whole")
    curve = [line["loss_alignment"] for line in lines[:4]]
    assert curve[3] < curve[0] and not any("loss_alignment" in line for line in lines[4:])
    words = "--ckpt", tmp_path / "whole", "--output", tmp_path / "a.png", "--num-sampling-steps", 2
    result = run("sample.py", *words)
    assert result.returncode == 0, result.stderr


def test_another_projector_than_the_checkpoints_is_refused_and_no_checkpoint_is_set_aside(encoder, tmp_path):
    """Not taken for damage, for which the checkpoint before, without the loss, would be resumed from."""
    flags = [*TINY, "--ckpt-every", 1, "--output-dir", tmp_path]
    aligned = ["--align", encoder[1], "--align-width", 24]
    for step, more in ((1, []), (2, aligned)):
        assert run("train.py", *flags, *more, "--max-steps", step).returncode == 0
    result = run("train.py", *flags, *aligned, "--max-steps", 3, "--align-projector", "conv")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "loss 'alignment' of" in result.stderr and "checkpoint-2 has weights of other shapes" in result.stderr
    assert sorted(checkpoint.steps(tmp_path)) == [1, 2]


def test_after_its_end_neither_encoder_nor_hidden_states_are_computed():
    def encode(images):
        calls.append("encoder")
        return torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))

    calls, model = [], small_model()
    encode.flops = 0
    loss = Alignment(model, 5, width=7, encoder=encode)
    loss.until = 1
    device = torch.device("cpu")
    weights = model.state_dict()
    arguments = create_transport(), device, "bf16", [EMA("ema", 0.9)], [loss], "one process", None, {}
    trainer = Trainer(model.to("meta"), *arguments)
    trainer.start(weights, grad_checkpoint=True)
    forward = model.forward
    model.forward = lambda *x, **options: calls.append(options.get("hidden_blocks")) or forward(*x, **options)
    batch = {"y": torch.zeros(2, dtype=torch.long), "images": torch.zeros(2, 1, 8, 8)}
    draws = torch.randn(2, 1, 8, 8), torch.rand(2), torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.bool)
    for step in range(2):
        values, _ = trainer.forward_backward(batch, *draws, step=step)
        trainer.update(step, values.mean(), 1e-3)
    assert calls == [(1,), "encoder", None]


@pytest.fixture(scope="module")
def data(small_vae, encoder, tmp_path_factory):
    """Images, the flags of a small autoencoder, and a cache with features that two processes wrote."""
    folder = tmp_path_factory.mktemp("data")
    images = write_images(folder / "images", {"cat": [(20, 16)] * 9, "dog": [(16, 16)] * 8})
    flags = ["--image-size", 16, "--vae", small_vae(), "--num-workers", 0]
    extract = ["extract_latents.py", "--data-path", images, *flags, "--shard-size", 5, "--batch-size", 4]
    features = ["--features", encoder[1]]
    result = run(*extract, *features, "--output", folder / "cached", processes=2)
    assert result.returncode == 0, result.stderr
    return images, flags, extract, folder / "cached"


def test_features_of_images_and_mirror_images_are_stored(data, encoder, tmp_path):
    """The same bytes from one process that continues; half the tokens a side with patches of 4."""
    _, _, extract, cached = data
    cache = CachedLatents(cached)
    assert "features" not in cache[0, False]
    cache.require_features(str(encoder[1]), (4, 4))
    assert cache.features["width"] == 16 and cache[3, True]["features"].dtype == torch.float16
    shutil.copytree(cached, tmp_path / "again")
    (tmp_path / "again/manifest.json").unlink()
    (tmp_path / "again/shard-00001.safetensors").unlink()
    more = ["--features", encoder[1], "--keep-images"]
    result = run(*extract, *more[:2], "--output", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    for path in cached.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    result = run(*extract, *more, "--patch-size", 4, "--output", tmp_path / "large")
    assert result.returncode == 0, result.stderr
    large = CachedLatents(tmp_path / "large")
    large.require_features(str(encoder[1]), (2, 2))
    large.require_images()
    patches = PatchEncoder(str(encoder[1]), (2, 2))
    patches.load()
    for flip in (False, True):
        item = large[5, flip]
        torch.testing.assert_close(item["features"].float(), patches(item["images"][None])[0], atol=0.02, rtol=0.02)
    result = run(*extract, "--output", cached)
    assert result.returncode == 2 and "made with features {'encoder'" in result.stderr


def test_cached_features_train_as_the_encoder_in_the_loop(data, tmp_path):
    """Flips included; the features need no encoder, whose folder may be gone."""
    images, vae, _, cached = data
    stored = CachedLatents(cached).features["encoder"]
    flags = [*FLAGS, "--max-steps", 4, "--global-batch-size", 8]
    curves = {}
    for name, more in (("loop", ["--data-path", images, *vae]), ("cached", ["--data-path", cached, *vae[2:4]])):
        if name == "cached":
            shutil.move(stored, tmp_path / "away")
        result = run("train.py", *flags, *more, "--align", stored, "--output-dir", tmp_path / name)
        if name == "cached":
            shutil.move(tmp_path / "away", stored)
        assert result.returncode == 0, result.stderr
        curves[name] = [(line["loss"], line["loss_alignment"]) for line in read_metrics(tmp_path / name)]
    np.testing.assert_allclose(curves["cached"], curves["loop"], atol=3e-5)


def test_errors_are_one_line(data, encoder, tmp_path, capsys, monkeypatch):
    def message(*words):
        return fail("train", [*TINY, "--output-dir", tmp_path / "no", *words], capsys, monkeypatch)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "Unknown model (nothing)" in message("--align", "nothing")
    assert "ResNet has no patches" in message("--align", "resnet18")
    assert "has no token for each of 16 patches" in message("--align", "swin_tiny_patch4_window7_224")
    assert "it has no config.json" in message("--align", tmp_path)
    offline = message("--align", "vit_tiny_patch16_224")
    assert "weights of vit_tiny_patch16_224.augreg_in21k_ft_in1k, in place" in offline and "cannot fetch" in offline
    shutil.copytree(encoder[1], tmp_path / "half")
    tensors = safetensors.torch.load_file(encoder[1] / "model.safetensors")
    tensors.pop("norm.weight")
    safetensors.torch.save_file(tensors, tmp_path / "half/model.safetensors")
    assert "it lacks norm.weight" in message("--align", tmp_path / "half")
    aligned = ["--align", encoder[1]]
    assert "the model has the blocks 1 to 2" in message(*aligned, "--align-block", 3)
    routed = ["--route", 0, 2, 0.5, "--align-projector", "conv"]
    assert "--align-projector conv needs the whole grid" in message(*aligned, *routed)
    cached = [*data[1][2:4], "--data-path", data[3]]
    assert f"the features in {data[3]} are of {encoder[1]}" in message(*cached, "--align", "vit_tiny_patch16_224")
    make_encoder(tmp_path / "other", seed=1)
    assert "the features in" in message(*cached, "--align", tmp_path / "other")
    assert "are of 4 x 4 patches, and the model has 2 x 2" in message(*cached, *aligned, "--patch-size", 4)
    shutil.copytree(data[3], tmp_path / "without")
    path = tmp_path / "without/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"features": {"encoder": 1}}))
    assert "damaged" in message("--data-path", tmp_path / "without")
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key != "features"}))
    expected = f"stores neither features nor images; make latents with extract_latents.py --features {encoder[1]}"
    assert expected in message(*cached[:2], "--data-path", tmp_path / "without", *aligned)
