"""Checkpoints: the text of a signed head of the log (C2SP tlog-checkpoint v1.0.0).

    log.minga.example/rounds/2026                    origin
    600                                              leaves
    QWTwb4kDc5MFWGGjXsHfnnBa6hUJ7OpxtgqmpkwX2Us=     root

Three lines and no more: extension lines are allowed by the format and refused by us, so that
nothing unread is ever signed. For the same reason there is no empty line inside the text; some
readers split a note at the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.errors import MalformedMessageError
from protocols.tlog.note import Note, SignerKey, check_name, sign_note
from protocols.tlog.text import (
    HASH_BYTES,
    MAX_SIZE,
    decode_decimal,
    decode_hash,
    decode_utf8,
    encode_base64,
)

MAX_ORIGIN: Final = 255  # bytes


def _check_origin(origin: str, *, foreign: bool) -> None:
    if not foreign:
        check_name(origin)
        if "://" in origin:
            raise MalformedMessageError(f"an origin has no scheme: {origin!r:.80}")
    if not origin or not origin.isprintable() or len(origin.encode()) > MAX_ORIGIN:
        raise MalformedMessageError(f"not an origin: {origin!r:.80}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The head of a log at one size: a claim, until the signatures over it are verified."""

    origin: str
    size: int  # leaves, 0 to 2**63-1
    root: bytes  # 32 bytes

    def __post_init__(self) -> None:
        _check_origin(self.origin, foreign=True)
        if not 0 <= self.size <= MAX_SIZE or len(self.root) != HASH_BYTES:
            raise MalformedMessageError("a checkpoint has 0 to 2**63-1 leaves and a 32-byte root")

    @classmethod
    def parse(cls, text: str, *, foreign: bool = False) -> Checkpoint:
        """Read the text of a checkpoint, without the signatures; ``to_text`` gives it back.

        Args:
            text: ends in a newline.
            foreign: for a witness of other people's logs, whose origins may have spaces or '+'
                (``go.sum database tree``). Ours are a URL prefix without scheme.

        Raises:
            MalformedMessageError: any other form, an extension line among them.
        """
        decode_utf8(text.encode("utf-8", "surrogatepass"), "the checkpoint")
        lines = text.split("\n")
        if len(lines) != 4 or lines[3]:
            raise MalformedMessageError("a checkpoint is three lines: origin, size, root")
        _check_origin(lines[0], foreign=foreign)
        return cls(
            origin=lines[0],
            size=decode_decimal(lines[1], "the size of the checkpoint"),
            root=decode_hash(lines[2], "the root of the checkpoint"),
        )

    def to_text(self) -> str:
        """The signed text."""
        return f"{self.origin}\n{self.size}\n{encode_base64(self.root)}\n"


def sign_checkpoint(checkpoint: Checkpoint, signer: SignerKey) -> Note:
    """Sign as the log ``checkpoint.origin``.

    Raises:
        MalformedMessageError: the name of the key is not the origin. Foreign tools take the name
            for the origin, and would look for another log.
        ValueError: the key is not of type 0x01.
    """
    if signer.name != checkpoint.origin:
        raise MalformedMessageError(
            f"the log key is named {signer.name!r:.80}, the origin {checkpoint.origin!r:.80}"
        )
    return sign_note(checkpoint.to_text(), signer)
