"""Rounds in one process, of the real pieces: worker, contribution, sum, outer step.

    each site   Trainer.do(job)             node_agent.worker
                make_contribution           node_agent.contribution      integers [+ masks]
    together    secure sum, or the plain one                              protocols.secagg
                apply_outer_step            protocols.outer_step          the next model

Held-out figures are metrics of the same sums. Centralised training is a federation of one site
that holds all texts, so every row goes through the same code.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from node_agent.contribution import Terms, make_contribution, work_of_result
from node_agent.resident import Clock, Duty, Stop, serve
from node_agent.spool import DataPaths, Job, Spool, WorkerInfo, last_status, read_result, write_job
from node_agent.worker.distributed import Ranks
from node_agent.worker.trainer import Options, Trainer
from protocols.identifiers import NodeId, RoundId
from protocols.outer_step import THETA, apply_outer_step
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.secagg.attempts import attempt_of
from protocols.tensors.layout import VectorLayout
from protocols.tensors.manifest import Manifest
from protocols.tensors.planar import PackedVector
from protocols.tensors.ring import Ring
from protocols.tensors.scales import initial_scales
from protocols.tensors.units import blob_digest
from tests.bench.learning.masks import SecureSum, identity, plain_sum

_ALONE = Ranks(0, 1, torch.device("cpu"), "none")
_INFO = WorkerInfo(pid=1, ranks=1, backend="none", device="cpu", torch="x", started_at=1.0)


def bytes_of(*parts: object) -> bytes:
    """32 bytes that depend on ``parts``: the benchmark is repeatable where a node would draw."""
    return hashlib.sha256(repr(parts).encode()).digest()


@dataclass
class Score:
    """Held-out sums over all sites, by stratum."""

    nll_nats: dict[str, float] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)  # bytes

    def bits(self, name: str | None = None) -> float:
        """Bits per byte of one stratum; None: of everything."""
        names = [name] if name is not None else list(self.size)
        nats, size = sum(self.nll_nats[n] for n in names), sum(self.size[n] for n in names)
        return nats / float(np.log(2)) / size

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, int]) -> Score:
        """From the sums of a round's metrics."""
        made = cls()
        for name, value in metrics.items():
            kind, _, language = name.partition("/")
            if kind == "nll_millinats":
                made.nll_nats[language] = value / 1e3
            elif kind == "bytes":
                made.size[language] = value
        return made


class Site:
    """One institution's worker and the folder of its spool. It serves many runs."""

    def __init__(self, root: Path, name: str, data: DataPaths, *, seed: int) -> None:
        self.name, self.data = name, data
        root.mkdir(parents=True, exist_ok=True)
        self.spool = Spool(root / "spool").make()
        self.uploads = root / "uploads"
        self.uploads.mkdir(exist_ok=True)
        counter = itertools.count()
        options = Options(
            random_bytes=lambda size: hashlib.shake_256(
                bytes_of("noise", seed, name, next(counter))
            ).digest(size)
        )
        self.trainer = Trainer(_ALONE, options=options, clock=Clock(), spool=self.spool)

    def answer(self, job: Job) -> None:
        """Let the worker do one job, as its process would."""
        write_job(self.spool, job)
        stop = Stop(self.spool)
        duty = Duty(
            info=_INFO,
            work=self.trainer.do,
            idle=lambda: stop.tell("nothing to do"),
            fatal=self.trainer.fatal,
        )
        serve(self.spool, duty=duty, stop=stop, clock=Clock(sleep=lambda _: None))


