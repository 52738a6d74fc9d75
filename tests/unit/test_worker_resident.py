"""The life of a worker around a stand-in for its work: answers, leftovers, reasons to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from node_agent.resident import (
    Clock,
    Duty,
    JobCancelledError,
    JobFailedError,
    JobInterruptedError,
    Process,
    Pulse,
    Stop,
    live,
    locked,
    serve,
)
from node_agent.spool import (
    Job,
    Result,
    Spool,
    WorkerInfo,
    last_status,
    read_status,
    read_worker,
    request_cancel,
    request_drain,
    write_job,
)
from protocols.errors import NonFiniteUpdateError, StorageFullError, WorkerError
from tests.support.worker import ROOT, events

INFO = WorkerInfo(pid=1, ranks=1, backend="none", device="cpu", torch="none", started_at=1.0)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool").make()


def job(number: int) -> Job:
    return Job(
        id=f"run.{number}", run="run", round=number, plan="/p", manifest="/m", theta="/t",
        select="all", seed=1,
    )  # fmt: skip


def result(asked: Job) -> Result:
    return Result(
        id=asked.id, steps=1, tokens=1, records=1, loss_nats=1.0, seconds=1.0,
        delta_root="0" * 64, delta_coordinates=0, delta_norm=0.0, device="cpu",
    )  # fmt: skip


def ask(spool: Spool, *numbers: int) -> None:
    """Write jobs with rising file times, whatever the clock's grain."""
    for number in numbers:
        write_job(spool, job(number))
        when = 10**18 + number * 10**9
        os.utime(spool.job(f"run.{number}"), ns=(when, when))


def serve_once(spool: Spool, work, *, fatal=lambda _: False, stop: Stop | None = None) -> str:
    """Answer what is there, then leave at the first idle moment."""
    stop = Stop(spool) if stop is None else stop
    duty = Duty(info=INFO, work=work, fatal=fatal, idle=lambda: stop.tell("nothing to do"))
    return serve(spool, duty=duty, stop=stop, clock=Clock(sleep=lambda _: None))


def test_jobs_are_answered_in_the_order_they_were_asked(spool):
    ask(spool, 2, 10, 1)
    order = []

    def work(asked, _context):
        order.append(asked.round)
        return result(asked)

    serve_once(spool, work)

    assert order == [1, 2, 10]  # by file time, which `ask` sets by number; not by name
    assert events(read_status(spool, "run.2")) == ["started", "done"]
    last = last_status(spool, "run.2")
    assert (last.step, last.tokens, last.loss, last.tokens_per_s) == (1, 1, 1.0, 1.0)


def test_an_answered_job_is_not_done_again(spool):
    ask(spool, 1)
    done = []

    def work(asked, _context):
        done.append(asked.id)
        return result(asked)

    serve_once(spool, work)
    serve_once(spool, work)

    assert done == ["run.1"]


@pytest.mark.parametrize(
    ("error", "event", "code"),
    [
        (JobFailedError("data.empty", "no text"), "failed", "data.empty"),
        (NonFiniteUpdateError("NaN in w"), "failed", "non_finite"),
        (StorageFullError("no room"), "failed", "storage_full"),
        (ZeroDivisionError("a bug"), "failed", "worker.crashed"),
        (JobCancelledError(), "cancelled", None),
    ],
)
def test_what_cannot_be_done_is_answered_and_the_worker_goes_on(spool, error, event, code):
    ask(spool, 1, 2)

    def work(asked, _context):
        if asked.round == 1:
            raise error
        return result(asked)

    serve_once(spool, work)
    again = []
    serve_once(spool, lambda asked, _: again.append(asked))

    last = last_status(spool, "run.1")
    assert (last.event, last.code) == (event, code)
    assert not spool.result("run.1").exists()
    assert spool.result("run.2").exists()
    assert again == []  # nor is it tried for ever


def test_a_failed_job_runs_again_when_it_is_asked_for_again(spool):
    ask(spool, 1)
    serve_once(spool, lambda *_: (_ for _ in ()).throw(JobFailedError("data.empty", "no text")))

    ask(spool, 1)
    serve_once(spool, lambda asked, _: result(asked))

    assert spool.result("run.1").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\x00\xff", b"[]", b'{"schema":"minga.job/1"}'])
def test_garbage_is_answered_and_the_worker_goes_on(spool, content):
    ask(spool, 2)
    spool.job("run.1").write_bytes(content)

    serve_once(spool, lambda asked, _: result(asked))

    last = last_status(spool, "run.1")
    assert (last.event, last.code) == ("failed", "job.malformed")
    assert spool.result("run.2").exists()


def test_other_files_in_the_folder_are_not_jobs(spool):
    (spool.jobs / ".run.1.json.99.tmp").write_bytes(b"half")
    (spool.jobs / ".hidden.json").write_bytes(b"half")
    (spool.jobs / "notes.txt").write_bytes(b"x")

    serve_once(spool, lambda asked, _: result(asked))

    assert list((spool.root / "out").iterdir()) == []


def test_a_cancelled_job_is_not_begun(spool):
    ask(spool, 1)
    request_cancel(spool, "run.1")

    serve_once(spool, lambda asked, _: pytest.fail("begun"))

    assert events(read_status(spool, "run.1")) == ["cancelled"]


