"""``python -m tests.bench.load``: what a coordinator needs in the long run, and for many who ask.

``soak``: 33 nodes play two hundred short rounds with a round log; memory, open files, ledger and
log are sampled, and a straight line says what a round adds. ``pollers``: a thousand nodes
that ask. ``attack``: the figures of ``tests/faults/test_hostile_peer.py``. Figures go to
``bench/load.json``; memory that is not flat ends with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from cryptography.hazmat.primitives import serialization

from coordinator.ca import CertificateAuthority, certificate_pem, key_pem, new_tls_key
from coordinator.clock import SystemClock
from coordinator.config import load_config
from coordinator.ledger import Ledger, Tx
from protocols.crypto.identity import Identity, spki_digest
from protocols.identifiers import NodeId
from tests.bench.__main__ import machine
from tests.bench.federation import RUN, Federation, Job
from tests.bench.ours import institutions
from tests.bench.page import BENCH, FIGURES, PAGE, figures, load, render
from tests.bench.processes import Stage

MB = 1e6
OUT = BENCH / "load.json"
FLAT_MB = 10.0  # growth over a hundred rounds that still counts as flat: noise of an allocator
WARM = 0.25  # of the rounds, before which caches still fill


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the coordinator."""

    at: float  # seconds since 1970
    rss_mb: float
    files: int
    threads: int
    cpu_s: float
    ledger_mb: float
    log_mb: float


