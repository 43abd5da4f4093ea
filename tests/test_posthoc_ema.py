"""Post-hoc EMA: power-function averages, their snapshots at checkpoints, and lengths reconstructed from these."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from processes import Script, run
from test_resume import WAYS, finish

from training.step import EMA, PowerEMA, check_emas, update_ema
from utils import checkpoint, posthoc
from utils.tensor_files import config_of, read_pt, read_safetensors
from utils.weights import load_weights

SCRIPT = """
import train
from training.step import PowerEMA

if __name__ == "__main__":
    train.main(extra_emas=[PowerEMA("long", 0.13), PowerEMA("longer", 0.2)])
"""
CONFIG = {"model": {}, "transport": {}, "latents": {}}


def shares(steps, sigma_rel):
    """The shares of theta_1, ..., theta_steps in an average of this length, in float64."""
    i, power = np.arange(1, steps + 1), posthoc.exponent(sigma_rel)
    return (i / steps) ** power - ((i - 1) / steps) ** power


def distance(state_dict, expected, center=0.0):
    """The 2-norm of a difference, relative to the distance of `expected` from a center."""
    flat = [torch.cat([part[key].double().flatten() for key in expected]) for part in (state_dict, expected)]
    return ((flat[0] - flat[1]).norm() / (flat[1] - center).norm()).item()


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.05, 0.1, 0.13, 0.25, 0.288])
def test_the_length_is_the_relative_standard_deviation(sigma_rel):
    gamma = posthoc.exponent(sigma_rel) - 1
    assert np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) == pytest.approx(sigma_rel, rel=1e-9)
    if gamma < 100:
        i, weights = np.arange(1, 100_001), shares(100_000, sigma_rel)
        mean = (i * weights).sum()
        assert weights.sum() == pytest.approx(1)
        assert np.sqrt(((i - mean) ** 2 * weights).sum()) / 1e5 == pytest.approx(sigma_rel, rel=1e-3)
    assert [round(posthoc.exponent(length) - 1, 2) for length in (0.05, 0.10)] == [16.97, 6.94]  # EDM2, section 3.1


@pytest.mark.parametrize("sigma_rel", [0.05, 0.13, 0.28])
def test_the_recursion_gives_each_step_its_share(sigma_rel):
    """Steps that are left out count: there the weights are those of the step before."""
    theta = np.random.default_rng(0).normal(size=(300, 7)).cumsum(0)
    theta[40:43] = theta[40]
    ema, rule = torch.zeros(7, dtype=torch.float64), PowerEMA("power", sigma_rel)
    for step, weights in enumerate(torch.from_numpy(theta)):
        update_ema([ema], [weights], rule.decay_at(step))
    np.testing.assert_allclose(ema, shares(300, sigma_rel) @ theta, rtol=1e-10)


def inner_product(one, other, end):
    """The integral over [0, end] of the products of what two averages lack, (x / t)^g up to t and 1 after it."""
    (a, g), (b, h) = sorted((t, posthoc.exponent(length)) for t, length in (one, other))
    first = a * (a / b) ** h / (g + h + 1)
    return first + (b - a * (a / b) ** h) / (h + 1) + end - b


@pytest.mark.parametrize("sigma_rel", [0.03, 0.13, 0.25])
def test_the_fit_is_that_of_continuous_time_for_many_steps(sigma_rel):
    """The normal equations with EDM2's kind of closed form, and a Lagrange multiplier for the sum."""
    end = 1e6
    snapshots = [(end * k / 4, length) for k in (1, 2, 3, 4) for length in posthoc.TRACKED.values()]
    gram = np.array([[inner_product(one, other, end) for other in snapshots] for one in snapshots]) / end
    target = np.array([inner_product(one, (end, sigma_rel), end) for one in snapshots]) / end
    system = np.block([[gram, np.ones((8, 1))], [np.ones((1, 8)), np.zeros((1, 1))]])
    expected = np.linalg.solve(system, np.append(target, 1))[:-1]
    found, residual = posthoc.fit(snapshots, end, sigma_rel)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    own = inner_product((end, sigma_rel), (end, sigma_rel), end) / end
    square = own - 2 * found @ target + found @ gram @ found
    assert residual == pytest.approx(np.sqrt(square / own), rel=1e-2)


