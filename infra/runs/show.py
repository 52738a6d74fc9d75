"""Runs as tables and lines: from the values of ``facts`` to what a person reads.

Text that came from elsewhere is printed as ``Text``, never as markup, and nothing depends on
colour: every view says in words what it also colours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from infra.runs.costs import Line, Prices, Used, by_institution, by_round
from infra.runs.facts import RoundReport, RunReport, Traffic, human_bytes, sparkline
from infra.runs.spent import spent_table
from protocols.gen import rounds_pb2
from protocols.strata import ELSEWHERE, OTHER

PHASES: Final = ("Open", "Training", "Dealing", "Uploading", "Committing", "Revealing", "Released")
_BOX: Final = box.SIMPLE_HEAD
_ACROSS: Final = 6  # languages beside each other
_FILE_WIDTH: Final = 100  # columns, where the output is no terminal
_STYLES: Final = {"Released": "green", "Aborted": "yellow", "Burned": "red"}


class Sheet:
    """A plain table under a heading. Values become text: what came from elsewhere is no markup."""

    def __init__(self, title: str, columns: Sequence[str], *, text_columns: int = 1) -> None:
        """The first ``text_columns`` are words, the others figures."""
        self._title = Text(title, style="bold")
        # One space between columns: all phases of a masked round fit into 80 columns.
        self._table = Table(box=_BOX, padding=0, show_edge=False)
        for position, name in enumerate(columns):
            justify: Literal["left", "right"] = "left" if position < text_columns else "right"
            self._table.add_column(name, justify=justify, no_wrap=True)

    def row(self, *values: object) -> None:
        """Add a row."""
        self._table.add_row(
            *(value if isinstance(value, Text) else Text(str(value)) for value in values)
        )

    def line(self) -> None:
        """Draw a line below the rows so far."""
        self._table.add_section()

    def __rich__(self) -> RenderableType:
        return Group(self._title, self._table, Text(""))


def figure(value: float | None, digits: int) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def phase_text(name: str) -> Text:
    """The name of a phase."""
    return Text(name, style=_STYLES.get(name, ""))


def runs_table(runs: Sequence[RunReport]) -> RenderableType:
    """All runs, one line each."""
    if not runs:
        return Text("no runs")
    made = Sheet("Runs", ("run", "status", "submitted (UTC)", "plan", "rounds"), text_columns=4)
    for run in runs:
        made.row(
            run.run,
            run.status,
            f"{run.submitted_at:%Y-%m-%d %H:%M:%S}",
            f"{run.plan_digest[:12]}…",
            run.rounds_planned,
        )
    return made


def seconds_by_phase(round_: RoundReport) -> dict[str, float]:
    """Seconds spent in each phase; a phase entered more than once is added up."""
    spent: dict[str, float] = {}
    for span in round_.spans:
        if span.seconds is not None:
            spent[span.phase] = spent.get(span.phase, 0.0) + span.seconds
    return spent


def used_phases(rounds: Sequence[RoundReport]) -> tuple[str, ...]:
    """The phases in which any of the rounds spent time, in the order of the protocol."""
    seen = {phase for round_ in rounds for phase in seconds_by_phase(round_)}
    return tuple(phase for phase in PHASES if phase in seen)


def phases_table(rounds: Sequence[RoundReport]) -> Sheet:
    """Seconds per phase, one line for each round; how it ended, where one ended without a sum."""
    phases = used_phases(rounds)
    told = any(not round_.released for round_ in rounds)
    columns = ("round", *(("now",) if told else ()), *phases, "in all")
    made = Sheet("Seconds per phase", columns, text_columns=2 if told else 1)
    for round_ in rounds:
        spent = seconds_by_phase(round_)
        made.row(
            round_.round.number,
            *((phase_text(round_.phase),) if told else ()),
            *(figure(spent.get(phase), 2) for phase in phases),
            figure(round_.seconds, 2),
        )
    return made


def absences(rounds: Sequence[RoundReport]) -> Text | None:
    """Which sums lack whose update, and which needed a second attempt; None: none does."""
    lines = [
        f"round {round_.round.number}: {words}" for round_ in rounds if (words := lack(round_))
    ]
    return Text("\n".join(lines)) if lines else None


def lack(round_: RoundReport) -> str:
    """What a released round lacks, in a few words; empty: nothing."""
    words = []
    if round_.absent:
        here, all_ = len(round_.survivors), len(round_.roster)
        words.append(f"{here} of {all_} nodes in the sum, without {', '.join(round_.absent)}")
    if round_.attempt > 1:
        words.append(f"attempt {round_.attempt}")
    return "; ".join(words)


def learning_table(run: RunReport) -> RenderableType | None:
    """Held-out bits per byte by language; None where nothing was evaluated.

    Many languages are shown in several sheets, so that each fits on a screen.
    """
    languages = run.languages()
    if not languages:
        return None
    parts: list[RenderableType] = [
        _learning_sheet(run, languages[start : start + _ACROSS], first=start == 0)
        for start in range(0, len(languages), _ACROSS)
    ]
    if {OTHER, ELSEWHERE} & set(languages):
        parts.append(Text(f"{OTHER}, {ELSEWHERE}: what too few sites hold to be opened by itself"))
    return Group(*parts)


def _learning_sheet(run: RunReport, languages: Sequence[str], *, first: bool) -> Sheet:
    title = "Held-out bits per byte of the model a round starts from (less is better)"
    if first:
        made = Sheet(f"{title}; loss: nats per token", ("round", "all", "loss", *languages))
    else:
        made = Sheet(f"{title}, continued", ("round", *languages))
    for round_ in run.released:
        found = round_.evaluations
        both = (figure(round_.bits_per_byte, 3), figure(round_.training_loss, 3))
        values = (found[name].bits_per_byte if name in found else None for name in languages)
        made.row(
            round_.round.number, *(both if first else ()), *(figure(value, 3) for value in values)
        )
    if len(run.learning()) > 1:
        lines = [sparkline([value for _, value in run.learning(name)]) for name in languages]
        whole = (sparkline([value for _, value in run.learning()]), "")
        made.line()
        made.row("shape", *(whole if first else ()), *lines)
    return made


def traffic_of(rounds: Sequence[RoundReport]) -> dict[str, Traffic]:
    """Bytes of each node over several rounds."""
    total: dict[str, Traffic] = {}
    for round_ in rounds:
        for entry in round_.traffic:
            before = total.get(entry.node)
            total[entry.node] = Traffic(
                node=entry.node,
                up=entry.up + (before.up if before else 0),
                down=entry.down + (before.down if before else 0),
                confirmed=_verdict(before.confirmed if before else "", entry.confirmed),
            )
    return dict(sorted(total.items()))


def _verdict(before: str, now: str) -> str:
    """The last word of a node, but an objection stays: somebody has to look at it."""
    return before if before.startswith("objection") else (now or before)


def traffic_table(rounds: Sequence[RoundReport]) -> Sheet:
    """Bytes up and down, and the verdict on the model, one line for each node."""
    made = Sheet("Traffic of the nodes", ("node", "last verdict", "up", "down"), text_columns=2)
    for node, entry in traffic_of(rounds).items():
        verdict = entry.confirmed
        if verdict and not verdict.startswith("objection"):
            verdict = f"model {verdict[:12]}… confirmed"
        made.row(node, verdict or "-", human_bytes(entry.up), human_bytes(entry.down))
    return made


def costs_table(run: RunReport) -> RenderableType | None:
    """What the run cost, by institution and by round; None where nobody says anything."""
    rounds = [round_.costs for round_ in run.rounds if round_.released or round_.used]
    if not any(round_.used or round_.summed is not None for round_ in rounds):
        return None
    money = (f"cost ({run.prices.currency})",) if run.prices else ()
    columns = ("GPU hours", "CPU hours", "kWh", *money)
    title = "Costs, as the institutions claim them"
    made = Sheet(title, ("", "energy", "reported", *columns), text_columns=3)
    for line in by_institution(rounds):
        _cost_row(made, line, run.prices)
    made.line()
    if len(rounds) > 1:
        for line in by_round(rounds):
            _cost_row(made, replace(line, name=f"round {line.name}"), run.prices)
        made.line()
    lines = by_institution(rounds)
    total = Line(
        name="all",
        used=sum((line.used for line in lines), Used()),
        reported=sum(line.reported for line in lines),
        expected=sum(line.expected for line in lines),
    )
    _cost_row(made, total, run.prices)
    summed = [round_ for round_ in rounds if round_.summed is not None]
    if summed:
        over = sum(round_.summed_over for round_ in summed)
        used = sum((round_.summed for round_ in summed if round_.summed is not None), Used())
        of = sum(len(round_.survivors) for round_ in summed)
        line = Line(name="in the sums", used=used, reported=over, expected=of)
        _cost_row(made, line, run.prices)
    return made


def _cost_row(sheet: Sheet, line: Line, prices: Prices | None) -> None:
    if not line.reported:
        nothing = ("-",) * (4 if prices else 3)
        sheet.row(line.name, "-", "not reported", *nothing)
        return
    used = line.used
    told = f"{line.reported} of {line.expected}"
    cost = (figure(used.money(prices), 2),) if prices else ()
    energy = figure(used.kwh, 4) if used.energy_source != "none" else "-"
    hours = (figure(used.gpu_hours, 4), figure(used.cpu_hours, 4))
    sheet.row(line.name, used.energy_source, told, *hours, energy, *cost)


def run_view(run: RunReport) -> RenderableType:
    """Everything about a run."""
    head = Text.assemble((run.run, "bold"), f"  {run.status}")
    if run.mode:
        head.append(f"  mode {run.mode}")
    if run.title:
        head.append(f"  {run.title}")
    parts: list[RenderableType] = [head, Text(f"plan {run.plan_digest}")]
    if run.promise:
        parts.append(Text(run.promise))
    if not run.rounds:
        parts.append(Text("no round was opened yet"))
        return Group(*parts)
    parts += [Text(""), phases_table(run.rounds)]
    missing = absences(run.rounds)
    if missing is not None:
        parts += [missing, Text("")]
    learning = learning_table(run)
    if learning is not None:
        parts.append(learning)
    parts.append(traffic_table(run.rounds))
    spent = spent_table(run.spent)
    if spent is not None:
        parts.append(spent)
    costs = costs_table(run)
    if costs is not None:
        parts.append(costs)
    current = run.current
    if current is not None:
        parts.append(Text(f"{current.round} {current.phase}: {current.why}"))
    return Group(*parts)


def why_line(round_: str, phase: str, why: str) -> Text:
    """What a round is waiting for, in one line."""
    return Text.assemble((f"{round_} {phase}", "bold"), f": {why}")


def round_line(round_: RoundReport) -> str:
    """A finished round in one plain line."""
    spent = seconds_by_phase(round_)
    seconds = "  ".join(f"{phase} {spent[phase]:.1f}s" for phase in PHASES if phase in spent)
    up = sum(entry.up for entry in round_.traffic)
    down = sum(entry.down for entry in round_.traffic)
    parts = [f"round {round_.round}", round_.phase]
    if not round_.released:
        return "  ".join([*parts, round_.why])
    parts += [words for words in [lack(round_)] if words]
    if round_.bits_per_byte is not None:
        whole = figure(round_.bits_per_byte, 3)
        parts.append(f"bits/byte before {whole} ({_by_language(round_)})")
    if round_.training_loss is not None:
        parts.append(f"loss {figure(round_.training_loss, 3)}")
    parts += [f"up {human_bytes(up)} down {human_bytes(down)}", seconds]
    return "  ".join(parts)


def _by_language(round_: RoundReport) -> str:
    """Each language's bits per byte; of many only the best and the worst."""
    found = sorted(
        (evaluation.bits_per_byte or 0.0, language)
        for language, evaluation in round_.evaluations.items()
    )
    if len(found) > _ACROSS:
        (best, easy), (worst, hard) = found[0], found[-1]
        return f"{len(found)} languages, from {easy} {best:.3f} to {hard} {worst:.3f}"
    return " ".join(f"{language} {value:.3f}" for value, language in sorted(found, key=_second))


def _second(pair: tuple[float, str]) -> str:
    return pair[1]


def activity(progress: rounds_pb2.Progress) -> str:
    """What a node says it is doing, in a few words."""
    words = [progress.activity or "idle"]
    if progress.max_step:
        words.append(f"step {progress.step}/{progress.max_step}")
    elif progress.step:
        words.append(f"step {progress.step}")
    if progress.tokens:
        words.append(f"{progress.tokens} tokens")
    if progress.bytes_total:
        words.append(f"{human_bytes(progress.bytes_done)} of {human_bytes(progress.bytes_total)}")
    return ", ".join(words)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Facts as JSON on stdout."""
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def console(*, stderr: bool = False) -> Console:
    """A console that leaves text alone: no markup, no guessing of numbers."""
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _FILE_WIDTH
    return made
