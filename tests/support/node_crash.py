"""A node agent that is killed at a chosen instant, for tests.

    python -m tests.support.node_crash --dir NODE_FOLDER --at METHOD:before|after[:N]

It is the real agent; one method of its journal, its bulk client or its models is wrapped so that
SIGKILL strikes right before, or right after, the N-th call (from 1). ``append`` counts raw messages
of an upload, ``unit`` checked units of a download. The instant is written to ``crashed`` in the
node's folder first, so that a test can show that it was reached.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from node_agent import bulk
from node_agent.agent import serve
from node_agent.config import NodeFolder, load_config
from node_agent.journal import Journal
from node_agent.lock import FolderLock
from node_agent.models import Models
from node_agent.site import open_site


def strike(folder: Path, at: str) -> None:
    """Leave a mark and die."""
    with (folder / "crashed").open("a") as file:
        file.write(at + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wrap(target: Any, name: str, when: str, number: int, die: Callable[[], None]) -> None:
    """Let the N-th call of ``target.name`` die before or after it does its work."""
    original, calls = getattr(target, name), 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            die()
        result = original(*arguments, **named)
        if calls == number and when == "after":
            die()
        return result

    setattr(target, name, wrapped)


def arm(folder: Path, at: str) -> None:
    """Install one crash."""
    name, when, number = (*at.split(":"), "1")[:3]

    def die() -> None:
        strike(folder, at)

    if name == "append":
        wrap(bulk.os, "pread", when, int(number), die)
    elif name == "unit":
        wrap(bulk, "_keep_unit", when, int(number), die)
    elif name in ("compute_next", "_finish", "sync", "keep_only"):
        wrap(Models, name, when, int(number), die)
    else:
        wrap(Journal, name, when, int(number), die)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--at", default="")
    options = parser.parse_args()
    if options.at:
        arm(options.dir, options.at)
    node = NodeFolder(options.dir)

    async def work() -> None:
        await serve(open_site(node, load_config(node), rng=Random(1)))

    with FolderLock(node, pid=os.getpid()):
        asyncio.run(work())


if __name__ == "__main__":
    main()
