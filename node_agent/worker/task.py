"""One job on one rank: recall, evaluate, train, remember, write the update.

Everything here is done by all ranks in the same order; only rank 0 has a context, so only rank 0
speaks and writes results. See trainer.py for the order of a whole job.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from node_agent.job_files import Theta
from node_agent.model_folder import ModelFolder
from node_agent.resident import Clock, JobContext, JobFailedError, JobInterruptedError
from node_agent.spool import DeltaSummary, DeltaWriter, Job, Spool
from node_agent.worker import state
from node_agent.worker.agreement import Gate, agree
from node_agent.worker.data import Corpus, HeldOut
from node_agent.worker.distributed import Ranks
from node_agent.worker.evaluation import evaluate
from node_agent.worker.local_step import Limits, LocalStepRun
from node_agent.worker.mixture import Sequences, sequences
from node_agent.worker.model import ResidentModel
from node_agent.worker.optimizer import InnerOptimizer, Moments
from node_agent.worker.per_record import ClippedSum, structure_of
from node_agent.worker.private_path import Setting, Way, rows_at_once, way_for
from node_agent.worker.private_step import PrivateRun, Terms
from node_agent.worker.records import Records
from node_agent.worker.state import Memory, Partial, Progress
from node_agent.worker.tokens import Encoder
from protocols.errors import NonFiniteUpdateError
from protocols.plan import Plan
from protocols.tensors.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """A job with everything that rank 0 read for it."""

    job: Job
    plan: Plan
    manifest: Manifest
    corpora: tuple[Corpus, ...]  # one, or one for each weight; none in an evaluation-only round
    documents: tuple[HeldOut, ...]  # empty when nothing is evaluated
    folder: ModelFolder | None = None  # of the base model, if the plan has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One job on this rank. The model holds theta when it begins."""

    brief: Brief
    model: ResidentModel
    theta: Theta  # float32, shape [D]: the starting model, mapped
    ranks: Ranks
    gate: Gate
    clock: Clock
    spool: Spool
    micro_batch: int
    random_bytes: Callable[[int], bytes] = field(repr=False)
    encoder: Encoder
    context: JobContext | None  # on rank 0
    put_away_every_s: float | None = None  # None: only when the job is interrupted
    put_away: Callable[[], None] = lambda: None  # what else is noted at that moment

    def remark(self, message: str) -> None:
        """Tell the operator what does not stop the job."""
        if self.context is not None:
            print(f"worker: {message}", file=sys.stderr)
            self.context.say("progress", message=message)

    # -- what earlier rounds left ----------------------------------------------------------------

    def recall(self, held: Memory | None) -> Memory | None:
        """The run's memory: ``held`` if it is the one wanted, else from disk; on all ranks alike.

        Args:
            held: what the last job of this process left, of whatever run.

        Returns:
            None to start afresh. With ``partial`` set the model holds the interrupted weights.
        """
        job, ranks = self.brief.job, self.ranks
        if job.select == "none":
            return None
        root = self.spool.state(job.run)
        folder: Path | None = ranks.told(state.choose(root, job) if ranks.first else None)
        if folder is None:
            return None
        optimizer = self.brief.plan.local_step.optimizer
        wanted = (job.run, folder.name, optimizer)
        if held is not None and (held.run, state.folder_name(held), held.optimizer) == wanted:
            return held
        memory = self._read_memory(folder)
        if memory is not None and memory.partial is not None:
            self._restore_weights(memory.partial)
        return memory

    def _read_memory(self, folder: Path) -> Memory | None:
        ranks = self.ranks
        try:
            memory = state.load(folder, ranks, like=self.model.parameter)
        except JobFailedError as error:
            # The moments are a convenience: a site must not be stuck because they are spoilt.
            self.remark(f"{error}; training goes on without it")
            return None
        if memory.optimizer == self.brief.plan.local_step.optimizer:
            return memory
        self.remark(f"the state of {folder.name} is of another optimizer")
        memory.moments, memory.updates, memory.partial = {}, 0, None  # the position still holds
        return memory

    def _restore_weights(self, partial: Partial) -> None:
        with torch.no_grad():
            for part, leaf in zip(self.model.trainable, self.model.leaves(), strict=True):
                leaf.copy_(partial.weights[part.name])

    # -- evaluation ------------------------------------------------------------------------------

    def evaluate(self) -> list[dict[str, Any]]:
        """Score the starting model on the site's held-out documents, if the brief has any."""
        if not self.brief.documents:
            return []
        rows = evaluate(
            self.model,
            self.brief.documents,
            sequence_length=self.brief.plan.local_step.sequence_length,
            ranks=self.ranks,
            gate=self.gate,
            encoder=self.encoder,
        )
        if self.context is not None:
            self.context.say("evaluated", message=f"{len(self.brief.documents)} documents")
        return rows

    # -- training --------------------------------------------------------------------------------

    def train(
        self, memory: Memory | None, evaluation: list[dict[str, Any]]
    ) -> tuple[LocalStepRun, Memory]:
        """Train in the time box.

        Args:
            memory: what ``recall`` found; used up.
            evaluation: rows to keep if the round is interrupted.

        Returns:
            The finished run, and what to ``keep`` once its update is known to be finite.

        Raises:
            JobFailedError: train.non_finite, train.no_steps, data.changed.
            JobCancelledError: nothing is kept.
            JobInterruptedError: the middle is on disk.
        """
        job, step = self.brief.job, self.brief.plan.local_step
        corpora, weights = self.brief.corpora, job.data.weights
        text = agree(
            self.ranks,
            lambda: sequences(
                corpora,
                weights,
                sequence_length=step.sequence_length,
                seed=job.seed,
                encoder=self.encoder,
            ),
        )
        data = _fingerprint(corpora, weights, step.sequence_length, job.seed)
        run = LocalStepRun(
            model=self.model,
            optimizer=InnerOptimizer(self.model, step, self.ranks),
            text=text,
            step=step,
            limits=Limits.of(job, step),
            ranks=self.ranks,
            gate=self.gate,
            clock=self.clock,
            micro_batch=self.micro_batch,
            position=_position(memory, text, data),
            progress=Progress(),
            context=self.context,
        )
        self._resume(run, memory)
        untrained = {} if memory is None else memory.moments

        def remember(partial: Partial | None) -> Memory:
            epoch, index = divmod(run.position, run.text.per_epoch)
            return self._memory(
                run.optimizer, untrained, epoch=epoch, index=index, data=data, partial=partial
            )

        try:
            self._carry_out(run, remember, evaluation)
        finally:
            text.close()
        if not run.progress.steps:
            raise JobFailedError("train.no_steps", "the time was over before the first step")
        return run, remember(None)

    def train_private(
        self,
        records: Records,
        memory: Memory | None,
        evaluation: list[dict[str, Any]],
        *,
        wanted: Way | None = None,
    ) -> tuple[PrivateRun, Memory]:
        """Do the private steps of the plan: all of them, or the job fails.

        Args:
            records: of this site; closed when this returns or raises.
            memory, evaluation: as in ``train``.
            wanted: the way that the site insists on.

        Raises:
            JobFailedError: private.*: the configuration would break the promise, or there was no
                time for all steps; train.non_finite, data.changed.
            JobCancelledError: nothing is kept.
            JobInterruptedError: the middle is on disk: weights that already carry their noise.
        """
        job, plan, ranks = self.brief.job, self.brief.plan, self.ranks
        coordinates = sum(part.whole.numel() for part in self.model.trainable)
        terms = agree(ranks, lambda: Terms.of(plan, coordinates))
        way, rows = agree(ranks, lambda: self._way(records, wanted))
        sums = ClippedSum(self.model, way=way, clip_norm=terms.clip_norm, rows=rows)
        run = PrivateRun(
            model=self.model,
            optimizer=InnerOptimizer(self.model, plan.local_step, ranks),
            records=records,
            sums=sums,
            terms=terms,
            ranks=ranks,
            gate=self.gate,
            clock=self.clock,
            random_bytes=self.random_bytes,
            deadline_unix=job.deadline_unix,
            progress=Progress(),
            context=self.context,
        )
        self._resume(run, memory)
        untrained = {} if memory is None else memory.moments

        def remember(partial: Partial | None) -> Memory:
            return self._memory(run.optimizer, untrained, partial=partial)

        try:
            self._carry_out(run, remember, evaluation)
        finally:
            sums.close()
            records.close()
        said = run.report()
        self.remark(
            f"{said.clipped} of {said.sampled} sampled records were clipped,"
            f" {said.not_finite} left out; {said.unused_rows} sequences of long documents are not"
            " used. This stays at the site."
        )
        return run, remember(None)

    def _way(self, records: Records, wanted: Way | None) -> tuple[Way, int]:
        """How gradients are clipped, and the rows that go through the model together."""
        structure = structure_of(self.model)
        setting = Setting(
            ranks=self.ranks.world,
            loss="record-mean",
            sharded_trainables=any(part.whole is not part.leaf for part in self.model.trainable),
            half_precision=self.ranks.device.type == "cuda",
            longest_record=records.longest,
            wanted=wanted,
        )
        way = way_for(structure, setting)
        return way, rows_at_once(way, structure, setting, micro_batch=self.micro_batch)

    def _carry_out(
        self,
        run: LocalStepRun | PrivateRun,
        remember: Callable[[Partial | None], Memory],
        evaluation: list[dict[str, Any]],
    ) -> None:
        """Run; put the middle away if it is interrupted, and now and then.

        A private run is put away only when it is interrupted: after a kill all of its steps are
        done again, with fresh samples and fresh noise.
        """

        def put_away() -> None:
            middle = Partial(
                work=state.work_of(self.brief.job),
                progress=run.progress,
                evaluation=evaluation,
                weights={part.name: part.leaf.detach() for part in self.model.trainable},
            )
            try:
                self.keep(remember(middle))
                self.put_away()
            except JobFailedError as error:  # what was put away before, if anything, still holds
                self.remark(f"the middle of the round could not be put away: {error}")

        if isinstance(run, LocalStepRun):
            run.put_away, run.put_away_every_s = put_away, self.put_away_every_s
        try:
            run.run()
        except JobInterruptedError:
            put_away()
            raise

    def _resume(self, run: LocalStepRun | PrivateRun, memory: Memory | None) -> None:
        """Hand earlier moments and, after an interruption, the sums so far to this run."""
        step = self.brief.plan.local_step
        partial = memory.partial if memory is not None else None
        if partial is not None and step.proximal_mu:
            self.model.load(self.theta)  # the anchor is theta_t, not the middle of the round
        run.optimizer.anchor()
        if memory is None:
            return
        if partial is not None:
            self._restore_weights(partial)
            run.progress = partial.progress
            run.my_steps = partial.progress.steps
        elif self.brief.job.reset_optimizer or not step.keep_optimizer:
            memory.moments = {}
        if memory.moments and not run.optimizer.resume(memory.moments, updates=memory.updates):
            memory.moments = {}
            self.remark("the optimizer's state does not fit the model; it starts afresh")

    def _memory(
        self,
        optimizer: InnerOptimizer,
        untrained: Moments,
        *,
        epoch: int = 0,
        index: int = 0,
        data: str = "",
        partial: Partial | None = None,
    ) -> Memory:
        """What is worth keeping; moments of tensors that this round did not train are passed on."""
        step = self.brief.plan.local_step
        keep = step.keep_optimizer or partial is not None
        return Memory(
            run=self.brief.job.run,
            round=self.brief.job.round,
            world=self.ranks.world,
            optimizer=step.optimizer,
            updates=optimizer.updates if keep else 0,
            epoch=epoch,
            index=index,
            data=data,
            moments={**untrained, **optimizer.moments()} if keep else {},
            partial=partial,
        )

    def keep(self, memory: Memory) -> Memory:
        """Put the state away.

        Raises:
            JobFailedError: storage.
        """
        root = self.spool.state(memory.run)
        state.save(root, memory, self.ranks, like=self.model.parameter)
        return memory

    # -- the update ------------------------------------------------------------------------------

    def _carried(self) -> list[Theta]:
        """Earlier updates of the same tensors, mapped.

        Raises:
            JobFailedError: job.carry: one has another size.
            OSError: one is gone.
        """
        count = sum(part.whole.numel() for part in self.model.trainable)
        found: list[Theta] = []
        for path in self.brief.job.carry:
            size = Path(path).stat().st_size
            if size != 4 * count:
                raise JobFailedError("job.carry", f"{path} has {size} bytes, not {4 * count}")
            found.append(np.memmap(path, dtype="<f4", mode="r", shape=(count,)))
        return found

    def write_delta(self, shared: Sequence[tuple[str, Theta]] = ()) -> DeltaSummary:
        """Stream the update to disk on rank 0; the others help to gather it.

        Args:
            shared: what is handed over instead of ``local - start``: name and values, in order.

        Raises:
            JobFailedError: train.non_finite: NaN or infinity in a parameter, named; storage.
        """
        ranks = self.ranks
        path = None if self.context is None else self.spool.delta(self.brief.job.id)
        carried = agree(ranks, lambda: self._carried() if ranks.first else [])
        writer = agree(ranks, lambda: None if path is None else DeltaWriter(path))

        def gather() -> DeltaSummary | None:
            failed: NonFiniteUpdateError | OSError | None = None
            at = 0
            for name, part in shared or self.model.difference(self.theta):
                if writer is None or failed is not None:
                    continue  # the other ranks still wait for us in each gather
                try:
                    writer.add(name, _with_carry(part, carried, at))
                    at += part.size
                except (NonFiniteUpdateError, OSError) as error:
                    failed = error
            if isinstance(failed, NonFiniteUpdateError):
                raise JobFailedError("train.non_finite", str(failed))
            if failed is not None:
                raise failed
            return None if writer is None else writer.commit()

        with writer or nullcontext():
            summary: DeltaSummary = ranks.told(agree(ranks, gather))
        return summary


def _with_carry(part: Theta, carried: Sequence[Theta], at: int) -> Theta:
    """One tensor's update and what earlier rounds left of it, in float32."""
    for earlier in carried:
        part = part + earlier[at : at + part.size].reshape(part.shape)
    return part


def _fingerprint(
    corpora: Sequence[Corpus], weights: Sequence[float], sequence_length: int, seed: int
) -> str:
    """What a stored position refers to."""
    named = " ".join(corpus.fingerprint for corpus in corpora)
    shares = "".join(f" {weight!r}" for weight in weights)
    return hashlib.sha256(f"{named} {sequence_length} {seed}{shares}".encode()).hexdigest()


def _position(memory: Memory | None, text: Sequences, fingerprint: str) -> int:
    """Where the data goes on: exactly, or at the next epoch when the data is not the same."""
    if memory is None:
        return 0
    if memory.data == fingerprint:
        return memory.epoch * text.per_epoch + memory.index
    return (memory.epoch + 1) * text.per_epoch
