"""The node's own privacy ledger: reserve, record, refuse; and what the guard asks of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from node_agent.config import BudgetConfig, DataConfig, PrivacyConfig
from node_agent.decide import SettleSpend, decide
from node_agent.journal import Journal
from node_agent.privacy import PrivacyGuard, check_budget
from node_agent.privacy_ledger import PrivacyLedger
from node_agent.spent import privacy_facts, privacy_lines
from policies.privacy.budget import Allowance, SpendStatus
from policies.privacy.claim import claim_of
from policies.privacy.sensitivity import Unit
from protocols.errors import CorruptStateError, EquivocationError, PlanRefusedError
from protocols.identifiers import RoundId, RunId
from protocols.rounds import Aborted, Released, Training
from tests.support.node import NOW, ROUND, joined, node_config, round_seen, run_seen, situation
from tests.support.private_plans import private_plan

from tests.support.node import uploaded  # isort: skip

D = 1000
PLAN = private_plan("record-local")  # one round costs 2.16 at 1e-5, 2.3 at half of it
CLAIM = claim_of(PLAN, 0, D)
OTHER = RoundId(RunId("r2"), 0)
NO_STATE = {"local_step.keep_optimizer": False}


def allowance(epsilon: float, **changes) -> Allowance:
    values = {"dataset": "default", "unit": Unit.DOCUMENT, "epsilon": epsilon, "delta": 1e-5}
    return Allowance(**values | changes)


@pytest.fixture
def ledger(tmp_path):
    made = PrivacyLedger(tmp_path / "privacy.sqlite", now=lambda: NOW)
    yield made
    made.close()


def config(epsilon: float = 8.0, *, dataset: str = "default", unit: Unit = Unit.DOCUMENT, **data):
    budget = BudgetConfig(dataset=dataset, unit=unit, epsilon=epsilon, delta=1e-5)
    return replace(node_config(), data=DataConfig(**data), privacy=PrivacyConfig(budget=(budget,)))


@pytest.fixture
def guard(tmp_path, ledger):
    journal = Journal(tmp_path / "journal.sqlite", now=lambda: NOW)
    yield PrivacyGuard(ledger=ledger, journal=journal, config=config())
    journal.close()


def statuses(ledger):
    return {str(row.round): row.status.value for row in ledger.records()}


# -- the ledger --------------------------------------------------------------------------------


def test_reserving_again_is_the_same_yes_and_costs_once(ledger):
    for _ in range(2):
        assert ledger.reserve(ROUND, CLAIM, allowance(2.5)) is None
    assert statuses(ledger) == {"r1/0": "reserved"}


def test_two_runs_share_a_budget(ledger):
    """The second run has terms of its own; the data are the same."""
    assert ledger.reserve(ROUND, CLAIM, allowance(2.5)) is None
    refusal = ledger.reserve(OTHER, CLAIM, allowance(2.5))
    assert refusal.rule == "privacy.budget"
    assert "default" in refusal.reason
    assert ledger.reserve(OTHER, CLAIM, allowance(2.5, dataset="letters")) is None


def test_runs_of_other_terms_share_it_too(ledger):
    """By a filter at an order that the budget fixes, at half of delta."""
    other = claim_of(private_plan("record-local", {"privacy.noise_multiplier": 1.5}), 0, D)
    assert ledger.reserve(ROUND, CLAIM, allowance(8.0)) is None
    assert ledger.reserve(OTHER, other, allowance(8.0)) is None
    spent = allowance(8.0).spent([row.spend for row in ledger.records()])
    assert spent.order == allowance(8.0).adaptive.orders[0]
    third = RoundId(RunId("r3"), 0)
    assert ledger.reserve(third, other, allowance(spent.epsilon)).rule == "privacy.budget"


@pytest.mark.parametrize("last", ["reserve", "start"])
def test_a_crash_between_reserving_and_recording_ends_as_spent(tmp_path, last):
    path = tmp_path / "privacy.sqlite"
    before = PrivacyLedger(path, now=lambda: NOW)
    before.reserve(ROUND, CLAIM, allowance(2.5))
    if last == "start":
        before.start(ROUND)
    del before  # killed: nothing was recorded, nothing closed

    after = PrivacyLedger(path, now=lambda: NOW + timedelta(days=9))
    assert [row.spend.counts for row in after.records()] == [True]
    assert after.reserve(OTHER, CLAIM, allowance(2.5)).rule == "privacy.budget"
    assert path.stat().st_mode & 0o777 == 0o600
    after.close()


def test_what_is_spent_is_never_given_back(ledger):
    ledger.reserve(ROUND, CLAIM, allowance(8.0))
    assert ledger.settle(ROUND, SpendStatus.BURNED, "x")
    assert not ledger.settle(ROUND, SpendStatus.RELEASED, "it was opened after all")
    with pytest.raises(EquivocationError):
        ledger.settle(ROUND, SpendStatus.VOID, "x")
    assert statuses(ledger) == {"r1/0": "burned"}
    assert ledger.reserve(ROUND, CLAIM, allowance(8.0)).rule == "privacy.settled"


def test_a_refund_is_a_refund_and_final(ledger):
    ledger.reserve(ROUND, CLAIM, allowance(2.5))
    ledger.settle(ROUND, SpendStatus.VOID, "nothing left")
    assert ledger.reserve(OTHER, CLAIM, allowance(2.5)) is None
    with pytest.raises(EquivocationError):
        ledger.settle(ROUND, SpendStatus.RELEASED, "x")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"unit": Unit.INSTITUTION}, "privacy.mixed_units"),
        ({"starts_at": NOW + timedelta(days=1)}, "privacy.period"),
        ({"ends_at": NOW}, "privacy.period"),
    ],
)
def test_other_refusals(ledger, change, rule):
    assert ledger.reserve(ROUND, CLAIM, allowance(8.0, **change)).rule == rule


def test_a_period_counts_its_own_spends(tmp_path):
    clock = [NOW]
    made = PrivacyLedger(tmp_path / "privacy.sqlite", now=lambda: clock[0])
    made.reserve(ROUND, CLAIM, allowance(2.5))
    clock[0] = NOW + timedelta(days=365)
    fresh = allowance(2.5, starts_at=NOW + timedelta(days=300))
    assert made.reserve(OTHER, CLAIM, fresh) is None
    made.close()


def test_a_round_at_another_cost_is_a_contradiction(ledger):
    ledger.reserve(ROUND, CLAIM, allowance(8.0))
    with pytest.raises(EquivocationError):
        ledger.reserve(ROUND, claim_of(PLAN, 0, 10 * D), allowance(8.0)) or pytest.fail("taken")


def test_a_damaged_row_stops_everything(tmp_path):
    import sqlite3

    path = tmp_path / "privacy.sqlite"
    made = PrivacyLedger(path, now=lambda: NOW)
    made.reserve(ROUND, CLAIM, allowance(8.0))
    made.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE spends SET claim = replace(claim, 'default', 'Default')")
    made = PrivacyLedger(path, now=lambda: NOW)
    with pytest.raises(CorruptStateError, match="r1/0"):
        made.reserve(OTHER, CLAIM, allowance(8.0))
    made.close()


# -- the guard ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        (config(), None),
        (config(dataset="letters"), "privacy.no_budget"),
        (config(unit=Unit.INSTITUTION), "privacy.no_budget"),
        (replace(config(), privacy=PrivacyConfig()), "privacy.no_budget"),
        (config(dataset="letters", train=()), "privacy.no_budget"),
    ],
)
def test_a_site_without_a_fitting_budget_declines(made, rule):
    refusal = check_budget(PLAN, made)
    assert (refusal.rule if refusal else None) == rule


def test_a_site_of_other_data_or_private_held_out_text_declines():
    other = private_plan("record-local", {"privacy.dataset": "letters"})
    assert check_budget(other, config()).rule == "privacy.dataset"
    scored = private_plan(
        "record-local", {"evaluation.languages": ["es"], "privacy.held_out": "public"}
    )
    assert check_budget(scored, config()).rule == "privacy.held_out"
    public = replace(config(), data=DataConfig(valid_public=True))
    assert check_budget(scored, public) is None


def test_a_coordinator_that_lost_or_forged_its_ledger_changes_nothing(guard):
    """The guard is asked with what the node has; there is nothing a coordinator could add."""
    guard.config = config(2.5)
    assert guard.reserve(PLAN, ROUND, 0, D) is None
    forged = RoundId(RunId("r1"), 7)  # "a fresh round, nothing was ever spent"
    assert guard.reserve(PLAN, forged, 0, D).rule == "privacy.budget"


def test_nothing_is_made_or_sent_of_a_round_that_is_not_reserved(guard):
    with pytest.raises(PlanRefusedError) as refused:
        guard.check(PLAN, ROUND, 0)
    assert refused.value.rule == "privacy.not_reserved"
    guard.reserve(PLAN, ROUND, 0, D)
    guard.check(PLAN, ROUND, 0)
    guard.starts(PLAN, ROUND, 0)
    guard.releases(ROUND)
    guard.check(PLAN, ROUND, 0)  # its shares may be revealed again
    guard.check(PLAN, OTHER, PLAN.rounds)  # a round that only evaluates


def test_a_round_that_was_given_up_stays_out_whatever_phase_is_shown(guard):
    """A coordinator that says "aborted" and then "uploading" gets nothing."""
    plan = private_plan("record-local", NO_STATE)
    guard.reserve(plan, ROUND, 0, D)
    guard.starts(plan, ROUND, 0)
    assert guard.over(plan, ROUND, in_sum=False) is SpendStatus.VOID
    with pytest.raises(PlanRefusedError, match="void"):
        guard.check(plan, ROUND, 0)


def test_steps_that_live_on_are_spent(guard):
    guard.reserve(PLAN, ROUND, 0, D)
    guard.starts(PLAN, ROUND, 0)
    assert guard.over(PLAN, ROUND, in_sum=False) is SpendStatus.BURNED
    assert guard.over(PLAN, ROUND, in_sum=False) is None  # settled: nothing more to say


def test_a_round_that_began_no_step_is_refunded(guard):
    guard.reserve(PLAN, ROUND, 0, D)
    assert guard.over(PLAN, ROUND, in_sum=False) is SpendStatus.VOID


def test_a_vector_that_was_made_is_spent(guard):
    plan = private_plan("record-local", NO_STATE)
    guard.reserve(plan, ROUND, 0, D)
    guard.journal.add_upload(uploaded(), {})
    assert guard.over(plan, ROUND, in_sum=False) is SpendStatus.BURNED


def test_a_lost_ledger_is_noticed(tmp_path, guard):
    guard.journal.add_run(PLAN)
    guard.reserve(PLAN, ROUND, 0, D)
    guard.journal.add_decision(ROUND, index=0, start_root=PLAN.model.initial, refusal=None)
    assert guard.reserve(PLAN, RoundId(RunId("r1"), 1), 0, D) is None
    fresh = PrivacyLedger(tmp_path / "new.sqlite", now=lambda: NOW)
    guard.ledger = fresh
    assert guard.reserve(PLAN, RoundId(RunId("r1"), 2), 0, D).rule == "privacy.ledger_lost"
    fresh.close()


# -- when it is told -----------------------------------------------------------------------------

MEMBERS = frozenset({"a", "b", "c"})


@pytest.mark.parametrize(
    ("phase", "wanted"),
    [
        (Training(terms=None, closes_at=NOW, cohort=MEMBERS), None),
        (Aborted(code="x", reason="y"), False),
        (Released(attempt=1, survivors=MEMBERS), True),
        (Released(attempt=1, survivors=MEMBERS - {"a"}), False),
    ],
)
def test_a_round_is_settled_when_it_is_over(phase, wanted):
    seen = run_seen(round_seen(phase))
    made = situation(seen, plan=PLAN, record=joined(outcome="ready"), reserved=(ROUND,))
    settles = [a for a in decide(made).actions if isinstance(a, SettleSpend)]
    assert settles == ([] if wanted is None else [SettleSpend(ROUND, wanted)])


# -- what people see -----------------------------------------------------------------------------


def test_status_says_what_is_spent_and_how_many_rounds_the_rest_buys(tmp_path):
    from node_agent.config import NodeFolder

    node = NodeFolder(tmp_path)
    made = PrivacyLedger(node.privacy, now=lambda: datetime.now(UTC))
    made.reserve(ROUND, CLAIM, allowance(8.0))
    made.close()
    journal = Journal(node.journal, now=lambda: datetime.now(UTC))
    journal.add_run(PLAN)
    journal.close()
    facts = privacy_facts(node, config(8.0), datetime.now(UTC))
    (entry,) = facts
    assert (entry["budget"], entry["rounds"]) == ("8", 1)
    assert 2.1 < float(entry["spent"]) < 2.5
    assert entry["runs"][0]["more_rounds"] == PLAN.rounds
    told = "\n".join(privacy_lines(facts))
    assert "of 8 spent" in told
    assert "buys 2 more" in told
    poor = privacy_facts(node, config(2.4), datetime.now(UTC))
    assert poor[0]["runs"][0]["more_rounds"] == 0
    none = privacy_facts(node, replace(config(), privacy=PrivacyConfig()), datetime.now(UTC))
    assert privacy_lines(none) == ["privacy of data set default: no budget is set"]


# -- in the agent's hands --------------------------------------------------------------------------


class Sum:
    """A secure sum that only notes what the ledger says when it is asked to go on."""

    def __init__(self, ledger):
        self.ledger, self.steps = ledger, []

    def _note(self, step, round_):
        record = self.ledger.record(round_)
        self.steps.append((step, record.status.value if record else None))

    async def commit(self, round_, _number):
        self._note("commit", round_)

    async def reveal(self, round_, _number):
        self._note("reveal", round_)


def hands(guard, plan):
    """The agent's hands on a round that its journal joined."""
    from types import SimpleNamespace

    from node_agent.acting import Actor

    guard.journal.add_run(plan)
    guard.journal.add_decision(ROUND, index=0, start_root=plan.model.initial, refusal=None)
    secure = Sum(guard.ledger)
    actor = Actor(
        site=SimpleNamespace(privacy=guard, journal=guard.journal),
        run_seen=lambda _: None,
        seen=lambda _: None,
        clock_offset=timedelta,
        refuse=lambda *_: None,
        wake=lambda: None,
        secure=secure,
    )
    return actor, secure


