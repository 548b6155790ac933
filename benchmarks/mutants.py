"""How many small mistakes the tests notice: one change to one place of a file, and the tests of that file.

    python benchmarks/mutants.py --number 60 --seed 0         # prints the survivors
    python benchmarks/mutants.py --number 60 --seed 0 --numbers 4,17              # these of the same 60 again

A mutant swaps an operator (+ -, * /, < <=, == !=, and or), removes a `not`, a minus or a `.detach()`, changes
a number (n + 1, or twice a float), swaps True and False, or deletes a call that stands alone. Places are
drawn from all functions, messages of errors apart; every file of FILES gets as many. Mutants live in a copy
of the project. What a file's own tests let pass is given to the short runs of test_end_to_end.py. A mutant
whose change has no effect counts as a survivor too.
"""
import argparse
import ast
import copy
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if (ROOT / path.name).exists())
FILES = {f"{name}.py": [f"test_{name}.py"] for name in METHODS} | {
    "common.py": ["test_common.py"], "harness/samples.py": ["test_samples.py"],
    "harness/stages.py": ["test_samples.py", "test_harness.py"],
    "harness/rewards.py": ["test_samples.py", "test_user_rewards.py", "test_real_data.py"],
    "harness/conditioning.py": ["test_conditioning.py", "test_steerlm.py", "test_decision_transformer.py"],
    "harness/evaluation.py": ["test_harness.py", "test_conditioning.py", "test_picture.py"]}
RUNS = "not embedded and not built and not smol and "           # of test_end_to_end.py: a toy model's only
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE,
         ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.And: ast.Or, ast.Or: ast.And}


def places(tree):
    """Index (in ast.walk's order) of every node of a function that can be changed."""
    inside, told = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            inside.update(id(child) for statement in node.body for child in ast.walk(statement))
        warns = isinstance(node, ast.Call) and "warn" in ast.unparse(node.func)
        if warns or isinstance(node, (ast.Raise, ast.JoinedStr)):
            told.update(id(child) for child in ast.walk(node))
    return [i for i, node in enumerate(ast.walk(tree))
            if id(node) in inside - told and changed(copy.deepcopy(node)) is not None]


def changed(node):
    """The node with its change, or None where there is none to make."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        node.value = node.value + 1 if isinstance(node.value, int) else node.value * 2
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        return node.func.value
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.Pass()
    else:
        return None
    return node


class Change(ast.NodeTransformer):
    def __init__(self, target):
        self.target = target

    def visit(self, node):
        if node is self.target:
            return ast.copy_location(changed(node), node)
        return super().visit(node)


def mutant(source, place):
    """(the changed source, the line before and after)."""
    tree = ast.parse(source)
    node = list(ast.walk(tree))[place]
    before = ast.unparse(node)
    line, after = node.lineno, ast.unparse(changed(copy.deepcopy(node)))
    changed_tree = ast.fix_missing_locations(Change(node).visit(tree))
    return ast.unparse(changed_tree), f"line {line}: {before} -> {after}"


def fails(project, *tests):
    """Does one of these tests fail? Ten minutes without an end count as a failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=project / "tests", capture_output=True, timeout=600)
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files to change, 'A,B' (default: all of FILES)")
    parser.add_argument("--numbers", default="", help="which of the mutants to try, '4,17' (default: all)")
    options = parser.parse_args()
    rng, files = random.Random(options.seed), options.only.split(",") if options.only else list(FILES)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        left_out = shutil.ignore_patterns(".git", "cache", "runs", "results", "docs")
        shutil.copytree(ROOT, project, ignore=left_out)
        wanted = [int(number) for number in options.numbers.split(",") if number]
        wanted, survived = wanted or range(1, options.number + 1), 0
        for number in range(1, options.number + 1):
            name = files[(number - 1) % len(files)]
            source = (ROOT / name).read_text(encoding="utf-8")
            text, what = mutant(source, rng.choice(places(ast.parse(source))))
            if number in wanted:
                (project / name).write_text(text, encoding="utf-8")
                runs = Path(name).stem if Path(name).stem in METHODS else "(dpo or ppo or steerlm)"
                noticed = (fails(project, *FILES[name])
                           or fails(project, "test_end_to_end.py", "-k", RUNS + runs))
                survived += not noticed
                word = "noticed " if noticed else "SURVIVED"
                print(f"{number:4} {word} {name} {' '.join(what.split())[:150]}", flush=True)
                (project / name).write_text(source, encoding="utf-8")
        print(f"{len(wanted) - survived} of {len(wanted)} noticed")


if __name__ == "__main__":
    main()
