"""What a benchmark says: rows, the ratios between them, and the table a person reads.

A row is one system doing one piece of work. Rows with the same ``what`` did the same work in the
same run, so that their ratio means something on a shared machine; their absolute times do not.
This file only computes: measuring is done elsewhere.

Units: seconds; MB = 10**6 bytes, for memory too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

OURS = "Minga"
FLOOR = "floor: TLS sockets + fsync"
HASHED = "the floor, SHA-256 at both ends"
RAW_TLS = "floor: TLS sockets, memory to memory"
NEW_TLS = "a new TLS stream, memory to memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Smallest, median and largest of some measurements of one thing."""

    minimum: float
    median: float
    maximum: float
    values: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("a spread needs at least one measurement")
        return cls(
            minimum=min(values),
            median=statistics.median(values),
            maximum=max(values),
            values=tuple(values),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, float]) -> Spread:
        """What ``to_json`` keeps; the single values are not in it."""
        return cls(minimum=value["min"], median=value["median"], maximum=value["max"], values=())

    def to_json(self) -> dict[str, float]:
        return {
            "min": round(self.minimum, 4),
            "median": round(self.median, 4),
            "max": round(self.maximum, 4),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system, one piece of work. ``None`` says: not measured here, or has no meaning here."""

    what: str  # the work; equal words, equal work
    system: str  # with its version
    params: int | None = None
    nodes: int | None = None
    seconds_per_round: Spread | None = None
    mb_per_s: Spread | None = None
    server_peak_rss_mb: float | None = None
    bytes_per_node: Mapping[str, int] | None = None  # "up" and "down", one round
    leaves_per_s: float | None = None  # of the round log
    note: str = ""
    skipped: str | None = None  # why there is no measurement; then every figure is None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Row:
        """A row as it was kept."""
        spreads = {
            name: None if value[name] is None else Spread.from_json(value[name])
            for name in ("seconds_per_round", "mb_per_s")
        }
        return cls(**{**value, **spreads})

    def to_json(self) -> dict[str, Any]:
        rss = self.server_peak_rss_mb
        return {
            "what": self.what,
            "system": self.system,
            "params": self.params,
            "nodes": self.nodes,
            "seconds_per_round": self.seconds_per_round and self.seconds_per_round.to_json(),
            "mb_per_s": self.mb_per_s and self.mb_per_s.to_json(),
            "server_peak_rss_mb": None if rss is None else round(rss, 1),
            "bytes_per_node": None if self.bytes_per_node is None else dict(self.bytes_per_node),
            "leaves_per_s": None if self.leaves_per_s is None else round(self.leaves_per_s),
            "note": self.note,
            "skipped": self.skipped,
        }


def together(rows: Sequence[Row]) -> Row:
    """One row of what one system did in several turns at the same work.

    Times count alike, whatever turn they are of; memory and bytes are the largest. A turn that was
    skipped counts only if all were.
    """
    done = [row for row in rows if row.skipped is None]
    if not done:
        return rows[0]
    first, peaks = done[0], [row.server_peak_rss_mb for row in done if row.server_peak_rss_mb]
    times = [row.seconds_per_round for row in done if row.seconds_per_round is not None]
    return replace(
        first,
        seconds_per_round=Spread.of([value for spread in times for value in spread.values]),
        server_peak_rss_mb=max(peaks, default=None),
        bytes_per_node=None
        if first.bytes_per_node is None
        else {
            way: max((row.bytes_per_node or {}).get(way, 0) for row in done)
            for way in first.bytes_per_node
        },
        note=f"{first.note}; {len(done)} turns" if len(done) > 1 else first.note,
    )


Measure = Literal["seconds_per_round", "mb_per_s", "server_peak_rss_mb"]
MEASURES: tuple[Measure, ...] = ("seconds_per_round", "mb_per_s", "server_peak_rss_mb")
LABEL: Mapping[Measure, str] = {
    "seconds_per_round": "time",
    "mb_per_s": "throughput",
    "server_peak_rss_mb": "server memory",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A ratio (ours / other) that the project promises, and for which work it does."""

    measure: Measure
    other: str  # how the other row's ``system`` begins
    at_most: float | None = None
    at_least: float | None = None
    params: int | None = None  # None: any size
    what: str = ""  # how the work begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """An absolute limit on our coordinator's memory, MB."""

    params: int
    nodes: int
    at_most_mb: float


# The design's table of numbers, section 9.
TARGETS: tuple[Target, ...] = (
    Target(measure="seconds_per_round", other="NVIDIA FLARE", at_most=0.5, params=25_000_000),
    Target(measure="seconds_per_round", other=FLOOR, at_most=3.0, params=25_000_000),
    Target(measure="seconds_per_round", other="floor: AES-CTR keystream", at_most=2.0),
    Target(measure="seconds_per_round", other="Flower SecAgg+", at_most=1 / 8),
    Target(measure="mb_per_s", other=RAW_TLS, at_least=0.9, what="transfer of 1024 MiB over"),
)
LIMITS: tuple[Limit, ...] = (
    Limit(params=25_000_000, nodes=4, at_most_mb=400.0),
    Limit(params=25_000_000, nodes=33, at_most_mb=440.0),  # within 10 % of that
    Limit(params=100_000_000, nodes=4, at_most_mb=600.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A least number of leaves a second, for our rows whose work begins so."""

    what: str
    at_least: float


RATES: tuple[Rate, ...] = (Rate(what="audit", at_least=2000.0),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Ours divided by another row of the same work; ``met`` is None where nothing is promised."""

    what: str
    measure: Measure
    other: str
    value: float  # of the medians
    best: float  # of the smallest, for throughput of the largest: what a quiet moment shows
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        low, high = self.target.at_least, self.target.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    @property
    def limit(self) -> str:
        """What is promised, in words; empty: nothing."""
        if self.target is None:
            return ""
        bounds = ("at least", self.target.at_least), ("at most", self.target.at_most)
        return ", ".join(f"{words} {value:g}" for words, value in bounds if value is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "measure": self.measure,
            "ours_over": self.other,
            "ratio": round(self.value, 3),
            "ratio_of_the_best": round(self.best, 3),
            "target": self.limit,
            "met": self.met,
        }


def figure(row: Row, measure: Measure) -> float | None:
    """The one number of ``row`` that stands for ``measure``: the median where there is a spread."""
    value = getattr(row, measure)
    return value.median if isinstance(value, Spread) else value


def best(row: Row, measure: Measure) -> float | None:
    """The best that was measured, where there is a spread."""
    value = getattr(row, measure)
    if isinstance(value, Spread):
        return value.maximum if measure == "mb_per_s" else value.minimum
    return value


def ratios(rows: Iterable[Row], targets: Sequence[Target] = TARGETS) -> list[Ratio]:
    """Divide each of our rows by every other row of the same work.

    Skipped rows take part in no ratio: a peer that did not run is neither beaten nor lost to.
    """
    rows = [row for row in rows if row.skipped is None]
    found = []
    for ours in (row for row in rows if row.system.startswith(OURS)):
        for other in rows:
            if other.what != ours.what or other.system.startswith(OURS):
                continue
            for measure in MEASURES:
                mine, theirs = figure(ours, measure), figure(other, measure)
                if mine is None or not theirs:
                    continue
                found.append(
                    Ratio(
                        what=ours.what,
                        measure=measure,
                        other=other.system,
                        value=mine / theirs,
                        best=(best(ours, measure) or mine) / (best(other, measure) or theirs),
                        target=_promise(ours, other, measure, targets),
                    )
                )
    return found


def _promise(ours: Row, other: Row, measure: Measure, targets: Sequence[Target]) -> Target | None:
    for target in targets:
        if (
            target.measure == measure
            and other.system.startswith(target.other)
            and target.params in (None, ours.params)
            and ours.what.startswith(target.what)
        ):
            return target
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """An absolute promise held against one of our rows."""

    text: str
    value_mb: float
    at_most_mb: float

    @property
    def met(self) -> bool:
        return self.value_mb <= self.at_most_mb

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "mb": round(self.value_mb, 1),
            "at_most_mb": round(self.at_most_mb, 1),
            "met": self.met,
        }


def memory_checks(rows: Iterable[Row], limits: Sequence[Limit] = LIMITS) -> list[Check]:
    """Our coordinator's peak memory against its limits, and 33 nodes against 4 nodes.

    Memory is flat in the number of nodes when 33 nodes need at most 10 % more than 4 do; the two
    are compared at equal model size only.
    """
    peaks: dict[tuple[int, int], float] = {}  # (params, nodes) -> MB, the largest seen
    for row in rows:
        rss = row.server_peak_rss_mb
        if not row.system.startswith(OURS) or row.skipped is not None or rss is None:
            continue
        if row.params is not None and row.nodes is not None:
            key = (row.params, row.nodes)
            peaks[key] = max(rss, peaks.get(key, 0.0))
    checks = [
        Check(
            text=f"{millions(limit.params)} parameters, {limit.nodes} nodes",
            value_mb=peaks[limit.params, limit.nodes],
            at_most_mb=limit.at_most_mb,
        )
        for limit in limits
        if (limit.params, limit.nodes) in peaks
    ]
    for (params, nodes), peak in sorted(peaks.items()):
        if nodes > 4 and (params, 4) in peaks:
            checks.append(
                Check(
                    text=f"{millions(params)} parameters, {nodes} nodes within 10 % of 4 nodes",
                    value_mb=peak,
                    at_most_mb=1.1 * peaks[params, 4],
                )
            )
    return checks


def rate_checks(rows: Iterable[Row], rates: Sequence[Rate] = RATES) -> list[dict[str, Any]]:
    """Our rows that count leaves, each held against its least rate."""
    return [
        {
            "text": row.what,
            "leaves_per_s": round(row.leaves_per_s),
            "at_least": rate.at_least,
            "met": row.leaves_per_s >= rate.at_least,
        }
        for row in rows
        for rate in rates
        if row.leaves_per_s is not None
        and row.system.startswith(OURS)
        and row.what.startswith(rate.what)
    ]


def millions(params: int) -> str:
    """2_500_000 -> "2.5 M"."""
    return f"{params / 1e6:g} M"


def round_work(*, params: int, nodes: int) -> str:
    """The name of "a whole round without training", so that all systems are compared by it."""
    return f"whole round without training, {nodes} nodes, {millions(params)} parameters"


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything a run found, ready for JSON."""
    return {
        "schema": "minga.bench/1",
        "rows": [row.to_json() for row in rows],
        "ratios": [ratio.to_json() for ratio in ratios(rows)],
        "memory": [check.to_json() for check in memory_checks(rows)],
        "rates": rate_checks(rows),
    }


def table(rows: Sequence[Row]) -> str:
    """The same for a person: one block per work, its rows, then our ratios."""
    lines: list[str] = []
    all_ratios = ratios(rows)
    for what in dict.fromkeys(row.what for row in rows):
        lines += ["", what]
        lines += [_line(row) for row in rows if row.what == what]
        lines += [_ratio_line(ratio) for ratio in all_ratios if ratio.what == what]
    checks = memory_checks(rows)
    if checks:
        lines += ["", "coordinator peak memory"]
        lines += [
            f"  {check.text}: {check.value_mb:.0f} MB, "
            f"at most {check.at_most_mb:.0f} MB: {_verdict(check.met)}"
            for check in checks
        ]
    lines += [
        f"  {check['text']}: {check['leaves_per_s']} leaves/s, "
        f"at least {check['at_least']:.0f}: {_verdict(check['met'])}"
        for check in rate_checks(rows)
    ]
    return "\n".join(lines).lstrip("\n")


def _line(row: Row) -> str:
    if row.skipped is not None:
        return f"  {row.system:<38} skipped: {row.skipped}"
    parts = []
    if row.seconds_per_round is not None:
        spread = row.seconds_per_round
        parts.append(f"{spread.minimum:.2f} / {spread.median:.2f} / {spread.maximum:.2f} s")
    if row.mb_per_s is not None:
        spread = row.mb_per_s
        parts.append(f"{spread.minimum:.0f} / {spread.median:.0f} / {spread.maximum:.0f} MB/s")
    if row.server_peak_rss_mb is not None:
        parts.append(f"server {row.server_peak_rss_mb:.0f} MB")
    if row.leaves_per_s is not None:
        parts.append(f"{row.leaves_per_s:.0f} leaves/s")
    if row.bytes_per_node is not None:
        up, down = row.bytes_per_node.get("up"), row.bytes_per_node.get("down")
        parts += [f"{n / 1e6:.1f} MB {way}" for n, way in ((up, "up"), (down, "down")) if n]
    return f"  {row.system:<38} {'  '.join(parts)}"


def _ratio_line(ratio: Ratio) -> str:
    promise = f"  ({ratio.limit}: {_verdict(ratio.met)})" if ratio.limit else ""
    figures = f"{LABEL[ratio.measure]} x {ratio.value:.2f}, of the best x {ratio.best:.2f}"
    return f"    ours / {ratio.other}: {figures}{promise}"


def _verdict(met: bool | None) -> str:
    return "met" if met else "MISSED"
