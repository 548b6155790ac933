"""Prepare a workshop without network: a folder with wheels, the built models and pages, for a USB stick.

    python docs/workshop/prepare.py make FOLDER                # the day before, on one laptop of each kind
    python docs/workshop/prepare.py make FOLDER --no_wheels    # without wheels
    python docs/workshop/prepare.py use FOLDER                 # on each laptop; needs no network

Wheels are for one system and one version of Python. So run `make` into the same FOLDER once for each kind of
laptop; but there first `use FOLDER --no_wheels`: it takes the models, so that they are not built again. They
are found by seed and by a hash of the code, so all laptops with the same code start from the same models.
FOLDER/pages has the kit's pages as HTML: a browser hides the answers until a click. to_print.html has none.
"""
import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
EXTRAS = "plot", "test"                              # what the workshop needs beside the dependencies
INSTALL = 'python -m pip install -e ".[plot,test]"'
NEEDED = "torch", "transformers", "filelock", "markdown"                            # to make a folder
PAGES = "README", "cards", "bugs"
HEAD = ('<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">')


def requirements():
    """What pyproject.toml asks for, ["torch>=2.6", ...], each once."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"(?m)^{name} = (\[.*\])$", text).group(1) for name in ("dependencies", *EXTRAS)]
    return list(dict.fromkeys(word for found in lists for word in json.loads(found)))


def run(*words, **kwargs):
    """Run a Python command; where it fails, its own message has been shown, and this script ends too."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, **kwargs)
    if done.returncode:
        sys.exit(f"stopped: python {' '.join(map(str, words))} failed")
    return done


def write_pages(folder):
    """The kit's pages as HTML; in a browser the answers are folded away. to_print.html: the cards alone."""
    import markdown
    folder.mkdir(parents=True, exist_ok=True)
    style = (KIT / "pages.css").read_text(encoding="utf-8")
    texts = {name: (KIT / f"{name}.md").read_text(encoding="utf-8") for name in PAGES}
    texts["to_print"] = re.sub(r"(?s)<details>.*?</details>\n", "", texts["cards"])
    for name, text in texts.items():
        text = re.sub(rf"\]\(({'|'.join(PAGES)})\.md\)", r"](\1.html)", text)
        text = re.sub(r"\[([^\]]+)\]\((?![a-zA-Z]+\.html)[^)]*\)", r"\1", text)        # not on the stick
        body = markdown.markdown(text.replace("<details>", '<details markdown="1">'),
                                 extensions=["tables", "fenced_code", "md_in_html"])
        (folder / f"{name}.html").write_text(f"{HEAD}<style>\n{style}</style>\n{body}", encoding="utf-8")


def make(folder, wheels, seeds):
    """Write FOLDER/pages, FOLDER/cache and FOLDER/wheels."""
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
        sys.exit(f"error: {', '.join(missing)} not installed. First: {INSTALL}")
    import tasks
    write_pages(folder / "pages")
    for seed in seeds:
        print(f"models of seed {seed}: about two minutes, if they are not built yet", flush=True)
        built = run("-m", "tasks.build", "--seed", seed, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                    env=os.environ | {"PYTHONIOENCODING": "utf-8"})            # the path may have any letters
        source = Path(re.search(r"(?m)^directory +(.+)$", built.stdout).group(1))
        tasks.copy_directory(source, folder / "cache" / Path(*source.parts[-3:]))
    if wheels:
        run("-m", "pip", "download", "-d", folder / "wheels", *requirements())
    print(f"{folder} is ready: copy it, and the project, to each laptop")


def use(folder, wheels, _):
    """Install FOLDER/wheels and copy FOLDER/cache to where the scripts look for it."""
    found = [path for path in sorted(folder.glob("cache/*/*/*")) if path.is_dir() and not path.suffix]
    if not found:
        sys.exit(f"{folder} has no cache: is it what `make` wrote?")
    if wheels:
        run("-m", "pip", "install", "--no-index", "--find-links", folder / "wheels", *requirements())
    importlib.invalidate_caches()                                      # what pip has just installed is new
    if not importlib.util.find_spec("filelock"):
        sys.exit(f"error: filelock not installed. First: python docs/workshop/prepare.py use {folder}")
    import tasks
    for source in found:
        target = Path(os.environ.get("ALIGNMENT_CACHE", ROOT / "cache"), *source.parts[-3:])
        with tasks.lock_or_say(target, f"waiting for another process that builds {target}"):
            tasks.copy_directory(source, target)
    if (folder / "pages").is_dir():
        shutil.copytree(folder / "pages", KIT / "pages", dirs_exist_ok=True)
        print(f"Open in a browser: {KIT / 'pages' / 'README.html'}")
    print("done. Now: python docs/workshop/check.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("make", "use"))
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="whose models are built (make)")
    parser.add_argument("--no_wheels", action="store_true", help="no packages: models and pages only")
    options = parser.parse_args()
    try:
        {"make": make, "use": use}[options.what](options.folder, not options.no_wheels, options.seeds)
    except OSError as error:                                       # shutil.Error: [(from, to, what), ...]
        sys.exit(f"error: {error.args[0][0][2] if isinstance(error, shutil.Error) else error}")
    except KeyboardInterrupt:
        print("stopped: give the same command again", file=sys.stderr)
        sys.exit(130)                                                                  # as all scripts do


if __name__ == "__main__":
    main()
