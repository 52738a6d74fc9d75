"""What a node takes from a coordinator that lies about what the admins signed: nothing.

A real coordinator serves over mutual TLS; the node's trust client is the real one, with tuf's own
client in it. The lies are told by replacing what the coordinator serves, past all its own checks.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from random import Random

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner

from coordinator.ca import certificate_pem, key_pem
from infra.admin.proposals import (
    propose_agreement,
    propose_emergency,
    propose_members,
    propose_plan,
    propose_policy,
    propose_rotation,
    with_keys,
    with_status,
)
from node_agent.client import Connection
from node_agent.keys import TlsIdentity
from node_agent.trust import Trust
from policies.consortium import ConsortiumPolicy
from policies.deciding import check_successor
from policies.effect import POLICY_DOCUMENT
from protocols.canonical import canonical_bytes
from protocols.crypto.identity import Identity
from protocols.errors import IntegrityError, NotReadyError
from protocols.gen import trust_pb2
from protocols.governance.approval import approve, statement_for
from protocols.governance.building import serialize
from protocols.governance.documents import Denials
from protocols.governance.errors import TrustRefusedError
from protocols.governance.keys import ed25519_key
from protocols.governance.requests import open_request
from protocols.identifiers import FederationId, NodeId
from protocols.plan import Plan
from tests.support.door import enrol_request, served
from tests.support.plans import plan_value
from tests.support.trust import World, card, private, public

SITES = ["site-a", "site-b", "site-c"]


class Node:
    """A node's trust client on a door."""

    def __init__(self, door, folder, name="site-a"):
        self.door, self.name = door, name
        self.ahead = timedelta()
        identity = Identity("node", name)
        credentials = door.issue(identity)
        public = door.signing_key(name).public_key().public_bytes_raw()
        door.ledger(lambda tx: tx.add_node(NodeId(name), public, datetime.now(UTC)))
        door.register(credentials, identity)
        certificate = credentials.certificate
        self.tls = TlsIdentity(
            key=key_pem(credentials.key),
            chain=certificate_pem(certificate),
            root=door.root,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            serial=certificate.serial_number,
        )
        self.folder = folder / name
        self.logged = None
        self.trust = None
        self.first = door.parts.trust.first_root()

    def client(self, connection) -> Trust:
        if self.trust is None:
            self.trust = Trust(
                folder=self.folder,
                bootstrap=self.first,
                federation=FederationId("demo"),
                node=NodeId(self.name),
                connection=connection,
                now=lambda: datetime.now(UTC) + self.ahead,
                monotonic=time.monotonic,
                logged=self.logged,
            )
        self.trust.connection = connection
        return self.trust

    def forget(self):
        """A restart: only the disk remembers."""
        self.trust = None

    def refresh(self):
        async def work():
            connection = Connection(self.door.address, self.tls, rng=Random(1))
            try:
                return await self.client(connection).refresh()
            finally:
                await connection.close()

        return asyncio.run(work())

    def refuses(self, rule: str) -> str:
        """The refresh is not taken, and no plan is joined until one is."""
        with pytest.raises(TrustRefusedError) as caught:
            self.refresh()
        assert caught.value.rule == rule, str(caught.value)
        refusal = self.trust.refusal_for(plan())
        assert refusal is not None
        assert refusal.rule == rule
        return str(caught.value)


def plan(run: str = "r1", **changes) -> Plan:
    return Plan.from_value(plan_value(run=run, roster=SITES, min_participants=3) | changes)


@pytest.fixture
def place(tmp_path):
    with served(tmp_path / "fed", governed=True) as door:
        world = World()
        world.found_at(door)
        node = Node(door, tmp_path / "nodes")
        node.refresh()
        yield door, world, node


def serve(door, files: Mapping[str, bytes]) -> None:
    """The coordinator shows something else than what it verified."""
    door.parts.trust._files = dict(files)
    door.parts.trust.refresh_from_disk = lambda: None


def new_policy(world, version=8):
    return {POLICY_DOCUMENT: world.policy(policy_version=version)}


def test_only_signed_plans_are_joined(place):
    door, world, node = place
    refusal = node.trust.refusal_for(plan())
    assert refusal.rule == "trust.plan"
    world.enact_at(door, propose_plan(world.base(), plan()), ["ana", "bruno"])

    node.refresh()
    assert node.trust.refusal_for(plan()) is None
    changed = plan(title="other")
    assert node.trust.refusal_for(changed).rule == "trust.plan"
    assert node.trust.refusal_for(plan("r2")).rule == "trust.plan"