def step(actor, kind):
    import asyncio

    from node_agent.decide import SecureStep

    asyncio.run(actor.perform(SecureStep(ROUND, 1, kind)))


def test_a_release_is_recorded_before_a_share_is_revealed(guard):
    guard.reserve(PLAN, ROUND, 0, D)
    actor, secure = hands(guard, PLAN)
    step(actor, "commit")
    step(actor, "reveal")
    step(actor, "reveal")  # the answer was lost: said again
    assert secure.steps == [("commit", "reserved"), ("reveal", "released"), ("reveal", "released")]


@pytest.mark.parametrize("kind", ["commit", "reveal"])
@pytest.mark.parametrize("given_up", [False, True])
def test_a_node_neither_commits_nor_reveals_without_a_reservation(guard, kind, given_up):
    """A coordinator that shows the round as going on after the node wrote it off gets nothing."""
    plan = private_plan("record-local", NO_STATE)
    actor, secure = hands(guard, plan)
    if given_up:
        guard.ledger.reserve(ROUND, claim_of(plan, 0, D), allowance(8.0))
        guard.over(plan, ROUND, in_sum=False)
    with pytest.raises(PlanRefusedError) as refused:
        step(actor, kind)
    assert refused.value.rule == "privacy.not_reserved"
    assert secure.steps == []