def test_an_interrupted_job_is_taken_up_by_the_next_worker(spool):
    ask(spool, 1)
    stop = Stop(spool)

    def work(_asked, context):
        stop.tell("SIGTERM")
        context.check()

    assert serve_once(spool, work, stop=stop) == "SIGTERM"
    assert events(read_status(spool, "run.1")) == ["started", "interrupted"]
    assert last_status(spool, "run.1").message == "SIGTERM"

    serve_once(spool, lambda asked, _: result(asked))
    assert spool.result("run.1").exists()


def test_a_job_whose_status_a_crash_tore_runs_again(spool):
    ask(spool, 1)
    spool.status("run.1").parent.mkdir()
    spool.status("run.1").write_bytes(b"\x00\x00\n")

    serve_once(spool, lambda asked, _: result(asked))

    assert spool.result("run.1").exists()


def test_an_error_that_leaves_the_process_in_doubt_ends_it(spool):
    ask(spool, 1)

    def work(*_):
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA"):
        serve_once(spool, work, fatal=lambda _: True)

    assert last_status(spool, "run.1").code == "worker.crashed"
    assert read_worker(spool) is None


def test_drain_ends_the_worker_between_jobs(spool):
    ask(spool, 1, 2)

    def work(asked, _context):
        request_drain(spool)
        return result(asked)

    assert serve_once(spool, work) == "drain"
    assert spool.result("run.1").exists()  # what was finished is answered, though drain was there
    assert not spool.result("run.2").exists()


def test_worker_json_is_there_exactly_while_it_serves(spool):
    ask(spool, 1)
    seen = []

    def work(asked, _context):
        seen.append(read_worker(spool))
        return result(asked)

    serve_once(spool, work)

    assert seen == [INFO]
    assert read_worker(spool) is None


def test_a_spool_has_one_worker(spool):
    clock = Clock(monotonic=iter((0.0, 5.0, 99.0)).__next__, sleep=lambda _: None)

    with (
        locked(spool, wait_s=0.0, clock=Clock()),
        pytest.raises(WorkerError, match="another worker serves"),
        locked(spool, wait_s=10.0, clock=clock),
    ):
        pytest.fail("two workers")
    with locked(spool, wait_s=0.0, clock=Clock()):
        pass  # free again


def test_a_killed_predecessors_worker_json_is_gone_before_the_new_one_is_ready(spool, monkeypatch):
    spool.worker.write_bytes(INFO.to_bytes())
    monkeypatch.setattr(Stop, "install", lambda self: None)  # the test keeps its own signals
    stop = Stop(spool)

    def begin():
        assert read_worker(spool) is None
        assert spool.alive.exists()  # shown during the long imports already
        stop.tell("enough")
        return Duty(info=INFO, work=lambda *_: pytest.fail("no job"))

    live(spool, begin=begin, stop=stop, clock=Clock(), lock_wait_s=0.0)

    assert not spool.alive.exists()


# -- processes -----------------------------------------------------------------------------------


def test_a_process_is_known_from_a_later_one_with_its_number():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = Process.of(child.pid)

    assert process.lives()
    assert not Process(child.pid, "12345").lives()  # same number, another start
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.lives()  # a zombie already counts as gone
    child.communicate()
    assert not process.lives()


def test_a_gone_agent_is_a_reason_to_stop(spool):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    alone = Stop(spool, watched=(Process.of(os.getpid()), Process.of(child.pid)))
    child.wait()

    assert alone.orphaned()
    assert not Stop(spool, watched=(Process.of(os.getpid()),)).orphaned()
    assert not Stop(spool).orphaned()


def test_the_pulse_beats_before_it_is_waited_for(spool):
    pulse = Pulse(Stop(spool), touch=spool.alive)
    pulse.start()

    assert spool.alive.exists()
    pulse.close()


def test_the_interruption_carries_its_reason():
    assert str(JobInterruptedError("drain")) == "drain"


@pytest.mark.parametrize(
    ("module", "kept_out"),
    [
        ("node_agent.spool", ("torch", "transformers", "flwr", "grpc", "sqlalchemy")),
        ("node_agent.resident", ("torch", "transformers", "flwr", "grpc", "sqlalchemy")),
        ("node_agent.worker.data", ("torch", "transformers", "flwr", "grpc", "sqlalchemy")),
        ("node_agent.worker.__main__", ("torch", "transformers", "flwr", "grpc", "sqlalchemy")),
        ("node_agent.flower_terms", ("torch", "transformers", "flwr", "grpc", "sqlalchemy")),
        ("node_agent.flower", ("torch", "transformers", "sqlalchemy", "coordinator")),
        (
            "node_agent.worker.start",
            ("peft", "opacus", "flwr", "grpc", "sqlalchemy", "coordinator"),
        ),
    ],
)
def test_each_part_imports_only_what_it_needs(module, kept_out):
    """The agent must stay free of torch, and a start-up must not pay for what is not used."""
    code = f"import {module}, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)

    loaded = set(found.stdout.decode().split())
    assert loaded.isdisjoint(kept_out)
    assert module in loaded
