"""Kills at every commit point: one process dies at each of them in turn, in few runs.

The victim is told all points that are still to be visited and dies at the first it comes to; it is
started again at once (``lives``), with what is left. When a run has ended, its digests must be
those of the undisturbed run; further runs follow until one visits nothing new. What is then left
over was not visited, and the case says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.demo.federation import COORDINATOR
from protocols.errors import FederationError
from protocols.identifiers import RunId
from tests.matrix.arming import read_marks
from tests.matrix.cases import PATIENCE_S, Bench, Row, write_points
from tests.matrix.points import Part
from tests.support.federation import ROOT

VICTIM = "node-1"
Mark = dict[str, Any]


class Storm:
    """One victim that dies again and again."""

    def __init__(self, bench: Bench, part: Part) -> None:
        self._bench = bench
        self._part: Part = part
        self._name = COORDINATOR if part == "coordinator" else VICTIM
        self._faults: Path = bench.running.folder / "faults" / self._name

    def play(
        self, instants: frozenset[str], errands: Callable[[Bench], str] | None = None
    ) -> tuple[list[Row], frozenset[str]]:
        """Visit instants; what came of each, and those that nothing came to.

        Args:
            instants: commit points, before and after.
            errands: done when plain runs visit nothing new; says what came of them.
        """
        bench = self._bench
        bench.undisturbed()
        write_points(self._faults, sorted(instants))
        bench.running.household.stop(self._name)
        self._start()
        rows: list[Row] = []
        while len(rows) < len(instants):
            outcome = self._ride_out(self._submit())
            if not self._gather(rows, outcome):
                break
        if errands is not None:
            self._gather(rows, errands(bench))
        (self._faults / "points.json").unlink()
        bench.running.household.stop(self._name)
        self._start()
        return rows, instants - {row.point for row in rows}

    def _gather(self, rows: list[Row], outcome: str) -> bool:
        """Add what was visited since the last time; False: nothing."""
        struck = read_struck(read_marks(self._faults / "marks"))[len(rows) :]
        rows += [self._row(mark, outcome) for mark in struck]
        return bool(struck)

    def _submit(self) -> RunId:
        """Submit a run; where the answer is lost, find out whether it was taken."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._bench.submit(self._name)
            except FederationError:
                if time.monotonic() > give_up:
                    raise
                last = self._bench.last
                if last is not None and self._answers() and self._bench.show(last) is not None:
                    return last

    def _answers(self) -> bool:
        """Wait until somebody answers."""
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            try:
                self._bench.running.client.runs()
            except FederationError:
                time.sleep(0.1)
            else:
                return True
        return False

    def _ride_out(self, run: RunId) -> str:
        """Wait for the end of a run; the patience is for each kill anew."""
        killed, give_up = -1, 0.0
        while True:
            self._bench.running.household.check()
            marks = read_marks(self._faults / "marks")
            if len(marks) > killed:
                killed, give_up = len(marks), time.monotonic() + PATIENCE_S
            report = self._bench.show(run)
            if (
                report is not None
                and report.ended
                and all(set(each.survivors) <= each.confirmed for each in report.released)
            ):
                return self._bench.outcome(report)
            if time.monotonic() > give_up:
                return f"the run did not end within {PATIENCE_S:.0f} s"
            time.sleep(0.05)

    def _start(self) -> None:
        running = self._bench.running
        if self._part == "coordinator":
            running.start_coordinator()
            return
        folder = running.federation.node_folder(VICTIM)
        command = running.household.python(
            "tests.matrix.node",
            *("--dir", str(folder), "--faults", str(self._faults), "--ledger", self._bench.url),
        )
        path = {"PYTHONPATH": str(ROOT)}
        log = running.federation.log(VICTIM)
        running.household.start(VICTIM, command, log=log, environment=path)

    def _row(self, mark: Mark, outcome: str) -> Row:
        return Row(
            fault="SIGKILL",
            victim=self._part,
            phase=mark["phase"],
            mode=self._bench.mode,
            database=self._bench.database,
            outcome=outcome,
            went_on_s=mark["went_on_s"],
            point=mark["point"],
        )


def read_struck(marks: Sequence[Mark]) -> list[Mark]:
    """Each kill, with the phase it fell into and when the next life went on.

    The time counts from when the next process has imported the code. A life that was killed before
    it went on leaves no time.
    """
    struck: list[Mark] = []
    for mark in marks:
        if "point" in mark:
            struck.append({"point": mark["point"], "phase": "none", "went_on_s": None})
        elif not struck:
            continue
        elif "phase" in mark:
            struck[-1]["phase"] = mark["phase"]
        elif "went_on" in mark and struck[-1]["went_on_s"] is None:
            struck[-1]["went_on_s"] = round(mark["went_on"], 2)
    return struck
