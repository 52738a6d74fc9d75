"""What a person sees while the demonstration runs: a live screen, or one line for each round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from infra.demo.federation import Federation
from infra.runs.facts import RoundReport, RunReport, human_bytes
from infra.runs.show import Sheet, learning_table, phase_text, round_line

_WAITING: Final = "-"


class View:
    """Lines as they come; on a terminal a live picture below them."""

    def __init__(self, console: Console, federation: Federation, sites: Sequence[str]) -> None:
        self._console = console
        self._federation = federation
        self._sites = tuple(sites)
        self._began = time.monotonic()
        self._told: set[str] = set()
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the live picture; what follows is printed as usual."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        """One line, with the time since the beginning."""
        line = Text(f"[{self.elapsed_s:6.1f} s] {text}")
        self._console.print(line, soft_wrap=True)

    def report(self, run: RunReport) -> None:
        """What the run looks like now."""
        for round_ in run.rounds:
            name = str(round_.round)
            if round_.ended and name not in self._told:
                self._told.add(name)
                self.say(round_line(round_))
        if self._live is not None:
            self._live.update(self._picture(run), refresh=True)

    def _picture(self, run: RunReport) -> RenderableType:
        head = Text.assemble(
            (f"Minga  {run.run}", "bold"),
            f"  {len(run.released)} of {run.rounds_planned} rounds  {self.elapsed_s:.0f} s",
        )
        parts: list[RenderableType] = [Text(""), head]
        current = run.current
        if current is not None:
            parts += [
                Text.assemble(f"{current.round} ", phase_text(current.phase), f": {current.why}"),
                self._sites_table(current, run),
            ]
        learning = learning_table(run) if run.released else None
        if learning is not None:
            parts.append(learning)
        return Group(*parts)

    def _sites_table(self, current: RoundReport, run: RunReport) -> RenderableType:
        made = Sheet(
            "Sites", ("site", "this phase", "step", "local loss (nats)", "up", "down"),
            text_columns=2,
        )  # fmt: skip
        totals = {site: [0, 0] for site in self._sites}
        for round_ in run.rounds:
            for entry in round_.traffic:
                if entry.node in totals:
                    totals[entry.node][0] += entry.up
                    totals[entry.node][1] += entry.down
        for site in self._sites:
            step, loss = self._training_at(site, current)
            up, down = totals[site]
            state = "done" if site in current.ready else "working"
            if site not in self._federation.household:
                state = "not running"
            made.row(site, state, step, loss, human_bytes(up), human_bytes(down))
        return made

    def _training_at(self, site: str, current: RoundReport) -> tuple[str, str]:
        """Step and loss of a site's worker, read from the site's own folder: it stays there."""
        from node_agent.config import NodeFolder
        from node_agent.spool import Spool, job_id, last_status
        from protocols.errors import MalformedMessageError

        spool = Spool(NodeFolder(self._federation.node_folder(site)).spool)
        with suppress(OSError, MalformedMessageError):
            last = last_status(spool, job_id(current.round))
            if last is not None:
                step = f"{last.step or 0}/{last.max_steps}" if last.max_steps else last.event
                return step, _WAITING if last.loss is None else f"{last.loss:.3f}"
        return _WAITING, _WAITING
