"""Command lines: a parser with one-line errors and --config files, and types and groups of flags."""

import argparse
import contextlib
import difflib
import itertools
import math
import os
import pathlib
import re
import reprlib
import sys

import yaml

from utils.sizes import size_of

MOST = 2**63 - 1  # as an integer; PyTorch's seeds end there


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts no abbreviations and reports an error as one line, with exit code 2.

    With a flag --config (`with_config`), the keys of the YAML file that it names are read as flags in front of the
    command line: both are checked alike, and the command line wins. After `parse_args`, `changed` holds the keys of the
    flags that were given a value other than their default."""

    def __init__(self, description, with_config=False):
        super().__init__(description=description, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # argparse's knows no exponents
        if with_config:
            text = "read flags from a YAML file of 'flag: value' lines; flags on the command line win"
            self.add_argument("--config", metavar="FILE.yaml", help=text)

    def error(self, message):
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        self.exit(2, f"{self.prog}{where}: error: {' '.join(str(message).split())}\n")

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal may lack characters; that must not end a run
                stream.reconfigure(errors="backslashreplace")
        # Before argparse, which would complain of the misspelt flag's value first where there are positional arguments.
        for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
            if flag not in self._option_string_actions:
                self.error(f"unknown flag {flag}{self._nearest(flag)}")
        words = [part for word in argv for part in word.split("=", 1)]
        configs = [value for flag, value in itertools.pairwise(words) if flag == "--config"]
        words = [*(self._words_of_config(configs[-1]) if configs else ()), *argv]
        args = super().parse_args(words)
        flags = {word.partition("=")[0] for word in words} & self._option_string_actions.keys()
        keys = {self._option_string_actions[flag].dest for flag in flags}
        self.changed = {key for key in keys if getattr(args, key, None) != self.get_default(key)}
        return args

    def _nearest(self, flag):
        flags = [string for string in self._option_string_actions if string.startswith("--")]
        near = difflib.get_close_matches(flag, flags, n=3)
        return f"; did you mean {' or '.join(near)}?" if near else "; --help lists the flags"

    def _words_of_config(self, path):
        """Return the keys of a YAML file as words of a command line."""
        try:
            content = yaml.safe_load(pathlib.Path(os.path.expanduser(path)).read_text("utf-8")) or {}
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}")
        except RecursionError:
            self.error(f"--config {path} is not a list of flags: it is nested too deeply")
        except (yaml.YAMLError, ValueError) as error:
            self.error(f"--config {path} is not YAML: {error}")
        if not isinstance(content, dict):
            self.error(f"--config {path} must hold 'flag: value' lines")
        words = []
        for key, value in content.items():
            flag = flag_name(str(key))
            action = self._option_string_actions.get(flag)
            if action is None or flag in ("--config", "--help"):
                self.error(f"--config {path}: unknown key {key!r}{self._nearest(flag)} (keys are the flags' names)")
            if value is None:
                continue  # the flag's default
            takes_no_value, takes_list = action.nargs == 0, action.nargs not in (None, 0, "?")
            is_switch = takes_no_value or (action.nargs == "?" and isinstance(value, bool))  # its value may be left out
            wrong_kind = is_switch != isinstance(value, bool) or (isinstance(value, list) and not takes_list)
            items = value if isinstance(value, list) and value else ["a value"]
            plain = all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items)
            if wrong_kind or not plain or isinstance(value, (dict, set)):
                allowed = "true or false" if takes_no_value else "a list" if takes_list else "a value"
                self.error(f"--config {path}: {key} must be {allowed}, not {reprlib.repr(value)}")
            if isinstance(value, list):
                words += [flag, *map(str, value)]
            elif value is False:
                words += [name for name in action.option_strings if name == f"--no-{flag[2:]}"]
            else:
                words.append(flag if value is True else f"{flag}={value}")
        return words


@contextlib.contextmanager
def user_errors(parser):
    """Context that reports a ValueError, or a file that fails, as the parser's own errors: one line, exit code 2."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def flag_name(key):
    """Return the flag whose value argparse stores under `key`."""
    return f"--{key.replace('_', '-')}"


