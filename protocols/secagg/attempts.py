"""An attempt as everybody derives it: from the plan, the round and the model it starts from.

Nothing here comes from a message. The roster's keys stand in the plan, so its digest pins them.
"""

from __future__ import annotations

from typing import Final

from protocols.errors import PlanRefusedError
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.plan import Plan
from protocols.secagg.context import Attempt, Member, Roster
from protocols.secagg.threshold import SecaggTerms

# Until rounds are logged there is no checkpoint to bind: every party binds this text instead.
NO_CHECKPOINT: Final = b"minga: this federation has no round log yet\n"


def roster_of(plan: Plan) -> Roster:
    """The plan's members with their keys.

    Raises:
        PlanRefusedError: the plan sums in the open.
    """
    if plan.secagg is None:
        raise PlanRefusedError("this plan has no secure sum", rule="secagg.required")
    keys = plan.secagg.keys
    return Roster(
        tuple(Member(node=NodeId(node), key=bytes.fromhex(keys[node])) for node in plan.roster)
    )


def attempt_of(plan: Plan, round_: RoundId, number: int, model_root: Digest) -> Attempt:
    """One try of the secure sum of ``round_``.

    Args:
        number: from 1.
        model_root: of the model the round starts from, as the caller derived it.

    Raises:
        PlanRefusedError: the plan sums in the open, or its sizes do not hold.
    """
    if plan.secagg is None:
        raise PlanRefusedError("this plan has no secure sum", rule="secagg.required")
    terms = SecaggTerms(
        roster_size=len(plan.roster),
        threshold=plan.secagg.threshold,
        colluders=plan.secagg.colluders,
        min_surviving=plan.secagg.min_surviving,
    )
    return Attempt(
        federation=plan.federation_id,
        round=round_,
        number=number,
        roster=roster_of(plan),
        terms=terms,
        model_root=model_root,
        plan_digest=plan.digest,
    )
