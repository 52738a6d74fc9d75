"""The launcher against a real Slurm of two nodes: one torchrun on each, one worker over both."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from node_agent.spool import last_status, read_worker
from node_agent.worker.init_model import write_model
from tests.faults.test_launcher_slurm import Bench
from tests.support.slurm import cluster, wait, why_not
from tests.support.training import Worker
from tests.support.worker import TINY, Site, make_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def test_two_nodes_train_as_one_process_does(tmp_path, tmp_path_factory):
    """The ranks meet over the name of the allocation's first node, as on a real cluster."""
    manifest, _ = write_model(tmp_path / "model", config=TINY, seed=7)
    theta = np.fromfile(tmp_path / "model" / "theta.f32", dtype="<f4")
    step = {"optimizer": "sgd", "lr": 0.2, "max_steps": 4, "batch_size": 5}
    plan = make_plan(manifest, local_step=step, evaluation={"languages": []})
    one, two = (
        Site.make(tmp_path / name, theta=theta, manifest=manifest, plan=plan)
        for name in ("one", "two")
    )
    alone = one.ask()
    Worker(one).answer()
    with cluster(tmp_path_factory.mktemp("two"), nodes=2) as slurm:
        arguments = ("node_agent.worker", "--spool", str(two.spool.root), "--device", "cpu")
        bench = Bench(
            tmp_path,
            slurm,
            spool=two.spool,
            worker=arguments,
            config={"nodes": 2},
            start_within_s=600.0,
            hangs_after_s=600.0,
        )
        jobs = [two.job(number) for number in range(2)]
        for job in jobs:
            assert bench.finish(job, patience_s=600).state == "finished", (
                last_status(two.spool, job.id),
                bench.log(),
            )
        info = read_worker(two.spool)
        (number,) = bench.mine()
        (mine,) = (job for job in slurm.jobs() if job["job_id"] == number)
        hosts = slurm.run("scontrol", "show", "hostnames", mine["nodes"]).split()
        bench.close()
        wait(lambda: not slurm.under_way(), "the allocation to end")

    assert sorted(hosts) == sorted([socket.gethostname(), "localhost"])
    assert (info.ranks, info.backend) == (2, "gloo")
    result = two.result(jobs[0])
    assert result.rank_steps == (4, 4)
    np.testing.assert_allclose(two.delta(jobs[0]), one.delta(alone), atol=1e-6, rtol=0)
    assert np.abs(one.delta(alone)).max() > 0.01
