"""How much of the coordinator one caller may use: pure functions, with the clock as an argument.

A bucket holds calls that a caller may still make at once; it fills with time, up to a brim. Each
call takes its price out of it, and a call for which there is not enough waits elsewhere: the answer
is how long. The defaults are far above what an honest node does, also in rounds of a second; they
keep one certificate from using up a coordinator that thirty others share.

A stream of messages may be slow but not endless: beside a patience for every single message stands
a least rate, so that a byte now and then does not hold a place for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Final, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one caller may do; ``connections`` and ``http_connections`` are for all together.

    A caller is whoever the certificate names, however many certificates it has; on the port of
    those who have none yet, it is an address.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # in config.toml every key is one of these

    calls_per_s: float = 100.0  # in the long run
    calls_burst: float = 2000.0  # in one moment
    calls_open: int = 64  # under way at the same time, long polls included
    bulk_open: int = 16  # of those, streams of raw bytes: each holds a few MiB
    joins_per_s: float = 5.0  # of one address, on the enrolment port
    joins_burst: float = 100.0
    message_s: float = 120.0  # patience for one message that a caller sends
    stream_bytes_per_s: float = 4096.0  # least rate of a stream, after that patience
    connections: int = 4096  # open at the same time, on each port
    http_connections: int = 128  # of the static HTTP server
    http_request_s: float = 20.0  # for the head of one request

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name} must be a positive number, got {value}")


# Price of a call where it is not 1: those that hash, write or move much.
PRICES: Final[Mapping[str, float]] = {
    "/minga.v1.Bulk/Append": 20.0,
    "/minga.v1.Bulk/Put": 20.0,
    "/minga.v1.Bulk/Fetch": 20.0,
    "/minga.v1.Bulk/BeginUpload": 5.0,
    "/minga.v1.Bulk/BeginPut": 5.0,
    "/minga.v1.Bulk/FinishUpload": 5.0,
    "/minga.v1.Bulk/DescribeBlob": 2.0,
    "/minga.v1.Admin/PlanRun": 20.0,
    "/minga.v1.Admin/SubmitRun": 20.0,
    "/minga.v1.Log/Submit": 5.0,
    "/minga.v1.Renewal/Renew": 20.0,
    "/minga.v1.Trust/Publish": 20.0,
}
BULK: Final = frozenset(f"/minga.v1.Bulk/{name}" for name in ("Append", "Put", "Fetch"))


class Bucket(NamedTuple):
    """What a caller has left, and when that was true."""

    left: float  # calls
    at: float  # seconds of a clock that only goes forward


class Taken(NamedTuple):
    """The bucket after a call, and how long to wait before it: 0 for a call that is let in."""

    bucket: Bucket
    wait_s: float


def take(before: Bucket | None, *, price: float, per_s: float, burst: float, now: float) -> Taken:
    """Let one call in, or say when it may come.

    Args:
        before: the caller's bucket; None: it has not called for long, the bucket is full.
        price: of this call; one above ``burst`` costs ``burst``, else it could never be made.
        per_s: calls that come back in a second.
        burst: the brim.
        now: seconds, of the clock of ``before``; a clock that went back counts as one that stood.

    Guarantees: over any ``t`` seconds, the prices of the calls let in sum to at most
    ``burst + per_s * t``; a refused call costs nothing; whoever waits ``wait_s`` and has made no
    other call in the meantime is let in.
    """
    price = min(price, burst)
    if before is None:
        before = Bucket(burst, now)
    later = max(now, before.at)
    left = min(burst, before.left + (later - before.at) * per_s)
    if left >= price:
        return Taken(Bucket(left - price, later), 0.0)
    return Taken(Bucket(left, later), (price - left) / per_s)


def is_full(bucket: Bucket, *, per_s: float, burst: float, now: float) -> bool:
    """Whether a bucket says no more than no bucket at all, and can be forgotten."""
    return bucket.left + (now - bucket.at) * per_s >= burst


def too_slow(*, received: int, elapsed_s: float, limits: Limits) -> bool:
    """Whether a stream has brought too little for the time that it has been open.

    Args:
        received: bytes so far.
        elapsed_s: seconds spent waiting for the sender; not those spent on the sender's bytes.
    """
    return received < (elapsed_s - limits.message_s) * limits.stream_bytes_per_s
