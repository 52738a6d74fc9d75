"""On a CUDA device: the worker over NCCL from job to result, and what a large step costs.

Skipped, with the reason, where there is no device; nothing else in the project needs one. Run with
``pytest -s tests/gpu`` to see the figures. Takes under three minutes on one data-centre GPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from node_agent.spool import last_status, read_worker
from node_agent.worker.distributed import Ranks
from node_agent.worker.model import ResidentModel
from node_agent.worker.optimizer import InnerOptimizer
from protocols.plan import LocalStep
from tests.support.training import Worker, make_site
from tests.support.worker import final, wait_for, worker

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"
)

# Dense bfloat16 peak of the datasheets, FLOP/s.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
# The shape of TinyLlama-1.1B with a vocabulary of bytes: 0.97e9 parameters.
BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one optimizer step costs."""

    parameters: int
    tokens_per_s: float
    flops: float  # model FLOP/s: 6 N per token and the attention's 6 L h s, causal
    first_loss: float  # nats per token
    last_loss: float
    peak_bytes: int


def measure(config: dict[str, Any], *, device: str, batch: int, length: int, steps: int) -> Cost:
    """Time optimizer steps on one repeated batch of random bytes, weights drawn on the device."""
    ranks = Ranks(0, 1, torch.device(device), "none")
    model = ResidentModel(config, select="all", ranks=ranks, checkpointing=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for part in model.trainable:
            if part.leaf.ndim < 2:
                part.leaf.fill_(1.0)
            else:
                part.leaf.normal_(std=0.02)
    step = LocalStep(optimizer="adamw", lr=3e-4, grad_clip=1.0, max_steps=steps)
    optimizer = InnerOptimizer(model, step, ranks)
    tokens = torch.randint(0, 256, (batch, length + 1), device=device)
    losses = []

    def one() -> None:
        nll = model.nll(tokens[:, :-1], tokens[:, 1:]).sum() / (batch * length)
        nll.backward()
        optimizer.apply()
        losses.append(nll.item())

    for _ in range(3):  # kernels are chosen and memory is taken
        one()
    began = time.perf_counter()
    for _ in range(steps):
        one()  # ``item`` waits for the device
    rate = steps * batch * length / (time.perf_counter() - began)
    n = model.manifest.coordinates
    attention = 6 * config["num_hidden_layers"] * config["hidden_size"] * length
    return Cost(
        parameters=n,
        tokens_per_s=rate,
        flops=rate * (6 * n + attention),
        first_loss=losses[0],
        last_loss=losses[-1],
        peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else 0,
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


@needs_cuda
def test_a_step_of_a_billion_parameters():
    """No target: the figures are printed. What must hold is that the step learns."""
    cost = measure(BILLION, device="cuda", batch=8, length=2048, steps=10)
    name = torch.cuda.get_device_name(0)
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    share = f"{cost.flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else "peak unknown"
    print(
        f"\n{name}: {cost.parameters / 1e9:.2f}e9 parameters, {cost.tokens_per_s:,.0f} tokens/s,"
        f" {cost.flops / 1e12:.0f} model TFLOP/s ({share}),"
        f" {cost.peak_bytes / 2**30:.0f} GiB at the peak"
    )

    assert 5.0 < cost.first_loss < 6.5  # ln 259 = 5.56: it knows nothing yet
    assert cost.last_loss < cost.first_loss - 0.1


def test_the_measurement_itself_works_without_a_device():
    """The code above must not rot where nobody has a GPU."""
    tiny = BILLION | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    cost = measure(tiny, device="cpu", batch=2, length=16, steps=2)

    assert cost.parameters == 259 * 64 * 2 + 64 * 64 * 3 + 64 * 96 * 3 + 64 * 3
    assert cost.flops > 0
    assert cost.last_loss < cost.first_loss
