"""People of the signed list at the coordinator: what a certificate lets its role do, no more.

The real services over mutual TLS. A certificate comes only with a signature by the very key that
the signed list names for that role; the list is asked again on every call.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from coordinator.ca import new_tls_key
from infra.admin import acts
from infra.admin.keys import make_key
from infra.admin.proposals import (
    propose_documents,
    propose_members,
    propose_policy,
    propose_rotation,
    with_status,
)
from policies.audit.replay import peek
from policies.trust import POLICY_DOCUMENT
from protocols.crypto.identity import Identity, parse_spiffe_uri, spiffe_uri
from protocols.gen import admin_pb2, bulk_pb2, enrolment_pb2, log_pb2, log_pb2_grpc, trust_pb2
from protocols.governance import roles
from protocols.governance.documents import ADMINS, Admins, time_text
from protocols.governance.errors import TrustRefusedError
from protocols.governance.people import ask, canonical_ask
from protocols.identifiers import FederationId
from protocols.tlog.kinds import CertIssued
from tests.attacks.test_governed_coordinator import rule, trust_refusal
from tests.contract.test_door import ping, refused
from tests.support.door import Client, Credentials, served
from tests.support.trust import NOW, World, card, signer

OTHERS = [
    (card("olga", "pa-univ-1", "PA"), ("auditor",)),
    (card("pedro", "site-a", "AR"), ("partner",)),
    (card("wanda", "uy-univ-1", "UY"), ("witness",)),
]
KEYS = {item.holder.person: item.public for item, _ in OTHERS}
FED = FederationId("demo")
LIST = admin_pb2.ListRunsRequest()
STAMP = trust_pb2.TrustFileRequest(name="metadata/timestamp.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with served(tmp_path_factory.mktemp("people"), governed=True) as door:
        world = World()
        world.found_at(door, others=OTHERS)
        yield door, world


def asked(door, person, role, *, by=None, key=None, at=None, names=(), csr=None, world=None):
    """A request of a person, and the key that its certificate is for."""
    tls = key or new_tls_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        wanted = [x509.UniformResourceIdentifier(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False)
    own = builder.sign(tls, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    held = KEYS | {item.holder.person: item.public for item in (world or World()).cards}
    name = by or person
    public = held.get(name) or card(name, "x-1", "AR").public
    request = ask(
        federation=FED, person=person, role=role, csr=csr or own, signer=signer(public, name),
        now=at or datetime.now(UTC),
    )  # fmt: skip
    return enrolment_pb2.PersonEnrolRequest(request=canonical_ask(request), csr_der=own), tls


def certified(door, person, role, **changes) -> Client:
    request, key = asked(door, person, role, **changes)
    answer = door.enrolment_stub().JoinPerson(request, timeout=10)
    certificate = x509.load_der_x509_certificate(answer.certificate_der)
    return door.connect(Credentials(key, certificate))


def test_names_of_people():
    for role in ("admin", "auditor", "partner", "witness", "release-board"):
        identity = Identity(role, "ana")
        uri = spiffe_uri(FED, identity)
        assert uri == f"spiffe://demo.minga.example/{role}/ana"
        assert parse_spiffe_uri(uri, FED) == identity


def calls(door, client):
    """Every kind of call that people could try."""
    plan = door.make_run("people", submit=False, roster=["site-a", "site-b"])
    run = admin_pb2.SubmitRunRequest(
        plan=plan.to_bytes(), snapshot=door.snapshots["people"].to_bytes()
    )
    blob = bulk_pb2.DescribeBlobRequest(digest=bytes.fromhex(plan.model.manifest))
    put = bulk_pb2.BlobInfo(digest=bytes(32), size=1, unit_hashes=[bytes(32)])
    invite = admin_pb2.InviteRequest(institution="site-a", valid_hours=1)
    csr = enrolment_pb2.RenewRequest(csr_der=b"x")
    files = trust_pb2.PublishTrustRequest(
        files={"metadata/1.root.json": door.parts.trust.first_root()}
    )
    return {
        "watch": lambda: client.admin.ListRuns(LIST, timeout=10),
        "nodes": lambda: client.admin.ListNodes(admin_pb2.ListNodesRequest(), timeout=10),
        "blob": lambda: client.bulk.DescribeBlob(blob, timeout=10),
        "trust": lambda: client.trust.File(STAMP, timeout=10),
        "publish": lambda: client.trust.Publish(files, timeout=10),
        "submit": lambda: client.admin.SubmitRun(run, timeout=10),
        "stop": lambda: client.admin.StopRun(
            admin_pb2.StopRunRequest(run="people", reason="x"), timeout=10
        ),
        "invite": lambda: client.admin.Invite(invite, timeout=10),
        "put": lambda: client.bulk.BeginPut(put, timeout=10),
        "sync": lambda: ping(client),
        "renew": lambda: client.renewal.Renew(csr, timeout=10),
    }


READS = {"watch", "nodes", "blob", "trust"}
MAY = {
    ("olga", "auditor"): READS,
    ("pedro", "partner"): READS,
    ("wanda", "witness"): {"trust"},
    ("ana", "admin"): READS | {"publish"},
}


@pytest.mark.parametrize(("person", "role"), sorted(MAY))
def test_a_role_may_do_its_own_and_nothing_else(place, person, role):
    """An auditor reads and never submits; an admin carries what was signed and starts no run."""
    door, _ = place
    client = certified(door, person, role)
    for name, call in calls(door, client).items():
        if name in MAY[person, role]:
            assert call() is not None, name
        else:
            with refused("PERMISSION_DENIED", "not_permitted"):
                call()
                pytest.fail(f"{role} was let {name}")


@pytest.mark.parametrize(
    ("what", "person", "role", "changes", "name"),
    [
        ("somebody whom nobody named", "zoe", "auditor", {}, "trust.duties"),
        ("a role that is not theirs", "olga", "admin", {}, "trust.duties"),
        ("an admin who would audit", "ana", "auditor", {}, "trust.duties"),
        ("another person's key", "olga", "auditor", {"by": "ana"}, "trust.key"),
        ("a key nobody knows", "olga", "auditor", {"by": "mallory"}, "trust.key"),
        (
            "an old request", "olga", "auditor",
            {"at": datetime.now(UTC) - timedelta(hours=1)}, "trust.expired",
        ),
        (
            "a request of tomorrow", "olga", "auditor",
            {"at": datetime.now(UTC) + timedelta(hours=1)}, "trust.expired",
        ),
    ],
)  # fmt: skip
def test_a_certificate_that_is_not_given(place, what, person, role, changes, name):
    door, _ = place
    request, _ = asked(door, person, role, **changes)
    said = trust_refusal(name, lambda: door.enrolment_stub().JoinPerson(request, timeout=10))
    assert said, what


def test_a_signature_for_another_request(place):
    door, _ = place
    first, _ = asked(door, "olga", "auditor")
    second, _ = asked(door, "olga", "auditor", csr=first.csr_der)
    trust_refusal("trust.key", lambda: door.enrolment_stub().JoinPerson(second, timeout=10))


def test_a_request_that_asks_for_another_name(place):
    door, _ = place
    names = ("spiffe://demo.minga.example/operator/cenia",)
    request, _ = asked(door, "olga", "auditor", names=names)
    with refused("PERMISSION_DENIED", "not_permitted"):
        door.enrolment_stub().JoinPerson(request, timeout=10)


def test_a_key_of_a_node_is_not_certified_for_a_person(place):
    door, _ = place
    identity = Identity("node", "site-b")
    node = door.issue(identity)
    door.register(node, identity)
    request, _ = asked(door, "olga", "auditor", key=node.key)
    with refused("PERMISSION_DENIED", "not_permitted"):
        door.enrolment_stub().JoinPerson(request, timeout=10)


def test_a_certificate_that_the_authority_made_up_is_nobodys(place):
    """The operator owns the authority's key; whoever the list does not name is refused."""
    door, _ = place
    identity = Identity("auditor", "nobody")
    made = door.issue(identity)
    door.register(made, identity)
    trust_refusal("trust.duties", lambda: door.connect(made).admin.ListRuns(LIST, timeout=10))


