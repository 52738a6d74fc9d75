"""Leaves that people sign, brought to a served coordinator: as `minga admin statement` does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from infra.admin.statements import read_statement, sign_statement
from policies.audit.replay import Replay
from protocols.gen import log_pb2, log_pb2_grpc
from protocols.tlog.leaf import Seen
from tests.support.trust import private

A = "a" * 64


def log_of(door: Any) -> Replay:
    """The log as it is in the ledger."""
    return door.ledger(lambda tx: tx.log_state())


def say(
    door: Any, who: str, kind: str, fields: dict[str, Any], *, ago: timedelta = timedelta()
) -> None:
    """Sign a leaf with somebody's key and deliver it as the operator."""
    log = log_of(door)
    leaf = sign_statement(
        read_statement(kind, fields),
        private(who),
        log=log,
        seen=Seen(size=log.size, root=log.root),
        now=datetime.now(UTC) - ago,
    )
    log_service = log_pb2_grpc.LogStub(door.operator().channel)
    log_service.Deliver(log_pb2.SubmitRequest(entries=[leaf.entry]), timeout=20)


def hearing_of(door: Any, name: str) -> None:
    """A member makes its statement on its hearing."""
    said = {"institution": name, "topic": "hearing", "statement_sha256": A}
    say(door, f"institution {name}", "member.statement", said)


def call_to_hearing(door: Any, who: str, name: str, *, ago: timedelta = timedelta()) -> None:
    """Somebody calls a member to be heard, and says that it was so long ago."""
    said = {"klass": "hearing", "code": name, "evidence_sha256": None}
    say(door, who, "incident", said, ago=ago)
