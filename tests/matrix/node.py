"""The real agent of a node that kills itself at commit points, with a clock that a test may set.

python -m tests.matrix.node --dir NODE_FOLDER --faults FOLDER --ledger URL [--clock FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from random import SystemRandom

import node_agent.log
import node_agent.site
from node_agent.agent import serve
from node_agent.config import NodeFolder, load_config
from node_agent.lock import FolderLock
from node_agent.site import open_site
from tests.matrix.lives import live
from tests.support.faulty_coordinator import ShiftedClock


def set_clock(file: Path) -> None:
    """Let everything that asks this agent's clock be told a shifted time."""
    clock = ShiftedClock(file)

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            assert tz is UTC
            return clock.now()

    for module in (node_agent.site, node_agent.log):
        module.datetime = Shifted  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--faults", type=Path, required=True)
    parser.add_argument("--ledger", required=True, help="where the phase of a round is read")
    parser.add_argument("--clock", type=Path, default=None)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("node_agent").setLevel(logging.INFO)
    node = NodeFolder(options.dir)
    if options.clock is not None:
        set_clock(options.clock)

    async def work() -> None:
        await serve(open_site(node, load_config(node), rng=SystemRandom()))

    def serve_once() -> None:
        with FolderLock(node, pid=os.getpid()):
            asyncio.run(work())

    if (options.faults / "points.json").exists():
        live(serve_once, options.faults, options.ledger)
    else:
        serve_once()


if __name__ == "__main__":
    main()
