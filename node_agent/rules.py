"""Why a node does not take part: a rule id and one sentence.

plan.…    the plan is not what the run said, or not one this agent can carry out
site.…    this site does not want to, or cannot
model.…   the model is not the one this node derived
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """The rule that was applied, and why in one sentence."""

    rule: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason} [{self.rule}]"