def test_the_fit_is_well_posed_for_many_snapshots_and_few_steps():
    many = [(250 * k, length) for k in range(1, 401) for length in posthoc.TRACKED.values()]
    for sigma_rel, most in ((0.03, 1e-4), (0.05, 1e-9), (0.13, 1e-6), (0.28, 1e-3)):
        coefficients, residual = posthoc.fit(many, 100_000, sigma_rel)
        assert residual < most and abs(coefficients).sum() < 30 and coefficients.sum() == pytest.approx(1)
    for step in (1, 2, 3):
        coefficients, residual = posthoc.fit([(step, 0.05), (step, 0.1)], step, 0.05)
        np.testing.assert_allclose(coefficients, [1, 0] if step > 1 else coefficients, atol=1e-9)
        assert residual < 1e-9


@pytest.mark.parametrize("sigma_rel", [0.02, 0.13, 0.28])
def test_the_residual_is_that_of_the_shares_of_changes(sigma_rel):
    """Few steps, summed one by one: a change has the shares of all weights from its step on."""
    snapshots = list(itertools.product((2, 5, 8, 12), posthoc.TRACKED.values()))
    coefficients, residual = posthoc.fit(snapshots, 12, sigma_rel)

    def of_changes(step, length):
        return np.append(shares(step, length), np.zeros(12 - step))[::-1].cumsum()[::-1]

    expected, newest = of_changes(12, sigma_rel), np.ones(12)
    found = sum(c * of_changes(*snapshot) for c, snapshot in zip(coefficients, snapshots, strict=True))
    error = np.linalg.norm(found - expected)
    assert residual == pytest.approx(error / np.linalg.norm(newest - expected), rel=1e-6)
    assert found[0] == pytest.approx(1, abs=1e-12)
    for i, j in itertools.permutations(range(8), 2):  # no other coefficients do better
        other = found + 1e-3 * (of_changes(*snapshots[i]) - of_changes(*snapshots[j]))
        assert np.linalg.norm(other - expected) > error


@pytest.mark.parametrize("dtype, noise", [(torch.float32, 1e-6), (torch.float16, 5e-4)])
@pytest.mark.parametrize("steps, every", [(400, 50), (400, 40), (400, 20)])
def test_weights_that_move_at_random_are_reconstructed(dtype, noise, steps, every, tmp_path):
    generator = torch.Generator().manual_seed(0)
    walk = 0.1 * torch.randn(5000, generator=generator)
    lengths = {**posthoc.TRACKED, "0.07": 0.07, "0.13": 0.13, "0.2": 0.2, "0.25": 0.25}
    emas = [PowerEMA(f"ema{length}", length) for length in lengths.values()]
    averages = {name: walk.clone() for name in lengths}
    for step in range(steps):
        walk += 1e-3 * torch.randn(5000, generator=generator)
        for ema, average in zip(emas, averages.values(), strict=True):
            update_ema([average], [walk], ema.decay_at(step))
        if (step + 1) % every == 0:
            named = {name: {"weight": average.view(50, 100)} for name, average in averages.items()}
            assert posthoc.write_snapshots(tmp_path, step + 1, named, CONFIG, dtype) == []
    for name, length in lengths.items():
        state_dict, line = posthoc.reconstruct(tmp_path, steps, length)
        assert state_dict["weight"].dtype == torch.float32 and f"from {2 * steps // every} snapshots" in line
        expected = {"weight": averages[name].view(50, 100)}
        error, center = distance(state_dict, expected), walk.double()
        assert error < (1e-3 if length < 0.14 else 1e-2)
        snapshots = itertools.product(range(every, steps + 1, every), posthoc.TRACKED.values())
        residual = posthoc.fit(list(snapshots), steps, length)[1]
        of_walk = noise * averages[name].norm().item() / (averages[name].double() - center).norm().item()
        assert distance(state_dict, expected, center) < 1.1 * residual + of_walk  # what the line says
        assert ("too few" in line) == (residual > posthoc.WARN_ABOVE)


