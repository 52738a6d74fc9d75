"""How fast leaves enter the log, each durable before the next, beside bare files and fsync.

One leaf a transaction (SQLite, synchronous=FULL): signed, replayed and committed as in a round,
with the writer integrating and publishing beside it. The floor appends the same bytes to a file and
syncs it. A second row has the wall time until the last leaf is under a published checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from coordinator.clock import SystemClock
from coordinator.ledger import Ledger, Sequencer, Tx
from coordinator.log_files import LogFiles, Ratchet
from coordinator.log_hub import LogHub
from coordinator.log_writer import LogWriter
from protocols.identifiers import Digest
from protocols.tlog.kinds import Heartbeat
from tests.bench.rows import OURS, Row, Spread
from tests.support.leaves import ORIGIN, World, key, log_signer

SAID = Heartbeat(interval_s=3600)


def say(tx: Tx) -> None:
    """One leaf, signed by the coordinator."""
    tx.append_own(SAID, subject="log/heartbeat", digest=Digest("0" * 64))


def floor(folder: Path, leaves: int, size: int) -> float:
    """Seconds for so many appends of so many bytes, each with fsync."""
    data = bytes(size)
    with (folder / "floor").open("wb", buffering=0) as file:
        begun = time.perf_counter()
        for _ in range(leaves):
            file.write(data)
            os.fsync(file.fileno())
        return time.perf_counter() - begun


async def append(folder: Path, leaves: int) -> tuple[float, float]:
    """Seconds to commit so many leaves one by one; and until all are published."""
    signer = log_signer()
    hub = LogHub(signer.verifier)
    order = Sequencer(key=key("coordinator"), origin=ORIGIN, seen=hub.seen)
    url = f"sqlite:///{folder}/ledger.sqlite"
    async with Ledger(url, clock=SystemClock(), sequencer=order) as ledger:
        for entry in World(witnesses=False).begin().entries:
            await ledger.run("leaf", lambda tx, entry=entry: tx.append_leaf(entry))
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
        begun = time.perf_counter()
        for _ in range(leaves):
            await ledger.run("leaf", say)
        committed = time.perf_counter() - begun
        size = await ledger.read("size", Tx.log_size)
        while (head := files.published()) is None or head.size < size:
            await hub.changed(0.002)
        published = time.perf_counter() - begun
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        return committed, published


def rows(*, leaves: int, repetitions: int) -> Iterator[Row]:
    """The floor, then ours."""
    floors, ours, whole = [], [], []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as name:
            floors.append(floor(Path(name), leaves, 1300))
            committed, published = asyncio.run(append(Path(name), leaves))
            ours.append(committed)
            whole.append(published)
    what = f"appending {leaves} leaves, each durable"
    common = {"what": what, "params": leaves, "nodes": 0}
    yield Row(
        system="write and fsync",
        seconds_per_round=Spread.of(floors),
        note=f"{leaves / min(floors):.0f} a second",
        **common,
    )
    yield Row(
        system=OURS,
        seconds_per_round=Spread.of(ours),
        note=f"{leaves / min(ours):.0f} leaves a second; all published after {min(whole):.2f} s",
        **common,
    )
