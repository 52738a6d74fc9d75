"""Runs the matrix of faults and makes the page.

    python -m tests.matrix [--only PATTERN] [--again]     run what is left, then render
    python -m tests.matrix --render                    docs/faults.json -> docs/faults.md

A case that has run is kept in build/faults and not run again: the whole takes about an hour
on two cores and may be interrupted. ``--again`` forgets them. Cases that need root or PostgreSQL
are left out, and named, where there is none.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tests.matrix.render import OUT, merge, write_page
from tests.matrix.suite import groups, names

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name this pattern finds")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if options.again:
        shutil.rmtree(OUT, ignore_errors=True)
    failed = [] if options.render else groups(only=options.only)
    if not options.render:
        merge(names())
    write_page()
    for name in failed:
        print(f"FAILED {name}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
