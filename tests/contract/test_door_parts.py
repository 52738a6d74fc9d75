"""Several streams bring one upload to a real coordinator, as over a long link."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime
from random import Random

import pytest

from coordinator.ca import certificate_pem, key_pem
from node_agent import uploads
from node_agent.client import Connection
from node_agent.keys import TlsIdentity
from node_agent.uploads import Announcement, upload
from protocols.crypto.identity import Identity
from protocols.errors import UnreachableError
from protocols.tensors.sizes import UNIT
from tests.contract.test_door import MIB, Upload, begin, finish, refused
from tests.support.door import served


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with served(tmp_path_factory.mktemp("federation")) as found:
        yield found


@pytest.fixture(scope="module")
def client(door):
    return door.enrol("a")


runs = (f"run-{number}" for number in itertools.count())


@pytest.fixture
def vector(door):
    return Upload(door, fill=bytes(range(251)), run=next(runs))


def kept(door, vector):
    return (door.config.spool / vector.plan.run_id / "0.1.a.vector").read_bytes()


def append(client, upload_id, offset, end, messages):
    call = client.channel.stream_unary("/minga.v1.Bulk/Append", None, None)
    metadata = [("minga-upload-bin", upload_id), ("minga-offset", str(offset))]
    metadata.append(("minga-end", str(end)))
    return int.from_bytes(call(iter(messages), metadata=metadata, timeout=20), "big")


def test_parts_arrive_in_any_order_and_count_when_the_last_is_there(door, client, vector):
    size = len(vector.data)
    state = begin(client, vector)
    assert state.streams > 1
    assert append(client, state.upload_id, UNIT, size, vector.messages(start=UNIT)) == 0
    with refused("UNAVAILABLE", "not_ready", f"0 of {size} bytes arrived"):
        finish(client, state.upload_id)
    assert append(client, state.upload_id, 0, UNIT, vector.messages(stop=UNIT)) == size
    assert finish(client, state.upload_id) == vector.header().receipt
    assert kept(door, vector) == vector.data


@pytest.mark.parametrize(("nodes", "received", "streams"), [(33, 0, 1), (33, 30, 8), (8, 0, 4)])
def test_how_many_connections_depends_on_whose_updates_are_still_to_come(
    door, client, nodes, received, streams
):
    roster = ["a", *(f"n{number:02}" for number in range(1, nodes))]
    vector = Upload(door, run=next(runs), roster=roster, received=roster[1 : received + 1])
    assert begin(client, vector).streams == streams


FORBIDDEN = [
    (UNIT, UNIT + MIB, MIB, ("INVALID_ARGUMENT", "malformed", "not of whole units")),
    (MIB, UNIT, MIB, ("INVALID_ARGUMENT", "malformed", "not of whole units")),
    (2 * UNIT, 9 * UNIT, MIB, ("INVALID_ARGUMENT", "malformed", "not of whole units")),
    (UNIT, "-1", MIB, ("INVALID_ARGUMENT", "malformed", "must be a decimal number")),
    (UNIT, 2 * UNIT, UNIT + 1, ("INVALID_ARGUMENT", "malformed", "the part up to")),
    (0, UNIT, MIB, ("OUT_OF_RANGE", "wrong_offset", "not at 0")),
]


def test_parts_that_the_specification_forbids(client, vector):
    state = begin(client, vector)
    assert append(client, state.upload_id, 0, UNIT, vector.messages(stop=UNIT)) == UNIT
    for offset, end, sent, row in FORBIDDEN:
        messages = vector.messages(start=offset, stop=offset + sent)
        with refused(*row):
            append(client, state.upload_id, offset, end, messages)
        assert begin(client, vector).durable >= UNIT
    at = begin(client, vector).durable
    client.append(state.upload_id, at, vector.messages(start=at))
    assert finish(client, state.upload_id) == vector.header().receipt


# -- the node's own client -------------------------------------------------------------------------


def connection(door):
    """The node's connection, with a certificate that the coordinator knows."""
    identity = Identity("node", "a")
    credentials = door.issue(identity)
    door.register(credentials, identity)
    now = datetime.now(UTC)
    tls = TlsIdentity(
        key=key_pem(credentials.key), chain=certificate_pem(credentials.certificate),
        root=door.root, not_before=now, not_after=now, serial=0,
    )  # fmt: skip
    return Connection(door.address, tls, rng=Random(0))


