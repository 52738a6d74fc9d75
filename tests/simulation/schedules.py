"""Schedules: what happens to a federation and when; made from a seed, played, shrunk.

A schedule is a setting, a seed of chance (latencies, training times, jitter) and a list of steps:
``(milliseconds to wait, operation, arguments)``. All numbers are plain, so a found one can be kept
as a literal (``test_found.py``). After the last step nothing disturbs any more, everybody is
started again, and the run has to end.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

from protocols.rounds import Aborted, Burned
from tests.simulation.making import world_of
from tests.simulation.oracle import Oracle, ViolationError
from tests.simulation.wire import Fault
from tests.simulation.world import (
    COORDINATOR,
    LOGGED,
    MASKED,
    MASKED_LOGGED,
    OPEN,
    OPEN_TWICE,
    PRIVATE,
    PRIVATE_LOGGED,
    Setting,
    World,
)

Step = tuple[Any, ...]
PATIENCE = 420.0  # virtual seconds in which an undisturbed run must end: five failures and pauses
SLICE = 0.75  # seconds between two looks of the oracle
WEIGHTS = (
    (OPEN, 30), (OPEN_TWICE, 20), (MASKED, 25), (PRIVATE, 11),
    (LOGGED, 8), (MASKED_LOGGED, 4), (PRIVATE_LOGGED, 2),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Schedule:
    """What happens, and when."""

    setting: Setting
    seed: int
    steps: tuple[Step, ...]
    jitter: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    status: str
    ends: Counter[str]
    deaths: int
    fired: Counter[str]
    refused_writes: int
    trace: str
    seconds: float


# -- making ----------------------------------------------------------------------------------------


def schedule(seed: int, setting: Setting | None = None) -> Schedule:
    """The schedule of a seed, in a setting that is given or drawn."""
    rng = Random(f"schedule {seed}")
    kinds, weights = zip(*WEIGHTS, strict=True)
    drawn: Setting = rng.choices(kinds, weights)[0]
    setting = setting or drawn
    span = 2500 if setting.log else 1200
    steps = tuple(
        (rng.choice((0, rng.randrange(200), rng.randrange(span))), *step_of(rng, setting))
        for _ in range(rng.randint(2, 9))
    )
    # What is armed for later has time to strike before nothing disturbs any more.
    last = (0, "pass", rng.choice((0, 1500, 4000)))
    return Schedule(setting, seed, (*steps, last), jitter=rng.choice((0.0, 0.1, 0.3)))


def calls_of(setting: Setting) -> tuple[str, ...]:
    """Methods whose next call may be disturbed; empty: whichever comes next."""
    calls = ("", "", "Join", "BeginUpload", "Append", "FinishUpload", "Confirm", "Sync", "Fetch")
    return (*calls, "Post", "Post", "Get") if setting.masked else (*calls, "Ready")


def kills(seed: int, setting: Setting) -> Schedule:
    """Nothing happens but that nodes are killed while they train and hand in."""
    rng = Random(f"kills {seed}")
    steps = tuple(
        (rng.randrange(250), "kill", rng.choice(setting.names), rng.randint(0, 4), 50)
        for _ in range(8)
    )
    return Schedule(setting, seed, steps)


def one_kill(seed: int, setting: Setting) -> Schedule:
    """Nothing happens but that one node is killed and down until the others have gone on; with
    each seed a little later, so that some seeds meet it between its upload and its verdict."""
    kill = (400 + 10 * seed, "kill", setting.names[1], 0, 4000)
    return Schedule(setting, 7, (kill, (0, "pass", 6000)))


def losses(seed: int, setting: Setting) -> Schedule:
    """Nothing happens but that calls are lost or handled twice."""
    rng = Random(f"losses {seed}")
    steps = tuple(
        (0, kind, node, rng.choice((0, 30)), rng.choice(calls_of(setting)))
        for node in setting.names
        for kind in ("request", "answer", "answer", "twice")
    )
    return Schedule(setting, seed, (*steps, (0, "pass", 3000)))


def step_of(rng: Random, setting: Setting) -> Step:
    """One operation with its arguments."""
    node = rng.choice(setting.names)
    who = rng.choice((*setting.names, COORDINATOR, COORDINATOR))
    draw = rng.random()
    if draw < 0.30:
        kind = rng.choice(("request", "answer", "answer", "twice", "late"))
        return (kind, node, rng.choice((0, 30, 300, 3000, 15000)), rng.choice(calls_of(setting)))
    if draw < 0.62:
        return ("kill", who, rng.choice((0, 1, 2, 3, 5, 8, 13)), rng.choice((50, 800, 4000, 15000)))
    if draw < 0.70:
        return ("pass", rng.choice((1000, 5000, 9000, 13000)))
    if draw < 0.75:
        return ("jump", who, rng.choice((-30, -2, 3, 40)))
    if draw < 0.80:
        return ("rotate", node)
    if draw < 0.86:
        return ("full", who, rng.choice((100, 1000, 6000)))
    if draw < 0.91:
        return ("cut", node, rng.choice((300, 3000, 11000)))
    if draw < 0.955:
        return ("backup", who)
    parts = ("ledger",) if who == COORDINATOR else ("journal", "privacy", "secagg", "all")
    return ("restore", who, rng.choice(parts), rng.choice((50, 3000)))


# -- playing ---------------------------------------------------------------------------------------

_FILES = {
    "ledger": ("ledger.sqlite",),
    "journal": ("journal.sqlite",),
    "privacy": ("privacy.sqlite",),
    "secagg": ("secagg",),
}


class Player:
    """Carries a schedule out on a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.oracle = Oracle(world)
        self._backups: dict[str, Path] = {}
        self._store = world.folder.parent / "backups"
        self._numbers = itertools.count()

    # -- time ----------------------------------------------------------------------------------

    async def wait(self, seconds: float) -> None:
        """Let time pass, and look."""
        while seconds > 0:
            part = min(seconds, SLICE)
            await asyncio.sleep(part)
            self.oracle.look()
            seconds -= part

    async def play(self, steps: Iterable[Step]) -> Outcome:
        """All of it.

        Raises:
            ViolationError: a promise was broken.
        """
        self.world.start()
        for step in steps:
            await self.wait(step[0] / 1000)
            await self.do(step[1], *step[2:])
            self.oracle.look()
        await self.settle()
        return self.outcome()

    async def settle(self) -> None:
        """Nothing disturbs any more: the run ends, and undisturbed rounds are released."""
        world, oracle = self.world, self.oracle
        for victim in world.victims:
            victim.set_full(full=False)
            victim.set_clock(timedelta())
            if victim.process is not None:
                victim.process.fuse = None
            victim.start()
        for link in world.network.links.values():
            link.faults.clear()
            link.cut_until = 0.0
        await self.wait(SLICE)
        quiet_from = len(oracle.rows)
        began, hopeless = world.loop.time(), False
        while oracle.status == "active" and not hopeless:
            if world.loop.time() - began > PATIENCE:
                oracle.fail(f"the run has not ended: {self._why()}")
            await self.wait(4 * SLICE)
            for victim in world.victims:
                if not victim.stopped:
                    victim.start()
            hopeless = bool(oracle.tampered) and self._waits_for_people()
        if not oracle.tampered and oracle.status != "active":
            await self.wait(2 * SLICE)
            for row in oracle.rows[quiet_from:]:
                if isinstance(row.phase, Aborted | Burned):
                    oracle.fail(f"{row.round} was not disturbed and ended so: {row.why}")
            await self.confirmed()
        oracle.look()
        oracle.check_models()

    async def confirmed(self) -> None:
        """Everybody who was counted says what it derived; not for a round that was over, and the
        next one as well, before it was back from the dead: it is shown the last one only."""
        released = [row for row in self.oracle.rows if row.released]
        for _ in range(40):
            waits = [
                (name, row.round)
                for row in released
                for name in row.phase.survivors  # type: ignore[union-attr]
                if not self._answered(name, row.round)
                and (row is released[-1] or not self._may_have_missed(name, row.round))
            ]
            if not waits:
                return
            await self.wait(SLICE)
        self.oracle.fail(f"never confirmed: {waits}")

    def _answered(self, name: str, round_: Any) -> bool:
        site = self.world.nodes[name].site
        record = site.journal.confirm(round_) if site is not None else None
        return record is not None and record.answered

    def _may_have_missed(self, name: str, round_: Any) -> bool:
        """Whether it was down at some time and computed nothing for the round."""
        site = self.world.nodes[name].site
        died = any(process.dead for process in self.world.processes if process.name == name)
        return died and site is not None and site.journal.confirm(round_) is None

    def _waits_for_people(self) -> bool:
        """Whether somebody failed closed, as it must: no more is asked then."""
        tampered = self.oracle.tampered
        down = [victim.name for victim in self.world.victims if not victim.up and victim.stopped]
        return bool(tampered) and (bool(down) or self.world.loop.time() > 120.0)

    def _why(self) -> str:
        rows = [f"{row.round} {type(row.phase).__name__}: {row.why}" for row in self.oracle.rows]
        nodes = {
            name: [*node.agent._why.values()] if node.agent is not None else node.stopped
            for name, node in self.world.nodes.items()
        }
        return f"{rows[-3:]} {nodes} {self.world.coordinator.stopped}"

    def outcome(self) -> Outcome:
        """What came of it."""
        world, oracle = self.world, self.oracle
        return Outcome(
            status=oracle.status,
            ends=Counter(type(row.phase).__name__ for row in oracle.rows),
            deaths=world.deaths,
            fired=world.network.fired,
            refused_writes=sum(process.refused for process in world.processes),
            trace=oracle.trace(),
            seconds=world.loop.time(),
        )

    # -- operations ----------------------------------------------------------------------------

    async def do(self, what: str, *arguments: Any) -> None:
        """One operation."""
        world = self.world
        match what, *arguments:
            case (("request" | "answer" | "twice" | "late"), node, milliseconds, method):
                fault = Fault(what, milliseconds / 1000, method)
                world.network.link(node).faults.append(fault)
            case "kill", who, fuse, down:
                victim = world.victim(who)
                if victim.up and victim.process is not None:
                    victim.again = down / 1000
                    if fuse:
                        victim.process.fuse = fuse
                    else:
                        victim.process.kill()
            case "pass", milliseconds:
                await self.wait(milliseconds / 1000)
            case "jump", who, seconds:
                victim = world.victim(who)
                victim.set_clock(victim.skew + timedelta(seconds=seconds))
            case "rotate", node:
                found = world.nodes[node]
                if found.up and found.process is not None:
                    found.process.spawn(found.rotate())
            case "full", who, milliseconds:
                victim = world.victim(who)
                victim.set_full(full=True)
                world.loop.call_later(milliseconds / 1000, lambda: victim.set_full(full=False))
            case "cut", node, milliseconds:
                world.network.cut(node, milliseconds / 1000)
            case "backup", who:
                self.backup(who)
            case "restore", who, part, down:
                await self.restore(who, part, down / 1000)
            case _:
                raise ValueError(f"no such operation: {what}")

    def _home(self, who: str) -> Path:
        folder = self.world.folder
        return folder / "coordinator" if who == COORDINATOR else folder / "nodes" / who

    def backup(self, who: str) -> None:
        """Copy a disk as it is now; nobody is in the middle of a transaction."""
        target = self._store / f"{who}.{next(self._numbers)}"
        shutil.copytree(self._home(who), target, symlinks=True)
        self._backups[who] = target

    async def restore(self, who: str, part: str, down: float) -> None:
        """Put back what was copied before, while nobody runs on it."""
        source, victim = self._backups.get(who), self.world.victim(who)
        if source is None:
            return
        if victim.up and victim.process is not None:
            victim.again = None
            victim.process.kill()
        await asyncio.sleep(0.01)
        if victim.up:
            return
        if who == COORDINATOR:
            self.oracle.forget_ledger()
        else:
            self.oracle.tampered.add(who)
        home = self._home(who)
        if part == "all":
            shutil.rmtree(home)
            shutil.copytree(source, home, symlinks=True)
        for name in _FILES.get(part, ()):
            for old in home.glob(f"{name}*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            for copy in source.glob(f"{name}*"):
                shutil.copytree(copy, home / copy.name) if copy.is_dir() else shutil.copy(
                    copy, home / copy.name
                )
        self.world.loop.call_later(down, victim.start)


def play(made: Schedule) -> Outcome:
    """Play a schedule on a fresh federation.

    Raises:
        ViolationError: a promise was broken.
    """
    with world_of(made.setting, made.seed, jitter=made.jitter) as world:
        player = Player(world)
        outcome: Outcome = world.loop.run_until_complete(player.play(made.steps))
        return outcome


# -- shrinking -------------------------------------------------------------------------------------


def fails(made: Schedule) -> str:
    """The violation of a schedule; empty: there is none."""
    try:
        play(made)
    except ViolationError as error:
        return str(error) or "violation"
    return ""


def shrunk(made: Schedule) -> Schedule:
    """A schedule that still fails and has no step too many."""
    again = True
    while again:
        again = False
        for place in reversed(range(len(made.steps))):
            # What came later keeps its time: the pause of a step that goes is added to the next.
            rest = list(made.steps)
            gone = rest.pop(place)
            if place < len(rest):
                rest[place] = (rest[place][0] + gone[0], *rest[place][1:])
            shorter = replace(made, steps=tuple(rest))
            if fails(shorter):
                made, again = shorter, True
        if made.jitter and fails(replace(made, jitter=0.0)):
            made = replace(made, jitter=0.0)
    return made