def test_before_anything_was_verified_nothing_is_joined(place):
    _, _, node = place
    node.forget()
    assert node.client(None).refusal_for(plan()).rule == "trust.bootstrap"


def test_a_rolled_back_policy(place):
    door, world, node = place
    old = dict(door.parts.trust._files)
    world.enact_at(door, propose_policy(world.base(), new_policy(world)), ["ana", "bruno"])
    node.refresh()

    serve(door, old)
    node.refuses("trust.rollback")
    node.forget()  # the disk remembers too
    node.refuses("trust.rollback")


def test_a_frozen_timestamp(place):
    _, _, node = place
    node.ahead = timedelta(days=1, minutes=5)
    node.refuses("trust.expired")


def test_an_expired_membership(place):
    """What was in force a month ago is not, however fresh the coordinator's own signatures are."""
    _, world, node = place
    world.now += timedelta(days=31)
    node.ahead = timedelta(days=31)
    serve(node.door, world.publish({}))
    assert "membership" in node.refuses("trust.expired")


def test_metadata_that_the_coordinator_signed_itself(place):
    door, world, node = place
    request = propose_policy(world.base(), new_policy(world))
    candidate = open_request(request, trusted_root=None, now=world.now).candidates[0]
    candidate.metadata.sign(CryptoSigner(world.online_key, world.online))
    files = {**request.candidate_files(), candidate.name: serialize(candidate.metadata)}

    serve(door, world.publish(files))
    node.refuses("trust.quorum")


def test_a_policy_that_one_admin_signed(place):
    door, world, node = place
    files = world.signed(propose_policy(world.base(), new_policy(world)), ["ana"])
    serve(door, world.publish(files))
    node.refuses("trust.quorum")


def test_an_expulsion_that_too_few_signed_is_not_taken_even_behind_a_later_version(place):
    """Two of three sign for the role; expelling needs three. A later version does not hide it."""
    door, world, node = place
    members = with_status(world.state.members, "site-c", "expelled")
    files = world.publish(
        world.signed(propose_members(world.base(), members, "expel"), ["ana", "bruno"])
    )
    world.state, world.files = world.verify(files, previous=world.state), files
    serve(door, files)
    node.refuses("trust.majority")

    again = propose_members(world.base(), members, "the same members once more")
    files = world.publish(world.signed(again, ["ana", "bruno"]))
    serve(door, files)
    assert "membership 2" in node.refuses("trust.majority")


def test_a_node_that_was_away_takes_several_versions_at_once(place):
    door, world, node = place
    members = with_status(world.state.members, "site-c", "expelled")
    everybody = ["ana", "bruno", "carla"]
    world.enact_at(door, propose_members(world.base(), members, "expel"), everybody)
    world.enact_at(door, propose_policy(world.base(), new_policy(world)), ["ana", "bruno"])
    world.enact_at(door, propose_policy(world.base(), new_policy(world, 9)), ["bruno", "carla"])

    state = node.refresh()
    assert (state.versions["membership"], state.versions["policy"]) == (2, 3)
    assert node.trust.refusal_for(plan()).rule in ("trust.plan", "trust.member")


def test_all_admin_keys_change_and_the_node_follows(place):
    door, world, node = place
    coming = [card("dora", "mx-1", "MX"), card("eva", "pe-1", "PE"), card("fito", "uy-1", "UY")]
    keys = {item.holder.person: item.public for item in coming}
    request = propose_rotation(world.base(), add=coming, remove=["ana", "bruno", "carla"])
    world.enact_at(door, request, ["ana", "bruno", "dora", "eva"], keys)
    assert node.refresh().root_version == 2

    world.enact_at(door, propose_plan(world.base(), plan()), ["eva", "fito"], keys)
    node.refresh()
    assert node.trust.refusal_for(plan()) is None


def test_an_emergency_stops_every_round(place):
    door, world, node = place
    world.enact_at(door, propose_plan(world.base(), plan()), ["ana", "bruno"])
    deny = Denials(institutions=(), runs=(), plans=(), code=(), certificates=(), all_rounds=True)
    world.enact_at(
        door, propose_emergency(world.base(), "stop", deny=deny, code="leak"), ["ana", "carla"]
    )

    node.refresh()
    assert node.trust.refusal_for(plan()).rule == "trust.emergency"


