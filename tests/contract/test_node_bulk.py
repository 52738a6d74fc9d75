"""Bulk transfers of a node: resumed where they stopped, checked unit by unit, the same bytes.

Faults are injected into a server on real mutual TLS; each test shows that its fault struck. The
last part runs the same client against the coordinator's own service.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent import bulk
from node_agent.bulk import fetch, fetch_bytes
from node_agent.client import Backoff, Connection, retrying
from node_agent.uploads import Announcement, upload
from protocols.errors import (
    ConflictingUploadError,
    CorruptStateError,
    DigestMismatchError,
    NotFoundError,
    NotReadyError,
    OffsetError,
    RefusedError,
    UnreachableError,
    WrongPhaseError,
)
from protocols.gen import log_pb2
from protocols.identifiers import Digest, FederationId
from protocols.tensors.sizes import UNIT
from protocols.tensors.units import unit_hashes
from protocols.upload import UploadHeader, sign_header
from tests.support.node import ME, RUN, Authority, digest, rng
from tests.support.node_server import bulk_server, server_credentials

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIZE = 3 * UNIT + 12_345
DATA = np.random.default_rng(1).bytes(SIZE)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waiting is not what is tested."""
    monkeypatch.setattr(bulk, "Backoff", lambda: Backoff(first_s=0.001, cap_s=0.002))


def announce(data, **changes):
    values = {
        "federation": FederationId("demo"),
        "run": RUN,
        "round": 0,
        "attempt": 1,
        "node": ME,
        "plan": digest("plan"),
        "model": digest("model"),
        "coordinates": 1000,
        "ring": 20,
        "size": len(data),
        "root": Digest("0" * 64),
    }
    header = UploadHeader(**values | changes)
    hashes = unit_hashes(data)
    header = replace(header, root=bulk.digest_of_units(hashes))
    signed = Announcement(
        header=header.to_bytes(), signature=sign_header(KEY, header), unit_hashes=hashes
    )
    return header, signed


def run(work):
    """A test's coroutine on a loop of its own."""
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture
def vector(tmp_path):
    path = tmp_path / "vector.bin"
    path.write_bytes(DATA)
    return path


# -- up --------------------------------------------------------------------------------------------


def test_an_upload_brings_the_bytes_and_the_receipt(tmp_path, vector):
    header, signed = announce(DATA)
    seen = []

    async def work():
        async with bulk_server(tmp_path) as served:
            receipt = await upload(
                served.connection, vector, signed, progress=lambda *at: seen.append(at)
            )
            return receipt, served.server

    receipt, server = run(work())
    assert receipt == header.receipt
    assert server.kept[header.upload_id] == DATA
    assert server.received == SIZE
    assert seen[-1] == (SIZE, SIZE)


def test_the_rate_of_an_upload_is_remembered_for_the_next(tmp_path, vector):
    """It says how many streams the link can use; of a small upload it would say little."""
    _, signed = announce(DATA)
    small = tmp_path / "small.bin"
    small.write_bytes(DATA[:1000])
    _, signed_small = announce(DATA[:1000], attempt=2)

    async def work():
        async with bulk_server(tmp_path) as served:
            rates = [served.connection.upload_rate]
            for path, said in ((small, signed_small), (vector, signed)):
                begun = time.monotonic()
                await upload(served.connection, path, said)
                rates.append(served.connection.upload_rate)
            return rates, SIZE / (time.monotonic() - begun)

    rates, at_least = run(work())
    assert rates[:2] == [math.inf, math.inf]
    assert at_least <= rates[2] < math.inf


@pytest.mark.parametrize(
    ("cuts", "most"),
    [
        ([1], SIZE + UNIT),  # before a unit was whole
        ([UNIT], SIZE + UNIT),  # right after one
        ([UNIT + 1], SIZE + UNIT),
        ([SIZE], SIZE),  # everything arrived, the answer did not
        ([1, UNIT, 2 * UNIT], SIZE + 2 * UNIT),
    ],
)
def test_an_upload_resumes_at_the_durable_offset(tmp_path, vector, cuts, most):
    header, signed = announce(DATA)

    async def work():
        async with bulk_server(tmp_path) as served:
            served.server.faults.cut_up_after = list(cuts)
            return await upload(served.connection, vector, signed), served.server

    receipt, server = run(work())
    assert server.faults.fired == len(cuts)
    assert receipt == header.receipt
    assert server.kept[header.upload_id] == DATA
    assert server.received <= most  # what was durable is not sent twice


