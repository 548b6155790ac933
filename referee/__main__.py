"""The referee: every method under one protocol, each paper's claim next to what was measured here.

    python -m referee dpo --seeds 5     # run what is missing, then report; any flag of dpo.py works
    python -m referee dpo --report      # tables and figure from results/dpo.json; runs nothing
    python -m referee --docs            # write the results into README.md and docs/*.md anew

docs/protocol.md says how claims are judged.
"""
import importlib
import sys

from harness import UserError


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    # Imported here, so that a UserError of theirs (scipy is missing) is one line too.
    from referee import docs, runs, tables
    from referee.arms import method_names
    if argv == ["--docs"]:
        return print("written:", *docs.write_all())
    name, *flags = argv
    if name not in method_names():
        raise UserError(f"no method {name!r}; there are: {', '.join(method_names())}")
    if flags == ["--report"]:
        return tables.report(name)
    from transformers import HfArgumentParser
    Config = importlib.import_module(name).Config
    parser = HfArgumentParser(Config, prog=f"python -m referee {name}")
    runs.reproduce(name, Config(**vars(parser.parse_args(flags))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
