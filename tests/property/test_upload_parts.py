"""An upload in several streams: whatever comes in whatever order, breaks and is taken over, what
the spool calls durable is on the disk and right, and in the end the file is the vector.

The oracle keeps nothing but the vector: the file that a second spool reads back must agree.
"""

from __future__ import annotations

import asyncio
import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import spool as module
from coordinator.spool import (
    AHEAD,
    ALL_STREAMS,
    MAX_STREAMS,
    Arriving,
    Spool,
    streams_allowed,
    too_many,
)
from node_agent import parts
from node_agent.parts import (
    GROWTH,
    LINK,
    LONG_UNITS,
    SPARE,
    missing_parts,
    part_units,
    streams_for,
)
from protocols.errors import DigestMismatchError, MalformedMessageError, OffsetError
from protocols.tensors.sizes import STREAM_WINDOW
from protocols.tlog.merkle import leaf_hash

SMALL = 8  # bytes of a unit, here


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    for place in (module, parts):
        monkeypatch.setattr(place, "UNIT", SMALL)


def announced(path, data):
    units = [data[at : at + SMALL] for at in range(0, len(data), SMALL)]
    return Arriving(path=path, total=len(data), unit_hashes=tuple(map(leaf_hash, units)))


async def stream(data, start, stop, *, step=3, then=None):
    """The messages of a part; ``then``: what it does instead of ending."""
    for at in range(start, stop, step):
        await asyncio.sleep(0)
        yield data[at : min(at + step, stop)]
    if then is not None:
        await then()


def right_prefix(path, data):
    """Whole units from the beginning that are on the disk as they should be."""
    there = path.read_bytes() if path.exists() else b""
    at = 0
    while at < len(data) and there[at : at + SMALL] == data[at : at + SMALL]:
        at += len(data[at : at + SMALL])
    return at


# -- the pure part ---------------------------------------------------------------------------------


