import json
import pathlib
import shutil
import time

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import vae


@pytest.fixture(scope="module", params=[dict(latent_channels=4), dict(latent_channels=16, shift_factor=0.3)])
def vae_folder(request, small_vae):
    return str(small_vae(levels=3, scaling_factor=0.25, **request.param)), request.param


def test_pixel_space_is_the_identity():
    space = vae.open_space("none", "cpu")
    x = torch.randn(2, 1, 8, 8)
    assert space.sample(x, torch.randn_like(x)) is x and space.decode(x) is x
    assert space.sample(space.moments(x)) is x and space.in_pixels
    assert vae.geometry("none", 1) == (1, 1) and space.downsampling == 1


def test_geometry_comes_from_the_config(vae_folder):
    folder, config = vae_folder
    space = vae.open_space(folder, "cpu")
    assert vae.geometry(folder, 3) == (4, config["latent_channels"]) and space.downsampling == 4


def test_sample_scales_and_shifts_the_posterior(vae_folder):
    folder, config = vae_folder
    space = vae.open_space(folder, "cpu")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(folder).encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape)
    expected = (posterior.mean + posterior.std * noise - config.get("shift_factor", 0)) * 0.25
    moments = space.moments(images)
    torch.testing.assert_close(space.sample(moments, noise), expected)
    assert not torch.equal(space.sample(moments), space.sample(moments))


def test_decode_undoes_the_scaling(vae_folder):
    folder, config = vae_folder
    space = vae.open_space(folder, "cpu")
    z = torch.randn(2, config["latent_channels"], 4, 4)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(folder).decode(z).sample
    scaled = (z - config.get("shift_factor", 0)) * 0.25
    torch.testing.assert_close(space.decode(scaled), expected, atol=1e-5, rtol=1e-4)


def test_the_autoencoder_is_loaded_at_its_first_use_if_scale_and_shift_are_given(vae_folder, monkeypatch):
    """So that training on cached latents needs none, and draws the same latents."""
    folder, channels = vae_folder[0], vae_folder[1]["latent_channels"]
    loaded = vae.open_space(folder, "cpu")
    moments, noise = torch.rand(2, 2, channels, 4, 4), torch.randn(2, channels, 4, 4)
    latents = loaded.sample(moments, noise)
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "from_pretrained", None)
        space = vae.LatentSpace(folder, "cpu", scale=loaded.scale, shift=loaded.shift)
        assert torch.equal(space.sample(moments, noise), latents) and space.name == loaded.name
    assert torch.equal(space.decode(latents), loaded.decode(latents))
    assert space.load() is space.model


def test_a_scale_per_channel_from_inference_mode_serves_training(vae_folder):
    space = vae.LatentSpace(vae_folder[0], "cpu", scale=[2.0, 0.125], shift=[7.0, -3.0])
    with torch.inference_mode():  # first of all that use these numbers
        space.sample(torch.ones(1, 2, 2, 1, 1))
    moments = torch.tensor([[8.0, 1.0], [0.0, 0.0]])[None, :, :, None, None].requires_grad_()
    latents = space.sample(moments)
    assert latents.flatten().tolist() == [2.0, 0.5]
    latents.sum().backward()
    assert moments.grad[0, 0].flatten().tolist() == [2.0, 0.125]


def test_the_autoencoder_is_frozen(vae_folder):
    model = vae.open_space(vae_folder[0], "cpu").model
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_released_autoencoders_are_known_without_the_network():
    assert vae.geometry("ema", 3) == vae.geometry("mse", 3) == (8, 4)


@pytest.mark.parametrize("name", ["/nowhere/vae", "no-one/no-vae"])
def test_an_autoencoder_that_is_not_there_is_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for function in (vae.geometry, vae.open_space):
        with pytest.raises(ValueError, match=f"cannot load the VAE '{name}'.*allowed are 'ema', 'mse'") as error:
            function(name, "cpu")
        assert "\n" not in str(error.value)


def test_slices_and_bf16_change_little(vae_folder, monkeypatch):
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    space = vae.open_space(vae_folder[0], "cpu")
    whole = space.moments(images)
    seen = []
    encode = space.model.encode
    monkeypatch.setattr(space.model, "encode", lambda x: seen.append(len(x)) or encode(x))
    monkeypatch.setattr(vae, "SLICE_PIXELS", 2 * 16 * 16)
    torch.testing.assert_close(space.moments(images), whole, atol=1e-5, rtol=1e-4)
    assert seen == [2, 2, 1]
    z = space.sample(whole)
    torch.testing.assert_close(space.decode(z), torch.cat([space.decode(row[None]) for row in z]), atol=1e-5, rtol=1e-4)
    half = vae.LatentSpace(vae_folder[0], "cpu", torch.bfloat16)
    moments = half.moments(images)
    assert moments.dtype == torch.float32
    assert 0 < (moments - whole).norm() / whole.norm() < 0.03