def given(args, keys):
    """Return {key: value} of the flags among `keys` that were given; a flag that was not given is None."""
    return {key: getattr(args, key) for key in keys if getattr(args, key) is not None}


def without_effect(changed, rules):
    """Return a line for each key of a flag in `changed` that has no effect; rules are (whether it holds, keys, why)."""
    found = [(key, why) for holds, keys, why in rules if holds for key in keys if key in changed]
    return [f"{flag_name(key)} has no effect {why}" for key, why in found]


def plain(args):
    """Return parsed flags as a dict that JSON and YAML can hold."""
    return {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(args).items()}


def path(text):
    """Return a path, with ~ as the home folder: no shell expands it in a YAML file or behind --flag=."""
    return pathlib.Path(location(text))


def location(text):
    """Return a text that may be a path, as it is but for ~, see `path`."""
    if not text:  # a shell's variable that is not set; as a path, it would be the working directory
        raise argparse.ArgumentTypeError("must not be empty")
    return os.path.expanduser(text)


def integer(minimum):
    """Return an argparse type: an integer of at least `minimum`, which may be written as 1e5 and at most `MOST`."""

    def parse(text):
        value = None
        with contextlib.suppress(ValueError):
            value = int(text)
        with contextlib.suppress(ValueError, OverflowError):
            if value is None and float(text).is_integer() and abs(float(text)) < 2**53:  # a float is exact up to there
                value = int(float(text))
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer of {minimum} or more, not {text!r}")
        if value > MOST:
            raise argparse.ArgumentTypeError(f"must be an integer of at most {MOST}, not {text!r}")
        return value

    return parse


def size(text):
    """Return, as an argparse type, a size: an integer of 1 or more, or HEIGHTxWIDTH of two such."""
    sides = [integer(1)(side) for side in text.split("x")] if text.count("x") < 2 else []
    if not sides:
        raise argparse.ArgumentTypeError(f"must be an integer, or HEIGHTxWIDTH such as 64x96, not {text!r}")
    return size_of(sides[0], sides[-1])


def number(minimum=-math.inf, below=math.inf, exclude_minimum=False, closed=None):
    """Return an argparse type: a finite number in [minimum, below), (minimum, below) or [minimum, closed]."""
    if closed is not None:
        below = math.nextafter(closed, math.inf)
    bracket = "(" if exclude_minimum or minimum == -math.inf else "["
    upper = f"{below})" if closed is None else f"{closed}]"

    def parse(text):
        with contextlib.suppress(ValueError):
            value = float(text)
            if minimum <= value < below and math.isfinite(value) and not (exclude_minimum and value == minimum):
                return value
        raise argparse.ArgumentTypeError(f"must be a number in {bracket}{minimum}, {upper}, not {text!r}")

    return parse


def one_of(*choices):
    """Return an argparse type: one of `choices`, where None is written 'none'."""
    allowed = {"none" if choice is None else choice: choice for choice in choices}

    def parse(text):
        key = "none" if text == "None" else text  # as the official scripts spell it
        if key not in allowed:
            raise argparse.ArgumentTypeError(f"unknown value {text!r}; choose from {', '.join(allowed)}")
        return allowed[key]

    return parse


def flag_group(parser, title, description=None):
    """Add a group of flags, and return `add`, which adds a flag to it, with the default behind the help `text`.

    A flag whose `parse` is None takes no value: 'store_true', or as `action` says. `alias` is another name of it."""
    group = parser.add_argument_group(title, description)

    def add(flag, parse, metavar, text, default=None, alias=None, **more):
        names = [flag] if alias is None else [flag, alias]
        if parse is None and "action" not in more:
            return group.add_argument(*names, action="store_true", help=text, **more)
        text = text if default is None else f"{text} (default: {default})"
        return group.add_argument(*names, type=parse, metavar=metavar, help=text, default=default, **more)

    return add
