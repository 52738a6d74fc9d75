"""The trust repository over gRPC: nodes have this connection and no other.

Reading is for everybody who may call; what is read is verified by the reader. Publishing is for
operators, who carry what admins signed; what does not verify is refused, whoever carries it.
"""

from __future__ import annotations

from typing import TypeAlias

import grpc

from coordinator.ledger import Ledger, Tx
from coordinator.services.caller import Callers
from coordinator.trust_repository import TrustRepository
from protocols.errors import MalformedMessageError
from protocols.gen import trust_pb2, trust_pb2_grpc
from protocols.identifiers import parse_node_id

Context: TypeAlias = grpc.aio.ServicerContext
_MAX_NODES = 1000


class TrustService(trust_pb2_grpc.TrustServicer):
    """Answers nodes and operators."""

    def __init__(self, *, callers: Callers, ledger: Ledger, trust: TrustRepository) -> None:
        self._callers = callers
        self._ledger = ledger
        self._trust = trust

    async def File(
        self, request: trust_pb2.TrustFileRequest, context: Context
    ) -> trust_pb2.TrustFileResponse:
        """One file of the repository."""
        await self._callers.reader(context)
        self._trust.refresh_from_disk()
        return trust_pb2.TrustFileResponse(data=self._trust.file(request.name))

    async def Publish(
        self, request: trust_pb2.PublishTrustRequest, context: Context
    ) -> trust_pb2.PublishTrustResponse:
        """Put into force what the admins signed."""
        await self._callers.carrier(context)
        if not request.files:
            raise MalformedMessageError("there is nothing to publish")
        changes = await self._trust.publish(dict(request.files))
        return trust_pb2.PublishTrustResponse(changes=[change.words for change in changes])

    async def Approvals(
        self, request: trust_pb2.ApprovalsRequest, context: Context
    ) -> trust_pb2.ApprovalsResponse:
        """The institutions' statements about their nodes' keys."""
        await self._callers.any(context)
        if len(request.nodes) > _MAX_NODES:
            raise MalformedMessageError(f"at most {_MAX_NODES} nodes at once")
        wanted = {parse_node_id(name) for name in request.nodes}

        def look(tx: Tx) -> dict[str, bytes]:
            return {
                row.node: row.approval
                for row in tx.nodes()
                if row.approval is not None and (not wanted or row.node in wanted)
            }

        found = await self._ledger.read("approvals", look)
        return trust_pb2.ApprovalsResponse(approvals=found)
