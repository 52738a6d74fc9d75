"""DP-SGD at a site: a fixed number of steps, each on a Poisson sample, clipped, with noise.

    rank 0   draws the sample; all ranks hear it                            poisson.py
    all      read their records and meet (agreement.py)
    all      S = sum of clipped gradients of their records                  per_record.py
    all      one all-reduce                                                 several ranks
    rank 0   S -> whole numbers + discrete Gaussian, over the public        private_noise.py
             expected batch; all ranks get the same
    all      optimizer step: only noisy numbers reach it

Mode ``record-distributed`` stops after the all-reduce of its single step: what is handed to the
agent is ``-S / B``, a descent direction *without noise* that one record moves by at most C / B. The
agent adds this site's share of the noise before anything leaves it. B is the public expected batch.

An empty sample is a step like any other. A private step never looks at the clock to decide how
many steps there are; a job that cannot do all of them fails, and nothing of it is sent.

Chance comes from the operating system in every step anew and is stored nowhere. So a job that was
interrupted goes on with its steps, and one that was killed starts again, without ever using noise
twice: the promise is for the update that is handed over, and no other draw leaves the process.
Normative text: protocols/spec/private-step.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from node_agent.resident import Clock, JobContext, JobFailedError
from node_agent.spool import PrivateReport
from node_agent.worker.agreement import Gate, agree
from node_agent.worker.distributed import Ranks
from node_agent.worker.model import ResidentModel
from node_agent.worker.optimizer import InnerOptimizer
from node_agent.worker.per_record import ClippedSum
from node_agent.worker.poisson import poisson_sample
from node_agent.worker.private_noise import StepSeeds, noised
from node_agent.worker.records import Record, Records
from node_agent.worker.state import Progress
from node_agent.worker.text_files import DataError
from policies.privacy.terms import LocalNoise, local_noise
from protocols.noise.streams import SEED_BYTES
from protocols.plan import Plan

_SAY_EVERY_S: Final = 1.0  # between two progress events


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the plan promises, as the step needs it. Public, all of it."""

    clip_norm: float  # C, L2, of one record
    rate: Fraction  # q
    divisor: float  # B, the expected batch, records
    steps: int
    noise: LocalNoise | None  # None: it is added later, under the secure sum

    @classmethod
    def of(cls, plan: Plan, coordinates: int) -> Self:
        """The terms of a plan that protects records.

        Args:
            plan: in mode record-local or record-distributed.
            coordinates: d, of all trained tensors.
        """
        privacy = plan.privacy
        if privacy is None or privacy.sampling_rate is None or privacy.expected_batch is None:
            raise ValueError(f"mode {plan.mode} does not protect records")
        shared = plan.mode == "record-distributed"
        return cls(
            clip_norm=privacy.clip_norm,
            rate=Fraction(privacy.sampling_rate),
            divisor=privacy.expected_batch,
            steps=privacy.steps or 1,
            noise=None if shared else local_noise(privacy, coordinates),
        )


