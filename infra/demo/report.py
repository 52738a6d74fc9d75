"""The end of a demonstration: what was learned and moved, and what protected whom.

The same facts are printed as tables and written to ``report/summary.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from infra.demo.faults import Struck
from infra.demo.settings import Settings
from infra.demo.sites import SiteText
from infra.runs.facts import RunReport, human_bytes, run_to_json, sparkline
from infra.runs.show import (
    Sheet,
    absences,
    figure,
    learning_table,
    phases_table,
    seconds_by_phase,
    traffic_of,
)
from infra.runs.spent import spent_table

SCHEMA: Final = "minga.demo-summary/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeWords:
    """What a mode of the sum protects, for people."""

    masked: bool  # whether single updates are hidden from the coordinator
    differentially_private: bool  # whether what a sum betrays about one record is bounded
    label: str  # one line
    meaning: str


MODES: Final[Mapping[str, ModeWords]] = {
    "open": ModeWords(
        masked=False,
        differentially_private=False,
        label="mode open is NOT PRIVATE: the coordinator sees every single update",
        meaning="Mode OPEN: this run is NOT PRIVATE. The text never left its site's folder, but "
        "each site's update travelled unmasked: the coordinator could look at every one of them, "
        "and an update can betray text. A site's rules should allow this mode for public data "
        "only. What did protect: mutual TLS and one-time invitations decide who may speak; an "
        "upload has a signed header and counts once, whatever crashes; sums are whole numbers, so "
        "they are exact; and every node computed the next model itself from the published sum and "
        "compared. The adding itself is the coordinator's word in this mode.",
    ),
    "aggregate-only": ModeWords(
        masked=True,
        differentially_private=False,
        label="mode aggregate-only: single updates are masked, only their sum is opened; "
        "NOT differentially private",
        meaning="Mode AGGREGATE-ONLY: updates were masked, and only their sum was opened, over at "
        "least as many sites as the plan's threshold. Nobody, the coordinator included, saw one "
        "site's update or loss, unless more sites than the plan assumes work together with it. "
        "This is NOT differentially private: what the sum itself betrays, it betrays. Every node "
        "checked how the sum was opened (the transcript is a blob beside it) and computed the "
        "next model itself.",
    ),
    "record-local": ModeWords(
        masked=True,
        differentially_private=True,
        label="mode record-local: every training step is differentially private by document, and "
        "single updates are masked",
        meaning="Mode RECORD-LOCAL: in every step each document's gradient was clipped and noise "
        "was added, at the site. So whatever anybody does with the sums and the models, one "
        "document changes the odds of it by at most a factor e^epsilon, but for a chance of about "
        "delta; the table says which epsilon was spent. That holds for one document at one site: "
        "a text that lies at two sites loses twice as much, and what many documents share is "
        "learned, which is the purpose. The scores above are of held-out text that is public and "
        "carry no noise. Updates were masked besides, as in mode aggregate-only.",
    ),
}

MEANING: Final = (
    "Bits per byte: how many bits the model needs for one byte of held-out text, text that no "
    "site trained on. A model that knows nothing needs 8; less is better. Every figure is one "
    "quotient of sums over all sites, which travel as coordinates of the same vector as the model."
)


def learning_facts(run: RunReport) -> dict[str, Any]:
    """Bits per byte of the first and the last model, by language and over all."""

    def change(points: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
        if not points:
            return None
        before, after = points[0][1], points[-1][1]
        return {
            "before": round(before, 6),
            "after": round(after, 6),
            "change_percent": round(100 * (after - before) / before, 2) if before else None,
            "training_rounds": points[-1][0] - points[0][0],
            "by_round": [round(value, 6) for _, value in points],
        }

    facts = {language: change(run.learning(language)) for language in run.languages()}
    return {"all": change(run.learning()), "languages": facts}


def learned(run: RunReport) -> bool:
    """Whether the last model needs fewer bits per byte than the first, over all languages."""
    points = run.learning()
    return len(points) > 1 and points[-1][1] < points[0][1]


def summary(
    *,
    run: RunReport,
    settings: Settings,
    texts: Sequence[SiteText],
    struck: Sequence[Struck],
    seconds: float,
) -> dict[str, Any]:
    """All facts as one JSON value."""
    phases: dict[str, float] = {}
    for round_ in run.rounds:
        for phase, spent in seconds_by_phase(round_).items():
            phases[phase] = round(phases.get(phase, 0.0) + spent, 3)
    mode = MODES[settings.mode]
    return {
        "schema": SCHEMA,
        "mode": {
            "name": settings.mode,
            "masked": mode.masked,
            "differentially_private": mode.differentially_private,
            "meaning": mode.meaning,
        },
        "settings": {**asdict(settings), "sites": list(settings.sites)},
        "seconds": round(seconds, 1),
        "learned": learned(run),
        "bits_per_byte": learning_facts(run),
        "bits_per_byte_meaning": MEANING,
        "traffic": {
            node: {"bytes_up": entry.up, "bytes_down": entry.down}
            for node, entry in traffic_of(run.rounds).items()
        },
        "seconds_by_phase": phases,
        "sites": [
            {
                "site": text.site,
                "documents": text.documents,
                "text_bytes": text.text_bytes,
                "lines_without_text": text.left_out,
                "held_out_languages": sorted(text.languages),
                "training_processes": settings.ranks(text.site),
            }
            for text in texts
        ],
        "kills": [entry.to_json() for entry in struck],
        "run": run_to_json(run),
    }


def write_summary(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write ``report/summary.json``."""
    path = folder / "report" / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def print_end(console: Console, run: RunReport, settings: Settings) -> None:
    """Tables and plain words."""
    learning = learning_table(run)
    if learning is not None:
        console.print(learning)
        console.print(_before_after(run))
    console.print(phases_table(run.rounds))
    missing = absences(run.rounds)
    if missing is not None:
        console.print(missing)
        console.print()
    made = Sheet("Bytes over the whole run", ("site", "up", "down"))
    for node, entry in traffic_of(run.rounds).items():
        made.row(node, human_bytes(entry.up), human_bytes(entry.down))
    console.print(made)
    console.print(Text(MEANING), soft_wrap=False)
    console.print()
    spent = spent_table(run.spent)
    if spent is not None:
        console.print(spent)
    console.print(Text(MODES[settings.mode].meaning, style="bold"), soft_wrap=False)
    console.print()


def _before_after(run: RunReport) -> Any:
    made = Sheet(
        "Held-out bits per byte, before and after",
        ("language", "before", "after", "change", "by round"),
    )
    rows = [(language, run.learning(language)) for language in run.languages()]
    for name, points in [*rows, ("all", run.learning())]:
        if not points:
            continue
        before, after = points[0][1], points[-1][1]
        change = f"{100 * (after - before) / before:+.1f} %" if before else "-"
        line = sparkline([value for _, value in points])
        made.row(name, figure(before, 3), figure(after, 3), change, line)
    return made
