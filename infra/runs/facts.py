"""What a run's facts say, as values: pure functions from the coordinator's answers to figures.

A round's metrics are sums over its survivors, opened together with the model's sum: training
figures are of the round itself, evaluation figures (``nll_millinats/es`` and the like) are of the
model the round STARTED from. Numerator and denominator are kept apart until the last moment, so a
figure over all languages is one quotient of sums, never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from infra.runs.costs import Prices, RoundUsed, Used, read_prices, read_used, summed_of
from infra.runs.spent import Spent, read_spent, spent_to_json
from protocols.gen import admin_pb2
from protocols.identifiers import RoundId
from protocols.plan import Plan
from protocols.plan_privacy import promise
from protocols.rounds_codec import from_ms
from protocols.strata import is_country
from protocols.wire import read_round

ENDED: Final = frozenset({"done", "stopped", "failed"})  # states of a run that never change again


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out evaluation of one model in one language, summed over sites."""

    nll_millinats: int
    text_bytes: int  # UTF-8
    documents: int

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log likelihood in bits, per byte of text; None if no text was read."""
        if self.text_bytes == 0:
            return None
        return self.nll_millinats / 1000 / math.log(2) / self.text_bytes

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            nll_millinats=self.nll_millinats + other.nll_millinats,
            text_bytes=self.text_bytes + other.text_bytes,
            documents=self.documents + other.documents,
        )


NOTHING_READ: Final = Evaluation(nll_millinats=0, text_bytes=0, documents=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """A phase and how long it lasted."""

    phase: str
    entered_at: datetime  # UTC
    seconds: float | None  # None: the round is still in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of one node in one round, as the coordinator counted them, and its verdict."""

    node: str
    up: int  # bytes
    down: int  # bytes
    confirmed: str  # model root the node computed, "objection: ...", or empty


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """One round, ready to be shown."""

    round: RoundId
    index: int  # which of the plan's rounds
    phase: str
    why: str
    spans: tuple[PhaseSpan, ...]
    traffic: tuple[Traffic, ...]
    metrics: Mapping[str, int]
    model_in: str  # digest of the model the round started from
    model_out: str  # digest of the next model, or empty
    sum: str  # digest of the released sum, or empty
    survivors: tuple[str, ...]
    ready: tuple[str, ...]  # who has done what the phase asks for, ascending
    next_snapshot: bytes | None  # canonical document of the next model, once there is one
    attempt: int = 0  # of the sum, from 1; 0: none has begun, or the round ended without a sum
    roster: tuple[str, ...] = ()  # all nodes of the plan, ascending; empty: not known
    used: Mapping[str, Used] = field(default_factory=dict)  # what each node says it cost

    @property
    def costs(self) -> RoundUsed:
        """What it cost, as far as it is said."""
        summed, over = summed_of(dict(self.metrics))
        return RoundUsed(
            number=self.round.number,
            survivors=self.survivors if self.released else (),
            used=dict(self.used),
            summed=summed,
            summed_over=over,
        )

    @property
    def released(self) -> bool:
        """Whether the round's sum was opened."""
        return self.phase == "Released" and bool(self.model_out)

    @property
    def ended(self) -> bool:
        """Whether nothing can happen to the round any more."""
        return self.released or self.phase in ("Aborted", "Burned")

    @property
    def absent(self) -> tuple[str, ...]:
        """Of a released round: the nodes of the plan whose update is not in the sum."""
        return tuple(node for node in self.roster if node not in self.survivors and self.released)

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """By language, and by country where the plan opens that, of the round's starting model;
        what holds no text is left out."""
        found = {}
        for name in sorted(self.metrics):
            head, slash, language = name.partition("/")
            if slash and head == "nll_millinats":
                evaluation = Evaluation(
                    nll_millinats=self.metrics[name],
                    text_bytes=self.metrics.get(f"bytes/{language}", 0),
                    documents=self.metrics.get(f"documents/{language}", 0),
                )
                if evaluation.text_bytes:
                    found[language] = evaluation
        return found

    @property
    def bits_per_byte(self) -> float | None:
        """Over all languages together: one quotient of sums."""
        every = (value for name, value in self.evaluations.items() if not is_country(name))
        return sum(every, NOTHING_READ).bits_per_byte

    @property
    def training_loss(self) -> float | None:
        """Mean training loss in nats per token over all sites; None if nobody trained."""
        tokens = self.metrics.get("tokens", 0)
        return self.metrics.get("loss_micronats", 0) / 1e6 / tokens if tokens else None

    @property
    def confirmed(self) -> frozenset[str]:
        """The nodes that have said which model they computed, or why they object."""
        return frozenset(entry.node for entry in self.traffic if entry.confirmed)

    @property
    def seconds(self) -> float | None:
        """From opening to the end; None while the round goes on."""
        if not self.ended or not self.spans:
            return None
        return (self.spans[-1].entered_at - self.spans[0].entered_at).total_seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """A run and its rounds, ready to be shown."""

    run: str
    title: str
    status: str
    plan_digest: str
    submitted_at: datetime  # UTC
    rounds_planned: int
    rounds: tuple[RoundReport, ...]  # in the order in which they were opened
    mode: str = ""  # of the sum; empty: not known
    promise: str = ""  # what the mode promises, in a few words
    spent: tuple[Spent, ...] = ()  # of each institution; empty: nothing is private
    prices: Prices | None = None  # None: the coordinator has none

    @property
    def ended(self) -> bool:
        """Whether nothing happens any more: no round will be opened, none goes on."""
        return self.status in ENDED and all(round_.ended for round_ in self.rounds)

    @property
    def released(self) -> tuple[RoundReport, ...]:
        """The rounds whose sum was opened."""
        return tuple(round_ for round_ in self.rounds if round_.released)

    @property
    def current(self) -> RoundReport | None:
        """The last round that was opened."""
        return self.rounds[-1] if self.rounds else None

    def languages(self) -> tuple[str, ...]:
        """All languages that were evaluated, ascending."""
        return tuple(sorted({name for round_ in self.rounds for name in round_.evaluations}))

    def learning(self, language: str | None = None) -> list[tuple[int, float]]:
        """Pairs (number of training rounds behind the model, held-out bits per byte).

        Args:
            language: one language; None for all of them together.
        """
        points = []
        for round_ in self.released:
            if language is None:
                value = round_.bits_per_byte
            else:
                value = round_.evaluations.get(language, NOTHING_READ).bits_per_byte
            if value is not None:
                points.append((round_.index, value))
        return points


