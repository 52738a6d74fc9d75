"""What nodes claim to have used, votes that nobody cast, and which policy counted when."""

from __future__ import annotations

import base64
from datetime import timedelta

import pytest
from tuf.api.metadata import Targets

from infra.admin.proposals import propose_members, propose_policy, with_status
from policies.audit.records import Result
from policies.effect import POLICY_DOCUMENT
from protocols.governance.repository import parse_metadata, sha256_of
from protocols.tlog import kinds
from tests.support.audit_run import NODES
from tests.unit.test_audit_signed import Governed, answers


class Tight(Governed):
    """A federation whose policy allows a round very little of one thing."""

    def __init__(self, **resources: int) -> None:
        self.resources = {f"resources__{name}": value for name, value in resources.items()}
        super().__init__()

    def policy(self, **changes):
        return super().policy(**self.resources, **changes)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("energy_wh_round", "Wh"),
        ("bandwidth_bytes_node", "bytes"),
    ],
)
def test_what_a_round_claims_beyond_its_plan_fails(name, unit):
    made = Tight(**{name: 0})
    made.sign_plan()
    made.round()
    failed = [record for record in made.audit().failed if record.id == "20"]
    assert len(failed) == 1
    assert unit in failed[0].reason


def test_what_is_within_the_policy_is_added_up_and_not_failed():
    made = Tight(gpu_minutes_round=10**6)
    made.sign_plan()
    made.round()
    assert [record for record in made.audit().failed if record.id == "20"] == []


# -- ballots and hearings --------------------------------------------------------------------------


def ballot(made: Governed, request, *, forge: bool) -> None:
    """The coordinator enters one vote and publishes; the vote is one of the signatures, or not."""
    files = made.world.signed(request, ["ana", "bruno", "carla"])
    made.world.files = files = made.world.publish(files)
    made.world.state = state = made.world.verify(files, previous=made.world.state)
    signed = parse_metadata(state.metadata["policy"], Targets)
    keyid, signature = next(iter(signed.signatures.items()))
    raw = bytes.fromhex(signature.signature)
    approval = kinds.Approval(
        key=keyid, signature=base64.b64encode(bytes(64) if forge else raw).decode()
    )
    said = kinds.Ballot(
        proposal_sha256=sha256_of(signed.signed_bytes), choice="yes", approval=approval
    )
    made.run.say("coordinator", said)
    made.publish()


@pytest.mark.parametrize("forge", [False, True])
def test_a_vote_that_nobody_cast_is_found(forge):
    made = Governed()
    request = propose_policy(made.world.base(), {POLICY_DOCUMENT: made.policy(policy_version=2)})
    ballot(made, request, forge=forge)
    first = made.audit().first
    assert (first is None) is not forge, first
    assert first is None or "nobody cast" in first.reason


def test_an_expulsion_before_a_hearing_convicts_its_publication():
    made = Governed()
    members = with_status(made.world.state.members, NODES[3], "expelled")
    made.enact(propose_members(made.world.base(), members, "expel"))
    first = made.audit().first
    assert first is not None
    assert "was not heard" in first.reason


# -- the delay of a policy -------------------------------------------------------------------------


class Patient(Governed):
    """Policies wait for 72 hours."""

    def policy(self, **changes):
        return super().policy(governance__policy_delay_hours=72, **changes)


@pytest.mark.parametrize(("hours", "version"), [(71, 1), (73, 2)])
def test_an_auditor_knows_which_policy_counted(hours, version):
    made = Patient()
    made.enact(propose_policy(made.world.base(), {POLICY_DOCUMENT: made.policy(policy_version=2)}))
    made.run.clock += timedelta(hours=hours)
    made.sign_plan()
    made.round()
    found = made.audit()
    (record,) = [r for r in found.records if r.id == "3"]
    assert f"policy {version} and all" in record.reason, record
    assert record.result is Result.PASS
    state = next(iter(found.evidence.rounds.values()))
    assert found.evidence.policy_at(state.plan_at).policy_version == version
    assert answers(found, "2")


@pytest.mark.parametrize(("hours", "result"), [(47, Result.UNKNOWN), (49, Result.PASS)])
def test_an_objection_after_its_window_waits_for_nobody(hours, result):
    """The policy gives 48 hours; within them an objection that nobody resolved stays open."""
    made = Governed()
    made.sign_plan()
    run = made.run
    run.open_round()
    world = run.start_attempt()
    run.upload(world, NODES)
    honest = run.say

    def say(who, said, **about):
        if isinstance(said, kinds.RoundObjection):
            run.clock += timedelta(hours=hours)
        return honest(who, said, **about)

    run.say = say
    run.release(world, objection=NODES[-1])
    (record,) = [r for r in made.audit().records if r.id == "22"]
    assert record.result is result, record
