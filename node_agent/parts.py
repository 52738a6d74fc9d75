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
PART_UNITS: Final = 4  # units of one part, at least, where a stream waits behind each for an answer
LONG_UNITS: Final = 16  # units of one part, at most: what is sent again when a stream breaks
GROWTH: Final = 1.5  # the link may be so much faster than the last upload was
SPARE: Final = 1.25  # streams more than fill the link: not each is always under way


def streams_for(*, round_trip_s: float, allowed: int, parts: int, rate: float = math.inf) -> int:
    """How many streams fill the link.

    Args:
        round_trip_s: the quickest answer of late; infinite: nothing was answered yet.
        allowed: by the receiver; 0 as from an older one: one.
        parts: that are missing, as short as they may be.
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


def part_units(units: int, streams: int, *, least: int = PART_UNITS) -> int:
    """How long the next part should be: half of a stream's share of what is left.

    So the first parts are long and the last ones short: all streams end at about the same time,
    whichever of them is slow, and few parts have to be asked for (guided self-scheduling;
    Polychronopoulos and Kuck, 1987).

    Args:
        units: that nobody has begun to send.
        streams: that bring them.
        least: units, if there are as many.

    Returns:
        Units, from ``least`` to ``LONG_UNITS``.
    """
    return max(least, min(math.ceil(units / (2 * streams)), LONG_UNITS))


def missing_parts(
    start: int, total: int, arrived: Container[int], streams: int, *, least: int = PART_UNITS
) -> Iterator[tuple[int, int]]:
    """The parts that are still to be sent, in order: first byte, and one past the last.

    Args:
        start: bytes that are durable from the beginning; whole units.
        total: of the file.
        arrived: units beyond ``start`` that are durable as well.
        streams: that bring them.
        least: units of a part, if there are as many in a row.
    """
    units = [unit for unit in range(start // UNIT, -(-total // UNIT)) if unit not in arrived]
    at = 0
    while at < len(units):
        first, stop = at, at + part_units(len(units) - at, streams, least=least)
        while at < min(stop, len(units)) and units[at] - units[first] == at - first:
            at += 1
        yield units[first] * UNIT, min((units[at - 1] + 1) * UNIT, total)
