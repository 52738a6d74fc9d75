"""One resident worker: takes a job through evaluation, training, saving and the update.

    rank 0:  read and check everything, tell the others          failure -> all give up the job
    all:     model (reused while its structure stays), theta
    all:     evaluate the round's starting model
    all:     train in the time box                 timer, interruption -> put the middle away
    all:     rank 0 streams delta.f32; save the state
    rank 0:  result.json (resident.py), last

The middle of a round is put away on a timer as well: a killed worker loses minutes, not the round.
The model, the optimizer's moments and the position in the data stay in memory between rounds; the
copy on disk is for a restart. Both give the same bits.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from node_agent.job_files import Theta, open_theta, read_plan
from node_agent.model_folder import FolderError, ModelFolder, open_folder
from node_agent.resident import (
    Clock,
    JobCancelledError,
    JobContext,
    JobFailedError,
    JobInterruptedError,
)
from node_agent.spool import (
    Evaluation,
    Job,
    Result,
    Spent,
    Spool,
    StatusWriter,
    keep_spent,
    read_spent,
)
from node_agent.worker.agreement import Gate, agree
from node_agent.worker.data import Corpus, HeldOut, held_out, index_corpus
from node_agent.worker.distributed import Ranks
from node_agent.worker.local_step import Limits
from node_agent.worker.mixture import check_apart
from node_agent.worker.model import ResidentModel
from node_agent.worker.private_path import Way
from node_agent.worker.records import Records
from node_agent.worker.resources import Meter, energy_counter
from node_agent.worker.state import Memory, Progress
from node_agent.worker.structure import FolderSource, LlamaSource, ModelError, Source
from node_agent.worker.task import Brief, Task
from node_agent.worker.text_files import find_files
from node_agent.worker.tokens import BYTES, Encoder, FolderEncoder
from protocols.plan import Plan
from protocols.plan_privacy import RECORD_MODES
from protocols.tensors.manifest import Manifest

FlowerHost = Callable[[Job, JobContext, Plan, Manifest], Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the site decides about its own machine; changes speed and memory, not the plan."""

    micro_batch: int = 0  # rows per forward pass of a rank; 0 is the whole batch
    checkpointing: bool | None = None  # recompute activations; None decides by size
    put_away_every_s: float | None = None  # of training; None: only when a job is interrupted
    private_way: Way | None = None  # how records are clipped; None takes the quickest right way
    random_bytes: Callable[[int], bytes] = field(default=os.urandom, repr=False)
    flower: FlowerHost | None = None  # for plans whose local step is a Flower ClientApp