def test_a_node_whose_coordinator_is_silent_goes_on_with_what_it_has(place):
    door, world, node = place
    world.enact_at(door, propose_plan(world.base(), plan()), ["ana", "bruno"])
    node.refresh()
    door.stop()
    with pytest.raises(NotReadyError):
        node.refresh()
    assert node.trust.refusal_for(plan()) is None
    node.ahead = timedelta(days=31)  # and not for ever
    assert node.trust.refusal_for(plan()).rule == "trust.expired"
    door.start()


# -- the log -----------------------------------------------------------------------------------


def test_files_must_be_in_the_log(place):
    _, _, node = place
    node.forget()
    node.logged = lambda role, version: frozenset()
    with pytest.raises(NotReadyError, match="not in the witnessed log"):
        node.refresh()
    assert node.trust.refusal_for(plan()).rule == "trust.bootstrap"


def test_another_file_for_a_version_in_the_log_is_an_alarm(place):
    """The coordinator shows this node one policy and the log another."""
    _, world, node = place
    state = world.state

    def logged(role, version):
        honest = state.published.get((role, version))
        other = {"f" * 64} if role == "policy" else set()
        return frozenset({honest} | other) if honest else frozenset(other)

    node.forget()
    node.logged = logged
    node.refuses("trust.log")


def test_files_in_the_log_are_taken(place):
    _, world, node = place
    published = world.state.published
    node.forget()
    node.logged = lambda role, version: frozenset({published[(role, version)]})
    assert node.refresh().versions["policy"] == 1


# -- keys of the others ------------------------------------------------------------------------


def secure_plan(door, **keys):
    known = {name: door.signing_key(name).public_key().public_bytes_raw().hex() for name in SITES}
    return plan(
        mode="aggregate-only",
        secagg={"threshold": 3, "colluders": 0, "min_surviving": 3, "keys": known | keys},
    )


def approved(door, name, *, by=None, signing=None):
    """Enter what an institution says about its node's keys."""
    own = door.signing_key(signing or name)
    request = enrol_request(name, bytes(32), own)
    statement = statement_for(
        federation=FederationId("demo"),
        institution=NodeId(name),
        csr=request.csr_der,
        signing_key=own.public_key().public_bytes_raw(),
        now=datetime.now(UTC),
    )
    approval = approve(statement, private(by or f"institution {name}")).to_bytes()
    public = own.public_key().public_bytes_raw()
    door.ledger(lambda tx: tx.add_node(NodeId(name), public, datetime.now(UTC), approval))


def test_keys_of_a_secure_plan_are_those_the_institutions_approved(place):
    door, world, node = place
    signed = secure_plan(door)
    world.enact_at(door, propose_plan(world.base(), signed), ["ana", "bruno"])
    approved(door, "site-a")
    approved(door, "site-b")
    node.refresh()
    assert "site-c" in node.trust.refusal_for(signed).reason  # nobody vouches for it yet

    approved(door, "site-c")
    node.refresh()
    assert node.trust.refusal_for(signed) is None


@pytest.mark.parametrize("by", ["mallory", "institution site-b", "online"])
def test_a_key_that_the_coordinator_made_up(place, by):
    door, world, node = place
    mallory = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    signed = secure_plan(door, **{"site-c": mallory})
    world.enact_at(door, propose_plan(world.base(), signed), ["ana", "bruno"])
    for name in SITES[:2]:
        approved(door, name)
    approved(door, "site-c", by=by)
    node.refresh()
    assert node.trust.refusal_for(signed).rule == "trust.key"
    approved(door, "site-c")  # the right key, and the plan has another
    node.refresh()
    assert node.trust.refusal_for(signed).rule == "trust.key"


def test_a_root_of_another_federation(tmp_path):
    """The invitation pins the first root: a second founding of the coordinator's own is foreign."""
    with served(tmp_path / "fed", governed=True) as door:
        world = World()
        world.found_at(door)
        node = Node(door, tmp_path / "nodes")
        other = World(admins=(("x", "x-1", "AR"), ("y", "y-1", "BR"), ("z", "z-1", "CL")))
        other.online_key = world.online_key
        other.found()
        serve(door, other.files)
        with pytest.raises((TrustRefusedError, IntegrityError)):
            node.refresh()


# -- the delay of a new policy -------------------------------------------------------------------

HOUR = timedelta(hours=1)


