"""In place of the worker: a trainer without torch that gives the same update every time.

Node ``i`` of the roster moves every coordinate by ``4**i * (1 + 256 * index)`` steps of the fixed
grid in the plan's round ``index``, so the digits of a sum name who was counted, and for which
round. It lies exactly on the grid, where rounding draws nothing, but for the last coordinates: they
lie between two steps, so a vector that is made twice is another one the second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from node_agent.launchers.jobs import Launcher
from node_agent.spool import Job, PrivateReport, Result, atomic_write, read_job
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest
from protocols.tensors.units import blob_digest

EXPONENT = 10  # of the fixed grid: steps of 2**-10
BETWEEN = 8  # coordinates that rounding decides by chance


def steps_of(place: int, index: int) -> int:
    """How far a node moves every coordinate, in steps of the grid."""
    return int(4**place * (1 + 256 * index))


@dataclass(slots=True, kw_only=True)
class Trainer(Launcher):
    """A launcher whose worker is a timer."""

    node: str
    monotonic: Callable[[], float]
    takes: Callable[[], float]  # seconds of the next job
    _due: dict[str, float] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return "simulated"

    def clear_leftovers(self) -> str | None:
        return None

    def submit(self, job: Job) -> None:
        Launcher.submit(self, job)
        self._due.setdefault(job.id, self.monotonic() + self.takes())

    def forget(self, name: str) -> None:
        self._due.pop(name, None)
        Launcher.forget(self, name)

    async def tick(self) -> None:
        now = self.monotonic()
        for name in list(self._wanted):
            due = self._due.get(name, now + 1) <= now
            if due and self.spool.job(name).exists() and not self.spool.result(name).exists():
                self._answer(read_job(self.spool.job(name)))

    async def close(self) -> None: ...

    def _answer(self, job: Job) -> None:
        plan = Plan.from_bytes(Path(job.plan).read_bytes())
        manifest = Manifest.from_bytes(Path(job.manifest).read_bytes())
        count = sum(segment.coordinates for segment in manifest.select(job.select))
        place = plan.roster.index(self.node)
        value = steps_of(place, job.index) * 2.0**-EXPONENT
        delta = np.full(count, value, "<f4")
        delta[-BETWEEN:] += 2.0 ** -(EXPONENT + 1)
        data = delta.tobytes()
        self.spool.out(job.id).mkdir(parents=True, exist_ok=True)
        atomic_write(self.spool.delta(job.id), data)
        private, terms = None, plan.privacy
        if terms is not None:
            private = PrivateReport(
                way="loop",
                records=10,
                expected_batch=float(terms.expected_batch or 1.0),
                sampled=10,
                clipped=0,
                not_finite=0,
                empty_steps=0,
                unused_rows=0,
                noise="added" if plan.mode == "record-local" else "later",
            )
        result = Result(
            id=job.id,
            steps=(terms.steps or 1) if terms is not None else 2,
            tokens=0 if terms is not None else 4**place,
            records=0 if terms is not None else 1,
            loss_nats=0.0,
            seconds=0.0,
            delta_root=blob_digest(data),
            delta_coordinates=count,
            delta_norm=float(np.linalg.norm(delta.astype(np.float64))),
            device="none",
            private=private,
        )
        atomic_write(self.spool.result(job.id), result.to_bytes())
