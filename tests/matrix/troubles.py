"""Troubles that are no kill of ours: the database, the disk, the clock, the network, an upgrade.

Each trouble is a pair of a beginning and an end. It begins in each phase in turn, while the agents
stand still so that the phase cannot pass, and ends a while later; the run must then come to the
results of the undisturbed run. How long it took to go on counts from the end of the trouble to the
next phase that the coordinator records.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from coordinator.config import load_config as load_coordinator
from infra.demo.federation import COORDINATOR
from tests.matrix.cases import PATIENCE_S, Bench, Row
from tests.matrix.relay import Relay, Weather
from tests.support.faulty_coordinator import read_shift, shift
from tests.support.federation import CLOCK, ROOT, Running
from tests.support.second import SECOND, make_second, second_client, start_second, tell_nodes

OPEN_PHASES: Final = ("Open", "Training", "Uploading", "Released")
SECURE_PHASES: Final = (
    *("Open", "Training", "Dealing", "Uploading", "Committing", "Revealing", "Released"),
)
HOUR_S: Final = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What happens, to whom, and for how long."""

    fault: str
    victim: str
    begin: Callable[[], None]
    end: Callable[[], None]
    lasts_s: float
    still: tuple[str, ...] = ()  # nodes that do not move until the end
    after: Callable[[], None] = lambda: None  # once the run is over
    declined: bool = False  # whether a node says no to rounds that open meanwhile


def phases_of(bench: Bench) -> tuple[str, ...]:
    """The phases that rounds of a bench go through."""
    return OPEN_PHASES if bench.mode == "open" else SECURE_PHASES


def suffer(bench: Bench, trouble: Trouble, phases: tuple[str, ...] = ()) -> list[Row]:
    """Let a trouble happen in each phase."""
    bench.undisturbed()
    return [_suffer_once(bench, trouble, phase) for phase in phases or phases_of(bench)]


def _suffer_once(bench: Bench, trouble: Trouble, phase: str) -> Row:
    run = bench.submit("trouble")
    while not bench.meet(run, phase):
        bench.ended(run)
        run = bench.submit("trouble")
    household, sites = bench.running.household, bench.running.sites
    trouble.begin()
    try:
        household.resume([site for site in sites if site not in trouble.still])
        time.sleep(trouble.lasts_s)
    finally:
        trouble.end()
    over = time.time()
    shifted = read_shift(bench.running.folder / CLOCK)
    outcome = bench.outcome(bench.ended(run), declined=trouble.declined)
    step = bench.next_step_after(over + shifted, run)
    trouble.after()
    return Row(
        fault=trouble.fault,
        victim=trouble.victim,
        phase=phase,
        mode=bench.mode,
        database=bench.database,
        outcome=outcome,
        # None: the run was over before the trouble was, it did not need what was away
        went_on_s=None if step is None else round(step - over - shifted, 2),
    )


# -- the database ------------------------------------------------------------------------------


def postmaster_killed(bench: Bench) -> Trouble:
    """kill -9 of the postmaster and of every backend, then a start that recovers."""
    server = bench.server
    assert server is not None

    def kill() -> None:
        pid = int((server.folder / "data" / "postmaster.pid").read_text().split()[0])
        family = [pid, *_children(pid)]
        for each in family:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        bench.wait(lambda: not any(_runs(each) for each in family), words="PostgreSQL dies")
        (server.folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    return Trouble(
        fault="kill -9 of the database server, 2 s away",
        victim="PostgreSQL",
        begin=kill,
        end=server.start,
        lasts_s=2.0,
    )


def backend_killed(bench: Bench) -> Trouble:
    """kill -9 of one backend: the server throws everybody out and recovers by itself."""
    server = bench.server
    assert server is not None

    def kill() -> None:
        pid = int((server.folder / "data" / "postmaster.pid").read_text().split()[0])
        ours = [each for each in _children(pid) if "minga" in _command(each)]
        os.kill(ours[-1], signal.SIGKILL)

    return Trouble(
        fault="kill -9 of one database backend",
        victim="PostgreSQL",
        begin=kill,
        end=lambda: None,
        lasts_s=0.5,
    )


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, IndexError):
                text = (folder / "stat").read_text("ascii", "replace").rpartition(")")[2]
                if int(text.split()[1]) == pid:
                    found.append(int(folder.name))
    return sorted(found)


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace")
    return ""


def _runs(pid: int) -> bool:
    with suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2]
        return text.split()[0] not in "ZX"
    return False


