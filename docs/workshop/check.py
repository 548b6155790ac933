"""Is this laptop ready? Prints OK, or one line on what to do, for each thing that the workshop needs.

    python docs/workshop/check.py

It takes some seconds, needs no network and changes nothing. Exit status 1 means that something is to do.
"""
import argparse
import importlib.metadata
import re
import shutil
import sys
import time

from prepare import ROOT, requirements

sys.path.insert(0, str(ROOT))

NAMES = {"one_step": "forward and backward pass", "cache": "built models"}
WINDOWS = sys.platform == "win32"
TEXT = "ä ö ü ß é  中文  ±"


def python_version(version=sys.version_info):
    text = ".".join(map(str, version[:3]))
    return f"Python {text}", "" if version >= (3, 10) else "install Python 3.10 or newer"


def numbers(version):
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:2]))


def package(requirement):
    """A package of pyproject.toml: its version, and whether that is in the range asked for."""
    name, *bounds = re.split(r"(?=[<>])|,", requirement)
    fix = f'python -m pip install "{requirement}", or python docs/workshop/prepare.py use FOLDER'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name}: not installed", fix
    low = all(numbers(version) >= numbers(bound) for bound in bounds if bound.startswith(">="))
    high = all(numbers(version) < numbers(bound + ".0") for bound in bounds if re.match(r"<\d", bound))
    return f"{name} {version}", "" if low and high else fix


def disk(free=None):
    free = shutil.disk_usage(ROOT).free if free is None else free
    return f"{free / 1e9:.1f} GB free", "" if free > 1e9 else "make room: 1 GB is enough for the workshop"


def one_step():
    """A forward and a backward pass of the tiny model on 64 rows of 30 tokens."""
    import torch

    from tasks import build
    model = build.tiny_model(build.tiny_tokenizer(160))
    ids = torch.randint(3, 100, (64, 30))
    began = time.time()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    good = bool(torch.isfinite(loss))
    return f"forward and backward pass: {time.time() - began:.2f} s", "" if good else "install torch again"


def cache(seed=0):
    """The built models of a seed; without them the first run builds them."""
    from types import SimpleNamespace

    from tasks import build
    found = (build.home(SimpleNamespace(seed=seed, layers=1)) / "vitals.json").exists()
    return f"models of seed {seed}{'' if found else ': not built'}", "" if found else (
        f"python docs/workshop/prepare.py use FOLDER, or python -m tasks.build --seed {seed} (two minutes)")


def terminal(encoding=None):
    """Can the terminal be written in UTF-8? Whether its font has the letters, only the reader can see."""
    encoding = (encoding or sys.stdout.encoding or "").lower().replace("-", "")
    good = encoding == "utf8"
    line = f"this line has four German letters, a French one, two Chinese ones and a plus-minus: {TEXT}"
    return line if good else f"the terminal's encoding is {encoding or 'unknown'}", "" if good else (
        "set the environment variable PYTHONUTF8 to 1, and open the terminal anew")


def cure(error):
    """What to do about an error of an import: a package is missing, or on Windows a library of torch's."""
    if WINDOWS and "torch" not in sys.modules and (isinstance(error, OSError) or "DLL" in str(error)):
        return ("install the Visual C++ Redistributable (vc_redist.x64.exe, on the stick), and open the "
                f"terminal anew ({' '.join(str(error).split())[:200]})")
    why = f"{error.name} is missing" if isinstance(error, ImportError) else error
    return f"install the packages first ({why})"


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    packages = [lambda r=r: package(r) for r in requirements()]
    to_do = 0
    for check in (python_version, *packages, disk, one_step, cache, terminal):
        try:
            found, fix = check()
        except (ImportError, OSError) as error:
            found, fix = NAMES[check.__name__], cure(error)
        to_do += bool(fix)
        print(f"TO DO  {found}: {fix}" if fix else f"OK     {found}", flush=True)
    sys.exit(min(to_do, 1))


if __name__ == "__main__":
    main()
