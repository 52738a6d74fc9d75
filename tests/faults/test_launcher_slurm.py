"""The launcher against a real Slurm: a private cluster of one node on this machine.

The worker is a light one that speaks the spool's contract (tests/support/fake_worker.py), and the
real one once, where continuing from a checkpoint is the point. What is injected is shown to have
happened by Slurm's own list of jobs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from node_agent.agent import Agent
from node_agent.client import Backoff
from node_agent.config import NodeFolder, load_config
from node_agent.decide import Work
from node_agent.doctor import check_slurm
from node_agent.journal import Journal
from node_agent.launchers.jobs import GIVE_UP
from node_agent.launchers.slurm import SlurmLauncher
from node_agent.launchers.slurm_commands import Slurm, SlurmBusyError
from node_agent.launchers.slurm_config import LauncherConfig
from node_agent.launchers.slurm_rules import read_ends
from node_agent.launchers.slurm_script import Marks
from node_agent.lock import FolderLock
from node_agent.site import open_site
from node_agent.spool import DataPaths, Job, Spool, read_result, read_status
from node_agent.worker.init_model import write_model
from tests.support.federation import running
from tests.support.node import NOW, node_config, node_folder, rng, the_plan
from tests.support.plans import MANIFEST
from tests.support.slurm import PATIENCE_S, Cluster, cluster, wait, why_not
from tests.support.worker import TINY, Site, make_plan

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def idle(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with nothing in its queue, before and after."""
    slurm.until_idle()
    yield slurm
    slurm.until_idle()


