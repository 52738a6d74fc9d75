"""A peer that cannot run is a skipped row; a peer that computes nonsense is not measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.peers import base
from tests.bench.peers.base import Job, Peer, SkippedError
from tests.bench.processes import Stage

PARAMS = 1000


class Fake(Peer):
    """A peer made of what a test gives it; its environment is taken as made."""

    name, system, requirements, note = "fake", "Fake 1.0", (), "made up"

    def __init__(self, act: Callable[[Job, Stage], None]) -> None:
        self._act = act

    def run(self, job: Job, stage: Stage) -> None:
        self._act(job, stage)


def measure(work: Path, act: Callable[[Job, Stage], None], *, timeout_s: float = 10.0):
    environment = work / "venv-fake"
    environment.mkdir()
    (environment / "minga-bench-requirements.txt").write_text("\n")
    return base.measure(Fake(act), params=PARAMS, rounds=2, timeout_s=timeout_s, work=work)


def honest(step: float = 1e-3) -> Callable[[Job, Stage], None]:
    """Events of three rounds that end at 10, 12 and 15 s."""

    def act(job: Job, stage: Stage) -> None:
        job.environment()
        events = [{"at": at, "event": "round_end"} for at in (10.0, 12.0, 15.0)]
        for number in range(3):
            for client, own in enumerate(base.STEPS):
                message = {"at": 9.0, "round": number, "bytes": 4 * PARAMS, "dtype": "float32"}
                start = number * step
                events += [
                    {**message, "event": "received", "low": start, "high": start},
                    {
                        **message,
                        "event": "sent",
                        "client": client,
                        "low": start + own,
                        "high": start + own,
                    },
                ]
        (job.events / "1.jsonl").write_text("\n".join(json.dumps(event) for event in events))

    return act


def test_rounds_are_timed_from_end_to_end_and_the_first_is_warm_up(tmp_path):
    row = measure(tmp_path, honest())

    assert row.skipped is None
    assert row.seconds_per_round.to_json() == {"min": 2.0, "median": 2.5, "max": 3.0}


def test_wrong_means_are_not_measured(tmp_path):
    row = measure(tmp_path, honest(step=2e-3))

    assert row.skipped.startswith("wrong values")
    assert row.seconds_per_round is None


def test_a_peer_that_fails_to_start_is_skipped_with_its_last_words(tmp_path):
    def act(job: Job, stage: Stage) -> None:
        code = "import sys; print('no such port'); sys.exit(3)"
        stage.run("server", [sys.executable, "-c", code], timeout_s=10)

    row = measure(tmp_path, act)

    assert row.skipped == "server ended with 3: no such port"


def test_an_environment_that_cannot_be_made_is_a_reason_to_skip(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise SkippedError("installation failed: ERROR: no network")

    monkeypatch.setattr(base, "ensure_environment", refused)

    assert measure(tmp_path, honest()).skipped == "installation failed: ERROR: no network"


def test_a_peer_out_of_time_is_ended_with_its_grandchildren_and_nobody_else(tmp_path):
    """The child starts a grandchild in a session of its own and ends; both kinds must be found."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started: list[int] = []

    def act(job: Job, stage: Stage) -> None:
        job.environment()
        code = (
            "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
            "'import time; time.sleep(60)'], start_new_session=True)"
        )
        stage.start("parent", [sys.executable, "-c", code], role="server").wait()
        until = time.monotonic() + 10
        while not stage.mine() and time.monotonic() < until:
            time.sleep(0.05)
        started.extend(stage.mine())
        base.wait_for_rounds(job, stage, {})

    try:
        row = measure(tmp_path, act, timeout_s=0.2)

        assert row.skipped == "only 0 of 3 rounds within 0 s"
        assert len(started) == 1  # else nothing was tested
        assert not Path(f"/proc/{started[0]}").exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_memory_is_summed_over_a_role(tmp_path):
    """Two servers of 60 MB or more each; a client does not count."""
    code = "import time; held = b'x' * 60_000_000; print('held', flush=True); time.sleep(60)"
    with Stage(folder=tmp_path / "logs") as stage:
        for name, role in (("a", "server"), ("b", "server"), ("c", "client")):
            stage.start(name, [sys.executable, "-c", code], role=role)
        until = time.monotonic() + 20
        while (stage.peak_rss_mb("server") or 0) < 120 and time.monotonic() < until:
            time.sleep(0.05)

        assert 120 <= stage.peak_rss_mb("server") < 160
        assert stage.peak_rss_mb("nobody") is None


def test_the_token_is_not_in_our_own_environment():
    """Else a stage would take the test run itself for one of its processes and end it."""
    assert "MINGA_BENCH_TOKEN" not in os.environ


@pytest.mark.parametrize("words", ["short", "x" * 500])
def test_reasons_fit_on_a_line(words):
    assert len(base.one_line(ValueError(words + "\nmore"))) <= 200
    assert "\n" not in base.one_line(ValueError(words + "\nmore"))