@pytest.fixture
def patient(tmp_path):
    """A federation whose policies wait for 72 hours."""
    with served(tmp_path / "fed", governed=True) as door:
        world = World()
        waits = world.policy(governance__policy_delay_hours=72)
        world.found_at(door, policy={POLICY_DOCUMENT: waits})
        node = Node(door, tmp_path / "nodes")
        node.refresh()
        yield door, world, node


def counts(node, after: timedelta) -> int:
    """Which policy counts for the node so long from now."""
    return node.trust.policy(datetime.now(UTC) + after).policy_version


def next_policy(world, version=8, **changes):
    values = {"policy_version": version, "governance__policy_delay_hours": 72} | changes
    return propose_policy(world.base(), {POLICY_DOCUMENT: world.policy(**values)})


def test_a_new_policy_counts_after_its_delay_and_the_old_one_until_then(patient):
    door, world, node = patient
    world.enact_at(door, next_policy(world), ["ana", "bruno"])
    assert node.refresh().versions["policy"] == 2

    assert (counts(node, 0 * HOUR), counts(node, 71 * HOUR), counts(node, 73 * HOUR)) == (7, 7, 8)
    assert door.parts.trust.policy().policy_version == 7  # the coordinator holds it the same way

    node.forget()  # a restart does not begin the delay again, nor end it
    node.refresh()
    assert (counts(node, 71 * HOUR), counts(node, 73 * HOUR)) == (7, 8)


def test_a_leaf_that_is_dated_back_does_not_shorten_the_delay(patient):
    """The coordinator says that the policy stood in the log for years. The node was there."""
    door, world, node = patient
    world.enact_at(door, next_policy(world), ["ana", "bruno"])
    published = world.state.published
    node.logged = lambda role, version: frozenset(
        {published[(role, version)]} if (role, version) in published else set()
    )
    node.forget()
    node.client(None).logged_at = lambda role, version: datetime(2020, 1, 1, tzinfo=UTC)
    node.refresh()

    assert (counts(node, 70 * HOUR), counts(node, 73 * HOUR)) == (7, 8)


def test_the_table_in_force_counts_signatures_not_the_one_that_waits(patient):
    """An amendment makes expulsions cheaper. Until it counts, they cost what they did."""
    door, world, node = patient
    cheaper = next_policy(world, governance__decisions__expel=2)
    world.enact_at(door, cheaper, ["ana", "bruno", "carla"])
    node.refresh()

    members = with_status(world.state.members, "site-c", "expelled")
    request = propose_members(world.base(), members, "expel")
    with pytest.raises(grpc.RpcError, match="needs 3"):
        world.enact_at(door, request, ["ana", "bruno"])
    serve(door, world.publish(world.signed(request, ["ana", "bruno"])))
    node.refuses("trust.majority")


def test_an_emergency_waits_for_nothing(patient):
    door, world, node = patient
    world.enact_at(door, propose_plan(world.base(), plan()), ["ana", "bruno"])
    world.enact_at(door, next_policy(world), ["ana", "bruno"])
    deny = Denials(institutions=(), runs=(), plans=(), code=(), certificates=(), all_rounds=True)
    notice = propose_emergency(world.base(), "stop", deny=deny, code="leak")
    world.enact_at(door, notice, ["ana", "carla"])

    node.refresh()
    assert node.trust.refusal_for(plan()).rule == "trust.emergency"


def test_an_invented_older_policy_is_not_read(patient):
    """The old version is asked for by a node that comes late; a forged one is not believed."""
    door, world, node = patient
    request = next_policy(world)
    world.enact_at(door, request, ["ana", "bruno"])
    late = Node(door, node.folder.parent / "late", "site-b")
    files = dict(world.files)
    forged = world.signed(next_policy(world, 9, rounds__concurrent_max=9), ["ana"])
    name = next(name for name in forged if name.endswith("policy.json"))
    files["metadata/1.policy.json"] = forged[name]
    files |= {name: data for name, data in forged.items() if name.startswith("targets/")}
    serve(door, files)

    late.refuses("trust.quorum")


def test_a_node_that_comes_first_asks_who_read_the_programs(place):
    """At its first contact there is nothing to compare with: the names must be those of admins."""
    door, world, node = place
    value = json.loads(world.policy(policy_version=8))
    value["code"]["allowed"][0]["approved_by"] = ["ana", "nobody"]
    request = propose_policy(world.base(), {POLICY_DOCUMENT: canonical_bytes(value)})
    serve(door, world.publish(world.signed(request, EVERYBODY)))
    late = Node(door, node.folder.parent / "late", "site-b")
    assert "must have read it" in late.refuses("trust.quorum")


