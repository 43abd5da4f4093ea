"""Flags that change nothing because of other flags or the data: a line says so, for each of them."""

import pytest
import torch

import train
from data.sources import Source, flag_rules
from sampling.draw import resolve_settings
from sampling.flags import solver_settings, without_effect
from training.setup import flags_without_effect
from transport.integrators import ADAPTIVE_ODE_METHODS, ode_integrate
from utils import command_line
from utils.command_line import Parser, plain

CONFIG = {"latents": {"vae": "none", "image_size": 8, "channels": 1}, "model": {"input_size": 8, "patch_size": 2}}
DIGITS = Source(None, None, str, 10, 1797)


def named(lines):
    assert all(" has no effect " in line for line in lines)
    return {line.split()[0] for line in lines}


def flags_of_train(words, config=CONFIG, source=DIGITS):
    parser = train.build_parser()
    args = parser.parse_args(["--data-path", "digits", *words.split()])
    return named(flags_without_effect(parser.changed, plain(args), config, source, most_pixels=4096))


TRAIN = {
    "--trained-size 8": "--trained-size",
    "--max-steps 3 --epochs 2": "--epochs",
    "--logit-normal-mean 2": "--logit-normal-mean",
    "--logit-normal-std 2": "--logit-normal-std",
    "--loss-weight velocity": "--loss-weight",
    "--parallel fsdp": "--parallel",
    "--parallel fsdp --fsdp-shard-size 2": "--parallel --fsdp-shard-size",
    "--output-dir a --results-dir b": "--results-dir",
    "--keep-every 5": "--keep-every",
    "--sample-every 0 --cfg-scale 7": "--cfg-scale",
    "--eval-samples 100": "--eval-samples",
    "--sample-every 0 --eval-sampling-method unipc": "--eval-sampling-method",
    "--eval-every 5 --inception-weights w.pth": "--inception-weights",
    "--vae-precision bf16": "--vae-precision",
    "--inner-head-weight 2": "--inner-head-weight",
    "--route 1 3 0": "--route",
    "--route 1 3 0.03": "--route",
    "--image-key img --label-key fine_label": "--image-key --label-key",
}
USEFUL = [
    "--max-steps 3",
    "--epochs 2",
    "--time-sampling logit-normal --logit-normal-mean 2 --logit-normal-std 2",
    "--prediction noise --loss-weight velocity",
    "--keep-checkpoints 2 --keep-every 5",
    "--cfg-scale 7",
    "--eval-every 5 --eval-samples 100",
    "--eval-num-sampling-steps 11",
    "--eval-samples 5000 --logit-normal-mean 0",  # the defaults, which mislead nobody
    "--dry-run --parallel fsdp",
    "--route 1 3 0.04",
]


@pytest.mark.parametrize("words", TRAIN)
def test_a_flag_of_train_without_effect_is_named(words):
    assert flags_of_train(words) == set(TRAIN[words].split())


@pytest.mark.parametrize("words", USEFUL)
def test_a_flag_of_train_with_an_effect_is_not(words):
    assert flags_of_train(words) == set()


def test_precision_and_inception_have_an_effect_on_large_images():
    latents = CONFIG | {"latents": {"vae": "ema", "image_size": 256, "channels": 4}}
    words = "--vae-precision bf16 --eval-every 5 --inception-weights w.pth"
    assert flags_of_train(words, latents) == set()
    assert flags_of_train("--vae-precision bf16 --sample-every 0", latents, source=object()) == {"--vae-precision"}


def test_the_parser_knows_which_flags_were_given_in_a_file_or_after_it(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nmax-steps: 5\nlearn-sigma: false\nema-decay: 0.9999\n")
    parser = train.build_parser()
    parser.parse_args(["--config", str(tmp_path / "a.yaml"), "--max-steps=7", "--betas", "0.9", "0.95"])
    assert parser.changed == {"config", "lr", "max_steps", "learn_sigma", "betas"}
    parser = Parser("")
    assert (parser.parse_args([]), parser.changed)[1] == set()


SAMPLING = [
    ("ODE", {"sampling_method": "euler", "atol": 1e-9, "rtol": 1e-9}, {"--atol", "--rtol"}),
    ("ODE", {"sampling_method": "explicit_adams", "atol": 1e-9}, {"--atol"}),
    ("ODE", {"sampling_method": "implicit_adams", "atol": 1e-9}, set()),
    ("ODE", {"sampling_method": "bosh3", "atol": 1e-5}, set()),
    ("ODE", {"num_sampling_steps": 9}, {"--num-sampling-steps"}),
    ("ODE", {"sampling_method": "rk4", "num_sampling_steps": 9}, set()),
    ("SDE", {"last_step": "none", "last_step_size": 0.5}, {"--last-step-size"}),
    ("SDE", {"last_step_size": 0.5, "num_sampling_steps": 9}, set()),
]


@pytest.mark.parametrize("mode, given, useless", SAMPLING)
def test_a_flag_of_a_solver_without_effect_is_named(mode, given, useless):
    assert named(without_effect(set(given), *solver_settings(mode, given))) == useless


def test_flags_of_training_guidance_and_the_autoencoder_in_sampling():
    solver = solver_settings("ODE", {"sampling_method": "euler"})
    changed = {"train_eps", "loss_weight", "guided_channels", "vae_precision", "cfg_scale", "sample_eps"}
    always = {"--train-eps", "--loss-weight"}
    assert named(without_effect(changed, *solver, 2.0)) == always
    assert named(without_effect(changed, *solver, 1.0, in_pixels=True)) == always | {
        "--guided-channels",
        "--vae-precision",
    }


def test_columns_are_for_tables():
    def useless(kind):
        return named(command_line.without_effect({"image_key", "label_key"}, flag_rules("x", kind)))

    assert useless("parquet") == useless("hub") == set()
    assert useless("imagefolder") == {"--image-key"}
    assert useless("folder") == useless("latents") == {"--image-key", "--label-key"}


# ---------------------------------------------------------------------------------------------- tolerances


@pytest.mark.parametrize("method", ADAPTIVE_ODE_METHODS)
def test_tolerances_below_rounding_are_refused(method):
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def solve(dtype, tolerance):
        return ode_integrate(lambda x, t: x, torch.ones(2, dtype=dtype), times, method=method, **tolerance)[-1]

    tight = dict(atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="are too tight for float32: give 1e-07 or more in all"):
        solve(torch.float32, tight)
    assert solve(torch.float32, dict(atol=1e-12, rtol=1e-5))[0].item() == pytest.approx(torch.e, rel=1e-3)
    if method in ("dopri5", "dopri8"):
        assert solve(torch.float64, tight)[0].item() == pytest.approx(torch.e, rel=1e-9)


def test_a_solve_of_too_many_steps_ends(monkeypatch):
    """A network whose output is noise has no smooth flow at any step size."""
    monkeypatch.setattr("transport.integrators.MOST_STEPS", 50)
    g = torch.Generator().manual_seed(0)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def velocity(x, t):
        return 1 + 1e-2 * torch.randn(x.shape, generator=g)

    with pytest.raises(ValueError, match="are too tight, or the network's output is not finite"):
        ode_integrate(velocity, torch.ones(4), times, method="dopri5", atol=1e-6, rtol=1e-6)


def test_tolerances_are_checked_before_anything_is_drawn():
    mode, solver = solver_settings("ODE", {"atol": 1e-12, "rtol": 1e-12})
    with pytest.raises(ValueError, match="too tight for float32"):
        resolve_settings(None, mode, solver, None, None, 0)
