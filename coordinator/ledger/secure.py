"""Messages of secure sums, as they came: evidence, and what lists are made of."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import bindparam

from coordinator.ledger.schema import rounds, secure_messages
from coordinator.ledger.statements import Statements
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.rounds_codec import to_ms

_table = secure_messages.c
_OF_KIND = (
    sa.select(_table.node_id, _table.body)
    .where(
        _table.run_id == bindparam("run"),
        _table.number == bindparam("n"),
        _table.attempt == bindparam("try_"),
        _table.kind == bindparam("kind_"),
    )
    .order_by(_table.node_id)
)
_TRANSCRIPT = (
    sa.update(rounds)
    .where(rounds.c.run_id == bindparam("run"), rounds.c.number == bindparam("n"))
    .values(transcript=bindparam("digest"))
)


class SecureMessages(Statements):
    """Signed messages of nodes; never changed or removed while the round is kept."""

    def add_message(
        self,
        round_id: RoundId,
        attempt: int,
        kind: str,
        node: NodeId,
        body: bytes,
        *,
        now: datetime,
    ) -> bytes:
        """Keep a message unless there is one. Returns the one that is kept: the first."""
        self._write(
            self._insert(secure_messages)
            .values(
                run_id=round_id.run,
                number=round_id.number,
                attempt=attempt,
                kind=kind,
                node_id=node,
                body=body,
                received_at=to_ms(now),
            )
            .on_conflict_do_nothing()
        )
        return self.messages(round_id, attempt, kind)[node]

    def messages(self, round_id: RoundId, attempt: int, kind: str) -> dict[NodeId, bytes]:
        """All messages of a kind in an attempt, by node, ascending."""
        found = self._all(_OF_KIND, run=round_id.run, n=round_id.number, try_=attempt, kind_=kind)
        return {NodeId(row.node_id): bytes(row.body) for row in found}

    def set_transcript(self, round_id: RoundId, digest: Digest) -> None:
        """Record how the sum was opened; in the transaction that says it was."""
        self._write(_TRANSCRIPT, run=round_id.run, n=round_id.number, digest=digest)