class Bench:
    """A launcher over a spool, jobs, and a cluster."""

    def __init__(self, root: Path, slurm: Cluster, **changes) -> None:
        self.slurm, self.root = slurm, root
        self.before = slurm.states()
        self.spool = changes.pop("spool", None) or Spool(root / "spool").make()
        (root / "manifest.json").write_bytes(MANIFEST.to_bytes())
        np.zeros(MANIFEST.coordinates, "<f4").tofile(root / "theta.f32")
        (root / "plan.json").write_bytes(b"{}")
        self.changes = changes
        self.launcher = self.make()

    def make(self) -> SlurmLauncher:
        """A launcher as a new agent makes it: it knows what is on disk."""
        values = {
            "nodes": 1,
            "time_minutes": 5,
            "warn_s": 20,
            "python": sys.executable,
            "environment": {"PYTHONPATH": str(ROOT)},
            "poll_s": 0.3,
        }
        config = LauncherConfig(kind="slurm", **values | self.changes.get("config", {}))
        return SlurmLauncher(
            spool=self.spool,
            config=config,
            institution="usach",
            worker=self.changes.get(
                "worker", ("tests.support.fake_worker", "--spool", str(self.spool.root))
            ),
            ranks=self.changes.get("ranks", 1),
            environment={"OMP_NUM_THREADS": "1"},
            slurm=self.slurm.slurm,
            start_within_s=self.changes.get("start_within_s", 300.0),
            hangs_after_s=self.changes.get("hangs_after_s", 60.0),
            rng=rng(),
            backoff=Backoff(first_s=0.01, cap_s=0.02),
            beat_s=1.0,
        )

    def behave(self, *words: str) -> None:
        (self.spool.root / "behave").write_text("\n".join(words))

    def job(self, number: int, **changes) -> Job:
        values = {
            "id": f"r1.{number}",
            "run": "r1",
            "round": number,
            "plan": str(self.root / "plan.json"),
            "manifest": str(self.root / "manifest.json"),
            "theta": str(self.root / "theta.f32"),
            "select": "all",
            "data": DataPaths(),
            "seed": 1,
        }
        return Job(**values | changes)

    def until(
        self,
        condition: Callable[[], bool],
        *,
        what: str,
        jobs: tuple[Job, ...] = (),
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Tick until something is so."""

        async def drive() -> None:
            for job in jobs:
                self.launcher.submit(job)
            give_up = time.monotonic() + patience_s
            while not condition():
                await self.launcher.tick()
                assert time.monotonic() < give_up, (what, self.launcher.state, self.log())
                await asyncio.sleep(0.05)
            if (step := self.launcher._step_under_way) is not None:  # it ends with this loop
                await asyncio.wait({step})
                self.launcher._step_under_way = None

        asyncio.run(drive())

    def finish(self, job: Job, *, patience_s: float = PATIENCE_S) -> Work:
        """Do a job to its end."""
        ended = ("finished", "failed")
        self.until(
            lambda: self.work(job).state in ended,
            what=f"{job.id} to end",
            jobs=(job,),
            patience_s=patience_s,
        )
        return self.work(job)

    def close(self) -> None:
        asyncio.run(self.launcher.close())

    def work(self, job: Job) -> Work:
        return self.launcher.work(job.id)

    def log(self) -> str:
        """What the jobs printed."""
        logs = sorted(Marks(self.spool.root / "slurm").root.glob("job-*.log"))
        return "\n".join(path.read_text()[-2000:] for path in logs)

    def starts(self) -> int:
        path = self.spool.root / "starts"
        return len(path.read_text().split()) if path.exists() else 0

    @property
    def allocation(self):
        return self.launcher._remembered().allocation

    def mine(self) -> dict[int, str]:
        """This node's jobs and their states."""
        return {
            job["job_id"]: job["job_state"]
            for job in self.slurm.jobs()
            if job["comment"].startswith("minga-usach-") and job["job_id"] not in self.before
        }


def test_one_allocation_serves_several_rounds_and_is_given_back(tmp_path, idle):
    bench = Bench(tmp_path, idle, config={"idle_release_s": 1.0})

    for number in range(3):
        job = bench.job(number)
        assert bench.finish(job).state == "finished"
        assert read_result(bench.spool, job, MANIFEST).steps == 2

    assert bench.starts() == 1
    assert list(bench.mine().values()) == ["RUNNING"]
    bench.until(lambda: bench.allocation is None, what="the allocation to be given back")
    assert list(bench.mine().values()) == ["COMPLETED"]
    assert "waited" in bench.launcher.state  # the queue's wait is reported


def test_the_warning_interrupts_a_round_and_the_next_allocation_continues_it(tmp_path, idle):
    """The real worker, two ranks under torchrun; trained steps are kept.

    The warning is sent by scancel: Slurm's own timer sends the same signal to the same process, at
    some moment within a minute (tried by hand: 28 to 30 s after the start with a limit of 1 min).
    """
    manifest, _ = write_model(tmp_path / "model", config=TINY, seed=7)
    theta = np.fromfile(tmp_path / "model" / "theta.f32", dtype="<f4")
    plan = make_plan(
        manifest, local_step={"max_steps": None, "max_seconds": 8}, evaluation={"languages": []}
    )
    site = Site.make(tmp_path / "site", theta=theta, manifest=manifest, plan=plan)
    arguments = ("node_agent.worker", "--spool", str(site.spool.root), "--device", "cpu")
    bench = Bench(tmp_path, idle, spool=site.spool, worker=arguments, ranks=2)
    job = site.job()
    bench.until(lambda: bench.work(job).step > 0, what="the first steps", jobs=(job,))
    (number,) = bench.mine()

    idle.run("scancel", "--batch", "--signal=USR1", str(number))
    bench.until(lambda: bench.work(job).state == "finished", what="the round's end")

    said = read_status(site.spool, job.id)
    names = [event.event for event in said]
    assert names.count("interrupted") == 1  # it happened
    assert names.count("started") == 2
    middle = names.index("interrupted")
    done = max(event.step or 0 for event in said[:middle])
    again = [event.step for event in said[middle:] if event.step]
    assert done > 0
    assert min(again) >= done  # nothing is trained twice
    result = site.result(job)
    assert result.steps >= max(again)
    assert result.rank_steps == (result.steps, result.steps)
    assert bench.mine() == {number: "COMPLETED", bench.allocation.job: "RUNNING"}, bench.log()


def test_a_person_who_cancels_is_obeyed_and_told_how_to_go_on(tmp_path, idle):
    bench = Bench(tmp_path, idle)
    bench.behave("slow", "well")
    job = bench.job(0)
    bench.until(lambda: bench.work(job).step > 0, what="the job to begin", jobs=(job,))

    idle.run("scancel", str(bench.allocation.job))
    bench.until(lambda: bench.work(job).state == "failed", what="the cancelling to be seen")

    refusal = bench.work(job).refusal
    assert refusal.rule == "slurm.cancelled"
    assert "somebody cancelled" in refusal.reason
    assert "minga node resume" in refusal.reason
    assert bench.launcher.refusal(the_plan()) == refusal  # later rounds are declined as well
    assert bench.finish(bench.job(1)).state == "failed"
    assert list(bench.mine().values()) == ["CANCELLED"]  # nothing else was handed in
    bench.launcher.marks.held.unlink()  # what `minga node resume` does
    assert bench.finish(bench.job(2)).state == "finished"


def test_a_killed_agent_finds_its_job_again(tmp_path, idle):
    """SIGKILL while the worker trains: the next agent adopts the allocation and the job in it."""
    bench = Bench(tmp_path, idle)
    (bench.spool.root / "steps").write_text("120")
    script = (
        "import asyncio, os\n"
        "from pathlib import Path\n"
        "from tests.faults.test_launcher_slurm import Bench\n"
        "from tests.support.slurm import Cluster\n"
        f"slurm = Cluster(Path({str(idle.folder)!r}), dict(os.environ))\n"
        f"bench = Bench(Path({str(tmp_path)!r}), slurm)\n"
        "job = bench.job(0)\n"
        "bench.until(lambda: bench.work(job).step > 0, what='', jobs=(job,))\n"
        "print('working', flush=True)\n"
        "bench.until(lambda: False, what='the end')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        env=idle.environment,
    ) as agent:
        assert agent.stdout.readline() == "working\n"
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    (number,) = bench.mine()

    bench.launcher = bench.make()
    said = bench.launcher.clear_leftovers()
    work = bench.finish(bench.job(0))

    assert said.startswith(f"adopted Slurm job {number}")
    assert work.state == "finished"
    assert bench.starts() == 1
    assert list(bench.mine()) == [number]


def test_a_lost_answer_of_sbatch_is_no_second_job(tmp_path, idle):
    """Killed, or not answered, between sbatch and writing the number down."""
    bench = Bench(tmp_path, idle)

    class Lossy(Slurm):
        lost = 0

        def submit(self, script):
            super().submit(script)
            Lossy.lost += 1
            raise SlurmBusyError("Socket timed out")

    bench.launcher.slurm = Lossy(idle.slurm.environment)
    assert bench.finish(bench.job(0)).state == "finished"

    assert Lossy.lost == 1
    assert list(bench.mine()) == [bench.allocation.job]


def test_two_may_wait_for_the_same_step(tmp_path, idle):
    bench = Bench(tmp_path, idle)
    asked = []

    class Counted(Slurm):
        def submit(self, script):
            asked.append(script)
            return super().submit(script)

    async def both() -> None:
        bench.launcher.submit(bench.job(0))
        await asyncio.gather(bench.launcher.tick(), bench.launcher.tick())
        if bench.launcher._step_under_way is not None:  # a slow machine: it ends with this loop
            await bench.launcher._step_under_way

    bench.launcher.slurm = Counted(idle.slurm.environment)
    asyncio.run(both())

    assert len(asked) == 1
    assert list(bench.mine()) == [bench.allocation.job]


@pytest.mark.parametrize("when_late", ["keep", "cancel"])
def test_a_queue_that_stays_full_past_the_deadline(tmp_path, idle, when_late):
    hog = idle.hog()
    wait(lambda: idle.states()[hog] == "RUNNING", "the stranger's job to run")
    bench = Bench(tmp_path, idle, config={"when_late": when_late})
    job = bench.job(0, deadline_unix=time.time() + 3600.0)
    queued = lambda: "queued in Slurm" in bench.work(job).waiting  # noqa: E731
    bench.until(queued, what="the queue's wait", jobs=(job,))
    (number,) = bench.mine()
    bench.launcher.now = lambda: time.time() + 3600.0

    work = bench.finish(job)

    assert (work.state, work.refusal.rule) == ("failed", "slurm.queue")
    assert "the round's time was over while queued in Slurm for" in work.refusal.reason
    bench.until(lambda: bench.allocation.missed == 1, what="the missed round to be counted")
    assert bench.work(job) == work  # the reason stays, also once the job is cancelled for it
    bench.launcher.forget(job.id)
    bench.launcher.now = time.time
    if when_late == "cancel":
        bench.until(lambda: bench.allocation is None, what="the job to be cancelled")
        assert bench.mine() == {number: "CANCELLED"}
        assert not bench.launcher.held  # this node's own doing
        return
    declined = bench.launcher.refusal(the_plan())
    assert declined.rule == "slurm.queue"
    assert "queued in Slurm" in declined.reason
    assert bench.mine() == {number: "PENDING"}
    idle.run("scancel", str(hog))
    bench.until(lambda: bench.launcher.refusal(the_plan()) is None, what="the kept job to start")
    assert bench.finish(bench.job(1)).state == "finished"
    assert list(bench.mine()) == [number]


def test_a_dead_or_hung_worker_is_started_again_in_its_allocation(tmp_path, idle):
    bench = Bench(tmp_path, idle)
    bench.behave("die", "hang", "well")
    job = bench.job(0)

    def ended() -> bool:  # a slow machine must not take a worker that is well for one that hangs
        hangs = bench.starts() == 2 and len(bench.launcher._ends()) == 1
        bench.launcher.hangs_after_s = 3.0 if hangs else 60.0
        return bench.work(job).state in ("finished", "failed")

    bench.until(ended, what="the job to end", jobs=(job,))

    assert bench.work(job).state == "finished"
    assert bench.starts() == 3
    assert len(bench.mine()) == 1
    ends = read_ends(bench.launcher.marks.ends.read_text(), bench.allocation.job)
    assert [end.status for end in ends] == [7, 137]
    assert "status 137" in bench.launcher._last_reason
    assert "Segmentation" not in bench.launcher._last_reason  # that was the one before


def test_a_job_under_which_the_worker_keeps_dying_is_given_up(tmp_path, idle):
    bench = Bench(tmp_path, idle)
    bench.behave(*["die"] * 9)

    work = bench.finish(bench.job(0))

    assert (work.state, work.refusal.rule) == ("failed", "worker.lost")
    assert "status 7: Segmentation fault in a kernel" in work.refusal.reason
    assert bench.starts() == GIVE_UP
    assert len(bench.mine()) == 1


def test_what_slurm_does_not_take_is_said_in_its_own_words(tmp_path, idle):
    bench = Bench(tmp_path, idle, config={"partition": "nowhere"})

    work = bench.finish(bench.job(0))

    assert (work.state, work.refusal.rule) == ("failed", "worker.lost")
    assert "invalid partition specified: nowhere" in work.refusal.reason
    assert bench.mine() == {}


@pytest.mark.parametrize("on_stop", ["keep", "cancel"])
def test_an_agent_that_is_told_to_stop(tmp_path, idle, on_stop):
    bench = Bench(tmp_path, idle, config={"on_stop": on_stop})
    bench.behave("slow", "well")
    job = bench.job(0)
    bench.until(lambda: bench.work(job).step > 0, what="the job to begin", jobs=(job,))
    (number,) = bench.mine()

    bench.close()

    if on_stop == "keep":
        assert bench.mine() == {number: "RUNNING"}
        return
    wait(lambda: bench.mine() == {number: "CANCELLED"}, "the job to be cancelled")
    bench.launcher = bench.make()
    assert bench.finish(bench.job(0)).state == "finished"
    assert not bench.launcher.held


def test_a_job_without_an_agent_ends_by_itself(tmp_path, idle):
    """No orphan: neither after the agent's mark grew old, nor once another allocation serves."""
    bench = Bench(tmp_path, idle, config={"agent_lost_after_s": 10})
    job = bench.job(0)
    bench.behave("slow")
    bench.until(lambda: bench.work(job).step > 0, what="the job to begin", jobs=(job,))
    (number,) = bench.mine()
    os.utime(bench.launcher.marks.agent, (1.0, 1.0))  # as if it were long ago

    wait(lambda: bench.mine()[number] == "COMPLETED", "the job to end")

    (end,) = read_ends(bench.launcher.marks.ends.read_text(), number)
    assert end.why == "agent"
    bench.launcher.marks.nonce.write_text("another")
    again = int(idle.run("sbatch", "--parsable", str(bench.launcher.marks.script)))
    wait(lambda: bench.mine().get(again) == "COMPLETED", "the stranger to end")
    assert bench.starts() == 1
    assert "another allocation serves this spool" in bench.log()


# -- a whole node ----------------------------------------------------------------------------------


def test_a_node_of_a_real_federation_waits_declines_and_takes_part(tmp_path, idle):
    """An agent with Slurm: heartbeats say the wait, a lost round is left, the next one declined.

    Then the stranger's job ends, the kept job starts, and the run gets to its end in it.
    """
    with running(tmp_path / "federation", nodes=1, start=False) as federation:
        folder = NodeFolder(federation.folder / "nodes" / "node-1")
        text = folder.root / "text.jsonl"
        text.write_text('{"text":"minga"}\n')
        lines = folder.config.read_text().splitlines()
        lines = [f'train = ["{text}"]' if line.startswith("train") else line for line in lines]
        lines += ["[launcher]", 'kind = "slurm"', "nodes = 1", "poll_s = 0.3", "time_minutes = 9"]
        lines += [f'environment = {{ PYTHONPATH = "{ROOT}" }}', "warn_s = 20"]
        folder.config.write_text("\n".join(lines) + "\n")
        hog = idle.hog()
        wait(lambda: idle.states()[hog] == "RUNNING", "the stranger's job to run")
        train = {"join": 60, "train": 6, "deal": 60, "upload": 60, "commit": 60, "reveal": 60}
        run = federation.submit(
            rounds=1, local_step={"kind": "builtin", "max_steps": 2}, deadlines=train
        )
        said: list[str] = []
        _drive(federation, folder, idle, run, said, hog)

    assert any(words.startswith("queued in Slurm for") for words in said)
    journal = Journal(folder.journal, now=lambda: NOW, read_only=True)
    try:
        rules = [(e.what, e.detail.get("code") or e.detail.get("rule")) for e in journal.entries()]
    finally:
        journal.close()
    assert ("leave", "slurm.queue") in rules
    assert ("decline", "slurm.queue") in rules
    mine = [job for job in idle.jobs() if job["comment"].startswith("minga-node-1-")]
    assert [job["job_state"] for job in mine] == ["CANCELLED"]  # by the agent, as it was stopped


def _drive(federation, folder, idle, run, said: list[str], hog: int) -> None:
    """Run the agent here until the run is done; free the cluster once a round was declined."""

    async def drive() -> None:
        site = open_site(folder, load_config(folder), rng=rng())
        launcher = site.launchers["builtin"]
        launcher.slurm = idle.slurm
        launcher.worker = ("tests.support.fake_worker", "--spool", str(launcher.spool.root))
        agent = Agent(site)
        working = asyncio.create_task(agent.run())
        give_up, freed = time.monotonic() + 2 * PATIENCE_S, False
        try:
            while True:
                report = await asyncio.to_thread(federation.client.show, run)
                (facts,) = await asyncio.to_thread(federation.client.nodes)
                said.extend(progress.activity for progress in facts.progress)
                if report.ended:
                    assert report.status == "done"
                    return
                if not freed and launcher.refusal(the_plan()) and len(report.rounds) > 2:
                    idle.run("scancel", str(hog))
                    freed = True
                assert time.monotonic() < give_up, (report, launcher.state)
                assert not working.done(), working.exception()
                await asyncio.sleep(0.2)
        finally:
            agent.stop()
            await working

    with FolderLock(folder, pid=os.getpid()):
        asyncio.run(drive())


def test_the_doctor_asks_slurm(tmp_path, idle):
    folder = node_folder(tmp_path)
    config = node_config(launcher=LauncherConfig(kind="slurm", nodes=1, time_minutes=9))

    (taken, waits) = check_slurm(folder, config, idle.slurm, hand_in=True)
    nowhere = config.launcher.model_copy(update={"partition": "nowhere"})
    refused = list(check_slurm(folder, replace(config, launcher=nowhere), idle.slurm, hand_in=True))
    absent = list(check_slurm(folder, config, Slurm({"PATH": "/nowhere"}), hand_in=True))

    assert (taken.level, waits.level) == ("ok", "ok")
    assert "to start at" in taken.sentence
    assert "invalid partition specified: nowhere" in refused[0].sentence
    assert (refused[0].level, absent[0].level) == ("refused", "refused")
    assert "login node" in absent[0].sentence
    assert idle.under_way() == []  # it only asked