class Trainer:
    """The work of one rank. Rank 0 calls ``do``; the others live in ``follow``."""

    def __init__(self, ranks: Ranks, *, options: Options, clock: Clock, spool: Spool) -> None:
        self._ranks = ranks
        self._options = options
        self._clock = clock
        self._spool = spool
        self._model: ResidentModel | None = None
        self._model_key: Any = None
        self._corpora: dict[Any, Corpus] = {}
        self._memory: Memory | None = None
        self._energy = energy_counter(ranks.device)
        self._base_marks: tuple[tuple[str, int, int], ...] | None = None
        self._base_digest = ""
        self._tokenizer: Encoder | None = None
        self._tokenizer_of = ""
        self._threads = torch.get_num_threads()  # what a job without its own number gets

    # -- the ranks' conversation -----------------------------------------------------------------

    def do(self, job: Job, context: JobContext) -> Result:
        """Do a job as rank 0."""
        plan, manifest = read_plan(job)
        if plan.local_step.kind != "builtin":
            return self._foreign(job, context, plan, manifest)
        brief = self._brief(job, plan, manifest)
        self._ranks.told(("job", brief))
        return self._run(brief, context)

    def idle(self) -> None:
        """Rank 0 has nothing to do: say so, or the others' wait would time out."""
        self._ranks.told(("idle", None))

    def dismiss(self) -> None:
        """Rank 0 leaves: so do the others."""
        self._ranks.told(("leave", None))

    def follow(self) -> None:
        """Do what rank 0 says until it leaves.

        Raises:
            Exception: whatever made this rank unable to go on; the others cannot go on either.
        """
        while True:
            word, brief = self._ranks.told()
            if word == "leave":
                return
            if word == "idle":
                continue
            try:
                self._run(brief, None)
            except (JobFailedError, JobCancelledError, JobInterruptedError):
                continue  # rank 0 answers
            except Exception as error:
                traceback.print_exc()
                status = StatusWriter(self._spool.status(brief.job.id), now=self._clock.now)
                text = f"rank {self._ranks.rank}: {type(error).__name__}: {error}"
                status.event("failed", code="worker.crashed", message=text)
                raise

    def fatal(self, error: BaseException) -> bool:
        """Whether rank 0 must end after an unexpected error: its peers or its device are in doubt.

        A single process on the CPU holds nothing that the next job does not load afresh.
        """
        self._memory = None
        return self._ranks.sharded or self._ranks.device.type == "cuda"

    # -- reading ---------------------------------------------------------------------------------

    def _foreign(self, job: Job, context: JobContext, plan: Plan, manifest: Manifest) -> Result:
        if plan.local_step.kind == "flower" and self._options.flower is not None:
            if self._ranks.sharded:
                raise JobFailedError(
                    "job.ranks", "a Flower app runs in one process: set [worker] ranks = 1"
                )
            return self._options.flower(job, context, plan, manifest)
        raise JobFailedError(
            "job.kind", f"this worker does not do local steps of kind {plan.local_step.kind}"
        )

    def _brief(self, job: Job, plan: Plan, manifest: Manifest) -> Brief:
        """Read the site's data. Raises: DataError; JobFailedError job.limits."""
        if plan.model.family == "vector":
            raise ModelError("model.config", f"this worker does not train {plan.model.family}")
        folder = self._folder(job, plan)
        encoder = self._encoder(folder, plan)
        corpora: tuple[Corpus, ...] = ()
        if job.select != "none":
            if not Limits.of(job, plan.local_step).bounded:
                raise JobFailedError("job.limits", "neither the job nor the plan limits training")
            _check_private(job, plan)
            corpora = self._corpora_of(job, encoder)
        documents: tuple[HeldOut, ...] = ()
        if plan.evaluates_in(job.index) and job.data.valid:
            documents = held_out(job.data.valid, limit=plan.evaluation.max_documents)
        return Brief(
            job=job,
            plan=plan,
            manifest=manifest,
            corpora=corpora,
            documents=documents,
            folder=folder,
        )

    def _corpora_of(self, job: Job, encoder: Encoder) -> tuple[Corpus, ...]:
        """The indexes of the training files; read again only when a file was touched."""
        paths = job.data.train
        sets = [(path,) for path in paths] if job.data.weights else [paths]
        if job.data.weights:
            check_apart(paths)
        known, self._corpora = self._corpora, {}
        for each in sets:
            key = (each, _marks(each), encoder.name)
            self._corpora[key] = known[key] if key in known else index_corpus(each, encoder)
        return tuple(self._corpora.values())

    def _folder(self, job: Job, plan: Plan) -> ModelFolder | None:
        """The base model's files, if the plan has one; hashed again only when one was touched.

        Raises:
            FolderError: there is none, or it is not the one that the plan names.
        """
        if plan.model.base is None:
            return None
        if job.base is None:
            raise FolderError("the plan has a base model, and this site has no folder for it")
        folder = open_folder(Path(job.base))
        marks = folder.marks()
        if marks != self._base_marks:
            self._base_digest, self._base_marks = folder.digest(), marks
        if self._base_digest != plan.model.base:
            raise FolderError(
                f"{folder.root} is {self._base_digest[:12]}…, the plan's base model is"
                f" {plan.model.base[:12]}…"
            )
        return folder

    def _encoder(self, folder: ModelFolder | None, plan: Plan) -> Encoder:
        """How this plan's texts become tokens; a tokenizer is read once."""
        if folder is None or plan.model.base is None:
            return BYTES
        if self._tokenizer is None or self._tokenizer_of != plan.model.base:
            self._tokenizer = FolderEncoder(folder.root, digest=plan.model.base)
            self._tokenizer_of = plan.model.base
        return self._tokenizer

    # -- one job on every rank -------------------------------------------------------------------

    def _run(self, brief: Brief, context: JobContext | None) -> Result:
        """Do a job and count what it uses; what an interrupted one used is kept for its end."""
        meter, name = Meter(self._ranks, self._energy), brief.job.id
        before = read_spent(self._spool, name) if context is not None else None

        def total() -> Spent:
            spent = meter.read()
            return spent if before is None else before + spent

        def note() -> None:
            spent = total()
            if context is not None:
                with suppress(OSError):  # a figure is no reason to fail
                    keep_spent(self._spool, name, spent)

        try:
            result = self._do(brief, context, note)
        except JobInterruptedError:
            note()
            raise
        return result.model_copy(update={"spent": total()})

    def _do(
        self, brief: Brief, context: JobContext | None, note_spent: Callable[[], None]
    ) -> Result:
        job, ranks = brief.job, self._ranks
        torch.set_num_threads(job.threads or self._threads)
        model = self._resident(brief)
        theta = agree(ranks, lambda: open_theta(Path(job.theta), brief.manifest))
        agree(ranks, lambda: model.load(theta))
        task = Task(
            brief=brief,
            model=model,
            theta=theta,
            ranks=ranks,
            gate=Gate(ranks, context),
            clock=self._clock,
            spool=self._spool,
            micro_batch=self._options.micro_batch,
            random_bytes=self._options.random_bytes,
            encoder=agree(ranks, lambda: self._encoder(brief.folder, brief.plan)),
            context=context,
            put_away_every_s=self._options.put_away_every_s,
            put_away=note_spent,
        )
        held, self._memory = self._memory, None  # a job that fails leaves none: disk has the last
        memory = task.recall(held)
        partial = memory.partial if memory is not None else None
        evaluation = partial.evaluation if partial is not None else task.evaluate()
        progress, my_steps, made, private = Progress(), 0, None, None
        shared: list[tuple[str, Theta]] = []
        if brief.corpora and brief.plan.mode in RECORD_MODES:
            records = self._records(brief, brief.corpora[0], task.encoder)
            steps, made = task.train_private(
                records, memory, evaluation, wanted=self._options.private_way
            )
            progress, my_steps, private = steps.progress, steps.my_steps, steps.report()
            if steps.terms.noise is None:
                shared = steps.shared_sum()
        elif brief.corpora:
            run, made = task.train(memory, evaluation)
            progress, my_steps = run.progress, run.my_steps
        delta = task.write_delta(shared)  # before the state: a broken update's is not kept
        self._memory = held if made is None else task.keep(made)
        return Result(
            id=job.id,
            steps=progress.steps,
            tokens=progress.tokens,
            records=progress.records,
            loss_nats=progress.loss_nats,
            seconds=progress.seconds,
            delta_root=delta.root,
            delta_coordinates=delta.coordinates,
            delta_norm=delta.norm,
            evaluation=tuple(Evaluation(**row) for row in evaluation),
            rank_steps=tuple(ranks.from_all(my_steps)),
            device=ranks.describe(),
            private=private,
        )

    @staticmethod
    def _records(brief: Brief, corpus: Corpus, encoder: Encoder) -> Records:
        privacy = brief.plan.privacy
        if privacy is None or privacy.unit == "institution":
            raise ValueError(f"mode {brief.plan.mode} does not protect records")
        return Records(
            corpus,
            unit=privacy.unit,
            max_sequences=privacy.max_sequences,
            sequence_length=brief.plan.local_step.sequence_length,
            encoder=encoder,
        )

    def _resident(self, brief: Brief) -> ResidentModel:
        """The model, built only when the structure or the trained tensors change."""
        source = source_of(brief.plan, brief.folder)
        length, longest = brief.plan.local_step.sequence_length, source.longest
        if longest is not None and length > longest:
            raise ModelError(
                "model.config", f"sequence_length {length} is more than the model's {longest}"
            )
        private = brief.plan.mode in RECORD_MODES
        key = (source, brief.job.select, private)
        if self._model is None or self._model_key != key:
            self._model = self._model_key = None  # free the old one first
            self._model = agree(
                self._ranks,
                lambda: ResidentModel(
                    source,
                    select=brief.job.select,
                    ranks=self._ranks,
                    checkpointing=self._options.checkpointing,
                    replicated=private,
                ),
            )
            self._model_key = key
        if self._model.manifest.digest != brief.manifest.digest:
            raise ModelError(
                "model.manifest", "model.config describes other tensors than the manifest"
            )
        return self._model


