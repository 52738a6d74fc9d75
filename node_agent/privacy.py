"""When the node's own privacy ledger is asked and told: before anything leaves, and at the end.

    join           reserve what the round costs, or decline with the ledger's rule
    train          mark that local steps begin: some terms keep what they computed
    make, upload,  only for a round that is reserved: one that was settled stays out,
    commit           whatever phase the coordinator shows
    reveal         record ``released``, then reveal
    round is over  settle what is still reserved: refunded only if no byte was ever sent

privacy.no_budget    config.toml gives the data set no budget for that unit
privacy.dataset      the plan names another data set than the site's
privacy.held_out     the plan calls the held-out text public, the site does not
privacy.budget       what is left does not cover the round
privacy.period       today is outside the budget's period
privacy.mixed_units  the data set has spent on another unit
privacy.settled      the round was settled before
privacy.ledger_lost  the ledger lacks a round that the journal knows
and those of policies.privacy.terms
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from node_agent.config import NodeConfig
from node_agent.journal import Journal
from node_agent.privacy_ledger import PrivacyLedger
from node_agent.rules import Refusal
from policies.privacy.budget import Allowance, SpendStatus
from policies.privacy.claim import Claim, claim_of
from policies.privacy.sensitivity import Unit
from protocols.errors import PlanRefusedError
from protocols.identifiers import RoundId, RunId
from protocols.plan import Plan

logger = logging.getLogger(__name__)


def check_budget(plan: Plan, config: NodeConfig) -> Refusal | None:
    """What can be said before the model is known; None: nothing against it."""
    privacy = plan.privacy
    if privacy is None:
        return None
    if privacy.dataset != config.data.dataset:
        return Refusal(
            "privacy.dataset",
            f"the plan spends the budget of data set {privacy.dataset}, this site's is"
            f" {config.data.dataset}: config.toml [data] dataset",
        )
    if plan.evaluation.languages and not config.data.valid_public:
        return Refusal(
            "privacy.held_out",
            "the plan scores held-out text without noise, which is for public text only:"
            " config.toml [data] valid_public",
        )
    if allowance_for(config, Unit(privacy.unit)) is None:
        return Refusal(
            "privacy.no_budget",
            f"config.toml has no [[privacy.budget]] for data set {config.data.dataset} and unit"
            f" {privacy.unit}",
        )
    return None


def allowance_for(config: NodeConfig, unit: Unit) -> Allowance | None:
    """The site's budget for its data set and a unit; None: it gives none."""
    for budget in config.privacy.budget:
        if budget.dataset == config.data.dataset and budget.unit == unit:
            return budget.allowance()
    return None


@dataclass(slots=True, kw_only=True)
class PrivacyGuard:
    """Asks and tells the ledger. Blocking."""

    ledger: PrivacyLedger
    journal: Journal
    config: NodeConfig
    _plans: dict[RunId, Plan] = field(default_factory=dict)

    def reserve(self, plan: Plan, round_: RoundId, index: int, coordinates: int) -> Refusal | None:
        """Reserve a round before it is joined; None: it may be joined.

        Args:
            plan: of the run.
            round_: about to be joined.
            index: which of the plan's rounds.
            coordinates: model coordinates that a training round exchanges.
        """
        refusal = check_budget(plan, self.config)
        if refusal is not None or plan.privacy is None:
            return refusal
        try:
            claim = claim_of(plan, index, coordinates)
        except PlanRefusedError as error:
            return Refusal(error.rule, str(error))
        allowance = allowance_for(self.config, Unit(plan.privacy.unit))
        if claim is None or allowance is None:
            return None  # a round that only evaluates public text
        return self.ledger.reserve(
            round_,
            claim,
            allowance,
            rounds=plan.rounds - index,
            joined=self._private_rounds(),
        )

    def _private_rounds(self) -> list[RoundId]:
        """Rounds that the journal says were joined and that must have been reserved before."""
        found = []
        for round_, index in self.journal.all_joined():
            if round_.run not in self._plans:
                known = self.journal.run(round_.run)
                if known is None:
                    continue
                self._plans[round_.run] = known.plan
            plan = self._plans[round_.run]
            if plan.privacy is not None and plan.trains_in(index):
                found.append(round_)
        return found

    def check(self, plan: Plan, round_: RoundId, index: int) -> None:
        """Whether anything of the round may still be made or sent.

        Raises:
            PlanRefusedError: privacy.not_reserved.
        """
        if plan.privacy is None or not plan.trains_in(index):
            return
        record = self.ledger.record(round_)
        if record is None or record.status in (SpendStatus.VOID, SpendStatus.BURNED):
            what = "not in" if record is None else f"{record.status} in"
            raise PlanRefusedError(
                f"round {round_} is {what} the privacy ledger: nothing of it is sent",
                rule="privacy.not_reserved",
            )

    def starts(self, plan: Plan, round_: RoundId, index: int) -> None:
        """The local steps of a round begin. Raises: PlanRefusedError: privacy.not_reserved."""
        self.check(plan, round_, index)
        if plan.privacy is not None and plan.trains_in(index):
            self.ledger.start(round_)

    def releases(self, round_: RoundId) -> None:
        """This node is about to help open the sum."""
        self.ledger.settle(round_, SpendStatus.RELEASED, "this node reveals its shares")

    def over(self, plan: Plan, round_: RoundId, *, in_sum: bool) -> SpendStatus | None:
        """Settle a round that is over; None: there was nothing to settle.

        Args:
            plan: of the run.
            round_: that is over, or of which nothing is shown any more.
            in_sum: whether the sum was opened with this node's update.
        """
        record = self.ledger.record(round_)
        if record is None or record.status is not SpendStatus.RESERVED:
            return None
        if in_sum:
            status, why = SpendStatus.RELEASED, "the sum was opened"
        elif self.journal.made_vector(round_):
            status, why = SpendStatus.BURNED, "its masked update may have left the site"
        elif record.started and plan.mode == "record-local" and plan.local_step.keep_optimizer:
            status, why = SpendStatus.BURNED, "its steps live on in the optimizer's state"
        else:
            status, why = SpendStatus.VOID, "nothing of it left the site"
        self.ledger.settle(round_, status, why)
        detail = {"status": status.value, "reason": why}
        self.journal.note("privacy", detail, round_=round_)
        logger.info("%s: %s in the privacy ledger: %s", round_, status, why)
        return status

    def claim(self, plan: Plan, index: int, coordinates: int) -> Claim | None:
        """What the log is told about this node's update in a round."""
        return claim_of(plan, index, coordinates)
