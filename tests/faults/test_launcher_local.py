"""The worker dies, hangs, writes garbage: the launcher says so in one sentence and goes on.

The worker is a real process that speaks the spool's contract; what is injected is shown to have
happened by its list of starts.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from node_agent.client import Backoff
from node_agent.config import FlowerConfig, WorkerConfig
from node_agent.decide import Work
from node_agent.launchers.jobs import GIVE_UP
from node_agent.launchers.local import (
    Health,
    LocalLauncher,
    check_started,
    flower_command,
    verdict,
    worker_command,
    worker_environment,
)
from node_agent.launchers.processes import end_family, family, remember, remembered
from node_agent.resident import Process
from node_agent.spool import DataPaths, Job, Spool, last_status, read_result, read_status
from node_agent.worker.init_model import write_model
from protocols.errors import FederationError, WorkerError
from protocols.identifiers import RunId
from tests.support.node import rng
from tests.support.plans import MANIFEST
from tests.support.worker import TINY, Site, make_plan

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0  # a busy machine; nothing waits for it when all goes well


class Bench:
    """A launcher over a spool, and a job."""

    def __init__(self, root: Path, *behaviours: str, **changes) -> None:
        self.spool = Spool(root / "spool").make()
        (self.spool.root / "behave").write_text("\n".join(behaviours))
        (root / "manifest.json").write_bytes(MANIFEST.to_bytes())
        np.zeros(MANIFEST.coordinates, "<f4").tofile(root / "theta.f32")
        (root / "plan.json").write_bytes(b"{}")
        self.job = Job(
            id="r1.0",
            run="r1",
            round=0,
            plan=str(root / "plan.json"),
            manifest=str(root / "manifest.json"),
            theta=str(root / "theta.f32"),
            select="all",
            data=DataPaths(),
            seed=1,
        )
        values = {
            "spool": self.spool,
            "command": self.command,
            "environment": {**os.environ, "PYTHONPATH": str(ROOT)},
            "start_within_s": 30.0,
            "hangs_after_s": 30.0,
            "rng": rng(),
            "backoff": Backoff(first_s=0.01, cap_s=0.02),
        }
        self.launcher = LocalLauncher(**values | changes)

    def command(self) -> list[str]:
        arguments = ["--spool", str(self.spool.root), "--exit-with-parent"]
        return [
            sys.executable, "-m", "tests.support.fake_worker",
            *arguments, "--parent-pid", str(os.getpid()),
        ]  # fmt: skip

    def starts(self) -> list[int]:
        """Process ids of all workers that were started."""
        path = self.spool.root / "starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def until(self, condition, *, submit: bool = True) -> Work:
        """Tick until ``condition(work)`` holds; the child is ended either way."""

        async def drive() -> Work:
            if submit:
                self.launcher.submit(self.job)
            give_up = time.monotonic() + PATIENCE_S
            try:
                while time.monotonic() < give_up:
                    await self.launcher.tick()
                    work = self.launcher.work(self.job.id)
                    if condition(work):
                        return work
                    await asyncio.sleep(0.02)
                raise AssertionError(f"did not get there: {work}, {self.launcher.state}")
            finally:
                await self.launcher.close()

        return asyncio.run(drive())


def finished(work: Work) -> bool:
    return work.state in ("finished", "failed")


def gone(pid: int) -> bool:
    return not Process.of(pid).lives()


def test_a_job_is_done_by_a_resident_child(tmp_path):
    bench = Bench(tmp_path)
    (bench.spool.root / "steps").write_text("40")
    seen = []

    work = bench.until(lambda w: seen.append(w) or finished(w))

    assert work.state == "finished"
    assert read_result(bench.spool, bench.job, MANIFEST).steps == 2
    assert {w.max_steps for w in seen if w.step} == {40}  # progress was seen on the way
    assert len(bench.starts()) == 1
    assert gone(bench.starts()[0])


def test_an_idle_worker_is_not_started(tmp_path):
    bench = Bench(tmp_path)

    async def ticks():
        for _ in range(3):
            await bench.launcher.tick()

    asyncio.run(ticks())
    assert bench.starts() == []
    assert bench.launcher.state == "asleep"


def test_two_callers_start_one_worker(tmp_path):
    """The reconcile loop and the action that hands in a job may look at the same time."""
    bench = Bench(tmp_path, "slow")

    async def together():
        bench.launcher.submit(bench.job)
        await asyncio.gather(*(bench.launcher.tick() for _ in range(5)))
        give_up = time.monotonic() + PATIENCE_S
        while not bench.starts() and time.monotonic() < give_up:  # noqa: ASYNC110 - another process writes the file
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)  # time for a second one to show itself
        await bench.launcher.close()

    asyncio.run(together())
    assert len(bench.starts()) == 1


def test_a_dead_worker_is_started_again_and_the_job_goes_on(tmp_path):
    bench = Bench(tmp_path, "die", "die", "well")

    assert bench.until(finished).state == "finished"
    assert len(bench.starts()) == 3


def test_a_job_under_which_the_worker_keeps_dying_is_given_up(tmp_path):
    bench = Bench(tmp_path, *["die"] * (GIVE_UP + 2))

    work = bench.until(finished)

    assert work.state == "failed"
    assert work.refusal.rule == "worker.lost"
    assert "status 7: Segmentation fault in a kernel" in work.refusal.reason
    assert "\n" not in work.refusal.reason
    assert len(bench.starts()) == GIVE_UP


def test_a_stillborn_worker_is_given_up_with_its_last_words(tmp_path):
    bench = Bench(tmp_path, *["stillborn"] * GIVE_UP)

    work = bench.until(finished)

    assert "status 9: ImportError: libcuda.so.1" in work.refusal.reason


def test_a_silent_worker_is_not_given_the_last_words_of_the_one_before(tmp_path):
    bench = Bench(tmp_path, "die", "mute")

    def given_up(_work: Work) -> bool:
        if len(bench.starts()) > 1:  # the first one had all the time that it needed
            bench.launcher.start_within_s = 1.0
        return "was not ready" in bench.launcher._last_reason

    bench.until(given_up)

    assert bench.launcher._last_reason == "the worker was not ready after 1 s"
    assert "Segmentation fault in a kernel" in bench.launcher._log.read_text()


@pytest.mark.parametrize(
    ("how", "limits", "says"),
    [
        ("hang", {"hangs_after_s": 1.0}, "gave no sign of life"),
        ("mute", {"start_within_s": 3.0}, "was not ready after 3 s"),
    ],
)
def test_a_hung_worker_is_killed_and_started_again(tmp_path, how, limits, says):
    bench = Bench(tmp_path, how, "well", **limits)
    bench.launcher.start_within_s = limits.get("start_within_s", 30.0)

    def after_the_first(work: Work) -> bool:
        if len(bench.starts()) > 1:  # a slow machine must not take the second one for hung
            bench.launcher.start_within_s = bench.launcher.hangs_after_s = 60.0
        return finished(work)

    assert bench.until(after_the_first).state == "finished"
    assert says in bench.launcher._last_reason
    assert len(bench.starts()) == 2
    assert all(gone(pid) for pid in bench.starts())


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("status", "worker.garbage", "status.jsonl"),
        ("fail", "data.malformed", "text.jsonl:3: the line is not JSON"),
    ],
)
def test_what_a_worker_says_is_read_strictly(tmp_path, how, code, says):
    work = Bench(tmp_path, how).until(finished)

    assert work.state == "failed"
    assert work.refusal.rule == code
    assert says in work.refusal.reason


@pytest.mark.parametrize("how", ["result", "nan", "short", "lie"])
def test_what_a_worker_leaves_is_checked(tmp_path, how):
    bench = Bench(tmp_path, how)

    assert bench.until(finished).state == "finished"  # it says so
    with pytest.raises(FederationError):
        read_result(bench.spool, bench.job, MANIFEST)
    if how == "result":
        with pytest.raises(WorkerError):
            bench.launcher.result(bench.job.id)


def test_a_withdrawn_job_is_cancelled(tmp_path):
    bench = Bench(tmp_path, "slow")

    def stop_it(work: Work) -> bool:
        if work.step:
            bench.launcher.cancel(bench.job.id)
        last = last_status(bench.spool, bench.job.id)
        return last is not None and last.event == "cancelled"

    assert bench.until(stop_it).state == "none"
    assert not bench.launcher.under_way()


def test_a_job_is_asked_for_what_it_has_done(tmp_path):
    bench = Bench(tmp_path, "counts")

    def ask(work: Work) -> bool:
        if work.step >= 3:
            bench.launcher.finish(bench.job.id)
        return finished(work)

    assert bench.until(ask).state == "finished"
    assert read_result(bench.spool, bench.job, MANIFEST).steps >= 3
    assert bench.launcher.unfinished(RunId("r1"), 9) == ()


def test_a_deaf_worker_is_overdue(tmp_path):
    """From when it was asked first: asking again does not begin the wait again."""
    now = [100.0]
    bench = Bench(tmp_path, "deaf", finish_within_s=30.0, monotonic=lambda: now[0])
    bench.until(lambda work: work.step >= 1)  # the worker is ended; its job stays
    asked = []
    for at in (100.0, 129.0, 130.0):
        now[0] = at
        bench.launcher.finish(bench.job.id)
        asked.append(bench.launcher.work(bench.job.id).finishing)
    assert asked == ["asked", "asked", "overdue"]

    bench.launcher.cancel(bench.job.id)
    assert bench.launcher.unfinished(RunId("r1"), 9) == ()
    bench.launcher.submit(bench.job)  # asked for again, all of it is wanted
    assert bench.launcher.work(bench.job.id) == Work(state="running")


def test_what_no_worker_has_begun_is_withdrawn(tmp_path):
    bench = Bench(tmp_path, "counts")
    bench.launcher.submit(bench.job)
    bench.launcher.finish(bench.job.id)

    assert bench.launcher.work(bench.job.id) == Work(state="none")
    assert bench.spool.cancel(bench.job.id).exists()


def test_a_job_of_an_earlier_agent_is_taken_up_and_finished(tmp_path):
    first = Bench(tmp_path, "counts", "counts")
    first.until(lambda work: work.step >= 1)
    bench = Bench(tmp_path, "counts")
    assert bench.launcher.unfinished(RunId("r1"), 0) == ()
    ((round_, work),) = bench.launcher.unfinished(RunId("r1"), 1)
    assert (round_, work) == (bench.job.round_id, Work(left_over=True))

    bench.launcher.finish(bench.job.id)
    assert bench.until(finished, submit=False).state == "finished"


def test_a_child_and_what_it_started_are_ended(tmp_path):
    bench = Bench(tmp_path, "family")

    bench.until(finished)

    grandchild = int((bench.spool.root / "grandchild").read_text())
    assert gone(bench.starts()[0])
    assert gone(grandchild)


def test_a_killed_agent_leaves_no_orphan(tmp_path):
    """SIGKILL to the process that launched: the worker leaves by itself."""
    bench = Bench(tmp_path, "slow")
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.faults.test_launcher_local import Bench\n"
        f"bench = Bench(Path({str(tmp_path)!r}), 'slow')\n"
        "async def drive():\n"
        "    bench.launcher.submit(bench.job)\n"
        "    while True:\n"
        "        await bench.launcher.tick()\n"
        "        if bench.launcher.work('r1.0').step: print('working', flush=True)\n"
        "        await asyncio.sleep(0.05)\n"
        "asyncio.run(drive())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as agent:
        assert agent.stdout.readline() == "working\n"
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    (worker,) = bench.starts()
    give_up = time.monotonic() + PATIENCE_S
    while not gone(worker) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert gone(worker)


@pytest.mark.slow
def test_after_a_killed_agent_the_round_goes_on_where_it_was(tmp_path):
    """The real worker: it puts its state away as it leaves, and the next one continues from it."""
    manifest, _ = write_model(tmp_path / "model", config=TINY, seed=7)
    theta = np.fromfile(tmp_path / "model" / "theta.f32", dtype="<f4")
    plan = make_plan(
        manifest, local_step={"max_steps": None, "max_seconds": 6}, evaluation={"languages": []}
    )
    site = Site.make(tmp_path / "site", theta=theta, manifest=manifest, plan=plan)
    job = site.job()
    (tmp_path / "job.json").write_bytes(job.to_bytes())
    script = (
        "import asyncio\n"
        "from pathlib import Path\n"
        "from node_agent.spool import Spool, read_job\n"
        "from tests.faults.test_launcher_local import real\n"
        f"launcher = real(Spool(Path({str(site.spool.root)!r})))\n"
        f"path = Path({str(tmp_path)!r}) / {job.id + '.json'!r}\n"
        "async def drive():\n"
        "    launcher.submit(read_job(path))\n"
        "    while True:\n"
        "        await launcher.tick()\n"
        f"        if launcher.work({job.id!r}).step: print('working', flush=True)\n"
        "        await asyncio.sleep(0.05)\n"
        "asyncio.run(drive())\n"
    )
    (tmp_path / "job.json").replace(tmp_path / f"{job.id}.json")
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as agent:
        assert agent.stdout.readline() == "working\n"
        agent.send_signal(signal.SIGKILL)
        agent.wait()

    launcher = real(site.spool)
    launcher.clear_leftovers()  # what every start of an agent does first
    events = read_status(site.spool, job.id)
    done = max(event.step or 0 for event in events)
    assert events[-1].event == "interrupted"  # it left by itself, or was told to, politely

    async def finish() -> None:
        launcher.submit(job)
        try:
            while launcher.work(job.id).state != "finished":
                await launcher.tick()
                assert launcher.work(job.id).state != "failed", launcher.work(job.id)
                await asyncio.sleep(0.05)
        finally:
            await launcher.close()

    asyncio.run(asyncio.wait_for(finish(), PATIENCE_S))
    again = [event.step for event in read_status(site.spool, job.id) if event.step]
    assert 0 < done <= min(again)
    assert site.result(job).steps >= max(again)
    assert site.result(job).seconds >= 6  # of both parts
    assert site.spool.spent(job.id).exists()  # what the first part cost counts as well


def real(spool: Spool) -> LocalLauncher:
    """A launcher of the real worker."""
    config = WorkerConfig(device="cpu", threads=1)
    return LocalLauncher(
        spool=spool,
        command=lambda: worker_command(config, spool, parent=os.getpid()),
        environment=worker_environment(config, {**os.environ, "PYTHONPATH": str(ROOT)}),
        start_within_s=120.0,
        hangs_after_s=120.0,
        rng=rng(),
        backoff=Backoff(first_s=0.01, cap_s=0.02),
    )


def test_the_next_agent_ends_what_was_left_behind(tmp_path):
    bench = Bench(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True
    ) as left:
        remember(bench.spool.root / "launched.json", Process.of(left.pid))

        said = bench.launcher.clear_leftovers()

        assert str(left.pid) in said
        assert left.wait(timeout=20) == -signal.SIGTERM
    assert bench.launcher.clear_leftovers() is None


def test_a_process_with_a_recycled_number_is_left_alone(tmp_path):
    path = tmp_path / "launched.json"
    remember(path, Process(os.getpid(), "1"))  # our number, another start

    assert remembered(path) is None
    path.write_text("garbage")
    assert remembered(path) is None


@pytest.mark.parametrize("head_is_deaf", [True, False])
def test_one_that_ignores_sigterm_is_killed(head_is_deaf):
    """A member in a session of its own, whether or not the head of the family outlives it."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = deaf + "print('deaf', flush=True); time.sleep(3600)"
    head = (deaf if head_is_deaf else "import time; ") + (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); "
        "print(p.pid, flush=True); time.sleep(3600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", head], stdout=subprocess.PIPE, text=True
    ) as process:
        said = {process.stdout.readline().strip(), process.stdout.readline().strip()}
        (member,) = said - {"deaf"}
        assert {process.pid, int(member)} <= {one.pid for one in family(os.getpid())}

        end_family(Process.of(process.pid), patience_s=0.3, reap=process.poll)

        last = signal.SIGKILL if head_is_deaf else signal.SIGTERM
        assert process.wait(timeout=20) == -last
    assert gone(int(member))


