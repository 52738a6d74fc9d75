"""The coordinator's side of privacy: what a run costs, who may still afford it, what it came to.

Its ledger decides nothing for a node: each node asks its own. A join beyond the budget of the
signed policy, or beyond what the operator writes (``[[privacy.budget]]`` in config.toml), is
refused here too: the tighter of the two counts. Without either, spends are only written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from coordinator.ledger.privacy import SpendRow
from coordinator.ledger.rows import RoundRow, RunRow
from coordinator.ledger.tx import Tx
from policies.consortium import ConsortiumPolicy
from policies.privacy.budget import Allowance, Spend, SpendStatus, afford_allowance
from policies.privacy.caps import Cap, cap_for, consortium_cap
from policies.privacy.claim import Claim
from policies.privacy.sensitivity import Unit
from protocols.errors import PlanRefusedError
from protocols.gen import admin_pb2
from protocols.identifiers import NodeId, RunId
from protocols.plan import Plan
from protocols.rounds import Aborted, Burned, Open, Phase, Released


def reserve(
    tx: Tx,
    run: RunRow,
    row: RoundRow,
    node: NodeId,
    caps: Sequence[Cap],
    now: datetime,
    policy: ConsortiumPolicy | None = None,
) -> None:
    """Reserve what the round costs a node that joins it; in the transaction of the join.

    Args:
        caps: that the operator wrote.
        policy: the signed one in force; None: the federation is not governed.

    Raises:
        PlanRefusedError: privacy.budget and the like: beyond the federation's cap.
    """
    plan = run.plan
    if plan.privacy is None or not plan.trains_in(row.index):
        return
    claim = tx.claim(run.run)
    if claim is None:
        raise PlanRefusedError(f"run {run.run} has no privacy claim", rule="privacy.no_claim")
    spent = [
        spend.spend for spend in tx.spends_of_data(node, claim.dataset) if spend.round != row.round
    ]
    allowed = [cap_for(caps, node, claim)]
    if policy is not None:
        classes = plan.terms.data.classes if plan.terms is not None else ()
        signed = consortium_cap(policy, node, claim, classes, now)
        if signed is None:
            raise PlanRefusedError(
                f"{node}, {claim.dataset}: the policy gives it no budget", rule="privacy.budget"
            )
        allowed.append(signed)
    for cap in allowed:
        if cap is None:
            continue
        answer = afford_allowance(
            cap, spent, claim.charge(), now=now, rounds=plan.rounds - row.index
        )
        if not answer.yes:
            raise PlanRefusedError(f"{node}, {claim.dataset}: {answer.why}", rule=answer.rule)
    tx.reserve_spend(row.round, node, claim, now)


def settle(tx: Tx, row: RoundRow, phase: Phase, now: datetime) -> None:
    """Settle what was reserved for a round that ends; in the transaction that ends it.

    The sum of a released round is opened after this.
    """
    if not isinstance(phase, Released | Aborted | Burned):
        return
    plan = tx.run(row.round.run).plan
    if plan.privacy is None:
        return
    sent = {upload.node for upload in tx.all_uploads(row.round)}
    kept = plan.mode == "record-local" and plan.local_step.keep_optimizer
    trained = not isinstance(row.phase, Open)
    for spend in tx.spends_of_round(row.round):
        if isinstance(phase, Released) and spend.node in phase.survivors:
            became = SpendStatus.RELEASED
        elif spend.node in sent or (kept and trained):
            became = SpendStatus.BURNED
        else:
            became = SpendStatus.VOID
        tx.settle_spend(row.round, spend.node, became, now)


def spend_facts(
    plan: Plan,
    claim: Claim,
    spends: dict[NodeId, list[SpendRow]],
    caps: Sequence[Cap],
    now: datetime,
) -> list[admin_pb2.SpendFacts]:
    """What each institution of a run has spent and has left, for people. Takes a while: no lock.

    Args:
        plan: of the run.
        claim: of its training rounds.
        spends: of the plan's data set, by node, over all runs.
        caps: of the federation.
        now: UTC.
    """
    today = datetime(now.year, now.month, now.day, tzinfo=now.tzinfo)
    found = []
    for node in plan.roster_ids:
        rows = spends.get(node, [])
        mine = [r for r in rows if r.round.run == RunId(plan.run) and r.spend.counts]
        cap = cap_for(caps, node, claim)
        figures = _figures(cap, claim, tuple(row.spend for row in rows), plan.rounds, today)
        found.append(
            admin_pb2.SpendFacts(
                node=node,
                dataset=claim.dataset,
                unit=claim.unit,
                rounds=len(mine),
                epsilon=figures.epsilon,
                delta=figures.delta,
                budget=figures.budget,
                rounds_left=figures.rounds_left,
                why=figures.why,
            )
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    epsilon: str
    delta: str
    budget: str = ""
    rounds_left: int = 0
    why: str = ""


@lru_cache(maxsize=1024)  # a run is looked at several times a second, and changes once a round
def _figures(
    cap: Allowance | None, claim: Claim, spends: tuple[Spend, ...], rounds: int, today: datetime
) -> _Figures:
    ledger = cap or Allowance(
        dataset=claim.dataset, unit=Unit(claim.unit), epsilon=1.0, delta=float(claim.delta)
    )
    delta = f"{ledger.delta:g}"
    try:
        epsilon = ledger.spent(spends).printed()
        if cap is None:
            return _Figures(epsilon=epsilon, delta=delta)
        answer = afford_allowance(cap, spends, claim.charge(), now=today, rounds=rounds)
    except PlanRefusedError as error:
        return _Figures(epsilon="", delta=delta, why=f"{error} [{error.rule}]")
    return _Figures(
        epsilon=epsilon,
        delta=delta,
        budget=f"{cap.epsilon:g}",
        rounds_left=answer.rounds_left,
        why=answer.why,
    )
