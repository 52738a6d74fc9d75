"""Names of things: federations, nodes, runs, rounds, digests.

Every name is parsed once, where it enters the process, and is a value of its own type from then
on. The grammar is narrow on purpose: a name may become a file name, a part of a certificate's URI
or a field of a hashed message, and must mean the same in all three.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

from protocols.decimals import read_decimal
from protocols.errors import MalformedMessageError

FederationId = NewType("FederationId", str)
NodeId = NewType("NodeId", str)  # the institution's id: one node acts for one institution
RunId = NewType("RunId", str)
Digest = NewType("Digest", str)  # 64 lower-case hexadecimal digits: a SHA-256 value

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_ROUND = 10**6


def _name(kind: str, text: object) -> str:
    if not isinstance(text, str) or _NAME.fullmatch(text) is None:
        raise MalformedMessageError(
            f"{kind} must be 1 to 48 lower-case letters, digits or inner hyphens, got {text!r:.80}"
        )
    return text


def parse_federation_id(text: object) -> FederationId:
    """Raises: MalformedMessageError."""
    return FederationId(_name("a federation id", text))


def parse_node_id(text: object) -> NodeId:
    """Raises: MalformedMessageError."""
    return NodeId(_name("a node id", text))


def parse_run_id(text: object) -> RunId:
    """Raises: MalformedMessageError."""
    return RunId(_name("a run id", text))


def parse_digest(text: object) -> Digest:
    """Raises: MalformedMessageError."""
    if not isinstance(text, str) or _DIGEST.fullmatch(text) is None:
        raise MalformedMessageError(
            f"a digest must be 64 lower-case hexadecimal digits, got {text!r:.80}"
        )
    return Digest(text)


@dataclass(frozen=True, slots=True, order=True)
class RoundId:
    """One round of one run; written ``run/number``."""

    run: RunId
    number: int  # from 0

    def __post_init__(self) -> None:
        parse_run_id(self.run)
        if not 0 <= self.number < _MAX_ROUND:
            raise MalformedMessageError(f"a round number must be 0 to {_MAX_ROUND - 1}")

    @classmethod
    def parse(cls, text: str) -> RoundId:
        """Read ``run/number``.

        Raises:
            MalformedMessageError: the text is not of that form.
        """
        run, slash, number = text.partition("/")
        index = read_decimal(number, most=_MAX_ROUND - 1)
        if not slash or index is None:
            raise MalformedMessageError(f"a round is written RUN/NUMBER, got {text!r:.80}")
        return cls(parse_run_id(run), index)

    def __str__(self) -> str:
        return f"{self.run}/{self.number}"
