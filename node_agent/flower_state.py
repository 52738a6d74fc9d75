"""The bytes of a Flower Context between rounds: ``state/<run>/<round>.flower``. No flwr here.

A Context's state is named records: arrays, metrics or configs. Written by us rather than pickled:
what comes back is data, never code.

    8 bytes   length of the header, little-endian
    header    JSON {"schema":"minga.flower-state/1","records":[...]}: names, kinds, values, sizes
    blobs     the arrays' data one after the other, in header order

Two rounds are kept: a round that is done again starts from the state before it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from node_agent.spool import atomic_write
from protocols.errors import CorruptStateError

_SCHEMA: Final = "minga.flower-state/1"
_FILE: Final = re.compile(r"(\d{6})\.flower", re.ASCII)
_KEPT: Final = 2

Kind = Literal["arrays", "metrics", "config"]


@dataclass(frozen=True, slots=True)
class PlainArray:
    """A Flower ``Array`` by its public attributes."""

    dtype: str
    shape: tuple[int, ...]
    stype: str  # how ``data`` is serialised
    data: bytes


@dataclass(frozen=True, slots=True)
class PlainRecord:
    """One record of a Context's state; the values' types depend on ``kind``."""

    name: str
    kind: Kind
    values: Mapping[str, Any]


def encode(records: Sequence[PlainRecord]) -> bytes:
    """All records as one blob."""
    header, blobs = [], []
    for record in records:
        values: dict[str, Any] = {}
        for key, value in record.values.items():
            if isinstance(value, PlainArray):
                blobs.append(value.data)
                shape = list(value.shape)
                values[key] = [value.dtype, shape, value.stype, len(value.data)]
            else:
                values[key] = _to_json(value)
        header.append([record.name, record.kind, values])
    text = json.dumps({"schema": _SCHEMA, "records": header}).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def decode(data: bytes) -> list[PlainRecord]:
    """The records of a blob.

    Raises:
        CorruptStateError: not a state, or cut short.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + size])
        if value["schema"] != _SCHEMA:
            raise CorruptStateError(f"not a {_SCHEMA}")
        at, records = 8 + size, []
        for name, kind, values in value["records"]:
            plain: dict[str, Any] = {}
            for key, item in values.items():
                if kind == "arrays":
                    dtype, shape, stype, length = item
                    if at + length > len(data):
                        raise CorruptStateError("cut short")
                    blob = data[at : at + length]
                    plain[key] = PlainArray(dtype, tuple(shape), stype, blob)
                    at += length
                else:
                    plain[key] = _from_json(item)
            records.append(PlainRecord(name, kind, plain))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStateError(f"the state of a Flower app cannot be read: {error}") from None
    return records


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["bytes"])
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value


def _rounds(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for path in root.iterdir() if (match := _FILE.fullmatch(path.name)))


def _path(root: Path, number: int) -> Path:
    return root / f"{number:06d}.flower"


def save(root: Path, number: int, records: Sequence[PlainRecord]) -> None:
    """Keep the state after a round; older ones beyond two go."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_write(_path(root, number), encode(records))
    for old in _rounds(root)[:-_KEPT]:
        _path(root, old).unlink()


def load(root: Path, number: int) -> list[PlainRecord]:
    """The state before round ``number``; empty when there is none.

    Raises:
        CorruptStateError: it cannot be read.
    """
    before = [held for held in _rounds(root) if held < number]
    return decode(_path(root, before[-1]).read_bytes()) if before else []
