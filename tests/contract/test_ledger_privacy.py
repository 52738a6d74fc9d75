"""The coordinator's privacy ledger, on SQLite and PostgreSQL alike."""

from __future__ import annotations

from datetime import timedelta

import pytest

from coordinator.ledger import Tx
from coordinator.privacy import reserve, settle, spend_facts
from coordinator.rounds import advance
from coordinator.services.rounds import take
from policies.privacy.budget import Allowance
from policies.privacy.caps import Cap, cap_for
from policies.privacy.claim import claim_of
from policies.privacy.sensitivity import Unit
from protocols.errors import EquivocationError, PlanRefusedError
from protocols.identifiers import NodeId, RoundId, RunId
from protocols.rounds import Burned, JoinArrived, Open, Released, StopRequested
from tests.support.ledger_urls import url, with_ledger
from tests.support.ledgers import NODES, ROUND, RUN, START, begin, first_phase, make_plan
from tests.support.ledgers import snapshot_bytes as start_of
from tests.support.postgres import postgres

__all__ = ["postgres", "url"]  # fixtures

KEYS = {node: f"{i + 1:x}" * 64 for i, node in enumerate(NODES)}
RECORD = {
    "unit": "document",
    "max_sequences": 4,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "sampling_rate": 0.05,
    "expected_batch": 16.0,
    "steps": 10,
    "delta": "1e-5",
}
LATER = START + timedelta(seconds=1)


def private(run: str = RUN, **changes):
    secagg = {"threshold": 3, "colluders": 1, "min_surviving": 3, "keys": KEYS}
    fields = {"mode": "record-local", "min_participants": 3, "secagg": secagg, "privacy": RECORD}
    return make_plan(run, rounds=3, **fields | changes)


def claim(run: str = RUN, **changes):
    return claim_of(private(run, **changes), 0, 1000)


def start(tx: Tx, **changes):
    plan = begin(tx, private(**changes))
    tx.add_claim(plan.run_id, claim_of(plan, 0, 1000))
    return plan


def cap(epsilon: float, institution: str = "*") -> Cap:
    allowance = Allowance(dataset="default", unit=Unit.DOCUMENT, epsilon=epsilon, delta=1e-5)
    return Cap(institution=institution, allowance=allowance)


def join(tx: Tx, node: NodeId, caps=()) -> None:
    take(tx, "join", ROUND, JoinArrived(node), START, caps=caps)


def statuses(tx: Tx, round_: RoundId = ROUND) -> dict[str, str]:
    return {spend.node: spend.status.value for spend in tx.spends_of_round(round_)}


def test_a_join_reserves_what_the_round_costs_once(url):
    async def story(ledger):
        await ledger.run("begin", start)
        for _ in range(2):  # the answer was lost: said again
            await ledger.run("join", lambda tx: join(tx, NODES[0]))
        assert await ledger.read("look", statuses) == {NODES[0]: "reserved"}
        kept = await ledger.read("claim", lambda tx: tx.claim(RUN))
        assert kept == claim()
        other = claim_of(private(privacy=RECORD | {"steps": 11}), 0, 1000)
        with pytest.raises(EquivocationError):
            await ledger.run("s", lambda tx: tx.reserve_spend(ROUND, NODES[0], other, START))

    with_ledger(url, story)


def test_a_join_beyond_the_cap_is_refused_and_leaves_nothing(url):
    async def story(ledger):
        await ledger.run("begin", start)
        with pytest.raises(PlanRefusedError) as refused:
            await ledger.run("join", lambda tx: join(tx, NODES[0], [cap(1.0)]))
        assert refused.value.rule == "privacy.budget"
        assert await ledger.read("look", statuses) == {}
        phase = await ledger.read("phase", lambda tx: tx.round(ROUND).phase)
        assert isinstance(phase, Open)
        assert phase.joined == frozenset()

    with_ledger(url, story)


