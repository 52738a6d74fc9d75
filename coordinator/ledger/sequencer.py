"""Puts leaves in order: what may be appended, at which index, and what the tree becomes.

A transaction collects the leaves of what it did and hands them here last, under the lock of the
one row of ``log_size``; so leaves stand in order of commit and without gaps. Every leaf, our own
among them, goes through the same ``Replay`` that nodes and auditors run: what they would refuse is
refused here, and the transaction with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from policies.audit.replay import Replay, Taken
from protocols.crypto.signatures import public_bytes
from protocols.errors import CorruptStateError
from protocols.identifiers import Digest
from protocols.tlog.kinds import Predicate
from protocols.tlog.leaf import FIRST_PREV, KeyId, Leaf, Seen, Statement, key_id_of, sign_leaf
from protocols.tlog.merkle import EMPTY_ROOT


def nothing_seen() -> Seen:
    """Before any checkpoint was witnessed."""
    return Seen(size=0, root=EMPTY_ROOT)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLeaf:
    """What the coordinator says; signed when its place is known.

    ``said`` may be made from the log as it then is; None: nothing is to be said.
    """

    said: Predicate | Callable[[Replay], Predicate | None]
    subject: str
    digest: Digest
    now: datetime  # UTC


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A leaf with its place, to be written."""

    taken: Taken
    root: bytes  # of the tree that ends with it


@dataclass(slots=True, kw_only=True)
class Sequencer:
    """The coordinator's statement key, and the log as far as it was committed.

    Used from any thread; ``place`` is called under the lock of ``log_size``.
    """

    key: Ed25519PrivateKey = field(repr=False)
    origin: str = ""  # of the log
    seen: Callable[[], Seen] = nothing_seen  # the last checkpoint that witnesses cosigned
    _replay: Replay = field(default_factory=Replay)  # committed for sure
    _tried: Replay = field(default_factory=Replay)  # committed, if the transaction was
    _last: str = ""  # leaf hash at the end of ``_tried``
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def signer(self) -> KeyId:
        """The key id of the coordinator's leaves."""
        return key_id_of(public_bytes(self.key))

    def catch_up(
        self,
        size: int,
        entries: Callable[[int], Iterable[bytes]],
        hash_at: Callable[[int], str | None],
    ) -> Replay:
        """The state of the log at ``size``, the one that is committed.

        Args:
            size: leaves that are committed.
            entries: those from an index on, in order.
            hash_at: the leaf hash at an index.

        Raises:
            CorruptStateError: the ledger has fewer leaves than this process committed.
            IntegrityError: a leaf of the ledger is not what it must be.
        """
        with self._guard:
            tried = self._tried
            if self._replay.size < tried.size <= size and hash_at(tried.size - 1) == self._last:
                self._replay = tried
            if size < self._replay.size:
                raise CorruptStateError(
                    f"the ledger has {size} leaves, this process has seen {self._replay.size}"
                )
            if size > self._replay.size:
                state = self._replay.copy()
                for entry in entries(state.size):
                    state.take(entry)
                if state.size != size:
                    raise CorruptStateError(f"the ledger holds {state.size} of {size} leaves")
                self._replay = state
            return self._replay

    def place(self, state: Replay, leaves: Sequence[bytes | OwnLeaf]) -> list[Placed]:
        """Check leaves in order and give each its place behind ``state``.

        Raises:
            MalformedMessageError, IntegrityError: a leaf that must not be appended.
        """
        trial, placed = state.copy(), []
        for leaf in leaves:
            if isinstance(leaf, OwnLeaf):
                said = leaf.said if isinstance(leaf.said, Predicate) else leaf.said(trial)
                if said is None:
                    continue
                entry = self._sign(trial, leaf, said).entry
            else:
                entry = leaf
            taken = trial.take(entry)
            placed.append(Placed(taken=taken, root=trial.root))
        if placed:
            with self._guard:
                self._tried, self._last = trial, placed[-1].taken.leaf.hash
        return placed

    def _sign(self, state: Replay, leaf: OwnLeaf, said: Predicate) -> Leaf:
        head = state.chains.get(self.signer)
        statement = Statement(
            kind=said.KIND,
            subject=leaf.subject,
            digest=leaf.digest,
            seq=head.seq + 1 if head else 1,
            prev=head.leaf if head else FIRST_PREV,
            seen=self.seen(),
            time=leaf.now.replace(microsecond=0),
            fields=said.to_fields(),
        )
        return sign_leaf(statement, self.key)
