"""What is going on, for those who wait: a line at the start, and a bar for what takes longer than 3 seconds.

A bar is gone when its work is done. Nothing is shown with --quiet, nor where stderr is a file or a pipe.
"""
import shutil
import sys

from tqdm import tqdm

SECONDS = 3


class Show:
    """Set at the start of each run."""
    on = True


def begin(on, text):
    """Show bars from now on, or not; on a terminal the text comes first."""
    Show.on = on
    if on and sys.stderr.isatty():
        print(text, file=sys.stderr)


def bar(total, what):
    """A progress bar for so many rows. Call its update(n) when n more are done."""
    return tqdm(total=total, desc=what, leave=False, delay=SECONDS, disable=None if Show.on else True,
                ncols=min(80, shutil.get_terminal_size().columns))


def over(parts, total, what):
    """Yield the parts, with a bar of so many rows: the rows of a part are its first entry."""
    with bar(total, what) as shown:
        for part in parts:
            yield part
            shown.update(len(part[0]))


def steps(plan, what):
    """Yield the entries of a list, with a bar of so many steps."""
    with bar(len(plan), what) as shown:
        for entry in plan:
            yield entry
            shown.update()
