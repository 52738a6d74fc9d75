"""The cases, in groups that share one federation: starting one costs more than most faults."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from tests.matrix import interfaces, troubles, workers
from tests.matrix.cases import Bench, Database, Mode, Row, bench
from tests.matrix.errands import run_errands
from tests.matrix.kills import Storm
from tests.matrix.points import Part, commit_points, reason_elsewhere
from tests.matrix.relay import Weather
from tests.matrix.render import OUT
from tests.support import postgres
from tests.support.postgres import PostgresServer

Play = Callable[[Bench], tuple[list[Row], frozenset[str]]]


def instants(part: Part) -> frozenset[str]:
    """Every commit point that a round comes to, before and after."""
    return frozenset(
        f"{point}@{when}"
        for point in commit_points(part)
        if not reason_elsewhere(point)
        for when in ("before", "after")
    )


def kills(part: Part) -> Play:
    """The case that visits every commit point of a part."""

    def play(made: Bench) -> tuple[list[Row], frozenset[str]]:
        errands = run_errands if part == "coordinator" and made.mode == "open" else None
        return Storm(made, part).play(instants(part), errands)

    return play


def kill_a_worker(made: Bench) -> tuple[list[Row], frozenset[str]]:
    """The same for the worker of a site."""
    return workers.kill_worker(made, instants("worker"))


def trouble(make: Callable[[Bench], troubles.Trouble]) -> Play:
    """The case that lets one trouble happen in every phase."""
    return lambda made: (troubles.suffer(made, make(made)), frozenset())


def network(kind: Weather) -> Play:
    """One kind of weather between all nodes and the coordinator."""

    def play(made: Bench) -> tuple[list[Row], frozenset[str]]:
        with troubles.behind_relay(made) as relay:
            made.settle()
            return troubles.suffer(made, troubles.weather(relay, kind)), frozenset()

    return play


def node_clock(made: Bench) -> tuple[list[Row], frozenset[str]]:
    """One node's clock is ahead, and behind."""
    rows = []
    with troubles.node_with_a_clock(made) as clock:
        for by_s in (troubles.HOUR_S, -troubles.HOUR_S):
            rows += troubles.suffer(made, troubles.node_clock_wrong(clock, by_s))
    return rows, frozenset()


def disk(made: Bench) -> tuple[list[Row], frozenset[str]]:
    """No room for anybody."""
    troubles.little_is_enough(made)
    return troubles.suffer(made, troubles.disk_full(made)), frozenset()


def two(made: Bench) -> tuple[list[Row], frozenset[str]]:
    """The leading one of two coordinators is killed, or stands still until it leads no more."""
    with troubles.two_coordinators(made) as pair:
        killed = troubles.suffer(made, troubles.leader_killed(pair))
        return killed + troubles.suffer(made, troubles.leader_stands_still(pair)), frozenset()


KILLS: Final[dict[str, Play]] = {
    "kill-coordinator": kills("coordinator"),
    "kill-node": kills("node"),
}
CLOCK: Final[dict[str, Play]] = {
    "clock-forwards": trouble(lambda made: troubles.clock_jump(made, troubles.HOUR_S)),
    "clock-back": trouble(lambda made: troubles.clock_jump(made, -troubles.HOUR_S)),
}
WRONG_CLOCK: Final[dict[str, Play]] = {
    "clock-behind": trouble(lambda made: troubles.clock_wrong(made, -troubles.HOUR_S)),
    "node-clock": node_clock,
}
STANDSTILL: Final[dict[str, Play]] = {
    "coordinator-stands-still": trouble(lambda made: troubles.standstill(made, "coordinator")),
    "node-stands-still": trouble(lambda made: troubles.standstill(made, "node")),
}
DATABASE: Final[dict[str, Play]] = {
    "server-killed": trouble(troubles.postmaster_killed),
    "backend-killed": trouble(troubles.backend_killed),
}
UPGRADE: Final[dict[str, Play]] = {"upgrade": trouble(troubles.upgrade)}  # for good


def interface(made: Bench) -> tuple[list[Row], frozenset[str]]:
    """The nodes' interface goes down."""
    why = interfaces.why_not()
    if why is not None:
        print(f"left out, the interface: {why}")
        return [], frozenset()
    with interfaces.behind_an_interface(made) as down:
        return troubles.suffer(made, down), frozenset()


def packets(made: Bench) -> tuple[list[Row], frozenset[str]]:
    """Packets between the nodes and the coordinator come late, or not at all."""
    why = interfaces.why_not()
    if why is not None:
        print(f"left out, the link of packets: {why}")
        return [], frozenset()
    rows: list[Row] = []
    with interfaces.behind_a_link(made) as trouble:
        for sky in ("slow", "lossy", "lost"):
            rows += troubles.suffer(made, trouble(sky))
    return rows, frozenset()


