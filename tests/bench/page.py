"""BENCHMARKS.md and bench/results.json: what was measured, kept and shown.

``results.json`` holds the newest measurement of each piece of work, with the machine and commit it
was taken on; measuring some of them again replaces those and leaves the others. Ratios are of rows
that were measured together. Other benchmarks put their own figures beside it, in a file
``bench/<name>.json`` of schema ``minga.figures/1``:

    {"schema": "minga.figures/1", "title": "Load", "repeat": "make load",
     "machine": {"cpus": 2, "load_1min": 0.4, "commit": "abc1234"}, "text": "a sentence or two",
     "rows": [{"what": "1,000 nodes polling", "ours": "812 requests/s", "beside": "", "other": "",
               "ratio": null, "target": "at least 500 requests/s", "met": true, "note": ""}]}

``beside`` names a peer or a floor, ``other`` is its figure in the same run, ``ratio`` a number
(ours over theirs), ``met`` true, false or null (nothing is promised). The page is a function of
these files: a test compares them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.rows import (
    LABEL,
    MEASURES,
    OURS,
    Measure,
    Ratio,
    Row,
    figure,
    memory_checks,
    rate_checks,
    ratios,
    report,
)

BENCH = Path(__file__).parents[2] / "bench"
PAGE = BENCH.parent / "BENCHMARKS.md"
RESULTS = BENCH / "results.json"
SCHEMA = "minga.bench/2"
FIGURES = "minga.figures/1"
_GROUPS = (  # how the work of a group begins, and how to measure it again
    ("whole round", "make bench ARGS='--only round --peers'"),
    ("coordinator memory", "make bench ARGS='--only memory'"),
    ("bulk transfer", "make bench ARGS='--only bulk'"),
    ("transfer of", "make bench ARGS='--only link'"),
    ("masking", "make bench ARGS='--only masking'"),
    ("unmasking", "make bench ARGS='--only masking'"),
    ("audit", "make bench ARGS='--only audit'"),
)

Facts = dict[str, Any]


# -- results.json --------------------------------------------------------------------------------


def merge(before: Facts | None, rows: Sequence[Row], machine: Mapping[str, object]) -> Facts:
    """What is kept after measuring ``rows``: each piece of work anew or as it was."""
    kept = dict(before["works"]) if before is not None and before["schema"] == SCHEMA else {}
    for what in dict.fromkeys(row.what for row in rows):
        mine = [row.to_json() for row in rows if row.what == what]
        kept[what] = {"machine": dict(machine), "rows": mine}
    found = report(rows_of({"works": kept}))
    return {
        "schema": SCHEMA,
        "works": kept,
        **{name: found[name] for name in ("ratios", "memory", "rates")},
    }


def rows_of(facts: Facts) -> list[Row]:
    """All rows that are kept."""
    return [Row.from_json(row) for work in facts["works"].values() for row in work["rows"]]


def load(path: Path = RESULTS) -> Facts | None:
    """What was kept; None: nothing, or by an older program."""
    if not path.exists():
        return None
    facts: Facts = json.loads(path.read_text())
    return facts if facts.get("schema") == SCHEMA else None


def keep(rows: Sequence[Row], machine: Mapping[str, object], path: Path = RESULTS) -> None:
    """Keep what was measured, and write the page again if it is the page's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merge(load(path), rows, machine), indent=1) + "\n")
    if path == RESULTS:
        PAGE.write_text(render(load(path), figures()))


def figures(folder: Path = BENCH) -> list[Facts]:
    """The figures of other benchmarks, by file name.

    Raises:
        ValueError: a file in the folder is of no known schema.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text())
        if facts.get("schema") == FIGURES:
            found.append(facts)
        elif path.name != RESULTS.name:
            raise ValueError(f"{path.name} must be of schema {FIGURES}: see tests/bench/page.py")
    return found


# -- the page ------------------------------------------------------------------------------------


_HEAD = """\
# Benchmarks

