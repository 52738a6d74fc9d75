"""What this node has verified of the log, and what it has said itself: ``log.sqlite``.

    leaves   every leaf under an accepted checkpoint, as it was hashed
    head     the last accepted checkpoint, with its cosignatures: never goes back
    own      this node's leaves, in the order of its chain, signed before they are sent
    alarm    why nothing passes any more, with the evidence
    cleared  which alarms a person of the site has looked into, and with what outcome

Durable (WAL, synchronous=FULL) before anybody is told. An act has one leaf: after a crash the same
bytes are sent again. The standard library's SQLite is enough, so this needs no database package.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocols.errors import CorruptStateError, StorageFullError
from protocols.identifiers import Digest
from protocols.tlog.leaf import ChainHead, Leaf

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS leaves (position INTEGER PRIMARY KEY, entry BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS head (
    one INTEGER PRIMARY KEY CHECK (one = 1), size INTEGER NOT NULL, note BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS own (
    seq INTEGER PRIMARY KEY, signer TEXT NOT NULL, act TEXT NOT NULL UNIQUE,
    leaf_hash TEXT NOT NULL UNIQUE, entry BLOB NOT NULL,
    taken_at INTEGER,  -- Unix seconds; NULL: the coordinator has not taken it
    seen INTEGER NOT NULL DEFAULT 0);  -- whether it is in the verified log
CREATE TABLE IF NOT EXISTS alarm (
    id INTEGER PRIMARY KEY, at INTEGER NOT NULL, rule TEXT NOT NULL, why TEXT NOT NULL,
    evidence BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS cleared (
    alarm INTEGER PRIMARY KEY, at INTEGER NOT NULL, code TEXT NOT NULL, by TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLeaf:
    """Something this node signed."""

    seq: int
    leaf_hash: Digest
    entry: bytes
    taken_at: int | None
    seen: bool


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that must not be, and what became of it."""

    id: int
    at: int  # Unix seconds
    rule: str
    why: str
    evidence: bytes
    cleared_at: int | None
    code: str | None  # the outcome, as a code
    by: str | None


