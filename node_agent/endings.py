"""What a worker keeps of a run goes when the run is over: moments, positions, late work, jobs.

All of it is derived from the site's text, and none of it is of use to another run. Models, vectors
and the journal are not touched here.

    the run ended, and this node has said all it has to say    goes
    the run is not shown any more, for ``ABSENT_S``            goes: it ended, or this node left it
    this node stopped taking part: what is here is evidence    goes ``EVIDENCE`` after that
    a worker is still on a job of it                           waits
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from node_agent.journal import Journal
from node_agent.launchers.jobs import Launcher
from node_agent.spool import runs_in
from node_agent.view import RunSeen
from protocols.identifiers import RunId

logger = logging.getLogger(__name__)
LOOK_S: Final = 5.0  # between two looks at what is there
ABSENT_S: Final = 600.0  # so long a run is not shown, by one agent without a break
EVIDENCE: Final = timedelta(days=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What one decision rests on."""

    seen: RunSeen | None  # None: the coordinator does not show the run
    absent_s: float  # for so long
    busy: bool  # a worker is on a job of the run, or may take one up
    unsaid: bool  # a model that was computed, or is to be, was not confirmed yet
    stopped_for: timedelta | None  # since this node stopped taking part; None: it did not


def may_go(ending: Ending) -> bool:
    """Whether what the worker keeps of a run may be removed. Pure."""
    if ending.busy:
        return False
    if ending.stopped_for is not None:
        return ending.stopped_for >= EVIDENCE
    if ending.seen is None:
        return ending.absent_s >= ABSENT_S
    current = ending.seen.current
    over = current is None or current.raw_phase.name in ("Released", "Aborted", "Burned")
    return ending.seen.status != "active" and over and not ending.unsaid


def _ending(
    run: RunId,
    seen: RunSeen | None,
    absent_s: float,
    launcher: Launcher,
    journal: Journal,
    now: datetime,
) -> Ending:
    known = journal.run(run)
    stopped_for = None
    if known is not None and known.stopped is not None:
        said = [entry.at for entry in journal.entries(run=run) if entry.what == "stopped"]
        stopped_for = now - max(said) if said else timedelta()
    unsaid = bool(journal.unsent_confirms(run))
    last = seen.last_released if seen is not None else None
    if last is not None and journal.confirm(last.round) is None:
        joined = journal.round(last.round)
        unsaid = unsaid or (joined is not None and joined.joined)
    return Ending(
        seen=seen,
        absent_s=absent_s,
        busy=bool(launcher.unfinished(run, 10**6)),
        unsaid=unsaid,
        stopped_for=stopped_for,
    )


class Endings:
    """Looks now and then; remembers since when a run is not shown."""

    def __init__(self) -> None:
        self._absent: dict[RunId, float] = {}  # monotonic seconds

    def look(
        self,
        launchers: Iterable[Launcher],
        shown: Iterable[RunSeen],
        journal: Journal,
        *,
        now: datetime,
        monotonic: float,
    ) -> None:
        """Remove what workers keep of runs that are over. Blocking.

        Args:
            launchers: of this site.
            shown: the runs of a view, which is not older than this agent.
            journal: of this node.
            now: UTC.
            monotonic: seconds.
        """
        seen = {run.run: run for run in shown}
        found: set[RunId] = set()
        for launcher in launchers:
            for run in runs_in(launcher.spool):
                found.add(run)
                since = monotonic if run in seen else self._absent.setdefault(run, monotonic)
                ending = _ending(run, seen.get(run), monotonic - since, launcher, journal, now)
                if may_go(ending):
                    launcher.forget_run(run)
                    logger.info("%s: removed what the worker kept of it", run)
        self._absent = {
            run: since for run, since in self._absent.items() if run in found and run not in seen
        }
