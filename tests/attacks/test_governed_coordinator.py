"""A governed federation at the coordinator's door: nothing runs that its admins did not sign.

The real services over mutual TLS. What is attacked here is the coordinator's own enforcement; that
nodes need not rely on it is shown in test_governed_nodes.py.
"""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from coordinator.ca import new_tls_key
from infra.admin.proposals import (
    admitted,
    propose_emergency,
    propose_founding,
    propose_members,
    propose_plan,
    propose_policy,
    propose_rotation,
    with_keys,
    with_status,
)
from policies.effect import POLICY_DOCUMENT
from protocols.crypto.identity import Identity, spki_digest
from protocols.crypto.signatures import Context, sign
from protocols.enrolment import Invitation, enrolment_proof_body
from protocols.gen import admin_pb2, enrolment_pb2, trust_pb2
from protocols.governance.approval import approve, statement_for
from protocols.governance.documents import Denials
from protocols.identifiers import NodeId
from tests.contract.test_door import Upload, ping, refused
from tests.support.door import Credentials, served
from tests.support.trust import World, card, institution, private

TRUST = ("PERMISSION_DENIED", "trust_refused")


def rule(error: grpc.RpcError) -> str:
    return dict(error.trailing_metadata() or ())["minga-rule"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A founded federation; tests leave it as they found it, or use names of their own."""
    with served(tmp_path_factory.mktemp("governed"), governed=True) as door:
        world = World()
        world.found_at(door)
        yield door, world


def trust_refusal(name: str, call) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert rule(caught.value) == name, caught.value
    return caught.value.details()


def submit(door, plan):
    request = admin_pb2.SubmitRunRequest(
        plan=plan.to_bytes(), snapshot=door.snapshots[plan.run].to_bytes()
    )
    return door.operator().admin.SubmitRun(request, timeout=20)


def test_before_the_founding_nothing_runs(tmp_path):
    with served(tmp_path, governed=True) as door:
        node = door.enrol("site-a")
        assert "founded" in trust_refusal("trust.bootstrap", lambda: ping(node))
        invite = admin_pb2.InviteRequest(institution="site-a", valid_hours=1)
        trust_refusal("trust.bootstrap", lambda: door.operator().admin.Invite(invite, timeout=10))
        plan = door.make_run("r0", submit=False, roster=["site-a", "site-b"])
        trust_refusal("trust.bootstrap", lambda: submit(door, plan))


def test_the_coordinator_takes_no_root_for_another_online_key(tmp_path):
    with served(tmp_path, governed=True) as door:
        world = World()
        files = world.signed(propose_founding(world.founding(), now=world.now), ["ana", "bruno"])
        message = trust_pb2.PublishTrustRequest(files=files)
        trust_refusal("trust.shape", lambda: door.operator().trust.Publish(message, timeout=10))


def test_an_unsigned_plan_is_not_run(place):
    door, world = place
    for site in ("site-a", "site-b", "site-c"):
        door.enrol(site)
    plan = door.make_run("p1", submit=False, roster=["site-a", "site-b", "site-c"])
    trust_refusal("trust.plan", lambda: submit(door, plan))

    world.enact_at(door, propose_plan(world.base(), plan), ["ana", "carla"])
    # Signed, and so the policy is what it is compared with: test_governed_submission.py.
    trust_refusal("terms.missing", lambda: submit(door, plan))
    other = door.make_run(
        "p1", submit=False, roster=["site-a", "site-b", "site-c"], title="another"
    )
    assert "another one" in trust_refusal("trust.plan", lambda: submit(door, other))


def test_a_plan_under_quorum_is_not_published(place):
    door, world = place
    plan = door.make_run("p2", submit=False, roster=["site-a", "site-b"])
    request = propose_plan(world.base(), plan)

    trust_refusal("trust.quorum", lambda: world.enact_at(door, request, ["ana"]))
    trust_refusal("trust.plan", lambda: submit(door, plan))


def test_publishing_again_is_harmless(place):
    door, world = place
    policy = {POLICY_DOCUMENT: world.policy(policy_version=8)}
    request = propose_policy(world.base(), policy)
    assert world.enact_at(door, request, ["ana", "bruno"])
    assert world.enact_at(door, request, ["ana", "bruno"]) == []
    # the same version with other signatures is another file: never replaced
    trust_refusal("trust.rollback", lambda: world.enact_at(door, request, ["ana", "carla"]))


def test_nobody_but_operators_publishes(place):
    door, _ = place
    with refused("PERMISSION_DENIED", "not_permitted"):
        door.enrol("site-a").trust.Publish(
            trust_pb2.PublishTrustRequest(files={"metadata/9.root.json": b"x"}), timeout=10
        )


@pytest.mark.parametrize(
    "name", ["../coordinator/keys/ca.key", "metadata/../x", "served-root", "metadata/9.root.json"]
)
def test_only_files_of_the_repository_are_served(place, name):
    door, _ = place
    with refused("NOT_FOUND", "not_found"):
        door.operator().trust.File(trust_pb2.TrustFileRequest(name=name), timeout=10)


def deny(*institutions: str) -> Denials:
    return Denials(
        institutions=institutions, runs=(), plans=(), code=(), certificates=(), all_rounds=False
    )


def test_a_suspended_member_is_refused_on_a_connection_opened_before(place):
    door, world = place
    node = door.enrol("site-c")
    assert ping(node).now_ms > 0

    request = propose_emergency(world.base(), "suspend-site-c", deny=deny("site-c"), code="leak")
    world.enact_at(door, request, ["ana", "bruno"])

    assert "suspended until" in trust_refusal("trust.emergency", lambda: ping(node))
    # it can still read why
    name = "metadata/timestamp.json"
    assert node.trust.File(trust_pb2.TrustFileRequest(name=name), timeout=10).data
    ping(door.enrol("site-b"))  # nobody else is touched


def test_a_long_stream_ends_when_its_member_is_expelled(tmp_path):
    """Twelve MiB are on their way when the admins expel the sender: the next batch is refused."""
    with served(tmp_path, governed=True) as door:
        world = World(institutions=(("a", "AR"), ("b", "BR"), ("c", "CL")))
        world.found_at(door)
        node = door.enrol("a")
        upload = Upload(door, 5_000_000)
        data = upload.data
        state = node.bulk.BeginUpload(upload.request(), timeout=10)
        members = with_status(world.state.members, "a", "expelled")
        request = propose_members(world.base(), members, "expel")

        def messages():
            mib = 2**20
            for index in range(0, len(data), mib):
                if index == 2 * mib:
                    world.enact_at(door, request, ["ana", "bruno", "carla"])
                yield data[index : index + mib]

        call = node.channel.stream_unary("/minga.v1.Bulk/Append", None, None)
        metadata = (("minga-upload-bin", state.upload_id), ("minga-offset", "0"))
        said = trust_refusal(
            "trust.member", lambda: call(messages(), metadata=metadata, timeout=30)
        )
        assert "expelled" in said


def test_a_server_only_certificate_is_no_client(place):
    door, _ = place
    with refused("UNAVAILABLE"):
        ping(door.connect(door.issue(Identity("coordinator", "coordinator"))))


# -- joining -----------------------------------------------------------------------------------


def invite(door, institution: str) -> Invitation:
    request = admin_pb2.InviteRequest(institution=institution, valid_hours=1)
    return Invitation.parse(door.operator().admin.Invite(request, timeout=10).token)


def joining(door, name: str, *, by: str | None = None, signing: str = "", csr_names=(), **changes):
    """A join request with an approval by the key ``by``, and what it is for."""
    invitation = invite(door, name) if "secret" not in changes else None
    secret = changes.pop("secret", None) or (invitation.secret if invitation else b"")
    key = new_tls_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if csr_names:
        names = [x509.UniformResourceIdentifier(uri) for uri in csr_names]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    own = door.signing_key(signing or name)
    statement = statement_for(
        federation="demo",
        institution=NodeId(changes.pop("institution", name)),
        csr=changes.pop("approved_csr", csr),
        signing_key=own.public_key().public_bytes_raw(),
        now=changes.pop("at", datetime.now(UTC)),
    )
    approval = approve(statement, private(by or f"institution {name}")).to_bytes()
    public = own.public_key().public_bytes_raw()
    proof = sign(own, Context.ENROLMENT, enrolment_proof_body(sha256(secret).digest(), csr, public))
    values = {
        "institution": name,
        "token_secret": secret,
        "csr_der": csr,
        "signing_key": public,
        "proof": proof,
        "approval": approval,
    }
    return enrolment_pb2.EnrolRequest(**values | changes), key


def join(door, request):
    return door.enrolment_stub().Join(request, timeout=10)


def test_an_approved_member_joins_and_comes_back_without_a_token(place):
    door, world = place
    invitation = invite(door, "site-a")
    assert invitation.trust_root == sha256(world.files["metadata/1.root.json"]).digest()
    request, key = joining(door, "site-a")
    answer = join(door, request)
    assert answer.trust_root == world.files["metadata/1.root.json"]
    certificate = x509.load_der_x509_certificate(answer.certificate_der)
    assert ping(door.connect(Credentials(key, certificate))).now_ms > 0
    again, _ = joining(door, "site-a", secret=b"")
    assert join(door, again).certificate_der
    found = door.enrol("site-b").trust.Approvals(trust_pb2.ApprovalsRequest(), timeout=10)
    assert "site-a" in found.approvals


def test_a_used_token_is_refused(place):
    door, _ = place
    request, _ = joining(door, "site-b")
    join(door, request)
    second, _ = joining(door, "site-b", secret=request.token_secret)
    with refused("PERMISSION_DENIED", "token_refused"):
        join(door, second)


@pytest.mark.parametrize(
    ("what", "changes", "name"),
    [
        ("no approval", {"approval": b""}, "trust.key"),
        ("another institution's key", {"by": "institution site-b"}, "trust.key"),
        ("the coordinator's own idea of a key", {"by": "mallory"}, "trust.key"),
        ("an approval of another institution", {"institution": "site-b"}, "trust.key"),
        ("an old approval", {"at": datetime(2026, 1, 1, tzinfo=UTC)}, "trust.expired"),
    ],
)
def test_a_join_without_a_proper_approval(place, what, changes, name):
    door, _ = place
    request, _ = joining(door, "site-a", **changes)
    trust_refusal(name, lambda: join(door, request))
    assert what


def test_an_approval_for_another_request(place):
    door, _ = place
    first, _ = joining(door, "site-a")
    request, _ = joining(door, "site-a", approved_csr=first.csr_der)
    trust_refusal("trust.key", lambda: join(door, request))


def test_a_stranger_is_not_invited(place):
    door, _ = place
    trust_refusal("trust.member", lambda: invite(door, "site-z"))


OWN = "spiffe://demo.minga.example/inst/site-a/node/1"


@pytest.mark.parametrize(
    "names",
    [
        (OWN, "spiffe://demo.minga.example/inst/site-b/node/1"),
        ("spiffe://demo.minga.example/inst/site-b/node/1",),
        ("spiffe://other.minga.example/inst/site-a/node/1",),
        ("spiffe://demo.minga.example/operator/site-a",),
        ("spiffe://demo.minga.example/inst/site-a0/node/1",),
    ],
)
def test_a_request_for_two_names_or_a_strangers(place, names):
    door, _ = place
    request, _ = joining(door, "site-a", csr_names=names)
    with refused("PERMISSION_DENIED", "not_permitted"):
        join(door, request)


def test_a_request_may_ask_for_its_own_name(place):
    door, _ = place
    request, _ = joining(door, "site-a", csr_names=(OWN,))
    answer = join(door, request)
    names = (
        x509.load_der_x509_certificate(answer.certificate_der)
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert [name.value for name in names] == [OWN]


def test_another_nodes_signing_key_is_refused(place):
    door, _ = place
    door.enrol("site-b")
    request, _ = joining(door, "site-a", signing="site-b")
    with refused("PERMISSION_DENIED", "not_permitted"):
        join(door, request)


def test_keys_of_an_institution_change_and_its_node_joins_again(tmp_path):
    """Another key speaks for the institution: what the old one approved has no force any more."""
    with served(tmp_path, governed=True) as door:
        world = World()
        world.found_at(door)
        request, _ = joining(door, "site-a")
        join(door, request)
        new = private("institution site-a, new").public_key().public_bytes_raw().hex()
        members = with_keys(world.state.members, "site-a", [new])
        world.enact_at(door, propose_members(world.base(), members, "keys"), ["ana", "bruno"])

        stale, _ = joining(door, "site-a", secret=b"")
        trust_refusal("trust.key", lambda: join(door, stale))
        fresh, key = joining(door, "site-a", secret=b"", by="institution site-a, new")
        certificate = x509.load_der_x509_certificate(join(door, fresh).certificate_der)
        ping(door.connect(Credentials(key, certificate)))

        members = with_status(world.state.members, "site-a", "left")
        world.enact_at(door, propose_members(world.base(), members, "leave"), ["ana", "bruno"])
        gone, _ = joining(door, "site-a", secret=b"", by="institution site-a, new")
        trust_refusal("trust.member", lambda: join(door, gone))
        back = admitted(world.state.members, institution("site-a", "AR"))
        world.enact_at(door, propose_members(world.base(), back, "back"), ["ana", "carla"])
        again, _ = joining(door, "site-a")
        assert join(door, again).certificate_der


def test_a_certificate_that_an_emergency_denies(tmp_path):
    with served(tmp_path, governed=True) as door:
        world = World()
        world.found_at(door)
        identity = Identity("node", "site-a")
        door.enrol("site-a")
        stolen = door.issue(identity)
        door.register(stolen, identity)
        client = door.connect(stolen)
        ping(client)
        deny_key = Denials(
            institutions=(), runs=(), plans=(), code=(),
            certificates=(spki_digest(stolen.certificate),), all_rounds=False,
        )  # fmt: skip
        request = propose_emergency(world.base(), "stolen", deny=deny_key, code="key-leak")
        world.enact_at(door, request, ["ana", "bruno"])

        trust_refusal("trust.emergency", lambda: ping(client))
        ping(door.enrol("site-a"))  # the institution itself may go on with another key


def test_an_operator_is_neither_admin_nor_auditor(tmp_path):
    """The founding is carried by an operator who then turns out to be on the list."""
    with served(tmp_path, governed=True) as door:
        world = World()
        world.found_at(door, others=[(card("cenia", "pa-univ-1", "PA"), ("auditor",))])
        request = admin_pb2.ListRunsRequest()
        said = trust_refusal(
            "trust.duties", lambda: door.operator().admin.ListRuns(request, timeout=10)
        )
        assert "neither admin nor auditor" in said
        # what the admins sign it may still carry: else nobody could correct the list
        policy = propose_policy(world.base(), {POLICY_DOCUMENT: world.policy(policy_version=8)})
        assert world.enact_at(door, policy, ["ana", "bruno"])


# -- rotation ----------------------------------------------------------------------------------


def test_all_admin_keys_rotate_while_nodes_go_on_calling(tmp_path):
    with served(tmp_path, governed=True) as door:
        world = World()
        world.found_at(door)
        node = door.enrol("site-a")
        ping(node)
        coming = [card("dora", "mx-1", "MX"), card("eva", "pe-1", "PE"), card("fito", "uy-1", "UY")]
        keys = {item.holder.person: item.public for item in coming}
        request = propose_rotation(world.base(), add=coming, remove=["ana", "bruno", "carla"])
        world.enact_at(door, request, ["ana", "bruno", "dora", "eva"], keys)
        ping(node)
        # the old admins have no say any more, the new ones have
        policy = propose_policy(world.base(), {POLICY_DOCUMENT: world.policy(policy_version=8)})
        world.enact_at(door, policy, ["dora", "fito"], keys)
        assert world.state.versions["root"] == 2
        door.restart()
        ping(door.enrol("site-b"))


def test_the_coordinator_goes_on_after_a_crash_between_files_and_serving(tmp_path):
    """Files that were written and never served are completed with the same bytes."""
    with served(tmp_path, governed=True) as door:
        world = World()
        world.found_at(door)
        before = door.parts.trust.file("metadata/timestamp.json")
        request = propose_policy(world.base(), {POLICY_DOCUMENT: world.policy(policy_version=8)})
        files = world.signed(request, ["ana", "bruno"])
        calls = []

        async def fails(published, acts=()):
            calls.append(published)
            raise RuntimeError("killed here")

        announce, door.parts.trust.announce = door.parts.trust.announce, fails
        message = trust_pb2.PublishTrustRequest(files=files)
        with pytest.raises(grpc.RpcError):
            door.operator().trust.Publish(message, timeout=10)
        assert len(calls) == 1
        assert door.parts.trust.file("metadata/timestamp.json") == before
        door.restart()
        assert door.parts.trust.file("metadata/timestamp.json") == before
        again = []

        async def notes(published, acts=()):
            again.append(published)
            await announce(published, acts)

        door.parts.trust.announce = notes
        door.operator().trust.Publish(message, timeout=10)
        # the very same files were put into the log: no second digest for a version
        assert [(f.role, f.version, f.sha256) for f in again[0]] == [
            (f.role, f.version, f.sha256) for f in calls[0]
        ]
        assert door.parts.trust.file("metadata/timestamp.json") != before


def test_every_file_is_a_leaf_before_it_is_served(tmp_path):
    """Order: files, leaves, checkpoint, serve. Publishing the same again adds no leaf."""
    with served(tmp_path, governed=True, log=True) as door:
        world = World()
        world.found_at(door)
        request = propose_policy(world.base(), {POLICY_DOCUMENT: world.policy(policy_version=8)})
        world.enact_at(door, request, ["ana", "bruno"])
        logged = door.ledger(lambda tx: tx.log_state().published)
        for name, digest in door.parts.trust.state().published.items():
            assert logged[name] == {digest}, name
        assert door.parts.log.hub.witnessed.size == door.ledger(lambda tx: tx.log_size())
        size = door.ledger(lambda tx: tx.log_size())
        world.enact_at(door, request, ["ana", "bruno"])
        assert door.ledger(lambda tx: tx.log_size()) == size
        assert {version for role, version in logged if role == "policy"} == {1, 2}