class LogStore:
    """One file. Its methods may be called from any thread; each is one transaction."""

    def __init__(self, path: Path) -> None:
        """Raises: CorruptStateError: the file is no such store."""
        self._path = path
        self._guard = threading.Lock()
        try:
            self._c = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._c.execute("PRAGMA journal_mode=WAL")
            self._c.execute("PRAGMA synchronous=FULL")
            self._c.executescript(_SCHEMA)
            path.chmod(0o600)
        except sqlite3.Error as error:
            raise CorruptStateError(f"{path}: {error}") from None

    def close(self) -> None:
        """Let go of the file."""
        with self._guard:
            self._c.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guard:
            try:
                self._c.execute("BEGIN IMMEDIATE")
                yield self._c
                self._c.execute("COMMIT")
            except sqlite3.Error as error:
                self._rollback()
                if "full" in str(error):
                    raise StorageFullError(f"no room for {self._path}") from None
                raise CorruptStateError(f"{self._path}: {error}") from None
            except BaseException:
                self._rollback()
                raise

    def _rollback(self) -> None:
        if self._c.in_transaction:
            self._c.execute("ROLLBACK")

    # -- what was verified ---------------------------------------------------------------------

    def entries(self) -> list[bytes]:
        """All verified leaves, in order."""
        with self._guard:
            rows = self._c.execute("SELECT entry FROM leaves ORDER BY position").fetchall()
        return [row[0] for row in rows]

    def head(self) -> tuple[int, bytes] | None:
        """Size and note of the last accepted checkpoint."""
        with self._guard:
            row = self._c.execute("SELECT size, note FROM head").fetchone()
        return None if row is None else (row[0], row[1])

    def accept(
        self, first: int, entries: Sequence[bytes], size: int, note: bytes, mine: Sequence[str]
    ) -> None:
        """Keep verified leaves and their checkpoint.

        Args:
            first: index of the first leaf; must follow what is kept.
            entries: leaves.
            size, note: the checkpoint that covers them.
            mine: hashes of this node's own leaves among them.

        Raises:
            CorruptStateError: it would go back, or leave a hole.
        """
        with self._transaction() as c:
            have = c.execute("SELECT COUNT(*) FROM leaves").fetchone()[0]
            if first != have or size != first + len(entries):
                raise CorruptStateError(f"{self._path} has {have} leaves, not {first}")
            c.executemany("INSERT INTO leaves VALUES (?, ?)", enumerate(entries, start=first))
            c.execute("INSERT OR REPLACE INTO head VALUES (1, ?, ?)", (size, note))
            c.executemany("UPDATE own SET seen = 1 WHERE leaf_hash = ?", [(h,) for h in mine])

    # -- what this node said -------------------------------------------------------------------

    def sign(self, act: str, signer: str, make: Callable[[ChainHead | None], Leaf]) -> OwnLeaf:
        """The leaf of an act; made the first time it is asked for, then the same.

        Args:
            act: names it, e.g. ``round.join demo-1/0``.
            signer: key id that signs; another key begins another chain.
            make: signs the leaf behind the last one.
        """
        with self._transaction() as c:
            found = c.execute("SELECT * FROM own WHERE act = ?", (act,)).fetchone()
            if found is None:
                last = c.execute("SELECT * FROM own ORDER BY seq DESC LIMIT 1").fetchone()
                head = None
                if last is not None and last[1] == signer:
                    head = ChainHead(seq=last[0], leaf=Digest(last[3]))
                leaf = make(head)
                c.execute(
                    "INSERT INTO own (seq, signer, act, leaf_hash, entry) VALUES (?, ?, ?, ?, ?)",
                    (leaf.statement.seq, signer, act, leaf.hash, leaf.entry),
                )
                found = c.execute("SELECT * FROM own WHERE act = ?", (act,)).fetchone()
        return _own(found)

    def own(self, act: str) -> OwnLeaf | None:
        """The leaf of an act, if one was signed."""
        with self._guard:
            row = self._c.execute("SELECT * FROM own WHERE act = ?", (act,)).fetchone()
        return None if row is None else _own(row)

    def untaken(self, before: int) -> list[OwnLeaf]:
        """Leaves before ``before`` that the coordinator has not taken, in order."""
        with self._guard:
            rows = self._c.execute(
                "SELECT * FROM own WHERE seq < ? AND taken_at IS NULL AND seen = 0 ORDER BY seq",
                (before,),
            ).fetchall()
        return [_own(row) for row in rows]

    def taken(self, seqs: Sequence[int], at: int) -> None:
        """The coordinator has taken leaves; Unix seconds."""
        with self._transaction() as c:
            c.executemany(
                "UPDATE own SET taken_at = ? WHERE seq = ? AND taken_at IS NULL",
                [(at, seq) for seq in seqs],
            )

    def missing(self) -> dict[Digest, int]:
        """Own leaves that were taken and are not in the verified log, and when they were."""
        with self._guard:
            rows = self._c.execute(
                "SELECT leaf_hash, taken_at FROM own WHERE taken_at IS NOT NULL AND seen = 0"
            ).fetchall()
        return {Digest(row[0]): row[1] for row in rows}

    def own_hashes(self) -> set[str]:
        """Hashes of all leaves of this node."""
        with self._guard:
            return {row[0] for row in self._c.execute("SELECT leaf_hash FROM own")}

    # -- alarms --------------------------------------------------------------------------------

    def raise_alarm(self, rule: str, why: str, evidence: bytes, at: int) -> None:
        """Remember that the log was caught lying; the first alarm stands."""
        with self._transaction() as c:
            c.execute(
                "INSERT INTO alarm (at, rule, why, evidence) VALUES (?, ?, ?, ?)",
                (at, rule, why, evidence),
            )

    def alarm(self) -> tuple[str, str] | None:
        """Rule and sentence of the first alarm that nobody cleared."""
        with self._guard:
            row = self._c.execute(
                "SELECT rule, why FROM alarm WHERE id NOT IN (SELECT alarm FROM cleared)"
                " ORDER BY id LIMIT 1"
            ).fetchone()
        return None if row is None else (row[0], row[1])

    def alarms(self) -> list[Alarm]:
        """All alarms, the first one first; evidence and outcome with them."""
        with self._guard:
            rows = self._c.execute(
                "SELECT a.id, a.at, a.rule, a.why, a.evidence, c.at, c.code, c.by FROM alarm a"
                " LEFT JOIN cleared c ON c.alarm = a.id ORDER BY a.id"
            ).fetchall()
        return [Alarm(*row) for row in rows]

    def clear_alarms(self, ids: Sequence[int], *, code: str, by: str, at: int) -> None:
        """Remember that a person looked into alarms; their evidence stays. Again is nothing."""
        with self._transaction() as c:
            c.executemany(
                "INSERT OR IGNORE INTO cleared VALUES (?, ?, ?, ?)",
                [(number, at, code, by) for number in ids],
            )


def _own(row: tuple[int, str, str, str, bytes, int | None, int]) -> OwnLeaf:
    return OwnLeaf(
        seq=row[0],
        leaf_hash=Digest(row[3]),
        entry=row[4],
        taken_at=row[5],
        seen=bool(row[6]),
    )