@dataclass
class Watch:
    """Looks at a process and at its folders, about every second."""

    pid: int
    folder: Path
    every_s: float = 1.0
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._process = psutil.Process(self.pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(self.every_s):
            try:
                with self._process.oneshot():
                    times = self._process.cpu_times()
                    self.samples.append(
                        Sample(
                            at=time.time(),
                            rss_mb=self._process.memory_info().rss / MB,
                            files=self._process.num_fds(),
                            threads=self._process.num_threads(),
                            cpu_s=times.user + times.system,
                            ledger_mb=_size(self.folder / "coordinator", "ledger.sqlite*"),
                            log_mb=_size(self.folder / "log", "**/*"),
                        )
                    )
            except psutil.Error:
                return

    def between(self, begun: float, ended: float) -> list[Sample]:
        """The samples of a stretch of time."""
        return [sample for sample in self.samples if begun <= sample.at <= ended]


def _size(folder: Path, pattern: str) -> float:
    total = 0
    for path in folder.glob(pattern):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # renamed meanwhile
    return total / MB


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line of least squares through points (x, y): y per x."""
    n = len(points)
    if n < 2:
        raise ValueError("a line needs two points")
    mean_x, mean_y = (sum(axis) / n for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        raise ValueError("the points lie above each other")
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def at_round(sample: Sample, opened: Sequence[float]) -> float:
    """How many rounds had been opened when a sample was taken, with the part of the last."""
    done = sum(1 for moment in opened if moment <= sample.at)
    if done == 0 or done == len(opened):
        return float(done)
    begun, ended = opened[done - 1], opened[done]
    return done + (sample.at - begun) / (ended - begun)


def row(what: str, ours: str, *, target: str = "", met: bool | None = None, note: str = "") -> Any:
    """One line of the page."""
    return {
        "what": what, "ours": ours, "beside": "", "other": "", "ratio": None,
        "target": target, "met": met, "note": note,
    }  # fmt: skip


# -- many rounds ---------------------------------------------------------------------------------


def soak(*, nodes: int, rounds: int, params: int, work: Path | None) -> list[Any]:
    """Short rounds of light nodes with a round log; what each adds."""
    watch, opened = play_soak(nodes=nodes, rounds=rounds, params=params, work=work)
    return soak_rows(watch, opened, nodes=nodes, params=params)


def play_soak(
    *, nodes: int, rounds: int, params: int, work: Path | None
) -> tuple[Watch, list[float]]:
    """The samples of a soak, and the moments at which its rounds were opened."""
    with (
        tempfile.TemporaryDirectory(prefix="minga-soak-", dir=work) as temporary,
        Stage(folder=Path(temporary) / "logs") as stage,
    ):
        federation = Federation(Path(temporary) / "federation", stage)
        process = federation.start_coordinator(log=True)
        names = institutions(nodes)
        folder = federation.folder / "light"
        folder.mkdir()
        job = {
            "folder": str(folder), "address": federation.address,
            "enrolment": federation.enrolment, "run": RUN,
            "invitations": federation.invitations(names),
        }  # fmt: skip
        players = _start(stage, "tests.bench.signing_nodes", folder, job)
        until = time.monotonic() + 180
        while not (folder / "enrolled").exists():
            if players.poll() is not None or time.monotonic() > until:
                raise ChildProcessError(stage.tail("tests.bench.signing_nodes"))
            time.sleep(0.2)
        played = Job(params=params, nodes=nodes, rounds=rounds - 2, timeout_s=30.0 * rounds)
        with Watch(process.pid, federation.folder) as watch:
            federation.submit(played, names)
            facts = federation.wait_until_done(played, {"coordinator": process}, ends=players)
    return watch, [entry.times[0].entered_at_ms / 1000 for entry in facts.rounds]


def soak_rows(watch: Watch, opened: Sequence[float], *, nodes: int, params: int) -> list[Any]:
    """The lines of a soak, from its samples and the moments at which rounds were opened."""
    rounds = len(opened)
    seconds = sorted(b - a for a, b in itertools.pairwise(opened))
    settled = [
        (at_round(sample, opened), sample)
        for sample in watch.between(opened[0], opened[-1])
        if at_round(sample, opened) >= WARM * rounds
    ]

    def grows(measure: Callable[[Sample], float]) -> float:
        return slope([(number, measure(sample)) for number, sample in settled])

    first, last = settled[0][1], settled[-1][1]
    growth = 100 * grows(lambda s: s.rss_mb)
    what = f"soak, {nodes} nodes, {rounds} rounds of {params} parameters"
    peak = max(sample.rss_mb for _, sample in settled)
    files = max(sample.files for _, sample in settled)
    cpu = (last.cpu_s - first.cpu_s) / (last.at - first.at)
    drift = grows(lambda s: float(s.files))
    return [
        row(f"{what}: seconds of a round", f"{seconds[len(seconds) // 2]:.2f} s",
            note=f"{seconds[0]:.2f} to {seconds[-1]:.2f}; the coordinator used {cpu:.2f} cores"),
        row(f"{what}: memory added by 100 rounds", f"{growth:.1f} MB",
            target=f"at most {FLAT_MB:g} MB", met=growth <= FLAT_MB,
            note=f"{first.rss_mb:.0f} MB after a quarter of them, {last.rss_mb:.0f} MB at the end,"
                 f" peak {peak:.0f} MB"),
        row(f"{what}: open files at most", str(files), target="does not grow",
            met=100 * drift < nodes, note=f"{100 * drift:+.1f} over 100 rounds"),
        row(f"{what}: ledger added by a round", f"{1000 * grows(lambda s: s.ledger_mb):.0f} kB",
            note=f"SQLite with its journal; {last.ledger_mb:.1f} MB at the end"),
        row(f"{what}: log added by a round", f"{1000 * grows(lambda s: s.log_mb):.0f} kB",
            note=f"tiles, bundles and checkpoints; {last.log_mb:.1f} MB at the end"),
    ]  # fmt: skip


def _start(stage: Stage, module: str, folder: Path, job: dict[str, Any]) -> subprocess.Popen[bytes]:
    path = folder / "job.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(job))
    return stage.start(module, [sys.executable, "-m", module, str(path)], role="client")


# -- many who ask --------------------------------------------------------------------------------


async def enrol_many(folder: Path, names: list[str]) -> list[tuple[str, str]]:
    """Enter nodes in the ledger of a coordinator that does not serve; keys and certificates."""
    config = load_config(folder / "coordinator" / "config.toml")
    authority = CertificateAuthority.load(config.federation, config.keys)
    now, found = datetime.now(UTC), []
    async with Ledger(config.ledger_url, clock=SystemClock()) as ledger:

        def enter(tx: Tx) -> None:
            for number, name in enumerate(names):
                key = new_tls_key()
                certificate = authority.issue(
                    key.public_key(), Identity("node", name), now=now, lifetime=timedelta(days=1)
                )
                tx.add_node(NodeId(name), number.to_bytes(32, "big"), now)
                tx.add_certificate(
                    serial=certificate.serial_number,
                    spki_sha256=spki_digest(certificate),
                    subject_role="node",
                    subject_name=name,
                    not_after=certificate.not_valid_after_utc,
                    der=certificate.public_bytes(serialization.Encoding.DER),
                )
                found.append((key_pem(key).decode(), certificate_pem(certificate).decode()))

        await ledger.run("enrol_many", enter)
    return found


def pollers(*, nodes: int, per_s: float, seconds: float, work: Path | None) -> list[Any]:
    """A thousand nodes: waiting for news, asking at a pace, and asking without rest."""
    with (
        tempfile.TemporaryDirectory(prefix="minga-poll-", dir=work) as temporary,
        Stage(folder=Path(temporary) / "logs") as stage,
    ):
        federation = Federation(Path(temporary) / "federation", stage)
        names = [f"n-{number:04d}" for number in range(nodes)]
        process, identities = federation.start_after(
            lambda folder: asyncio.run(enrol_many(folder, names))
        )
        folder = federation.folder / "pollers"
        folder.mkdir()
        job = {
            "address": federation.address, "identities": identities, "per_s": per_s,
            "root": str(federation.folder / "coordinator/keys/ca.crt"), "seconds": seconds,
            "at_once": 32, "out": str(folder / "out.json"),
        }  # fmt: skip
        with Watch(process.pid, federation.folder, every_s=0.25) as watch:
            asking = _start(stage, "tests.bench.pollers", folder, job)
            if asking.wait(timeout=600) != 0:
                raise ChildProcessError(stage.tail("tests.bench.pollers"))
        marks = {part["name"]: part for part in json.loads((folder / "out.json").read_text())}
    return poll_rows(watch, marks, nodes=nodes)


def poll_rows(watch: Watch, marks: dict[str, Any], *, nodes: int) -> list[Any]:
    """The lines of the pollers."""

    def cores(part: str) -> str:
        seen = watch.between(marks[part]["from"], marks[part]["to"])
        used = (seen[-1].cpu_s - seen[0].cpu_s) / (seen[-1].at - seen[0].at)
        return f"{used:.2f} cores of the coordinator"

    peak = max(sample.rss_mb for sample in watch.samples)
    files = max(sample.files for sample in watch.samples)
    found = [
        row(f"{nodes} nodes waiting for news", cores("waiting"),
            note=f"memory {peak:.0f} MB at most, {files} open files")
    ]  # fmt: skip
    for name, words in (("paced", "asking at a pace"), ("closed", "32 of them asking at once")):
        part = marks[name]
        found.append(
            row(
                f"{nodes} nodes, {words}",
                f"{part['per_s']:.0f} requests/s, p50 {part['p50_ms']:.1f} ms,"
                f" p99 {part['p99_ms']:.1f} ms",
                note=f"{cores(name)}; client on the same machine",
            )
        )
    return found


# -- a member that attacks -----------------------------------------------------------------------


def attack() -> list[Any]:
    """The test of the hostile peer, for its figures."""
    with tempfile.TemporaryDirectory(prefix="minga-attack-") as folder:
        path = Path(folder) / "figures.json"
        test = "tests/faults/test_hostile_peer.py"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
            env={**os.environ, "MINGA_FIGURES": str(path)},
            cwd=BENCH.parent,
            check=True,
        )
        return attack_rows(json.loads(path.read_text()))


def attack_rows(found: dict[str, Any]) -> list[Any]:
    """The lines of the attack."""
    quiet, under = found["quiet"], found["attacked"]
    calls = sum(sum(answers.values()) for answers in found["counts"].values())
    joins = sum(found["counts"]["joins"].values())
    return [
        row("2 rounds of 3 nodes while a member attacks", f"{under['seconds']:.1f} s",
            target="they finish, same digests", met=True,
            note=f"{quiet['seconds']:.1f} s without it; the attacker runs on the same two cores"),
        row("coordinator's memory while a member attacks", f"{under['peak_rss_mb']:.0f} MB",
            target="at most 400 MB more than without", met=True,
            note=f"{quiet['peak_rss_mb']:.0f} MB without; {calls} calls and connections of the"
                 f" attacker, {joins} of them joins, {under['files']:.0f} open files"),
    ]  # fmt: skip


PARTS = ("soak", "pollers", "attack")


def about(measured: dict[str, dict[str, Any]]) -> str:
    """What the page says above the lines: when each part was measured, and how busy the cores were.

    With ``--only`` the lines of the other parts stay, and those are of another day.

    Args:
        measured: the machine as it was before each part.
    """
    said = "; ".join(
        f"{part} on {on['date']} at commit {on['commit']}, load {on['load_1min']:g} before it"
        for part in PARTS
        if (on := measured.get(part)) is not None
    )
    return (
        "A coordinator in the long run, for many who ask, and while a member attacks, the clients"
        f" on the same cores. Measured: {said}."
    )


def main() -> int:
    """Measure, keep, and say whether memory is flat."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=33)
    parser.add_argument("--params", type=int, default=20_000)
    parser.add_argument("--pollers", type=int, default=1000)
    parser.add_argument("--per-s", type=float, default=300.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {"parts": {}}
    found_on = machine()
    for part in options.only or PARTS:
        if part == "soak":
            rows = soak(
                nodes=options.nodes, rounds=options.rounds, params=options.params,
                work=options.scratch,
            )  # fmt: skip
        elif part == "pollers":
            rows = pollers(
                nodes=options.pollers, per_s=options.per_s, seconds=options.seconds,
                work=options.scratch,
            )  # fmt: skip
        else:
            rows = attack()
        kept["parts"][part] = rows
        kept.setdefault("measured", {})[part] = found_on
        for line in rows:
            print(f"{line['what']}: {line['ours']}  {line['note']}")
    lines = [line for part in PARTS for line in kept["parts"].get(part, [])]
    facts = {
        "schema": FIGURES, "title": "Load", "repeat": "make load", "machine": found_on,
        "text": about(kept["measured"]),
        "rows": lines, "parts": kept["parts"], "measured": kept["measured"],
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    if options.out == OUT:
        PAGE.write_text(render(load(), figures()))
    broken = [line["what"] for line in lines if line["met"] is False]
    for what in broken:
        print(f"MISSED: {what} (memory is not flat, or files are not given back)", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
