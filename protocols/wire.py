"""Between protobuf messages and the values of this package. Parse once, at the door.

``read_*`` takes what came over the wire and raises ``MalformedMessageError`` for anything that is
not a value; the other direction cannot fail. This is the only module, besides generated code, that
knows protobuf.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from protocols.cohort import Terms
from protocols.errors import MalformedMessageError
from protocols.gen import rounds_pb2
from protocols.identifiers import Digest, NodeId, RoundId, parse_digest, parse_node_id, parse_run_id
from protocols.rounds import (
    Aborted,
    Burned,
    Committing,
    Dealing,
    Open,
    Opened,
    Phase,
    Released,
    Revealing,
    Training,
    Uploading,
)
from protocols.rounds_codec import from_ms, to_ms

__all__ = [
    "from_ms",
    "phase_from_view",
    "phase_to_view",
    "read_bytes",
    "read_digest",
    "read_digest_bytes",
    "read_round",
    "read_text",
    "round_ref",
    "to_ms",
]

_SETS = (
    "joined",
    "declined",
    "cohort",
    "ready",
    "left",
    "keyed",
    "dealt",
    "agreed",
    "received",
    "survivors",
    "commits",
    "aborts",
    "revealed",
)


def round_ref(round_: RoundId) -> rounds_pb2.RoundRef:
    """A round on the wire."""
    return rounds_pb2.RoundRef(run=round_.run, number=round_.number)


def read_round(ref: rounds_pb2.RoundRef) -> RoundId:
    """Raises: MalformedMessageError."""
    return RoundId(parse_run_id(ref.run), int(ref.number))


def read_digest(text: str) -> Digest:
    """Raises: MalformedMessageError."""
    return parse_digest(text)


def read_digest_bytes(data: bytes) -> Digest:
    """A digest that travels as 32 raw bytes.

    Raises:
        MalformedMessageError: not 32 bytes.
    """
    if len(data) != 32:
        raise MalformedMessageError(f"a digest has 32 bytes, got {len(data)}")
    return Digest(data.hex())


def read_bytes(data: bytes, *, what: str, size: int) -> bytes:
    """Raises: MalformedMessageError: another size."""
    if len(data) != size:
        raise MalformedMessageError(f"{what} has {size} bytes, got {len(data)}")
    return data


def read_text(text: str, *, what: str, limit: int = 400) -> str:
    """A short human text; control characters are refused so that it prints as one line.

    Raises:
        MalformedMessageError: too long, or with control characters.
    """
    if len(text) > limit:
        raise MalformedMessageError(f"{what} has {len(text)} characters, at most {limit} are taken")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise MalformedMessageError(f"{what} holds control characters")
    return text


def phase_to_view(phase: Phase) -> rounds_pb2.PhaseView:
    """What everybody may know of a phase."""
    view = rounds_pb2.PhaseView(name=type(phase).__name__)
    for name in _SETS:
        nodes: Iterable[NodeId] = getattr(phase, name, ())
        getattr(view, name).extend(sorted(nodes))
    closes_at: datetime | None = getattr(phase, "closes_at", None)
    if closes_at is not None:
        view.closes_at_ms = to_ms(closes_at)
    view.attempt = getattr(phase, "attempt", 0)
    match phase:
        case Released(opened=Opened(sum=sum_, model_root=model_root)):
            view.sum, view.model_root = sum_, model_root
        case Aborted(code=code, reason=reason) | Burned(code=code, reason=reason):
            view.code, view.reason = code, reason
        case _:
            pass
    return view


def phase_from_view(view: rounds_pb2.PhaseView, terms: Terms) -> Phase:
    """The phase as its receiver understands it; the terms are its own, from the plan it accepted.

    Raises:
        MalformedMessageError: an unknown phase, a name that is none, a time or attempt missing.
    """
    nodes = {name: frozenset(parse_node_id(n) for n in getattr(view, name)) for name in _SETS}

    def timed(cls: type[Any], *names: str) -> Any:
        values: dict[str, Any] = {name: nodes[name] for name in names}
        if cls not in (Open, Training):
            values["attempt"] = _attempt(view)
        return cls(terms=terms, closes_at=from_ms(int(view.closes_at_ms)), **values)

    match view.name:
        case "Open":
            phase = timed(Open, "joined", "declined")
        case "Training":
            phase = timed(Training, "cohort", "ready", "left")
        case "Dealing":
            phase = timed(Dealing, "ready", "keyed", "dealt", "agreed")
        case "Uploading":
            phase = timed(Uploading, "ready", "received")
        case "Committing":
            phase = timed(Committing, "ready", "survivors", "commits", "aborts")
        case "Revealing":
            phase = timed(Revealing, "ready", "survivors", "commits", "revealed")
        case "Released":
            opened = None
            if view.sum or view.model_root:
                opened = Opened(
                    sum=parse_digest(view.sum), model_root=parse_digest(view.model_root)
                )
            phase = Released(attempt=_attempt(view), survivors=nodes["survivors"], opened=opened)
        case "Aborted":
            phase = Aborted(code=view.code, reason=view.reason)
        case "Burned":
            phase = Burned(code=view.code, reason=view.reason)
        case other:
            raise MalformedMessageError(f"unknown phase {other!r:.40}")
    result: Phase = phase
    return result


def _attempt(view: rounds_pb2.PhaseView) -> int:
    if view.attempt < 1:
        raise MalformedMessageError(f"phase {view.name} without an attempt")
    return int(view.attempt)
