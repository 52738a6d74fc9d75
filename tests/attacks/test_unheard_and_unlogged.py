"""Nobody is expelled unheard, and nothing that admins sign takes force without its leaves.

A real coordinator with a round log; the same log is asked by nodes and auditors.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import grpc
import pytest
from tuf.api.metadata import Targets

from infra.admin.proposals import (
    propose_emergency,
    propose_members,
    propose_override,
    propose_policy,
    with_status,
)
from policies.audit.replay import LeafRefusedError, Replay
from policies.bodies import check_hearings
from policies.effect import POLICY_DOCUMENT
from policies.overrides import Override
from protocols.canonical import canonical_bytes
from protocols.governance.documents import Denials, time_text
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import parse_metadata, sha256_of
from protocols.tlog.kinds import Ballot, EmergencyNotice, OverrideGranted, PolicyProposed
from protocols.tlog.text import decode_base64
from tests.support.door import served
from tests.support.saying import A, call_to_hearing, hearing_of, log_of, say
from tests.support.trust import World

EVERYBODY = ["ana", "bruno", "carla"]
HOUR = timedelta(hours=1)


@pytest.fixture
def place(tmp_path):
    with served(tmp_path / "fed", governed=True, log=True) as door:
        world = World()
        world.found_at(door)
        yield door, world


def expel(door, world, name="site-c"):
    members = with_status(world.state.members, name, "expelled")
    return world.enact_at(door, propose_members(world.base(), members, "expel"), EVERYBODY)


def rule(call) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return dict(caught.value.trailing_metadata() or ())["minga-rule"]


def test_a_member_is_suspended_at_once_and_expelled_after_it_was_heard(place):
    door, world = place
    assert rule(lambda: expel(door, world)) == "trust.hearing"
    members = with_status(world.state.members, "site-c", "suspended")
    world.enact_at(door, propose_members(world.base(), members, "suspend"), EVERYBODY)
    assert rule(lambda: expel(door, world)) == "trust.hearing"

    hearing_of(door, "site-c")
    assert "expels site-c" in " ".join(expel(door, world))


def test_what_is_no_hearing(place):
    """Another topic, another member's statement."""
    door, world = place
    other = {"institution": "site-c", "topic": "declaration", "statement_sha256": A}
    say(door, "institution site-c", "member.statement", other)
    hearing_of(door, "site-b")
    assert rule(lambda: expel(door, world)) == "trust.hearing"


def test_silence_is_an_answer_after_three_days_and_not_before(place):
    door, world = place
    call_to_hearing(door, "ana", "site-c")
    assert rule(lambda: expel(door, world)) == "trust.hearing"
    heard, now = log_of(door).heard, datetime.now(UTC)
    assert not heard("site-c", now + 71 * HOUR)
    assert heard("site-c", now + 73 * HOUR)


def test_a_call_that_is_dated_back_is_no_older(place):
    door, world = place
    call_to_hearing(door, "ana", "site-c", ago=100 * HOUR)
    assert rule(lambda: expel(door, world)) == "trust.hearing"


def test_nobody_calls_but_an_admin(place):
    door, _ = place
    call_to_hearing(door, "institution site-b", "site-c")
    assert not log_of(door).heard("site-c", datetime.now(UTC) + 100 * HOUR)


def test_readers_ask_the_same(place):
    """A node or an auditor that is shown an expulsion looks into the log itself."""
    door, world = place
    before = world.state.members
    after, now = with_status(before, "site-c", "expelled"), datetime.now(UTC)
    with pytest.raises(TrustRefusedError) as caught:
        check_hearings(before, after, log_of(door).heard, now)
    assert caught.value.rule == "trust.hearing"
    hearing_of(door, "site-c")
    check_hearings(before, after, log_of(door).heard, now + HOUR)
    with pytest.raises(TrustRefusedError):  # a statement from after the list is none
        check_hearings(before, after, log_of(door).heard, now - HOUR)


def said(door, kind) -> list:
    rows = door.ledger(lambda tx: tx.leaves(0, tx.log_size()))
    replay = Replay()
    taken = [replay.take(row.entry) for row in rows]
    return [item.said for item in taken if isinstance(item.said, kind)]


def test_who_signed_a_policy_stands_in_the_log_before_it_counts(place):
    door, world = place
    request = propose_policy(world.base(), {POLICY_DOCUMENT: world.policy(policy_version=8)})
    world.enact_at(door, request, ["ana", "carla"])

    made = parse_metadata(world.state.metadata["policy"], Targets)
    proposal = sha256_of(made.signed_bytes)
    (proposed,) = [item for item in said(door, PolicyProposed) if item.sha256 == proposal]
    assert (proposed.role, proposed.version) == ("policy", 2)
    ballots = [item for item in said(door, Ballot) if item.proposal_sha256 == proposal]
    assert {item.approval.key for item in ballots} == set(made.signatures)
    for item in ballots:
        signature = decode_base64(item.approval.signature, "a signature").hex()
        assert signature == made.signatures[item.approval.key].signature


def test_an_emergency_and_an_override_have_their_leaves(place):
    door, world = place
    deny = Denials(institutions=(), runs=(), plans=(), code=(), certificates=(), all_rounds=True)
    world.enact_at(
        door, propose_emergency(world.base(), "stop", deny=deny, code="leak"), ["ana", "carla"]
    )
    now = datetime.now(UTC)
    override = Override.from_bytes(
        canonical_bytes(
            {
                "schema": "minga.override/1", "federation": "demo", "plan": A,
                "rule": "rounds.steps", "code": "trial", "granted_at": time_text(now),
                "expires": time_text(now + HOUR),
            }
        )
    )  # fmt: skip
    world.enact_at(door, propose_override(world.base(), override), ["ana", "bruno"])

    (notice,) = said(door, EmergencyNotice)
    assert notice.document_sha256 == world.state.targets["emergency/stop.json"].sha256
    (granted,) = said(door, OverrideGranted)
    assert (granted.plan_sha256, granted.rule) == (A, "rounds.steps")
    assert len(granted.approvals) == 2


def test_the_coordinator_has_no_vote_of_its_own(place):
    door, _ = place
    mine = Ballot(proposal_sha256=A, choice="no")
    with pytest.raises(LeafRefusedError, match="no vote"):
        door.ledger(lambda tx: tx.append_own(mine, subject="tuf/policy/9", digest=A))
