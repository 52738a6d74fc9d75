"""Follow a run: a live view on a terminal, plain lines everywhere else.

Both read what is, not what was announced: after a lost connection they go on from where they were.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from infra.runs.client import AdminClient
from infra.runs.facts import RoundReport, RunReport
from infra.runs.show import (
    Sheet,
    activity,
    learning_table,
    phase_text,
    round_line,
    why_line,
)
from protocols.errors import NotReadyError
from protocols.gen import admin_pb2
from protocols.identifiers import RunId
from protocols.rounds_codec import from_ms

POLL_S: Final = 0.5
_PATIENCE_S: Final = 120.0  # without any answer before a watcher gives up


def patient(
    ask: Callable[[], RunReport],
    *,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
    patience_s: float = _PATIENCE_S,
) -> Iterator[RunReport | None]:
    """Ask again and again; None while nobody answers. Ends after the run's last report.

    Raises:
        NotReadyError: nobody answered for ``patience_s``.
    """
    silent_since: float | None = None
    while True:
        report: RunReport | None = None
        try:
            report = ask()
            silent_since = None
        except NotReadyError:
            now = monotonic()
            silent_since = now if silent_since is None else silent_since
            if now - silent_since >= patience_s:
                raise
        yield report
        if report is not None and report.ended:
            return
        sleep(POLL_S)


def nodes_table(
    current: RoundReport | None, nodes: Sequence[admin_pb2.NodeFacts]
) -> RenderableType:
    """Who has done what the phase asks for, and what everybody says they are doing."""
    made = Sheet("Nodes", ("node", "this phase", "doing"), text_columns=3)
    ready = set(current.ready) if current else set()
    name = str(current.round) if current else ""
    for node in sorted(nodes, key=lambda entry: entry.node):
        mine = [p for p in node.progress if f"{p.round.run}/{p.round.number}" == name]
        idle = f"{node.state or 'not seen'}{f' ({node.capability})' if node.capability else ''}"
        doing = activity(max(mine, key=lambda p: p.at_ms)) if mine else idle
        made.row(node.node, "done" if node.node in ready else "waiting", doing)
    return made


def live_view(run: RunReport, nodes: Sequence[admin_pb2.NodeFacts]) -> RenderableType:
    """One screen: where the run is, who does what, and what was learned so far."""
    current = run.current
    head = Text.assemble(
        (run.run, "bold"),
        f"  {run.status}  {len(run.released)} of {run.rounds_planned} rounds released",
    )
    parts: list[RenderableType] = [head]
    if current is not None:
        parts.append(
            Text.assemble(f"{current.round} ", phase_text(current.phase), f": {current.why}")
        )
    parts.append(nodes_table(current, nodes))
    learning = learning_table(run) if run.released else None
    if learning is not None:
        parts.append(learning)
    return Group(*parts)


def watch_live(client: AdminClient, run: RunId, out: Console) -> RunReport:
    """Follow on a terminal until the run ends; the last view stays on the screen."""
    last: RunReport | None = None
    with Live(console=out, auto_refresh=False) as live:
        for report in patient(lambda: client.show(run)):
            if report is None:
                live.update(Text("the coordinator does not answer; asking again"), refresh=True)
                continue
            last = report
            try:
                nodes = client.nodes()
            except NotReadyError:
                nodes = ()
            live.update(live_view(report, nodes), refresh=True)
    if last is None:
        raise AssertionError("a watch ends with a report")
    return last


def watch_lines(client: AdminClient, run: RunId, out: Console) -> RunReport:
    """One line per change of phase and one per finished round, until the run ends."""
    told_phase: dict[str, str] = {}
    told_end: set[str] = set()
    last: RunReport | None = None
    for report in patient(lambda: client.show(run)):
        if report is None:
            continue
        last = report
        for round_ in report.rounds:
            name = str(round_.round)
            if round_.ended:
                if name not in told_end:
                    told_end.add(name)
                    out.print(Text(round_line(round_)), soft_wrap=True)
            elif told_phase.get(name) != round_.phase:
                told_phase[name] = round_.phase
                out.print(why_line(name, round_.phase, round_.why), soft_wrap=True)
    if last is None:
        raise AssertionError("a watch ends with a report")
    return last


def history_to_json(entry: admin_pb2.HistoryEntry) -> dict[str, object]:
    """One entry of a run's history; time in UTC, ISO 8601."""
    return {
        "id": int(entry.id),
        "at": from_ms(int(entry.at_ms)).isoformat(),
        "round": f"{entry.round.run}/{entry.round.number}",
        "transaction": entry.transaction,
        "phase": entry.phase,
        "why": entry.why,
        "node": entry.node or None,
    }


def watch_history(client: AdminClient, run: RunId) -> None:
    """The run's whole history as JSON lines, then what happens, until the run ends."""
    after = 0
    silent_since: float | None = None
    while True:
        try:
            for entry in client.watch(run, after=after):
                print(json.dumps(history_to_json(entry), ensure_ascii=False), flush=True)
                after, silent_since = int(entry.id), None
        except NotReadyError as error:
            now = time.monotonic()
            silent_since = now if silent_since is None else silent_since
            if now - silent_since >= _PATIENCE_S:
                raise
            time.sleep(error.retry_after_s)
        else:
            return
