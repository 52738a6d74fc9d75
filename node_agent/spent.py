"""What this site's data have spent and have left, for people: from its own ledger and config."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from node_agent.config import NodeConfig, NodeFolder
from node_agent.journal import Journal
from node_agent.privacy_ledger import PrivacyLedger, SpendRecord
from policies.privacy.budget import Allowance, afford_allowance
from protocols.errors import FederationError, NotFoundError
from protocols.identifiers import RunId
from protocols.plan import Plan


def privacy_facts(node: NodeFolder, config: NodeConfig, now: datetime) -> list[dict[str, Any]]:
    """One entry for each budget in the configuration; a data set that spent without one is last."""
    records = _records(node)
    plans = _plans(node, {record.round.run for record in records})
    budgets = [budget.allowance() for budget in config.privacy.budget]
    facts = [_facts(budget, records, plans, now) for budget in budgets]
    named = {budget.dataset for budget in budgets}
    facts.extend(
        {"dataset": dataset, "unit": "", "spent": "", "budget": "", "why": "no budget is set"}
        for dataset in sorted({record.dataset for record in records} - named)
    )
    return facts


def _facts(
    budget: Allowance, records: Sequence[SpendRecord], plans: dict[RunId, Plan], now: datetime
) -> dict[str, Any]:
    mine = [record for record in records if record.dataset == budget.dataset]
    facts: dict[str, Any] = {
        "dataset": budget.dataset,
        "unit": budget.unit.value,
        "budget": f"{budget.epsilon:g}",
        "delta": f"{budget.delta:g}",
        "starts": budget.starts_at.date().isoformat() if budget.starts_at else None,
        "ends": budget.ends_at.date().isoformat() if budget.ends_at else None,
        "rounds": sum(1 for record in mine if record.spend.counts),
        "reserved": sum(1 for record in mine if record.status == "reserved"),
    }
    try:
        facts["spent"] = budget.spent([record.spend for record in mine]).printed()
    except FederationError as error:  # of another unit, for instance
        return facts | {"spent": "", "why": str(error), "runs": []}
    return facts | {"runs": [_run(run, budget, mine, plans, now) for run in _latest(mine)]}


def _run(
    run: RunId,
    budget: Allowance,
    mine: Sequence[SpendRecord],
    plans: dict[RunId, Plan],
    now: datetime,
) -> dict[str, Any]:
    of_run = [record for record in mine if record.round.run == run]
    plan = plans.get(run)
    left = max(1, plan.rounds if plan else 1)
    answer = afford_allowance(
        budget,
        [record.spend for record in mine],
        of_run[-1].claim.charge(),
        now=now,
        rounds=left,
    )
    return {
        "run": run,
        "mode": of_run[-1].claim.mode,
        "rounds": sum(1 for record in of_run if record.spend.counts),
        "more_rounds": answer.rounds_left,  # up to as many as the plan has
        "rule": answer.rule,
        "why": answer.why,
    }


def _latest(records: Sequence[SpendRecord], most: int = 5) -> list[RunId]:
    """The runs of the newest spends, the newest first."""
    runs = dict.fromkeys(record.round.run for record in reversed(records))
    return list(runs)[:most]


def _records(node: NodeFolder) -> tuple[SpendRecord, ...]:
    try:
        ledger = PrivacyLedger(node.privacy, now=lambda: datetime.now(UTC), read_only=True)
    except NotFoundError:
        return ()
    try:
        return ledger.records()
    finally:
        ledger.close()


def _plans(node: NodeFolder, runs: set[RunId]) -> dict[RunId, Plan]:
    try:
        journal = Journal(node.journal, now=lambda: datetime.now(UTC), read_only=True)
    except NotFoundError:
        return {}
    try:
        known = {run: journal.run(run) for run in runs}
    finally:
        journal.close()
    return {run: record.plan for run, record in known.items() if record is not None}


def privacy_lines(facts: Sequence[dict[str, Any]]) -> list[str]:
    """The same for people, one line each."""
    lines = []
    for entry in facts:
        if not entry["budget"]:
            lines.append(f"privacy of data set {entry['dataset']}: {entry['why']}")
            continue
        period = ""
        if entry["starts"] or entry["ends"]:
            period = f" from {entry['starts'] or 'ever'} to {entry['ends'] or 'ever'}"
        spent = f"epsilon {entry['spent']} of {entry['budget']}" if entry["spent"] else entry["why"]
        lines.append(
            f"privacy of data set {entry['dataset']}, by {entry['unit']}: {spent} spent at delta"
            f" {entry['delta']}{period}, in {entry['rounds']} rounds"
        )
        lines.extend(
            f"  {run['run']} ({run['mode']}): {run['rounds']} rounds spent,"
            f" the rest buys {run['more_rounds']} more"
            for run in entry.get("runs", ())
        )
    return lines