def test_parts_have_the_pixels_of_images_in_both_directions(vae_folder, monkeypatch):
    """Memory is bounded by the pixels of images, of which one pixel of a latent stands for 4 x 4."""
    space, parts = vae.open_space(vae_folder[0], "cpu"), []
    for name in ("encode", "decode"):
        method = getattr(space.model, name)
        monkeypatch.setattr(space.model, name, lambda x, method=method: parts.append(len(x)) or method(x))
    for pixels, expected in ((2 * 16 * 16, [2, 2, 1]), (16 * 16 - 1, [1] * 5)):
        monkeypatch.setattr(vae, "SLICE_PIXELS", pixels)
        space.decode(space.sample(space.moments(torch.zeros(5, 3, 16, 16))))
        assert parts == expected * 2
        parts.clear()


def test_every_name_of_an_autoencoder_means_the_same_one(vae_folder, tmp_path, monkeypatch):
    folder = pathlib.Path(vae_folder[0]).resolve()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    assert {vae.full_name(path) for path in (str(folder), folder.name, str(tmp_path / "link"))} == {str(folder)}
    assert vae.full_name("ema") == "stabilityai/sd-vae-ft-ema" and vae.full_name("mse") == "stabilityai/sd-vae-ft-mse"
    assert vae.full_name("a/b") == "a/b"


def test_the_hub_is_asked_for_the_full_name(monkeypatch):
    asked = []

    def find_config(name):
        asked.append(name)
        raise ValueError("it is not there")

    monkeypatch.setattr(vae.autoencoder.hub, "find_config", find_config)
    for name in ("ema", "mse", "a/b"):
        with pytest.raises(ValueError, match="it is not there"):
            vae.open_space(name, "cpu")
    assert asked == ["stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse", "a/b"]


def test_weights_are_laid_out_for_the_device(monkeypatch):
    """A stand-in that records where it is put: no test has a GPU."""
    layouts = []

    class Model(torch.nn.Module):
        def to(self, device, memory_format):
            layouts.append((device, memory_format))
            return self

    monkeypatch.setattr(vae.autoencoder, "load", lambda name, dtype: Model())
    for device in ("cpu", "cuda:1", "cuda"):
        assert not vae.LatentSpace("a/b", device, scale=1.0, shift=0.0).load().training
    assert layouts == [("cpu", torch.contiguous_format), ("cuda:1", torch.channels_last), ("cuda", torch.channels_last)]


MEAN, STD = [1.0, -2.0, 3.0, 0.5], [2.0, 4.0, 0.5, 3.0]


def test_means_and_deviations_of_latents_are_those_of_the_pipelines_of_diffusers(small_vae):
    """latents * latents_std / scaling_factor + latents_mean is decoded there (StableDiffusionXLPipeline)."""
    folder = str(small_vae(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD))
    space = vae.open_space(folder, "cpu")
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    z, zeros = torch.randn(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)
    posterior = torch.stack([z, torch.ones_like(z)], dim=1)
    torch.testing.assert_close(space.sample(posterior, zeros), (z - mean) / std * 0.5)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(folder).decode(z * std / 0.5 + mean).sample
    torch.testing.assert_close(space.decode(z), expected, atol=1e-5, rtol=1e-4)
    stored = json.loads(json.dumps({"scale": space.scale, "shift": space.shift}))
    cached = vae.LatentSpace(folder, "cpu", **stored)
    assert torch.equal(cached.sample(posterior, zeros), space.sample(posterior, zeros)) and cached.model is None


def test_null_statistics_are_none(small_vae):
    space = vae.open_space(str(small_vae(latents_mean=None, latents_std=None, scaling_factor=0.5)), "cpu")
    assert (space.scale, space.shift) == (0.5, 0.0)


def changed(folder, tmp_path, change):
    """A copy of an autoencoder's folder with other keys in its config."""
    copy = shutil.copytree(folder, tmp_path / "vae")
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | change))
    return copy