@dataclass(slots=True, kw_only=True)
class PrivateRun:
    """The private training of one job: what it works on and how far it is."""

    model: ResidentModel
    optimizer: InnerOptimizer
    records: Records
    sums: ClippedSum
    terms: Terms
    ranks: Ranks
    gate: Gate
    clock: Clock
    random_bytes: Callable[[int], bytes] = field(repr=False)
    deadline_unix: float | None
    progress: Progress
    context: JobContext | None = None  # on rank 0
    my_steps: int = 0

    def run(self) -> None:
        """Do every step of the plan.

        ``progress`` is right whenever this returns or raises.

        Raises:
            JobFailedError: private.deadline: not all steps fit; train.non_finite; data.changed.
            JobCancelledError, JobInterruptedError: between two steps.
        """
        self.model.module.train()
        began, before = self.clock.monotonic(), self.progress.seconds
        said = began
        tally = [0.0, 0.0, 0.0, 0.0]  # of the step before: sampled, clipped, not finite, empty
        while True:
            self.progress.seconds = before + self.clock.monotonic() - began
            done = self.progress.steps >= self.terms.steps
            chosen = np.empty(0, np.int64) if done else self._sample()
            mine, passes, trouble = self._read(chosen)
            meeting = self.gate.meet(tally, enough=done, trouble=trouble or self._late(done=done))
            self._count(meeting.sums)
            if self.context is not None and self.clock.monotonic() - said >= _SAY_EVERY_S:
                # Steps alone: how many tokens a sample has would tell of it.
                self.context.say("progress", step=self.progress.steps, max_steps=self.terms.steps)
                said = self.clock.monotonic()
            self.gate.leave(meeting.decision)
            if done:
                return
            found = self.sums.fill(mine, passes=passes)
            tally = [found.records, found.clipped, found.not_finite, 0.0]
            if self.ranks.first:
                tally[3] = float(chosen.size == 0)
            if self.ranks.sharded:
                dist.all_reduce(self.sums.total_D)
            if self.terms.noise is not None:
                self._update(self.terms.noise)
            self.progress.steps += 1
            self.my_steps += 1

    def shared_sum(self) -> list[tuple[str, NDArray[np.float32]]]:
        """``-S / B`` of the last step, tensor by tensor, flat; float32, without noise."""
        return [
            (part.name, (view / -self.terms.divisor).to(torch.float32).cpu().numpy())
            for part, view in zip(self.model.trainable, self.sums.parts(), strict=True)
        ]

    def report(self) -> PrivateReport:
        """What the operator of this site may see, and nobody else."""
        progress, records = self.progress, self.records
        return PrivateReport(
            way=self.sums.way,
            records=len(records),
            expected_batch=self.terms.divisor,
            sampled=progress.sampled,
            clipped=progress.clipped,
            not_finite=progress.not_finite,
            empty_steps=progress.empty_steps,
            unused_rows=records.all_rows - records.used_rows,
            noise="later" if self.terms.noise is None else "added",
        )

    # -- parts of a step -------------------------------------------------------------------------

    def _sample(self) -> NDArray[np.int64]:
        """The step's records, by number: drawn by rank 0, the same on every rank."""
        drawn = None
        if self.ranks.first:
            seed = self.random_bytes(SEED_BYTES)
            drawn = poisson_sample(len(self.records), self.terms.rate, seed)
        chosen: NDArray[np.int64] = self.ranks.told(drawn)
        return chosen

    def _read(self, chosen: NDArray[np.int64]) -> tuple[list[Record], int, JobFailedError | None]:
        """This rank's records, and the passes that every rank makes.

        Long records are dealt out first, in turn, so that ranks have about as much to do.
        """
        world, rank = self.ranks.world, self.ranks.rank
        numbers = sorted(chosen.tolist(), key=lambda number: (-self.records.rows(number), number))
        passes = 0
        if self.model.has_shards:
            passes = max(
                self.sums.passes([self.records.rows(n) for n in numbers[first::world]])
                for first in range(world)
            )
        try:
            return [self.records.read(n) for n in numbers[rank::world]], passes, None
        except DataError as error:
            return [], passes, error

    def _late(self, *, done: bool) -> JobFailedError | None:
        """Why there is no time for the rest, if so. Rank 0's clock decides."""
        if done or not self.ranks.first or self.deadline_unix is None:
            return None
        steps = self.progress.steps
        mean = self.progress.seconds / steps if steps else 0.0
        if self.clock.now() + mean <= self.deadline_unix:
            return None
        return JobFailedError(
            "private.deadline",
            f"the deadline came after {steps} of {self.terms.steps} steps; a private update"
            " has all of them or is not sent",
        )

    def _count(self, sums: Sequence[float]) -> None:
        sampled, clipped, not_finite, empty = (int(value) for value in sums)
        self.progress.sampled += sampled
        self.progress.clipped += clipped
        self.progress.not_finite += not_finite
        self.progress.empty_steps += empty

    def _update(self, noise: LocalNoise) -> None:
        """Noise on rank 0, the same noisy mean on all, one step of the optimizer."""
        mean_D = torch.empty(
            self.sums.total_D.numel(), dtype=torch.float32, device=self.ranks.device
        )

        def add_noise() -> None:
            if not self.ranks.first:
                return
            seeds = StepSeeds(self.random_bytes(SEED_BYTES), self.random_bytes(SEED_BYTES))
            parts = (part.cpu().numpy() for part in self.sums.parts())
            at = 0
            for part in noised(parts, noise=noise, seeds=seeds, divisor=self.terms.divisor):
                mean_D[at : at + part.size] = torch.from_numpy(part)
                at += part.size

        agree(self.ranks, add_noise)
        if self.ranks.sharded:
            dist.broadcast(mean_D, src=0)
        at = 0
        for part in self.model.trainable:
            size = part.whole.numel()
            part.whole.grad = mean_D[at : at + size].view_as(part.whole)
            at += size
        self.optimizer.apply()