def test_a_restarted_agent_asks_again_and_keeps_what_is_done(tmp_path):
    """The second launcher knows nothing; the result of the first is there."""
    assert Bench(tmp_path).until(finished).state == "finished"
    again = Bench(tmp_path)

    assert again.launcher.work("r1.0").state == "finished"
    assert again.until(finished).state == "finished"
    assert len(again.starts()) == 1  # a finished local step is not repeated


def test_a_restarted_agent_withdraws_a_job_nobody_wants_any_more(tmp_path):
    """Its round ended meanwhile: no worker works on it before what is wanted now."""
    bench = Bench(tmp_path, "slow")
    bench.until(lambda work: work.step >= 1)
    after = Bench(tmp_path, "well")
    work = after.launcher.work(after.job.id)
    assert (work.state, work.left_over) == ("none", True)

    after.launcher.cancel(after.job.id)

    assert not after.launcher.work(after.job.id).left_over
    after.job = after.job.model_copy(update={"id": "r1.1", "round": 1})
    assert after.until(finished).state == "finished"
    assert last_status(after.spool, "r1.0").event == "cancelled"


def test_a_restarted_agent_runs_an_unfinished_job_again(tmp_path):
    first = Bench(tmp_path, "slow")
    assert first.until(lambda work: work.step > 0).state == "running"
    again = Bench(tmp_path, "well")

    assert again.launcher.work("r1.0").state == "none"
    assert again.until(finished).state == "finished"


