"""Jobs, plans and text for tests of the worker and the Flower host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from node_agent.spool import (
    DataPaths,
    Job,
    Result,
    Spool,
    StatusEvent,
    last_status,
    read_result,
    read_worker,
    write_job,
)
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest

ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
RUN = "tiny"
SENTENCES = (
    "La minga es trabajo que una comunidad hace junta.",
    "Ninguna casa podría hacerlo sola.",
    "O mutirão começa cedo e termina com uma festa.",
    "Nadie cobra; todos comen.",
    "Água, terra e palavra são de todos.",
)


def write_text(path: Path, *, documents: int, seed: int = 0, lang: str | None = None) -> Path:
    """A JSONL file of short documents, different for each seed."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(documents):
        chosen = rng.choice(len(SENTENCES), size=3)
        value: dict[str, Any] = {"text": f"{number}: " + " ".join(SENTENCES[i] for i in chosen)}
        if lang is not None:
            value["lang"] = lang
        lines.append(json.dumps(value, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_plan(manifest: Manifest, *, config: dict[str, Any] | None = None, **fields: Any) -> Plan:
    """A plan of one open run; ``local_step`` and ``evaluation`` may be given as dicts."""
    local = {"optimizer": "sgd", "lr": 0.1, "batch_size": 4, "sequence_length": 32, "max_steps": 4}
    local |= fields.pop("local_step", {})
    return Plan.from_value(
        {
            "federation": "test",
            "run": fields.pop("run", RUN),
            "roster": ["a"],
            "min_participants": 1,
            "rounds": 100,
            "model": {
                "family": "llama",
                "config": TINY if config is None else config,
                "seed": 7,
                "manifest": manifest.digest,
                "initial": "0" * 64,
            },
            "local_step": local,
            "evaluation": {"languages": ["es", "pt"], **fields.pop("evaluation", {})},
            **fields,
        }
    )


@dataclass
class Site:
    """One spool with a model, a plan and data beside it."""

    root: Path
    manifest: Manifest
    plan: Plan
    spool: Spool
    data: DataPaths
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls, root: Path, *, theta: np.ndarray, manifest: Manifest, plan: Plan, documents: int = 40
    ) -> Site:
        root.mkdir(parents=True, exist_ok=True)
        theta.astype("<f4").tofile(root / "theta.f32")
        (root / "manifest.json").write_bytes(manifest.to_bytes())
        (root / "plan.json").write_bytes(plan.to_bytes())
        train = write_text(root / "train.jsonl", documents=documents, seed=1)
        valid = write_text(root / "valid.jsonl", documents=6, seed=2, lang="es")
        data = DataPaths(train=(str(train),), valid=(str(valid),))
        return cls(root, manifest, plan, Spool(root / "spool").make(), data)

    @property
    def theta(self) -> np.ndarray:
        return np.fromfile(self.root / "theta.f32", dtype="<f4")

    def job(self, number: int = 0, **fields: Any) -> Job:
        """The job of one round."""
        made: dict[str, Any] = {
            "id": f"{self.plan.run}.{number}",
            "run": self.plan.run,
            "round": number,
            "index": number,
            "plan": str(self.root / "plan.json"),
            "manifest": str(self.root / "manifest.json"),
            "theta": str(self.root / "theta.f32"),
            "select": "all",
            "data": self.data,
            "seed": 3,
            "threads": 1,
        }
        return Job(**{**made, **fields})

    def ask(self, number: int = 0, **fields: Any) -> Job:
        """Write the job of one round."""
        job = self.job(number, **fields)
        write_job(self.spool, job)
        return job

    def result(self, job: Job) -> Result | None:
        return read_result(self.spool, job, self.manifest)

    def delta(self, job: Job) -> np.ndarray:
        return np.fromfile(self.spool.delta(job.id), dtype="<f4")


def wait_for(
    what: Callable[[], Any], *, process: subprocess.Popen[bytes] | None = None, limit_s: float = 300
) -> Any:
    """Poll until ``what`` is true; a generous limit, so that only a hang trips it."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if value := what():
            return value
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the worker left with {process.returncode} before that")
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def final(site: Site, job: Job) -> StatusEvent | None:
    """The last event, once nothing more will come."""
    if site.spool.result(job.id).exists():
        return last_status(site.spool, job.id)
    last = last_status(site.spool, job.id)
    return last if last and last.event in ("failed", "cancelled", "interrupted") else None


def command(
    spool: Spool, *arguments: str, ranks: int | None = None, module: str = "node_agent.worker"
) -> list[str]:
    """The worker's command line; without ``ranks`` no torchrun."""
    launcher = [sys.executable, "-m"]
    if ranks is not None:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        launcher += ["--max-restarts", "0", "-m"]
    return [*launcher, module, "--spool", str(spool.root), *arguments]


@contextmanager
def worker(
    spool: Spool, *arguments: str, ranks: int | None = None, module: str = "node_agent.worker"
) -> Iterator[subprocess.Popen[bytes]]:
    """A running worker, ready for jobs; gone afterwards whatever happens."""
    with Path(spool.root / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            command(spool, *arguments, ranks=ranks, module=module),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(lambda: read_worker(spool), process=process)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def events(found: Sequence[StatusEvent]) -> list[str]:
    """Their names."""
    return [event.event for event in found]