def spans_of(times: Sequence[tuple[str, datetime]]) -> tuple[PhaseSpan, ...]:
    """Durations from the moments at which phases were entered.

    A phase entered twice in a row (a released sum that is then opened) is one span per entry; the
    last span has no end.
    """
    spans = []
    for position, (phase, entered_at) in enumerate(times):
        following = times[position + 1][1] if position + 1 < len(times) else None
        seconds = None if following is None else (following - entered_at).total_seconds()
        spans.append(PhaseSpan(phase=phase, entered_at=entered_at, seconds=seconds))
    return tuple(spans)


_DONE_SO_FAR: Final = {  # phase -> the list of its view that grows
    "Open": "joined",
    "Training": "ready",
    "Dealing": "dealt",
    "Uploading": "received",
    "Committing": "commits",
    "Revealing": "revealed",
    "Released": "survivors",
}


def read_round_facts(facts: admin_pb2.RoundFacts, roster: tuple[str, ...] = ()) -> RoundReport:
    """One round of the coordinator's answer, and who could have been in it.

    Raises:
        MalformedMessageError: a name or time in it is none.
    """
    view = facts.phase
    grown = _DONE_SO_FAR.get(view.name)
    return RoundReport(
        round=read_round(facts.round),
        index=int(facts.index),
        phase=view.name,
        why=facts.why,
        spans=spans_of([(entry.phase, from_ms(int(entry.entered_at_ms))) for entry in facts.times]),
        traffic=tuple(
            Traffic(
                node=entry.node,
                up=int(entry.bytes_up),
                down=int(entry.bytes_down),
                confirmed=entry.confirmed,
            )
            for entry in sorted(facts.traffic, key=lambda entry: entry.node)
        ),
        metrics={name: int(value) for name, value in facts.metrics.items()},
        model_in=facts.model_root_in,
        model_out=view.model_root,
        sum=view.sum,
        survivors=tuple(view.survivors),
        ready=tuple(getattr(view, grown)) if grown else (),
        next_snapshot=facts.next_snapshot or None,
        attempt=int(view.attempt),
        roster=roster,
        used=read_used(facts),
    )