def test_weights_too_large_for_float16_are_kept_in_float32(tmp_path):
    emas = {name: {"small": torch.full((2,), 0.1), "large": torch.tensor([1.0, 1e5])} for name in posthoc.TRACKED}
    notes = posthoc.write_snapshots(tmp_path, 3, emas, CONFIG, torch.float16)
    assert len(notes) == 2 and notes[0].startswith("power-0.05-3.safetensors: large is in float32")
    stored = read_safetensors(tmp_path / "ema-snapshots" / "power-0.10-3.safetensors")
    assert stored["small"].dtype == torch.float16 and config_of(stored)["sigma_rel"] == 0.1
    assert torch.equal(posthoc.reconstruct(tmp_path, 3, 0.05)[0]["large"], torch.tensor([1.0, 1e5]))


def test_snapshots_are_of_one_trajectory(tmp_path):
    runs = [tmp_path / name for name in "abc"]
    for folder, steps in zip(runs, ((1, 2, 3), (1, 4), ()), strict=True):
        folder.mkdir()
        for step in steps:
            emas = {name: {"weight": torch.tensor([float(step)])} for name in posthoc.TRACKED}
            posthoc.write_snapshots(folder, step, emas, CONFIG | {"run": folder.name}, torch.float32)

    def found(folder):
        names = [f"power-0.{length}-{step}.safetensors" for step in (1, 2, 3, 4) for length in ("05", "10")]
        there = [name for name in names if (folder / "ema-snapshots" / name).exists()]
        assert list(posthoc.read_manifest(folder / "ema-snapshots")) == there
        return sorted({int(name.split("-")[2].split(".")[0]) for name in there})

    posthoc.carry_over(runs[0], runs[0], 2)  # a run that was killed after step 3 goes on at step 2
    posthoc.carry_over(runs[0], runs[1], 1)  # another goes on with it, in a folder with snapshots
    posthoc.carry_over(runs[1], runs[2], 9)
    assert [found(folder) for folder in runs] == [[1, 2], [1], [1]]
    for folder in runs:
        posthoc.reconstruct(folder, 1, 0.13)
        file = folder / "ema-snapshots" / "power-0.05-1.safetensors"
        assert config_of(read_safetensors(file))["run"] == "a"
    posthoc.carry_over(None, runs[2], 0)  # a new run
    posthoc.carry_over(None, runs[2], 0)
    assert not (runs[2] / "ema-snapshots").exists() and found(runs[0]) == [1, 2]


# ---------------------------------------------------------------------------------------------- runs of train.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function of the way to run that returns the folder of 20 steps with 5 checkpoints, all but the last removed."""
    folders, script = {}, tmp_path_factory.mktemp("scripts") / "toy.py"
    script.write_text(SCRIPT)
    flags = [*TINY, "--max-steps", 20, "--ckpt-every", 4, "--keep-checkpoints", 1, "--ema-snapshots"]

    def of(way):
        if way not in folders:
            folders[way] = tmp_path_factory.mktemp("runs") / way.replace(" ", "-")
            arguments = [*flags, *(["float16"] if way == "fsdp" else []), *WAYS[way], "--output-dir", folders[way]]
            finish(Script(script, *arguments, processes=1 if way == "one process" else 2))
            assert len(list((folders[way] / "ema-snapshots").iterdir())) == 11  # with the manifest
        return folders[way]

    return of


@pytest.mark.parametrize("way", WAYS)
def test_lengths_are_reconstructed_from_a_run(way, trained):
    folder = trained(way)
    for length, name, most in ((0.05, "power-0.05", 1e-3), (0.13, "long", 1e-3), (0.2, "longer", 1e-2)):
        found, expected = load_weights(folder, str(length)), read_pt(folder / "checkpoint-20" / f"{name}.pt")
        assert found.state_dict.keys() == expected.keys() and found.own and found.config["step"] == 20
        assert distance(found.state_dict, expected) < most
        assert "10 snapshots" in found.notes[-1]
        center = torch.cat(
            [read_safetensors(folder / "checkpoint-20/model.safetensors")[key].flatten() for key in expected]
        )
        # The trained weights are not the EMA: a reconstruction that returned them would not pass.
        assert distance(found.state_dict, expected, center) < (0.05 if way != "fsdp" else 0.3)
    one = load_weights(trained("one process") / "checkpoint-20", "0.13")
    assert distance(load_weights(folder, "0.13").state_dict, one.state_dict) < (1e-4 if way != "fsdp" else 1e-3)