def people(world, **changes):
    """The list of people with one of them changed; None: without them."""
    value = world.state.admins.model_dump(mode="json", by_alias=True)
    listed = []
    for person in value["people"]:
        change = changes.get(person["id"], {})
        if change is not None:
            listed.append(person | change)
    put = {ADMINS: Admins.from_value(value | {"people": listed}).to_bytes()}
    return propose_documents(world.base(), roles.MEMBERSHIP, "people", put=put)


def test_an_office_that_ends_ends_on_the_open_connection(tmp_path):
    with served(tmp_path, governed=True) as door:
        world = World()
        world.found_at(door, others=OTHERS)
        auditor, partner = certified(door, "olga", "auditor"), certified(door, "pedro", "partner")
        auditor.admin.ListRuns(LIST, timeout=10)
        partner.admin.ListRuns(LIST, timeout=10)

        # The term of one has ended, the office of the other is another one now.
        over = {"term_from": time_text(NOW - timedelta(days=9)), "term_until": time_text(NOW)}
        world.enact_at(door, people(world, olga=over, pedro={"roles": ["witness"]}),
                       ["ana", "bruno"])  # fmt: skip
        trust_refusal("trust.expired", lambda: auditor.admin.ListRuns(LIST, timeout=10))
        trust_refusal("trust.duties", lambda: partner.admin.ListRuns(LIST, timeout=10))
        request, _ = asked(door, "olga", "auditor")
        trust_refusal("trust.expired", lambda: door.enrolment_stub().JoinPerson(request, timeout=9))


