"""What consortium, site and persons say about a round, found out from a node's folder.

    refusal   no: by the policy in force, the site's own policy, or a file that cannot be read
    waits     not yet: a person has to approve the plan
    digest    what a join tells of the site's policy: that it is this one, and nothing of it

Reads files, journal and privacy ledger and changes nothing; decides by ``node_agent.governed``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

from node_agent.code_digest import installed_code
from node_agent.config import NodeFolder
from node_agent.governed import (
    Situated,
    approval_missing,
    decide_governed,
    decide_site_alone,
    read_approval,
    refusal_of,
)
from node_agent.privacy import allowance_for
from node_agent.resources import counted, read_claim
from node_agent.rules import Refusal
from node_agent.site import Site
from node_agent.site_policy import SiteRules, load_site_rules
from node_agent.view import RunSeen
from policies.consortium import ConsortiumPolicy
from policies.in_force import InForce, in_force_from_state
from policies.privacy.claim import claim_of
from policies.privacy.micro import cost_of_one, micro
from policies.privacy.sensitivity import Unit
from protocols.errors import ConfigurationError, FederationError
from protocols.identifiers import Digest, RoundId, RunId
from protocols.plan import Plan
from protocols.plan_terms import Limits
from protocols.round_vector import round_layout
from protocols.rounds import Aborted, Burned, Released
from protocols.tensors.manifest import Manifest

logger = logging.getLogger(__name__)
COSTS_S: Final = 5.0  # how long a look at the privacy ledger is good for
_DAY: Final = timedelta(hours=24)
_OVER: Final = frozenset({Released.__name__, Aborted.__name__, Burned.__name__})


@dataclass(frozen=True, slots=True)
class Costs:
    """What a round costs in privacy, millionths of epsilon, rounded up."""

    round_micro: int | None = None
    after_micro: int | None = None  # of the data set's budget, with this round
    pending: bool = False  # the model's size is not known yet


@dataclass(slots=True)
class Governance:
    """Answers for one node."""

    site: Site
    _rules: SiteRules | None = None
    _costs: dict[tuple[Digest, int], tuple[float, Costs]] = field(default_factory=dict)

    # -- answers ---------------------------------------------------------------------------------

    def refusal(
        self, plan: Plan, seen: RunSeen, runs: Iterable[RunSeen], *, index: int
    ) -> Refusal | None:
        """Why this node takes no part in a round of a plan; None: nothing stands against it.

        Args:
            plan: of the run.
            seen: the run.
            runs: all runs that the coordinator shows.
            index: which of the plan's rounds.
        """
        trust, now = self.site.trust, self.site.now()
        if trust is None and not has_policy(self.site.folder):
            return None
        try:
            rules = self._load()
        except ConfigurationError as error:
            return Refusal("site.policy", str(error))
        if trust is None:
            return refusal_of(decide_site_alone(plan, rules, now))
        state, policy = trust.state, trust.policy(now)
        if state is None or policy is None:
            return Refusal("trust.bootstrap", "nothing is in force that this node could verify")
        in_force = in_force_from_state(state, policy, now)
        at = self._situated(plan, seen, runs, in_force, now, index)
        return refusal_of(decide_governed(plan, self.site.config, in_force, rules, at))

    def waits(self, plan: Plan) -> str | None:
        """What a person has still to do before this plan runs here; None: nothing."""
        if not has_policy(self.site.folder):
            return None
        try:
            rules = self._load()
        except ConfigurationError:
            return None  # ``refusal`` says it
        missing = approval_missing(plan, rules, read_approval(self.site.folder, plan.run_id))
        return None if missing is None else str(missing)

    def digest(self) -> Digest | None:
        """Of the site's policy, salted; None: it has none that can be read."""
        try:
            return self._load().digest
        except ConfigurationError:
            return None

    # -- facts -----------------------------------------------------------------------------------

    def _load(self) -> SiteRules:
        self._rules = load_site_rules(self.site.folder, self._rules)
        return self._rules

    def _situated(
        self,
        plan: Plan,
        seen: RunSeen,
        runs: Iterable[RunSeen],
        in_force: InForce,
        now: datetime,
        index: int,
    ) -> Situated:
        journal = self.site.journal
        joins = journal.joins(now - _DAY)
        mine = [at for run, _, at in joins if run == plan.run]
        costs = self._cost(plan, index, in_force.policy)
        builtin = plan.local_step.kind == "builtin"
        return Situated(
            now=now,
            # Whoever asks has been let past the log's own gate, or has switched it off.
            log_witnessed=True,
            witness_quorum=self._demanded(in_force),
            auditors=self._auditors(in_force),
            other_runs=sum(self._at_work(other) for other in runs if other.run != seen.run),
            last_round_at=max(mine, default=None),
            joined_today=tuple(self._limits(joins)),
            eps_round_micro=costs.round_micro,
            eps_after_micro=costs.after_micro,
            cost_pending=costs.pending,
            installed_code=installed_code() if builtin else None,
        )

    def _demanded(self, in_force: InForce) -> int:
        """Cosignatures that this node demands; where the log is off, what the policy asks for."""
        log = self.site.log
        return in_force.policy.log.witness.quorum if log is None else log.verifier.demanded()

    def _auditors(self, in_force: InForce) -> int:
        """Witnesses beside the members that must cosign; likewise."""
        log = self.site.log
        if log is None:
            return int(in_force.policy.log.witness.auditor_required)
        return log.verifier.auditors()

    def _at_work(self, seen: RunSeen) -> bool:
        current = seen.current
        if seen.status != "active" or current is None or current.raw_phase.name in _OVER:
            return False
        record = self.site.journal.round(current.round)
        return record is not None and record.joined

    def _limits(self, joins: Iterable[tuple[RunId, int, datetime]]) -> Iterable[Limits]:
        """What each round of the last day counts: what it used, or what its plan may use."""
        journal = self.site.journal
        for run, number, _ in joins:
            known = journal.run(run)
            if known is not None and known.plan.terms is not None:
                used = read_claim(journal.said_ready_with(RoundId(run, number)), "used")
                yield counted(known.plan.terms.limits, used)

    def _cost(self, plan: Plan, index: int, policy: ConsortiumPolicy) -> Costs:
        """What a round of the plan costs, by the model's size and this node's own ledger.

        What the budget has spent with it is counted over the longer of the site's period and the
        consortium's: a site that begins anew every month does not begin anew for the consortium.
        """
        if plan.privacy is None or not plan.trains_in(index):
            return Costs(0, 0) if plan.privacy is not None else Costs()
        path = self.site.models.manifest_path(plan.run_id)
        if not path.exists():
            return Costs(pending=True)
        key, clock = (plan.digest, index), self.site.monotonic()
        known = self._costs.get(key)
        if known is not None and clock - known[0] < COSTS_S:
            return known[1]
        try:
            manifest = Manifest.from_bytes(path.read_bytes())
            claim = claim_of(plan, index, round_layout(plan, index, manifest).model_coordinates)
            allowance = allowance_for(self.site.config, Unit(plan.privacy.unit))
            if claim is None or allowance is None:
                return Costs()
            delta = float(plan.privacy.delta_exact)
            alone = cost_of_one(claim, delta=delta)
            if allowance.starts_at is not None:
                days = policy.privacy.budgets.longest_days(self.site.config.institution)
                since = self.site.now() - timedelta(days=days)
                allowance = replace(allowance, starts_at=min(allowance.starts_at, since))
            after = self.site.privacy.ledger.affords(claim, allowance).after
        except (FederationError, OSError) as error:
            logger.warning("%s: the cost of a round is unknown: %s", plan.run, error)
            return Costs()
        costs = Costs(alone, None if after is None else micro(after.epsilon))
        self._costs = {key: (clock, costs)}
        return costs


def has_policy(folder: NodeFolder) -> bool:
    """Whether the site wrote a policy at all; half of one is a broken one."""
    return folder.policy.exists() or folder.rules.exists()
