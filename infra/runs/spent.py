"""Privacy of a run as values, JSON and a table: what it promises, what institutions have spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from protocols.gen import admin_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """One institution's data set, over all runs, by the coordinator's ledger."""

    node: str
    dataset: str
    unit: str
    rounds: int  # of this run that count as spent
    epsilon: str  # decimal, rounded up; "unbounded"; empty: cannot be added up
    delta: str
    budget: str  # epsilon that the federation allows; empty: it sets no cap
    rounds_left: int  # that the rest buys under this plan, up to all it has
    why: str

    @property
    def left(self) -> str:
        """What the cap leaves, rounded down; empty where it cannot be said."""
        try:
            return f"{max(0.0, float(self.budget) - float(self.epsilon)):.3f}"
        except ValueError:
            return ""


def read_spent(facts: Sequence[admin_pb2.SpendFacts]) -> tuple[Spent, ...]:
    """The coordinator's answer as values."""
    return tuple(
        Spent(
            node=fact.node,
            dataset=fact.dataset,
            unit=fact.unit,
            rounds=int(fact.rounds),
            epsilon=fact.epsilon,
            delta=fact.delta,
            budget=fact.budget,
            rounds_left=int(fact.rounds_left),
            why=fact.why,
        )
        for fact in facts
    )


def spent_to_json(spent: Sequence[Spent]) -> list[dict[str, Any]]:
    """One object for each institution."""
    return [
        {
            "institution": entry.node,
            "dataset": entry.dataset,
            "unit": entry.unit,
            "rounds_spent": entry.rounds,
            "epsilon": entry.epsilon or None,
            "delta": entry.delta,
            "budget": entry.budget or None,
            "left": entry.left or None,
            "rounds_left": entry.rounds_left if entry.budget else None,
            "why": entry.why,
        }
        for entry in spent
    ]


def spent_table(spent: Sequence[Spent]) -> RenderableType | None:
    """A table; None: the run is not private."""
    from infra.runs.show import Sheet

    if not spent:
        return None
    first = spent[0]
    title = f"Privacy by {first.unit}, data set {first.dataset}, all runs, delta {first.delta}"
    columns = ("institution", "epsilon", "allowed", "left", "rounds", "more rounds")
    made = Sheet(title, columns)
    for entry in spent:
        capped = bool(entry.budget)
        made.row(
            entry.node,
            entry.epsilon or "-",
            entry.budget or "-",
            entry.left or "-",
            entry.rounds,
            entry.rounds_left if capped else "-",
        )
    if any(entry.budget for entry in spent):
        return made
    note = "No cap is set here; each site decides by its own budget: `minga node status`."
    return Group(made, Text(note), Text(""))
