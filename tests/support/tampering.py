"""Ways to tamper with a log, by how many keys the tamperer has.

    files      whoever can write to the folder: entries and tiles, no key
    log        the operator: the newest checkpoint is signed again, the archive is gone
    everybody  the operator and all witnesses together: whatever they say is cosigned

A leaf's own signature is out of reach for all three, except for leaves that the tamperer signed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from policies.audit.tree import LogFiles
from policies.audit.verify import Audit, audit
from protocols.identifiers import Digest
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.proofs import root_of, stored
from protocols.tlog.trust_policy import TrustPolicy
from tests.support.audit_run import NODES, ORIGIN, Run

Mutation = Callable[[list[bytes]], list[bytes]]
POWERS = ("files", "log", "everybody")


def flip(index: int, at: int = -9) -> Mutation:
    """Change one byte of an entry, within its signature or payload."""

    def change(entries: list[bytes]) -> list[bytes]:
        entry = bytearray(entries[index])
        entry[at] = ord("A") if entry[at] != ord("A") else ord("B")
        return [*entries[:index], bytes(entry), *entries[index + 1 :]]

    return change


def drop(index: int) -> Mutation:
    """Leave one out."""
    return lambda entries: [*entries[:index], *entries[index + 1 :]]


def duplicate(index: int) -> Mutation:
    """Repeat one right behind itself."""
    return lambda entries: [*entries[: index + 1], *entries[index:]]


def swap(index: int) -> Mutation:
    """Exchange one with the next."""
    return lambda entries: [
        *entries[:index], entries[index + 1], entries[index], *entries[index + 2 :],
    ]  # fmt: skip


def truncate(size: int) -> Mutation:
    """Cut the end off."""
    return lambda entries: entries[:size]


@dataclass(frozen=True)
class Tampered:
    """A log after somebody was at it."""

    files: LogFiles
    policy: TrustPolicy
    run: Run

    def audit(self, *, now: int | None = None, blobs: bool = False) -> Audit:
        """What an auditor with the right trust policy finds."""
        run = self.run
        return audit(
            self.files,
            self.policy,
            now=now or int(run.clock.timestamp()) + 60,
            anchored=True,
            documents=run.documents.get,
            blobs=(run.blobs.get) if blobs else (lambda _: None),
        )


def tamper(run: Run, mutation: Mutation, power: str) -> Tampered:
    """The log of ``run`` after ``mutation``, made to look as well as the tamperer's keys allow."""
    return rewritten(run, mutation(list(run.entries)), power)


def rewritten(run: Run, entries: Sequence[bytes], power: str) -> Tampered:
    """These entries under checkpoints that the tamperer can make."""
    hashes = [leaf_hash(entry) for entry in entries]
    tree = stored(hashes)
    size = len(entries)
    archive: dict[int, bytes] = {}
    if power == "files":
        checkpoint = run.checkpoints[len(run.entries)]
        archive = {n: data for n, data in run.checkpoints.items() if n != len(run.entries)}
    else:
        head = Checkpoint(origin=ORIGIN, size=size, root=root_of(tree, size))
        checkpoint = run.signed(head, NODES if power == "everybody" else ())
    files = LogFiles(checkpoint=checkpoint, archive=archive, entries=list(entries), row=hashes)
    return Tampered(files=files, policy=TrustPolicy.parse(run.policy()), run=run)


def kinds_of(run: Run) -> dict[str, list[int]]:
    """Indices of leaves by kind."""
    from policies.audit.replay import Replay

    replay, found = Replay(), {}
    for index, entry in enumerate(run.entries):
        found.setdefault(replay.take(entry).said.KIND, []).append(index)
    return found


def interval_of(run: Run, index: int) -> tuple[int, int]:
    """Sizes of the checkpoints around a leaf: the last without it, and the first with it."""
    sizes = sorted({0, *run.checkpoints, len(run.entries)})
    return max(s for s in sizes if s <= index), min(s for s in sizes if s > index)


__all__ = [
    "POWERS",
    "Digest",
    "Tampered",
    "drop",
    "duplicate",
    "flip",
    "interval_of",
    "kinds_of",
    "rewritten",
    "swap",
    "tamper",
    "truncate",
]
