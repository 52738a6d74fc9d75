"""One byte string for one value: canonical JSON (RFC 8785) and framed hashes.

Everything that is hashed or signed goes through here. JSON documents are written as RFC 8785
(JCS) and read strictly: bytes that do not re-serialise to themselves are refused, so two parties
never see two meanings in one digest. Binary fields are hashed under a context string, each field
behind its length, so that no two different lists of fields share a hash.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any, Final

import rfc8785

from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest

MAX_DOCUMENT = 4 * 2**20  # bytes: what one control message may carry
_MAX_DEPTH = 64
_PLAIN_ENCODER: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def canonical_bytes(value: object) -> bytes:
    """RFC 8785 bytes of a JSON value.

    Raises:
        MalformedMessageError: NaN, infinity, integers beyond 2**53-1, or not a JSON value.
    """
    try:
        if _is_plain(value):  # the standard library writes the same bytes, ten times as fast
            return _PLAIN_ENCODER.encode(value).encode("utf-8")
        return rfc8785.dumps(value)  # type: ignore[arg-type]
    except (rfc8785.CanonicalizationError, RecursionError, UnicodeError) as error:
        raise MalformedMessageError(f"not a canonical JSON value: {error}") from None


def _is_plain(value: Any) -> bool:
    """Whether RFC 8785 and ``json.dumps`` agree: no floats, small integers, ASCII keys.

    Number formatting and the UTF-16 order of keys are where they differ; strings are escaped
    alike. Exact types only: a subclass could print itself otherwise.
    """
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return True
    if kind is int:
        return bool(-(2**53) < value < 2**53)
    if kind is list:
        return all(map(_is_plain, value))
    if kind is dict:
        return all(
            type(key) is str and key.isascii() and _is_plain(inner) for key, inner in value.items()
        )
    return False


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedMessageError("a key stands twice in a JSON object")
    return found


def _no_constant(text: str) -> Any:
    raise MalformedMessageError(f"{text} is not JSON")


def parse_json(data: bytes, *, limit: int = MAX_DOCUMENT) -> Any:
    """Read JSON from outside: bounded, without duplicate keys, NaN or infinity.

    Raises:
        MalformedMessageError: with the reason.
    """
    if len(data) > limit:
        raise MalformedMessageError(f"a document of {len(data)} bytes; at most {limit} are read")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except MalformedMessageError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"not JSON: {error!s:.200}") from None


class _NotPlainError(ValueError):
    """The document has what ``json`` and RFC 8785 may write differently, or a key twice."""


def _plain_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) or not all(map(str.isascii, found)):
        raise _NotPlainError
    return found


def _plain_int(text: str) -> int:
    if len(text) > 15:  # up to 15 digits are surely below 2**53
        raise _NotPlainError
    return int(text)


def _not_plain(_: str) -> Any:
    raise _NotPlainError


# Reads what ``_is_plain`` would accept and nothing else, in one pass.
_PLAIN_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_plain_pairs,
    parse_int=_plain_int,
    parse_float=_not_plain,
    parse_constant=_not_plain,
)


def parse_canonical(data: bytes, *, limit: int = MAX_DOCUMENT) -> Any:
    """Read a canonical JSON document; bytes that are not their own canonical form are refused.

    Nearly every document is plain and read in one pass; for any other, and for the reason of a
    refusal, it is read again slowly.

    Raises:
        MalformedMessageError: not JSON, too large, or not canonical.
    """
    if len(data) <= limit:
        with suppress(ValueError, RecursionError):
            value = _PLAIN_DECODER.decode(data.decode("utf-8"))
            if _PLAIN_ENCODER.encode(value).encode("utf-8") == data:
                return value
    value = parse_json(data, limit=limit)
    if canonical_bytes(value) != data:
        raise MalformedMessageError("the document is not in canonical form (RFC 8785)")
    return value


def hash_fields(context: str, *fields: bytes) -> bytes:
    """SHA-256 over a context string and fields, each behind its length.

    ``SHA-256(u32be len(context) || context || (u64be len(f) || f) for each f)``: the framing is
    injective, so a hash names one list of fields under one context.

    Args:
        context: ASCII, e.g. ``minga/manifest/v1``; one for each kind of thing.
        fields: raw bytes.

    Returns:
        32 bytes.
    """
    name = context.encode("ascii")
    digest = hashlib.sha256(len(name).to_bytes(4, "big") + name)
    for field in fields:
        digest.update(len(field).to_bytes(8, "big"))
        digest.update(field)
    return digest.digest()


def hash_hex(context: str, *fields: bytes) -> Digest:
    """``hash_fields`` as a digest."""
    return Digest(hash_fields(context, *fields).hex())


def sha256_hex(data: bytes) -> Digest:
    """Plain SHA-256, as `sha256sum` prints it."""
    return Digest(hashlib.sha256(data).hexdigest())
