"""What a run cost, institution by institution: sums of what the nodes claim.

    cost = GPU hours x price of one  +  kilowatt hours x price of one

Traffic is what the coordinator counted itself; everything else is the institutions' word, and the
log's ``update.commit`` carries it signed. A round for which a node said nothing is "not reported",
never zero. Where the plan sums costs, the sum over the survivors is shown as well, with how many
of them took part in it: it counts sites that name nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from protocols.gen import admin_pb2

_H: Final = 3_600_000  # milliseconds
_KWH: Final = 1_000_000  # milliwatt hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What the coordinator's configuration says things cost."""

    currency: str
    gpu_hour: float
    kwh: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Claimed figures."""

    gpu_ms: int = 0
    cpu_ms: int = 0
    energy_mwh: int = 0
    sources: frozenset[str] = frozenset()  # of the energy

    def __add__(self, other: Used) -> Used:
        return Used(
            gpu_ms=self.gpu_ms + other.gpu_ms,
            cpu_ms=self.cpu_ms + other.cpu_ms,
            energy_mwh=self.energy_mwh + other.energy_mwh,
            sources=self.sources | other.sources,
        )

    @property
    def gpu_hours(self) -> float:
        """Hours in which a device was held."""
        return self.gpu_ms / _H

    @property
    def cpu_hours(self) -> float:
        """Hours of one core."""
        return self.cpu_ms / _H

    @property
    def kwh(self) -> float:
        """Energy."""
        return self.energy_mwh / _KWH

    @property
    def energy_source(self) -> str:
        """How the energy is known: the weakest of all that were added."""
        for source in ("none", "estimated", "measured"):
            if source in self.sources:
                return source if len(self.sources) == 1 else f"partly {source}"
        return "none"

    def money(self, prices: Prices) -> float:
        """In the prices' currency."""
        return self.gpu_hours * prices.gpu_hour + self.kwh * prices.kwh

    def to_json(self, prices: Prices | None) -> dict[str, Any]:
        """Figures with their units in the names."""
        facts: dict[str, Any] = {
            "gpu_hours": round(self.gpu_hours, 6),
            "cpu_hours": round(self.cpu_hours, 6),
            "energy_kwh": round(self.kwh, 6),
            "energy_source": self.energy_source,
        }
        if prices is not None:
            facts["cost"], facts["currency"] = round(self.money(prices), 4), prices.currency
        return facts


def read_used(facts: admin_pb2.RoundFacts) -> dict[str, Used]:
    """What each node claims for a round; nodes that claim nothing are not in it."""
    return {
        entry.node: Used(
            gpu_ms=int(entry.used.gpu_ms),
            cpu_ms=int(entry.used.cpu_ms),
            energy_mwh=int(entry.used.energy_mwh),
            sources=frozenset((entry.used.source,)),
        )
        for entry in facts.resources
    }


def read_prices(facts: admin_pb2.RunFacts) -> Prices | None:
    """The prices; None where none are set."""
    if not facts.HasField("prices"):
        return None
    return Prices(
        currency=facts.prices.currency, gpu_hour=facts.prices.gpu_hour, kwh=facts.prices.kwh
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a cost table."""

    name: str  # an institution, or a round
    used: Used
    reported: int  # of ``expected``
    expected: int  # updates that are in a sum


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundUsed:
    """A round, as far as costs go."""

    number: int
    survivors: tuple[str, ...]
    used: dict[str, Used]
    summed: Used | None  # of the sum's own coordinates; None: the plan has none
    summed_over: int  # nodes that filled them in


def summed_of(metrics: dict[str, int]) -> tuple[Used | None, int]:
    """The figures inside a released sum; how many nodes filled them in."""
    if "reporting" not in metrics:
        return None, 0
    used = Used(
        gpu_ms=metrics["gpu_ms"],
        cpu_ms=metrics["cpu_ms"],
        energy_mwh=metrics["energy_mwh"],
        sources=frozenset(("summed",)),
    )
    return used, metrics["reporting"]


def by_institution(rounds: Sequence[RoundUsed]) -> list[Line]:
    """One line for each node whose update is in a sum or that claims something, ascending."""
    names = sorted({name for round_ in rounds for name in (*round_.survivors, *round_.used)})
    return [
        _line(
            name,
            [round_.used.get(name) for round_ in rounds if name in round_.used],
            sum(name in round_.survivors or name in round_.used for round_ in rounds),
        )
        for name in names
    ]


def by_round(rounds: Sequence[RoundUsed]) -> list[Line]:
    """One line for each round."""
    return [
        _line(
            str(round_.number),
            list(round_.used.values()),
            len({*round_.survivors, *round_.used}),
        )
        for round_ in rounds
    ]


def _line(name: str, claims: Sequence[Used | None], expected: int) -> Line:
    given = [claim for claim in claims if claim is not None]
    return Line(name=name, used=sum(given, Used()), reported=len(given), expected=expected)
