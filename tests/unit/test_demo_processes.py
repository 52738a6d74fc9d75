"""The household of a demonstration: whatever happens, nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.demo.processes import (
    ChildDiedError,
    Household,
    Process,
    alive,
    descendants,
    end,
    send,
    tail,
)

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# A child with a child of its own, which ignores SIGTERM and lives in another session.
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
PARENT = (
    "import subprocess, sys, time\n"
    f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)\n"
    "print('started', flush=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def household(tmp_path):
    with Household(tmp_path) as made:
        yield made


def wait_for(condition, *, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def with_grandchild(household: Household, log: Path) -> frozenset[Process]:
    """Start a child that starts a stubborn one; both processes."""
    child = household.start("parent", [sys.executable, "-c", PARENT], log=log)
    wait_for(lambda: log.read_text() == "started\n" and descendants(child.process.pid))
    household.check()
    assert len(child.everybody) == 2
    return child.everybody


def test_leaving_stops_a_stubborn_grandchild_too(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.demo.processes._GRACE_S", 0.2)
    with Household(tmp_path) as household:
        everybody = with_grandchild(household, tmp_path / "log")
        assert alive(everybody) == everybody

    assert alive(everybody) == frozenset()
    assert not (tmp_path / "processes.json").exists()


def test_leaving_by_an_error_stops_everybody(tmp_path):
    started = []

    def interrupted() -> None:
        with Household(tmp_path) as household:
            started.append(household.start("sleeper", SLEEP, log=tmp_path / "log").process)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert len(started) == 1
    assert alive(started) == frozenset()


IMPATIENT = """
import pathlib, signal, sys, time
from infra.demo.processes import Household
folder = pathlib.Path(sys.argv[1])
stubborn = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print(1, flush=True); time.sleep(600)"
)
with Household(folder) as household:
    child = household.start("stubborn", [sys.executable, "-c", stubborn], log=folder / "log")
    while not (folder / "log").read_text():
        time.sleep(0.02)
    print(child.process.pid, child.process.started, flush=True)
    time.sleep(600)
"""


def test_a_second_ctrl_c_leaves_nobody_behind(tmp_path):
    """The child does not hear SIGTERM, so stopping takes its ten seconds of grace."""
    demo = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pid, started = demo.stdout.readline().split()
    child = Process(int(pid), started)
    assert alive([child]) == {child}

    demo.send_signal(signal.SIGINT)
    time.sleep(0.5)
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=180)

    assert alive([child]) == frozenset()


def test_a_kill_takes_the_family_along(household, tmp_path):
    everybody = with_grandchild(household, tmp_path / "log")

    killed = household.kill("parent")

    assert killed == everybody
    assert alive(everybody) == frozenset()
    assert "parent" not in household


def test_an_orphan_that_was_seen_once_is_stopped_at_the_end(tmp_path, monkeypatch):
    """The parent dies by itself: its child belongs to nobody now, but it was remembered."""
    monkeypatch.setattr("infra.demo.processes._GRACE_S", 0.2)
    with Household(tmp_path) as household:
        everybody = with_grandchild(household, tmp_path / "log")
        send(signal.SIGKILL, [household.child("parent").process])
        wait_for(lambda: household.child("parent").popen.poll() is not None)
        (orphan,) = alive(everybody)
        with pytest.raises(ChildDiedError):
            household.check()

    assert alive([orphan]) == frozenset()


def test_a_death_is_reported_with_the_end_of_the_log(household, tmp_path):
    code = "import sys; print('the last words'); sys.exit(7)"
    child = household.start("fragile", [sys.executable, "-c", code], log=tmp_path / "log")
    wait_for(lambda: child.popen.poll() is not None)

    with pytest.raises(ChildDiedError) as error:
        household.check()

    assert "fragile ended with status 7" in str(error.value)
    assert "the last words" in str(error.value)


def test_a_signal_is_named(household, tmp_path):
    child = household.start("victim", SLEEP, log=tmp_path / "log")
    send(signal.SIGKILL, [child.process])
    wait_for(lambda: child.popen.poll() is not None)

    with pytest.raises(ChildDiedError, match="victim ended by SIGKILL"):
        household.check()


def test_run_waits_and_tells_a_failure(household, tmp_path):
    household.run("fine", [sys.executable, "-c", "print('x')"], log=tmp_path / "fine")
    assert (tmp_path / "fine").read_text() == "x\n"

    with pytest.raises(ChildDiedError, match="broken ended with status 3"):
        household.run(
            "broken", [sys.executable, "-c", "raise SystemExit(3)"], log=tmp_path / "broken"
        )
    with pytest.raises(ChildDiedError, match="slow did not end within"):
        household.run("slow", SLEEP, log=tmp_path / "slow", timeout_s=0.2)
    assert "slow" not in household


def test_what_is_said_goes_in_by_standard_input(household, tmp_path):
    """A token among the arguments could be read by every user of the machine."""
    code = "import sys; print(len(sys.stdin.read()), len(sys.argv))"

    household.run("reader", [sys.executable, "-c", code], log=tmp_path / "log", said=b"secret\n")

    assert (tmp_path / "log").read_text() == "7 1\n"


def test_a_paused_child_stands_still_and_can_be_stopped(household, tmp_path):
    child = household.start("ticker", SLEEP, log=tmp_path / "log")
    household.pause(["ticker"])
    wait_for(lambda: Path(f"/proc/{child.process.pid}/stat").read_text().split()[2] == "T")

    household.stop("ticker", grace_s=5)

    assert alive([child.process]) == frozenset()
    assert child.popen.returncode == -signal.SIGTERM  # it heard the polite signal


def test_a_reused_number_is_never_signalled():
    """Same pid, other start time: somebody else's process."""
    other = subprocess.Popen(SLEEP)
    try:
        stranger = Process(other.pid, "another start time")

        send(signal.SIGKILL, [stranger])
        end([stranger], grace_s=0.1)

        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_leftovers_of_a_crashed_demonstration_are_ended(tmp_path):
    first = Household(tmp_path)
    child = first.start("left", SLEEP, log=tmp_path / "log")
    # `first` is forgotten without being closed, as by SIGKILL.

    assert Household(tmp_path).end_leftovers() == 1

    assert alive([child.process]) == frozenset()
    child.popen.wait()
    assert Household(tmp_path).end_leftovers() == 0


def test_two_children_of_one_name_are_a_mistake(household, tmp_path):
    household.start("one", SLEEP, log=tmp_path / "log")

    with pytest.raises(ValueError, match="runs already"):
        household.start("one", SLEEP, log=tmp_path / "log")


def test_the_household_itself_is_not_in_its_children_session(household, tmp_path):
    child = household.start("apart", SLEEP, log=tmp_path / "log")

    assert os.getsid(child.process.pid) == child.process.pid != os.getsid(0)


def test_the_end_of_a_log_is_short(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {number}" for number in range(100)))

    assert tail(log, 2) == "    line 98\n    line 99"
    assert tail(tmp_path / "nowhere") == "    (nothing)"