DAMAGED_CONFIGS = [
    ({"latents_mean": MEAN}, "latents_mean and latents_std must be lists of 4 numbers"),
    ({"latents_mean": MEAN, "latents_std": STD[:3]}, "lists of 4 numbers"),
    ({"latents_mean": MEAN, "latents_std": [1, 2, 3, None]}, "lists of 4 numbers"),
    ({"latents_mean": MEAN, "latents_std": [0, 1, 1, 1]}, "latents_std must be above 0"),
    ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, "without a shift_factor"),
    ({"scaling_factor": None}, "scaling_factor and shift_factor must be numbers, the first not 0, not None"),
    ({"scaling_factor": 0}, "the first not 0"),
    ({"scaling_factor": float("nan")}, "the first not 0, not nan"),
    ({"scaling_factor": 10**400}, "the first not 0, not 1000"),
    ({"shift_factor": "x"}, "must be numbers"),
    ({"_class_name": "AutoencoderTiny"}, "config.json says AutoencoderTiny, and only AutoencoderKL is read"),
    ({"_class_name": "AutoencoderKLWan"}, "config.json says AutoencoderKLWan"),
    ({"block_out_channels": []}, "block_out_channels in its config.json must be a list of numbers, not []"),
    ({"block_out_channels": [10**9, 8]}, "integer from 1 to 4096, not 1000000000"),
    ({"block_out_channels": [4096, 4096]}, "asks for 3,457,097,831 parameters; at most 268,435,456"),
    ({"block_out_channels": [16, 16]}, "size mismatch for encoder.conv_in.weight"),
    ({"block_out_channels": [8, 8, 8]}, "its weights are not those of its config.json"),
    ({"layers_per_block": 10**9}, "layers_per_block in its config.json must be an integer from 1 to 16"),
    ({"layers_per_block": 2}, "its weights are not those of its config.json"),
    ({"mid_block_add_attention": False}, "its weights are not those of its config.json"),
    ({"latent_channels": 0}, "from 1 to 4096, not 0"),
    ({"latent_channels": "4"}, "from 1 to 4096, not '4'"),
    ({"norm_num_groups": 0}, "config.json makes no autoencoder"),
    ({"in_channels": 4}, "in_channels in its config.json is 4, and images have 3"),
]


@pytest.mark.parametrize("change, problem", DAMAGED_CONFIGS, ids=[str(change)[:40] for change, _ in DAMAGED_CONFIGS])
def test_damaged_configs_are_named_in_one_line(change, problem, vae_of_four, tmp_path):
    folder, start = str(changed(vae_of_four, tmp_path, change)), time.perf_counter()
    with pytest.raises(ValueError) as error:
        vae.open_space(folder, "cpu")
    text = str(error.value)
    assert problem in text and f"cannot load the VAE {folder!r}" in text and "\n" not in text
    assert time.perf_counter() - start < 5


@pytest.fixture(scope="module")
def vae_of_four(small_vae):
    return small_vae()


@pytest.mark.parametrize("text", ["{", "[]", "", "3", "[" * 100_000, "{}"])
def test_configs_that_are_none_are_named_in_one_line(text, vae_of_four, tmp_path):
    folder = changed(vae_of_four, tmp_path, {})
    (folder / "config.json").write_text(text)
    for function in (vae.geometry, vae.open_space):
        with pytest.raises(ValueError, match="config.json") as error:
            function(str(folder), "cpu")
        assert "\n" not in str(error.value)


def test_damaged_weights_are_named_in_one_line(vae_of_four, tmp_path, capsys):
    folder = changed(vae_of_four, tmp_path, {})
    path = folder / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # the file is written over

    def problem():
        with pytest.raises(ValueError, match="cannot load the VAE") as error:
            vae.open_space(str(folder), "cpu")
        assert "\n" not in str(error.value) and capsys.readouterr().err == ""
        return str(error.value)

    path.write_bytes(whole[:-100])
    assert "Unable to load weights" in problem()
    save_file({key: value for key, value in tensors.items() if "decoder" not in key}, path, {"format": "pt"})
    assert "its weights are not those of its config.json: decoder" in problem()
    save_file(tensors | {"encoder.conv_in.bias": torch.full((8,), torch.nan)}, path, {"format": "pt"})
    assert "its weights are not finite" in problem()
    path.unlink()
    assert "no file named diffusion_pytorch_model" in problem()
    torch.save(tensors | {"loss.logvar": torch.zeros(1)}, folder / "diffusion_pytorch_model.bin")
    assert vae.open_space(str(folder), "cpu").scale == 0.18215


def test_the_autoencoder_of_a_pipeline_is_in_its_folder_vae(vae_of_four, tmp_path):
    shutil.copytree(vae_of_four, tmp_path / "sd" / "vae")
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    assert vae.geometry(str(tmp_path / "sd"), 3) == (2, 4)
    assert vae.open_space(str(tmp_path / "sd"), "cpu").name == vae.full_name(str(tmp_path / "sd" / "vae"))
    for path, problem in (
        (tmp_path, "has no config.json, and none in vae/"),
        (vae_of_four / "config.json", "a file"),
    ):
        with pytest.raises(ValueError, match=problem):
            vae.geometry(str(path), 3)


def test_a_config_may_leave_out_what_has_a_default(small_vae):
    folder = small_vae()
    config = json.loads((folder / "config.json").read_text())
    for key in ("in_channels", "out_channels", "layers_per_block", "scaling_factor", "shift_factor", "_class_name"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    space = vae.open_space(str(folder), "cpu")
    assert (space.scale, space.shift, vae.geometry(str(folder), 3)) == (0.18215, 0.0, (2, 4))
