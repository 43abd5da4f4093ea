"""Command lines: a parser with one-line errors and --config files, and types and groups of flags."""

import argparse
import contextlib
import difflib
import itertools
import math
import os
import pathlib
import sys

import yaml


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts no abbreviations and reports an error as one line, with exit code 2.

    With a flag --config (`with_config`), the keys of the YAML file that it names are read as flags in front of the
    command line: both are checked alike, and the command line wins."""

    def __init__(self, description, with_config=False):
        super().__init__(description=description, allow_abbrev=False)
        if with_config:
            text = "read flags from a YAML file of 'flag: value' lines; flags on the command line win"
            self.add_argument("--config", metavar="FILE.yaml", help=text)

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
        words = [part for word in argv for part in word.split("=", 1)]
        configs = [value for flag, value in itertools.pairwise(words) if flag == "--config"]
        return super().parse_args([*(self._words_of_config(configs[-1]) if configs else ()), *argv])

    def _nearest(self, flag):
        flags = [string for string in self._option_string_actions if string.startswith("--")]
        near = difflib.get_close_matches(flag, flags, n=3)
        return f"; did you mean {' or '.join(near)}?" if near else "; --help lists the flags"

    def _words_of_config(self, path):
        """Return the keys of a YAML file as words of a command line."""
        try:
            content = yaml.safe_load(pathlib.Path(path).read_text()) or {}
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
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
            takes_no_value, takes_list = action.nargs == 0, action.nargs not in (None, 0)
            wrong_kind = takes_no_value != isinstance(value, bool) or (isinstance(value, list) and not takes_list)
            if wrong_kind or isinstance(value, dict):
                allowed = "true or false" if takes_no_value else "a list" if takes_list else "a value"
                self.error(f"--config {path}: {key} must be {allowed}, not {value!r}")
            if isinstance(value, list):
                words += [flag, *map(str, value)]
            elif value is False:
                words += [name for name in action.option_strings if name == f"--no-{flag[2:]}"]
            else:
                words.append(flag if value is True else f"{flag}={value}")
        return words


@contextlib.contextmanager
def user_errors(parser):
    """Context that reports a ValueError as the parser reports its own errors: one line, exit code 2."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


def flag_name(key):
    """Return the flag whose value argparse stores under `key`."""
    return f"--{key.replace('_', '-')}"


def given(args, keys):
    """Return {key: value} of the flags among `keys` that were given; a flag that was not given is None."""
    return {key: getattr(args, key) for key in keys if getattr(args, key) is not None}


def plain(args):
    """Return parsed flags as a dict that JSON and YAML can hold."""
    return {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(args).items()}


def integer(minimum):
    """Return an argparse type: an integer of at least `minimum`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if int(text) >= minimum:
                return int(text)
        raise argparse.ArgumentTypeError(f"must be an integer of {minimum} or more, not {text!r}")

    return parse


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
