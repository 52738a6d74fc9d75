"""Knocking on the coordinator's door: who gets in, what is taken, what is refused and how.

A real server with real mutual TLS and a real ledger; every refusal has its status and its code, and
leaves nothing behind that counts.
"""

from __future__ import annotations

import gc
import os
import subprocess
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.ca import CertificateAuthority, new_tls_key
from coordinator.spool import Spool
from protocols.crypto.identity import Identity
from protocols.enrolment import Invitation
from protocols.gen import accounting_pb2, admin_pb2, bulk_pb2, enrolment_pb2, rounds_pb2
from protocols.identifiers import Digest, FederationId, NodeId
from protocols.round_vector import round_ring
from protocols.rounds import Uploading
from protocols.tensors.sizes import UNIT
from protocols.upload import UploadHeader, sign_header
from tests.support.door import Client, Credentials, enrol_request, packed, served

MIB = 2**20
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))


@pytest.fixture
def door(tmp_path):
    with served(tmp_path) as found:
        yield found


@contextmanager
def refused(status, code=None, says=""):
    """The call inside must fail with this status, code and sentence."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    error = caught.value
    metadata = dict(error.trailing_metadata() or ())
    assert (error.code().name, metadata.get("minga-code")) == (status, code), error
    assert says in error.details()


def ping(client: Client):
    return client.rounds.Sync(rounds_pb2.SyncRequest(seen=0, wait_ms=0), timeout=10)


# -- who gets in -------------------------------------------------------------------------------


def test_an_enrolled_node_gets_in(door):
    assert ping(door.enrol("a")).now_ms > 0


def test_a_strangers_certificate_does_not_even_connect(door):
    foreign = CertificateAuthority.create(FederationId("demo"), now=datetime.now(UTC))
    mine, door.authority = door.authority, foreign
    stranger = door.issue(Identity("node", "a"))
    door.authority = mine
    with refused("UNAVAILABLE"):
        ping(door.connect(stranger))


def test_an_expired_certificate_does_not_even_connect(door):
    long_ago = datetime.now(UTC) - timedelta(days=3)
    with refused("UNAVAILABLE"):
        ping(door.connect(door.issue(Identity("node", "a"), now=long_ago)))


def test_plaintext_is_not_offered(door):
    with grpc.insecure_channel(door.address) as channel, refused("UNAVAILABLE"):
        ping(Client(channel))


def test_no_certificate_does_not_connect(door):
    credentials = grpc.ssl_channel_credentials(door.root)
    with grpc.secure_channel(door.address, credentials) as channel, refused("UNAVAILABLE"):
        ping(Client(channel))


def test_a_certificate_that_is_not_in_the_ledger_is_refused(door):
    door.enrol("a")
    with refused("UNAUTHENTICATED", "not_enrolled", "not issued"):
        ping(door.connect(door.issue(Identity("node", "a"))))


def test_a_certificate_of_a_node_that_never_enrolled_is_refused(door):
    identity = Identity("node", "z")
    credentials = door.issue(identity)
    door.register(credentials, identity)
    with refused("UNAUTHENTICATED", "not_enrolled", "not enrolled"):
        ping(door.connect(credentials))


def test_a_suspended_node_is_refused_on_a_connection_opened_before(door):
    client = door.enrol("a")
    ping(client)
    door.ledger(lambda tx: tx.set_node_status(NodeId("a"), "suspended", "for the test"))
    with refused("UNAUTHENTICATED", "not_enrolled", "suspended"):
        ping(client)


def test_roles_do_not_mix(door):
    node, operator = door.enrol("a"), door.operator()
    with refused("PERMISSION_DENIED", "not_permitted"):
        node.admin.ListRuns(admin_pb2.ListRunsRequest(), timeout=10)
    with refused("PERMISSION_DENIED", "not_permitted"):
        ping(operator)
    with refused("PERMISSION_DENIED", "not_permitted"):
        node.bulk.BeginPut(bulk_pb2.BlobInfo(digest=bytes(32)), timeout=10)


# -- enrolment ---------------------------------------------------------------------------------


@pytest.fixture
def invited(door):
    answer = door.operator().admin.Invite(
        admin_pb2.InviteRequest(institution="a", valid_hours=1), timeout=10
    )
    return Invitation.parse(answer.token)


def test_an_invitation_becomes_a_certificate_that_works(door, invited):
    signing = door.signing_key("a")

    key = new_tls_key()
    answer = door.enrolment_stub().Join(
        enrol_request("a", invited.secret, signing, key), timeout=10
    )
    certificate = x509.load_der_x509_certificate(answer.certificate_der)
    assert answer.federation == "demo"
    assert ping(door.connect(Credentials(key, certificate))).now_ms > 0


def test_a_lost_answer_is_not_a_second_use(door, invited):
    stub, request = door.enrolment_stub(), enrol_request("a", invited.secret, door.signing_key("a"))
    stub.Join(request, timeout=10)
    assert stub.Join(request, timeout=10).certificate_der


def test_a_token_works_once(door, invited):
    stub, signing = door.enrolment_stub(), door.signing_key("a")
    stub.Join(enrol_request("a", invited.secret, signing), timeout=10)
    with refused("PERMISSION_DENIED", "token_refused", "used before"):
        stub.Join(enrol_request("a", invited.secret, signing), timeout=10)


def test_a_token_is_for_one_institution(door, invited):
    with refused("PERMISSION_DENIED", "token_refused", "another institution"):
        request = enrol_request("b", invited.secret, door.signing_key("b"))
        door.enrolment_stub().Join(request, timeout=10)
    # ... and is not used up by the attempt
    request = enrol_request("a", invited.secret, door.signing_key("a"))
    door.enrolment_stub().Join(request, timeout=10)


def test_a_token_nobody_made_is_refused(door):
    with refused("PERMISSION_DENIED", "token_refused"):
        request = enrol_request("a", bytes(32), door.signing_key("a"))
        door.enrolment_stub().Join(request, timeout=10)


def test_a_proof_by_another_key_is_refused(door, invited):
    with refused("DATA_LOSS", "bad_signature"):
        other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        request = enrol_request("a", invited.secret, door.signing_key("a"), signing_key=other)
        door.enrolment_stub().Join(request, timeout=10)


def test_a_certificate_request_that_is_none_is_refused(door, invited):
    with refused("INVALID_ARGUMENT", "malformed"):
        request = enrol_request("a", invited.secret, door.signing_key("a"), csr_der=b"no")
        door.enrolment_stub().Join(request, timeout=10)


def test_the_enrolment_port_serves_nothing_else(door):
    credentials = grpc.ssl_channel_credentials(door.root)
    with grpc.secure_channel(door.enrolment, credentials) as channel, refused("UNIMPLEMENTED"):
        ping(Client(channel))


def test_a_certificate_is_renewed_with_a_new_key(door):
    client = door.enrol("a")
    request = enrol_request("a", bytes(32), door.signing_key("a"))
    answer = client.renewal.Renew(enrolment_pb2.RenewRequest(csr_der=request.csr_der), timeout=10)
    assert answer.certificate_der


# -- uploads -----------------------------------------------------------------------------------


class Upload:
    """A vector of node a for the round in ``door``."""

    def __init__(self, door, coordinates=4_000_000, fill=b"\x05", run="r1", received=(), **changes):
        self.plan = door.make_run(run, coordinates=coordinates, **changes)
        self.round = door.open_round(self.plan, received=frozenset(map(NodeId, received)))
        self.layout = door.parts.layouts.of(self.plan, 0)
        size = self.layout.packed_size(round_ring(self.plan))
        self.data = (fill * size)[:size]
        self.start = door.snapshots[run].model_root
        self.key = door.signing_key("a")

    def header(self, data=None, **changes):
        data = self.data if data is None else data
        root, _ = packed(data)
        values = {
            "federation": "demo",
            "run": self.plan.run_id,
            "round": self.round.number,
            "attempt": 1,
            "node": NodeId("a"),
            "plan": self.plan.digest,
            "model": self.start,
            "coordinates": self.layout.coordinates,
            "ring": 20,
            "size": len(data),
            "root": Digest(root.hex()),
        }
        return UploadHeader(**values | changes)

    def request(self, data=None, key=None, hashes=None, **changes):
        data = self.data if data is None else data
        header = self.header(data, **changes)
        return bulk_pb2.BeginUploadRequest(
            header=header.to_bytes(),
            signature=sign_header(key or self.key, header),
            unit_hashes=packed(data)[1] if hashes is None else hashes,
        )

    def messages(self, start=0, stop=None, size=MIB):
        stop = len(self.data) if stop is None else stop
        return [self.data[i : min(i + size, stop)] for i in range(start, stop, size)]


@pytest.fixture
def upload(door):
    return Upload(door)


def begin(client, upload, **changes):
    return client.bulk.BeginUpload(upload.request(**changes), timeout=10)


def finish(client, upload_id):
    request = bulk_pb2.FinishUploadRequest(upload_id=upload_id)
    return client.bulk.FinishUpload(request, timeout=10).receipt


def received(door, upload):
    return door.ledger(lambda tx: tx.round(upload.round).phase).received


def test_an_upload_arrives_and_counts_once(door, upload):
    client = door.enrol("a")
    state = begin(client, upload)
    assert (state.durable, state.complete) == (0, False)
    assert client.append(state.upload_id, 0, upload.messages()) == len(upload.data)
    receipt = finish(client, state.upload_id)
    assert receipt == upload.header().receipt
    assert received(door, upload) == {"a"}
    # every step again, as after lost answers
    again = begin(client, upload)
    assert (again.complete, again.durable) == (True, len(upload.data))
    assert finish(client, state.upload_id) == receipt
    assert received(door, upload) == {"a"}
    stored = door.ledger(lambda tx: tx.uploads(upload.round, 1))
    assert [row.receipt for row in stored] == [receipt]
    assert (door.config.spool / "r1" / "0.1.a.vector").read_bytes() == upload.data


def test_nothing_of_an_upload_stays_in_memory_once_it_counts(door, upload):
    client = door.enrol("a")
    state = begin(client, upload)
    client.append(state.upload_id, 0, upload.messages())
    (spool,) = (
        each
        for each in gc.get_objects()
        if isinstance(each, Spool) and each.root == door.config.spool
    )
    assert len(spool._verified) == 1
    for _ in range(2):  # an answer may be lost
        finish(client, state.upload_id)
        begin(client, upload)
        assert not spool._verified


def test_an_upload_goes_on_after_a_crash_of_the_coordinator(door, upload):
    client = door.enrol("a")
    state = begin(client, upload)
    half = UNIT + MIB  # one unit, and a part that will not count
    assert client.append(state.upload_id, 0, upload.messages(stop=half)) == UNIT
    with door.config.spool.joinpath("r1/0.1.a.vector").open("r+b") as file:
        file.truncate(UNIT + 17)  # what a power cut may leave
    door.restart()
    client = door.enrol("a")
    state = begin(client, upload)
    assert state.durable == UNIT
    client.append(state.upload_id, UNIT, upload.messages(start=UNIT))
    finish(client, state.upload_id)
    assert (door.config.spool / "r1" / "0.1.a.vector").read_bytes() == upload.data


def test_bytes_damaged_on_disk_before_a_restart_do_not_count(door, upload):
    client = door.enrol("a")
    state = begin(client, upload)
    client.append(state.upload_id, 0, upload.messages(stop=2 * UNIT))
    with door.config.spool.joinpath("r1/0.1.a.vector").open("r+b") as file:
        file.seek(UNIT + 5)
        file.write(b"!")
    door.restart()
    assert begin(door.enrol("a"), upload).durable == UNIT


def test_other_bytes_for_the_same_attempt_are_refused(door, upload):
    client = door.enrol("a")
    begin(client, upload)
    other = b"\x06" + upload.data[1:]
    with refused("ALREADY_EXISTS", "conflicting_upload"):
        begin(client, upload, data=other)
    state = begin(client, upload)
    with refused("DATA_LOSS", "digest_mismatch", "unit 0"):
        client.append(state.upload_id, 0, [other[:MIB], *upload.messages(start=MIB)])
    assert begin(client, upload).durable == 0
    assert client.append(state.upload_id, 0, upload.messages()) == len(upload.data)


def test_a_wrong_unit_leaves_what_came_before(door, upload):
    client = door.enrol("a")
    state = begin(client, upload)
    bad = [*upload.messages(stop=UNIT), b"\xff" * MIB, *upload.messages(start=UNIT + MIB)]
    with refused("DATA_LOSS", "digest_mismatch", "unit 1"):
        client.append(state.upload_id, 0, bad)
    assert begin(client, upload).durable == UNIT


@pytest.mark.parametrize(
    ("offset", "messages", "status", "code"),
    [
        (MIB, [b"x"], "OUT_OF_RANGE", "wrong_offset"),
        (0, [b"x" * (MIB + 1)], "INVALID_ARGUMENT", "malformed"),
        (-1, [b"x"], "INVALID_ARGUMENT", "malformed"),
        ("1e3", [b"x"], "INVALID_ARGUMENT", "malformed"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused(door, upload, offset, messages, status, code):
    client = door.enrol("a")
    state = begin(client, upload)
    with refused(status, code):
        client.append(state.upload_id, offset, messages)
    assert begin(client, upload).durable == 0


def test_more_bytes_than_announced_are_refused(door):
    upload = Upload(door, coordinates=1000)
    client = door.enrol("a")
    state = begin(client, upload)
    with refused("INVALID_ARGUMENT", "malformed", "more than"):
        client.append(state.upload_id, 0, [upload.data + b"x"])


def test_a_message_beyond_the_transports_limit_is_refused(door, upload):
    client = door.enrol("a")
    state = begin(client, upload)
    with refused("RESOURCE_EXHAUSTED"):
        client.append(state.upload_id, 0, [bytes(7 * MIB)])


def test_half_an_upload_cannot_be_handed_in(door, upload):
    client = door.enrol("a")
    state = begin(client, upload)
    client.append(state.upload_id, 0, upload.messages(stop=UNIT))
    with refused("UNAVAILABLE", "not_ready", "send the rest"):
        finish(client, state.upload_id)
    assert received(door, upload) == set()


@pytest.mark.parametrize(
    ("changes", "status", "code", "says"),
    [
        ({"node": NodeId("b")}, "FAILED_PRECONDITION", "not_listed", "header of b"),
        ({"plan": Digest("7" * 64)}, "INVALID_ARGUMENT", "malformed", "plan"),
        ({"model": Digest("7" * 64)}, "INVALID_ARGUMENT", "malformed", "model"),
        ({"ring": 24}, "INVALID_ARGUMENT", "malformed", "ring"),
        ({"coordinates": 5}, "INVALID_ARGUMENT", "malformed", "coordinates"),
        ({"federation": FederationId("other")}, "INVALID_ARGUMENT", "malformed", "federation"),
        ({"round": 9}, "NOT_FOUND", "not_found", "no round"),
        ({"run": "nope"}, "NOT_FOUND", "not_found", "no round"),
        ({"attempt": 2}, "FAILED_PRECONDITION", "wrong_phase", "attempt 1"),
        ({"hashes": [bytes(32)]}, "INVALID_ARGUMENT", "malformed", "unit hashes"),
        (
            {"key": Ed25519PrivateKey.from_private_bytes(bytes(32))},
            "DATA_LOSS",
            "bad_signature",
            "",
        ),
    ],
)
def test_a_header_that_does_not_fit_the_round_is_refused(door, upload, changes, status, code, says):
    client = door.enrol("a")
    with refused(status, code, says):
        begin(client, upload, **changes)
    assert door.ledger(lambda tx: tx.uploads(upload.round, 1)) == []


def test_a_node_outside_the_ready_set_is_refused(door):
    upload = Upload(door, coordinates=1000)
    phase = door.ledger(lambda tx: tx.round(upload.round).phase)
    only_b = Uploading(
        terms=phase.terms,
        closes_at=phase.closes_at,
        attempt=1,
        ready=frozenset({NodeId("b"), NodeId("c")}),
    )
    upload.round = door.open_round(upload.plan, only_b, number=1)
    with refused("FAILED_PRECONDITION", "not_listed"):
        begin(door.enrol("a"), upload)


def test_an_upload_of_somebody_else_cannot_be_touched(door, upload):
    state = begin(door.enrol("a"), upload)
    other = door.enrol("b")
    with refused("NOT_FOUND", "not_found"):
        other.append(state.upload_id, 0, upload.messages())
    with refused("NOT_FOUND", "not_found"):
        finish(other, state.upload_id)


def test_what_does_not_fit_on_the_disk_is_refused_before_the_first_byte(door, upload):
    client = door.enrol("a")
    object.__setattr__(door.parts.spool, "_min_free", 2**60)
    with refused("RESOURCE_EXHAUSTED", "storage_full", "do not fit"):
        begin(client, upload)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_loses_nothing_that_was_acknowledged(door, upload):
    client = door.enrol("a")
    spool = door.config.spool
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(spool)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine cannot mount a tmpfs")
    try:
        door.parts.spool._min_free = 0
        state = begin(client, upload)
        client.append(state.upload_id, 0, upload.messages(stop=UNIT))
        filler = spool / "filler"
        filler.write_bytes(bytes(7 * MIB))  # somebody else fills the disk
        door.parts.spool.check_room = lambda size: None  # ... after the room was checked
        with refused("RESOURCE_EXHAUSTED", "storage_full"):
            client.append(state.upload_id, UNIT, upload.messages(start=UNIT))
        filler.unlink()
        assert begin(client, upload).durable == UNIT
        client.append(state.upload_id, UNIT, upload.messages(start=UNIT))
        assert finish(client, state.upload_id) == upload.header().receipt
    finally:
        subprocess.run(["umount", str(spool)], check=True)


# -- downloads ---------------------------------------------------------------------------------


def test_a_blob_is_read_from_any_offset(door):
    data = os.urandom(5 * MIB + 3)
    with door.parts.blobs.writer() as writer:
        writer.write(data)
        digest = writer.finish()
    client = door.enrol("a")
    raw = bytes.fromhex(digest)
    info = client.bulk.DescribeBlob(bulk_pb2.DescribeBlobRequest(digest=raw), timeout=10)
    assert (info.size, tuple(info.unit_hashes)) == (len(data), packed(data)[1])
    for offset in (0, 1, UNIT, len(data)):
        assert client.fetch(raw + offset.to_bytes(8, "big")) == data[offset:]


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"", "INVALID_ARGUMENT", "malformed"),
        (bytes(39), "INVALID_ARGUMENT", "malformed"),
        (bytes(40), "NOT_FOUND", "not_found"),
    ],
)
def test_a_fetch_that_asks_for_nothing_is_refused(door, request_bytes, status, code):
    with refused(status, code):
        door.enrol("a").fetch(request_bytes)


def test_an_operator_puts_a_blob_and_may_put_it_again(door):
    data = os.urandom(UNIT + 100)
    root, hashes = packed(data)
    info = bulk_pb2.BlobInfo(digest=root, size=len(data), unit_hashes=hashes)
    operator = door.operator()
    call = operator.channel.stream_unary("/minga.v1.Bulk/Put", None, None)

    def put(offset):
        messages = iter([data[i : i + MIB] for i in range(offset, len(data), MIB)])
        metadata = (("minga-digest-bin", root), ("minga-offset", str(offset)))
        return int.from_bytes(call(messages, metadata=metadata, timeout=10), "big")

    with refused("NOT_FOUND", "not_found"):
        put(0)
    assert operator.bulk.BeginPut(info, timeout=10).durable == 0
    assert put(0) == len(data)
    assert operator.bulk.BeginPut(info, timeout=10).complete
    assert door.parts.blobs.has(Digest(root.hex()))


def test_a_blob_that_is_put_in_parts_is_named_once_and_whoever_asks_meanwhile_does_not_stop_it(
    door,
):
    data = os.urandom(UNIT + 100)
    root, hashes = packed(data)
    info = bulk_pb2.BlobInfo(digest=root, size=len(data), unit_hashes=hashes)
    operator = door.operator()
    call = operator.channel.stream_unary("/minga.v1.Bulk/Put", None, None)

    def messages():  # the last part; while it is under way, somebody asks how far it got
        yield data[:MIB]
        assert operator.bulk.BeginPut(info, timeout=10).durable == 0
        for at in range(MIB, UNIT, MIB):
            yield data[at : at + MIB]

    def put(start, end, parts):
        metadata = [("minga-digest-bin", root), ("minga-offset", str(start))]
        metadata.append(("minga-end", str(end)))
        return int.from_bytes(call(parts, metadata=metadata, timeout=10), "big")

    assert operator.bulk.BeginPut(info, timeout=10).streams > 1
    assert put(UNIT, len(data), iter([data[UNIT:]])) == 0
    assert put(0, UNIT, messages()) == len(data)
    assert door.parts.blobs.has(Digest(root.hex()))


# -- what local steps cost -----------------------------------------------------------------------


def cost(number=0, **used):
    figures = {"gpu_ms": 5, "cpu_ms": 6, "energy_mwh": 7, "source": "measured"} | used
    return accounting_pb2.ReportRequest(
        round=rounds_pb2.RoundRef(run="r1", number=number),
        used=accounting_pb2.Resources(**figures),
    )


def test_the_first_report_of_what_a_round_cost_stands(door):
    door.open_round(door.make_run())
    node = door.enrol("a")
    for gpu in (5, 5, 9):
        node.accounting.Report(cost(gpu_ms=gpu), timeout=10)

    facts = door.operator().admin.ShowRun(admin_pb2.ShowRunRequest(run="r1"), timeout=10)
    (used,) = [entry for round_ in facts.rounds for entry in round_.resources]
    assert (used.node, used.used.gpu_ms, used.used.source) == ("a", 5, "measured")
    assert not facts.HasField("prices")


def test_a_cost_that_is_none_is_refused(door):
    door.open_round(door.make_run())
    node = door.enrol("a")
    with refused("INVALID_ARGUMENT", "malformed", "measured | estimated | none"):
        node.accounting.Report(cost(source="guessed"), timeout=10)
    with refused("INVALID_ARGUMENT", "malformed", "energy_mwh must be below"):
        node.accounting.Report(cost(energy_mwh=2**48), timeout=10)
    with refused("NOT_FOUND", "not_found"):
        node.accounting.Report(cost(number=7), timeout=10)
    with refused("PERMISSION_DENIED", "not_permitted"):  # figures are a node's own
        door.operator().accounting.Report(cost(), timeout=10)