@given(
    units=st.integers(0, 60), short=st.integers(1, SMALL), start=st.integers(0, 60),
    arrived=st.sets(st.integers(0, 60)), streams=st.integers(1, 8), least=st.integers(1, 8),
)  # fmt: skip
def test_the_parts_are_what_is_missing(units, short, start, arrived, streams, least):
    total = 0 if units == 0 else (units - 1) * SMALL + short
    start = min(start, units)
    made = list(missing_parts(start * SMALL, total, arrived, streams, least=least))

    covered = [byte for first, end in made for byte in range(first, end)]
    assert covered == [
        byte
        for unit in range(start, units)
        if unit not in arrived
        for byte in range(unit * SMALL, min((unit + 1) * SMALL, total))
    ]
    lengths = [-(-(end - first) // SMALL) for first, end in made]
    assert all(first % SMALL == 0 for first, _ in made)
    assert all(0 < length <= LONG_UNITS for length in lengths)
    if not arrived:  # nothing but the last part is shorter than asked for, and none grows
        assert all(length >= least for length in lengths[:-1])
        assert lengths == sorted(lengths, reverse=True)


@given(units=st.integers(1, 50_000), streams=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_all_streams_end_at_about_the_same_time(units, streams, seed):
    """Each takes the next part when it is free; their speeds differ up to three times."""
    rng = Random(seed)
    speeds = [rng.uniform(1, 3) for _ in range(streams)]
    free = [0.0] * streams
    left, parts = units, 0
    while left:
        stream = free.index(min(free))
        length = min(part_units(left, streams, least=1), left)
        free[stream] += length / speeds[stream]
        left, parts = left - length, parts + 1
    busy = [at for at in free if at]
    assert max(free) - min(busy) <= LONG_UNITS
    if units > 2 * LONG_UNITS * streams:  # what is lost at the end is a small share of the whole
        assert max(free) <= 1.1 * units / sum(speeds) + 1
    assert parts <= units / LONG_UNITS + 8 * streams + 2


@pytest.mark.parametrize(("left", "long"), [(3, 1), (32, 2), (64, 4), (128, 8), (9999, 16)])
def test_the_next_part_of_eight_streams(left, long):
    assert part_units(left, 8, least=1) == long
    assert part_units(left, 8) == max(4, long)


@given(
    round_trip_s=st.floats(0, 100) | st.just(math.inf), allowed=st.integers(0, 40),
    parts=st.integers(0, 40), rate=st.floats(1, 1e10) | st.just(math.inf),
)  # fmt: skip
def test_no_more_streams_than_are_allowed_and_no_more_than_fill_the_link(
    round_trip_s, allowed, parts, rate
):
    streams = streams_for(round_trip_s=round_trip_s, allowed=allowed, parts=parts, rate=rate)
    link = min(LINK, GROWTH * rate)
    assert streams >= 1
    if streams > 1:
        assert streams <= min(allowed, parts)
        assert (streams - 1) * STREAM_WINDOW < SPARE * link * round_trip_s
    elif allowed > 1 < parts and math.isfinite(round_trip_s):
        assert link * round_trip_s <= STREAM_WINDOW


@pytest.mark.parametrize(
    ("rate", "streams"), [(math.inf, 8), (80e6, 8), (30e6, 3), (11e6, 1), (1.0, 1)]
)
def test_a_slow_link_is_not_flooded_twice(rate, streams):
    """At 100 ms. Of the first upload nothing is known; the next ones go by what it reached."""
    assert streams_for(round_trip_s=0.1, allowed=8, parts=32, rate=rate) == streams


@given(st.lists(st.integers(0, 100), min_size=1, max_size=64))
def test_all_uploads_together_have_few_streams_unless_they_have_one_each(counts):
    for others in counts:
        allowed = streams_allowed(others)
        assert 1 <= allowed <= MAX_STREAMS
        assert allowed == 1 or allowed * (others + 1) <= ALL_STREAMS


@given(
    begun=st.lists(st.sampled_from("abcdef"), max_size=20),
    source=st.sampled_from("abcdefg"), allowed=st.integers(1, 8),
)  # fmt: skip
def test_the_oldest_end_until_a_connection_has_few_parts_and_an_upload_few_connections(
    begun, source, allowed
):
    parts = dict(enumerate(begun))
    ended = too_many(parts, source, allowed)
    left = [stream for part, stream in parts.items() if part not in ended]

    assert left.count(source) == min(begun.count(source), AHEAD - 1)
    others = list(dict.fromkeys(stream for stream in begun if stream != source))
    assert set(left) - {source} == set(others[max(0, len(others) - (allowed - 1)) :])
    for stream in others:  # a connection is given up as a whole or not at all
        assert left.count(stream) in {0, begun.count(stream)}
    mine = [part for part, stream in parts.items() if stream == source]
    assert [part for part in mine if part in ended] == mine[: len(mine) - left.count(source)]


# -- the spool -------------------------------------------------------------------------------------

ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("part"), st.integers(0, 6), st.integers(1, 4), st.booleans()),
        st.tuples(st.just("alone"), st.integers(0, 6), st.just(0), st.booleans()),
        st.tuples(st.just("restart"), st.just(0), st.just(0), st.just(False)),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(acts=ACTS, length=st.integers(1, 6 * SMALL), seed=st.integers(0, 2**32 - 1))
def test_whatever_comes_what_is_called_durable_is_right(tmp_path_factory, acts, length, seed):
    folder = tmp_path_factory.mktemp("spool")
    rng = Random(seed)
    data = rng.randbytes(length)
    arriving = announced(folder / "vector", data)
    units = len(arriving.unit_hashes)

    async def play():
        spool = Spool(folder, min_free_bytes=0)
        running, best = [], 0

        async def bring(start, stop, *, end, bad):
            sent = bytearray(data)
            if bad:
                sent[rng.randrange(start, stop)] ^= 1
            try:
                await spool.receive(
                    arriving,
                    start,
                    stream(bytes(sent), start, stop, step=rng.randint(1, 9)),
                    end=end,
                )
            except DigestMismatchError:
                assert bad
            except (OffsetError, asyncio.CancelledError):
                pass

        for what, first, count, bad in acts:
            if what == "restart":
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                spool = Spool(folder, min_free_bytes=0)
            elif first < units:
                start = first * SMALL if what == "part" else await spool.durable(arriving)
                stop = min(start + count * SMALL, length) if what == "part" else length
                if start < stop:
                    end = stop if what == "part" else None
                    running.append(asyncio.ensure_future(bring(start, stop, end=end, bad=bad)))
            for _ in range(rng.randrange(30)):
                await asyncio.sleep(0)
            durable = await spool.durable(arriving)
            assert best <= durable <= right_prefix(arriving.path, data)
            best = durable
        await asyncio.gather(*running, return_exceptions=True)

        # In the end what is missing is sent, by whom it may.
        while (at := await spool.durable(arriving)) < length:
            stop = min(at + SMALL, length)
            await spool.receive(arriving, at, stream(data, at, stop), end=stop)
        assert arriving.path.read_bytes()[:length] == data
        assert await Spool(folder, min_free_bytes=0).durable(arriving) == length
        assert not spool._open

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_part_that_is_taken_over_writes_no_more(tmp_path):
    """The older stream is in the middle of a write when a newer one takes its place."""
    data = bytes(range(4 * SMALL))
    arriving = announced(tmp_path / "vector", data)

    async def play():
        spool = Spool(tmp_path, min_free_bytes=0)
        never = asyncio.Event()
        wrong = asyncio.ensure_future(
            spool.receive(
                arriving, 0, stream(bytes(4), 0, 4, step=4, then=never.wait), end=2 * SMALL
            )
        )
        beside = asyncio.ensure_future(
            spool.receive(arriving, 2 * SMALL, stream(data, 2 * SMALL, 4 * SMALL), end=4 * SMALL)
        )
        await beside
        assert await spool.durable(arriving) == 0  # the beginning is not there yet
        assert await spool.receive(arriving, 0, stream(data, 0, 2 * SMALL), end=2 * SMALL) == len(
            data
        )
        await asyncio.wait([wrong], timeout=10)
        assert wrong.cancelled()
        assert arriving.path.read_bytes() == data

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize(
    ("start", "end", "sent", "error", "says"),
    [
        (SMALL, 3 * SMALL - 1, 1, MalformedMessageError, "not of whole units"),
        (1, 2 * SMALL, 1, MalformedMessageError, "not of whole units"),
        (2 * SMALL, 2 * SMALL, 1, MalformedMessageError, "not of whole units"),
        (2 * SMALL, 5 * SMALL, 1, MalformedMessageError, "not of whole units"),
        (0, SMALL, 1, OffsetError, f"goes on at byte {SMALL}, not at 0"),
        (SMALL, 2 * SMALL, SMALL + 1, MalformedMessageError, "the part up to 16 has"),
    ],
)
def test_a_part_that_is_refused(tmp_path, start, end, sent, error, says):
    data = bytes(range(4 * SMALL))
    arriving = announced(tmp_path / "vector", data)

    async def play():
        spool = Spool(tmp_path, min_free_bytes=0)
        await spool.receive(arriving, 0, stream(data, 0, SMALL), end=SMALL)
        with pytest.raises(error, match=says):
            await spool.receive(
                arriving, start, stream(data, start, start + sent, step=32), end=end
            )
        assert await spool.durable(arriving) >= SMALL
        assert right_prefix(arriving.path, data) >= SMALL

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_unit_that_is_written_again_counts_only_when_it_is_right_again(tmp_path):
    data = bytes(range(4 * SMALL))
    arriving = announced(tmp_path / "vector", data)

    async def play():
        spool = Spool(tmp_path, min_free_bytes=0)
        third = 2 * SMALL, 3 * SMALL
        await spool.receive(arriving, third[0], stream(data, *third), end=third[1])
        with pytest.raises(DigestMismatchError):
            await spool.receive(arriving, third[0], stream(bytes(99), *third), end=third[1])
        assert await spool.receive(arriving, 0, stream(data, 0, third[0]), end=third[0]) == third[0]

    asyncio.run(asyncio.wait_for(play(), 60))


def test_units_behind_a_gap_outlast_a_restart(tmp_path):
    data = bytes(range(4 * SMALL))
    arriving = announced(tmp_path / "vector", data)

    async def play():
        before = Spool(tmp_path, min_free_bytes=0)
        await before.receive(arriving, 2 * SMALL, stream(data, 2 * SMALL, 4 * SMALL), end=4 * SMALL)
        after = Spool(tmp_path, min_free_bytes=0)
        assert await after.durable(arriving) == 0
        await after.receive(arriving, 0, stream(data, 0, 2 * SMALL), end=2 * SMALL)
        assert await after.durable(arriving) == len(data)

    asyncio.run(asyncio.wait_for(play(), 60))


@given(st.integers(1, 64), st.integers(0, 3))
def test_who_is_asked_at_once_is_not_told_that_it_is_alone(tmp_path_factory, nodes, unused):
    """Nobody has begun yet when all announce, so what is open says nothing."""
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder, min_free_bytes=0)
    granted = [
        spool.allow_streams(announced(folder / f"{number}", b"1"), expected=nodes - 1 + unused)
        for number in range(nodes)
    ]
    assert sum(granted) <= max(ALL_STREAMS, nodes)


@pytest.mark.parametrize(
    ("source", "granted"), [("each its own {}".format, 2), ("the same".format, 8)]
)
def test_of_more_streams_or_parts_than_were_allowed_the_oldest_ends(tmp_path, source, granted):
    data = bytes(range(4 * SMALL))
    arriving = announced(tmp_path / "vector", data)

    async def play():
        spool = Spool(tmp_path, min_free_bytes=0)
        never = asyncio.Event()
        assert spool.allow_streams(arriving, expected=ALL_STREAMS // granted - 1) == granted

        def bring(unit):
            at = unit * SMALL
            return asyncio.ensure_future(
                spool.receive(
                    arriving, at, stream(data, at, at + 4, step=4, then=never.wait),
                    end=at + SMALL, source=source(unit),
                )
            )  # fmt: skip

        tasks = []
        for unit in range(4):
            tasks.append(bring(unit))
            wanted = [n < unit - 1 for n in range(unit + 1)]
            for _ in range(3000):  # until it has begun, and who is too many has ended
                await asyncio.sleep(0.002)
                begun = len(spool._open[arriving.path].streams) == min(unit + 1, 2)
                if begun and [task.done() for task in tasks] == wanted:
                    break
            else:
                raise AssertionError([task.done() for task in tasks])
        assert all(task.cancelled() for task in tasks[:2])
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=10)

    asyncio.run(asyncio.wait_for(play(), 60))
