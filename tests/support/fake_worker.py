"""A worker that speaks the spool's contract without torch, and misbehaves when it is told to.

    python -m tests.support.fake_worker --spool DIR [--exit-with-parent] [--parent-pid N]

``DIR/behave`` holds one word for each start of the worker, used up line by line; then ``well``:

    well      answers every job with a delta of ones, after ``DIR/steps`` steps of 0.05 s
    slow      never finishes a job by itself, but lives
    counts    goes on until it has done ``DIR/steps.<round>`` steps (a file that may appear later:
              those past it do not count); the delta has one step of the grid for each, and what
              the job says to add; ``DIR/scores.json`` has what held-out texts score, as rows of
              ``spool.Evaluation``
    deaf      likewise, but does not hear that a job is to finish
    die       ends with status 7 as soon as it takes a job
    stillborn ends with status 9 before it is ready
    hang      stops touching ``alive`` once it is ready
    mute      lives, but never becomes ready
    status    writes a line that is not JSON into status.jsonl
    result    writes a result.json that is not one
    nan       writes a delta with NaN in it
    short     writes a delta that is too short
    lie       writes a delta that has not the root it names
    fail      answers with the event ``failed``
    family    starts a grandchild in a session of its own, then behaves well
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from node_agent.resident import Process
from node_agent.spool import (
    Evaluation,
    Job,
    Result,
    Spent,
    Spool,
    StatusWriter,
    WorkerInfo,
    atomic_write,
    last_status,
    read_job,
)
from protocols.tensors.manifest import Manifest
from protocols.tensors.units import blob_digest


def next_behaviour(spool: Spool) -> str:
    """The next word of the script, which is crossed out."""
    path = spool.root / "behave"
    with contextlib.suppress(FileNotFoundError):
        first, _, rest = path.read_text().partition("\n")
        path.write_text(rest)
        return first.strip() or "well"
    return "well"


def waiting(spool: Spool) -> Job | None:
    """The oldest job without an answer; the agent may withdraw one while we look."""
    found = []
    for path in spool.jobs.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(found):
        name = path.name.removesuffix(".json")
        with contextlib.suppress(FileNotFoundError, ValueError):
            last = last_status(spool, name)
            final = last is not None and last.event in ("failed", "cancelled")
            if not final and not spool.result(name).exists():
                return read_job(path)
    return None


def work(spool: Spool, job: Job, how: str, parent: Process | None) -> None:
    """Do one job."""
    status = StatusWriter(spool.status(job.id), now=time.time)
    status.event("started")
    if how == "die":
        print("Segmentation fault in a kernel", flush=True)
        os._exit(7)
    if how == "fail":
        status.event("failed", code="data.malformed", message="text.jsonl:3: the line is not JSON")
        return
    if how == "status":
        with spool.status(job.id).open("ab") as file:
            file.write(b"not json at all\n")
        time.sleep(3600)
    counting, done = how in ("counts", "deaf"), 0
    steps_file = spool.root / (f"steps.{job.round}" if counting else "steps")
    while True:
        steps = int(steps_file.read_text()) if steps_file.exists() else (10**6 if counting else 2)
        if done >= steps and how != "slow":
            done = steps
            break
        spool.alive.touch()
        if parent is not None and not parent.lives():
            os._exit(1)
        if spool.cancel(job.id).exists():
            status.event("cancelled")
            return
        if spool.drain.exists():
            status.event("interrupted")
            return
        if spool.finish(job.id).exists() and how != "deaf":
            break
        done += 1
        status.event("progress", step=done, max_steps=steps, tokens=10 * done)
        time.sleep(0.05)
    answer(spool, job, how, done)
    status.event("done")


def answer(spool: Spool, job: Job, how: str, done: int) -> None:
    """Write delta and result, or something like them."""
    manifest = Manifest.from_bytes(Path(job.manifest).read_bytes())
    count = sum(segment.coordinates for segment in manifest.select(job.select))
    counting = how in ("counts", "deaf")
    delta = np.full(count, (done if counting else 1) * 2.0**-10, "<f4")
    for path in job.carry if counting else ():
        delta += np.fromfile(path, "<f4")
    if how == "nan":
        delta[count // 2] = np.nan
    data = delta.tobytes()
    spool.out(job.id).mkdir(parents=True, exist_ok=True)
    atomic_write(spool.delta(job.id), data[:-4] if how == "short" else data)
    if how == "result":
        atomic_write(spool.result(job.id), b'{"schema":"minga.result/1","steps":"many"}')
        return
    result = Result(
        id=job.id,
        steps=done if counting else 2,
        tokens=10 * done if counting else 20,
        records=2,
        loss_nats=1.0,
        seconds=0.1,
        delta_root=blob_digest(b"lie") if how == "lie" else blob_digest(data),
        delta_coordinates=count,
        delta_norm=1.0,
        device="none",
        evaluation=scores_of(spool) if counting else (),
        spent=Spent(gpu_seconds=3.0, cpu_seconds=2.0),
    )
    atomic_write(spool.result(job.id), result.to_bytes())


def scores_of(spool: Spool) -> tuple[Evaluation, ...]:
    """What the site's held-out texts score, by language."""
    with contextlib.suppress(FileNotFoundError):
        rows = json.loads((spool.root / "scores.json").read_text())
        return tuple(Evaluation(**row) for row in rows)
    return ()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument("--exit-with-parent", action="store_true")
    parser.add_argument("--parent-pid", type=int)
    options = parser.parse_args()
    spool = Spool(options.spool.absolute()).make()
    with (spool.root / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    parent = Process.of(options.parent_pid or os.getppid()) if options.exit_with_parent else None
    how = next_behaviour(spool)
    if how == "stillborn":
        print("ImportError: libcuda.so.1", flush=True)
        sys.exit(9)
    if how == "family":
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True
        )
        (spool.root / "grandchild").write_text(str(child.pid))
    if how != "mute":
        spool.alive.touch()
        info = WorkerInfo(
            pid=os.getpid(), ranks=1, backend="none", device="none", torch="none", started_at=1.0
        )
        atomic_write(spool.worker, info.to_bytes())
    while not spool.drain.exists():
        if parent is not None and not parent.lives():
            return
        if how != "hang":
            spool.alive.touch()
            job = waiting(spool)
            if job is not None and how != "mute":
                work(spool, job, how, parent)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
