"""What local steps cost, as nodes claim it, in a ledger transaction."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import bindparam

from coordinator.ledger.rows import CostRow
from coordinator.ledger.schema import costs
from coordinator.ledger.statements import Statements
from protocols.identifiers import NodeId, RoundId, RunId
from protocols.rounds_codec import to_ms

_COSTS = (
    sa.select(costs)
    .where(costs.c.run_id == bindparam("run"))
    .order_by(costs.c.number, costs.c.node_id)
)


class Costs(Statements):
    """Claims, one for each node and round; the first stands. Not part of history."""

    def add_cost(self, row: CostRow, now: datetime) -> bool:
        """Keep a claim. Returns whether it was new."""
        return self._insert_once(
            costs,
            run_id=row.round.run,
            number=row.round.number,
            node_id=row.node,
            gpu_ms=row.gpu_ms,
            cpu_ms=row.cpu_ms,
            energy_mwh=row.energy_mwh,
            source=row.source,
            received_at=to_ms(now),
        )

    def costs(self, run: RunId) -> list[CostRow]:
        """The claims of a run, by round and node."""
        return [
            CostRow(
                round=RoundId(RunId(row.run_id), row.number),
                node=NodeId(row.node_id),
                gpu_ms=row.gpu_ms,
                cpu_ms=row.cpu_ms,
                energy_mwh=row.energy_mwh,
                source=row.source,
            )
            for row in self._all(_COSTS, run=run)
        ]
