"""``python -m tests.benchmarks``: see the package."""

# ruff: noqa: T201 - it prints

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import sys
import time
from pathlib import Path

from . import __doc__ as about
from .harness import machine

QUESTIONS = (
    *("overhead", "throughput", "blocking", "memory", "growth"),
    *("manners", "rates", "imports", "queues"),
)


def main() -> int:
    """Ask the questions."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="question", help=f"{', '.join(QUESTIONS)}; by default all")
    parser.add_argument("--quick", action="store_true", help="each once, at a small size")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw throughput, memory and manners there, as SVG")
    args = parser.parse_args()
    if unknown := set(args.questions) - set(QUESTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the questions are {', '.join(QUESTIONS)}")

    logging.disable()  # what is broken off at the end of a benchmark, for one
    began, where = time.monotonic(), machine()
    tables = {}
    if not args.json:
        print("\n".join(f"{name}: {value}" for name, value in where.items()), end="\n\n")
    for name in args.questions or QUESTIONS:
        tables[name] = importlib.import_module(f".{name}", __package__).run(quick=args.quick)
        if not args.json:
            print(f"## {name.capitalize()}\n", *tables[name], sep="\n", flush=True)
    if args.json:
        found = {name: [dataclasses.asdict(table) for table in each] for name, each in tables.items()}
        json.dump({"machine": where, "quick": args.quick, "questions": found}, sys.stdout, indent=2)
        print()
    else:
        print(f"It took {time.monotonic() - began:.0f} s.")
    if args.plot:
        from .plots import draw  # noqa: PLC0415 - the others need no matplotlib

        for path in draw(args.plot, tables):
            print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
