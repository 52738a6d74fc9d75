"""From what the cases found to docs/faults.json, and from that to docs/faults.md."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from tests.matrix.points import ELSEWHERE, NOT_YET, Part, commit_points

ROOT: Final = Path(__file__).parents[2]
OUT: Final = ROOT / "build" / "faults"
FACTS: Final = ROOT / "docs" / "faults.json"
PAGE: Final = ROOT / "docs" / "faults.md"
PHASES: Final = (
    *("none", "Open", "Training", "Dealing", "Uploading", "Committing", "Revealing"),
    *("Released", "Aborted", "Burned", "no database"),
)
COLUMNS: Final = ("fault", "victim", "phase", "mode", "database", "outcome", "went_on_s", "point")


_DEBT: Final = "**not visited yet**: the last run of `make faults` was cut short before it"


_NOTES: Final = """\
What the words mean:

- *Network.* The kernel that ran this has no `netem`. What says *packets* is done to packets of
  1,500 bytes between two network namespaces, by a process that holds them back or drops them
  (`tests/bench/netlink.py`); TCP itself sends them again. The interface that goes down is a real
  one, between two network namespaces (`tests/matrix/interfaces.py`). The other rows, half-open
  connections and refused ones among them, are of a relay of bytes on loopback
  (`tests/matrix/relay.py`).
- *Half-open.* Nothing says that such a connection is dead. A node dials again when a call has had
  no answer for 30 s, or a poll of 25 s is 15 s overdue; its streams begin anew with that. That is
  40 s at most. A node that reports now and then began to wait anew with each report, once: a row
  of a minute in an older page was that.
- *Clock off by.* Of one party alone, and then right again. Cosignatures from more than five minutes
  ahead are not taken, so rounds wait as long as a witness is ahead of the coordinator, whoever of
  them is wrong, and go on when the clock is right. A round that opens meanwhile is declined by a
  node that is ahead, and where every node is needed it is tried again. *Clock jumps by* stays, and
  adds up.
- *Worker.* The real one with a small Llama, under an agent's launcher, a job for each kill; what is
  compared is what it hands over, bit for bit. Its time to go on holds the import of torch.
- *Cases stand alone.* Before each a whole run has to end, so that everybody is back. An older page
  had 43 s for a clock jump in Open: that was a node, killed by the case before, that was still
  starting; with the run in between it takes as long as in other phases.
- *Two coordinators.* Once a run whose leading coordinator was killed in Open had not gone on after
  four minutes, with the machine under a load of 11. Repeated with nodes that had just started, it
  was found in minutes: a node whose call was given up before its connection stood never asked
  again for heads to cosign, and without a quorum of nodes the new writer of the log signs nothing.
  Mended (`tests/faults/test_witness_stream.py`), and the rows are from after it.
- *The two databases.* An empty cell was not tried. The network and the disk of the others do not
  meet the database: with open sums that was tried on SQLite only. Half-open connections, which take
  half a minute each, too.
"""


def merge(known: frozenset[str]) -> None:
    """Gather the cases that have run; a case that has not run this time stays as it was.

    Args:
        known: names of all cases; what is no case any more is dropped.
    """
    facts: dict[str, Any] = read_facts() if FACTS.exists() else {"cases": {}}
    for path in sorted(OUT.glob("*.json")):
        said = json.loads(path.read_text())
        facts["cases"][said["case"]] = {
            "at": said["at"],
            "seconds": said["seconds"],
            "load": said["load"],
            "missed": said["missed"],
            "rows": [[row[name] for name in COLUMNS] for row in said["rows"]],
        }
    facts["cases"] = {name: case for name, case in facts["cases"].items() if name in known}
    facts["columns"] = COLUMNS
    facts["cores"] = os.cpu_count()
    FACTS.write_text(to_text(facts), "utf-8")


def to_text(facts: dict[str, Any]) -> str:
    """JSON with one row in a line, so that a change shows."""
    lines = ["{", f' "cores": {json.dumps(facts["cores"])},']
    lines += [f' "columns": {json.dumps(facts["columns"])},', ' "cases": {']
    cases = sorted(facts["cases"].items())
    for place, (name, case) in enumerate(cases, start=1):
        rows = ",\n".join(f"   {json.dumps(row)}" for row in case["rows"])
        lines += [
            (
                f'  {json.dumps(name)}: {{"at": {json.dumps(case["at"])}, '
                f'"seconds": {case["seconds"]}, "load": {json.dumps(case.get("load"))}, '
                f'"missed": {json.dumps(case["missed"])}, "rows": ['
            ),
            f"{rows}]}}{',' if place < len(cases) else ''}",
        ]
    return "\n".join([*lines, " }", "}", ""])


def read_facts() -> dict[str, Any]:
    """docs/faults.json."""
    facts: dict[str, Any] = json.loads(FACTS.read_text("utf-8"))
    return facts


def rows_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of all cases."""
    return [
        dict(zip(facts["columns"], row, strict=True))
        for _, case in sorted(facts["cases"].items())
        for row in case["rows"]
    ]


def write_page() -> None:
    """Make docs/faults.md."""
    PAGE.write_text(page(read_facts()), "utf-8")


def page(facts: dict[str, Any]) -> str:
    """The page, from the facts alone (and the list of what is tested elsewhere)."""
    rows = rows_of(facts)
    return "\n".join(
        [
            *_head(facts, rows),
            *_by_phase(rows),
            *_points(rows),
            *_elsewhere(),
        ]
    )


