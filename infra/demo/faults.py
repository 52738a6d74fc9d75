"""Killing a part of the federation at a chosen moment, and saying what came of it.

A phase of a small round lasts milliseconds. To hit it, the agents are held still (SIGSTOP) as soon
as the coordinator's history names the phase: nothing can finish it then. If it is over already,
they go on and the next round is tried. What is killed gets SIGKILL, workers included, and is
started again a second later. Nobody is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from infra.demo.federation import COORDINATOR, Federation
from infra.runs.client import AdminClient
from infra.runs.facts import RunReport
from protocols.errors import NotReadyError
from protocols.gen import admin_pb2
from protocols.identifiers import RoundId
from protocols.wire import read_round

RESTART_S: Final = 1.0  # from the kill to the new start
Target = Literal["node", "coordinator"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A kill that happened, and how the round went on."""

    target: Target
    name: str  # who was killed
    phase: str
    round: str
    processes: int  # killed at once
    killed_at: float  # Unix seconds
    restarted_at: float | None = None  # Unix seconds
    answered_after_s: float | None = None  # coordinator: from the restart to its first answer
    went_on_after_s: float | None = None  # from the restart to the end of the round
    ended: str = ""  # phase the round ended in
    survivors: int = 0  # nodes in the round's sum
    in_the_sum: bool | None = None  # whether the killed node's update is
    unfinished: bool = True  # whether the phase still had work to do when the kill fell

    def to_json(self) -> dict[str, Any]:
        """Facts for the summary."""
        return asdict(self)

    def killed_line(self) -> str:
        """What was done, in one sentence."""
        who = "the coordinator" if self.target == "coordinator" else f"node {self.name}"
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"SIGKILL: {who} ({count}) in round {self.round}, phase {self.phase}"

    def restarted_line(self) -> str:
        """That it runs again, in one sentence."""
        after = (self.restarted_at or self.killed_at) - self.killed_at
        return f"{self.name} started again {after:.1f} s after the kill"

    def went_on_line(self) -> str:
        """What came of it, in one sentence."""
        line = (
            f"round {self.round} went on: {self.ended} {self.went_on_after_s:.1f} s after the "
            f"restart, {self.survivors} nodes in the sum"
        )
        if self.answered_after_s is not None:
            line = f"it answered again {self.answered_after_s:.1f} s after its restart; {line}"
        if self.in_the_sum is not None:
            line += f", {self.name} {'among them' if self.in_the_sum else 'not among them'}"
        return line


class Striker:
    """Waits for its moment, strikes once, and watches the round to its end.

    ``on_entry`` kills, ``revive`` starts again, ``on_report`` says what came of it.
    """

    def __init__(
        self,
        federation: Federation,
        *,
        target: Target,
        phase: str,
        sites: Sequence[str],
        from_number: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._federation = federation
        self._target = target
        self._phase = phase
        self._sites = tuple(sites)
        self._from_number = from_number  # of the round from which on it may strike
        self._now = now
        self.struck: Struck | None = None

    @property
    def moment(self) -> str:
        """The phase it waits for."""
        return self._phase

    @property
    def done(self) -> bool:
        """Whether it struck and the round came to its end."""
        return self.struck is not None and self.struck.went_on_after_s is not None

    def on_entry(self, entry: admin_pb2.HistoryEntry, client: AdminClient) -> Struck | None:
        """Look at one entry of the history; strike if this is the moment.

        Returns:
            What was killed, if it was now.
        """
        if self.struck is not None or entry.phase != self._phase:
            return None
        if entry.round.number < self._from_number:
            return None
        household = self._federation.household
        held = [site for site in self._sites if site in household]
        household.pause(held)
        try:
            round_ = read_round(entry.round)
            victim = self._victim(round_, held, client)
            if victim is None:
                return None
            killed_at = self._now()
            killed = self._federation.kill(victim)
        finally:
            household.resume(held)
        self.struck = Struck(
            target=self._target,
            name=victim,
            phase=self._phase,
            round=str(round_),
            processes=len(killed),
            killed_at=killed_at,
        )
        return self.struck

    def revive(self) -> Struck:
        """Start again what was killed, a second after the kill."""
        if self.struck is None:
            raise ValueError("nobody was killed")
        wait = self.struck.killed_at + RESTART_S - self._now()
        self._federation.restart(self.struck.name, after_s=max(0.0, wait))
        self.struck = replace(self.struck, restarted_at=self._now())
        return self.struck

    def on_report(self, report: RunReport) -> Struck | None:
        """Look at the run; what came of the kill, if the round has come to its end now."""
        if self.struck is None or self.struck.restarted_at is None or self.done:
            return None
        since = self._now() - self.struck.restarted_at
        if self._target == "coordinator" and self.struck.answered_after_s is None:
            self.struck = replace(self.struck, answered_after_s=since)
        for round_ in report.rounds:
            if str(round_.round) == self.struck.round and round_.ended:
                node = self.struck.name
                ended_at = round_.spans[-1].entered_at.timestamp()
                self.struck = replace(
                    self.struck,
                    went_on_after_s=since,
                    ended=round_.phase,
                    survivors=len(round_.survivors),
                    in_the_sum=node in round_.survivors if self._target == "node" else None,
                    unfinished=ended_at > self.struck.killed_at,
                )
                return self.struck
        return None

    def _victim(self, round_: RoundId, agents: Sequence[str], client: AdminClient) -> str | None:
        """Who is to be killed; None if the moment has passed."""
        if self._target == "coordinator" and self._phase == "Released":
            return COORDINATOR  # only the coordinator acts now: asking would give it time
        try:
            current = client.show(round_.run).current
        except NotReadyError:
            return None
        if current is None or current.round != round_ or current.phase != self._phase:
            return None
        if self._target == "coordinator":
            return COORDINATOR
        busy = [site for site in agents if site not in current.ready]
        return busy[0] if busy else None
