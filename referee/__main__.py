"""The referee: every method under one protocol, each paper's claim next to what was measured here.

    python -m referee dpo --seeds 10    # run what is missing, then report; any flag of dpo.py works
    python -m referee dpo --jobs 4      # the same in four processes
    python -m referee dpo --report      # tables and figure from results/dpo.json; runs nothing. Runs with
                                        # other flags have a file of their own: give the same flags
    python -m referee dpo --tune        # choose settings on validation seeds; --jobs, --report as above
    python -m referee comparison        # all methods within one limit of time; --tune, --report, --jobs
    python -m referee real_text --model DIR --data FOLDER --seeds 3
                                        # the main ones on a real model: docs/comparison.md, "Real text"
    python -m referee mine --model DIR --data FILE --methods dpo,raft --minutes 60
                                        # some methods on your model and data: docs/mine.md
    python -m referee --docs            # write the results into README.md and docs/*.md anew

docs/protocol.md says how claims are judged.
"""
import importlib
import sys

from harness import UserError
from harness.command_line import in_one_line, parser_of

OWN_FLAGS = "--report", "--tune"                # all others are the method's


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    # Imported here, so that a UserError of theirs (scipy is missing) is one line too.
    from referee import comparison, docs, mine, real_text, runs, side_by_side, tables, tuning
    from referee.arms import config_class, given_flags, method_names
    if argv == ["--docs"]:
        return print("written:", *docs.write_all())
    name, *flags = argv
    if name == mine.NAME:
        return mine.main(flags)
    if name == real_text.NAME:
        return real_text.main(flags)
    if name not in (*method_names(), comparison.NAME):
        raise UserError(f"no method {name!r}; there are: {', '.join(method_names())}, {comparison.NAME}, "
                        f"{real_text.NAME}, {mine.NAME}")
    Config = config_class(name)
    parser = parser_of(Config, prog=f"python -m referee {name}")
    config = Config(**vars(parser.parse_args([flag for flag in flags if flag not in OWN_FLAGS])))
    runs.check_flags(config)
    if name == comparison.NAME:
        if "--report" not in flags:
            seeds = range(config.seeds) if any(flag.split("=")[0] == "--seeds" for flag in flags) else ()
            comparison.tune(config) if "--tune" in flags else comparison.run(config, seeds)
        say = side_by_side.report_tuning if "--tune" in flags else side_by_side.report
        say(given=given_flags(config))
    elif "--tune" in flags and "--report" in flags:
        tuning.report(name, given_flags(config))
    elif "--tune" in flags:
        tuning.tune(name, config)
    elif "--report" in flags:
        tables.report(name, given=given_flags(config))
    else:
        runs.reproduce(name, config)


if __name__ == "__main__":
    in_one_line(lambda: main(sys.argv[1:]))
