"""Is the plan the one the run said, and can this agent carry it out? Pure checks, in order.

plan.digest      the bytes are not those the run is said to have
plan.run         the plan is for another run
plan.federation  the plan is for another federation
plan.roster      this node is not on it
plan.mode        this agent cannot take part in a sum of that kind
plan.optimizer   the outer step names an optimizer that no node can apply
round.index      the round is not the one that follows
model.initial    the first round starts from another model than the plan pins
model.chain      a round starts from another model than this node derived
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from node_agent.journal import ConfirmRecord
from node_agent.rules import Refusal
from node_agent.view import RunSeen
from protocols.errors import FederationError, PlanRefusedError
from protocols.identifiers import Digest, FederationId, NodeId
from protocols.outer_optimizers import optimizer_for
from protocols.plan import MODES, Plan

_KEPT: Final = 16  # plans whose digest is remembered
_known: dict[int, tuple[Plan, Digest]] = {}  # a plan never changes: by identity, the newest few


def _digest_of(plan: Plan) -> Digest:
    """``plan.digest``, which is asked for at every turn, computed once for each object."""
    plan_, digest = _known.get(id(plan), (None, None))
    if plan_ is not plan or digest is None:
        digest = plan.digest
        while len(_known) >= _KEPT:
            _known.pop(next(iter(_known)), None)
        _known[id(plan)] = (plan, digest)  # held, so that no other object gets its number
    return digest


def check_plan(
    plan: Plan,
    *,
    said: Digest,
    seen: RunSeen,
    federation: FederationId,
    node: NodeId,
    modes: Collection[str] = MODES,
) -> Refusal | None:
    """Whether the plan is what was announced and meant for this node; None: nothing against it.

    Args:
        plan: as it was read.
        said: digest that the run is said to have.
        seen: the run.
        federation: this node's.
        node: this node.
        modes: plan modes this agent can take part in.
    """
    if _digest_of(plan) != said:
        return Refusal("plan.digest", "the plan's bytes are not those the run is said to have")
    if plan.run != seen.run:
        return Refusal("plan.run", f"the plan is for run {plan.run}, not for {seen.run}")
    if plan.federation != federation:
        return Refusal(
            "plan.federation", f"the plan is for federation {plan.federation}, not {federation}"
        )
    if node not in plan.roster:
        return Refusal("plan.roster", f"{node} is not on the plan's roster")
    if plan.mode not in modes:
        return Refusal("plan.mode", f"this agent cannot take part in a sum of mode {plan.mode}")
    try:
        optimizer_for(plan.outer)
    except PlanRefusedError as error:
        return Refusal("plan.optimizer", str(error))
    except (FederationError, ImportError) as error:
        return Refusal("plan.optimizer", f"{plan.outer.optimizer}: {error!s:.200}")
    return None


def check_round(plan: Plan, seen: RunSeen, confirmed: ConfirmRecord | None) -> Refusal | None:
    """Whether the current round follows from what this node knows; None: nothing against it.

    Args:
        plan: of the run.
        seen: the run, with a current round.
        confirmed: what this node computed from the last released round, if it did.
    """
    current, last = seen.current, seen.last_released
    if current is None:
        return None
    expected = 0 if last is None else last.index + 1
    if current.index != expected or current.index >= plan.total_rounds:
        return Refusal(
            "round.index",
            f"round {current.round} is number {current.index} of the plan; {expected} follows",
        )
    root = current.start.model_root
    if current.index == 0 and root != plan.model.initial:
        return Refusal("model.initial", "the first round starts from a model the plan does not pin")
    if confirmed is not None and confirmed.computed is not None and root != confirmed.computed:
        return Refusal(
            "model.chain",
            f"round {current.round} starts from model {root[:12]}…, this node derived"
            f" {confirmed.computed[:12]}…",
        )
    return None