class Federation:
    """A run of one plan over some sites."""

    def __init__(
        self,
        root: Path,
        *,
        plan: Plan,
        manifest: Manifest,
        theta: np.ndarray,
        sites: Mapping[str, Site],
        base: Path | None,
        seed: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.plan, self.manifest = plan, manifest
        self.theta = theta.astype("<f4")
        self.buffers: dict[str, np.ndarray] = {}
        self.counters: dict[str, int] = {"steps": 0}
        self.ring = round_ring(plan)
        self.scales = initial_scales(manifest, plan.vector.scale, self.ring, len(plan.roster))
        self.scores: dict[int, Score] = {}  # of the model before round i
        self.sums: list[str] = []  # digests of the integer sums, metrics (which tell time) apart
        self.tokens = 0
        self._root, self._base, self._seed, self._say = root, base, seed, say
        (root / "plan.json").write_bytes(plan.to_bytes())
        (root / "manifest.json").write_bytes(manifest.to_bytes())
        self._sites = [sites[name] for name in plan.roster]

    def run(self) -> Score:
        """All rounds of the plan; the score of the last model."""
        for index in range(self.plan.total_rounds):
            self.round(index)
        return self.scores[self.plan.rounds]

    def round(self, index: int) -> None:
        """One round: train, sum, step."""
        plan, root = self.plan, self._root
        start = root / f"theta.{index}.f32"
        self.theta.tofile(start)
        layout = round_layout(plan, index, self.manifest)
        round_ = RoundId.parse(f"{plan.run}/{index}")
        model_root = blob_digest(self.theta.tobytes())
        secure = None
        if plan.secagg is not None:
            secure = SecureSum(
                attempt_of(plan, round_, 1, model_root),
                plan.roster,
                self.ring,
                seed=bytes_of("secagg", self._seed, index),
            )
        vectors: dict[str, bytes] = {}
        for site in self._sites:
            result = self._train(site, index, start)
            if result is None:
                raise RuntimeError(f"{site.name}: {last_status(site.spool, self._job(index))}")
            self.tokens += result.tokens
            delta = site.spool.delta(self._job(index))
            record = make_contribution(
                work_of_result(result, delta),
                terms=Terms(
                    plan=plan,
                    node=NodeId(site.name),
                    round=round_,
                    index=index,
                    attempt=1,
                    model_root=model_root,
                ),
                manifest=self.manifest,
                scales=self.scales,
                seed=bytes_of("dither", self._seed, site.name, index),
                masks=None if secure is None else secure.adder(site.name),
                signing_key=identity(site.name),
                uploads=site.uploads,
            )
            spooled = site.uploads / record.file
            vectors[site.name] = spooled.read_bytes()
            spooled.unlink()
            delta.unlink(missing_ok=True)
        packed = (
            plain_sum(vectors, layout, self.ring)
            if secure is None
            else secure.opened(vectors, layout)
        )
        self.sums.append(_digest(packed, layout, self.ring))
        self._step(index, packed, layout)
        start.unlink()
        self._say(self._remark(index))

    def _job(self, index: int) -> str:
        return f"{self.plan.run}.{index}"

    def _train(self, site: Site, index: int, start: Path) -> Any:
        job = Job(
            id=self._job(index),
            run=self.plan.run,
            round=index,
            index=index,
            plan=str(self._root / "plan.json"),
            manifest=str(self._root / "manifest.json"),
            theta=str(start),
            select=self.plan.selection_in(index),
            data=site.data,
            base=None if self._base is None else str(self._base),
            seed=int.from_bytes(bytes_of("data", self._seed, site.name)[:6], "big"),
            threads=int(os.environ.get("MINGA_BENCH_THREADS", "1")),
        )
        site.answer(job)
        return read_result(site.spool, job, self.manifest)

    def _step(self, index: int, packed: bytes, layout: VectorLayout) -> None:
        new = {THETA: np.array(self.theta)}
        new |= {name: np.array(buffer) for name, buffer in self.buffers.items()}

        def keep(name: str, offset: int, data: memoryview) -> None:
            new.setdefault(name, np.zeros_like(self.theta))
            new[name].view(np.uint8)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

        plan, nodes = self.plan, len(self.plan.roster)
        result = apply_outer_step(
            outer=plan.outer,
            scale_rule=plan.vector.scale,
            layout=layout,
            manifest=self.manifest,
            snapshot_counters=self.counters,
            theta=self.theta,
            buffers=self.buffers,
            scales=self.scales,
            sum_reader=packed,
            ring=self.ring,
            nodes=nodes,
            roster=nodes,
            writer=keep,
        )
        self.theta = new[THETA]
        self.buffers = {name: new[name] for name in result.buffer_roots}
        self.counters, self.scales = dict(result.counters), result.next_scales
        if plan.evaluates_in(index):
            self.scores[index] = Score.of_metrics(result.metrics)
        self.clamped = result.metrics.get("clamped", 0)

    def _remark(self, index: int) -> str:
        score = self.scores.get(index)
        bits = "" if score is None else f": {score.bits():.4f} bits per byte before it"
        return f"round {index + 1} of {self.plan.total_rounds}{bits}"


def _digest(packed: bytes, layout: VectorLayout, ring: Ring) -> str:
    """Of the model coordinates of a sum."""
    values = np.empty(layout.model_coordinates, np.int32)
    PackedVector(packed, layout.coordinates, ring).read_centred(0, values.size, values)
    return hashlib.sha256(values.astype("<i4").tobytes()).hexdigest()
