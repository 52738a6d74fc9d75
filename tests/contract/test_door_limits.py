"""Limits at the real door: who asks too much is told when to come again, and nobody else waits."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest

from coordinator.limits import Limits
from node_agent.client import rebuild_error
from protocols.crypto.identity import Identity
from protocols.errors import RefusedError, TooManyRequestsError
from protocols.gen import rounds_pb2
from tests.contract.test_door import Upload, begin, finish, ping, refused
from tests.support.door import Door, enrol_request

MIB = 2**20
SMALL = Limits(
    calls_per_s=0.5, calls_burst=60, calls_open=3, bulk_open=2, joins_per_s=0.01, joins_burst=3,
    message_s=1.0, stream_bytes_per_s=100_000,
)  # fmt: skip


@contextmanager
def opened(folder, limits):
    door = Door(folder)
    door.config = replace(door.config, limits=limits)
    door.start()
    try:
        yield door
    finally:
        door.stop()


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("small"), SMALL) as found:
        yield found


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The same door with limits that nobody meets, but little patience."""
    limits = replace(Limits(), message_s=1.0, stream_bytes_per_s=100_000.0)
    with opened(tmp_path_factory.mktemp("wide"), limits) as found:
        yield found


names = (f"n{number}" for number in itertools.count())


def flood(client, calls):
    """Statuses and waits of many joins at once over one connection."""
    request = rounds_pb2.JoinRequest(round=rounds_pb2.RoundRef(run="none", number=1))
    futures = [client.rounds.Join.future(request, timeout=60) for _ in range(calls)]
    found = []
    for future in futures:
        error = future.exception()
        trailing = dict(error.trailing_metadata() or ())
        found.append((error.code().name, trailing.get("minga-code"), trailing))
    return found


def test_a_flood_of_joins_is_refused_with_the_time_to_wait(door):
    mallory, honest = door.enrol(next(names)), door.enrol(next(names))
    found = flood(mallory, 120)
    reasons = {(status, code) for status, code, _ in found}
    assert ("RESOURCE_EXHAUSTED", "too_many_requests") in reasons
    assert reasons <= {
        ("RESOURCE_EXHAUSTED", "too_many_requests"),
        ("INVALID_ARGUMENT", "malformed"),
    }
    waits = [float(t["minga-retry-after-s"]) for s, _, t in found if s == "RESOURCE_EXHAUSTED"]
    assert min(waits) > 0
    assert ping(honest).now_ms > 0  # another certificate, nothing used up


def test_one_identity_has_one_share_however_many_certificates(door):
    name = next(names)
    flood(door.enrol(name), 120)
    other = door.issue(Identity("node", name))
    door.register(other, Identity("node", name))
    with refused("RESOURCE_EXHAUSTED", "too_many_requests", "calls a second"):
        for _ in range(100):
            ping(door.connect(other))


def test_calls_under_way_are_limited_and_end(door):
    client = door.enrol(next(names))
    version = ping(client).version
    request = rounds_pb2.SyncRequest(seen=version, wait_ms=20_000)
    polls = [client.rounds.Sync.future(request, timeout=30) for _ in range(SMALL.calls_open)]
    deadline = time.monotonic() + 20
    told = None
    while time.monotonic() < deadline and told is None:
        try:
            ping(client)
            time.sleep(0.05)
        except grpc.RpcError as error:
            told = error
    assert told is not None
    assert "under way" in told.details()
    for poll in polls:
        poll.cancel()
    for _ in range(100):
        try:
            ping(client)
        except grpc.RpcError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the places of calls that were cancelled did not come back")


def test_joins_of_one_address_are_limited(door):
    stub = door.enrolment_stub()
    found = []
    for number in range(6):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Join(enrol_request("a", bytes([number] * 32), door.signing_key("a")), timeout=20)
        found.append(caught.value.code().name)
    assert found == ["PERMISSION_DENIED"] * 3 + ["RESOURCE_EXHAUSTED"] * 3


# -- patience ------------------------------------------------------------------------------------


