"""What operators are told of privacy: before a run by PlanRun, during it by ShowRun."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from infra.runs.facts import read_run_facts, run_to_json
from infra.runs.show import console, run_view
from policies.privacy.budget import Allowance
from policies.privacy.caps import Cap
from policies.privacy.sensitivity import Unit
from protocols.errors import NotPermittedError, PlanRefusedError
from protocols.gen import admin_pb2
from protocols.identifiers import NodeId
from tests.support.ledgers import NODES
from tests.support.policies import policy
from tests.support.spine_world import AS, PERSON, A, B, story

KEYS = {node: f"{i + 1:x}" * 64 for i, node in enumerate(NODES)}
PRIVATE = {
    "mode": "record-local",
    "min_participants": 3,
    "secagg": {"threshold": 3, "colluders": 1, "min_surviving": 3, "keys": KEYS},
    "privacy": {
        "unit": "document",
        "max_sequences": 4,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "sampling_rate": 0.05,
        "expected_batch": 16.0,
        "steps": 10,
        "delta": "1e-5",
    },
}


def caps(epsilon: float, institution: str = "*") -> tuple[Cap, ...]:
    allowance = Allowance(dataset="default", unit=Unit.DOCUMENT, epsilon=epsilon, delta=1e-5)
    return (Cap(institution=institution, allowance=allowance),)


def ask(w):
    request = admin_pb2.PlanRunRequest(plan=w.plan.to_bytes(), coordinates=300)
    return w.spine.admin.PlanRun(request, PERSON)


def test_a_plan_says_what_it_will_have_cost_and_who_would_refuse():
    async def play(w):
        w.spine.admin._caps = caps(8.0) + caps(1.0, B)
        sites = {site.node: site for site in (await ask(w)).sites}
        assert set(sites) == set(NODES)
        assert sites[A].rule == ""
        assert 2.0 < float(sites[A].after) < 2.5
        assert (sites[B].rule, sites[B].rounds) == ("privacy.budget", 0)
        before = await w.spine.ledger.read("l", lambda tx: tx.spends_of_data(A, "default"))
        assert before == []  # asking records nothing

        await w.join(A)  # another run, or this one: it is reserved, so it counts
        again = {site.node: site for site in (await ask(w)).sites}
        assert float(again[A].before) == pytest.approx(float(sites[A].after), abs=0.01)
        await w.spine.ledger.run("s", lambda tx: tx.set_node_status(NodeId(A), "suspended", "x"))
        assert {s.node: s.rule for s in (await ask(w)).sites}[A] == "plan.roster"

    story(play, **PRIVATE)


def test_only_operators_ask():
    async def play(w):
        with pytest.raises(NotPermittedError):
            await w.spine.admin.PlanRun(admin_pb2.PlanRunRequest(), AS[A])

    story(play)


def test_a_join_beyond_the_federations_budget_is_refused_at_the_door():
    async def play(w):
        w.spine.rounds._caps = caps(1.0, A)
        with pytest.raises(PlanRefusedError) as refused:
            await w.join(A)
        assert refused.value.rule == "privacy.budget"
        await w.join(B)

    story(play, **PRIVATE)


@pytest.mark.parametrize(
    ("written", "signed", "rule"),
    [
        (100.0, 1_000_000, "privacy.budget"),  # the operator gives more than the admins signed
        (1.0, 100_000_000, "privacy.budget"),  # or less
        (100.0, 0, "privacy.budget"),
        (100.0, 100_000_000, None),
    ],
)
def test_of_the_signed_budget_and_the_operators_the_tighter_counts(written, signed, rule):
    in_force = policy({"privacy.budgets.default.eps_total_micro": signed})

    async def play(w):
        w.spine.rounds._caps = caps(written)
        w.spine.rounds._trust = SimpleNamespace(policy=lambda: in_force)
        if rule is None:
            await w.join(A)
            return
        with pytest.raises(PlanRefusedError) as refused:
            await w.join(A)
        assert refused.value.rule == rule

    story(play, **PRIVATE)


def test_a_shown_run_says_what_is_spent_left_and_how_many_more_rounds_it_buys():
    async def play(w):
        w.spine.admin._caps = caps(8.0)
        await w.join(A)
        report = read_run_facts(await w.facts())
        spent = {entry.node: entry for entry in report.spent}
        assert (spent[A].rounds, spent[B].rounds) == (1, 0)
        assert float(spent[A].left) == pytest.approx(8 - float(spent[A].epsilon), abs=1e-3)
        assert spent[A].rounds_left == 1  # as many as the plan has
        facts = run_to_json(report)
        assert facts["privacy"][0]["budget"] == "8"
        out = console()
        with out.capture() as said:
            out.print(run_view(report))
        words = " ".join(said.get().split())  # however wide the terminal is
        assert "Privacy by document, data set default" in words
        assert "differentially private by document" in words

    story(play, **PRIVATE)


@pytest.mark.parametrize("mode", ["open", "aggregate-only"])
def test_a_mode_without_noise_is_called_that(mode):
    secure = {key: PRIVATE[key] for key in ("mode", "min_participants", "secagg")}

    async def play(w):
        report = read_run_facts(await w.facts())
        out = console()
        with out.capture() as said:
            out.print(run_view(report))
        words = " ".join(said.get().split())  # however wide the terminal is
        assert f"mode {mode}" in words
        assert "not differentially private" in words
        assert "not differentially private" in run_to_json(report)["promise"]
        assert report.spent == ()

    story(play, **({} if mode == "open" else secure | {"mode": mode}))
