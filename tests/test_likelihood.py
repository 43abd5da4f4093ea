"""likelihood.py: bits per dimension, compared with those of Gaussians."""

import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import GaussianNetwork
from PIL import Image
from processes import run
from test_command_line import fail

import likelihood
import vae
from data.sources import Source
from sampling import draw
from sampling.pipeline import Pipeline
from transport import create_transport

STD = 0.25


class GaussianModel(GaussianNetwork):
    """The exact network of Gaussian images, with the attributes and arguments of a SiT."""

    in_channels, input_size, num_classes = 1, 4, 3

    def __call__(self, x, t, y):
        assert y.shape == (len(x),)
        return super().__call__(x, t)


@pytest.mark.parametrize("path_type, prediction", [("Linear", "velocity"), ("GVP", "score"), ("VP", "noise")])
def test_bits_of_gaussian_images_under_the_exact_network(path_type, prediction, monkeypatch, capsys, tmp_path):
    """Grey levels of N(127.5, (127.5 s)^2), dequantized, have log2(127.5 s sqrt(2 pi e)) bits each."""
    rng = np.random.default_rng(0)
    levels = np.rint(127.5 + 127.5 * STD * rng.standard_normal((300, 4, 4))).clip(0, 255).astype(np.uint8)
    examples = [(Image.fromarray(image), i % 3) for i, image in enumerate(levels)]
    source = Source(examples, np.arange(300) % 3, "row {}".format, 3, 300, channels=1, image_size=4)
    transport = create_transport(path_type, prediction)
    model = GaussianModel(transport, mean=0.0, std=STD)
    space = vae.PixelSpace()
    pipeline = Pipeline(model, transport, space, torch.device("cpu"), None)
    monkeypatch.setattr(likelihood, "open_source", lambda **given: source)
    monkeypatch.setattr(likelihood, "load_pipeline", lambda *args, **given: pipeline)
    words = ["likelihood.py", "--batch-size", "100", "--probes", "2", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", words)
    likelihood.main()
    results = json.loads((tmp_path / "out.json").read_text())
    expected = math.log2(127.5 * STD * math.sqrt(2 * math.pi * math.e))
    assert results["bits_per_dim"] == pytest.approx(expected, abs=0.02)
    assert results["n_examples"] == 300 and 0 < results["standard_error"] < 0.02
    assert f"bits_per_dim {results['bits_per_dim']:.4f}" in capsys.readouterr().out


def test_dequantization_and_the_bits_of_a_uniform_density(monkeypatch):
    """Levels are spread over their width; density 1/2 per dimension on [-1, 1] is 1/255 on [0, 255]: log2 255 bits."""
    levels, solved = torch.arange(256.0), []

    def solve(x, model, y):
        solved.append(x.flatten())
        return torch.full((16,), -16 * math.log(2)), x

    model = GaussianModel(create_transport(), mean=0.0, std=STD)
    pipeline = Pipeline(model, model.transport, vae.PixelSpace(), torch.device("cpu"), None)
    monkeypatch.setattr(likelihood.Sampler, "sample_ode_likelihood", lambda self, **solver: solve)
    images = (levels / 127.5 - 1).reshape(16, 1, 4, 4)
    batch = {"images": images, "y": torch.zeros(16, dtype=torch.long), "problems": [[]] * 16}
    for u in (0.0, 1.0):
        uniform = torch.full((16, 1, 4, 4), u)
        monkeypatch.setattr(likelihood.ImageNoise, "draw", lambda self, shape, kind, uniform=uniform: uniform)
        bits = likelihood.bits_of_examples(batch, range(16), pipeline, {}, seed=0)
        assert bits == pytest.approx([math.log2(255)] * 16)
    low, high = solved
    torch.testing.assert_close((low + 1) * 127.5, levels - 0.5, atol=1e-4, rtol=0)
    torch.testing.assert_close(high[:-1], low[1:], atol=1e-6, rtol=0)  # no gap, no overlap


def test_cached_latents_have_the_bits_of_their_images(small_vae):
    """Both are sampled from the same posterior with the same noise; the network is the exact one of latents."""
    space = vae.LatentSpace(small_vae(latent_channels=2), torch.device("cpu"))
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = GaussianModel(create_transport(), mean=0.0, std=STD)
    model.in_channels = 2
    pipeline = Pipeline(model, model.transport, space, torch.device("cpu"), None)
    solver = dict(sampling_method="rk4", num_steps=20)
    bits = {}
    for key, values in (("images", images), ("moments", space.moments(images))):
        batch = {key: values, "y": torch.zeros(5, dtype=torch.long), "problems": [[]] * 5}
        bits[key] = likelihood.bits_of_examples(batch, range(7, 2, -1), pipeline, solver, seed=3)
    assert bits["images"] == pytest.approx(bits["moments"], abs=1e-5)
    # Bad examples are left out, and the noise of the others stays theirs.
    batch["problems"] = [["bad"], [], ["bad"], [], []]
    some = likelihood.bits_of_examples(batch, range(7, 2, -1), pipeline, solver, seed=3)
    assert some == pytest.approx([bits["moments"][i] for i in (1, 3, 4)], abs=1e-5)
    batch["problems"] = [["bad"]] * 5
    assert likelihood.bits_of_examples(batch, range(7, 2, -1), pipeline, solver, seed=3) == []
    noise = draw.ImageNoise(3, range(7, 2, -1), torch.device("cpu")).draw((2, 4, 4))
    latents = space.sample(space.moments(images), noise)
    logp = torch.distributions.Normal(0.0, STD).log_prob(latents.double()).flatten(1).mean(1)
    assert bits["images"] == pytest.approx((-logp / math.log(2)).tolist(), abs=0.02)


def test_cached_latents_are_scaled_as_the_model_was_trained():
    """Another cache may have another mean and deviation, of fewer latents or of another autoencoder."""
    model = GaussianModel(create_transport(), mean=0.0, std=STD)
    space = vae.LatentSpace("ema", torch.device("cpu"), scale=[2.0], shift=[0.5])
    pipeline = Pipeline(model, model.transport, space, torch.device("cpu"), None)
    for scale, count in ([2.0], 0), ([2.5], 1):
        source = types.SimpleNamespace(class_names=None, num_classes=3, channels=1, latent_size=4, notes=[])
        source.scale, source.shift = scale, [0.5]
        assert likelihood.open_examples(source, pipeline, "it") is source and pipeline.space is space
        assert len([note for note in source.notes if "not those of the training" in note]) == count
    pipeline.space = vae.PixelSpace()
    with pytest.raises(ValueError, match="another shape"):
        likelihood.open_examples(source, pipeline, "it")


def test_a_trained_model_on_any_number_of_ranks(digits_run, tmp_path):
    words = ["likelihood.py", "--data-path", "digits", "--num-examples", 12]
    results = {}
    for name, ckpt, processes, batch in (
        ("one", digits_run, 1, 12),
        ("two", digits_run, 2, 4),
        ("early", digits_run / "checkpoint-3" / "model.safetensors", 1, 12),
    ):
        more = ["--ckpt", ckpt, "--batch-size", batch, "--json", tmp_path / f"{name}.json"]
        result = run(*words, *more, "--sampling-method", "rk4", "--num-sampling-steps", 9, processes=processes)
        assert result.returncode == 0, result.stderr
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["one"]["bits_per_dim"] == pytest.approx(results["two"]["bits_per_dim"], abs=1e-4)
    assert 3 < results["one"]["bits_per_dim"] < 12 and results["one"]["n_examples"] == 12


def test_mistakes_in_likelihoods(digits_run, monkeypatch, capsys):
    words = ["--ckpt", digits_run, "--data-path", "digits"]
    assert "there are 1797" in fail("likelihood", [*words, "--num-examples", 5000], capsys, monkeypatch)
    assert "must be an integer of 1 or more" in fail("likelihood", [*words, "--probes", 0], capsys, monkeypatch)
    assert "--streaming does not go" in fail("likelihood", [*words, "--streaming"], capsys, monkeypatch)
    assert "choose from dopri5" in fail("likelihood", [*words, "--sampling-method", "Heun"], capsys, monkeypatch)