def _head(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    same = sum(row["outcome"] == "same" for row in rows)
    times = [row["went_on_s"] for row in rows if row["went_on_s"] is not None]
    newest = max((case["at"] for case in facts["cases"].values()), default="never")
    total = sum(case["seconds"] for case in facts["cases"].values())
    return [
        "# What happens when something breaks",
        "",
        (
            "<!-- Made by `make faults` from docs/faults.json, which the runs themselves wrote."
            " Do not edit. -->"
        ),
        "",
        (
            f"{len(rows)} faults were made to happen in a federation of real processes (three"
            " nodes, mutual TLS, round log with all nodes as witnesses; masked sums with every node"
            " needed, and open sums; those of the worker under its launcher alone). After each, the"
            " run had to end with the very digests of the undisturbed run, every survivor counted"
            " once, every node confirming the same model:"
            f" **{same} of {len(rows)}** did. Last run {newest}, {total // 60} minutes on"
            f" {facts['cores']} cores{_beside(facts)}."
        ),
        "",
        (
            f"*Time to go on* is the longest seen (the longest of all: {max(times, default=0):.1f}"
            " s). After a kill it counts from when the new process has imported its code to the"
            " first thing it made durable for a round; after a trouble from its end to the next"
            " phase that the coordinator recorded, where the round still needed one. `no wait`:"
            " the next kill came first, or the round was over before the trouble was."
        ),
        "",
    ]


def _beside(facts: dict[str, Any]) -> str:
    """What else the machine did: the load average before and at the end of the cases."""
    loads = [load for case in facts["cases"].values() for load in case.get("load") or ()]
    if not loads:
        return ""
    most = _side_by_side(facts["cases"].values())
    return (
        f" that did other work as well: the load average was {min(loads):.1f} to {max(loads):.1f}"
        f" (the median {statistics.median(loads):.1f}), where {facts['cores']} would fill them"
        + (f"; up to {most} of these cases ran side by side" if most > 1 else "")
        + ". On a machine of its own the times are shorter"
    )


def _side_by_side(cases: Iterable[dict[str, Any]]) -> int:
    """How many cases ran at once, at most: a case ended at ``at`` and lasted ``seconds``."""
    ends = [(datetime.fromisoformat(case["at"]), case["seconds"]) for case in cases]
    spans = [(end - timedelta(seconds=lasted), end) for end, lasted in ends]
    return max((sum(a < start <= b for a, b in spans) + 1 for start, _ in spans), default=0)


def _by_phase(rows: Iterable[dict[str, Any]]) -> list[str]:
    found: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        found[row["victim"], row["fault"], row["mode"]][row["phase"]].append(row)
    lines = ["## Phase, victim, database", ""]
    lines += [
        "| victim | fault | sum | phase | SQLite | PostgreSQL |",
        "|---|---|---|---|---|---|",
    ]
    for (victim, fault, mode), phases in sorted(found.items()):
        for phase in sorted(phases, key=_phase_order):
            cells = [
                _cell([row for row in phases[phase] if row["database"] == database])
                for database in ("sqlite", "postgresql")
            ]
            kind = "open" if mode == "open" else "masked"
            lines.append(f"| {victim} | {fault} | {kind} | {phase} | {cells[0]} | {cells[1]} |")
    return [*lines, "", *_NOTES.splitlines(), ""]


def _phase_order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    bad = sorted({row["outcome"] for row in rows if row["outcome"] != "same"})
    times = [row["went_on_s"] for row in rows if row["went_on_s"] is not None]
    count = f"{len(rows)} x " if len(rows) > 1 else ""
    if bad:
        return f"{count}**{'; '.join(bad)}**"
    return f"{count}same" + (f", {max(times):.1f} s" if times else ", no wait")


def _points(rows: Iterable[dict[str, Any]]) -> list[str]:
    visited: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["point"]:
            point, _, when = row["point"].partition("@")
            kind = "open" if row["mode"] == "open" else "masked"
            visited[point].add(f"{when}/{kind}/{row['database']}")
    lines = [
        "## Commit points",
        "",
        (
            "Found in the source by `tests/matrix/points.py`: a transaction, or a file that becomes"
            " durable or gets its name. Each was visited by SIGKILL right before and right after"
            " it; the numbers say how often, over both kinds of sum and both databases. A test"
            " fails when the source has a point that is not here."
        ),
        "",
    ]
    parts: tuple[Part, ...] = ("coordinator", "node", "worker")
    for part in parts:
        lines += [
            f"### {part}",
            "",
            "| commit point | killed before | killed after |",
            "|---|---|---|",
        ]
        for point in sorted(commit_points(part)):
            seen = visited.get(point)
            if seen:
                before = sum(each.startswith("before") for each in seen)
                after = sum(each.startswith("after") for each in seen)
                lines.append(f"| `{point}` | {before} | {after} |")
        lines.append("")
    return lines


def _elsewhere() -> list[str]:
    lines = [
        "### Not in a plain round",
        "",
        "| commit point | why, and where it is tested |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {why} |" for name, why in sorted(ELSEWHERE.items())]
    lines += [f"| `{name}` | {_DEBT} |" for name in sorted(NOT_YET)]
    return [*lines, ""]