NETWORK: Final[dict[str, Play]] = {
    "network-slow": network("slow"),
    "network-lossy": network("lossy"),
    "network-half-open": network("deaf"),
    "network-partition": network("away"),
    "network-interface": interface,
    "network-packets": packets,
}
TROUBLES: Final = CLOCK | WRONG_CLOCK | STANDSTILL | UPGRADE | NETWORK
DISK: Final[dict[str, Play]] = {"disk-full": disk}
# A dead connection is noticed after half a minute, whatever the sum and the database.
NOT_SLOW: Final = {name: play for name, play in TROUBLES.items() if name != "network-half-open"}
GROUPS: Final[dict[tuple[Database, Mode, str], dict[str, Play]]] = {
    ("sqlite", "aggregate-only", "main"): KILLS | TROUBLES,
    ("postgresql", "aggregate-only", "main"): KILLS | DATABASE | NOT_SLOW,
    ("postgresql", "aggregate-only", "two"): {"two-coordinators": two},
    ("sqlite", "aggregate-only", "disk"): DISK,
    ("postgresql", "aggregate-only", "disk"): DISK,  # the database has a disk of its own
    ("sqlite", "open", "main"): KILLS | {"kill-worker": kill_a_worker} | NOT_SLOW,
    ("sqlite", "open", "disk"): DISK,
    # The network and the disk of the others do not meet the database: seen once, with masked sums.
    ("postgresql", "open", "main"): KILLS | DATABASE | CLOCK | UPGRADE | STANDSTILL,
}


def names() -> frozenset[str]:
    """Of all cases."""
    return frozenset(
        f"{database}.{mode}.{name}"
        for (database, mode, _), cases in GROUPS.items()
        for name in cases
    )


def groups(*, only: str) -> list[str]:
    """Run what is left; the names of what failed."""
    OUT.mkdir(parents=True, exist_ok=True)
    failed = []
    with ExitStack() as stack:
        server = _server(stack)
        for (database, mode, place), cases in GROUPS.items():
            named = {f"{database}.{mode}.{name}": play for name, play in cases.items()}
            left = {
                name: play
                for name, play in named.items()
                if re.search(only, name) and not (OUT / f"{name}.json").exists()
            }
            if not left:
                continue
            if database == "postgresql" and server is None:
                print(f"left out, PostgreSQL is not installed: {', '.join(left)}")
                continue
            if place == "disk" and not troubles.may_mount():
                print(f"left out, a small disk needs root: {', '.join(left)}")
                continue
            failed += _group(database, mode, place, left, server if database != "sqlite" else None)
    return failed


def _group(
    database: Database,
    mode: Mode,
    place: str,
    cases: dict[str, Play],
    server: PostgresServer | None,
) -> list[str]:
    folder = Path(tempfile.mkdtemp(prefix="minga-faults-"))
    try:
        with ExitStack() as stack:
            if place == "disk":
                stack.enter_context(troubles.small_disk(folder / "federation", size_mb=320))
            made = stack.enter_context(
                bench(folder / "federation", mode=mode, database=database, server=server)
            )
            for name, play in cases.items():
                made.settle()
                began, load = time.monotonic(), os.getloadavg()[0]
                print(f"{name}: begins, load average {load:.1f}", flush=True)
                rows, missed = play(made)
                _keep(name, rows, missed, time.monotonic() - began, load)
    except Exception:  # noqa: BLE001 - the other groups shall run; this one is named at the end
        traceback.print_exc()
        print(f"the federation's folder, with its logs, is kept: {folder}", flush=True)
        return [name for name in cases if not (OUT / f"{name}.json").exists()]
    shutil.rmtree(folder, ignore_errors=True)
    return []


def _keep(name: str, rows: list[Row], missed: frozenset[str], seconds: float, load: float) -> None:
    said: dict[str, Any] = {
        "case": name,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds),
        # Runnable processes of the whole machine, over a minute: before the case, and at its end.
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "rows": [dataclasses.asdict(row) for row in rows],
        "missed": sorted(missed),
    }
    (OUT / f"{name}.json").write_text(json.dumps(said, indent=1) + "\n")
    bad = [row for row in rows if row.outcome != "same"]
    print(
        f"{name}: {len(rows)} faults, {len(bad)} bad, {len(missed)} missed, {seconds:.0f} s",
        flush=True,
    )
    for row in bad:
        print(f"  {row}")


@contextmanager
def _started(server: PostgresServer) -> Iterator[PostgresServer]:
    server.initialise()
    server.start()
    try:
        yield server
    finally:
        if (server.folder / "data" / "postmaster.pid").exists():
            server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)


def _server(stack: ExitStack) -> PostgresServer | None:
    programs = postgres.binaries()
    if programs is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix=postgres._PREFIX))
    (folder / "owner").write_text(str(os.getpid()))
    server = PostgresServer(folder=folder, port=postgres._free_port(), programs=programs)
    return stack.enter_context(_started(server))
