"""The referee: runs each method's experiments over seeds, and sets every claim next to what was measured.

    arms.py          what the arms of an experiment are, and which stored runs are theirs
    store.py         what results/ holds: names of files, adding to them, which runs are shown
    runs.py          reproduce: run what is missing, store it, report        jobs.py    in several processes
    statistics.py    intervals, comparisons, verdicts, best of n
    tuning.py        settings chosen on validation seeds
    tables.py        tables and report        figures.py    figures        docs.py    blocks in Markdown files

Imports go one way: runs -> jobs; docs -> tuning -> runs -> tables -> store, figures -> arms, statistics.
"""