class Held:
    """Messages that a sender lets go one by one."""

    def __init__(self, messages):
        self._messages = iter(messages)
        self.go_on = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return next(self._messages)
        except StopIteration:
            self.go_on.wait(60)
            raise


def append(client, upload_id, offset, messages):
    call = client.channel.stream_unary("/minga.v1.Bulk/Append", None, None)
    metadata = (("minga-upload-bin", upload_id), ("minga-offset", str(offset)))
    return call(messages, metadata=metadata, timeout=60)


def test_an_upload_that_stops_is_ended_and_goes_on_later(wide):
    upload = Upload(wide)
    client = wide.enrol("a")
    state = begin(client, upload)
    stopping = Held(upload.messages(stop=5 * MIB))
    with refused("UNAVAILABLE", "not_ready", "no whole message"):
        append(client, state.upload_id, 0, stopping)
    stopping.go_on.set()
    again = begin(client, upload)
    assert again.durable == 4 * MIB
    client.append(state.upload_id, again.durable, upload.messages(start=again.durable))
    assert finish(client, state.upload_id) == upload.header().receipt
    assert not wide.parts.spool._open


def test_an_upload_that_drips_is_ended(wide):
    client = wide.enrol("a")
    upload = Upload(wide, coordinates=100_000, run="drip")
    state = begin(client, upload)

    def drip():
        for _ in range(200):
            yield b"\x00"
            time.sleep(0.1)

    with refused("UNAVAILABLE", "not_ready", "bytes a second"):
        append(client, state.upload_id, 0, drip())


def test_a_call_without_its_message_is_ended(wide):
    client = wide.enrol("a")
    silent = Held([])
    call = client.channel.stream_unary("/minga.v1.Rounds/Sync", None, None)
    with refused("UNAVAILABLE", "not_ready", "no whole message"):
        call(silent, timeout=60)
    silent.go_on.set()


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["Rounds/Sync", "Rounds/Join", "Bulk/BeginUpload", "SecureSum/Post", "Renewal/Renew"]
)
def test_a_message_of_any_method_beyond_the_limit_is_refused(wide, method):
    call = wide.enrol("a").channel.unary_unary(f"/minga.v1.{method}", None, None)
    with refused("RESOURCE_EXHAUSTED", None, "larger than max"):
        call(bytes(7 * MIB), timeout=20)


def test_a_message_too_large_is_not_sent_again():
    class Answer:
        def trailing_metadata(self):
            return ()

        def __init__(self, details):
            self.details = lambda: details

        def code(self):
            return grpc.StatusCode.RESOURCE_EXHAUSTED

    too_large = rebuild_error(Answer("SERVER: Received message larger than max (7 vs. 6)"), "c")
    assert type(too_large) is RefusedError
    assert isinstance(rebuild_error(Answer("Concurrent RPC limit"), "c"), TooManyRequestsError)


def test_metadata_beyond_the_limit_is_refused(wide):
    client = wide.enrol("a")
    with pytest.raises(grpc.RpcError) as caught:
        client.rounds.Sync(
            rounds_pb2.SyncRequest(), metadata=(("minga-round", "x" * 65_536),), timeout=20
        )
    assert caught.value.code().name == "RESOURCE_EXHAUSTED"
    assert ping(client).now_ms > 0


def test_nothing_is_unpacked(wide):
    """A few kilobytes of gzip that would be 32 MiB, far beyond the limit of a message:
    the limit is of what is sent, so what is packed is not taken at all."""
    client = wide.enrol("a")
    call = client.channel.unary_unary("/minga.v1.Rounds/Sync", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        call(bytes(32 * MIB), timeout=60, compression=grpc.Compression.Gzip)
    assert caught.value.code().name == "UNIMPLEMENTED", caught.value
    assert "compression" in caught.value.details().lower()
    assert ping(client).now_ms > 0


def test_an_honest_node_meets_no_limit(wide):
    """Many calls one after the other, as fast as they go."""
    client = wide.enrol("a")
    for _ in range(300):
        ping(client)
