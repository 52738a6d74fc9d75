"""A node agent that is killed at a chosen instant, for tests.

    python -m tests.support.node_crash --dir NODE_FOLDER --at METHOD:before|after[:N] [--hold FILE]

It is the real agent; one method of its journal, its bulk client or its models is wrapped so that
SIGKILL strikes right before, or right after, the N-th call (from 1). ``append`` counts raw messages
of an upload, ``unit`` checked units of a download. In a secure sum ``stage-NAME`` is the moment in
which a new state becomes durable, ``post-KIND`` the one in which a message is handed in. The
instant is written to ``crashed`` in the
node's folder first, so that a test can show that it was reached. With ``--hold`` the agent does not
die there: it waits until the file exists, so that a test decides who is first.
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
from node_agent.client import Connection
from node_agent.config import NodeFolder, load_config
from node_agent.journal import Journal
from node_agent.lock import FolderLock
from node_agent.models import Models
from node_agent.secure_state import STAGES, SecureStates
from node_agent.site import open_site
from protocols.gen import secure_sum_pb2
from protocols.identifiers import RunId
from protocols.secagg.states import NodeState


def strike(folder: Path, at: str) -> None:
    """Leave a mark and die."""
    with (folder / "crashed").open("a") as file:
        file.write(at + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wait_for(file: Path) -> None:
    """Stand still, in the thread of the call, until a file exists."""
    while not file.exists():
        time.sleep(0.02)


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


def wrap_stage(stage: str, when: str, die: Callable[[], None]) -> None:
    """Die before or after a state of this stage is made durable for the first time."""
    keep = SecureStates.keep

    def wrapped(self: SecureStates, run: RunId, state: NodeState) -> None:
        new = STAGES[type(state)] == stage and state != self.load(run)
        if new and when == "before":
            die()
        keep(self, run, state)
        if new and when == "after":
            die()

    SecureStates.keep = wrapped  # type: ignore[method-assign]


def wrap_post(kind: str, when: str, die: Callable[[], None]) -> None:
    """Die before or after a message of this kind is handed in."""
    ask = Connection.ask

    async def wrapped(self: Connection, method: Any, request: Any, **named: Any) -> Any:
        meant = isinstance(request, secure_sum_pb2.PostRequest) and request.kind == kind
        if meant and when == "before":
            die()
        answer = await ask(self, method, request, **named)
        if meant and when == "after":
            die()
        return answer

    Connection.ask = wrapped  # type: ignore[method-assign]


def arm(folder: Path, at: str, hold: Path | None = None) -> None:
    """Install one crash, or one wait for a file."""
    name, when, number = (*at.split(":"), "1")[:3]

    def die() -> None:
        if hold is not None:
            wait_for(hold)
            return
        strike(folder, at)

    if name.startswith("stage-"):
        wrap_stage(name.removeprefix("stage-"), when, die)
    elif name.startswith("post-"):
        wrap_post(name.removeprefix("post-"), when, die)
    elif name == "append":
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
    parser.add_argument("--hold", type=Path, default=None)
    options = parser.parse_args()
    if options.at:
        arm(options.dir, options.at, options.hold)
    node = NodeFolder(options.dir)

    async def work() -> None:
        await serve(open_site(node, load_config(node), rng=Random(1)))

    with FolderLock(node, pid=os.getpid()):
        asyncio.run(work())


if __name__ == "__main__":
    main()
