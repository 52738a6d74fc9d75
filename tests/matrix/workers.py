"""Kills of the training worker at every commit point, one job for each.

The worker is the real one, resident under the launcher that an agent uses, with a small Llama and
real text, through the rounds of a run; the launcher starts it again after each kill. There is no
federation around it: how an update is rounded is drawn anew in every run, so what is compared is
what the worker hands over, bit for bit. That a round goes on around a dead worker is in
``tests/faults/test_launcher_local.py``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from node_agent.client import Backoff
from node_agent.config import WorkerConfig
from node_agent.launchers.local import LocalLauncher, worker_arguments, worker_environment
from node_agent.spool import Job, Spool
from tests.matrix.arming import read_marks
from tests.matrix.cases import PATIENCE_S, Bench, Row, write_points
from tests.matrix.kills import read_struck
from tests.support.training import make_site
from tests.support.worker import ROOT, Site

STEPS = 6
CONFIG = WorkerConfig(device="cpu", threads=1, checkpoint_every_s=0.001)  # after every step


def kill_worker(made: Bench, instants: frozenset[str]) -> tuple[list[Row], frozenset[str]]:
    """Visit instants; what came of each, and those that nothing came to."""
    folder = made.running.folder / "worker"
    step: dict[str, Any] = {"max_steps": STEPS}
    undisturbed, site = (
        make_site(folder / name, local_step=step, evaluation={"languages": ["es"]})
        for name in ("undisturbed", "killed")
    )
    rows: list[Row] = []
    asyncio.run(_jobs(undisturbed, site, folder / "faults", sorted(instants), rows.append))
    return rows, instants - {row.point for row in rows}


async def _jobs(
    undisturbed: Site,
    site: Site,
    faults: Path,
    instants: list[str],
    found: Callable[[Row], None],
) -> None:
    """The rounds of one run: each goes on where the one before stopped in the text."""
    write_points(faults, [])
    launcher = _launcher(undisturbed.spool, faults)
    try:
        rounds = range(len(instants))
        expected = [await _handed_over(launcher, undisturbed, undisturbed.job(n)) for n in rounds]
    finally:
        await launcher.close()
    launcher = _launcher(site.spool, faults)
    try:
        for number, (instant, wanted) in enumerate(zip(instants, expected, strict=True)):
            await launcher.close()  # the next worker is told where to die
            write_points(faults, [instant])
            said = await _handed_over(launcher, site, site.job(number))
            for mark in read_struck(read_marks(faults / "marks")):
                found(
                    Row(
                        fault="SIGKILL",
                        victim="worker",
                        phase="Training",
                        mode="open",
                        database="sqlite",
                        outcome="same" if said == wanted else f"handed over {said}, not {wanted}",
                        went_on_s=mark["went_on_s"],
                        point=mark["point"],
                    )
                )
    finally:
        await launcher.close()


def _launcher(spool: Spool, faults: Path) -> LocalLauncher:
    def command() -> list[str]:
        life = ["--exit-with-parent", "--parent-pid", str(os.getpid())]
        start = [sys.executable, "-m", "tests.matrix.worker", str(faults)]
        return [*start, *worker_arguments(CONFIG, spool), *life]

    return LocalLauncher(
        spool=spool,
        command=command,
        environment=worker_environment(CONFIG, {**os.environ, "PYTHONPATH": str(ROOT)}),
        start_within_s=PATIENCE_S,
        hangs_after_s=PATIENCE_S,
        rng=Random(0),
        backoff=Backoff(first_s=0.01, cap_s=0.02),
    )


async def _handed_over(launcher: LocalLauncher, site: Site, job: Job) -> str:
    """Hand a job in and wait for its end: a digest of what the worker hands over."""
    launcher.submit(job)
    give_up = time.monotonic() + PATIENCE_S
    while (work := launcher.work(job.id)).state not in ("finished", "failed"):
        if time.monotonic() > give_up:
            return f"nothing within {PATIENCE_S:.0f} s: {launcher.state}"
        await launcher.tick()
        await asyncio.sleep(0.02)
    result = site.result(job)
    if work.state != "finished" or result is None:
        return f"the job is {work.state}: {work.refusal}"
    told = result.model_dump(exclude={"id", "seconds", "spent"})
    return hashlib.sha256(site.delta(job).tobytes() + repr(told).encode()).hexdigest()
