"""Phases over the wire and into the ledger and back; identities; upload headers; invitations."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from coordinator.ca import CertificateAuthority, new_tls_key
from protocols.cohort import Quorum, Terms
from protocols.crypto.identity import (
    Identity,
    certificate_in_force,
    identity_of_certificate,
    parse_spiffe_uri,
    read_csr,
    spiffe_uri,
)
from protocols.crypto.signatures import BadSignatureError
from protocols.enrolment import Invitation
from protocols.errors import (
    MalformedMessageError,
    NotEnrolledError,
    TokenRefusedError,
)
from protocols.gen import rounds_pb2
from protocols.identifiers import Digest, FederationId, NodeId
from protocols.rounds import (
    Aborted,
    Burned,
    Committing,
    Dealing,
    Open,
    Opened,
    Released,
    Revealing,
    Training,
    Uploading,
)
from protocols.rounds_codec import phase_from_json, phase_to_json
from protocols.tensors.units import UnitHasher
from protocols.upload import UploadHeader, check_unit_hashes, sign_header, verify_header
from protocols.wire import phase_from_view, phase_to_view, read_text

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)
NODES = tuple(NodeId(f"n{i}") for i in range(5))
TERMS = Terms(
    roster=NODES,
    min_participants=3,
    quorum=Quorum(roster=5, threshold=4, colluders=2, min_surviving=4),
    train=timedelta(hours=2),
    deal=timedelta(seconds=30),
    upload=timedelta(minutes=5),
    commit=timedelta(seconds=20),
    reveal=timedelta(seconds=20),
)
some = st.frozensets(st.sampled_from(NODES))
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
when = st.integers(0, 2**40).map(lambda ms: EPOCH + timedelta(milliseconds=ms))
attempt = st.integers(1, 9)
digest = st.binary(min_size=32, max_size=32).map(lambda b: Digest(b.hex()))
timed = {"terms": st.just(TERMS), "closes_at": when}
phases = st.one_of(
    st.builds(Open, **timed, joined=some, declined=some),
    st.builds(Training, **timed, cohort=some, ready=some, left=some),
    st.builds(Dealing, **timed, attempt=attempt, ready=some, keyed=some, dealt=some, agreed=some),
    st.builds(Uploading, **timed, attempt=attempt, ready=some, received=some),
    st.builds(
        Committing, **timed, attempt=attempt, ready=some, survivors=some, commits=some, aborts=some
    ),
    st.builds(
        Revealing, **timed, attempt=attempt, ready=some, survivors=some, commits=some, revealed=some
    ),
    st.builds(
        Released,
        attempt=attempt,
        survivors=some,
        opened=st.none() | st.builds(Opened, sum=digest, model_root=digest),
    ),
    st.builds(Aborted, code=st.just("stopped"), reason=st.text(max_size=20)),
    st.builds(Burned, code=st.just("no_verdict"), reason=st.text(max_size=20)),
)


@given(phases)
def test_a_phase_survives_the_wire_and_the_ledger(phase):
    view = rounds_pb2.PhaseView.FromString(phase_to_view(phase).SerializeToString())
    assert phase_from_view(view, TERMS) == phase
    assert phase_from_json(phase_to_json(phase)) == phase


@pytest.mark.parametrize(
    "view",
    [
        rounds_pb2.PhaseView(name="Closed"),
        rounds_pb2.PhaseView(name=""),
        rounds_pb2.PhaseView(name="Uploading", closes_at_ms=1),  # no attempt
        rounds_pb2.PhaseView(name="Open", joined=["../a"]),
        rounds_pb2.PhaseView(name="Open", closes_at_ms=-1),
        rounds_pb2.PhaseView(name="Released", attempt=1, sum="00"),
    ],
)
def test_a_view_that_is_no_phase_is_refused(view):
    with pytest.raises(MalformedMessageError):
        phase_from_view(view, TERMS)


@pytest.mark.parametrize(
    "change", [{"phase": "Ajar"}, {"joined": "a"}, {"extra": 1}, {"closes_at": "soon"}]
)
def test_a_stored_phase_of_another_version_is_refused(change):
    stored = phase_to_json(Open(terms=TERMS, closes_at=NOW)) | change
    with pytest.raises(MalformedMessageError):
        phase_from_json(stored)


def test_a_text_with_control_characters_is_refused():
    with pytest.raises(MalformedMessageError, match="control"):
        read_text("fine\x1b[2J", what="a reason")
    with pytest.raises(MalformedMessageError, match="at most"):
        read_text("a" * 401, what="a reason")


# -- identities --------------------------------------------------------------------------------

FEDERATION = FederationId("demo")
AUTHORITY = CertificateAuthority.create(FEDERATION, now=NOW)


@pytest.mark.parametrize(
    "identity",
    [
        Identity("node", "ar-1"),
        Identity("operator", "cenia"),
        Identity("coordinator", "coordinator"),
    ],
)
def test_an_identity_is_what_its_uri_says(identity):
    assert parse_spiffe_uri(spiffe_uri(FEDERATION, identity), FEDERATION) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://demo.minga.example",
        "spiffe://demo.minga.example/",
        "spiffe://demo.minga.example/inst/a/node/1/",
        "spiffe://demo.minga.example/inst/a/node/2",
        "spiffe://demo.minga.example/inst/a/node/1/x",
        "spiffe://demo.minga.example/inst/../node/1",
        "spiffe://demo.minga.example/inst//node/1",
        "spiffe://demo.minga.example.evil/inst/a/node/1",
        "spiffe://other.minga.example/inst/a/node/1",
        "spiffe://DEMO.minga.example/inst/a/node/1",
        "https://demo.minga.example/inst/a/node/1",
        "spiffe://demo.minga.example/coordinator/x",
        "spiffe://demo.minga.example/operator/" + "a" * 3000,
    ],
)
def test_a_uri_that_names_nobody_is_refused(uri):
    with pytest.raises(MalformedMessageError):
        parse_spiffe_uri(uri, FEDERATION)


def issue(**changes):
    arguments = {"now": NOW, "lifetime": timedelta(hours=24)} | changes
    return AUTHORITY.issue(new_tls_key().public_key(), Identity("node", "ar-1"), **arguments)


def test_an_issued_certificate_names_its_node():
    certificate = issue()
    assert identity_of_certificate(certificate, FEDERATION) == Identity("node", "ar-1")
    certificate_in_force(certificate, NOW)
    with pytest.raises(NotEnrolledError, match="expired"):
        certificate_in_force(certificate, NOW + timedelta(hours=24))
    with pytest.raises(NotEnrolledError, match="not valid yet"):
        certificate_in_force(certificate, NOW - timedelta(hours=1))
    with pytest.raises(NotEnrolledError):
        identity_of_certificate(certificate, FederationId("other"))


def self_made(*names, usage=x509.ExtendedKeyUsageOID.CLIENT_AUTH):
    key = new_tls_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(AUTHORITY.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return builder.sign(key, hashes.SHA256())


def uri(path):
    return x509.UniformResourceIdentifier(f"spiffe://demo.minga.example{path}")


@pytest.mark.parametrize(
    "names",
    [
        (),
        (x509.DNSName("localhost"),),
        (uri("/inst/a/node/1"), uri("/inst/b/node/1")),
        (uri("/inst/a/node/1"), x509.DNSName("localhost")),
        (uri("/inst/a"),),
    ],
)
def test_a_certificate_names_exactly_one_identity(names):
    with pytest.raises(NotEnrolledError):
        identity_of_certificate(self_made(*names), FEDERATION)


def test_a_server_certificate_is_not_a_client():
    server = self_made(uri("/inst/a/node/1"), usage=x509.ExtendedKeyUsageOID.SERVER_AUTH)
    with pytest.raises(NotEnrolledError, match="not for clients"):
        certificate_in_force(server, NOW + timedelta(hours=1))


def csr(key, algorithm=None):
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(key, algorithm or hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def test_a_request_must_hold_a_p256_key_and_be_signed_by_it():
    good = csr(new_tls_key())
    assert read_csr(good).is_signature_valid
    broken = bytearray(good)
    broken[-1] ^= 1
    bad = [
        b"",
        good[:-1],
        bytes(broken),
        csr(ec.generate_private_key(ec.SECP384R1())),
        csr(rsa.generate_private_key(65537, 2048)),
        csr(new_tls_key(), hashes.SHA512()),
    ]
    for request in bad:
        with pytest.raises(MalformedMessageError):
            read_csr(request)


def test_what_a_request_asks_for_is_ignored():
    """The issuer alone decides whom a certificate names."""
    key = new_tls_key()
    names = x509.SubjectAlternativeName([uri("/coordinator"), x509.DNSName("coordinator")])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(names, critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = read_csr(request.public_bytes(serialization.Encoding.DER)).public_key()
    issued = AUTHORITY.issue(public, Identity("node", "ar-1"), now=NOW, lifetime=timedelta(hours=1))
    assert identity_of_certificate(issued, FEDERATION) == Identity("node", "ar-1")
    assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_keys_do_not_print():
    assert "key" not in repr(AUTHORITY).replace("pubkey", "").lower().split("certificate", 1)[0]
    assert "_EllipticCurvePrivateKey" not in repr(AUTHORITY)


# -- upload headers ----------------------------------------------------------------------------

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def header(**changes):
    hasher = UnitHasher()
    hasher.update(b"x" * 2500)
    values = {
        "federation": FEDERATION,
        "run": "r1",
        "round": 3,
        "attempt": 1,
        "node": NodeId("a"),
        "plan": Digest("1" * 64),
        "model": Digest("2" * 64),
        "coordinates": 1000,
        "ring": 20,
        "size": 2500,
        "root": hasher.digest(),
    }
    return UploadHeader(**values | changes), hasher.hashes()


def test_a_header_reads_what_it_writes_and_is_pinned():
    value, units = header()
    check_unit_hashes(value, units)
    assert UploadHeader.from_bytes(value.to_bytes()) == value
    signature = sign_header(KEY, value)
    public = KEY.public_key().public_bytes_raw()
    assert verify_header(public, value.to_bytes(), signature) == value
    assert value.receipt.hex() == (
        "20083fc1a4731bbb9e9bcddfed0a29efd3339b287cf428a81f887541ffd5ecbe"
    )
    assert value.upload_id.hex() == (
        "454b7a827de4dfe1212edc532d8698e9cdc77696372bb16e8d457de0ec3c8ef2"
    )


def test_another_header_of_the_same_attempt_meets_the_first():
    first, _ = header()
    second, _ = header(root=Digest("3" * 64))
    assert first.upload_id == second.upload_id
    assert first.receipt != second.receipt
    for change in ({"attempt": 2}, {"round": 4}, {"node": NodeId("b")}, {"run": "r2"}):
        assert header(**change)[0].upload_id != first.upload_id


def test_a_signature_is_over_every_field():
    value, _ = header()
    signature, public = sign_header(KEY, value), KEY.public_key().public_bytes_raw()
    for change in (
        {"round": 4},
        {"attempt": 2},
        {"node": NodeId("b")},
        {"plan": Digest("4" * 64)},
        {"model": Digest("4" * 64)},
        {"coordinates": 1001},
        {"size": 2501},
        {"root": Digest("4" * 64)},
    ):
        with pytest.raises(BadSignatureError):
            verify_header(public, header(**change)[0].to_bytes(), signature)


def test_a_signature_of_another_kind_does_not_count():
    value, _ = header()
    public = KEY.public_key().public_bytes_raw()
    with pytest.raises(BadSignatureError):
        verify_header(public, value.to_bytes(), KEY.sign(value.to_bytes()))


@pytest.mark.parametrize("count", [0, 2])
def test_unit_hashes_must_fit(count):
    value, units = header()
    with pytest.raises(MalformedMessageError):
        check_unit_hashes(value, units * count)
    with pytest.raises(MalformedMessageError):
        check_unit_hashes(value, (bytes(32),))


# -- invitations -------------------------------------------------------------------------------


def test_an_invitation_reads_what_it_writes_and_hides_its_secret():
    invitation = Invitation(institution=NodeId("ar-1"), secret=b"\xfe" * 32, root_der=b"root")
    text = invitation.to_text()
    assert Invitation.parse(text + "\n") == invitation
    assert "fe" * 4 not in repr(invitation)
    assert "secret" not in repr(invitation)


@pytest.mark.parametrize(
    "text", ["", "minga1.a.b", "minga2.a.AAAA.AAAA", "minga1.a.AAAA.AAAA", "minga1.A..", "x" * 9000]
)
def test_a_damaged_invitation_is_refused_without_repeating_it(text):
    with pytest.raises((TokenRefusedError, MalformedMessageError)) as caught:
        Invitation.parse(text)
    assert "AAAA" not in str(caught.value)