def test_the_partner_of_a_suspended_member_reads_only_why(tmp_path):
    with served(tmp_path, governed=True) as door:
        world = World()
        world.found_at(door, others=OTHERS)
        partner = certified(door, "pedro", "partner")
        members = with_status(world.state.members, "site-a", "suspended")
        world.enact_at(door, propose_members(world.base(), members, "stop"), ["ana", "bruno"])
        trust_refusal("trust.member", lambda: partner.admin.ListRuns(LIST, timeout=10))
        assert partner.trust.File(STAMP, timeout=10).data


def test_an_admin_whose_key_changed_asks_again_with_the_new_one(tmp_path):
    now = datetime.now(UTC).replace(microsecond=0)  # NOW is as old as the test run
    with served(tmp_path, governed=True) as door:
        world = World(now=now - timedelta(minutes=9))
        world.found_at(door, others=OTHERS)
        old = certified(door, "ana", "admin")
        old.admin.ListRuns(LIST, timeout=10)
        world.now = now + timedelta(minutes=9)
        fresh = card("ana-2", "ar-univ-1", "AR")
        holder = card("ana", "ar-univ-1", "AR")
        value = holder.model_copy(update={"key": {**fresh.key, "x-minga-holder":
                                                  holder.key["x-minga-holder"]}})  # fmt: skip
        request = propose_rotation(world.base(), add=[value], remove=["ana"])
        world.now = now
        keys = {"ana-2": value.public}
        world.enact_at(door, request, ["ana", "bruno", "ana-2"], keys)
        said = trust_refusal("trust.expired", lambda: old.admin.ListRuns(LIST, timeout=10))
        assert "ask for another" in said


def test_a_person_is_in_the_log_and_reads_it(tmp_path):
    """Every certificate is a leaf, also that of a person; and nobody is certified unfounded."""
    with served(tmp_path, governed=True, log=True) as door:
        request, _ = asked(door, "olga", "auditor")
        with pytest.raises(grpc.RpcError) as caught:
            door.enrolment_stub().JoinPerson(request, timeout=10)
        assert rule(caught.value) == "trust.bootstrap"
        world = World()
        world.found_at(door, others=OTHERS)
        auditor = certified(door, "olga", "auditor")
        entries = door.ledger(lambda tx: [row.entry for row in tx.leaves(0, 200)])
        said = [found[1] for entry in entries if (found := peek(entry))]
        uris = [item.uri for item in said if isinstance(item, CertIssued)]
        assert "spiffe://demo.minga.example/auditor/olga" in uris
        stub = log_pb2_grpc.LogStub(auditor.channel)
        assert next(stub.Follow(log_pb2.FollowRequest(), timeout=20)).entries


# -- terms of office -------------------------------------------------------------------------------


def test_a_signature_after_the_term_does_not_count(tmp_path):
    """Bruno's term is over: Ana and he are one, and he is told before he signs."""
    with served(tmp_path / "fed", governed=True) as door:
        world = World()
        world.found_at(door, others=OTHERS)
        over = {"term_from": time_text(NOW - timedelta(days=9)), "term_until": time_text(NOW)}
        world.enact_at(door, people(world, bruno=over), ["ana", "bruno", "carla"])
        policy = {POLICY_DOCUMENT: world.policy(policy_version=8)}
        request = propose_policy(world.base(), policy)
        said = trust_refusal(
            "trust.quorum", lambda: world.enact_at(door, request, ["ana", "bruno"])
        )
        assert "the term of bruno" in said

        path = tmp_path / "policy.request"
        acts.write_request(path, request)
        key = tmp_path / "bruno"
        make_key(key, card("bruno", "br-univ-1", "BR").holder, "correct horse")
        with pytest.raises(TrustRefusedError, match="would not count") as caught:
            acts.sign(
                path, key, root=None, secret=lambda: "correct horse", module=None,
                confirm=lambda _: True, now=datetime.now(UTC),
            )  # fmt: skip
        assert caught.value.rule == "trust.expired"
        assert world.enact_at(door, request, ["ana", "carla"])  # two who hold the office
