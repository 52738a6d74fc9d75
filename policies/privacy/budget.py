"""May this release be afforded?

    reserved   promised before the first byte left the node      counts
    released   the sum is public                                 counts
    burned     something may have been opened                    counts
    aborted    a certificate says that nothing can be opened     does not
    void       no byte was ever sent                             does not

What is not surely unspent is charged. One function decides, from the node's own list of spends;
it keeps nothing, and the node writes ``reserved`` to disk before it acts on a yes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Final

from policies.privacy.accounting import WHOLE_ORDERS, Guarantee, account_renyi
from policies.privacy.events import Charge, Event
from policies.privacy.sensitivity import Relation, Unit
from protocols.errors import CorruptStateError


class SpendStatus(StrEnum):
    """What became of a spend."""

    RESERVED = "reserved"
    RELEASED = "released"
    BURNED = "burned"
    ABORTED = "aborted"
    VOID = "void"


_UNSPENT = frozenset({SpendStatus.ABORTED, SpendStatus.VOID})


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """One attempt's cost, as the node's ledger has it."""

    key: str  # run, round and attempt: one spend each
    charge: Charge
    status: SpendStatus
    reserved_at: datetime  # UTC

    @property
    def counts(self) -> bool:
        """Whether it is charged."""
        return self.status not in _UNSPENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a node allows for one unit of its data.

    A period bounds what is spent *within* it. What was learned before does not fade: over k periods
    the loss is that of all of them together. Say so where a period is set.

    ``adaptive``: events may depend on what earlier ones released. Then exactly one order is needed,
    fixed in advance. Otherwise every charge in the period must be of the same event, as the rounds
    of one plan are.
    """

    epsilon: float
    delta: float
    unit: Unit
    relation: Relation
    starts_at: datetime | None = None  # UTC, inclusive; None: since ever
    ends_at: datetime | None = None  # UTC, exclusive; None: for ever
    orders: tuple[float, ...] = WHOLE_ORDERS
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0) or not 0 < self.delta < 1:
            raise ValueError("a budget has a finite epsilon above 0 and a delta between 0 and 1")
        if not self.orders or any(alpha <= 1 for alpha in self.orders):
            raise ValueError("a budget has at least one order, all above 1")
        if self.adaptive and len(self.orders) != 1:
            raise ValueError("an adaptive budget has exactly one order, fixed in advance")
        if self.starts_at and self.ends_at and self.starts_at >= self.ends_at:
            raise ValueError("a period ends after it starts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Affordable:
    """Yes or no, the rule that said so, and the figures behind it."""

    yes: bool
    rule: str
    why: str  # one sentence, for people
    spent: Guarantee | None = None  # before
    after: Guarantee | None = None  # with this release
    rounds_left: int = 0  # how many of these releases fit, this one included, up to those wanted


def counted(budget: Budget, spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """The spends that are charged to this budget's period.

    One that claims to be later than the period ends is counted too: its clock may be wrong.

    Raises:
        CorruptStateError: two spends of one attempt.
    """
    found: dict[str, Spend] = {}
    for spend in spends:
        if spend.key in found:
            raise CorruptStateError(f"the privacy ledger has two spends of {spend.key}")
        found[spend.key] = spend
    start = budget.starts_at
    return tuple(
        spend
        for spend in found.values()
        if spend.counts and (start is None or spend.reserved_at >= start)
    )


def _no(rule: str, why: str) -> Affordable:
    return Affordable(yes=False, rule=rule, why=why)


def _same_events(charges: Sequence[Charge]) -> bool:
    events: set[Event] = {charge.event for charge in charges}
    return len(events) <= 1


def afford(
    budget: Budget,
    spends: Iterable[Spend],
    wanted: Charge,
    *,
    now: datetime,
    rounds: int = 1,
) -> Affordable:
    """Decide whether a release of cost ``wanted`` fits into ``budget``.

    Args:
        budget: of this node, for the unit that the release is about.
        spends: all of the node's ledger for this data, in any order.
        wanted: what the release costs.
        now: UTC.
        rounds: releases the run still plans, this one included; only ``rounds_left`` depends on it.

    Raises:
        CorruptStateError: the ledger contradicts itself.
        PlanRefusedError: the release cannot be accounted at the budget's orders.
    """
    if rounds < 1:
        raise ValueError("want at least one round")
    before = tuple(spend.charge for spend in counted(budget, spends))
    if (budget.starts_at and now < budget.starts_at) or (budget.ends_at and now >= budget.ends_at):
        return _no("privacy.period", "the budget's period does not include today")
    if any((c.unit, c.relation) != (budget.unit, budget.relation) for c in (*before, wanted)):
        return _no("privacy.mixed_units", "the budget is for another unit or neighbouring relation")
    if not budget.adaptive and not _same_events((*before, wanted)):
        return _no(
            "privacy.adaptive",
            "the terms differ from those of earlier spends; that needs an adaptive budget",
        )

    def total(n: int) -> Guarantee:
        more = (wanted.times(n),) if n else ()
        return account_renyi((*before, *more), delta=budget.delta, orders=budget.orders)

    spent, after = total(0), total(1)
    if not after.epsilon <= budget.epsilon:
        figures = f"{spent.printed()}, would be {after.printed()} and may be {budget.epsilon:g}"
        return Affordable(
            yes=False,
            rule="privacy.budget",
            why=f"epsilon is {figures}",
            spent=spent,
            after=after,
        )
    low, high = 1, rounds  # the largest n that fits is in low .. high: epsilon grows with n
    while low < high:
        middle = (low + high + 1) // 2
        if total(middle).epsilon <= budget.epsilon:
            low = middle
        else:
            high = middle - 1
    return Affordable(
        yes=True,
        rule="privacy.affordable",
        why=f"epsilon becomes {after.printed()} of {budget.epsilon:g}; {low} of {rounds} fit",
        spent=spent,
        after=after,
        rounds_left=low,
    )


def midnight(day: date | None) -> datetime | None:
    """The moment a day begins, UTC; None stays None."""
    return None if day is None else datetime(day.year, day.month, day.day, tzinfo=UTC)


RELATION_OF: Final = {
    Unit.DOCUMENT: Relation.ADD_OR_REMOVE_ONE,
    Unit.SEQUENCE: Relation.ADD_OR_REMOVE_ONE,
    Unit.INSTITUTION: Relation.REPLACE_SPECIAL,
}


def filter_order(epsilon: float, delta: float) -> float:
    """The whole order at which a filter for this budget wastes least, for Gaussian noise.

    With rho of zero-concentrated privacy epsilon is rho + 2 sqrt(rho L), L = ln(1 / delta), at
    order 1 + sqrt(L / rho). It follows from the budget alone, so it is fixed in advance.
    """
    log = math.log(1 / delta)
    return float(
        min(1024, max(2, round(1 + math.sqrt(log) / (math.sqrt(log + epsilon) - math.sqrt(log)))))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a site allows for one unit of one data set in a period, as it writes it down.

    Rounds of one plan are composed at the best order, the terms being fixed before the first.
    Runs of different plans may have been chosen by what earlier ones showed; they are composed by a
    filter at ``filter_order``. Whichever of the two a history ends in, it had half of delta.
    """

    dataset: str
    unit: Unit
    epsilon: float
    delta: float
    starts_at: datetime | None = None
    ends_at: datetime | None = None

    @property
    def fixed(self) -> Budget:
        """For rounds that all have the same terms."""
        return self._budget(WHOLE_ORDERS, adaptive=False)

    @property
    def adaptive(self) -> Budget:
        """For rounds of several plans."""
        order = filter_order(self.epsilon, self.delta / 2)
        return self._budget((order,), adaptive=True)

    def _budget(self, orders: tuple[float, ...], *, adaptive: bool) -> Budget:
        return Budget(
            epsilon=self.epsilon,
            delta=self.delta / 2,
            unit=self.unit,
            relation=RELATION_OF[self.unit],
            starts_at=self.starts_at,
            ends_at=self.ends_at,
            orders=orders,
            adaptive=adaptive,
        )

    def spent(self, spends: Iterable[Spend]) -> Guarantee:
        """What the period has spent, at delta.

        Raises:
            PlanRefusedError: spends of another unit are among them.
        """
        charges = tuple(spend.charge for spend in counted(self.fixed, spends))
        orders = WHOLE_ORDERS if _same_events(charges) else self.adaptive.orders
        if not charges:
            return account_renyi((), delta=self.delta)
        return account_renyi(charges, delta=self.delta / 2, orders=orders)


def afford_allowance(
    allowance: Allowance,
    spends: Iterable[Spend],
    wanted: Charge,
    *,
    now: datetime,
    rounds: int = 1,
) -> Affordable:
    """Decide whether a release fits into what a site allows; arguments as ``afford``.

    Raises:
        CorruptStateError, PlanRefusedError: as ``afford``.
    """
    known = tuple(spends)
    answer = afford(allowance.fixed, known, wanted, now=now, rounds=rounds)
    if answer.rule != "privacy.adaptive":
        return answer
    return afford(allowance.adaptive, known, wanted, now=now, rounds=rounds)
