"""Log before act: each thing that must stop a node does, with its rule, and a good log passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.audit.gate import (
    MISSING_AFTER_S,
    AggregateShown,
    Known,
    Passed,
    PlanShown,
    StartShown,
    Stops,
    SurvivorsShown,
    Waits,
    gate,
)
from policies.audit.replay import witness_policy
from protocols.canonical import sha256_hex
from protocols.identifiers import Digest, RoundId, RunId
from protocols.tlog.kinds import RoundAborted
from protocols.tlog.trust_policy import FRESH_S
from tests.support.leaves import NODES, D, World, log_signer

ROUND = RoundId(RunId("r1"), 0)
NOW = 1_790_000_000
A, B, C, M = NODES


def known(world, **changes):
    state = world.replay()
    policy = witness_policy(log_signer().verifier, state.witnesses)
    return replace(
        Known(log=state, policy=policy, cosigned=dict.fromkeys(NODES[:3], NOW - 10)), **changes
    )


def upto(kind):
    return World().begin().round(upto=kind)


PLAN = PlanShown(plan_sha256=Digest(World().plan_sha256), model_in=Digest(D["m0"]))
START = StartShown(attempt=1, ready=frozenset(NODES))
LISTED = SurvivorsShown(
    attempt=1, survivors=frozenset(NODES[:3]), node=A, upload_root=sha256_hex(A.encode())
)
RESULT = AggregateShown(
    attempt=1,
    sum_blob=Digest(D["c"]),
    model_out=Digest(D["m1"]),
    survivors=frozenset(NODES[:3]),
)
IN_ORDER = [
    ("round.plan", PLAN),
    ("round.start", START),
    ("round.survivors", LISTED),
    ("round.aggregate", RESULT),
]


@pytest.mark.parametrize(("kind", "shown"), IN_ORDER)
def test_what_the_log_bears_out_passes(kind, shown):
    assert gate(known(upto(kind)), ROUND, shown, now=NOW) == Passed()


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("round.join", START), ("update.commit", LISTED), ("round.survivors", RESULT)],
)
def test_what_the_log_does_not_say_yet_is_waited_for(kind, shown):
    assert isinstance(gate(known(upto(kind)), ROUND, shown, now=NOW), Waits)
    assert isinstance(gate(None, ROUND, shown, now=NOW), Waits)
    assert isinstance(gate(known(World().begin()), ROUND, PLAN, now=NOW), Waits)


@pytest.mark.parametrize(
    ("rule", "kind", "shown"),
    [
        ("log.plan", "round.plan", replace(PLAN, plan_sha256=Digest(D["a"]))),
        ("log.model_in", "round.plan", replace(PLAN, model_in=Digest(D["m1"]))),
        ("log.phase", "round.start", PLAN),
        ("log.ready", "round.start", replace(START, ready=frozenset(NODES[:3]))),
        ("log.survivors", "round.survivors", replace(LISTED, survivors=frozenset(NODES))),
        ("log.survivors", "round.survivors", replace(LISTED, upload_root=Digest(D["a"]))),
        ("log.survivors", "round.survivors", replace(LISTED, upload_root=None)),
        ("log.aggregate", "round.aggregate", replace(RESULT, model_out=Digest(D["m0"]))),
        ("log.aggregate", "round.aggregate", replace(RESULT, sum_blob=Digest(D["a"]))),
        ("log.included", "round.aggregate", replace(RESULT, survivors=frozenset(NODES))),
    ],
)
def test_stopped_by_what_the_log_says(rule, kind, shown):
    found = gate(known(upto(kind)), ROUND, shown, now=NOW)
    assert isinstance(found, Stops)
    assert found.rule == rule


@pytest.mark.parametrize(("kind", "shown"), IN_ORDER)
def test_an_old_quorum_stops_everything(kind, shown):
    stale = known(upto(kind), cosigned=dict.fromkeys(NODES, NOW - FRESH_S - 1))
    assert gate(stale, ROUND, shown, now=NOW).rule == "log.stale"
    one_fresh = known(upto(kind), cosigned={A: NOW, B: NOW - FRESH_S - 1, C: NOW - FRESH_S - 1})
    assert gate(one_fresh, ROUND, shown, now=NOW).rule == "log.stale"


@pytest.mark.parametrize(("kind", "shown"), IN_ORDER)
def test_an_alarm_stops_everything(kind, shown):
    alarm = Stops("log.second_start", "two starts")
    assert gate(known(upto(kind), alarm=alarm), ROUND, shown, now=NOW) == alarm


def test_a_missing_own_leaf_stops_joins_after_two_checkpoint_intervals():
    leaf = {Digest(D["a"]): NOW - MISSING_AFTER_S}
    assert gate(known(upto("round.plan"), undelivered=leaf), ROUND, PLAN, now=NOW) == Passed()
    found = gate(known(upto("round.plan"), undelivered=leaf), ROUND, PLAN, now=NOW + 1)
    assert isinstance(found, Stops)
    assert found.rule == "log.own_leaf"
    assert gate(known(upto("round.start"), undelivered=leaf), ROUND, START, now=NOW + 1) == Passed()


def test_an_attempt_that_the_log_ended_is_not_gone_on_with():
    world = upto("round.start")
    end = RoundAborted(attempt=1, outcome="aborted", phase="Dealing", code="lost", actor="x")
    world.say("coordinator", end, **world.subject())
    for shown in (START, LISTED):
        assert gate(known(world), ROUND, shown, now=NOW).rule == "log.phase"
