"""Command lines: a parser with one-line errors and --config files, and the flags that two or more scripts share."""

import argparse
import contextlib
import difflib
import math
import os
import pathlib
import sys

import yaml

import data
import latents
from transport import (
    ADAPTIVE_ODE_METHODS,
    DIFFUSION_FORMS,
    LAST_STEPS,
    LOSS_WEIGHTS,
    ODE_METHODS,
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for people: no abbreviations, an error is one line and exit code 2.

    If a flag --config is added (`add_config_flag`), the keys of the YAML file it names are read as if the flags of
    these names stood before all others on the command line, so that flags win over the file and both are checked alike.
    """

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        self.exit(2, f"{self.prog}{where}: error: {' '.join(str(message).split())}\n")

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        # Before argparse, which would complain of the misspelt flag's value first where there are positional arguments.
        for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
            if flag not in self._option_string_actions:
                self.error(f"unknown flag {flag}{self._nearest(flag)}")
        config = _value_of("--config", argv) if "--config" in self._option_string_actions else None
        words = [] if config is None else self._words_of_config(config)
        return super().parse_args(words + argv)

    def _nearest(self, flag):
        flags = [string for string in self._option_string_actions if string.startswith("--")]
        near = difflib.get_close_matches(flag, flags, n=3)
        return f"; did you mean {' or '.join(near)}?" if near else "; --help lists what is allowed"

    def _words_of_config(self, path):
        """The keys of a YAML file as words of a command line."""
        try:
            content = yaml.safe_load(pathlib.Path(path).read_text())
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"--config {path} is not YAML: {error}")
        if not isinstance(content or {}, dict):
            self.error(f"--config {path} must hold 'flag: value' lines")
        words = []
        for key, value in (content or {}).items():
            flag = f"--{str(key).replace('_', '-')}"
            action = self._option_string_actions.get(flag)
            if action is None or flag in ("--config", "--help"):
                self.error(f"--config {path}: unknown key {key!r}{self._nearest(flag)} (keys are the flags' names)")
            if value is None:
                continue  # the flag's default
            takes_no_value, takes_list = action.nargs == 0, action.nargs not in (None, 0)
            wrong_kind = takes_no_value != isinstance(value, bool) or (isinstance(value, list) and not takes_list)
            if wrong_kind or isinstance(value, dict):
                allowed = "true or false" if takes_no_value else "a list" if takes_list else "a value"
                self.error(f"--config {path}: {key} must be {allowed}, not {value!r}")
            if value is True:
                words.append(flag)
            elif value is False:
                negation = f"--no-{flag[2:]}"
                words += [negation] if negation in self._option_string_actions else []
            elif isinstance(value, list):
                words += [flag, *map(str, value)]
            else:
                words.append(f"{flag}={value}")
        return words


def _value_of(flag, argv):
    """The last value given to `flag` in argv, as '--flag value' or '--flag=value'; None if there is none."""
    value = None
    for i, word in enumerate(argv):
        if word == flag:
            value = argv[i + 1] if i + 1 < len(argv) else None
        elif word.startswith(flag + "="):
            value = word.partition("=")[2]
    return value


@contextlib.contextmanager
def user_errors(parser):
    """Report a ValueError from building what the user asked for as the parser's own errors: one line, exit code 2."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


def integer(minimum):
    """An argparse type: an integer of at least `minimum`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer of {minimum} or more, not {text!r}")
        return value

    return parse


def number(minimum=-math.inf, below=math.inf, exclude_minimum=False, closed=None):
    """An argparse type: a finite number in [minimum, below), (minimum, below) or [minimum, closed]."""
    if closed is not None:
        below = math.nextafter(closed, math.inf)
    bracket = "(" if exclude_minimum or minimum == -math.inf else "["
    upper = f"{below})" if closed is None else f"{closed}]"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (minimum <= value < below and math.isfinite(value)) or (exclude_minimum and value == minimum):
            raise argparse.ArgumentTypeError(f"must be a number in {bracket}{minimum}, {upper}, not {text!r}")
        return value

    return parse


def one_of(*choices):
    """An argparse type: one of `choices`, where None is written 'none'."""
    allowed = {"none" if choice is None else choice: choice for choice in choices}

    def parse(text):
        key = "none" if text == "None" else text  # as the official scripts spell it
        if key not in allowed:
            raise argparse.ArgumentTypeError(f"unknown value {text!r}; choose from {', '.join(allowed)}")
        return allowed[key]

    return parse


def flag_group(parser, title, description=None):
    """A group of flags; returns `add(flag, parse, metavar, text, default=None)`, which adds one to it.

    The help is `text` with the default behind it; where the default is None, `text` says what that means. `alias` is
    another name of the flag.
    """
    group = parser.add_argument_group(title, description)

    def add(flag, parse, metavar, text, default=None, alias=None, **more):
        text = text if default is None else f"{text} (default: {default})"
        flags = [flag] if alias is None else [flag, alias]
        group.add_argument(*flags, type=parse, metavar=metavar, help=text, default=default, **more)

    return add


def add_config_flag(parser):
    """The flag that `Parser` treats specially."""
    text = "read flags from a YAML file of 'flag: value' lines; flags on the command line win"
    parser.add_argument("--config", metavar="FILE.yaml", help=text)


def add_data_flags(parser, with_loader=True):
    """Which labelled images, and the space they are taken to. Returns the group's `add`, for more of them.

    Without `with_loader`, not --num-workers, for a script that reads them itself.
    """
    add = flag_group(parser, "data")
    path = (
        "digits (scikit-learn's), a folder of class folders, a saved Dataset, Parquet or Arrow files, cached latents, "
        "or a data set's name on the hub"
    )
    add("--data-path", str, "PATH|NAME|digits", path)
    kind = f"one of {', '.join(data.FORMATS)} (default: what --data-path is)"
    add("--data-format", one_of(*data.FORMATS), "FORMAT", kind)
    add("--image-key", str, "COLUMN", "column of the images, in tables", default="image")
    add("--label-key", str, "COLUMN", "column of the class labels, in tables", default="label")
    add("--split", str, "NAME", "split to read, where the data has several (default: train)")
    stream = "read hub, parquet or arrow data as it comes, without a copy on this machine's disk"
    parser.add_argument("--streaming", action="store_true", help=stream)
    skip = (
        "leave out images that cannot be read, labels that are no class, empty class folders and damaged shards, and "
        "count them in the log"
    )
    parser.add_argument("--skip-bad-images", action="store_true", help=f"{skip} (default: stop and name the first)")
    size = "images are resized and cropped to this (default: the data's own size where all images have one, else 256)"
    add("--image-size", integer(1), "PIXELS", size)
    vae = "autoencoder to encode with: sd-vae-ft-ema or -mse, none for pixels, a hub name, a folder"
    add("--vae", str, "ema|mse|none|NAME|FOLDER", f"{vae} (default: that of cached latents, else ema)")
    add("--vae-precision", one_of(*latents.PRECISIONS), "fp32|bf16", "precision of the autoencoder", default="fp32")
    if with_loader:
        add("--num-workers", integer(0), "N", "processes per rank that load data", default=4)
    return add


def open_data(args):
    """What `add_data_flags` names, as `data.open_source` opens it. Raises ValueError."""
    if args.data_path is None:
        raise ValueError("--data-path is missing: --help says what it can be, digits for one")
    columns = dict(image_key=args.image_key, label_key=args.label_key)
    how = dict(split=args.split, streaming=args.streaming, skip_bad=args.skip_bad_images)
    return data.open_source(args.data_path, args.data_format, **columns, **how)


def add_transport_flags(parser, from_checkpoint):
    """The arguments of `create_transport`. Where a checkpoint knows them, no flag means: as the checkpoint says."""
    add = flag_group(parser, "interpolant")

    def add_choice(flag, choices, default, text):
        names = ["none" if choice is None else choice for choice in choices]
        if from_checkpoint:
            text, default = f"{text} (default: the checkpoint's, or {default or 'none'})", None
        elif default is None:
            text = f"{text} (default: none)"
        add(flag, one_of(*choices), "|".join(names), text, default=default)

    add_choice("--path-type", tuple(PATHS), "Linear", "path between noise and data")
    add_choice("--prediction", PREDICTIONS, "velocity", "what the network predicts")
    add_choice("--loss-weight", LOSS_WEIGHTS, None, "weight over time of noise and score losses; velocity has none")
    for flag, which in (("--train-eps", "training times stay"), ("--sample-eps", "sampling stays")):
        text = f"how far {which} from the singular ends of [0, 1]: both for Linear and GVP, the data end for VP"
        add(flag, number(0, 0.5), "EPS", f"{text} (default: 0 to 1e-3, as path and prediction need)")


def add_solver_flags(parser):
    """The mode and everything about how to integrate. A flag that is not given is None: see `solver_settings`."""
    parser.add_argument("mode", nargs="?", choices=["ODE", "SDE"], help="how to sample (default: ODE)")
    add = flag_group(parser, "solver")
    add(
        "--num-sampling-steps",
        integer(2),
        "N",
        "time points, both ends included: N - 1 steps, of as many network calls as the method makes per step (euler, "
        "Euler 1; midpoint, heun2, Heun 2; heun3 3; rk4 4), and one call more for an SDE's last step; adaptive ODE "
        "methods choose their own steps (default: 250)",
    )
    add(
        "--sampling-method",
        str,
        "METHOD",
        f"ODE: {', '.join(ODE_METHODS)} (default: dopri5); SDE: {', '.join(SDE_METHODS)} (default: Euler)",
    )
    shift = "above 1: more of the time points where there is noise, as larger images want (default: 1)"
    add("--time-shift", number(0, exclude_minimum=True), "S", shift)
    add = flag_group(parser, "ODE alone")
    positive = number(0, exclude_minimum=True)
    add("--atol", positive, "TOL", "absolute tolerance of adaptive methods (default: 1e-6)")
    add("--rtol", positive, "TOL", "relative tolerance of adaptive methods (default: 1e-3)")
    parser.add_argument(
        "--reverse",
        action="store_true",
        default=None,
        help="ODE alone: integrate from data to noise; the noise that is drawn stands in for the data",
    )
    add = flag_group(parser, "SDE alone")
    add("--diffusion-form", str, "FORM", f"diffusion over time: {', '.join(DIFFUSION_FORMS)} (default: sigma)")
    add("--diffusion-norm", number(0), "W", "scale of the diffusion (default: 1)")
    last_steps = ["none" if step is None else step for step in LAST_STEPS]
    add(
        "--last-step", one_of(*last_steps), "|".join(last_steps), "how to reach the data, without noise (default: Mean)"
    )
    add("--last-step-size", number(0, 1, exclude_minimum=True), "DT", "size of the last step in time (default: 0.04)")


ODE_DEFAULTS = dict(sampling_method="dopri5", atol=1e-6, rtol=1e-3, reverse=False)
SDE_DEFAULTS = dict(
    sampling_method="Euler", diffusion_form="sigma", diffusion_norm=1.0, last_step="Mean", last_step_size=0.04
)


def solver_settings(args):
    """(mode, the keyword arguments of `Sampler.sample_ode` or `.sample_sde`) that the solver flags mean.

    Raises:
        ValueError: a flag of the other mode, which would be of no effect.
    """
    mode = args.mode or "ODE"
    own, other = (ODE_DEFAULTS, SDE_DEFAULTS) if mode == "ODE" else (SDE_DEFAULTS, ODE_DEFAULTS)
    for name in other.keys() - own.keys():
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {mode}; it belongs to the other mode")
    settings = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in own.items()}
    if settings.get("last_step") == "none":
        settings["last_step"] = None
    if args.time_shift is not None and settings["sampling_method"] in (*ADAPTIVE_ODE_METHODS, "scipy_solver"):
        raise ValueError(f"--time-shift has no effect on {settings['sampling_method']}, which chooses its own steps")
    return mode, settings | {"num_steps": args.num_sampling_steps or 250, "time_shift": args.time_shift or 1.0}
