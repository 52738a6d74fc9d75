"""How an upload is cut into parts that travel at the same time.

A receiver lets ``STREAM_WINDOW`` bytes of a connection be under way, so one is as fast as that
window for each round trip: 20 MB/s at 100 ms. Over a long link several streams, each on a
connection of its own, bring several parts. Over a slow one, what is under way beyond its rate only
fills queues until packets are dropped, so the rate of the last upload counts as well.
Pure functions; protocols/spec/upload.md, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from typing import Final

from protocols.tensors.sizes import STREAM_WINDOW, UNIT

LINK: Final = 125e6  # bytes per second that are worth filling: 1 Gb/s
PART_UNITS: Final = 4  # units of one part, at least where there are as many
LONG_PARTS: Final = 4  # times that, at most: what is sent again when a stream breaks
GROWTH: Final = 1.5  # the link may be so much faster than the last upload was
SPARE: Final = 1.25  # streams more than fill the link: each waits a round trip between two parts


def streams_for(*, round_trip_s: float, allowed: int, parts: int, rate: float = math.inf) -> int:
    """How many streams fill the link.

    Args:
        round_trip_s: the quickest answer of late; infinite: nothing was answered yet.
        allowed: by the receiver; 0 as from an older one: one.
        parts: that are missing.
        rate: of the last upload, bytes per second; infinite: none was measured, and the link is
            taken for one of ``LINK`` bytes per second.

    Returns:
        At least 1, at most ``allowed`` and at most one for each part.
    """
    if not math.isfinite(round_trip_s):
        return 1
    under_way = min(LINK, GROWTH * rate) * max(0.0, round_trip_s)
    wanted = 1 if under_way <= STREAM_WINDOW else math.ceil(SPARE * under_way / STREAM_WINDOW)
    return max(1, min(wanted, allowed, parts))


def part_units(units: int, streams: int) -> int:
    """How long a part should be: a stream waits a round trip and a sync behind each of them.

    Args:
        units: that are missing.
        streams: that will bring them.

    Returns:
        Units: each stream's share at once if that is short, half of it if it is not, so that a
        quick stream can take what a slow one has not begun.
    """
    share = math.ceil(units / streams)
    wanted = share if share <= 2 * PART_UNITS else math.ceil(share / 2)
    return max(PART_UNITS, min(wanted, LONG_PARTS * PART_UNITS))


def missing_parts(
    start: int, total: int, arrived: Container[int], units: int | None = None
) -> Iterator[tuple[int, int]]:
    """The parts that are still to be sent, in order: first byte, and one past the last.

    Args:
        start: bytes that are durable from the beginning; whole units.
        total: of the file.
        arrived: units beyond ``start`` that are durable as well.
        units: of a part, at most; None: ``PART_UNITS``.
    """
    first: int | None = None
    most = PART_UNITS if units is None else units
    for unit in range(start // UNIT, -(-total // UNIT)):
        if first is not None and (unit in arrived or unit - first == most):
            yield first * UNIT, unit * UNIT
            first = None
        if first is None and unit not in arrived:
            first = unit
    if first is not None:
        yield first * UNIT, total