@pytest.mark.parametrize("method", ["BeginUpload", "Append", "FinishUpload"])
def test_a_lost_answer_is_not_a_second_upload(tmp_path, vector, method):
    header, signed = announce(DATA)

    async def work():
        async with bulk_server(tmp_path) as served:
            served.server.faults.lose = [method]
            receipts = [await upload(served.connection, vector, signed) for _ in range(2)]
            return receipts, served.server

    receipts, server = run(work())
    assert server.faults.fired == 1
    assert receipts == [header.receipt] * 2
    assert server.received == SIZE
    assert len(server.kept) == 1


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("BeginUpload", ConflictingUploadError("another header")),
        ("Append", WrongPhaseError("too late")),
        ("FinishUpload", WrongPhaseError("too late")),
    ],
)
def test_a_refusal_is_not_retried(tmp_path, vector, method, error):
    _, signed = announce(DATA)

    async def work():
        async with bulk_server(tmp_path) as served:
            served.server.faults.refuse = [(method, error), (method, error)]
            with pytest.raises(type(error)) as caught:
                await upload(served.connection, vector, signed)
            return caught.value, served.server

    caught, server = run(work())
    assert (caught.code, str(caught)) == (error.code, str(error))
    # A stream that is refused while it is written loses the reason: an empty one asks for it.
    assert server.faults.fired in ({1, 2} if method == "Append" else {1})
    assert server.received == 0 or method == "FinishUpload"


def test_a_server_that_forgot_its_offset_is_asked_again(tmp_path, vector):
    header, signed = announce(DATA)

    async def work():
        async with bulk_server(tmp_path) as served:
            served.server.faults.refuse = [("Append", OffsetError("elsewhere", expected=5))]
            return await upload(served.connection, vector, signed), served.server

    receipt, server = run(work())
    assert server.faults.fired == 1
    assert receipt == header.receipt


def test_a_stalled_upload_is_given_up_and_resumed(tmp_path, vector):
    header, signed = announce(DATA)

    async def work():
        async with bulk_server(tmp_path) as served:
            served.server.faults.stall_up = 1
            receipt = await upload(served.connection, vector, signed, stall_s=0.5)
            return receipt, served.server

    receipt, server = run(work())
    assert server.faults.fired == 1
    assert receipt == header.receipt


def test_patience_ends_without_progress_and_not_with_it(tmp_path, vector):
    _, signed = announce(DATA)

    async def work(cuts):
        async with bulk_server(tmp_path) as served:
            served.server.faults.cut_up_after = cuts
            return await upload(served.connection, vector, signed), served.server.faults.fired

    with pytest.raises(NotReadyError):
        run(work([1] * bulk.ATTEMPTS))
    # As many failures, but units arrive between them.
    _, fired = run(work([1] * (bulk.ATTEMPTS - 2) + [UNIT] + [1] * (bulk.ATTEMPTS - 2)))
    assert fired == 2 * bulk.ATTEMPTS - 3


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_spooled_vector_that_is_not_whole_is_not_sent(tmp_path, vector, damage):
    _, signed = announce(DATA)
    if damage == "gone":
        vector.unlink()
    else:
        os.truncate(vector, UNIT)

    async def work():
        async with bulk_server(tmp_path) as served:
            with pytest.raises(CorruptStateError):
                await upload(served.connection, vector, signed)
            return served.server.received

    assert run(work()) == 0


# -- down ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, UNIT - 1, UNIT, UNIT + 1, SIZE])
def test_a_blob_comes_whole(tmp_path, size):
    async def work():
        async with bulk_server(tmp_path) as served:
            name = served.server.put(DATA[:size])
            got = await fetch(served.connection, name, tmp_path / "blob", size=size)
            return got, await fetch_bytes(served.connection, name, limit=SIZE)

    got, small = run(work())
    assert got == size
    assert (tmp_path / "blob").read_bytes() == DATA[:size] == small
    assert not (tmp_path / ".blob.part").exists()


@pytest.mark.parametrize("cuts", [[1], [UNIT], [UNIT + 1], [SIZE], [1, UNIT, 2 * UNIT]])
def test_a_download_resumes_after_the_last_good_unit(tmp_path, cuts):
    async def work():
        async with bulk_server(tmp_path) as served:
            name = served.server.put(DATA)
            served.server.faults.cut_down_after = list(cuts)
            await fetch(served.connection, name, tmp_path / "blob")
            return served.server

    server = run(work())
    assert (tmp_path / "blob").read_bytes() == DATA
    assert server.faults.fired == len(cuts)
    assert server.sent <= SIZE + len(cuts) * (UNIT + 2**20)


