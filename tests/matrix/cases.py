"""What a case of the matrix is, and the federation it happens in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import sqlalchemy as sa

from infra.runs.client import AdminClient
from infra.runs.facts import RunReport
from protocols.errors import NotFoundError, NotReadyError
from protocols.identifiers import RunId
from tests.support.federation import Running, results, running
from tests.support.postgres import PostgresServer

Database = Literal["sqlite", "postgresql"]
Mode = Literal["open", "aggregate-only"]
NODES: Final = 3
COORDINATES: Final = 50_000
LONG_S: Final = 7_200  # no deadline passes by itself, not even when a clock jumps by an hour
DEADLINES: Final = dict.fromkeys(("join", "train", "deal", "upload", "commit", "reveal"), LONG_S)
PATIENCE_S: Final = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault and what came of it."""

    fault: str
    victim: str
    phase: str  # of the round when it struck
    mode: str
    database: str
    outcome: str  # "same" when every digest is that of the undisturbed run, else what was found
    went_on_s: float | None  # from the restart, or the end of the trouble; None: struck again first
    point: str = ""  # of a kill


@dataclass(slots=True, kw_only=True)
class Bench:
    """A federation in which a case happens, and its undisturbed results."""

    running: Running
    mode: Mode
    database: Database
    url: str
    server: PostgresServer | None
    rounds: int
    last: RunId | None = None  # that was submitted, perhaps in vain
    others: list[AdminClient] = field(default_factory=list)  # to further coordinators
    _wanted: list[Any] = field(default_factory=list)
    _runs: int = 0

    def submit(self, name: str) -> RunId:
        """Submit a run like every other of this bench."""
        self._runs += 1
        self.last = RunId(f"{name}-{self._runs}")
        return self.running.submit(
            self.last,
            rounds=self.rounds,
            coordinates=COORDINATES,
            mode=self.mode,
            deadlines=DEADLINES,
        )

    def run_id(self, name: str) -> RunId:
        """The id of a run by its name."""
        return RunId(name)

    def undisturbed(self) -> list[Any]:
        """What every run must give."""
        if not self._wanted:
            run = self.submit("undisturbed")
            self._wanted = results(self.running.confirmed(run, timeout_s=PATIENCE_S))
            counted = [(nodes, weight) for _, _, nodes, weight in self._wanted]
            assert counted == [(NODES, NODES * 65_536)] * self.rounds, counted
        return self._wanted

    def settle(self) -> None:
        """Let a run end, so that everybody is back from the case before.

        A process that the case before started again may need long to come up on a busy machine;
        that is no part of what comes next.
        """
        found = results(self.running.confirmed(self.submit("settling"), timeout_s=PATIENCE_S))
        assert found == self.undisturbed(), found

    def outcome(self, report: RunReport, *, declined: bool = False) -> str:
        """Whether a run came to the very results of the undisturbed one.

        Args:
            report: of the run.
            declined: whether rounds may have been tried in vain, because a node declined them.
        """
        if report.status != "done":
            return f"the run is {report.status}"
        found = results(report)
        tried = len(report.released) if declined else len(report.rounds)
        if tried != self.rounds:
            return f"{len(report.rounds)} rounds instead of {self.rounds}"
        return "same" if found == self.undisturbed() else f"other digests: {found}"

    def show(self, run: RunId) -> RunReport | None:
        """The run now; None: nobody answers, or it is not known."""
        for client in (self.running.client, *self.others):
            try:
                return client.show(run)
            except (NotReadyError, NotFoundError):
                continue
        return None

    def next_step_after(self, at: float, run: RunId) -> float | None:
        """When a run first entered a phase after a time: Unix seconds, by the coordinator's clock.

        Read from the database itself; None: none yet.
        """
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        query = (
            "SELECT min(entered_at) AS at FROM phase_times WHERE entered_at > :at AND run_id = :run"
        )
        with engine.connect() as connection:
            row = connection.execute(sa.text(query), {"at": int(at * 1000), "run": run}).first()
        return None if row is None or row.at is None else row.at / 1000

    def ended(self, run: RunId) -> RunReport:
        """The run, once it is over and every survivor has said what it computed."""
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            self.running.household.check()
            report = self.show(run)
            if (
                report is not None
                and report.ended
                and all(set(each.survivors) <= each.confirmed for each in report.released)
            ):
                return report
            time.sleep(0.1)
        raise AssertionError(f"{run} did not end: {report}\n{self.running.logs()}")

    def meet(self, run: RunId, phase: str) -> bool:
        """Stop all agents while a round is in a phase; False: the run ended before it was met.

        Nobody but the coordinator acts in Released: there agents go on.
        """
        household, sites = self.running.household, self.running.sites
        with self.running.history(run) as history:
            give_up = time.monotonic() + PATIENCE_S
            while time.monotonic() < give_up:
                entry = history.next(timeout_s=0.2)
                if entry is None:
                    report = self.show(run)
                    if report is not None and report.ended:
                        return False
                    continue
                if entry.phase != phase:
                    continue
                if phase == "Released":
                    return True
                household.pause(sites)
                report = self.show(run)
                now = report.current if report is not None else None
                if now is not None and now.phase == phase:
                    return True
                household.resume(sites)
        raise AssertionError(f"{phase} was not met in time\n{self.running.logs()}")

    def wait(self, what: Callable[[], bool], *, words: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait for a condition."""
        give_up = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > give_up:
                raise AssertionError(f"in vain: {words}\n{self.running.logs()}")
            time.sleep(0.02)


@contextmanager
def bench(
    folder: Path,
    *,
    mode: Mode,
    database: Database,
    server: PostgresServer | None,
    rounds: int = 2,
    start: bool = True,
) -> Iterator[Bench]:
    """A federation on a database of its own."""
    url = server.new_database() if server is not None else ""
    with running(folder, nodes=NODES, clock=True, ledger=url, start=start) as made:
        where = url or f"sqlite:///{made.folder}/coordinator/ledger.sqlite"
        yield Bench(
            running=made, mode=mode, database=database, url=where, server=server, rounds=rounds
        )


def write_points(faults: Path, points: list[str]) -> None:
    """Say at which points the next processes shall die."""
    faults.mkdir(parents=True, exist_ok=True)
    (faults / "marks").unlink(missing_ok=True)
    (faults / "points.json").write_text(json.dumps(sorted(points)))


__all__ = ["Bench", "Row", "bench", "write_points"]
