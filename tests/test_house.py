"""The house: which file may import which, what stands at the top, lengths of files and lines, text I/O.

Each check is a function from sources ({path: text}) to a list of faults. The project must have none. Small
sources that are wrong show that every check can fail.
"""
import ast
import re
import sys

import pytest

from conftest import ROOT

WIDTH = 110
PACKAGES = "experiments", "harness", "referee", "tasks"
MAY_IMPORT = {"experiments": (), "methods": ("common", "harness"), "common": (),
              "harness": ("common", "harness", "tasks"), "tasks": ("common", "tasks"),
              "referee": ("experiments", "harness", "methods", "referee"),
              "setup": ()}
MAY_IMPORT["docs"] = *MAY_IMPORT, "docs"                                    # docs/workshop: all but tests
MAY_IMPORT |= dict.fromkeys(("tests", "benchmarks"), (*MAY_IMPORT, "tests", "benchmarks"))
EXCEPTIONS = {("tasks/build.py", "harness/stages.py"): "anywhere",
              ("harness/command_line.py", "referee"): "main"}
LIMITS = {"methods": (150, 250), "common": (1, 450), "referee": (1, 250), "README": (1, 250),
          "docs": (1, 119)}


def sources():
    """Every .py file and README: {path relative to the root: text}. What .gitignore names is left out."""
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in ignored
               and not path.name.startswith(".") and not path.name.endswith(".egg-info")]
    files = [*ROOT.glob("*.py"), *ROOT.glob("README*.md"),
             *(file for folder in folders for file in folder.rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in sorted(files)}


SOURCES = sources()


def layer(path):
    """The layer of design.md's drawing that a file belongs to."""
    if "/" in path:
        return path.split("/")[0]
    known = {"common.py": "common", "setup.py": "setup", "README.md": "README", "README.zh.md": "README"}
    return known.get(path, "methods")


def python(files):
    return {path: text for path, text in files.items() if path.endswith(".py")}


# ---------------------------------------------------------------------------------------------------- imports

def imports(text):
    """(dotted name, the function it stands in or "", line) of all that the text imports, wherever it stands.

    `from a import b` gives "a.b", which may be a name in a. import_module of a name that is made at run time
    gives "*" for what is not known: import_module(f"experiments.{x}") gives "experiments.*".
    """
    found = []

    def visit(node, function):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = function or node.name
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                names = [known_name(node.args[0])]
        found.extend((name, function, node.lineno) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(text), "")
    return found


def known_name(node):
    """What is known of the name of a module before the code runs, "*" for the rest."""
    if isinstance(node, ast.Constant):
        return node.value
    first = node.values[0] if isinstance(node, ast.JoinedStr) else None
    start = first.value if isinstance(first, ast.Constant) else ""
    return start[:start.rfind(".") + 1] + "*"


def target(name, files):
    """The file of ours that a dotted name is taken from; None for other people's; "*" is some method."""
    if name == "*":
        return name
    parts = name.split(".")
    for start in ("/".join(parts[:2]), parts[0], f"tests/{parts[0]}", f"docs/workshop/{parts[0]}"):
        for path in (f"{start}.py", f"{start}/__init__.py"):
            if path in files:
                return path
    return None


def arrows(files):
    """(from, to, function, line) of every import of our own files."""
    files = python(files)
    found = [(path, target(name, files), function, line)
             for path, text in files.items() for name, function, line in imports(text)]
    return [arrow for arrow in found if arrow[1] not in (None, arrow[0])]


def forbidden_arrows(files):
    faults = []
    for path, to, function, line in arrows(files):
        excepted = {EXCEPTIONS.get((path, to)), EXCEPTIONS.get((path, layer(to)))}
        if layer(to) not in MAY_IMPORT.get(layer(path), ()) and not excepted & {"anywhere", function}:
            faults.append(f"{path} line {line}: {layer(path)} may not import {to}")
    for path, text in python(files).items():
        relative = [line for name, _, line in imports(text) if name.startswith(".")]
        faults += [f"{path} line {line}: relative import" for line in relative]
    return faults


def circles(files):
    """Every circle of files that import each other, without the arrow upward, command_line.py -> referee."""
    graph, faults, done = {}, set(), set()
    for path, to, function, _ in arrows(files):
        if EXCEPTIONS.get((path, layer(to))) != function:
            graph.setdefault(path, set()).add(to)

    def visit(path, trail):
        if path in trail:
            circle = trail[trail.index(path):]
            first = circle.index(min(circle))
            faults.add(" -> ".join([*circle[first:], *circle[:first], circle[first]]))
        elif path not in done:
            for to in sorted(graph.get(path, ())):
                visit(to, [*trail, path])
            done.add(path)

    for path in sorted(graph):
        visit(path, [])
    return sorted(faults)


def foreign_imports(files):
    """common.py needs torch, transformers and its file format; experiments need nothing beside Python."""
    faults = []
    for path, text in python(files).items():
        needed = {"common": {"torch", "transformers", "safetensors"}, "experiments": set()}.get(layer(path))
        for name, _, line in imports(text) if needed is not None else ():
            if name.split(".")[0] not in needed | sys.stdlib_module_names:
                faults.append(f"{path} line {line}: imports {name}")
    return faults


# -------------------------------------------------------------------------------- what stands where, how long

def strays(files):
    """What stands at the top and is no method: a method has an experiments/<name>.py."""
    top = [path for path in python(files) if layer(path) == "methods" and f"experiments/{path}" not in files]
    packages = {path.split("/")[0] for path in files if re.fullmatch("[^/]+/__init__.py", path)}
    strange = sorted(packages - {*PACKAGES, "tests", "benchmarks"})
    return [*(f"{path}: no method, as there is no experiments/{path}" for path in top),
            *(f"{name}/: no package of the house" for name in strange)]


def long_lines(files):
    return [f"{path} line {number}: {len(line)} columns" for path, text in python(files).items()
            for number, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]


def long_files(files):
    faults = []
    for path, text in files.items():
        (low, high), lines = LIMITS.get(layer(path), (0, 10**9)), text.count("\n")
        if not low <= lines <= high:
            faults.append(f"{path}: {lines} lines, not {low} to {high}")
    return faults


# ------------------------------------------------------------------------------------------- text, exceptions

COMPRESSED = "gzip", "bz2", "lzma"


def is_text(function, call):
    """Does this call of open, read_text or write_text read or write text? `function`: as it is called."""
    of, _, name = function.rpartition(".")
    if name != "open" or of == "self":           # our own: tasks.write_text says it, self.open is no open()
        return name in ("read_text", "write_text") and of not in ("", "tasks")
    place = 1 if of in ("", "io", *COMPRESSED) else 0                           # of the mode: path.open(mode)
    modes = [*call.args[place:place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
    mode = str(modes[0].value) if modes and isinstance(modes[0], ast.Constant) else ""
    return "t" in mode if of in COMPRESSED else "b" not in mode


def unsaid_encodings(files):
    """Every open(), read_text() and write_text() of text says its encoding."""
    faults = []
    for path, text in python(files).items():
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            either = isinstance(call.func, ast.IfExp)           # (gzip.open if zipped else open)(path, "rb")
            for function in (call.func.body, call.func.orelse) if either else (call.func,):
                name = ast.unparse(function)
                if is_text(name, call) and "encoding" not in [k.arg for k in call.keywords]:
                    faults.append(f"{path} line {call.lineno}: {name}() without encoding=")
    return faults


def broad_excepts(files):
    """No `except:` and no `except Exception:`, which would hide mistakes."""
    faults = []
    for path, text in python(files).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                if not caught or re.search(r"\b(Base)?Exception\b", caught):
                    faults.append(f"{path} line {node.lineno}: except {caught}".rstrip())
    return faults


def product(files):
    return {path: text for path, text in files.items() if layer(path) != "tests"}


# ------------------------------------------------------------------------------------------------ the project

CHECKS = [forbidden_arrows, circles, foreign_imports, strays, long_lines, long_files, unsaid_encodings,
          broad_excepts]


def test_the_project_is_found():
    found = {layer(path) for path in SOURCES}
    assert found >= {"methods", "common", "harness", "tasks", "experiments", "referee", "tests", "benchmarks",
                     "docs", "README"}
    assert ("harness/run.py", "harness/evaluation.py") in {arrow[:2] for arrow in arrows(SOURCES)}
    assert ("tasks/build.py", "harness/stages.py") in {arrow[:2] for arrow in arrows(SOURCES)}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house(check):
    whole = forbidden_arrows, circles, strays, long_lines, unsaid_encodings
    files = SOURCES if check in whole else product(SOURCES)
    faults = check(files)
    assert not faults, "\n".join(["", *faults])


# ---------------------------------------------------------------------------------------- the checks can fail

HOUSE = dict.fromkeys((
    "common.py", "dpo.py", "ppo.py", "setup.py", "experiments/__init__.py", "experiments/dpo.py",
    "experiments/ppo.py", "harness/__init__.py", "harness/command_line.py", "harness/run.py",
    "harness/stages.py", "tasks/__init__.py", "tasks/build.py", "tasks/reviews.py", "referee/__init__.py",
    "referee/runs.py", "tests/conftest.py", "tests/test_dpo.py", "benchmarks/logps.py",
    "docs/workshop/prepare.py"), "")


@pytest.mark.parametrize("path, text", [
    ("dpo.py", "import common, harness\nfrom harness import Config\nimport torch, tqdm"),
    ("dpo.py", "from common import Batch\nimport harness.run"),
    ("common.py", "import torch.nn.functional as F\nimport transformers, sys"),
    ("harness/command_line.py", "def main():\n    if True:\n        from referee.runs import reproduce"),
    ("harness/stages.py", "import common\nfrom tasks import Ranking"),
    ("harness/run.py", "from harness import stages\ndef f():\n    from tasks import build"),
    ("tasks/build.py", "from harness.stages import fit\nfrom tasks import reviews\nimport common"),
    ("tasks/reviews.py", "from common import UserError"),
    ("referee/runs.py", "import harness, importlib\nimportlib.import_module(f'experiments.{x}')"),
    ("referee/runs.py", "import importlib\nimportlib.import_module(x)"),
    ("referee/runs.py", "import dpo\nfrom experiments.dpo import EXPERIMENTS\nfrom referee import runs"),
    ("experiments/dpo.py", "import math"), ("setup.py", "from setuptools import setup"),
    ("tests/test_dpo.py",
     "import dpo, harness, tasks, common, referee.runs\nfrom conftest import x\nimport experiments.dpo"),
    ("benchmarks/logps.py", "import common, importlib\nimportlib.import_module(method)"),
    ("docs/workshop/check.py",
     "import common, dpo, harness.run, experiments.dpo\nfrom tasks import build\nfrom referee import runs"),
    ("docs/workshop/check.py", "from prepare import ROOT"), ("tests/test_dpo.py", "import prepare")])
def test_allowed_arrow_is_forbidden(path, text):
    files = HOUSE | {path: text}
    assert forbidden_arrows(files) == circles(files) == []


@pytest.mark.parametrize("path, text, to", [
    ("dpo.py", "import tasks", "tasks/__init__.py"),
    ("dpo.py", "from tasks.build import load_task", "tasks/build.py"),
    ("dpo.py", "def f():\n    import ppo", "ppo.py"), ("dpo.py", "from ppo import gae", "ppo.py"),
    ("dpo.py", "if True:\n    import referee", "referee/__init__.py"),
    ("dpo.py", "import experiments.dpo as e", "experiments/dpo.py"),
    ("dpo.py", "from experiments import dpo", "experiments/dpo.py"),
    ("dpo.py", "import importlib\nimportlib.import_module('ppo')", "ppo.py"),
    ("dpo.py", "import importlib\nimportlib.import_module(name)", "*"),
    ("dpo.py", "import importlib\nimportlib.import_module(f'tasks.{name}')", "tasks/__init__.py"),
    ("dpo.py", "import importlib\nimportlib.import_module(f'pp{name}')", "*"),
    ("dpo.py", "__import__('tasks')", "tasks/__init__.py"),
    ("dpo.py", "import conftest", "tests/conftest.py"),
    ("dpo.py", "import benchmarks.logps", "benchmarks/logps.py"),
    ("common.py", "import harness", "harness/__init__.py"),
    ("common.py", "def f():\n    from tasks import Task", "tasks/__init__.py"),
    ("common.py", "import dpo", "dpo.py"), ("experiments/dpo.py", "import common", "common.py"),
    ("experiments/dpo.py", "from experiments import ppo", "experiments/ppo.py"),
    ("experiments/dpo.py", "import harness", "harness/__init__.py"),
    ("experiments/dpo.py", "import dpo", "dpo.py"),
    ("tasks/reviews.py", "from harness.stages import fit", "harness/stages.py"),
    ("tasks/build.py", "from harness import Config", "harness/__init__.py"),
    ("tasks/build.py", "import harness.run", "harness/run.py"),
    ("tasks/build.py", "import dpo", "dpo.py"), ("tasks/build.py", "import referee", "referee/__init__.py"),
    ("harness/command_line.py", "from referee.runs import reproduce", "referee/runs.py"),
    ("harness/command_line.py", "def start():\n    from referee.runs import reproduce", "referee/runs.py"),
    ("harness/stages.py", "def main():\n    import referee", "referee/__init__.py"),
    ("harness/run.py", "import dpo", "dpo.py"),
    ("harness/run.py", "import experiments", "experiments/__init__.py"),
    ("harness/run.py", "class Run:\n    def f(self):\n        import ppo", "ppo.py"),
    ("referee/runs.py", "from common import UserError", "common.py"),
    ("referee/runs.py", "import tasks", "tasks/__init__.py"), ("setup.py", "import common", "common.py"),
    ("referee/runs.py", "from tests import conftest", "tests/conftest.py"),
    ("docs/workshop/check.py", "from conftest import ROOT", "tests/conftest.py"),
    ("docs/workshop/check.py", "import test_dpo", "tests/test_dpo.py"),
    ("dpo.py", "from prepare import ROOT", "docs/workshop/prepare.py"),
    ("harness/run.py", "import prepare", "docs/workshop/prepare.py")])
def test_forbidden_arrow_passes(path, text, to):
    fault, = forbidden_arrows(HOUSE | {path: text})
    line = len(text.splitlines())
    assert fault.startswith(f"{path} line {line}: ") and fault.endswith(f"may not import {to}")


def test_relative_import_passes():
    files = HOUSE | {"harness/run.py": "from . import stages"}
    assert forbidden_arrows(files) == ["harness/run.py line 1: relative import"]


@pytest.mark.parametrize("files, circle", [
    ({"harness/run.py": "import harness.stages",
      "harness/stages.py": "def f():\n    from harness import run"},
     "harness/run.py -> harness/stages.py -> harness/run.py"),
    ({"harness/stages.py": "import harness", "harness/__init__.py": "from harness.stages import fit"},
     "harness/__init__.py -> harness/stages.py -> harness/__init__.py"),
    ({"common.py": "from tasks import Task", "tasks/__init__.py": "from harness import stages",
      "harness/stages.py": "import common"},
     "common.py -> tasks/__init__.py -> harness/stages.py -> common.py"),
    ({"harness/run.py": "from referee import runs", "referee/runs.py": "import harness.run"},
     "harness/run.py -> referee/runs.py -> harness/run.py")])
def test_circle_of_files_passes(files, circle):
    assert circles(HOUSE | files) == [circle]


def test_the_allowed_arrows_up_and_down_are_a_circle():
    run = "def main():\n    from referee.runs import f\ndef load():\n    from tasks import build"
    files = HOUSE | {"harness/command_line.py": run, "referee/runs.py": "import harness",
                     "harness/__init__.py": "from harness.command_line import main",
                     "tasks/build.py": "from harness.stages import fit", "harness/stages.py": "import common"}
    assert circles(files) == forbidden_arrows(files) == []


@pytest.mark.parametrize("path, text, fault", [
    ("common.py", "import torch\nimport numpy as np", "common.py line 2: imports numpy"),
    ("common.py", "def f():\n    from tqdm import tqdm", "common.py line 2: imports tqdm.tqdm"),
    ("experiments/dpo.py", "import math\nimport torch", "experiments/dpo.py line 2: imports torch")])
def test_common_or_experiments_need_another_package(path, text, fault):
    assert foreign_imports(HOUSE | {path: text}) == [fault] and foreign_imports(HOUSE) == []


@pytest.mark.parametrize("path, fault", [
    ("stages.py", "stages.py: no method, as there is no experiments/stages.py"),
    ("lm.py", "lm.py: no method, as there is no experiments/lm.py"),
    ("tools/__init__.py", "tools/: no package of the house")])
def test_stray_at_the_top_passes(path, fault):
    assert strays(HOUSE | {path: ""}) == [fault] and strays(HOUSE) == []


def test_long_line_passes_or_bytes_are_counted():
    files = {"dpo.py": "\n".join(("é" * 110, "x" * 111, "y" * 110))}
    assert long_lines(files) == ["dpo.py line 2: 111 columns"]


@pytest.mark.parametrize("path, low, high", [
    ("dpo.py", 150, 250), ("common.py", 1, 450), ("referee/runs.py", 1, 250), ("README.md", 1, 250),
    ("README.zh.md", 1, 250), ("docs/workshop/check.py", 1, 119)])
def test_long_or_short_file_passes(path, low, high):
    for lines in (low, high):
        assert long_files({path: "\n" * lines}) == []
    assert long_files({path: "\n" * (high + 1)}) == [f"{path}: {high + 1} lines, not {low} to {high}"]
    short = long_files({path: "\n" * (low - 1)})
    assert low == 1 or short == [f"{path}: {low - 1} lines, not {low} to {high}"]


@pytest.mark.parametrize("good", [
    "open(p, encoding='utf-8')", "open(p, 'rb')", "open(p, mode='wb')", "p.open('rb')", "gzip.open(p)",
    "gzip.open(p, 'rb')", "gzip.open(p, 'rt', encoding='utf-8')", "p.read_text(encoding='utf-8')",
    "p.write_text(t, encoding='utf-8')",
    "p.read_bytes()", "p.write_bytes(b)", "self.open()", "write_text(p, t)", "tasks.write_text(p, t)",
    "(gzip.open if z else open)(p, 'rb')"])
def test_said_encoding_or_binary_file_is_a_fault(good):
    assert unsaid_encodings({"dpo.py": good}) == []


@pytest.mark.parametrize("bad", [
    "open(p)", "open(p, 'w')", "with open(p, 'a') as f:\n    pass", "p.open()", "p.open('w')",
    "io.open(p, 'r')", "gzip.open(p, 'rt')", "gzip.open(p, mode='rt')", "p.read_text()", "p.write_text(t)",
    "(a / 'b').read_text()",
    "f(open(p).read())", "Path(p).read_text(errors='ignore')", "(gzip.open if z else open)(p, 'rt')"])
def test_unsaid_encoding_passes(bad):
    assert unsaid_encodings({"dpo.py": bad})


@pytest.mark.parametrize("caught, faults", [
    ("", ["dpo.py line 3: except"]), (" Exception", ["dpo.py line 3: except Exception"]),
    (" Exception as error", ["dpo.py line 3: except Exception"]),
    (" BaseException", ["dpo.py line 3: except BaseException"]),
    (" (OSError, Exception)", ["dpo.py line 3: except (OSError, Exception)"]), (" OSError", []),
    (" (OSError, ValueError) as e", []), (" ExceptionGroup", [])])
def test_broad_except_passes_or_a_narrow_one_fails(caught, faults):
    assert broad_excepts({"dpo.py": f"try:\n    f()\nexcept{caught}:\n    pass"}) == faults
