"""On a CUDA device: the worker over NCCL from job to result. What steps cost: test_costs.py.

Skipped, with the reason, where there is no device; nothing else in the project needs one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from node_agent.spool import last_status, read_worker
from tests.support.training import Worker, make_site
from tests.support.worker import final, wait_for, worker

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"
)


@needs_cuda
def test_one_rank_over_nccl_does_a_job(tmp_path):
    """The same job on the device (bfloat16 matrices) and on the CPU (float32): nearly one update.

    bfloat16 matrices cost 2e-6 of the cosine in these four steps (seen with autocast on the CPU);
    another order of the same documents costs 0.12, which is the control.
    """
    step = {"optimizer": "sgd", "lr": 0.1, "max_steps": 4, "grad_clip": 1.0}
    gpu, cpu, other = (
        make_site(tmp_path / name, local_step=step) for name in ("gpu", "cpu", "other")
    )
    job = cpu.ask()
    Worker(cpu).answer()
    other.ask(seed=99)
    Worker(other).answer()
    with worker(gpu.spool, "--device", "cuda", ranks=1) as process:
        info = read_worker(gpu.spool)
        gpu.ask()
        wait_for(lambda: final(gpu, job), process=process)
        again = gpu.ask(1)  # moments and weights stay on the device between rounds
        wait_for(lambda: final(gpu, again), process=process)
        gpu.spool.drain.touch()
        assert process.wait(timeout=60) == 0

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert info.backend == "cpu:gloo,cuda:nccl"
    assert last_status(gpu.spool, job.id).event == "done"
    result = gpu.result(job)
    assert result.device == torch.cuda.get_device_name(0)
    assert result.rank_steps == (4,)
    assert cosine(gpu.delta(job), cpu.delta(job)) > 0.999
    assert cosine(other.delta(job), cpu.delta(job)) < 0.97  # the control
    wanted = cpu.result(job).evaluation[0].nll_nats
    assert result.evaluation[0].nll_nats == pytest.approx(wanted, rel=0.01)
    assert gpu.result(again).steps == 4
