"""``python -m tests.fuzz``: every method and parser, for as long as one likes.

First the property tests with many examples and a seed of this run, which is printed. Then, where
atheris is installed (``pip install atheris``; it is no dependency), every parser under coverage
guidance for some seconds each, from its good document on. What it finds is a way to stop a node or
a coordinator: the input is printed, and belongs into the tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time

FILES = (
    "tests/property/test_door_fuzz.py",
    "tests/property/test_governed_door_fuzz.py",
    "tests/property/test_parsers_from_outside.py",
    "tests/property/test_files_from_outside.py",
    "tests/property/test_tlog_parsers.py",
    "tests/property/test_trust_parsers.py",
)


def main() -> int:
    """Fuzz; 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="messages for each method")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--turns", type=int, default=3, help="of the parsers, each with a seed")
    parser.add_argument("--guided-s", type=int, default=5, help="seconds for each parser")
    options = parser.parse_args()
    for turn in range(options.turns):
        seed = options.seed + turn
        files = FILES if turn == 0 else FILES[2:]  # the doors take their many examples in one turn
        print(f"turn {turn + 1} of {options.turns}, seed {seed}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"--hypothesis-seed={seed}", "--timeout=3600", *files],
            env={**os.environ, "MINGA_FUZZ_EXAMPLES": str(options.examples)},
            check=False,
        )
        if done.returncode != 0:
            return done.returncode
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: parsers were not fuzzed under coverage guidance")
        return 0
    command = [sys.executable, "-m", "tests.fuzz.guided", str(options.guided_s)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
