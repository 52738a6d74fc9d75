"""A member attacks with all it has while the others train: they finish, with the same result.

Real processes, mutual TLS, a round log with witnesses; the limits are the default ones, but for a
rate that also a slow machine reaches. The attacker has a certificate of the federation. What the
coordinator needs of memory, and how long the rounds take, is measured beside a run without the
attacker; the digests of both runs are the same.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.config import load_config
from infra.demo.federation import Federation, free_ports
from infra.demo.processes import Household
from protocols.identifiers import RunId
from tests.support import attacker
from tests.support.federation import COORDINATOR, PATIENCE_S, Running, results

SITES = ("node-1", "node-2", "node-3")
MALLORY = "mallory"
ROUNDS = 2
COORDINATES = 600_000
MB = 1e6
LIMITS = "\n[limits]\ncalls_per_s = 10.0\ncalls_burst = 1500.0\n"
JOINS = 4000  # at least so many: beyond the limits wherever 17 of them take less than a second
# What the attacker may cost beyond the peak of the quiet run. Its calls under way are 64 of one
# identity, their messages 6 MiB; its connections some hundred, their windows small.
ALLOWED_MB = 400.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Sampled:
    """Memory, files and threads of a process while it is watched."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.rss_mb = self.files = self.threads = 0.0
        self._cpu = self._time = 0.0

    def __enter__(self) -> Sampled:
        self._cpu, self._time = self._seconds(), time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu = (self._seconds() - self._cpu) / (time.monotonic() - self._time)
        self._done.set()
        self._thread.join()

    def _seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.rss_mb = max(self.rss_mb, self._process.memory_info().rss / MB)
            self.files = max(self.files, self._process.num_fds())
            self.threads = max(self.threads, self._process.num_threads())

    def to_json(self) -> dict[str, float]:
        """Figures for people."""
        return {
            "peak_rss_mb": round(self.rss_mb, 1),
            "files": self.files,
            "threads": self.threads,
            "cores": round(self.cpu, 2),
        }


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Iterator[tuple[Running, str]]:
    folder = tmp_path_factory.mktemp("hostile") / "federation"
    folder.mkdir()
    with Household(folder) as household:
        parts = Federation(folder=folder, household=household)
        parts.initialise(name="test", log=True)
        (port,) = free_ports(1)
        config = folder / "coordinator/config.toml"
        text = config.read_text().replace("[log]", f'[log]\nhttp = "127.0.0.1:{port}"')
        config.write_text(text + LIMITS)
        parts.start_coordinator()
        with parts.client() as client:
            parts.wait_until_serving(client)
            for site in (*SITES, MALLORY):
                parts.join(site, client.invite(site))
            for site in SITES:
                parts.start_node(site)
            yield Running(federation=parts, client=client, sites=SITES), f"127.0.0.1:{port}"


@contextmanager
def attacking(running: Running, http: str) -> Iterator[dict[str, Any]]:
    """The attacker at work; afterwards what it was answered."""
    folder = running.folder / "attack"
    folder.mkdir()
    serving = running.federation.folder / COORDINATOR / "config.toml"
    config = load_config(serving)
    files = {name: str(folder / name) for name in ("stop", "ready", "out")}
    job = {
        "address": config.address,
        "enrolment": config.enrolment_address,
        "http": http,
        "keys": str(running.federation.node_folder(MALLORY) / "keys"),
        "least": JOINS,
        **files,
    }
    (folder / "job.json").write_text(json.dumps(job))
    household, counts = running.household, {}
    command = [sys.executable, attacker.__file__, str(folder / "job.json")]
    household.start("attacker", command, log=folder / "log", passing=True)
    try:
        wait_for(Path(files["ready"]).exists, household)
        yield counts
    finally:
        Path(files["stop"]).touch()
        household.finish("attacker", timeout_s=PATIENCE_S)
    counts.update(json.loads(Path(files["out"]).read_text()))


def wait_for(condition, household: Household) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        household.check()
        assert time.monotonic() < until
        time.sleep(0.1)


def play(running: Running, run: str, rounds: int = ROUNDS) -> tuple[Any, float, Sampled]:
    """A run to its end: results, seconds, and the coordinator meanwhile."""
    with Sampled(running.household.child(COORDINATOR).popen.pid) as sampled:
        begun = time.monotonic()
        name = running.submit(run, rounds=rounds, coordinates=COORDINATES)
        report = running.confirmed(RunId(name), timeout_s=4 * PATIENCE_S)
        return results(report), time.monotonic() - begun, sampled


def reached(counts: dict[str, dict[str, int]], name: str, *answers: str) -> int:
    """How often an attack met one of these answers."""
    return sum(counts[name].get(answer, 0) for answer in answers)


def test_honest_nodes_finish_while_a_member_attacks(federation):
    running, http_address = federation
    quiet, seconds, before = play(running, "quiet")
    with attacking(running, http_address) as counts:
        attacked, under_attack, during = play(running, "attacked")
        host, _, port = http_address.rpartition(":")
    figures = {
        "quiet": {"seconds": round(seconds, 2), **before.to_json()},
        "attacked": {"seconds": round(under_attack, 2), **during.to_json()},
        "counts": counts,
    }
    print(json.dumps(figures))
    if out := os.environ.get("MINGA_FIGURES"):
        Path(out).write_text(json.dumps(figures, indent=1))

    assert len(quiet) == ROUNDS
    assert attacked == quiet  # every node once, every digest the same
    # the attacks happened, and were answered as they should be
    assert reached(counts, "joins", "RESOURCE_EXHAUSTED") > 100
    assert reached(counts, "packed", "UNIMPLEMENTED") > 0
    assert reached(counts, "large", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT") > 0
    assert reached(counts, "invitations", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT") > 0
    for name, answers in counts.items():
        assert not answers.keys() & {"INTERNAL", "UNKNOWN", "OK"}, name
    # memory is bounded, and the door is open afterwards
    assert during.rss_mb < before.rss_mb + ALLOWED_MB
    again, _, after = play(running, "afterwards", rounds=1)
    assert again == quiet[:1]
    assert after.rss_mb < before.rss_mb + ALLOWED_MB
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)
    connection.request("GET", "/log/checkpoint")
    assert connection.getresponse().status == 200
    connection.close()
