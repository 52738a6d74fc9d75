"""Yes, or no with a rule and a sentence: what every decision of this package returns.

A decision never raises and is never a bare bool: a no that cannot say which rule it applied cannot
be argued with. Decisions are joined with ``all_of``; all of nothing is refused, because a list that
lost its rules on the way would otherwise allow everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

_RULE_ID: Final = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*")
MAX_RULE_ID: Final = 80  # characters: what a log leaf takes
NOTHING_CHECKED: Final = "decision.nothing_checked"


def is_rule_id(text: str) -> bool:
    """Whether ``text`` may name a rule: ``area`` or ``area.rule``, lower case."""
    return len(text) <= MAX_RULE_ID and _RULE_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Allowed:
    """Nothing is against it."""

    rules: tuple[str, ...] = ()  # what permitted it, where that is known

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Why:
    """One rule that says no, and why in one sentence for the person who can change it."""

    rule: str
    reason: str

    def __post_init__(self) -> None:
        if not is_rule_id(self.rule):
            raise ValueError(f"{self.rule!r:.100} is no rule id")
        if not self.reason.strip():
            raise ValueError(f"{self.rule}: a refusal has a reason")

    def __str__(self) -> str:
        return f"{self.reason} [{self.rule}]"


@dataclass(frozen=True, slots=True)
class Refused:
    """At least one rule says no; all that do are named."""

    whys: tuple[Why, ...]

    def __post_init__(self) -> None:
        if not self.whys:
            raise ValueError("a refusal names its rule")

    def __bool__(self) -> bool:
        return False

    @property
    def rules(self) -> tuple[str, ...]:
        """Ids of the rules that say no, each once, in the order they were asked."""
        return tuple(dict.fromkeys(why.rule for why in self.whys))

    @property
    def first(self) -> Why:
        """The first rule that says no."""
        return self.whys[0]

    def __str__(self) -> str:
        return "; ".join(map(str, self.whys))


Decision: TypeAlias = Allowed | Refused


def refused(rule: str, reason: str) -> Refused:
    """A no by one rule."""
    return Refused((Why(rule, reason),))


def all_of(decisions: Iterable[Decision]) -> Decision:
    """Yes only if there is a decision and all are yes; every rule that refuses is named."""
    allowed: list[str] = []
    whys: list[Why] = []
    count = 0
    for decision in decisions:
        count += 1
        if isinstance(decision, Refused):
            whys.extend(decision.whys)
        else:
            allowed.extend(decision.rules)
    if count == 0:
        return refused(NOTHING_CHECKED, "no rule was asked: that is never a yes")
    if whys:
        return Refused(tuple(dict.fromkeys(whys)))
    return Allowed(tuple(dict.fromkeys(allowed)))


def from_whys(whys: Iterable[Why]) -> Decision:
    """Yes if nothing is against it, for a caller whose list of checks is fixed in its code."""
    found = tuple(dict.fromkeys(whys))
    return Refused(found) if found else Allowed()
