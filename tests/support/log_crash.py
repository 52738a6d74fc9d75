"""The real ledger and log writer, killed with SIGKILL at chosen writes, again and again.

    python -m tests.support.log_crash --dir D

Each run is a forked process that appends leaves and publishes them; it dies before, in the middle
of, or after the N-th file it writes, or right after the N-th commit. After each death the directory
is read from outside, then the next process goes on with what is there. The last runs undisturbed.
Prints one JSON line: how many died, how large the log is.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from coordinator import log_files
from coordinator.clock import SystemClock
from coordinator.ledger import Ledger, Sequencer, Tx
from coordinator.log_files import LogFiles, Ratchet
from coordinator.log_hub import LogHub
from coordinator.log_writer import LogWriter
from protocols.identifiers import Digest
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.kinds import Heartbeat
from tests.support.leaves import ORIGIN, World, key, log_signer
from tests.support.log_dir import read_log

INSTANTS = [
    *(f"write:{when}:{n}" for n in (1, 2, 3, 4, 5, 8) for when in ("before", "inside", "after")),
    *(f"commit:after:{n}" for n in (1, 2)),
    "write:inside:12",
    "write:after:13",
]
BURST = 15  # leaves of each process
MORE = 20  # leaves, one by one, of a process that is to die and has not
LAST = 260  # leaves in the end: beyond the first full tile


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    raise AssertionError


def arm(at: str) -> None:
    what, when, number = at.split(":")
    numbers = itertools.count(1)
    under_way = threading.local()  # the ratchet and the tiles are written by two threads

    def counted(original: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            now = under_way.now = next(numbers) == int(number)
            if now and when == "before":
                die()
            result = original(*arguments, **named)
            if now and when == "after":
                die()
            return result

        return wrapped

    def replaced(*arguments: Any) -> Any:
        if getattr(under_way, "now", False):
            die()
        return replace(*arguments)

    replace = Path.replace
    if what == "commit":
        Ledger._advance = counted(Ledger._advance)  # type: ignore[method-assign]
    else:
        log_files.replace_file = counted(log_files.replace_file)
        if when == "inside":  # the temporary file is durable, its name is not changed yet
            log_files.Path.replace = replaced  # type: ignore[method-assign]


async def story(folder: Path, target: int, *, more: int) -> None:
    """Append leaves up to ``target`` and wait until they are published; then one by one ``more``.

    How many leaves share a head, and so how many files are written, is a matter of timing: whoever
    is to die at some write goes on until it comes.
    """
    signer = log_signer()
    hub = LogHub(signer.verifier)
    sequencer = Sequencer(key=key("coordinator"), origin=ORIGIN, seen=hub.seen)
    ledger = Ledger(f"sqlite:///{folder}/ledger.sqlite", clock=SystemClock(), sequencer=sequencer)
    async with ledger:
        files = LogFiles(folder / "log")
        writer = LogWriter(
            ledger=ledger,
            clock=SystemClock(),
            hub=hub,
            files=files,
            ratchet=Ratchet(folder / "ratchet"),
            signer=signer,
        )
        writing = asyncio.create_task(writer.run())
        world = World(witnesses=False).begin()
        size = await ledger.read("size", Tx.log_size)
        for wanted in range(max(size, target), max(size, target) + more + 1):
            while (size := await ledger.read("size", Tx.log_size)) < wanted:
                if size < len(world.entries):
                    entry = world.entries[size]
                    await ledger.run("leaf", lambda tx, entry=entry: tx.append_leaf(entry))
                else:
                    await ledger.run("beat", beat)
            while not writing.done():
                found = files.published()
                if found is not None and found.size >= wanted:
                    break
                await asyncio.sleep(0.01)
        writing.cancel()
        done = await asyncio.gather(writing, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError), f"the writer ended: {done[0]!r}"


def beat(tx: Tx) -> None:
    said = Heartbeat(interval_s=3600)
    tx.append_own(said, subject="log/heartbeat", digest=Digest("0" * 64))


def child(folder: Path, at: str, target: int) -> int:
    """Run one process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            if at:
                arm(at)
            asyncio.run(story(folder, target, more=MORE if at else 0))
        except BaseException:  # noqa: BLE001 - a forked child must not go on
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    folder = parser.parse_args().dir
    killed, published = 0, 0
    for number, at in enumerate(INSTANTS, start=1):
        status = child(folder, at, BURST * number)
        if not os.WIFSIGNALED(status):
            sys.exit(f"{at} was not reached, or the process failed: {status}")
        killed += 1
        if (folder / "log/checkpoint").exists():
            head = read_log(folder / "log").head
            assert head.size >= published, at
            published = head.size
            signed = Checkpoint.parse((folder / "ratchet").read_text())
            assert signed.size >= head.size, at
    if child(folder, "", LAST + BURST * len(INSTANTS)) != 0:
        sys.exit("the undisturbed process failed")
    read = read_log(folder / "log")
    read.replay()
    leftovers = [str(path) for path in (folder / "log").rglob(".tmp-*")]
    print(json.dumps({"killed": killed, "size": read.head.size, "leftovers": leftovers}))


if __name__ == "__main__":
    main()
