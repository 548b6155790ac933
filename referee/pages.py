"""What the commands on the pages give on seed 0: results/pages.json. It is measured by

    python -m referee.pages

which runs each command of docs/<method>.md and docs/workshop/cards.md that trains on the embedded task: each
once, in the order of the pages, on one thread. That takes about half an hour. A command that is stored is not
run again: delete the file after a change of the arithmetic. People write the numbers on the pages, and
tests/test_numbers.py compares them with this file.
"""
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import write_text
from referee.arms import method_names

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "results" / "pages.json"
# With these a command reads a model or data of the user, makes many runs, or answers instead of training.
NOT_HERE = "--model", "--data", "--reproduce", "--steer", "--prompt", "--help", "OUT", "..."
SENSELESS = "step", "seconds", "seconds_per_step", "cpu_seconds"


def commands_of(text):
    """The commands of a Markdown page, in its order: [words after `python`], without those of NOT_HERE."""
    spans = re.findall(r"`(python [^`]+)`|^(python [^`\n]+)$", text, re.M)
    words = [shlex.split(one or other, comments=True)[1:] for one, other in spans]
    return [[*found] for found in dict.fromkeys(map(tuple, words))
            if found[0].removesuffix(".py") in method_names() and not {*NOT_HERE} & {*found}]


def pages():
    """The pages with commands to measure."""
    return [ROOT / "docs" / f"{name}.md" for name in (*method_names(), "workshop/cards")]


def commands():
    """{command as it is stored: its words} of all pages."""
    texts = [path.read_text(encoding="utf-8") for path in pages()]
    return {" ".join(words): words for text in texts for words in commands_of(text)}


def summary(rows):
    """{metric: [first, last, least, largest]} of the rows of metrics.jsonl, to seven digits."""
    values = {}
    for row in rows:
        for name, value in row.items():
            if name not in SENSELESS and isinstance(value, (int, float)):
                values.setdefault(name, []).append(float(f"{value:.7g}"))
    return {name: [found[0], found[-1], min(found), max(found)] for name, found in sorted(values.items())}


def run(words, folder):
    """One command in a process of its own: its metrics, and the CPU seconds of the whole process."""
    own = [] if "--out" in words else ["--out", tempfile.mkdtemp(dir=folder) + "/run"]
    words = [*words, *own, "--quiet", "True"]
    before = os.times()
    subprocess.run([sys.executable, ROOT / words[0], *words[1:]], check=True, cwd=folder,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = os.times()
    lines = (folder / words[words.index("--out") + 1] / "metrics.jsonl").read_text(encoding="utf-8")
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu_seconds": [round(seconds, 1)]} | summary(map(json.loads, lines.splitlines()))


def measure():
    subprocess.run([sys.executable, "-m", "tasks.build"], check=True, cwd=ROOT)     # its time is no command's
    stored = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    todo = {name: words for name, words in commands().items() if name not in stored}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, words) in enumerate(todo.items(), 1):
            print(f"{number} of {len(todo)}: python {name}", flush=True)
            stored[name] = run(words, Path(folder))
            rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(stored[name])}" for name in sorted(stored))
            write_text(FILE, f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    measure()