def source_of(plan: Plan, folder: ModelFolder | None) -> Source:
    """Where the structure of a plan's model comes from.

    Args:
        plan: of the run.
        folder: of its base model, whose digest was checked.
    """
    if folder is None or plan.model.base is None:
        return LlamaSource.of(plan.model.config)
    return FolderSource(folder, plan.model.base, plan.model.lora)


def _check_private(job: Job, plan: Plan) -> None:
    """What a private step must be. Raises: JobFailedError: private.limits, .weights; job.carry."""
    if job.carry and plan.privacy is not None:
        raise JobFailedError(
            "job.carry", "work of an earlier round is not charged in this one: nothing is done"
        )
    if plan.mode not in RECORD_MODES or plan.privacy is None:
        return
    if job.data.weights:
        raise JobFailedError(
            "private.weights",
            "a private step takes every record with the same chance: the data sets of [data] train"
            " have weights, which would make some records count more than is charged",
        )
    fewer = job.max_steps is not None and job.max_steps < (plan.privacy.steps or 1)
    if fewer or job.max_tokens is not None or job.max_seconds is not None:
        raise JobFailedError(
            "private.limits",
            f"the job limits a private step, which has {plan.privacy.steps} steps or is not sent",
        )


def _marks(paths: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
    """Size and time of every data file: when they stay, the index stays right."""
    found = []
    for file in find_files(paths):
        stat = file.stat()
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return tuple(found)