def test_doctor_sees_whether_a_worker_starts(tmp_path):
    assert check_started(Bench(tmp_path / "a").launcher, within_s=PATIENCE_S) > 0
    with pytest.raises(WorkerError, match=r"libcuda"):
        check_started(Bench(tmp_path / "b", "stillborn").launcher, within_s=PATIENCE_S)


# -- pure parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "says"),
    [
        ({"running": True, "ready": True, "silent_s": 9.9}, None),
        ({"running": True, "ready": True, "silent_s": 10.0}, "no sign of life for 10 s"),
        ({"running": True, "ready": True, "silent_s": None, "age_s": 10.0}, "no sign of life"),
        ({"running": True, "ready": False, "age_s": 4.9}, None),
        ({"running": True, "ready": False, "age_s": 5.0}, "not ready after 5 s"),
        ({"running": False, "ready": True, "exit_status": -9}, "ended with status -9"),
    ],
)
def test_verdict(health, says):
    values = {"exit_status": None, "silent_s": 0.0, "age_s": 1.0}
    found = verdict(Health(**values | health), start_within_s=5.0, hangs_after_s=10.0)

    assert (found is None) if says is None else (says in found)


def test_commands_and_environment():
    spool = Spool(Path("/spool"))
    one = worker_command(WorkerConfig(), spool, parent=7)
    many = worker_command(WorkerConfig(ranks=4, device="cuda"), spool, parent=7)
    flower = flower_command(FlowerConfig(), spool, parent=7)
    lent = FlowerConfig(python_path=("/apps",), node_config="partition-id=3 name='x'")
    environment = worker_environment(
        WorkerConfig(threads=3, device="cpu", network_interface="ib0"), {"PATH": "/bin"}
    )

    life = "--exit-with-parent --parent-pid 7"
    told = "--spool /spool --device auto --checkpoint-every-s 600"
    assert " ".join(one[1:]) == f"-m node_agent.worker {told} {life}"
    assert " ".join(many[1:]).startswith(
        "-m torch.distributed.run --standalone --max-restarts 0 --nproc-per-node 4"
        " -m node_agent.worker --spool /spool --device cuda"
    )
    assert " ".join(flower[1:]) == f"-m node_agent.flower --spool /spool {life}"
    assert flower_command(lent, spool, parent=7)[len(flower) :] == [
        "--python-path=/apps",
        "--node-config=partition-id=3 name='x'",
    ]
    assert environment["PATH"] == "/bin"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
