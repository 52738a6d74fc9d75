"""The small grammar that every file of the log shares: lines, numbers, base64.

Each value has one spelling. Two parsers that read a number or a hash differently could be shown
one file with two meanings, so what is not spelled canonically is refused.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from typing import Final

from protocols.errors import MalformedMessageError

HASH_BYTES: Final = 32
MAX_SIZE: Final = 2**63 - 1  # leaves; tlog-checkpoint v1.0.0
MAX_PROOF: Final = 63  # hashes: the longest proof in a tree of at most 2**63-1 leaves

_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)


def decode_utf8(data: bytes, what: str) -> str:
    """UTF-8 text without control characters other than the newline.

    Raises:
        MalformedMessageError: not UTF-8, or a control character (U+0000 to U+001F, U+007F to
            U+009F; the last range is our rule), among them the carriage return.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedMessageError(f"{what} is not UTF-8") from None
    # isprintable is a quick yes for almost every line; what it refuses is looked at closely.
    for line in text.split("\n"):
        if not line.isprintable() and any(unicodedata.category(char) == "Cc" for char in line):
            raise MalformedMessageError(f"{what} has a control character")
    return text


def decode_base64(text: str, what: str) -> bytes:
    """RFC 4648 section 4: padded, canonical, nothing around it.

    Raises:
        MalformedMessageError: any other spelling.
    """
    data = decode_base64_tail(text, what)
    if encode_base64(data) != text:
        raise MalformedMessageError(f"{what} is not canonical base64")
    return data


def decode_base64_tail(text: str, what: str) -> bytes:
    """As ``decode_base64``, but the unused bits of the last character may be anything.

    Raises:
        MalformedMessageError: any other spelling.
    """
    if len(text) % 4 or _BASE64.fullmatch(text) is None:
        raise MalformedMessageError(f"{what} is not base64")
    return base64.b64decode(text)


def decode_hash(text: str, what: str) -> bytes:
    """The base64 of exactly 32 bytes.

    Raises:
        MalformedMessageError: anything else.
    """
    data = decode_base64(text, what)
    if len(data) != HASH_BYTES:
        raise MalformedMessageError(f"{what} has {len(data)} bytes, want {HASH_BYTES}")
    return data


def encode_base64(data: bytes) -> str:
    """RFC 4648 section 4, padded."""
    return base64.b64encode(data).decode("ascii")


def decode_decimal(text: str, what: str, *, most: int = MAX_SIZE) -> int:
    """ASCII decimal from 0 to ``most``, no sign, no leading zero.

    Raises:
        MalformedMessageError: any other spelling, or a larger number.
    """
    if _DECIMAL.fullmatch(text) is None or int(text) > most:
        raise MalformedMessageError(f"{what} is not a decimal from 0 to {most}: {text!r:.40}")
    return int(text)