<!-- Written by `make bench` from bench/*.json; do not edit. `make bench-page` writes it again. -->

Minga beside the systems that do the same, and beside the floor: what the operating system and TLS
alone need for the bytes that Minga moves. Rows of one table line were measured in turns in one run;
**only ratios mean anything**, since every absolute figure is that of a small shared machine. A
ratio is ours divided by theirs, of the medians; beside it that of the best, which is what a quiet
moment shows. How each row is measured, and what the peers run: [bench/README.md](bench/README.md).
"""


def render(results: Facts | None, others: Iterable[Facts]) -> str:
    """The whole page."""
    parts = [_HEAD]
    if results is not None:
        parts += [_group(results, start, repeat) for start, repeat in _known(results)]
        parts.append(_promises(rows_of(results)))
    parts += [_figures(facts) for facts in others]
    return "\n".join(part for part in parts if part)


def _known(results: Facts) -> Iterable[tuple[str, str]]:
    for start, repeat in _GROUPS:
        if any(what.startswith(start) for what in results["works"]):
            yield start, repeat
    rest = [w for w in results["works"] if not any(w.startswith(start) for start, _ in _GROUPS)]
    if rest:
        raise ValueError(f"a work of no group: {rest[0]}")


def _group(results: Facts, start: str, repeat: str) -> str:
    works = {what: work for what, work in results["works"].items() if what.startswith(start)}
    title = start.removesuffix(" over").capitalize()
    lines = [f"## {title}", "", f"Measure again: `{repeat}`", ""]
    lines += _table(
        ("what", "measure", "Minga", "beside", "theirs", "ratio", "best", "target", "reached"),
        [line for what, work in works.items() for line in _lines(what, work)],
    )
    lines += [f"- {what}: {_machine(work['machine'])}" for what, work in works.items()]
    return "\n".join([*lines, ""])


def _lines(what: str, work: Facts) -> Iterable[tuple[str, ...]]:
    rows = [Row.from_json(row) for row in work["rows"]]
    known = {(ratio.other, ratio.measure): ratio for ratio in ratios(rows)}
    for ours in (row for row in rows if row.system.startswith(OURS)):
        others = [row for row in rows if not row.system.startswith(OURS)]
        for measure in MEASURES:
            mine = _spread(ours, measure)
            if not mine:
                continue
            beside = [row for row in others if row.skipped is None and figure(row, measure)]
            for row in beside:
                ratio = known[row.system, measure]
                yield (what, LABEL[measure], mine, row.system, _spread(row, measure), *_of(ratio))
            if not beside:
                yield (what, LABEL[measure], mine, "", "", "", "", "", "")
        if ours.leaves_per_s is not None:
            yield (what, "leaves", f"{ours.leaves_per_s:,.0f}/s", "", "", "", "", "", "")
    for row in rows:
        if row.skipped is not None:
            yield (what, "", "", row.system, f"not measured: {row.skipped}", "", "", "", "")


def _of(ratio: Ratio) -> tuple[str, str, str, str]:
    return f"{ratio.value:.2f}", f"{ratio.best:.2f}", ratio.limit, _reached(ratio.met)


def _reached(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "**no**"


def _spread(row: Row, measure: Measure) -> str:
    value = getattr(row, measure)
    if value is None:
        return ""
    if measure == "server_peak_rss_mb":
        return f"{value:.0f} MB"
    unit = "s" if measure == "seconds_per_round" else "MB/s"
    form = ".2f" if unit == "s" else ".0f"
    low, mid, high = (format(v, form) for v in (value.minimum, value.median, value.maximum))
    return f"{mid} {unit} ({low} to {high})"


def _promises(rows: Sequence[Row]) -> str:
    """Absolute limits: memory, and leaves a second."""
    lines = [
        (f"coordinator's peak memory, {check.text}", f"{check.value_mb:.0f} MB",
         f"at most {check.at_most_mb:.0f} MB", _reached(check.met))
        for check in memory_checks(rows)
    ]  # fmt: skip
    lines += [
        (check["text"], f"{check['leaves_per_s']:,} leaves/s",
         f"at least {check['at_least']:,.0f} leaves/s", _reached(check["met"]))
        for check in rate_checks(rows)
    ]  # fmt: skip
    if not lines:
        return ""
    head = ["## Absolute limits", ""]
    return "\n".join([*head, *_table(("what", "Minga", "target", "reached"), lines)])


def _figures(facts: Facts) -> str:
    lines = [f"## {facts['title']}", ""]
    if facts.get("text"):
        lines += [facts["text"], ""]
    lines += [f"Measure again: `{facts['repeat']}`", ""]
    lines += _table(
        ("what", "Minga", "beside", "theirs", "ratio", "target", "reached", "note"),
        [
            (
                row["what"],
                str(row["ours"]),
                row.get("beside") or "",
                str(row.get("other") or ""),
                "" if row.get("ratio") is None else f"{row['ratio']:.2f}",
                row.get("target") or "",
                _reached(row.get("met")),
                row.get("note") or "",
            )
            for row in facts["rows"]
        ],
    )
    lines += [f"- {_machine(facts['machine'])}", ""]
    return "\n".join(lines)


def _machine(machine: Mapping[str, Any]) -> str:
    words = [
        ("commit", machine.get("commit")),
        ("cores", machine.get("cpus")),
        ("load before", machine.get("load_1min")),
        ("SHA-256 MB/s on one core", machine.get("sha256_mb_per_s")),
        ("on", machine.get("date")),
    ]
    return ", ".join(f"{name} {value}" for name, value in words if value is not None)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Markdown; columns that are empty everywhere are left out."""
    rows = [tuple(cell.replace("|", "/") for cell in line) for line in lines]
    used = [i for i, _ in enumerate(head) if any(row[i] for row in rows)]
    made = [[head[i] for i in used], ["---"] * len(used)]
    made += [[row[i] for i in used] for row in rows]
    return [*("| " + " | ".join(cells) + " |" for cells in made), ""]


if __name__ == "__main__":  # ``make bench-page``
    PAGE.write_text(render(load(), figures()))
    sys.stdout.write(f"written: {PAGE}\n")