def test_a_download_goes_on_after_a_crash(tmp_path):
    """Two units are there, the second one torn, and a tail of garbage."""
    part = tmp_path / ".blob.part"
    part.write_bytes(DATA[:UNIT] + DATA[UNIT : 2 * UNIT - 1] + b"?" + b"garbage")

    async def work():
        async with bulk_server(tmp_path) as served:
            name = served.server.put(DATA)
            await fetch(served.connection, name, tmp_path / "blob")
            return served.server.sent

    assert run(work()) == SIZE - UNIT
    assert (tmp_path / "blob").read_bytes() == DATA


def test_a_complete_part_needs_no_byte(tmp_path):
    (tmp_path / ".blob.part").write_bytes(DATA + b"more")

    async def work():
        async with bulk_server(tmp_path) as served:
            name = served.server.put(DATA)
            await fetch(served.connection, name, tmp_path / "blob")
            return served.server.sent

    assert run(work()) == 0
    assert (tmp_path / "blob").read_bytes() == DATA


@pytest.mark.parametrize("at", [0, UNIT, SIZE - 1])
def test_a_wrong_unit_is_never_kept(tmp_path, at):
    async def work():
        async with bulk_server(tmp_path) as served:
            name = served.server.put(DATA)
            served.server.faults.flip_at = at
            with pytest.raises(DigestMismatchError, match=f"unit {at // UNIT}"):
                await fetch(served.connection, name, tmp_path / "blob")
            kept = (tmp_path / ".blob.part").read_bytes()
            await fetch(served.connection, name, tmp_path / "blob")  # the next try is honest
            return kept, served.server

    kept, server = run(work())
    assert server.faults.fired == 1
    assert kept == DATA[: len(kept)]
    assert (tmp_path / "blob").read_bytes() == DATA


def test_unit_hashes_of_another_blob_are_refused(tmp_path):
    async def work():
        async with bulk_server(tmp_path) as served:
            name = served.server.put(DATA)
            served.server.hashes[name] = unit_hashes(DATA[::-1])
            with pytest.raises(DigestMismatchError):
                await fetch(served.connection, name, tmp_path / "blob")
            return served.server.sent

    assert run(work()) == 0


def test_a_size_that_is_not_expected_is_refused_before_a_byte(tmp_path):
    async def work():
        async with bulk_server(tmp_path) as served:
            name = served.server.put(DATA)
            with pytest.raises(DigestMismatchError, match="it must have 8"):
                await fetch(served.connection, name, tmp_path / "blob", size=8)
            with pytest.raises(DigestMismatchError, match="at most 10"):
                await fetch_bytes(served.connection, name, limit=10)
            with pytest.raises(NotFoundError):
                await fetch(served.connection, digest("none"), tmp_path / "blob")
            return served.server.sent

    assert run(work()) == 0
    assert not (tmp_path / "blob").exists()


# -- the connection --------------------------------------------------------------------------------


def test_only_later_is_retried():
    calls, slept = [], []

    async def once(errors):
        calls.append(1)
        if errors:
            raise errors.pop(0)
        return "done"

    async def sleep(seconds):
        slept.append(seconds)

    async def work(errors):
        return await retrying(
            lambda: once(errors), rng=rng(), backoff=Backoff(), attempts=4, sleep=sleep
        )

    later = [UnreachableError("no", retry_after_s=7.0), NotReadyError("no", retry_after_s=0.0)]
    assert run(work(list(later))) == "done"
    assert len(calls) == 3
    assert slept[0] == 7.0  # as long as the other side asked for
    assert 0.25 <= slept[1] <= 0.5
    calls.clear()
    with pytest.raises(RefusedError):
        run(work([RefusedError("no"), NotReadyError("no")]))
    assert len(calls) == 1
    with pytest.raises(NotReadyError):
        run(work([NotReadyError("no", retry_after_s=0.0)] * 9))
    assert len(calls) == 5


def test_backoff_grows_to_its_cap_and_jitters():
    backoff, dice = Backoff(first_s=1.0, cap_s=8.0), rng()
    delays = [backoff.delay(attempt, dice) for attempt in range(40)]

    assert all(0.5 * min(8.0, 2.0**n) <= d <= min(8.0, 2.0**n) for n, d in enumerate(delays))
    assert len(set(delays)) > 30


def test_a_member_cannot_stand_in_for_the_coordinator(tmp_path):
    """The certificate is of the right authority, but it is a node's: it names no host."""

    async def work(role):
        async with bulk_server(
            tmp_path, credentials=lambda authority: server_credentials(authority, role=role)
        ) as served:
            name = served.server.put(b"x")
            return await fetch_bytes(served.connection, name, limit=10)

    assert run(work("coordinator")) == b"x"
    with pytest.raises(UnreachableError):
        run(work("node"))


