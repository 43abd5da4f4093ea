"""Command lines: help, config files, and what people get wrong."""

import argparse
import importlib
import io
import pathlib
import sys
import tempfile

import pytest
import torch
from conftest import TINY
from test_models import STATE_DICT

from data.loader import make_loader
from sampling.flags import SOLVER_FLAGS, solver_settings
from training import log
from utils.command_line import Parser, given, integer, location, number, one_of, path, user_errors

SCRIPTS = ("train", "sample", "extract_latents", "download", "demo")


def fail(script, arguments, capsys, monkeypatch):
    """Run a script's main() in this process; assert exit code 2 and one line on stderr, and return the line."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script).main()
    captured = capsys.readouterr()
    assert error.value.code == 2, captured
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"{script}.py: error: "), captured.err
    return captured.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_flag(script, capsys, monkeypatch):
    parsers = []
    original = Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", lambda self: parsers.append(self) or original(self))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script).main()
    assert error.value.code == 0
    text = capsys.readouterr().out
    for action in parsers[0]._actions:
        assert action.help, f"{action.option_strings} has no help"
        assert all(string in text for string in action.option_strings)


TRAIN_MISTAKES = [
    (["--lrr", "1"], "unknown flag --lrr; did you mean --lr or --mlp?"),
    (["--learnig-sigma"], "--learn-sigma"),
    (["--qqqq"], "--help lists the flags"),
    (["--model", "SiT-XXL/2"], "choose from SiT-S/2, SiT-S/4"),
    (["--path-type", "linear"], "choose from Linear, GVP, VP"),
    (["--prediction", "velocty"], "choose from velocity, score, noise"),
    (["--loss-weight", "uniform"], "choose from none, velocity, likelihood"),
    (["--image-size", "9"], "does not divide: it must be a multiple of 2 with --vae none (downsampling 1)"),
    (["--image-size", "100", "--vae", "ema"], "must be a multiple of 16"),
    (["--image-size", "0"], "must be an integer of 1 or more"),
    (["--input-size", "4", "--image-size", "8"], "contradicts --input-size 4"),
    (["--in-channels", "4"], "contradicts --vae none, which has 1 channels"),
    (["--hidden-size", "30"], "hidden_size 30 is not a multiple of num_heads 4"),
    (["--num-classes", "5"], "digit 5: label 5 is out of range; 5 classes have the labels 0 to 4"),
    (["--num-classes", "11"], "--num-classes 11 contradicts the data, which has 10"),
    (["--global-batch-size", "16", "--micro-batch-size", "6"], "no multiple of --micro-batch-size 6 x 1 ranks = 6"),
    (["--lr", "-1"], "must be a number in (0, inf)"),
    (["--lr", "nan"], "must be a number"),
    (["--ema-decay", "1"], "must be a number in [0, 1)"),
    (["--train-eps", "0.7"], "must be a number in [0, 0.5)"),
    (["--class-dropout-prob", "0", "--cfg-scale", "2"], "needs a null class"),
    (["--data-path", "/nowhere"], "no such data; give 'digits'"),
    (["--output-dir", "/dev/null/x"], "the run's folder /dev/null/x cannot be made"),
    (["--init-from", "/nowhere.pt"], "no such checkpoint: /nowhere.pt"),
    (["--precision", "tf32"], "--precision tf32 needs a CUDA GPU"),
    (["--fsdp-shard-size", "2"], "no effect without --parallel fsdp"),
    (["--betas", "0.9"], "expected 2 arguments"),
    (["--betas", "0.9", "1"], "must be a number in [0, 1)"),
    (["--lr-schedule", "linear"], "choose from constant, cosine"),
    (["--max-grad-norm", "0"], "must be a number in (0, inf)"),
    (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: No such file"),
    (["--vae", "/nowhere"], "cannot load the VAE '/nowhere'"),
    (["stray"], "unrecognized arguments: stray"),
]


@pytest.mark.parametrize("arguments, message", TRAIN_MISTAKES, ids=lambda value: "_".join(value)[:40])
def test_mistakes_in_training(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output_dir = tmp_path / "run"
    assert message in fail("train", [*TINY, "--output-dir", output_dir, *arguments], capsys, monkeypatch)
    assert not output_dir.exists()


def test_training_without_data_says_what_is_missing(capsys, monkeypatch):
    assert "--data-path is missing" in fail("train", [], capsys, monkeypatch)


def test_a_run_folder_with_checkpoints_is_not_written_over(capsys, monkeypatch, digits_run):
    before = (digits_run / "log.txt").read_text()
    flags = [*TINY, "--output-dir", digits_run]
    message = fail("train", [*flags, "--resume", "never"], capsys, monkeypatch)
    assert "holds checkpoint-6; give another, or --resume auto" in message
    message = fail("train", [*flags, "--resume", digits_run / "checkpoint-3"], capsys, monkeypatch)
    assert "holds checkpoint-6, newer than" in message
    for change, text in (
        (["--hidden-size", 64], "--hidden-size: 64 was given"),
        (["--prediction", "noise"], "--prediction: noise was given"),
        (["--class-dropout-prob", 0], "--class-dropout-prob: False was given"),
        (["--resume", "/nowhere"], "--resume /nowhere: no such folder"),
    ):
        assert text in fail("train", [*flags, *change], capsys, monkeypatch)
    assert (digits_run / "log.txt").read_text() == before


def test_weights_of_another_number_of_heads_do_not_start_a_run(capsys, monkeypatch, digits_run, tmp_path):
    flags = [*TINY, "--num-heads", "8", "--ckpt", digits_run, "--output-dir", tmp_path / "run"]
    assert "was trained with --num-heads 4, and the model has 8" in fail("train", flags, capsys, monkeypatch)


SAMPLE_MISTAKES = [
    (["ODEE"], "choose from"),
    (["--sampling-metod", "euler"], "did you mean --sampling-method"),
    (["ODE", "--sampling-method", "Heun"], "unknown sampling method 'Heun'; choose from dopri5"),
    (["SDE", "--sampling-method", "dopri5"], "unknown sampling method 'dopri5'; choose from Euler, Heun"),
    (["SDE", "--diffusion-form", "cubic"], "choose from constant, SBDM, sigma"),
    (["SDE", "--last-step", "mean"], "choose from none, Mean, Tweedie, Euler"),
    (["SDE", "--last-step-size", "1.5"], "must be a number in (0, 1)"),
    (["SDE", "--atol", "1e-5"], "--atol has no effect on SDE"),
    (["ODE", "--diffusion-form", "sigma"], "--diffusion-form has no effect on ODE"),
    (["--num-sampling-steps", "1"], "must be an integer of 2 or more"),
    (["--time-shift", "2"], "--time-shift has no effect on dopri5"),
    (["--cfg-interval", "0.2"], "expected 2 arguments"),
    (["--cfg-interval", "0.5", "1.5"], "must be a number in [0, 1]"),
    (["--cfg-interval", "0.5", "0.5"], "LO must lie below HI"),
    (["--cfg-interval", "0", "0.5", "--cfg-scale", "1"], "no effect with --cfg-scale 1"),
    (["--class-labels", "3", "10"], "class label 10 is out of range: the model's are 0 to 9"),
    (["--class-labels", "-1"], "must be an integer of 0 or more"),
    (["--class-labels", "cat"], "must be an integer of 0 or more"),
    (["--model", "SiT-B/2"], "--model SiT-B/2 contradicts the weights"),
    (["--num-classes", "1000"], "--num-classes 1000 contradicts the weights"),
    (["--image-size", "9"], "--image-size 9 contradicts the weights, which make 8 pixels; another"),
    (["--prediction", "noise"], "--prediction noise contradicts the checkpoint"),
    (["--vae", "ema"], "--vae ema makes 4"),
    (["--output", "grid.bmp"], "must end in .png"),
    (["--atol", "1e-30", "--rtol", "1e-30"], "are too tight"),
    (["--output", "/nowhere/grid.png"], "the folder /nowhere does not exist"),
    (["--seed", "-1"], "must be an integer of 0 or more"),
    (["--guided-channels", "some"], "must be an integer of 1 or more"),
]


@pytest.mark.parametrize("arguments, message", SAMPLE_MISTAKES, ids=lambda value: "_".join(value)[:40])
def test_mistakes_in_sampling(arguments, message, capsys, monkeypatch, digits_run):
    assert message in fail("sample", ["--ckpt", digits_run, *arguments], capsys, monkeypatch)


def test_weights_that_are_missing_or_not_described_enough(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no such checkpoint" in fail("sample", ["--ckpt", tmp_path / "no.pt"], capsys, monkeypatch)
    assert "no checkpoint in" in fail("sample", ["--ckpt", tmp_path], capsys, monkeypatch)
    assert "cannot fetch nyu-visionx/SiT-collections" in fail("sample", [], capsys, monkeypatch)
    assert "cannot fetch nyu-visionx/SiT-collections" in fail("download", [], capsys, monkeypatch)
    torch.save(STATE_DICT, tmp_path / "w.pt")
    assert "give --num-heads" in fail("sample", ["--ckpt", tmp_path / "w.pt"], capsys, monkeypatch)


CONFIG_MISTAKES = [
    ("lrr: 1", "unknown key 'lrr'; did you mean --lr or --mlp?"),
    ("lr: fast", "argument --lr: must be a number"),
    ("learn-sigma: 3", "learn-sigma must be true or false, not 3"),
    ("lr: true", "lr must be a value, not True"),
    ("lr: [1, 2]", "lr must be a value, not [1, 2]"),
    ("align: [a]", "align must be a value, not ['a']"),
    ("lr: {a: 1}", "lr must be a value, not {'a': 1}"),
    ("model: SiT-Q/2", "choose from SiT-S/2"),
    ("- lr", "must hold 'flag: value' lines"),
    ("a: [", "is not YAML"),
    ("config: other.yaml", "unknown key 'config'"),
    ("[" * 20_000, "nested too deeply"),
    ("betas: [0.9, [1]]", "betas must be a list, not [0.9, [1]]"),
    (f"global-seed: {'9' * 5000}", "is not YAML"),
    ("lr: 2001-99-99", "is not YAML"),
    ("betas: &a [1, *a]", "betas must be a list, not [1, [1, [1"),
]


@pytest.mark.parametrize("text, message", CONFIG_MISTAKES)
def test_mistakes_in_config_files(text, message, capsys, monkeypatch, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert message in fail("train", ["--config", path], capsys, monkeypatch)


def test_config_files_set_flags_and_the_command_line_wins(tmp_path):
    import train

    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-3\nglobal_batch_size: 32\nlearn-sigma: false\nwandb: true\nmax-steps: null\ndepth: 3\n")
    for arguments in (["--config", str(path), "--depth", "5"], ["--depth", "5", f"--config={path}"]):
        args = train.build_parser().parse_args(arguments)
        assert (args.lr, args.global_batch_size, args.learn_sigma, args.wandb) == (1e-3, 32, False, True)
        assert (args.max_steps, args.depth, args.epochs) == (None, 5, 1400)
    path.write_text("ema-snapshots: true\ndirection_loss: 2\nalign: false")  # their values may be left out
    args = train.build_parser().parse_args(["--config", str(path)])
    assert (args.lr, args.ema_snapshots, args.direction_loss, args.align) == (1e-4, "float32", 2, None)


def test_flag_types():
    for text, value in (("2", 2), ("1e5", 100_000), ("1_000", 1000), ("2.0", 2), (str(2**63 - 1), 2**63 - 1)):
        assert integer(2)(text) == value
    assert one_of(None, "a")("none") is None and one_of(None, "a")("None") is None
    assert location("a b/") == "a b/" and path("a/") == pathlib.Path("a")
    assert number(0, 1)("0.5") == 0.5 and number()("-1e-1") == -0.1
    mistakes = [(integer(2), text) for text in ("1", "2.5", "1e-1", "1e400", "inf", "nan", "", "9" * 5000, "1e17")]
    mistakes += [(integer(0), str(2**63)), (number(0, 1), "1"), (number(), "inf"), (number(), "nan")]
    mistakes += [(location, ""), (path, "")]  # a shell's variable that is not set
    for parse, text in mistakes:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_numbers_are_no_flags_because_they_are_negative_and_have_exponents(tmp_path):
    import train

    parse = train.build_parser().parse_args
    for text in ("-1e-1", "-.1", "-0.1", "-1E-1"):
        assert parse(["--logit-normal-mean", text]).logit_normal_mean == -0.1
    assert parse(["--max-steps", "1e3", "--betas", "9e-1", ".99"]).betas == [0.9, 0.99]
    (tmp_path / "a.yaml").write_text("logit-normal-mean: -1e-1\nmax-steps: 1e3\nepochs: 2.0e+1\nlr: 1e-5\n")
    args = parse(["--config", str(tmp_path / "a.yaml")])
    assert (args.logit_normal_mean, args.max_steps, args.epochs, args.lr) == (-0.1, 1000, 20, 1e-5)


NUMBER_MISTAKES = [
    (
        ["--global-seed", "20261125093000123456"],
        "argument --global-seed: must be an integer of at most 9223372036854775807",
    ),
    (["--global-seed", "-1"], "argument --global-seed: must be an integer of 0 or more, not '-1'"),
    (["--max-steps", "1e-1"], "argument --max-steps: must be an integer of 1 or more"),
    (["--lr", "-1e-4"], "argument --lr: must be a number in (0, inf), not '-1e-4'"),
    (["--max-grad-norm", "inf"], "argument --max-grad-norm: must be a number in (0, inf), not 'inf'"),
    (["--betas", "0.9", "-1e-1"], "argument --betas: must be a number in [0, 1), not '-1e-1'"),
    (["--logit-normal-mean", "-inf"], "argument --logit-normal-mean: must be a number in (-inf, inf), not '-inf'"),
]


@pytest.mark.parametrize("arguments, message", NUMBER_MISTAKES)
def test_numbers_that_make_no_sense_are_named_with_their_flag(arguments, message, capsys, monkeypatch):
    assert message in fail("train", arguments, capsys, monkeypatch)


ALL_SCRIPTS = ("train", "sample", "sample_ddp", "extract_latents", "evaluate", "likelihood", "demo", "sweep")


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_the_home_folder_is_expanded_in_every_path(script, monkeypatch):
    """No shell does it behind --flag= or in a YAML file. A flag of a path says so by its metavar or its help."""
    parsers = []

    def stop(self, argv=None):
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_args", stop)
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    monkeypatch.setenv("HOME", "/home/me")
    kinds = ("PATH", "FILE", "FOLDER", "DIR")
    actions = [action for action in parsers[0]._actions if action.type and any(k in str(action.metavar) for k in kinds)]
    actions += [action for action in parsers[0]._actions if not action.option_strings and action.type]
    assert actions
    for action in actions:
        assert str(action.type("~/x")) == "/home/me/x", action.option_strings
        assert str(action.type("a/~/x")) == "a/~/x", action.option_strings


def test_a_config_file_and_its_values_may_lie_in_the_home_folder(monkeypatch, tmp_path):
    import train

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("data-path: ~/data\noutput-dir: ~/run\n", encoding="utf-8")
    args = train.build_parser().parse_args(["--config=~/a.yaml", "--vae=~/vae"])
    paths = args.data_path, str(args.output_dir), args.vae
    assert paths == tuple(f"{tmp_path}/{name}" for name in ("data", "run", "vae"))


def test_output_that_the_terminal_has_no_characters_for_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    Parser("").parse_args([])
    print("± 1", flush=True)
    assert stream.buffer.getvalue() == b"\\xb1 1\n"


def test_files_that_fail_are_one_line(capsys):
    for error, text in (
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied"),
    ):
        with pytest.raises(SystemExit) as exit, user_errors(Parser("")):
            raise error
        assert exit.value.code == 2 and text in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize("cores, ranks, workers", [(1, 1, 1), (2, 1, 2), (64, 1, 4), (8, 4, 2), (2, 8, 1)])
def test_there_are_at_most_as_many_loader_processes_as_cores(cores, ranks, workers, monkeypatch):
    import train

    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert train.build_parser().parse_args([]).num_workers == workers


def test_loader_processes_do_without_a_long_folder_for_temporary_files(monkeypatch, tmp_path):
    """The names of the sockets in it must have fewer than 108 bytes; a scheduler's folders of jobs are longer."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for processes, folder in ((0, str(long)), (1, "/tmp")):
        monkeypatch.setattr("tempfile.tempdir", str(long))
        make_loader([], [], processes, torch.device("cpu")).close()
        assert tempfile.tempdir == folder


