"""The worker as a real process: signals, restarts, a dead agent. Each start costs seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from node_agent.resident import Process
from node_agent.spool import (
    Spool,
    alive_age,
    last_status,
    read_status,
    read_worker,
    request_drain,
)
from tests.support.training import Worker, make_site
from tests.support.worker import ROOT, command, events, final, wait_for, worker

pytestmark = pytest.mark.slow

# Starts its arguments as a child, says the child's number, and stays until it is killed.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
time.sleep(600)
"""


def serves(spool, pid):
    """Whether this very process holds the spool; what a killed one left does not count."""
    info = read_worker(spool)
    return info is not None and info.pid == pid


def test_a_worker_killed_politely_or_not_loses_nothing(tmp_path):
    """SIGTERM in a round, a restart, SIGKILL in the same round, a restart: the same bits."""
    step = {"optimizer": "adamw", "lr": 3e-3, "max_steps": 200}
    whole, broken = (make_site(tmp_path / name, local_step=step) for name in ("whole", "broken"))
    job = whole.ask()
    Worker(whole).answer()
    spool = broken.spool

    def seen(event):
        return events(read_status(spool, job.id)).count(event)

    with worker(spool) as process:
        broken.ask()
        wait_for(lambda: seen("evaluated"), process=process)  # a second of training follows
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert last_status(spool, job.id).event == "interrupted"
    assert read_worker(spool) is None
    assert alive_age(spool) is None
    assert list(spool.state("tiny").glob("000000.step-*"))

    with worker(spool) as process:
        wait_for(lambda: seen("started") == 2, process=process)
        process.kill()
        process.wait()
    assert read_worker(spool) is not None  # nobody was there to take it back
    assert seen("done") == 0

    with worker(spool, "--lock-wait-s", "5") as process:
        wait_for(lambda: serves(spool, process.pid), process=process)
        # A second one on the same spool leaves, with one sentence and the status of "not ready".
        second = subprocess.run(
            command(spool, "--lock-wait-s", "0"),
            cwd=ROOT,
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert second.returncode == 4
        assert b"another worker serves" in second.stderr
        assert second.stderr.count(b"\n") == 1

        wait_for(lambda: spool.result(job.id).exists(), process=process)
        assert alive_age(spool) < 30
        spool.job("tiny.1").write_bytes(b"{ garbage")
        wait_for(lambda: last_status(spool, "tiny.1"), process=process)
        assert last_status(spool, "tiny.1").code == "job.malformed"
        request_drain(spool)
        assert process.wait(timeout=30) == 0

    assert broken.delta(job).tobytes() == whole.delta(job).tobytes()
    assert broken.result(job).loss_nats == whole.result(job).loss_nats


@pytest.mark.parametrize(
    ("module", "ranks"), [("node_agent.flower", None), ("node_agent.worker", 1)]
)
def test_a_worker_does_not_outlive_its_agent(tmp_path, module, ranks):
    """The agent is SIGKILLed; with torchrun in between, torchrun and the rank must go too."""
    spool = Spool(tmp_path / "spool").make()
    line = command(spool, "--exit-with-parent", module=module, ranks=ranks)
    agent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *line], cwd=ROOT, stdout=subprocess.PIPE
    )
    child = int(agent.stdout.readline())
    try:
        info = wait_for(lambda: read_worker(spool), process=agent)
        started, serving = Process.of(child), Process.of(info.pid)
        assert started.lives()
        assert serving.lives()
        agent.kill()
        agent.wait()

        wait_for(lambda: not serving.lives() and not started.lives())
        assert read_worker(spool) is None  # it left politely, before its grace was over
    finally:
        agent.kill()
        agent.wait()
        agent.stdout.close()
        if (process := Process.of(child)).lives():
            os.kill(process.pid, signal.SIGKILL)


def test_a_worker_that_may_outlive_its_agent_does(tmp_path):
    """Without --exit-with-parent (a Slurm allocation) the test above must fail."""
    spool = Spool(tmp_path / "spool").make()
    line = command(spool, module="node_agent.flower")
    agent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *line], cwd=ROOT, stdout=subprocess.PIPE
    )
    agent.stdout.readline()
    info = wait_for(lambda: read_worker(spool), process=agent)
    serving = Process.of(info.pid)
    agent.kill()
    agent.wait()
    agent.stdout.close()
    first = spool.alive.stat().st_mtime_ns

    wait_for(lambda: spool.alive.stat().st_mtime_ns > first)  # it beats on
    assert serving.lives()
    os.kill(info.pid, signal.SIGTERM)
    wait_for(lambda: not serving.lives())


def test_cuda_that_is_not_there_is_said(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    spool = Spool(tmp_path / "spool")
    found = subprocess.run(
        command(spool, "--device", "cuda"), cwd=ROOT, capture_output=True, check=False
    )

    assert found.returncode == 3
    assert b"torch finds no CUDA device" in found.stderr
    assert b"Traceback" not in found.stderr


def test_the_first_model_is_written_and_named(tmp_path):
    """``init_model`` twice: the same bytes, the digests it prints, and a model that can be used."""
    import json

    import numpy as np

    from node_agent.worker.init_model import main
    from protocols.tensors.manifest import Manifest
    from protocols.tensors.units import blob_digest
    from tests.support.worker import TINY

    (tmp_path / "model.json").write_text(json.dumps({"model": {"config": TINY, "seed": 7}}))
    found = subprocess.run(
        [sys.executable, "-m", "node_agent.worker.init_model",
         "--plan", str(tmp_path / "model.json"), "--out", str(tmp_path / "a")],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    assert main(["--plan", str(tmp_path / "model.json"), "--out", str(tmp_path / "b")]) == 0

    facts = json.loads(found.stdout)
    for name in ("theta.f32", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    theta = (tmp_path / "a" / "theta.f32").read_bytes()
    manifest = Manifest.from_bytes((tmp_path / "a" / "manifest.json").read_bytes())
    assert facts == {
        "manifest": manifest.digest,
        "theta": blob_digest(theta),
        "coordinates": manifest.coordinates,
        "tensors": len(manifest.tensors),
    }
    values = np.frombuffer(theta, dtype="<f4")
    embedding = manifest.segment("model.embed_tokens.weight")
    norm = manifest.segment("model.norm.weight")
    assert values[embedding.start : embedding.stop].std() == pytest.approx(0.02, rel=0.05)
    assert (values[norm.start : norm.stop] == 1).all()
    assert main(["--plan", str(tmp_path / "nowhere.json"), "--out", str(tmp_path / "c")]) == 3
    (tmp_path / "bad.json").write_text('{"model": {"config": {"vocab_size": 3}}}')
    assert main(["--plan", str(tmp_path / "bad.json"), "--out", str(tmp_path / "c")]) == 3


def test_a_finished_job_is_not_done_twice_by_two_workers(tmp_path):
    site = make_site(tmp_path, local_step={"max_steps": 1})
    job = site.ask()
    Worker(site).answer()
    made = site.spool.result(job.id).stat().st_mtime_ns
    Worker(site).answer()

    assert final(site, job).event == "done"
    assert site.spool.result(job.id).stat().st_mtime_ns == made
