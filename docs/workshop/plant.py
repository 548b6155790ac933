"""Plant one of the ten bugs of bugs/ in the code, or take it out again. It needs no git and no packages.

    python docs/workshop/plant.py 04             # bug 04 is in the code; which file it is in is not said
    python docs/workshop/plant.py 04 --undo      # the code is as it was

One bug at a time. `git apply docs/workshop/bugs/04.patch` (and `git apply -R`) does the same.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def read_patch(text):
    """(file name, text with the context before, the same after) of a patch of one hunk."""
    header, _, hunk = text.partition("\n@@ ")
    lines = hunk.splitlines(True)[1:]
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    return header.split("+++ b/")[1].strip(), before, after


def exchange(path, old, new):
    """Replace `old` by `new` in a file, where it stands exactly once; returns whether it did.

    Ends of lines (Windows: CR LF) stay as they are.
    """
    text = path.read_bytes().decode("utf-8")
    end = "\r\n" if "\r\n" in text else "\n"
    text = text.replace("\r\n", "\n")
    if text.count(old) != 1:
        return False
    path.write_bytes(text.replace(old, new).replace("\n", end).encode("utf-8"))
    return True


def why_not(number, undo, text, clean):
    """What to say where the bug cannot be planted in this text, or taken out of it."""
    if not undo:
        return f"bug {number} does not fit: it is planted already, or the code was edited. Undo that first"
    if clean in text:
        return f"bug {number} is not in the code: it was mended already, and its lines are the original ones"
    return (f"bug {number} is not in the code: its lines were changed in another way. To get the original "
            "back, take the .py files from the project's zip file again (with git: git checkout -- *.py)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bug", help="01 to 10")
    parser.add_argument("--undo", action="store_true", help="take the bug out")
    options = parser.parse_args()
    number = options.bug.zfill(2)
    patches = {path.stem: path for path in (ROOT / "docs" / "workshop" / "bugs").glob("*.patch")}
    if number not in patches:
        sys.exit(f"there is no bug {ascii(options.bug)[1:-1]}: take 01 to 10")
    name, clean, planted = read_patch(patches[number].read_text(encoding="utf-8"))
    old, new = (planted, clean) if options.undo else (clean, planted)
    if not exchange(ROOT / name, old, new):
        text = (ROOT / name).read_text(encoding="utf-8")
        sys.exit(why_not(number, options.undo, text, clean))
    print(f"bug {number} is {'out of' if options.undo else 'in'} the code")


if __name__ == "__main__":
    main()