def test_two_runs_of_one_data_set_share_its_cap(url):
    async def story(ledger):
        await ledger.run("begin", start)
        caps = [cap(2.5)]  # one round costs 2.3 at half of delta, two 2.7
        await ledger.run("join", lambda tx: join(tx, NODES[0], caps))

        def second(tx: Tx):
            plan = private("andes-2")
            tx.add_run(plan, start_of(), START)
            tx.add_claim(plan.run_id, claim("andes-2"))
            round_ = RoundId(RunId("andes-2"), 0)
            tx.open_round(
                round_,
                index=0,
                phase=first_phase(plan),
                start_snapshot=start_of(),
                why="the first round",
                now=START,
            )
            return tx.run(plan.run_id), tx.round(round_)

        run, row = await ledger.run("begin", second)
        with pytest.raises(PlanRefusedError, match="would be"):
            await ledger.run("j", lambda tx: reserve(tx, run, row, NODES[0], caps, START))
        await ledger.run("j", lambda tx: reserve(tx, run, row, NODES[1], caps, START))

    with_ledger(url, story)


@pytest.mark.parametrize(
    ("phase", "wanted"),
    [
        (Released(attempt=1, survivors=frozenset(NODES[:3])), ["released"] * 3 + ["void"]),
        (Burned(code="x", reason="y"), ["void"] * 4),  # nobody had begun to send
    ],
)
def test_what_ends_a_round_settles_its_spends(url, phase, wanted):
    async def story(ledger):
        keep = {"kind": "synthetic", "synthetic": {"delta": 0.0}, "keep_optimizer": False}
        await ledger.run("begin", lambda tx: start(tx, local_step=keep))
        for node in NODES:
            await ledger.run("join", lambda tx, node=node: join(tx, node))
        row = await ledger.read("round", lambda tx: tx.round(ROUND))
        await ledger.run("end", lambda tx: settle(tx, row, phase, LATER))
        await ledger.run("end", lambda tx: settle(tx, row, Burned(code="x", reason="y"), LATER))
        assert list((await ledger.read("look", statuses)).values()) == wanted

    with_ledger(url, story)


def test_steps_whose_state_is_kept_stay_charged_when_their_round_is_stopped(url):
    async def story(ledger):
        await ledger.run("begin", start)
        await ledger.run("join", lambda tx: join(tx, NODES[0]))
        await ledger.run(  # in Open nothing was trained
            "stop", lambda tx: advance(tx, ROUND, StopRequested("x"), LATER, transaction="stop")
        )
        assert await ledger.read("look", statuses) == {NODES[0]: "void"}

    with_ledger(url, story)

    async def trained(ledger):
        await ledger.run("begin", start)
        for node in NODES:
            await ledger.run("join", lambda tx, node=node: join(tx, node))
        await ledger.run(
            "stop", lambda tx: advance(tx, ROUND, StopRequested("x"), LATER, transaction="stop")
        )
        assert set((await ledger.read("look", statuses)).values()) == {"burned"}

    if url.startswith("sqlite"):
        with_ledger(url.replace(".sqlite", "-2.sqlite"), trained)


def test_the_nearest_cap_applies_and_facts_say_what_is_left():
    caps = [cap(8.0), cap(3.0, "bogota")]
    assert cap_for(caps, NodeId("bogota"), claim()).epsilon == 3.0
    assert cap_for(caps, NodeId("cusco"), claim()).epsilon == 8.0
    assert cap_for([], NodeId("cusco"), claim()) is None
    facts = spend_facts(private(), claim(), {}, caps, START)
    assert [fact.node for fact in facts] == list(NODES)
    assert {(fact.budget, fact.rounds_left) for fact in facts} == {("8", 3), ("3", 3)}
    assert {fact.epsilon for fact in facts} == {"0.000"}
    unlimited = spend_facts(private(), claim(), {}, [], START)
    assert {(fact.budget, fact.rounds_left) for fact in unlimited} == {("", 0)}
