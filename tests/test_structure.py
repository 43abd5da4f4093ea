"""The structure of the project: few files at the top, imports that run one way, short functions, few lines."""

import ast
import collections
import pathlib

import pytest
from processes import ROOT

PACKAGES = ("data", "evaluation", "sampling", "training", "transport", "utils")
# What a module of a level may import of the project: itself and the levels behind it; utils imports sizes from models.
LEVELS = ({"scripts"}, {"training", "sampling", "evaluation"}, {"data"}, {"vae"}, {"transport", "models"})
PYTHON_FILES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))])
MOST_LINES, MOST_LINES_OF_GROUND_FLOOR = 12_100, 4_600


def room_of(path):
    """The package of a file; for a file at the top, its own name if modules may import it, else 'scripts'."""
    if path.parent != ROOT:
        return path.parent.name
    return path.stem if path.stem in ("models", "vae") else "scripts"


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path):
    """Names of the project's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [path.parent.name, node.module]))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names & MODULES


MODULES = {module_name(path) for path in PYTHON_FILES}
IMPORTS = {module_name(path): imported_modules(path) - {module_name(path)} for path in PYTHON_FILES}
ROOMS = {module_name(path): room_of(path) for path in PYTHON_FILES}


def test_the_top_level_is_small():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert len(list(ROOT.glob("*.py"))) <= 12 and packages == set(PACKAGES)


def test_imports_run_one_way():
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    for module, imported in IMPORTS.items():
        for other in imported:
            here, there = ROOMS[module], ROOMS[other]
            if here == "utils":
                assert there in ("utils", "models"), f"{module} imports {other}"
            elif there != "utils" and here != there:
                assert level[here] < level[there], f"{module} imports {other}"
            assert there != "scripts", f"{module} imports the script {other}"
            if here in ("transport", "models"):
                assert here == there, f"{module} imports {other}"


def test_no_imports_run_in_a_circle():
    waiting, done = dict(IMPORTS), set()
    # A package's __init__ and its modules may be imported for one another; `transport` alone has a filled one.
    while waiting:
        free = [module for module, imported in waiting.items() if imported - {ROOMS[module]} <= done]
        assert free, f"a circle among {sorted(waiting)}"
        done |= set(free)
        for module in free:
            del waiting[module]


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("folder", [".", *PACKAGES, "benchmarks", "visuals"])
def test_functions_are_short_and_take_the_values_they_need(folder):
    for path in (ROOT / folder).glob("*.py"):
        for function in functions(path):
            lines = function.end_lineno - function.lineno + 1
            name = f"{path.relative_to(ROOT)}: {function.name}"
            assert lines < (160 if name == "train.py: main" else 60), f"{name} has {lines} lines"
            takes_args = any(a.arg == "args" for a in function.args.args) and not function.name.startswith("__")
            assert not takes_args or name in ("utils/command_line.py: given", "utils/command_line.py: plain"), name


def test_lines_are_few():
    lines = collections.Counter()
    for path in [*PYTHON_FILES, *(ROOT / "visuals").glob("*.py")]:
        on_ground = path.parent == ROOT or path.parent.name in ("transport", "sampling")
        lines["ground floor" if on_ground else "other"] += len(path.read_text().splitlines())
    assert lines["ground floor"] < MOST_LINES_OF_GROUND_FLOOR and lines.total() < MOST_LINES, lines


def test_nothing_hides_an_import_or_runs_at_import():
    for path in (path for folder in (".", *PACKAGES, "benchmarks", "visuals") for path in (ROOT / folder).glob("*.py")):
        text = path.read_text()
        assert "noqa" not in text, path
        if path.parent != ROOT / "benchmarks":
            assert "sys.path" not in text, path


def test_a_script_runs_from_any_folder(tmp_path):
    from processes import run

    for script in ("train.py", "sample.py", "evaluate.py"):
        result = run(script, "--help", cwd=tmp_path)
        assert result.returncode == 0 and pathlib.Path(script).stem in result.stdout