# -- the disk ----------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, *, size_mb: int) -> Iterator[None]:
    """A file system of its own for a federation; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "minga-faults", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def disk_full(bench: Bench) -> Trouble:
    """Not one byte is left for ledger, spool, blobs, log, journals and secret states."""
    ballast = bench.running.folder / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            size = 1 << 20
            while size:
                try:
                    file.write(b"\0" * size)
                except OSError:
                    size //= 2

    return Trouble(
        fault="disk full for 4 s",
        victim="everybody",
        begin=fill,
        end=ballast.unlink,
        lasts_s=4.0,
    )


def little_is_enough(bench: Bench) -> None:
    """Let the coordinator take uploads with little room left; it is started again."""
    path = bench.running.folder / COORDINATOR / "config.toml"
    text = path.read_text("utf-8")
    assert "[storage]" not in text
    path.write_text(f"{text}\n[storage]\nmin_free_mb = 1\n", "utf-8")
    assert load_coordinator(path).min_free_bytes == 2**20
    bench.running.household.stop(COORDINATOR)
    bench.running.start_coordinator()


# -- the clock ---------------------------------------------------------------------------------


def clock_jump(bench: Bench, by_s: float) -> Trouble:
    """The coordinator's clock jumps; it stays so."""
    return Trouble(
        fault=f"clock jumps by {by_s / HOUR_S:+.0f} h",
        victim=COORDINATOR,
        begin=lambda: bench.running.jump(by_s),
        end=lambda: None,
        lasts_s=0.0,
    )


def clock_wrong(bench: Bench, by_s: float) -> Trouble:
    """The coordinator's clock is wrong for a while, by comparison with everybody else's."""
    return Trouble(
        fault=f"clock is off by {by_s / HOUR_S:+.0f} h for 4 s",
        victim=COORDINATOR,
        begin=lambda: bench.running.jump(by_s - _shifted(bench)),
        end=lambda: bench.running.jump(-_shifted(bench)),
        lasts_s=4.0,
    )


def _shifted(bench: Bench) -> float:
    return read_shift(bench.running.folder / CLOCK)


@contextmanager
def node_with_a_clock(bench: Bench) -> Iterator[Path]:
    """One node whose clock may be set; afterwards it is an ordinary one again."""
    running = bench.running
    site = running.sites[0]
    clock, folder = running.folder / f"clock-of-{site}", running.federation.node_folder(site)
    command = running.household.python(
        "tests.matrix.node",
        *("--dir", str(folder), "--faults", str(running.folder / "faults" / "nobody")),
        *("--ledger", bench.url, "--clock", str(clock)),
    )
    running.household.stop(site)
    path = {"PYTHONPATH": str(ROOT)}
    running.household.start(site, command, log=running.federation.log(site), environment=path)
    bench.settle()
    try:
        yield clock
    finally:
        running.household.stop(site)
        running.start_node(site)


def node_clock_wrong(clock: Path, by_s: float) -> Trouble:
    """The clock of one node is wrong for a while."""
    return Trouble(
        fault=f"clock is off by {by_s / HOUR_S:+.0f} h for 4 s",
        victim="node",
        begin=lambda: shift(clock, by_s),
        end=lambda: shift(clock, -by_s),
        lasts_s=4.0,
        declined=True,
    )


# -- another version ---------------------------------------------------------------------------


def upgrade(bench: Bench) -> Trouble:
    """Kill the coordinator and start a newer one in its place; the nodes stay as they are."""
    running = bench.running

    def kill() -> None:
        running.federation.kill(COORDINATOR)
        (running.folder / "upgraded").touch()

    return Trouble(
        fault="upgraded in mid-run: a new migration, new fields in every answer",
        victim=COORDINATOR,
        begin=kill,
        end=running.start_coordinator,
        lasts_s=0.0,
    )


# -- two coordinators --------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Pair:
    """Two coordinators over one database."""

    bench: Bench
    away: list[str] = field(default_factory=list)  # the one that the trouble took

    def take(self, how: Callable[[str], None]) -> None:
        """Do something to the one that drives the rounds."""
        pid, household = leader(self.bench.url), self.bench.running.household
        name = COORDINATOR if household.child(COORDINATOR).process.pid == pid else SECOND
        how(name)
        self.away.append(name)


