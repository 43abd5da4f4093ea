"""The README: its length, and that what its commands name exists. So for the commands in the heads of configs/."""

import importlib
import re
import shlex

import pytest
from processes import ROOT

from utils.command_line import Parser

README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
MOST_WORDS = 2_000


def commands():
    """Return the commands that run a script with `python` or `torchrun`, as lists of words."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ").splitlines()
    heads = [line for path in (ROOT / "configs").glob("*.yaml") for line in path.read_text().splitlines()]
    indented = [line.removeprefix("#   ") for line in heads if line.startswith("#   ")]
    words = [shlex.split(line, comments=True) for line in [*blocks, *indented]]
    return [line for line in words if line and line[0] in ("python", "torchrun")]


class Parsed(Exception):
    """The flags are right."""


def test_the_readme_is_short():
    assert len(README.split()) < MOST_WORDS


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_names_a_script_and_its_flags(words, monkeypatch):
    index = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[index]).is_file()
    parse_args = Parser.parse_args

    def parse(parser, argv=None):
        parse_args(parser, words[index + 1 :])  # exits if a flag or a value is wrong
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        importlib.import_module(words[index].removesuffix(".py")).main()


def test_the_files_that_the_readme_names_exist():
    linked = re.findall(r"\]\(([^)#:]+)\)", PROSE)
    named = re.findall(r"`([\w/]+\.(?:py|md|yaml))`", PROSE)
    assert len(linked) > 3 and len(named) > 10
    missing = [name for name in [*linked, *named] if not any((ROOT / f / name).exists() for f in (".", "configs"))]
    assert not missing
