"""What local steps cost, as the institutions claim it: for people, never part of a decision."""

from __future__ import annotations

from typing import Final, TypeAlias

import grpc

from coordinator.clock import Clock
from coordinator.ledger import Ledger, Tx
from coordinator.ledger.rows import CostRow
from coordinator.services.caller import Callers
from protocols.errors import MalformedMessageError, NotFoundError, NotListedError
from protocols.gen import accounting_pb2, accounting_pb2_grpc
from protocols.identifiers import NodeId
from protocols.wire import read_round

SOURCES: Final = ("measured", "estimated", "none")
_BOUND: Final = 2**48  # of a figure, as in the sum
Context: TypeAlias = grpc.aio.ServicerContext


class AccountingService(accounting_pb2_grpc.AccountingServicer):
    """Takes the figures of nodes."""

    def __init__(self, *, callers: Callers, ledger: Ledger, clock: Clock) -> None:
        self._callers = callers
        self._ledger = ledger
        self._clock = clock

    async def Report(
        self, request: accounting_pb2.ReportRequest, context: Context
    ) -> accounting_pb2.ReportResponse:
        """Keep the caller's own figures of a round; the first report stands."""
        node = await self._callers.node(context)
        row, now = read_cost(request, node), self._clock.now()

        def keep(tx: Tx) -> None:
            if tx.round(row.round) is None:
                raise NotFoundError(f"there is no round {row.round}")
            if node not in tx.run(row.round.run).plan.roster:
                raise NotListedError(f"{node} is not on the roster of run {row.round.run}")
            tx.add_cost(row, now)

        await self._ledger.run("report_cost", keep)
        return accounting_pb2.ReportResponse()


def read_cost(request: accounting_pb2.ReportRequest, node: NodeId) -> CostRow:
    """Check a report.

    Raises:
        MalformedMessageError: no round, a figure out of range, an unknown source.
    """
    used = request.used
    for name in ("gpu_ms", "cpu_ms", "energy_mwh"):
        if not 0 <= getattr(used, name) < _BOUND:
            raise MalformedMessageError(f"{name} must be below 2**48, got {getattr(used, name)}")
    if used.source not in SOURCES:
        raise MalformedMessageError(f"energy is {' | '.join(SOURCES)}, not {used.source!r:.40}")
    return CostRow(
        round=read_round(request.round),
        node=node,
        gpu_ms=int(used.gpu_ms),
        cpu_ms=int(used.cpu_ms),
        energy_mwh=int(used.energy_mwh),
        source=used.source,
    )