def test_a_folder_is_not_taken_for_a_tracker(monkeypatch, tmp_path):
    """Such as wandb/, which the package leaves where a run was started."""
    (tmp_path / "tracker_not_installed").mkdir()
    monkeypatch.setitem(log.TRACKERS, "tracker", (object, "tracker_not_installed"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="--tracker needs the package tracker"):
        log.import_trackers(["tracker"])


def test_the_official_command_lines_parse():
    import sample
    import train

    train.build_parser().parse_args(
        "--data-path x --results-dir results --model SiT-XL/2 --image-size 256 --num-classes 1000 --epochs 1400 "
        "--global-batch-size 256 --global-seed 0 --vae ema --num-workers 4 --log-every 100 --ckpt-every 50000 "
        "--sample-every 10000 --cfg-scale 4.0 --wandb --ckpt x.pt --path-type Linear --prediction velocity "
        "--loss-weight None --sample-eps 0.001 --train-eps 0.001".split()
    )
    parser = sample.build_parser()
    shared = "--model SiT-XL/2 --vae mse --image-size 512 --num-classes 1000 --cfg-scale 4.0 --num-sampling-steps 250 "
    shared += "--seed 0 --ckpt x.pt --path-type GVP --prediction noise --loss-weight None --sample-eps 0 --train-eps 0"
    ode = parser.parse_args(f"ODE {shared} --sampling-method dopri5 --atol 1e-6 --rtol 1e-3 --reverse".split())
    assert solver_settings(ode.mode, given(ode, SOLVER_FLAGS))[1] == dict(
        sampling_method="dopri5", atol=1e-6, rtol=1e-3, reverse=True, num_steps=250, time_shift=1.0
    )
    sde = "--sampling-method Heun --diffusion-form increasing-decreasing --diffusion-norm 1.0 --last-step None"
    sde = parser.parse_args(f"SDE {shared} {sde} --last-step-size 0.04".split())
    assert solver_settings(sde.mode, given(sde, SOLVER_FLAGS))[1] == dict(
        sampling_method="Heun",
        diffusion_form="increasing-decreasing",
        diffusion_norm=1.0,
        last_step=None,
        last_step_size=0.04,
        num_steps=250,
        time_shift=1.0,
    )
