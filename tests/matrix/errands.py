"""Errands that bring a coordinator to commit points beside those of a plain round.

An invitation and a join, a node that declines, a deadline that passes, a run that is stopped, an
hour of silence in the log. Each is tried again until it is done, however often the coordinator is
killed meanwhile, and nothing may come of that but the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from infra.demo.processes import ChildDiedError
from protocols.errors import ExistsError, FederationError
from tests.matrix.cases import COORDINATES, DEADLINES, LONG_S, PATIENCE_S, Bench

ABSENT = "node-3"
HEARTBEATS = 4


def run_errands(bench: Bench) -> str:
    """Do all of them; ``same``, or what was wrong."""
    persist(lambda: _stop_a_run(bench))
    persist(lambda: _invite(bench))  # a fourth witness: from here on one of them may be away
    for errand in (_decline, _deadline):
        disturbed = errand(bench)
        if disturbed != [(2, 2 * 65_536)]:
            return f"{errand.__name__}: {disturbed}"
    _silence(bench)
    return "same"


def persist(errand: Callable[[], Any]) -> Any:
    """Try again until it is done."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            return errand()
        except (FederationError, ChildDiedError):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)


def _invite(bench: Bench) -> None:
    running = bench.running
    site = "late-1"
    if not running.federation.joined(site):
        running.federation.join(site, running.client.invite(site))
    if site not in running.household:
        running.start_node(site)


def _silence(bench: Bench) -> None:
    """An hour without a leaf makes a heartbeat: once for each death there, and once to live on."""
    for _ in range(HEARTBEATS):
        bench.running.jump(LONG_S)
        time.sleep(4.0)


def _stop_a_run(bench: Bench) -> None:
    running = bench.running
    bench._runs += 1
    name = f"stopped-{bench._runs}"
    running.submit(name, rounds=50, coordinates=COORDINATES, deadlines=DEADLINES)
    persist(lambda: running.client.stop(bench.run_id(name), "an errand"))


def _short(bench: Bench, name: str) -> Any:
    def submit() -> Any:
        bench._runs += 1
        try:
            return bench.running.submit(
                f"{name}-{bench._runs}",
                rounds=1,
                coordinates=COORDINATES,
                min_participants=2,
                deadlines=DEADLINES,
            )
        except ExistsError:
            return bench.run_id(f"{name}-{bench._runs}")

    return persist(submit)


def _counted(bench: Bench, run: Any) -> list[tuple[int, int]]:
    report = bench.ended(run)
    return [(each.metrics["nodes"], each.metrics["weight"]) for each in report.released]


def _decline(bench: Bench) -> list[tuple[int, int]]:
    paused = bench.running.federation.node_folder(ABSENT) / "paused"
    paused.touch()
    try:
        return _counted(bench, _short(bench, "declined"))
    finally:
        paused.unlink()


def _deadline(bench: Bench) -> list[tuple[int, int]]:
    household = bench.running.household
    household.stop(ABSENT)
    try:
        run = _short(bench, "late")

        def two_have_joined() -> bool:
            report = bench.show(run)
            now = report.current if report is not None else None
            return now is not None and now.phase == "Open" and len(now.ready) == 2

        bench.wait(two_have_joined, words="two nodes join")
        bench.running.jump(LONG_S + 1)
        return _counted(bench, run)
    finally:
        bench.running.start_node(ABSENT)