def test_another_authority_is_not_trusted(tmp_path):
    stranger = Authority.create()

    async def work():
        async with bulk_server(
            tmp_path, credentials=lambda _: server_credentials(stranger)
        ) as served:
            await fetch_bytes(served.connection, digest("x"), limit=10)

    with pytest.raises(UnreachableError):
        run(work())


def test_a_renewed_certificate_is_used_while_old_calls_finish(tmp_path):
    async def work():
        async with bulk_server(tmp_path) as served:
            name = served.server.put(DATA)
            old = served.connection.channel
            running = asyncio.ensure_future(fetch(served.connection, name, tmp_path / "one"))
            await asyncio.sleep(0)
            served.connection.renew(served.authority.enrol(served.keys))
            await asyncio.gather(running, fetch(served.connection, name, tmp_path / "two"))
            return old is served.connection.channel

    assert run(work()) is False
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == DATA


def test_nobody_there_is_unreachable(tmp_path):
    async def work():
        async with bulk_server(tmp_path) as served:
            identity = served.keys.tls()
        connection = Connection("127.0.0.1:9", identity, rng=rng())
        try:
            await connection.call(connection.bulk.DescribeBlob, bulk.bulk_pb2.DescribeBlobRequest())
        finally:
            await connection.close()

    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9"):
        run(work())


def test_the_next_coordinator_is_turned_to_when_one_does_not_answer(tmp_path):
    async def work():
        async with bulk_server(tmp_path) as served:
            here = served.connection.address
            connection = Connection(("127.0.0.1:9", here), served.keys.tls(), rng=rng())
            try:
                name = served.server.put(DATA)
                await fetch(
                    connection, name, tmp_path / "got"
                )  # the first call fails, then it turns
                turned = connection.address
                connection.turn_from("127.0.0.1:9")  # a slower call finds out as well: stays
                return turned == here == connection.address
            finally:
                await connection.close()

    assert run(work())
    assert (tmp_path / "got").read_bytes() == DATA


def test_the_stream_of_cosignatures_goes_round_without_the_calls(tmp_path):
    async def work():
        async with bulk_server(tmp_path) as served:
            identity = served.keys.tls()
        both = Connection(("127.0.0.1:9", "127.0.0.1:10"), identity, rng=rng())
        one = Connection("127.0.0.1:9", identity, rng=rng())
        try:
            calls, alone = both.channel, one.witness_channel
            before = both.witness_channel
            both.turn_witness()
            one.turn_witness()
            assert both.channel is calls
            assert before is not calls
            assert both.witness_channel is not before
            assert one.witness_channel is alone is one.channel
        finally:
            await both.close()
            await one.close()

    run(work())


@pytest.mark.parametrize("kind", ["log", "witness"])
def test_a_stream_ends_with_the_connection_that_was_given_up(tmp_path, kind):
    """On a half-open connection nothing else would end it; cancelling its reader still does."""

    async def deaf(_reader, _writer):
        await asyncio.sleep(3600)

    async def work():
        async with bulk_server(tmp_path) as served:
            identity = served.keys.tls()
        server = await asyncio.start_server(deaf, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connection = Connection(f"127.0.0.1:{port}", identity, rng=rng())

        async def read():
            if kind == "log":
                call = connection.log.Follow(log_pb2.FollowRequest(size=0))
            else:
                call = connection.witness.NextCheckpoint()
            with connection.stream(call) as pages:
                return await pages.read()

        try:
            reading = asyncio.create_task(read())
            await asyncio.sleep(0.2)
            assert not reading.done()
            connection.dial_again(connection.channel)
            with pytest.raises(grpc.aio.UsageError, match="given up"):
                await asyncio.wait_for(reading, 20)
            again = asyncio.create_task(read())
            await asyncio.sleep(0.2)
            again.cancel()
            with pytest.raises(asyncio.CancelledError):
                await again
        finally:
            await connection.close()
            server.close()

    run(work())


def test_a_connection_that_does_not_answer_in_time_is_dialled_again(tmp_path):
    async def work():
        async with bulk_server(tmp_path) as served:
            connection = served.connection
            silent, streams = connection.channel, connection.witness_channel
            connection.dial_again(silent)
            fresh = connection.channel
            connection.dial_again(silent)  # another call on the old one timed out as well
            assert streams is silent
            assert connection.channel is fresh is connection.witness_channel
            assert fresh is not silent
            name = served.server.put(DATA)
            await fetch(connection, name, tmp_path / "got")

    run(work())
    assert (tmp_path / "got").read_bytes() == DATA