def test_scripts_sample_any_length(trained, tmp_path):
    folder = trained("one process")
    words = ["sample.py", "--num-sampling-steps", 2, "--sampling-method", "euler", "--ckpt"]
    images = {}
    for ema, ckpt in (("0.13", folder), ("0.13", folder / "checkpoint-20"), ("0.05", folder), ("power-0.05", folder)):
        output = tmp_path / f"{ema}-{ckpt.name}.png"
        result = run(*words, ckpt, "--ema", ema, "--output", output)
        assert result.returncode == 0, result.stderr
        assert ("EMA 0.13 reconstructed from 10 snapshots, error about 0.00" in result.stdout) == (ema == "0.13")
        images[ema, ckpt.name] = output.read_bytes()
    assert images["0.13", folder.name] == images["0.13", "checkpoint-20"] != images["0.05", folder.name]
    guide = ["--guide-ckpt", folder, "--guide-ema", 0.2, "--ema", 0.08, "--output", tmp_path / "guided.png"]
    result = run(*words, folder, *guide)
    assert result.returncode == 0 and "EMA 0.08 recon" in result.stdout and "EMA 0.2 recon" in result.stdout
    sweep = ["--ema", "ema", 0.08, 0.13, "--num-samples", 4, "--num-sampling-steps", 2, "--solver", "euler"]
    result = run("sweep.py", "--ckpt", folder, *sweep, "--cfg-scale", 1, "--output-dir", tmp_path / "sweep")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    assert [row["settings"]["ema"] for row in rows] == ["ema", "0.08", "0.13"] and all("mean" in row for row in rows)


def test_what_cannot_be_reconstructed_is_named(trained, digits_run, tmp_path):
    folder = shutil.copytree(trained("one process"), tmp_path / "run")
    for ema in ("0.3", "0", "-0.1", "nan", "1e-7"):
        with pytest.raises(ValueError, match="sigma_rel must be above 1e-06 and below 0.2887, not"):
            load_weights(folder, ema)
    (tmp_path / "loose").mkdir()
    shutil.copy(folder / "checkpoint-20" / "power-0.05.pt", tmp_path / "loose")
    for ckpt in (digits_run, digits_run / "checkpoint-3" / "ema.pt", tmp_path / "loose"):
        with pytest.raises(ValueError, match="EMA 0.13 needs a run with --ema-snapshots: "):
            load_weights(ckpt, "0.13")
    file = folder / "ema-snapshots" / "power-0.10-12.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = run("sample.py", "--ckpt", folder, "--ema", 0.13)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"{file} is damaged: its size or checksum is not the manifest's" in result.stderr
    file.unlink()
    with pytest.raises(ValueError, match="power-0.10-12.safetensors cannot be read: No such file"):
        load_weights(folder, "0.13")
    manifest = folder / "ema-snapshots" / "manifest.json"
    for text in ("[", "{}", '{"files": {"../x": {}}}', '{"files": {"power-0.05-4.safetensors": 1}}'):
        manifest.write_text(text)
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            load_weights(folder, "0.13")
    shutil.rmtree(folder / "ema-snapshots")
    with pytest.raises(ValueError, match="has no snapshots of step 20; they are written with --ema-snapshots"):
        load_weights(folder, "0.13")


def test_without_the_flag_nothing_is_written_and_later_is_too_late(digits_run, tmp_path):
    assert not (digits_run / "ema-snapshots").exists()
    assert [path.name for path in (digits_run / "checkpoint-3").glob("*.pt")] == ["ema.pt"]
    run_folder = shutil.copytree(digits_run, tmp_path / "run")
    result = run("train.py", *TINY, "--max-steps", 9, "--ema-snapshots", "--output-dir", run_folder)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "checkpoint-6 has no EMA 'power-0.05', which counts from a run's first step" in result.stderr
    assert checkpoint.steps(run_folder) == [3, 6]
    with pytest.raises(ValueError, match="begin with a letter"):
        check_emas([EMA("0.13", 0.9)])


def test_a_run_goes_on_in_another_folder(trained, tmp_path):
    whole = trained("one process")
    more = ["--max-steps", 22, "--ema-snapshots", "--output-dir", tmp_path / "run", "--resume", whole]
    result = run("train.py", *TINY, *more)
    assert result.returncode == 0, result.stderr
    assert "from 12 snapshots" in load_weights(tmp_path / "run", "0.13").notes[-1]
