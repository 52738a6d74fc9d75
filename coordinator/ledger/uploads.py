"""Uploads and traffic in a ledger transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam

from coordinator.ledger.rows import TrafficRow, UploadRow
from coordinator.ledger.schema import traffic, uploads
from coordinator.ledger.statements import Statements
from protocols.errors import ExistsError
from protocols.identifiers import NodeId, RoundId, RunId
from protocols.rounds_codec import from_ms, to_ms

_BY_ID = sa.select(uploads).where(uploads.c.upload_id == bindparam("id_"))
_OF_ATTEMPT = (
    sa.select(uploads)
    .where(
        uploads.c.run_id == bindparam("run"),
        uploads.c.number == bindparam("n"),
        uploads.c.attempt == bindparam("try_"),
    )
    .order_by(uploads.c.node_id)
)
_OF_NODE = _OF_ATTEMPT.where(uploads.c.node_id == bindparam("node"))
_OF_ROUND = sa.select(uploads).where(
    uploads.c.run_id == bindparam("run"), uploads.c.number == bindparam("n")
)
_FINISH = (
    sa.update(uploads)
    .where(uploads.c.upload_id == bindparam("id_"), uploads.c.receipt.is_(None))
    .values(receipt=bindparam("receipt_"), finished_at=bindparam("at"))
)
_TRAFFIC = (
    sa.select(traffic)
    .where(traffic.c.run_id == bindparam("run"))
    .order_by(traffic.c.number, traffic.c.node_id)
)
_HASH = 32


class Uploads(Statements):
    """Vectors on their way in. Their bytes, and how many have arrived, lie in the spool."""

    def add_upload(
        self,
        id: bytes,  # noqa: A002 - it is the upload's
        round_id: RoundId,
        attempt: int,
        node: NodeId,
        *,
        header: bytes,
        signature: bytes,
        unit_hashes: Sequence[bytes],
        total: int,
        now: datetime | None = None,
    ) -> UploadRow:
        """Remember an upload that begins.

        Args:
            id: 32 bytes, one for each node and attempt.
            round_id, attempt, node: whose vector for what.
            header, signature: what was signed, and how.
            unit_hashes: 32 bytes each.
            total: bytes.
            now: UTC; when the transaction began, if not given.

        Raises:
            ExistsError: the node has begun an upload for this attempt; look it up first.
        """
        written = self._insert_once(
            uploads,
            upload_id=id,
            run_id=round_id.run,
            number=round_id.number,
            attempt=attempt,
            node_id=node,
            header=header,
            signature=signature,
            unit_hashes=b"".join(unit_hashes),
            total=total,
            began_at=to_ms(now or self.now),
        )
        if not written:
            raise ExistsError(f"{node} has begun an upload for round {round_id} before")
        return _upload(self._c.execute(_BY_ID, {"id_": id}).one())

    def upload(self, round_id: RoundId, attempt: int, node: NodeId) -> UploadRow | None:
        """The upload of a node for an attempt, if it has begun."""
        row = self._one(_OF_NODE, run=round_id.run, n=round_id.number, try_=attempt, node=node)
        return None if row is None else _upload(row)

    def upload_by_id(self, upload_id: bytes) -> UploadRow | None:
        """An upload, if it has begun."""
        row = self._one(_BY_ID, id_=upload_id)
        return None if row is None else _upload(row)

    def uploads(self, round_id: RoundId, attempt: int) -> list[UploadRow]:
        """All uploads of an attempt, by node."""
        found = self._all(_OF_ATTEMPT, run=round_id.run, n=round_id.number, try_=attempt)
        return [_upload(row) for row in found]

    def all_uploads(self, round_id: RoundId) -> list[UploadRow]:
        """All uploads of a round, of every attempt."""
        return [_upload(row) for row in self._all(_OF_ROUND, run=round_id.run, n=round_id.number)]

    def finish_upload(self, upload_id: bytes, receipt: bytes, now: datetime) -> bool:
        """Record the receipt of a complete upload. Returns whether it was new."""
        return self._write(_FINISH, id_=upload_id, receipt_=receipt, at=to_ms(now)) > 0

    # -- traffic -----------------------------------------------------------------------------

    def add_traffic(self, round_id: RoundId, node: NodeId, up: int = 0, down: int = 0) -> None:
        """Count bulk bytes of a node. Not part of history."""
        self._write(
            self._insert(traffic)
            .values(
                run_id=round_id.run,
                number=round_id.number,
                node_id=node,
                bytes_up=up,
                bytes_down=down,
            )
            .on_conflict_do_update(
                index_elements=["run_id", "number", "node_id"],
                set_={
                    "bytes_up": traffic.c.bytes_up + up,
                    "bytes_down": traffic.c.bytes_down + down,
                },
            )
        )

    def traffic(self, run: RunId) -> list[TrafficRow]:
        """Bulk bytes of a run, by round and node."""
        return [
            TrafficRow(
                round=RoundId(RunId(row.run_id), row.number),
                node=NodeId(row.node_id),
                up=row.bytes_up,
                down=row.bytes_down,
            )
            for row in self._all(_TRAFFIC, run=run)
        ]


def _upload(row: Any) -> UploadRow:
    packed = bytes(row.unit_hashes)
    return UploadRow(
        upload_id=bytes(row.upload_id),
        round=RoundId(RunId(row.run_id), row.number),
        attempt=row.attempt,
        node=NodeId(row.node_id),
        header=bytes(row.header),
        signature=bytes(row.signature),
        unit_hashes=tuple(packed[i : i + _HASH] for i in range(0, len(packed), _HASH)),
        total=row.total,
        began_at=from_ms(row.began_at),
        finished_at=None if row.finished_at is None else from_ms(row.finished_at),
        receipt=None if row.receipt is None else bytes(row.receipt),
    )
