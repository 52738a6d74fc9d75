"""Strict reading and writing of values as canonical JSON.

A message class lists its fields once, as ``FIELDS``: name to codec. Writing gives RFC 8785 bytes;
reading demands exactly those keys, each of its type and within its bounds, and raises
MalformedMessageError for everything else. Binary fields are lower-case hexadecimal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from protocols.canonical import canonical_bytes, parse_canonical
from protocols.errors import MalformedMessageError
from protocols.identifiers import (
    Digest,
    FederationId,
    NodeId,
    RoundId,
    parse_digest,
    parse_federation_id,
    parse_node_id,
)

T = TypeVar("T")
R = TypeVar("R", bound="Record")
_HEX = re.compile(r"(?:[0-9a-f]{2})*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How one field is written to and read from JSON."""

    encode: Callable[[T], Any]
    decode: Callable[[Any], T]


class Record(Protocol):
    """A dataclass with a schema name and a codec for each of its fields."""

    SCHEMA: ClassVar[str]
    FIELDS: ClassVar[Mapping[str, Codec[Any]]]


def to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record, its schema name included."""
    found = {name: codec.encode(getattr(record, name)) for name, codec in record.FIELDS.items()}
    return {"schema": record.SCHEMA, **found}


def from_json(cls: type[R], value: Any) -> R:
    """Read a record from a JSON object.

    Raises:
        MalformedMessageError: another schema, missing or further keys, or a field out of bounds.
    """
    if not isinstance(value, dict):
        raise MalformedMessageError(f"{cls.SCHEMA} must be a JSON object")
    if value.get("schema") != cls.SCHEMA:
        raise MalformedMessageError(f"want schema {cls.SCHEMA}, got {value.get('schema')!r:.80}")
    if value.keys() != {"schema", *cls.FIELDS}:
        odd = sorted({"schema", *cls.FIELDS} ^ value.keys())
        raise MalformedMessageError(f"{cls.SCHEMA}: missing or unknown fields {odd!r:.200}")
    read = {}
    for name, codec in cls.FIELDS.items():
        try:
            read[name] = codec.decode(value[name])
        except MalformedMessageError as error:
            raise MalformedMessageError(f"{cls.SCHEMA}, {name}: {error}") from None
    return cls(**read)


def to_bytes(record: Record) -> bytes:
    """Canonical bytes of a record: what is signed, hashed and sent."""
    return canonical_bytes(to_json(record))


def from_bytes(cls: type[R], data: bytes) -> R:
    """Read a record from canonical bytes.

    Raises:
        MalformedMessageError: and nothing else.
    """
    return from_json(cls, parse_canonical(data))


def hex_of(shortest: int, longest: int | None = None) -> Codec[bytes]:
    """Bytes of a length from ``shortest`` to ``longest`` (by default exactly ``shortest``)."""
    limit = shortest if longest is None else longest

    def decode(value: Any) -> bytes:
        if not isinstance(value, str) or not shortest <= len(value) / 2 <= limit:
            raise MalformedMessageError(f"want {shortest} to {limit} bytes in hexadecimal")
        if _HEX.fullmatch(value) is None:
            raise MalformedMessageError("want lower-case hexadecimal")
        return bytes.fromhex(value)

    return Codec(encode=bytes.hex, decode=decode)


def integer(lowest: int, highest: int) -> Codec[int]:
    """An integer within bounds; JSON ``true`` and ``1.0`` are not integers."""

    def decode(value: Any) -> int:
        if type(value) is not int or not lowest <= value <= highest:
            raise MalformedMessageError(f"want an integer from {lowest} to {highest}")
        return value

    return Codec(encode=_same, decode=decode)


def text(pattern: str) -> Codec[str]:
    """A string that matches all of ``pattern``."""
    grammar = re.compile(pattern, re.ASCII)

    def decode(value: Any) -> str:
        if not isinstance(value, str) or grammar.fullmatch(value) is None:
            raise MalformedMessageError(f"want text of the form {pattern}")
        return value

    return Codec(encode=_same, decode=decode)


def list_of(item: Codec[T], *, most: int) -> Codec[tuple[T, ...]]:
    """A tuple of at most ``most`` items."""

    def decode(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise MalformedMessageError(f"want a list of at most {most}")
        return tuple(item.decode(v) for v in value)

    return Codec(encode=lambda values: [item.encode(v) for v in values], decode=decode)


def optional(item: Codec[T]) -> Codec[T | None]:
    """An item or ``null``."""
    return Codec(
        encode=lambda value: None if value is None else item.encode(value),
        decode=lambda value: None if value is None else item.decode(value),
    )


def record_of(cls: type[R]) -> Codec[R]:
    """A record within a record."""
    return Codec(encode=to_json, decode=lambda value: from_json(cls, value))


def _same(value: Any) -> Any:
    return value


def _parse_round(value: Any) -> RoundId:
    if not isinstance(value, str):
        raise MalformedMessageError("a round is written RUN/NUMBER")
    return RoundId.parse(value)


def _parse_boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise MalformedMessageError("want true or false")
    return value


BOOLEAN: Codec[bool] = Codec(encode=_same, decode=_parse_boolean)
NODE: Codec[NodeId] = Codec(encode=_same, decode=parse_node_id)
FEDERATION: Codec[FederationId] = Codec(encode=_same, decode=parse_federation_id)
DIGEST: Codec[Digest] = Codec(encode=_same, decode=parse_digest)
ROUND: Codec[RoundId] = Codec(encode=str, decode=_parse_round)
