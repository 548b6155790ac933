"""The referee: runs each method's experiments over seeds, and sets every claim next to what was measured.

Every method:
    arms.py          what the arms of an experiment are, and which stored runs are theirs
    store.py         what results/ holds: names of files, adding to them, which runs are shown
    runs.py          reproduce: run what is missing, store it, report        jobs.py    in several processes
    statistics.py    intervals, comparisons, verdicts, best of n             best_of_n.py    it as an arm
    tuning.py        settings chosen on validation seeds
    tables.py        tables and report        figures.py    figures        docs.py    blocks in Markdown files
    pages.py         what the commands on the pages give
All methods within one limit of time (python -m referee comparison):
    comparison.py    what is tuned, chosen and run        side_by_side.py    its tables and its figure
    ranking.py       ranks, all pairs        replication.py    other seeds, a larger model
    choosing.py      settings chosen by other numbers
    which.py         which method when        survey.py    the statements of a survey
A real model (python -m referee real_text, mine):
    real_text.py     the main arms on instructions that a function checks
    mine.py          your model and pairs, some minutes        budget.py    how much fits into them
    advice.py        what the runs say        page.py    report.html

Imports go one way: runs -> jobs; tuning -> runs -> tables -> store, figures -> arms, statistics;
docs -> choosing, which -> survey -> side_by_side -> comparison -> tuning; side_by_side -> replication ->
ranking; docs -> real_text -> mine -> budget, page -> advice.
"""