# -- larger budgets --------------------------------------------------------------------------------


def larger(world, version=8):
    """A policy that gives site-b more than everybody has."""
    more = [
        {"institution": "site-b", "dataset_class": "sensitive", "eps_total_micro": 9_000_000,
         "period": "P1Y"},
        {"institution": "*", "dataset_class": "sensitive", "eps_total_micro": 2_000_000,
         "period": "P1Y"},
    ]  # fmt: skip
    return world.policy(policy_version=version, privacy__budgets__overrides=more)


def agreed(world, name="site-b", *, policy=None):
    policy = ConsortiumPolicy.from_bytes(policy or larger(world))
    key = ed25519_key(public(f"institution {name}"))
    return propose_agreement(world.base(), name, policy), {f"institution {name}": key}


EVERYBODY = ["ana", "bruno", "carla"]


def test_a_larger_budget_needs_the_institution_itself(place):
    door, world, node = place
    raise_it = propose_policy(world.base(), {POLICY_DOCUMENT: larger(world)})
    with pytest.raises(grpc.RpcError, match="site-b"):
        world.enact_at(door, raise_it, EVERYBODY)
    with pytest.raises(TrustRefusedError) as caught:  # an auditor asks the same
        check_successor(world.state, world.verify(world.publish(world.signed(raise_it, EVERYBODY))))
    assert caught.value.rule == "trust.consent"
    serve(door, world.publish(world.signed(raise_it, EVERYBODY)))
    node.refuses("trust.consent")


def test_with_its_agreement_it_is_raised(place):
    door, world, node = place
    request, keys = agreed(world)
    world.enact_at(door, request, ["institution site-b"], keys)
    raise_it = propose_policy(world.base(), {POLICY_DOCUMENT: larger(world)})
    world.enact_at(door, raise_it, EVERYBODY)

    assert node.refresh().versions["policy"] == 2
    assert node.trust.policy(datetime.now(UTC)).policy_version == 8


@pytest.mark.parametrize("by", ["ana", "institution site-a"])
def test_nobody_agrees_for_another(place, by):
    door, world, node = place
    request, keys = agreed(world)
    keys = keys | {"institution site-a": ed25519_key(public("institution site-a"))}
    opened = open_request(request, trusted_root=None, now=world.now)
    known = {item.holder.person: item.public for item in world.cards} | keys
    candidate = opened.candidates[0]
    candidate.metadata.sign(CryptoSigner(private(by), known[by]))
    files = {**request.candidate_files(), candidate.name: serialize(candidate.metadata)}
    message = trust_pb2.PublishTrustRequest(files=files)
    with pytest.raises(grpc.RpcError, match="must sign"):
        door.operator().trust.Publish(message, timeout=20)
    raise_it = propose_policy(world.base(), {POLICY_DOCUMENT: larger(world)})
    serve(door, world.publish({**files, **world.signed(raise_it, EVERYBODY)}))
    node.refuses("trust.consent")


def test_an_agreement_is_to_one_policy(place):
    """It agreed to nine; ten is another policy."""
    door, world, _ = place
    request, keys = agreed(world)
    world.enact_at(door, request, ["institution site-b"], keys)
    other = larger(world).replace(b"9000000", b"9900000")
    with pytest.raises(grpc.RpcError, match="site-b"):
        world.enact_at(door, propose_policy(world.base(), {POLICY_DOCUMENT: other}), EVERYBODY)


def test_whoever_published_can_still_be_expelled_and_change_its_keys(place):
    """Its own role would otherwise keep it in: nobody else can sign it again."""
    door, world, node = place
    for name in ("site-b", "site-c"):
        request, keys = agreed(world, name)
        world.enact_at(door, request, [f"institution {name}"], keys)
    members = with_keys(world.state.members, "site-c", [public("new key of site-c").hex()])
    world.enact_at(door, propose_members(world.base(), members, "keys"), EVERYBODY)
    assert node.refresh().members.keys_of(NodeId("site-c"))

    members = with_status(world.state.members, "site-b", "expelled")
    world.enact_at(door, propose_members(world.base(), members, "expel"), EVERYBODY)
    assert node.refresh().members.get("site-b").status == "expelled"
