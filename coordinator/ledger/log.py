"""The round log in a ledger transaction: leaves are part of what they speak of.

``append_leaf`` and ``append_own`` collect; the leaves are checked, placed and written when the
transaction ends, behind everything else and before history. So a change of state and its leaf are
committed together or not at all, and the lock on the log's size, taken that late, cannot be part
of a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam

from coordinator.ledger.schema import log_chain, log_leaf, log_size, rounds
from coordinator.ledger.sequencer import OwnLeaf, Placed, Sequencer
from coordinator.ledger.statements import Statements
from policies.audit.replay import Replay
from protocols.errors import ConfigurationError, CorruptStateError, NotListedError
from protocols.identifiers import Digest, RoundId, RunId
from protocols.rounds_codec import from_ms, to_ms
from protocols.tlog.kinds import Predicate, Role, is_about_round, parse_round_subject
from protocols.tlog.leaf import MAX_LEAF
from protocols.tlog.merkle import leaf_hash

_SIZE = sa.select(log_size.c.value)
_LOCK_SIZE = (
    sa.update(log_size)
    .where(log_size.c.one == 1)
    .values(value=log_size.c.value)
    .returning(log_size.c.value)
)
_SET_SIZE = sa.update(log_size).where(log_size.c.one == 1).values(value=bindparam("size"))
_ADD = sa.insert(log_leaf)
_FROM = (
    sa.select(log_leaf)
    .where(log_leaf.c.index >= bindparam("first"), log_leaf.c.index < bindparam("end"))
    .order_by(log_leaf.c.index)
)
_HASH_AT = sa.select(log_leaf.c.leaf_hash).where(log_leaf.c.index == bindparam("at"))
_BY_HASH = sa.select(log_leaf).where(log_leaf.c.leaf_hash == bindparam("hash_"))
_OF_ROUND = (
    sa.select(log_leaf)
    .where(log_leaf.c.run_id == bindparam("run"), log_leaf.c.number == bindparam("n"))
    .order_by(log_leaf.c.index)
)
_HASHES = (
    sa.select(log_leaf.c.leaf_hash)
    .where(log_leaf.c.index >= bindparam("first"))
    .order_by(log_leaf.c.index)
)
_UNCLOSED = sa.select(rounds.c.run_id, rounds.c.number).where(
    rounds.c.sum.is_not(None),
    rounds.c.changed_at < bindparam("before"),
    sa.exists().where(
        log_leaf.c.run_id == rounds.c.run_id,
        log_leaf.c.number == rounds.c.number,
        log_leaf.c.kind == "round.aggregate",
    ),
    ~sa.exists().where(
        log_leaf.c.run_id == rounds.c.run_id,
        log_leaf.c.number == rounds.c.number,
        log_leaf.c.kind == "round.closed",
    ),
)
_BATCH = 512  # leaves read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafRow:
    """A leaf of the log."""

    index: int
    leaf_hash: Digest
    root: bytes  # of the tree that ends with it, 32 bytes
    entry: bytes
    kind: str
    signer: str
    round: RoundId | None
    attempt: int | None
    logged_at: datetime  # UTC


class LogLeaves(Statements):
    """Leaves that this transaction appends, and those before."""

    sequencer: Sequencer | None = None  # None: this federation keeps no log

    @property
    def logs(self) -> bool:
        """Whether this federation keeps a round log."""
        return self.sequencer is not None

    # -- appending -----------------------------------------------------------------------------

    def append_leaf(self, entry: bytes, *, by: tuple[Role, str] | None = None) -> Digest:
        """Append somebody else's leaf when the transaction ends; its hash.

        Args:
            entry: as it came.
            by: who must have signed it, by the keys that the log knows.

        The same leaf again changes nothing. Whether it may stand is found out at the end: then the
        transaction fails with the leaf's rule.

        Raises:
            ConfigurationError: there is no log.
        """
        self._must_log()
        self._leaves().append(entry)
        if by is not None:
            self._signers[entry] = by
        return Digest(leaf_hash(entry[: MAX_LEAF + 1]).hex())

    def append_own(
        self,
        said: Predicate | Callable[[Replay], Predicate | None],
        *,
        subject: str,
        digest: Digest,
        now: datetime | None = None,
    ) -> None:
        """Say something as the coordinator when the transaction ends; nothing without a log.

        Args:
            said: what; or how to make it from the log as it is at the end.
            subject, digest: what it is about.
            now: UTC; when the transaction began, if not given.
        """
        if self.sequencer is not None:
            at = now or self.now
            self._leaves().append(OwnLeaf(said=said, subject=subject, digest=digest, now=at))

    def write_history(self) -> int | None:
        """Place the leaves, then write history."""
        if self._queued:
            self._append()
        return super().write_history()

    _queued: list[bytes | OwnLeaf] | None = None
    _by: dict[bytes, tuple[Role, str]] | None = None

    @property
    def _signers(self) -> dict[bytes, tuple[Role, str]]:
        if self._by is None:
            self._by = {}
        return self._by

    def _leaves(self) -> list[bytes | OwnLeaf]:
        if self._queued is None:
            self._queued = []
        return self._queued

    def _must_log(self) -> Sequencer:
        if self.sequencer is None:
            raise ConfigurationError("this federation keeps no round log")
        return self.sequencer

    def _append(self) -> None:
        sequencer, queued = self._must_log(), self._leaves()
        self._queued = None
        size: int = self._c.execute(_LOCK_SIZE).scalar_one()
        state = sequencer.catch_up(size, self._entries, self._hash_at)
        placed = sequencer.place(state, [leaf for leaf in queued if not self._is_logged(leaf)])
        for each in placed:
            holder, by = each.taken.holder, self._signers.get(each.taken.leaf.entry)
            if by is not None and by != (holder.role, holder.name):
                raise NotListedError(f"{by[1]} handed in a leaf of {holder.name}")
        if not placed:
            return
        self._c.execute(_ADD, [self._row(each) for each in placed])
        heads = {each.taken.leaf.signer: each.taken.leaf for each in placed}
        for signer, leaf in heads.items():
            head = {"seq": leaf.statement.seq, "leaf_hash": leaf.hash}
            self._c.execute(
                self._insert(log_chain)
                .values(signer=signer, **head)
                .on_conflict_do_update(index_elements=["signer"], set_=head)
            )
        self._c.execute(_SET_SIZE, {"size": size + len(placed)})
        if not self._has_news:  # whoever waits for news must hear of the leaves
            kinds = ", ".join(sorted({each.taken.said.KIND for each in placed}))
            self.note(f"logged: {kinds}")

    def _is_logged(self, leaf: bytes | OwnLeaf) -> bool:
        """After a lost answer the same bytes come again."""
        return not isinstance(leaf, OwnLeaf) and self.leaf(leaf_hash(leaf).hex()) is not None

    def _row(self, placed: Placed) -> dict[str, Any]:
        taken, round_ = placed.taken, None
        if is_about_round(taken.said.KIND):
            _, round_ = parse_round_subject(taken.statement.subject)
        return {
            "index": taken.index,
            "leaf_hash": taken.leaf.hash,
            "root": placed.root.hex(),
            "entry": taken.leaf.entry,
            "kind": taken.said.KIND,
            "signer": taken.leaf.signer,
            "run_id": round_.run if round_ else None,
            "number": round_.number if round_ else None,
            "attempt": getattr(taken.said, "attempt", None),
            "logged_at": to_ms(self.now),
        }

    # -- reading -------------------------------------------------------------------------------

    def log_size(self) -> int:
        """Leaves in the log."""
        return int(self._c.execute(_SIZE).scalar_one())

    def log_state(self) -> Replay:
        """The replayed log as this writing transaction sees it; not to be changed.

        Raises:
            IntegrityError: a leaf is not what it must be.
        """
        return self._must_log().catch_up(self.log_size(), self._entries, self._hash_at)

    def leaves(self, first: int, end: int) -> list[LeafRow]:
        """The leaves ``first`` to ``end - 1``, as far as there are."""
        return [_leaf(row) for row in self._all(_FROM, first=first, end=end)]

    def leaf_hashes(self, first: int) -> list[bytes]:
        """The leaf hashes from an index on, 32 bytes each."""
        rows = self._all(_HASHES, first=first)
        return [bytes.fromhex(row.leaf_hash) for row in rows]

    def leaf(self, leaf_hash_: str) -> LeafRow | None:
        """A leaf by its hash."""
        row = self._one(_BY_HASH, hash_=leaf_hash_)
        return None if row is None else _leaf(row)

    def round_leaves(self, round_id: RoundId, kind: str | None = None) -> list[LeafRow]:
        """The leaves about a round, in order; of one kind, or all."""
        rows = self._all(_OF_ROUND, run=round_id.run, n=round_id.number)
        return [_leaf(row) for row in rows if kind is None or row.kind == kind]

    def start_leaf(self, round_id: RoundId, attempt: int) -> LeafRow | None:
        """The ``round.start`` of an attempt."""
        found = self.round_leaves(round_id, "round.start")
        return next((row for row in found if row.attempt == attempt), None)

    def unclosed_rounds(self, before: datetime) -> list[RoundId]:
        """Rounds released before a time whose ``round.closed`` is not logged."""
        rows = self._all(_UNCLOSED, before=to_ms(before))
        return [RoundId(RunId(row.run_id), row.number) for row in rows]

    def chain_head(self, signer: str) -> tuple[int, Digest] | None:
        """The last leaf of a signer: its seq and hash."""
        row = self._one(sa.select(log_chain).where(log_chain.c.signer == signer))
        return None if row is None else (int(row.seq), Digest(row.leaf_hash))

    def _entries(self, first: int) -> Iterator[bytes]:
        while rows := self.leaves(first, first + _BATCH):
            for row in rows:
                if row.index != first:
                    raise CorruptStateError(f"leaf {first} is missing in the ledger")
                yield row.entry
                first += 1

    def _hash_at(self, index: int) -> str | None:
        row = self._one(_HASH_AT, at=index)
        return None if row is None else str(row.leaf_hash)


def _leaf(row: Any) -> LeafRow:
    about = None if row.run_id is None else RoundId(RunId(row.run_id), row.number)
    return LeafRow(
        index=row.index,
        leaf_hash=Digest(row.leaf_hash),
        root=bytes.fromhex(row.root),
        entry=bytes(row.entry),
        kind=row.kind,
        signer=row.signer,
        round=about,
        attempt=row.attempt,
        logged_at=from_ms(row.logged_at),
    )