@contextmanager
def two_coordinators(bench: Bench) -> Iterator[Pair]:
    """A second coordinator over the same database; nodes know both."""
    running, household = bench.running, bench.running.household
    second = make_second(running)
    start_second(running)
    tell_nodes(running, second)
    for site in running.sites:
        household.stop(site)
        running.start_node(site)
    with second_client(running) as client:
        client.wait_until_serving(timeout_s=PATIENCE_S, alive=household.check)
        bench.others.append(client)
        yield Pair(bench=bench)


def leader_killed(pair: Pair) -> Trouble:
    """SIGKILL of whichever drives the rounds; it comes back when the run is over."""
    bench, running = pair.bench, pair.bench.running

    def start_again() -> None:
        if pair.away.pop() == COORDINATOR:
            running.start_coordinator()
        else:
            start_second(running)
            wait_for_second(running, bench)

    return Trouble(
        fault="SIGKILL of the leading one of two; the other goes on",
        victim="leading coordinator",
        begin=lambda: pair.take(running.household.kill),
        end=lambda: None,
        lasts_s=0.0,
        after=start_again,
    )


def leader_stands_still(pair: Pair) -> Trouble:
    """SIGSTOP of whichever drives the rounds, until its lease is the other's; then it goes on where
    it stood, and must notice that it leads no more."""
    bench, household = pair.bench, pair.bench.running.household

    def wake() -> None:
        bench.wait(
            lambda: household.child(pair.away[0]).process.pid != leader(bench.url),
            words="the other coordinator takes the lease",
        )
        household.resume([pair.away.pop()])

    return Trouble(
        fault="SIGSTOP of the leading one of two until the other leads",
        victim="leading coordinator",
        begin=lambda: pair.take(lambda name: household.pause([name])),
        end=wake,
        lasts_s=0.0,
    )


def wait_for_second(running: Running, bench: Bench) -> None:
    """Wait until the second process answers."""
    bench.others[0].wait_until_serving(timeout_s=PATIENCE_S, alive=running.household.check)


def leader(url: str) -> int:
    """The process that drives the rounds, as the lease names it."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        row = connection.execute(sa.text("SELECT holder FROM leases WHERE name = 'rounds'")).one()
    return int(row.holder.split(":")[1])


# -- processes that stand still ----------------------------------------------------------------


def standstill(bench: Bench, victim: str) -> Trouble:
    """SIGSTOP for a while: connections stay open and nobody answers."""
    household = bench.running.household
    names = [COORDINATOR] if victim == COORDINATOR else [bench.running.sites[0]]

    def begin() -> None:
        household.pause(names)

    def hold() -> None:
        household.resume(names)

    return Trouble(
        fault="stands still for 6 s (SIGSTOP)",
        victim=victim,
        begin=begin,
        end=hold,
        lasts_s=6.0,
        still=() if victim == COORDINATOR else tuple(names),
    )


# -- the network -------------------------------------------------------------------------------


@contextmanager
def behind_relay(bench: Bench) -> Iterator[Relay]:
    """Every node reaches the coordinator through one relay."""
    running = bench.running
    config = load_coordinator(running.folder / COORDINATOR / "config.toml")
    relay = Relay(target=int(config.address.rpartition(":")[2]))
    relay.start()
    try:
        _dial(running, config.public_address, f"127.0.0.1:{relay.port}")
        yield relay
    finally:
        _dial(running, f"127.0.0.1:{relay.port}", config.public_address)
        relay.stop()


def _dial(running: Running, before: str, after: str) -> None:
    """Give every node another address, and start it again with that."""
    for site in running.sites:
        path = running.federation.node_folder(site) / "config.toml"
        path.write_text(path.read_text("utf-8").replace(before, after), "utf-8")
        if site in running.household:
            running.household.stop(site)
        running.start_node(site)


_WORDS: Final[dict[Weather, str]] = {
    "slow": "100 ms round trip, 100 Mb/s, for 5 s",
    "lossy": "100 ms, 100 Mb/s and 2 % of pieces sent again, for 5 s",
    "deaf": "half-open connections: nothing passes for 3 s, then only new ones",
    "away": "partition: connections cut and refused for 5 s",
}


def weather(relay: Relay, kind: Weather) -> Trouble:
    """Bad weather between the nodes and the coordinator."""
    return Trouble(
        fault=_WORDS[kind],
        victim="network",
        begin=lambda: relay.set(kind),
        end=lambda: relay.set("clear"),
        lasts_s=3.0 if kind == "deaf" else 5.0,
    )


def may_mount() -> bool:
    """Whether this machine lets us make a file system of our own."""
    return os.geteuid() == 0 and shutil.which("mount") is not None
