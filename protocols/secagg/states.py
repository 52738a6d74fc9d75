"""What a node keeps on disk about its current attempt: one value, one record.

    ReadySent -> Dealt -> DealOkSent -> Masking -> Uploaded -> Committed -> Revealed
        |          |          |            |          |
        +----------+----------+------------+----------+--> AbortSent      any of them --> Closed

Each state holds what is needed from then on and nothing else: moving on is what erases secrets.

    state        holds of its own secrets      holds of others
    ReadySent    seed (EK, RK, b, all)         -
    Dealt        seed                          -
    DealOkSent   RK, b, noise seed             two shares of each dealer
    Masking      RK, b, noise seed             two shares of each dealer
    Uploaded     -                             two shares of each dealer
    Committed    -                             two shares of each dealer
    Revealed     -                             -
    AbortSent    -                             -
    Closed       -                             -

RK, b and the seed of the noise are gone as soon as the upload is fixed: from then on the masked
vector can be opened only by the others together, and a copy of this node's disk does not help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from protocols.canonical import parse_canonical
from protocols.errors import MalformedMessageError
from protocols.identifiers import NodeId
from protocols.secagg import codec
from protocols.secagg.checks import Agreed, Started, check_deals, check_start
from protocols.secagg.codec import Codec
from protocols.secagg.context import Attempt
from protocols.secagg.messages import (
    MAX_CHECKPOINT,
    Abort,
    Commit,
    Complaint,
    Deal,
    DealBundle,
    DealOk,
    Ready,
    Reveal,
    Signed,
    Start,
    Survivors,
    Upload,
    signed_codec,
)
from protocols.secagg.packets import HeldShares
from protocols.secagg.threshold import MAX_ROSTER

_BASE: Final[Mapping[str, Codec[Any]]] = {
    "attempt": codec.record_of(Attempt),
    "node": codec.NODE,
}
_SEED: Final = codec.hex_of(32)
_DEALT: Final[Mapping[str, Codec[Any]]] = {
    "start": codec.record_of(Start),
    "deals": codec.list_of(signed_codec(Deal), most=MAX_ROSTER),
    "checkpoint": codec.hex_of(1, MAX_CHECKPOINT),
    "held": codec.list_of(codec.record_of(HeldShares), most=MAX_ROSTER),
}


@dataclass(frozen=True, kw_only=True)
class _State:
    """Common to all states."""

    SCHEMA: ClassVar[str]
    FIELDS: ClassVar[Mapping[str, Codec[Any]]]

    attempt: Attempt
    node: NodeId  # whose state this is

    def to_bytes(self) -> bytes:
        """The record to make durable. HOLDS SECRETS: mode 0600, never logged, never backed up."""
        return codec.to_bytes(self)


@dataclass(frozen=True, kw_only=True)
class ReadySent(_State):
    """READY may be out; nothing has been dealt."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.ready-sent/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        "seed": _SEED,
        "ready": signed_codec(Ready),
    }

    seed: bytes = field(repr=False)
    ready: Signed[Ready]


@dataclass(frozen=True, kw_only=True)
class Dealt(_State):
    """DEAL and packets may be out, for this one START."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.dealt/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        "seed": _SEED,
        "start": codec.record_of(Start),
        "bundle": codec.record_of(DealBundle),
    }

    seed: bytes = field(repr=False)
    start: Start
    bundle: DealBundle

    def started(self) -> Started:
        """U1, checked again."""
        return check_start(self.start, self.attempt)


@dataclass(frozen=True, kw_only=True)
class _WithDeals(_State):
    """States that know the DEALs of U1 and hold shares of them."""

    start: Start
    deals: tuple[Signed[Deal], ...]
    checkpoint: bytes
    held: tuple[HeldShares, ...] = field(repr=False)  # one for each dealer, this node included

    def agreed(self) -> Agreed:
        """The facts of Dealing, checked again."""
        return check_deals(self.deals, check_start(self.start, self.attempt), self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class DealOkSent(_WithDeals):
    """DEAL_OK may be out: this node must not complain any more."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.deal-ok-sent/2"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        **_DEALT,
        "rk_secret": _SEED,
        "self_seed": _SEED,
        "noise_seed": _SEED,
        "deal_ok": signed_codec(DealOk),
    }

    rk_secret: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)
    noise_seed: bytes = field(repr=False)
    deal_ok: Signed[DealOk]


@dataclass(frozen=True, kw_only=True)
class Masking(_WithDeals):
    """GO was valid: masks may be made. Nothing masked has left this machine."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.masking/2"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        **_DEALT,
        "rk_secret": _SEED,
        "self_seed": _SEED,
        "noise_seed": _SEED,
    }

    rk_secret: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)
    noise_seed: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Uploaded(_WithDeals):
    """The masked vector is fixed by its header; any of it may be out."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.uploaded/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        **_DEALT,
        "header": signed_codec(Upload),
    }

    header: Signed[Upload]


@dataclass(frozen=True, kw_only=True)
class Committed(_WithDeals):
    """COMMIT to one list may be out: no other verdict in this round, ever."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.committed/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        **_DEALT,
        "header": signed_codec(Upload),
        "survivors": codec.record_of(Survivors),
        "commit": signed_codec(Commit),
    }

    header: Signed[Upload]
    survivors: Survivors
    commit: Signed[Commit]


@dataclass(frozen=True, kw_only=True)
class Revealed(_State):
    """REVEAL may be out; every share is gone but those in it."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.revealed/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        "header": signed_codec(Upload),
        "commit": signed_codec(Commit),
        "reveal": signed_codec(Reveal),
    }

    header: Signed[Upload]
    commit: Signed[Commit]
    reveal: Signed[Reveal]


@dataclass(frozen=True, kw_only=True)
class AbortSent(_State):
    """ABORT may be out: nothing is revealed in this attempt, ever."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.abort-sent/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        "uploaded": codec.BOOLEAN,
        "abort": signed_codec(Abort),
        "complaint": codec.optional(signed_codec(Complaint)),
    }

    uploaded: bool  # then the next attempt needs an abort certificate
    abort: Signed[Abort]
    complaint: Signed[Complaint] | None = None


@dataclass(frozen=True, kw_only=True)
class Closed(_State):
    """The attempt is over for this node; what stays is what it may not do again."""

    SCHEMA: ClassVar[str] = "minga.secagg.state.closed/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_BASE,
        "uploaded": codec.BOOLEAN,
        "committed": codec.BOOLEAN,
    }

    uploaded: bool
    committed: bool


NodeState = (
    ReadySent | Dealt | DealOkSent | Masking | Uploaded | Committed | Revealed | AbortSent | Closed
)

_BY_SCHEMA: Final[dict[str, type[_State]]] = {
    cls.SCHEMA: cls
    for cls in (
        ReadySent,
        Dealt,
        DealOkSent,
        Masking,
        Uploaded,
        Committed,
        Revealed,
        AbortSent,
        Closed,
    )
}


def state_from_bytes(data: bytes) -> NodeState:
    """Read a record written by ``to_bytes``.

    Raises:
        MalformedMessageError: and nothing else. The caller treats it as an unknown state: the
            attempt is given up, for an upload of it may be out.
    """
    value = parse_canonical(data)
    schema = value.get("schema") if isinstance(value, dict) else None
    cls = _BY_SCHEMA.get(schema) if isinstance(schema, str) else None
    if cls is None:
        raise MalformedMessageError(f"no state of a secure sum has the schema {schema!r:.80}")
    return codec.from_json(cls, value)  # type: ignore[return-value]
