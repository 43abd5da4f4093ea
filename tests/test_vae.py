import pytest
import torch
from diffusers import AutoencoderKL

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
