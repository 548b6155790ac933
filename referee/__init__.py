"""The referee: runs each method's experiments over seeds, and sets every claim next to what was measured.

    arms.py          what the arms of an experiment are, and which stored runs are theirs
    runs.py          reproduce: run what is missing, store it, report
    statistics.py    intervals, comparisons, verdicts, best of n
    tables.py        tables and report        figures.py    figures        docs.py    blocks in Markdown files

Imports go one way: runs and docs -> tables -> arms, figures -> statistics.
"""
