"""A site's training between receiving a model and being ready: optimizer steps in a time box.

The site's batch is the same whatever the number of ranks: sequences ``p`` to ``p + batch_size`` of
its endless row, dealt out in turn; the loss is the mean over the batch's predicted tokens. So one
process and many do the same arithmetic up to the order of a sum.

Before each step the ranks meet once (agreement.py). Rank 0's clock decides whether there is
another step, so all ranks do the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch

from node_agent.job_files import least
from node_agent.resident import Clock, JobContext, JobFailedError
from node_agent.spool import Job
from node_agent.worker.agreement import Decision, Gate
from node_agent.worker.data import IGNORE
from node_agent.worker.distributed import Ranks
from node_agent.worker.mixture import Sequences
from node_agent.worker.model import ResidentModel, on_device
from node_agent.worker.optimizer import InnerOptimizer
from node_agent.worker.state import Progress
from node_agent.worker.text_files import DataError
from node_agent.worker.tokens import PAD, Tokens
from protocols.plan import LocalStep

_SAY_EVERY_S: Final = 1.0  # between two progress events


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The time box. None does not limit; the first limit that is reached ends training."""

    max_steps: int | None
    max_tokens: int | None
    max_seconds: float | None
    deadline_unix: float | None

    @classmethod
    def of(cls, job: Job, step: LocalStep) -> Self:
        """The narrower of what the job and the plan allow."""

        steps = least(job.max_steps, step.max_steps)
        tokens = least(job.max_tokens, step.max_tokens)
        return cls(
            max_steps=None if steps is None else int(steps),
            max_tokens=None if tokens is None else int(tokens),
            max_seconds=least(job.max_seconds, step.max_seconds),
            deadline_unix=job.deadline_unix,
        )

    @property
    def bounded(self) -> bool:
        """Whether training ever ends by itself."""
        limits = (self.max_steps, self.max_tokens, self.max_seconds, self.deadline_unix)
        return any(limit is not None for limit in limits)

    def reached(self, progress: Progress, *, now: float) -> bool:
        """Whether another step would be too much.

        A step is not begun when the mean step so far would carry it past the deadline; the other
        limits stop after the step that reaches them.

        Args:
            progress: what has been done.
            now: unix seconds.
        """
        mean = progress.seconds / progress.steps if progress.steps else 0.0
        if self.deadline_unix is not None and now + mean > self.deadline_unix:
            return True
        if not progress.steps:
            return False  # the smallest box holds one step
        return (
            (self.max_steps is not None and progress.steps >= self.max_steps)
            or (self.max_tokens is not None and progress.tokens >= self.max_tokens)
            or (self.max_seconds is not None and progress.seconds >= self.max_seconds)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's share of one optimizer step."""

    inputs: Tokens  # shape [rows of this rank, sequence_length]
    labels: Tokens  # likewise
    tokens: int  # predicted in the whole batch, over all ranks
    records: int  # sequences in the whole batch


def read_batch(text: Sequences, position: int, *, step: LocalStep, ranks: Ranks) -> Batch:
    """Read this rank's sequences of the batch that begins at ``position``.

    Ranks get equally many rows, because each must take part in every collective; a missing row is
    all padding.

    Raises:
        DataError: data.changed.
    """
    rows = -(-step.batch_size // ranks.world)
    inputs = np.full((rows, step.sequence_length), PAD, dtype=np.int64)
    labels = np.full((rows, step.sequence_length), IGNORE, dtype=np.int64)
    for row, offset in enumerate(range(ranks.rank, step.batch_size, ranks.world)):
        inputs[row], labels[row] = text.sequence(position + offset)
    tokens = sum(text.predicted(position + offset) for offset in range(step.batch_size))
    return Batch(inputs=inputs, labels=labels, tokens=tokens, records=step.batch_size)


@dataclass(slots=True, kw_only=True)
class LocalStepRun:
    """The training of one job: what it works on and how far it is."""

    model: ResidentModel
    optimizer: InnerOptimizer
    text: Sequences
    step: LocalStep
    limits: Limits
    ranks: Ranks
    gate: Gate
    clock: Clock
    micro_batch: int  # rows per forward pass; 0 takes the whole batch at once
    position: int  # next sequence
    progress: Progress
    context: JobContext | None = None  # on rank 0
    my_steps: int = 0
    put_away_every_s: float | None = None  # None: only when the job is interrupted
    put_away: Callable[[], None] = lambda: None  # the middle, on all ranks together

    def run(self) -> None:
        """Train until the time box is full, or the agent asks for what is done.

        ``progress`` and ``position`` are right whenever this returns or raises, so an interrupted
        job can be put away as it is.

        Raises:
            JobFailedError: train.non_finite, data.changed.
            JobCancelledError, JobInterruptedError: between two steps.
        """
        self.model.module.train()
        said = _Spoken(self.clock.monotonic(), self.progress.tokens, self.progress.loss_nats)
        loss, began = 0.0, self.clock.monotonic()
        before, kept_at = self.progress.seconds, began
        while True:
            self.progress.seconds = before + self.clock.monotonic() - began
            batch, trouble = self._read()
            meeting = self.gate.meet(
                [loss],
                enough=self._enough(),
                due=self._due(kept_at),
                trouble=trouble,
            )
            loss = 0.0
            self.progress.loss_nats += meeting.sums[0]
            if not math.isfinite(meeting.sums[0]):
                raise JobFailedError(
                    "train.non_finite",
                    f"the loss became NaN or infinite at step {self.progress.steps}",
                )
            if self.context is not None:
                said.perhaps(self.context, self.progress, self.limits, self.clock.monotonic())
            self.gate.leave(meeting.decision)
            if meeting.decision is Decision.ENOUGH or batch is None:
                return
            if meeting.decision is Decision.PUT_AWAY:
                self.put_away()
                kept_at = self.clock.monotonic()
            loss = self._backward(batch)
            self.optimizer.apply()
            self.position += batch.records
            self.progress.steps += 1
            self.progress.tokens += batch.tokens
            self.progress.records += batch.records
            self.my_steps += 1

    def _enough(self) -> bool:
        """Whether the box is full, or the agent wants no further step. Rank 0's answer counts."""
        told = self.context is not None and self.context.to_finish()
        return told or self.limits.reached(self.progress, now=self.clock.now())

    def _due(self, kept_at: float) -> bool:
        every = self.put_away_every_s
        return every is not None and self.clock.monotonic() - kept_at >= every

    def _read(self) -> tuple[Batch | None, DataError | None]:
        try:
            return read_batch(self.text, self.position, step=self.step, ranks=self.ranks), None
        except DataError as error:
            return None, error

    def _backward(self, batch: Batch) -> float:
        """Gradients of the mean loss over the whole batch; returns this rank's sum in nats.

        FSDP2 averages gradients over ranks, hence the factor ``world``.
        """
        total = 0.0
        for rows in _slices(batch.inputs.shape[0], self.micro_batch):
            nll_B = self.model.nll(
                on_device(batch.inputs[rows], self.ranks.device),
                on_device(batch.labels[rows], self.ranks.device),
            )
            loss = nll_B.sum()
            torch.autograd.backward(loss * (self.ranks.world / batch.tokens))
            total += loss.item()
        return total


def _slices(rows: int, size: int) -> Iterator[slice]:
    size = size or rows
    for start in range(0, rows, size):
        yield slice(start, start + size)


@dataclass(slots=True)
class _Spoken:
    """What the last progress event said, so that the next one speaks of what came after."""

    at: float  # monotonic seconds
    tokens: int
    loss_nats: float

    def perhaps(
        self, context: JobContext, progress: Progress, limits: Limits, monotonic: float
    ) -> None:
        """Say how far training is, about once a second."""
        tokens, seconds = progress.tokens - self.tokens, monotonic - self.at
        if seconds < _SAY_EVERY_S or not tokens:
            return
        context.say(
            "progress",
            step=progress.steps,
            max_steps=limits.max_steps,
            tokens=progress.tokens,
            loss=(progress.loss_nats - self.loss_nats) / tokens,
            tokens_per_s=tokens / seconds,
        )
        self.at, self.tokens, self.loss_nats = monotonic, progress.tokens, progress.loss_nats
