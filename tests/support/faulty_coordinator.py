"""The real coordinator with a clock that a test may set, as a process of its own.

    python -m tests.support.faulty_coordinator --dir D --clock FILE [--faults FOLDER]

If ``FOLDER`` holds ``points.json`` it kills itself at those commit points (tests/matrix/arming.py).
``FILE`` holds seconds that are added to the machine's time, read at each look at the clock; a
missing or empty file adds nothing. So a test lets a deadline pass when everything that must come
before it has come, instead of hoping that it comes in time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

from coordinator.app import serve
from coordinator.config import load_config
from tests.matrix.lives import live


class ShiftedClock:
    """The machine's time plus what a file says."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def now(self) -> datetime:
        """The time now, aware, UTC."""
        return datetime.now(UTC) + timedelta(seconds=read_shift(self._file))


def read_shift(file: Path) -> float:
    """Seconds that are added; 0 where nothing is said."""
    try:
        return float(file.read_text() or 0)
    except FileNotFoundError:
        return 0.0


def shift(file: Path, by_s: float) -> None:
    """Let the clock jump by some seconds, forwards or backwards."""
    fresh = file.with_suffix(".tmp")
    fresh.write_text(repr(read_shift(file) + by_s))
    fresh.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--clock", type=Path, required=True)
    parser.add_argument("--faults", type=Path, default=None)
    parser.add_argument("--config", default="coordinator", help="folder with config.toml")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("coordinator").setLevel(logging.INFO)
    config = load_config(options.dir / options.config / "config.toml")


    def work() -> None:
        asyncio.run(serve(config, ShiftedClock(options.clock)))

    if options.faults is not None and (options.faults / "points.json").exists():
        live(work, options.faults, config.ledger_url)
    else:
        work()


if __name__ == "__main__":
    main()
