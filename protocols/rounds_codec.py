"""Phases as JSON, for the ledger: written from the values, read back strictly.

Times are integers, Unix milliseconds UTC; sets are ascending lists. A document that does not name
exactly the fields of its phase is refused: a ledger of another version must not be half understood.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

from protocols.cohort import Quorum, Terms
from protocols.errors import MalformedMessageError
from protocols.identifiers import parse_digest, parse_node_id
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

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_PHASES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Open,
        Training,
        Dealing,
        Uploading,
        Committing,
        Revealing,
        Released,
        Aborted,
        Burned,
    )
}


def to_ms(at: datetime) -> int:
    """Unix milliseconds of an aware time, rounded down."""
    if at.tzinfo is None:
        raise ValueError("a time without a zone")
    return (at - _EPOCH) // _MILLISECOND


def from_ms(ms: int) -> datetime:
    """An aware UTC time.

    Raises:
        MalformedMessageError: outside the years 1970 to 9999.
    """
    if not 0 <= ms < 253_402_300_800_000:
        raise MalformedMessageError(f"{ms} is not a time in Unix milliseconds")
    return _EPOCH + ms * _MILLISECOND


def _terms_to_json(terms: Terms) -> dict[str, Any]:
    quorum = terms.quorum
    return {
        "roster": list(terms.roster),
        "min_participants": terms.min_participants,
        "quorum": None
        if quorum is None
        else {field.name: getattr(quorum, field.name) for field in fields(quorum)},
        **{
            f"{name}_ms": getattr(terms, name) // _MILLISECOND
            for name in ("train", "deal", "upload", "commit", "reveal")
        },
    }


def _terms_from_json(value: dict[str, Any]) -> Terms:
    quorum = value["quorum"]
    return Terms(
        roster=tuple(parse_node_id(node) for node in value["roster"]),
        min_participants=int(value["min_participants"]),
        quorum=None if quorum is None else Quorum(**quorum),
        **{
            name: timedelta(milliseconds=int(value[f"{name}_ms"]))
            for name in ("train", "deal", "upload", "commit", "reveal")
        },
    )


def phase_to_json(phase: Phase) -> dict[str, Any]:
    """A JSON value with the phase's name under ``phase`` and its fields beside it."""
    out: dict[str, Any] = {"phase": type(phase).__name__}
    for field in fields(phase):
        value = getattr(phase, field.name)
        match value:
            case Terms():
                out[field.name] = _terms_to_json(value)
            case datetime():
                out[field.name] = to_ms(value)
            case frozenset():
                out[field.name] = sorted(value)
            case Opened():
                out[field.name] = {"sum": value.sum, "model_root": value.model_root}
            case _:
                out[field.name] = value
    return out


def phase_from_json(value: Any) -> Phase:
    """Read what ``phase_to_json`` wrote.

    Raises:
        MalformedMessageError: an unknown phase, a missing or surplus field, a wrong type.
    """
    try:
        rest = dict(value)
        cls = _PHASES[rest.pop("phase")]
        names = {field.name for field in fields(cls)}
        if set(rest) != names:
            raise MalformedMessageError(
                f"a stored {cls.__name__} has the fields {sorted(rest)}, not {sorted(names)}"
            )
        return cls(**{name: _read_field(name, item) for name, item in rest.items()})  # type: ignore[no-any-return]
    except MalformedMessageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedMessageError(f"not a stored phase: {error!r:.200}") from None


def _read_field(name: str, item: Any) -> Any:
    match name:
        case "terms":
            return _terms_from_json(item)
        case "closes_at":
            return from_ms(int(item))
        case "opened":
            if item is None:
                return None
            return Opened(
                sum=parse_digest(item["sum"]), model_root=parse_digest(item["model_root"])
            )
        case "attempt":
            if not isinstance(item, int) or item < 1:
                raise MalformedMessageError(f"attempt {item!r:.40} is not a positive integer")
            return item
        case "code" | "reason":
            return str(item)
        case _ if isinstance(item, list):
            return frozenset(parse_node_id(node) for node in item)
        case _:
            raise MalformedMessageError(f"{name} must be a list of nodes")