@pytest.fixture
def far(monkeypatch):
    """As if the coordinator were far away."""
    monkeypatch.setattr(Connection, "round_trip_s", 0.3)


def announcement(vector):
    request = vector.request()
    return Announcement(
        header=request.header, signature=request.signature,
        unit_hashes=tuple(request.unit_hashes),
    )  # fmt: skip


def play(door, vector, path, progress):
    async def work():
        joined = connection(door)
        try:
            return await upload(joined, path, announcement(vector), progress=progress)
        finally:
            await joined.close()

    return asyncio.run(asyncio.wait_for(work(), 120))


def test_a_node_far_away_sends_several_parts_at_once(
    door, client, vector, far, tmp_path, monkeypatch
):
    path = tmp_path / "vector"
    path.write_bytes(vector.data)
    begun, most, seen = set(), 0, []
    real = uploads._append

    async def counted(*arguments, **named):
        nonlocal most
        begun.add(asyncio.current_task())
        most = max(most, len(begun))
        try:
            return await real(*arguments, **named)
        finally:
            begun.discard(asyncio.current_task())

    monkeypatch.setattr(uploads, "_append", counted)
    receipt = play(door, vector, path, lambda *at: seen.append(at))
    assert receipt == vector.header().receipt
    assert most == 3
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (len(vector.data), len(vector.data))
    assert kept(door, vector) == vector.data
    traffic = door.ledger(lambda tx: tx.traffic(vector.plan.run_id))
    assert [row.up for row in traffic] == [len(vector.data)]


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_next_part_of_a_connection_does_not_wait_for_the_answer_of_the_one_before(
    door, client, vector, far, tmp_path, monkeypatch, ahead
):
    path = tmp_path / "vector"
    path.write_bytes(vector.data)
    events = []  # what happened, on which connection
    real = uploads._append

    async def seen(*arguments, sent, **named):
        channel = id(arguments[1])

        def also():
            events.append(("sent", channel))
            sent()

        events.append(("begun", channel))
        try:
            return await real(*arguments, sent=also, **named)
        finally:
            events.append(("answered", channel))

    monkeypatch.setattr(uploads, "_append", seen)
    monkeypatch.setattr(uploads, "MOST_AHEAD", ahead)  # 1: as an older coordinator grants
    monkeypatch.setattr(uploads, "streams_for", lambda **_: 2)
    monkeypatch.setattr(uploads, "PART_UNITS", 1)
    assert play(door, vector, path, lambda *_: None) == vector.header().receipt
    channels = [[what for what, at in events if at == one] for one in {at for _, at in events}]
    assert sorted(map(len, channels)) == [3, 6]  # three parts over two connections
    one_by_one = ["begun", "sent", "answered"] * 2
    overlapped = ["begun", "sent", "begun", "answered", "sent", "answered"]
    found = max(channels, key=len)
    if ahead == 1:
        assert found == one_by_one
    else:
        assert found != one_by_one
        assert found[:3] == overlapped[:3]
    assert kept(door, vector) == vector.data


def test_what_arrived_before_a_stream_broke_is_not_sent_again(
    door, client, vector, far, tmp_path, monkeypatch
):
    path = tmp_path / "vector"
    path.write_bytes(vector.data)
    sent, broken, others = [], [], asyncio.Event()
    real = uploads._append

    async def breaks(*arguments, **named):
        offset = arguments[4]
        if offset == 0 and not broken:
            await others.wait()
            broken.append(offset)
            raise UnreachableError("cut for the test", retry_after_s=0.0)
        await real(*arguments, **named)
        sent.append(offset)
        if len(sent) == 2:
            others.set()

    monkeypatch.setattr(uploads, "_append", breaks)
    assert play(door, vector, path, lambda *_: None) == vector.header().receipt
    assert broken == [0]
    assert sorted(sent) == [0, UNIT, 2 * UNIT]
    assert kept(door, vector) == vector.data