def read_run_facts(facts: admin_pb2.RunFacts) -> RunReport:
    """The coordinator's answer as values.

    Raises:
        MalformedMessageError: a name or time in it is none.
    """
    plan = Plan.from_bytes(facts.plan) if facts.plan else None
    roster = plan.roster if plan else ()
    return RunReport(
        run=facts.run,
        title=facts.title,
        status=facts.status,
        plan_digest=facts.plan_digest,
        submitted_at=from_ms(int(facts.submitted_at_ms)),
        rounds_planned=int(facts.rounds_planned),
        rounds=tuple(read_round_facts(entry, roster) for entry in facts.rounds),
        mode=plan.mode if plan else "",
        promise=promise(plan) if plan else "",
        spent=read_spent(facts.privacy),
        prices=read_prices(facts),
    )


# -- as JSON -------------------------------------------------------------------------------------


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _costs(report: RoundReport, prices: Prices | None) -> dict[str, Any]:
    costs = report.costs
    return {
        "nodes": {node: used.to_json(prices) for node, used in sorted(costs.used.items())},
        "not_reported": sorted(set(costs.survivors) - set(costs.used)),
        "in_the_sum": None if costs.summed is None else costs.summed.to_json(prices),
        "in_the_sum_of_nodes": costs.summed_over,
    }


def round_to_json(report: RoundReport, prices: Prices | None = None) -> dict[str, Any]:
    """Facts of a round; times are UTC, ISO 8601; figures carry their unit in the name."""
    return {
        "round": str(report.round),
        "index": report.index,
        "phase": report.phase,
        "why": report.why,
        "seconds": _rounded(report.seconds, 3),
        "phases": [
            {
                "phase": span.phase,
                "entered_at": span.entered_at.isoformat(),
                "seconds": _rounded(span.seconds, 3),
            }
            for span in report.spans
        ],
        "attempt": report.attempt or None,
        "survivors": list(report.survivors),
        "absent": list(report.absent),
        "model_in": report.model_in,
        "model_out": report.model_out or None,
        "sum": report.sum or None,
        "bits_per_byte": _rounded(report.bits_per_byte, 6),
        "bits_per_byte_by_language": {
            language: _rounded(evaluation.bits_per_byte, 6)
            for language, evaluation in report.evaluations.items()
        },
        "training_loss_nats_per_token": _rounded(report.training_loss, 6),
        "metrics": dict(sorted(report.metrics.items())),
        "costs": _costs(report, prices),
        "traffic": [
            {
                "node": entry.node,
                "bytes_up": entry.up,
                "bytes_down": entry.down,
                "confirmed": entry.confirmed or None,
            }
            for entry in report.traffic
        ],
    }


def run_to_json(report: RunReport) -> dict[str, Any]:
    """Facts of a run with its rounds."""
    return {
        "run": report.run,
        "title": report.title,
        "status": report.status,
        "mode": report.mode or None,
        "promise": report.promise or None,
        "privacy": spent_to_json(report.spent),
        "plan_digest": report.plan_digest,
        "submitted_at": report.submitted_at.isoformat(),
        "rounds_planned": report.rounds_planned,
        "rounds": [round_to_json(round_, report.prices) for round_ in report.rounds],
    }


# -- for people ----------------------------------------------------------------------------------

_UNITS: Final = ("B", "kB", "MB", "GB", "TB")
_BARS: Final = "_.:-=+*#%@"  # low to high


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB``; powers of 1000, as links are sold."""
    for unit in _UNITS:
        if abs(count) < 999.5 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable: the last unit takes everything")


def sparkline(values: Sequence[float]) -> str:
    """One ASCII character per value, from ``_`` (lowest) to ``@`` (highest).

    Heights go by the square root above the lowest value: what is learned late is little beside
    the first round, and would all look alike on a linear scale.

    =======================  ==============================
    Case                     Result
    =======================  ==============================
    no values                an empty text
    all values equal         the lowest character throughout
    =======================  ==============================
    """
    if not values:
        return ""
    low = min(values)
    width = (max(values) - low) or 1.0
    top = len(_BARS) - 1
    return "".join(_BARS[round(math.sqrt((value - low) / width) * top)] for value in values)
