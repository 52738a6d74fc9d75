"""Carries out what ``decide`` decided. Every action may be interrupted anywhere and repeated.

The order is always: make, keep in the journal, send, keep the answer. What was kept is sent again
byte for byte; what was not kept was not sent.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Final, NoReturn, assert_never

from node_agent import consent
from node_agent.bulk import fetch
from node_agent.capability import base_size, check_memory
from node_agent.carry import carries, claimed, left_out, note_mean, note_unsent, take
from node_agent.contribution import (
    LocalWork,
    Terms,
    check_pinned,
    check_private_work,
    make_contribution,
    record_of_fixed,
    synthetic_work,
    work_of_result,
)
from node_agent.decide import (
    Action,
    ComputeNext,
    FetchPlan,
    FinishEarly,
    MakeVector,
    ObtainModel,
    SayConfirm,
    SayDecline,
    SayJoin,
    SayLeave,
    SayReady,
    SecureStep,
    SettleSpend,
    Train,
    Upload,
    Withdraw,
)
from node_agent.housekeeping import tidy
from node_agent.launchers.jobs import Launcher
from node_agent.log_store import OwnLeaf
from node_agent.plan_check import check_plan
from node_agent.records import ConfirmRecord, RoundRecord, UploadRecord
from node_agent.resources import as_leaf, as_message, claim_of, read_claim, used_here
from node_agent.rules import Refusal
from node_agent.secure import SecureSum, dither_seed
from node_agent.site import Site
from node_agent.site_policy import SiteRules, load_site_rules
from node_agent.spool import DataPaths, Job, job_id, read_job, read_result
from node_agent.transfers import Shown, Transfer
from node_agent.uploads import Announcement, upload
from node_agent.view import RoundSeen, RunSeen
from policies.audit.gate import AggregateShown
from protocols.canonical import hash_fields, sha256_hex
from protocols.errors import (
    ConfigurationError,
    CorruptStateError,
    DigestMismatchError,
    EquivocationError,
    FederationError,
    IntegrityError,
    MalformedMessageError,
    NotFoundError,
    NotReadyError,
    RefusedError,
    WorkerError,
    WrongPhaseError,
)
from protocols.gen import accounting_pb2, rounds_pb2
from protocols.identifiers import Digest, RoundId, RunId
from protocols.outer_optimizers import optimizer_for
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.rounds import Released, Training
from protocols.secagg.node import mask_adder
from protocols.secagg.states import Uploaded
from protocols.tensors.manifest import Manifest
from protocols.tlog.kinds import (
    DatasetUsed,
    Predicate,
    RoundConfirm,
    RoundDecline,
    RoundJoin,
    RoundObjection,
    UpdateCommit,
)
from protocols.upload import UploadHeader
from protocols.wire import round_ref

logger = logging.getLogger(__name__)
_RULE: Final = re.compile(r"[a-z][a-z0-9_.:-]{0,63}", re.ASCII)  # what a leaf can name
SYNC_AFTER_S: Final = 10.0  # a model that the next round soon replaces need not get to the disk


@dataclass(slots=True, kw_only=True)
class Actor:
    """The hands of the agent."""

    site: Site
    run_seen: Callable[[RunId], RunSeen]  # the latest view of a run
    seen: Callable[[RoundId], tuple[RunSeen, RoundSeen]]  # the latest view of a round
    clock_offset: Callable[[], timedelta]  # coordinator's clock minus ours
    refuse: Callable[[str, Refusal], None]  # remember, for a while, why a run is refused
    wake: Callable[[], None]  # there is something new to decide on
    secure: SecureSum
    transfers: dict[RoundId, Transfer] = field(default_factory=dict)
    _syncing: set[asyncio.Task[None]] = field(default_factory=set)
    _rules: SiteRules | None = None  # read again when the files change

    async def perform(self, action: Action) -> None:
        """Carry out one action.

        Raises:
            FederationError: it did not succeed; the next turn decides what to do.
        """
        match action:
            case FetchPlan():
                await self._fetch_plan(action)
            case ObtainModel():
                await self._obtain(action)
            case SayJoin() | SayDecline() | SayReady() | SayLeave() | SayConfirm():
                await self._say(action)
            case Train():
                await self._train(action)
            case Withdraw() | FinishEarly():
                await self._withdraw(action)
            case MakeVector():
                await self._make_vector(action)
            case Upload():
                await self._upload(action)
            case SecureStep():
                await self._secure_step(action)
            case ComputeNext():
                await self._compute(action)
            case SettleSpend():
                await self._settle(action)
            case _:
                assert_never(action)

    async def _say(self, action: SayJoin | SayDecline | SayReady | SayLeave | SayConfirm) -> None:
        match action:
            case SayJoin():
                await self._join(action)
            case SayDecline():
                await self._decline(action.round, action.refusal)
            case SayReady():
                await self._ready(action)
            case SayLeave():
                await self._leave(action.round, action.refusal)
            case SayConfirm():
                await self._confirm(action)
            case _:
                assert_never(action)

    # -- plan and model --------------------------------------------------------------------------

    async def _fetch_plan(self, action: FetchPlan) -> None:
        connection, journal = self.site.connection, self.site.journal
        answer = await connection.ask(
            lambda c: c.rounds.GetPlan, rounds_pb2.GetPlanRequest(run=action.run)
        )
        try:
            plan = Plan.from_bytes(answer.plan)
        except MalformedMessageError as error:
            self.refuse(action.run, Refusal("plan.unreadable", str(error)))
            return
        seen = self.run_seen(action.run)
        refusal = check_plan(
            plan,
            said=seen.plan_digest,
            seen=seen,
            federation=self.site.config.federation,
            node=self.site.node,
        )
        if refusal is not None and refusal.rule in ("plan.digest", "plan.run"):
            self.refuse(action.run, refusal)  # not this run's plan: not kept
            return
        await asyncio.to_thread(journal.add_run, plan)

    async def _obtain(self, action: ObtainModel) -> None:
        run, current = self.seen(action.round)
        plan = self._plan(action.round)
        if current.start.model_root != action.root:
            raise NotFoundError(f"round {action.round} starts from another model by now")
        models = self.site.models
        manifest = await models.manifest(self.site.connection, plan)
        facts = await asyncio.to_thread(consent.site_facts, self.site.config, self.site.folder.root)
        buffers = len(optimizer_for(plan.outer).buffer_names)
        refusal = consent.check_disk(plan, facts, coordinates=manifest.coordinates, buffers=buffers)
        trained = sum(part.coordinates for part in manifest.select(plan.trainable))
        refusal = refusal or check_memory(
            plan,
            self.site.capability,
            trained=trained,
            parameters=manifest.coordinates,
            base_bytes=base_size(self.site.config.worker.base_model),
        )
        if refusal is not None:
            self.refuse(run.run, refusal)
            return
        with self._transfer(action.round, "fetching") as transfer:
            await models.obtain(
                self.site.connection,
                plan,
                current.start,
                round_=action.round,
                progress=transfer.move,
            )
        self._sync_later(run.run, action.root)
        logger.info("%s: holds model %s", action.round, action.root[:12])

    # -- statements ------------------------------------------------------------------------------

    async def _join(self, action: SayJoin) -> None:
        run, current = self.seen(action.round)
        if current.start.model_root != action.root:
            raise NotFoundError(f"round {action.round} starts from another model by now")
        plan = self._plan(action.round)
        refusal = await self._reserve(plan, action.round, current.index, action.root)
        if refusal is not None:
            await self._decline(action.round, refusal)
            return
        secagg = plan.secagg
        if secagg is not None and self.site.trust is None:
            # Before the join: a key that changed meanwhile is declined.
            others = {node: key for node, key in secagg.keys.items() if node != self.site.node}
            await asyncio.to_thread(self.site.journal.pin_keys, others)
        record = await asyncio.to_thread(
            self.site.journal.add_decision,
            action.round,
            index=current.index,
            start_root=action.root,
            refusal=None,
        )
        if not record.joined:
            await self._decline(action.round, record.refusal or Refusal("site.unknown", "declined"))
            return
        log, leaf = self.site.log, None
        if log is not None:
            said = RoundJoin(
                node=self.site.node,
                plan_sha256=sha256_hex(plan.to_bytes()),
                model_in=action.root,
                site_policy_sha256=self._site_policy(),
            )
            leaf = await log.leaf(plan, action.round, said, "join")
        request = rounds_pb2.JoinRequest(
            round=round_ref(action.round),
            plan_digest=run.plan_digest,
            model_root=action.root,
            leaf=leaf.entry if leaf else b"",
        )
        await self.site.connection.ask(lambda c: c.rounds.Join, request)
        if log is not None and leaf is not None:
            await log.taken(leaf)
        logger.info("joined %s", action.round)
        launcher = self._launcher(self._plan(action.round))
        if launcher is not None:
            launcher.expect()
        await self._tidy(action.round, current=True)

    async def _reserve(
        self, plan: Plan, round_: RoundId, index: int, root: Digest
    ) -> Refusal | None:
        """Reserve the round's cost in this node's own ledger, before anybody hears of a join."""
        if plan.privacy is None:
            return None

        def reserve() -> Refusal | None:
            manifest = self.site.models.open(round_.run, root).manifest
            coordinates = round_layout(plan, index, manifest).model_coordinates
            return self.site.privacy.reserve(plan, round_, index, coordinates)

        return await asyncio.to_thread(reserve)

    async def _decline(self, round_: RoundId, refusal: Refusal) -> None:
        _, current = self.seen(round_)
        record = await asyncio.to_thread(
            self.site.journal.add_decision,
            round_,
            index=current.index,
            start_root=current.start.model_root,
            refusal=refusal,
        )
        if record.joined:
            raise EquivocationError(f"round {round_} was joined before")
        stands = record.refusal or refusal
        log, leaf = self.site.log, await self._decline_leaf(round_, stands)
        request = rounds_pb2.DeclineRequest(
            round=round_ref(round_),
            rule=stands.rule,
            reason=_short(stands.reason),
            leaf=leaf.entry if leaf else b"",
        )
        await self.site.connection.ask(lambda c: c.rounds.Decline, request)
        if log is not None and leaf is not None:
            await log.taken(leaf)
        logger.info("declined %s: %s", round_, stands)

    async def _decline_leaf(self, round_: RoundId, stands: Refusal) -> OwnLeaf | None:
        """What this node signs when it declines; None: there is no log, or no plan to name."""
        log, known = self.site.log, self.site.journal.run(round_.run)
        if log is None or known is None:
            return None
        said = RoundDecline(
            node=self.site.node,
            plan_sha256=sha256_hex(known.plan.to_bytes()),
            site_policy_sha256=self._site_policy(),
            rules=(stands.rule if _RULE.fullmatch(stands.rule) else "site.unknown",),
        )
        return await log.leaf(known.plan, round_, said, "decline")

    def _site_policy(self) -> Digest | None:
        """The salted digest of the site's policy, which itself never leaves the site."""
        try:
            self._rules = load_site_rules(self.site.folder, self._rules)
        except ConfigurationError:
            return None
        return self._rules.digest

    async def _leave(self, round_: RoundId, refusal: Refusal) -> None:
        journal = self.site.journal
        if await asyncio.to_thread(journal.round, round_) is not None:
            await asyncio.to_thread(journal.add_outcome, round_, left=refusal, detail={})
        request = rounds_pb2.LeaveRequest(
            round=round_ref(round_), code=refusal.rule, reason=_short(refusal.reason)
        )
        await self.site.connection.ask(lambda c: c.rounds.Leave, request)
        logger.warning("left %s: %s", round_, refusal)

    # -- the local step --------------------------------------------------------------------------

    def _launcher(self, plan: Plan) -> Launcher | None:
        """Who carries out the local step; None: the agent itself."""
        return self.site.launchers.get(plan.local_step.kind)

    def _job(self, round_: RoundId, record: RoundRecord, plan: Plan) -> Job:
        models, config = self.site.models, self.site.config
        held = models.open(round_.run, record.start_root)
        # Our own worker goes on reading where the last round stopped: one order for the whole run.
        order = round_.run if plan.local_step.kind == "builtin" else str(round_)
        seed = hash_fields("minga/job-seed/v2", order.encode(), self.site.node.encode())
        carried, most = self._carry(round_, record, plan)
        return Job(
            id=job_id(round_),
            run=round_.run,
            round=round_.number,
            index=record.index,
            plan=str(models.plan_path(round_.run)),
            manifest=str(models.manifest_path(round_.run)),
            theta=str(held.theta_path),
            base=config.worker.base_model if plan.model.base is not None else None,
            select=plan.selection_in(record.index),
            data=DataPaths(
                train=config.data.train, weights=config.data.weights, valid=config.data.valid
            ),
            seed=int.from_bytes(seed[:8], "big") >> 1,
            threads=config.worker.threads,
            reset_optimizer=not plan.local_step.keep_optimizer,
            carry=carried,
            max_steps=most,
        )

    def _carry(
        self, round_: RoundId, record: RoundRecord, plan: Plan
    ) -> tuple[tuple[str, ...], int | None]:
        """Late work to add, and the most steps to do: decided when the job is first made."""
        launcher = self._launcher(plan)
        if launcher is None or not carries(plan):
            return (), None
        return take(launcher.spool, round_.run, round_.number, plan.selection_in(record.index))

    async def _train(self, action: Train) -> None:
        record, plan = self._joined(action.round), self._plan(action.round)
        launcher = self._launcher(plan)
        if launcher is None:
            return
        _, current = self.seen(action.round)
        phase = current.phase(plan)
        if carries(plan):
            await self._tidy(action.round, current=True)  # a job that ended meanwhile is late work
        job = await asyncio.to_thread(self._job, action.round, record, plan)
        if isinstance(phase, Training):
            # By our clock, and early enough to check the update and to say ready.
            margin = min(60.0, max(2.0, 0.05 * plan.deadlines.train))
            ends = phase.closes_at - self.clock_offset() - timedelta(seconds=margin)
            job = job.model_copy(update={"deadline_unix": max(0.0, ends.timestamp())})
        await asyncio.to_thread(self.site.privacy.starts, plan, action.round, record.index)
        await asyncio.to_thread(launcher.submit, job)
        await launcher.tick()

    async def _withdraw(self, action: Withdraw | FinishEarly) -> None:
        launcher = self._launcher(self._plan(action.round))
        if launcher is not None:
            end = launcher.finish if isinstance(action, FinishEarly) else launcher.cancel
            await asyncio.to_thread(end, job_id(action.round))

    def _checked_result(
        self, round_: RoundId, record: RoundRecord, plan: Plan
    ) -> tuple[dict[str, object], Digest | None]:
        """Look at everything the worker left; facts and update for the journal. Blocking."""
        launcher = self._launcher(plan)
        if launcher is None:
            return {"kind": plan.local_step.kind}, None
        name, spool = job_id(round_), launcher.spool
        try:
            job = read_job(spool.job(name))
        except FileNotFoundError:
            raise WorkerError(f"the job {name} is gone") from None
        if not job.same_work(self._job(round_, record, plan)):
            launcher.forget(name)
            raise WorkerError(f"the job {name} in the spool asks for other work")
        manifest = Manifest.from_bytes(self.site.models.manifest_path(round_.run).read_bytes())
        try:
            result = read_result(spool, job, manifest)
        except MalformedMessageError as error:
            raise WorkerError(f"the worker's result cannot be read: {error}") from None
        if result is None:
            raise WorkerError(f"the worker left no result for {name}")
        check_private_work(plan, record.index, result)
        least = plan.local_step.min_steps if plan.trains_in(record.index) else 0
        if plan.local_step.kind == "builtin" and result.steps < least:
            raise WorkerError(
                f"{result.steps} steps in the time there was; the plan wants at least {least}"
            )
        facts: dict[str, object] = {
            "steps": result.steps,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 3),
            "norm": result.delta_norm,
            "update": result.root,
        }
        if result.spent is not None:  # for the site's own caps; not said to anybody
            facts["used"] = used_here(result.spent, self.site.config.resources).to_facts()
        claim = claim_of(result.spent, self.site.config.resources, plan)
        if claim is not None:
            facts["resources"] = claim.to_facts()
        return facts, result.root

    async def _ready(self, action: SayReady) -> None:
        round_ = action.round
        record, plan = self._joined(round_), self._plan(round_)
        if record.outcome is None:
            try:
                facts, update = await asyncio.to_thread(self._checked_result, round_, record, plan)
            except FederationError as error:
                await self._leave(round_, Refusal(error.code, str(error)))
                return
            await asyncio.to_thread(
                self.site.journal.add_outcome, round_, left=None, detail=facts, update=update
            )
            self.wake()  # the vector of an open sum may be made while this is being said
        if plan.secagg is not None:
            await self.secure.ready(record, plan, 1)
        else:
            request = rounds_pb2.ReadyRequest(round=round_ref(round_), model_root=record.start_root)
            await self.site.connection.ask(lambda c: c.rounds.Ready, request)
        logger.info("ready for %s", round_)

    # -- the vector ------------------------------------------------------------------------------

    async def _make_vector(self, action: MakeVector) -> None:
        site, round_ = self.site, action.round
        if await asyncio.to_thread(site.journal.upload, round_, action.attempt) is not None:
            return
        record, plan = self._joined(round_), self._plan(round_)
        await asyncio.to_thread(site.privacy.check, plan, round_, record.index)
        held = site.models.open(round_.run, record.start_root)
        common: dict[str, Any] = {
            "terms": Terms(
                plan=plan,
                node=site.node,
                round=round_,
                index=record.index,
                attempt=action.attempt,
                model_root=record.start_root,
            ),
            "manifest": held.manifest,
            "signing_key": site.signing_key,
            "uploads": site.folder.uploads,
        }
        state = await self.secure.masking(round_, action.attempt) if plan.secagg else None

        def make() -> UploadRecord:
            if isinstance(state, Uploaded):  # fixed before a crash: only the record is missing
                return record_of_fixed(root=state.header.body.upload_root, **common)
            return make_contribution(
                self._local_work(round_, record, plan, held.manifest),
                scales=held.scales(),
                seed=dither_seed(state) if state else site.random_bytes(32),
                noise_seed=state.noise_seed if state else None,
                masks=mask_adder(state, round_ring(plan)) if state else None,
                threads=site.config.limits.cpu_threads,
                **common,
            )

        with self._transfer(round_, "encoding"):
            uploaded = await asyncio.to_thread(make)
        header = UploadHeader.from_bytes(uploaded.header)
        if plan.secagg is not None:
            try:
                await self.secure.fix(round_, action.attempt, root=header.root, size=header.size)
            except WrongPhaseError:  # the round was over before: this vector is of no use
                (site.folder.uploads / uploaded.file).unlink(missing_ok=True)
                raise
        detail = {"attempt": action.attempt, "root": header.root, "bytes": header.size}
        await asyncio.to_thread(site.journal.add_upload, uploaded, detail)

    def _local_work(
        self, round_: RoundId, record: RoundRecord, plan: Plan, manifest: Manifest
    ) -> LocalWork:
        launcher = self._launcher(plan)
        if launcher is not None and claimed(launcher.spool, round_.run, round_.number):
            raise WorkerError(f"the update of {round_} was put aside for the next round")
        if launcher is None:
            layout = round_layout(plan, record.index, manifest)
            constant = plan.local_step.synthetic.delta if plan.local_step.synthetic else 0.0
            return synthetic_work(constant, layout)
        name = job_id(round_)
        delta = launcher.spool.delta(name)
        # Checked when the node said ready. Under masks it must still be that very update.
        if plan.secagg is not None:
            check_pinned(delta, record.update)
        claim = read_claim(self.site.journal.said_ready_with(round_))
        return work_of_result(launcher.result(name), delta, resources=claim)

    async def _upload(self, action: Upload) -> None:
        site, round_ = self.site, action.round
        record = await asyncio.to_thread(site.journal.upload, round_, action.attempt)
        if record is None:
            raise NotFoundError(f"no vector was made for attempt {action.attempt} of {round_}")
        plan, joined = self._plan(round_), self._joined(round_)
        await asyncio.to_thread(site.privacy.check, plan, round_, joined.index)
        announcement = Announcement(
            header=record.header, signature=record.signature, unit_hashes=record.unit_hashes
        )
        if plan.secagg is not None:
            await self.secure.post_header(round_, action.attempt)
        leaf = await self._commit_leaf(round_, action.attempt, record)
        with self._transfer(round_, "uploading") as transfer:
            receipt = await upload(
                site.connection,
                site.folder.uploads / record.file,
                announcement,
                progress=transfer.move,
                leaf=leaf.entry if leaf else b"",
            )
        header = UploadHeader.from_bytes(record.header)
        if receipt != (bytes.fromhex(leaf.leaf_hash) if leaf else header.receipt):
            raise DigestMismatchError(f"the receipt for {round_} names another upload")
        if site.log is not None and leaf is not None:
            await site.log.taken(leaf)
        await asyncio.to_thread(site.journal.add_receipt, round_, action.attempt, receipt)
        logger.info("uploaded %s, attempt %d", round_, action.attempt)

    async def _commit_leaf(
        self, round_: RoundId, attempt: int, record: UploadRecord
    ) -> OwnLeaf | None:
        """What this node signs when it hands in an update; None: there is no log."""
        log, plan = self.site.log, self._plan(round_)
        if log is None:
            return None
        header = UploadHeader.from_bytes(record.header)
        ctx = deals = None
        if plan.secagg is not None:
            ctx, deals = await self.secure.committed(round_, attempt)
        spent = read_claim(await asyncio.to_thread(self.site.journal.said_ready_with, round_))
        said = UpdateCommit(
            attempt=attempt,
            node=self.site.node,
            ctx=ctx,
            deals_sha256=deals,
            upload_root=header.root,
            bytes=header.size,
            privacy=await asyncio.to_thread(self._claim, round_, plan),
            datasets=(DatasetUsed(id=self.site.config.data.dataset),),
            resources=as_leaf(spent, self.site.config.resources, size=header.size),
        )
        return await log.leaf(plan, round_, said, f"commit {attempt}")

    def _claim(self, round_: RoundId, plan: Plan) -> dict[str, Any] | None:
        """What the update spends; None: the plan is not private."""
        if plan.privacy is None:
            return None
        record = self._joined(round_)
        manifest = self.site.models.open(round_.run, record.start_root).manifest
        coordinates = round_layout(plan, record.index, manifest).model_coordinates
        claim = self.site.privacy.claim(plan, record.index, coordinates)
        return None if claim is None else claim.to_value()

    async def _secure_step(self, action: SecureStep) -> None:
        secure, round_, number = self.secure, action.round, action.attempt
        match action.step:
            case "ready":
                await secure.ready(self._joined(round_), self._plan(round_), number)
            case "deal":
                await secure.deal(round_, number)
            case "acknowledge":
                await secure.acknowledge(round_, number)
            case "commit":
                await self._check_spend(round_)
                await secure.commit(round_, number)
            case "abort":
                await secure.abort(round_, number, "secagg.survivors")
            case "reveal":
                await self._check_spend(round_)
                await asyncio.to_thread(self.site.privacy.releases, round_)
                await secure.reveal(round_, number)
            case "close":
                await secure.close(round_, number)
            case _:
                assert_never(action.step)

    async def _check_spend(self, round_: RoundId) -> None:
        plan, record = self._plan(round_), self._joined(round_)
        await asyncio.to_thread(self.site.privacy.check, plan, round_, record.index)

    async def _settle(self, action: SettleSpend) -> None:
        await asyncio.to_thread(
            self.site.privacy.over,
            self._plan(action.round),
            action.round,
            in_sum=action.in_sum,
        )

    # -- after the release -----------------------------------------------------------------------

    async def _compute(self, action: ComputeNext) -> None:
        site, round_ = self.site, action.round
        if await asyncio.to_thread(site.journal.confirm, round_) is not None:
            return
        _, seen = self.seen(round_)
        plan = self._plan(round_)
        phase = seen.phase(plan)
        if not isinstance(phase, Released) or phase.opened is None:
            raise NotFoundError(f"the sum of round {round_} is not public")
        models, opened = site.models, phase.opened
        start = models.open(round_.run, seen.start.model_root)
        layout = round_layout(plan, seen.index, start.manifest)
        path = models.sum_path(round_.run, opened.sum)
        with self._transfer(round_, "fetching the sum") as transfer:
            await fetch(
                site.connection,
                opened.sum,
                path,
                size=layout.packed_size(round_ring(plan)),
                round_=round_,
                durable=False,
                progress=transfer.move,
            )
        computed, code, detail = None, "", ""
        try:
            held, metrics = await asyncio.to_thread(
                models.compute_next,
                plan=plan,
                index=seen.index,
                start=start,
                sum_path=path,
                survivors=len(phase.survivors),
                threads=site.config.limits.cpu_threads,
            )
        except CorruptStateError as error:
            await self._drop_damaged(round_, (start.snapshot.model_root,), str(error))
        except IntegrityError as error:
            code, detail = error.code, str(error)
        else:
            computed = held.snapshot.model_root
            logger.info("%s: computed model %s, sums %s", round_, computed[:12], dict(metrics))
            if computed != opened.model_root:
                root = start.snapshot.model_root
                if not await asyncio.to_thread(models.sound, round_.run, root):  # our own disk
                    why = f"model {root[:12]}… is not what its digests say"
                    await self._drop_damaged(round_, (root, computed), why)
                code = "model_disagreement"
                detail = f"computed {computed}, published {opened.model_root}"
        stop = code
        if not code and plan.secagg is not None:
            code, detail = await self.secure.check_opening(
                plan,
                round_,
                phase.attempt,
                model_root=start.snapshot.model_root,
                transcript=seen.transcript,
                survivors=phase.survivors,
            )
        if not code:
            code, detail = await asyncio.to_thread(self._own_part, round_, phase)
        if not code and site.log is not None:
            shown = AggregateShown(
                attempt=phase.attempt,
                sum_blob=opened.sum,
                model_out=opened.model_root,
                survivors=phase.survivors,
            )
            stops = await site.log.passes(round_, shown)
            if stops is not None:
                stop, code, detail = stops.rule, stops.rule, stops.why
        await asyncio.to_thread(self._note_left_out, plan, round_, phase, code)
        record = ConfirmRecord(
            round=round_,
            sum=opened.sum,
            published=opened.model_root,
            computed=computed,
            objection=code,
            detail=detail,
            answered=False,
        )
        ending = Refusal(stop, detail) if stop else None
        await asyncio.to_thread(site.journal.add_confirm, record, ending)
        if not stop and computed is not None:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            launcher = self._launcher(plan)
            if launcher is not None and carries(plan) and plan.trains_in(seen.index):
                mean = {"steps": metrics["steps"], "nodes": metrics["nodes"]}
                await asyncio.to_thread(
                    partial(note_mean, launcher.spool, round_.run, round_.number, **mean)
                )

    def _own_part(self, round_: RoundId, phase: Released) -> tuple[str, str]:
        """Whether this node's own upload is in the sum exactly when it was handed in."""
        record = self.site.journal.upload(round_, phase.attempt)
        listed = self.site.node in phase.survivors
        if record is not None and record.receipt is not None and not listed:
            return "not_in_sum", f"receipt {record.receipt.hex()} is not among the survivors"
        if record is None and listed:
            return "unknown_upload", "this node made no vector for that attempt"
        return "", ""

    def _note_left_out(self, plan: Plan, round_: RoundId, phase: Released, objection: str) -> None:
        """Keep that this node's vector is not in a sum that it has found right, if so."""
        launcher, journal = self._launcher(plan), self.site.journal
        if launcher is None or not carries(plan):
            return
        made = [journal.upload(round_, attempt) for attempt in range(1, phase.attempt + 1)]
        receipts = [record.receipt for record in made if record is not None]
        if left_out(receipts, listed=self.site.node in phase.survivors, objection=objection):
            note_unsent(launcher.spool, round_.run, round_.number)

    async def _confirm(self, action: SayConfirm) -> None:
        site = self.site
        record = await asyncio.to_thread(site.journal.confirm, action.round)
        if record is None:
            raise CorruptStateError(f"nothing was computed for round {action.round}")
        await self._report(action.round)
        leaf = await self._verdict_leaf(record)
        request = rounds_pb2.ConfirmRequest(
            round=round_ref(action.round),
            model_root=record.computed or "",
            objection=record.objection,
            detail=_short(record.detail),
            leaf=leaf.entry if leaf else b"",
        )
        try:
            await site.connection.ask(lambda c: c.rounds.Confirm, request)
            if site.log is not None and leaf is not None:
                await site.log.taken(leaf)
        except RefusedError as error:  # it will not be taken another time either
            detail = {"code": error.code, "reason": str(error)}
            await asyncio.to_thread(
                site.journal.note, "confirm refused", detail, round_=action.round
            )
        await asyncio.to_thread(site.journal.confirm_answered, action.round)
        if record.computed is not None and not record.objection:
            self._sync_later(action.round.run, record.computed)
        await self._tidy(action.round, current=False)

    async def _report(self, round_: RoundId) -> None:
        """Say what the local step cost, where the site names its figures."""
        site = self.site
        if site.config.resources.report != "named":
            return
        claim = read_claim(await asyncio.to_thread(site.journal.said_ready_with, round_))
        if claim is None:
            return
        request = accounting_pb2.ReportRequest(round=round_ref(round_), used=as_message(claim))
        try:
            await site.connection.ask(lambda c: c.accounting.Report, request)
        except RefusedError as error:  # not taken another time either
            logger.info("the costs of %s were not taken: %s", round_, error)

    async def _verdict_leaf(self, record: ConfirmRecord) -> OwnLeaf | None:
        """What this node signs about a result; None: there is no log, or it had no part in it."""
        log, round_ = self.site.log, record.round
        joined = await asyncio.to_thread(self.site.journal.round, round_)
        if log is None or joined is None or not joined.joined:
            return None
        state = log.verifier.log.rounds.get(round_)
        attempt = next((each for each in state.attempts if each.aggregate), None) if state else None
        if attempt is None:
            raise NotReadyError(f"the result of {round_} is not in the witnessed log yet")
        node = self.site.node
        if record.objection or record.computed is None:
            said: Predicate = RoundObjection(
                attempt=attempt.number,
                node=node,
                code=record.objection if _RULE.fullmatch(record.objection) else "node.unknown",
                model_out=record.computed,
                evidence_sha256=sha256_hex(record.detail.encode()) if record.detail else None,
            )
        else:
            own = attempt.commits.get(node)
            said = RoundConfirm(
                attempt=attempt.number,
                node=node,
                model_out=record.computed,
                commit=own.leaf if own else None,
            )
        return await log.leaf(self._plan(round_), round_, said, "verdict")

    # -- helpers ---------------------------------------------------------------------------------

    async def _drop_damaged(self, round_: RoundId, roots: tuple[Digest, ...], why: str) -> NoReturn:
        """Our own disk is at fault, not the coordinator: no objection, the model is fetched again.

        Raises:
            NotReadyError: always; the next turn fetches.
        """
        for root in roots:
            await asyncio.to_thread(self.site.models.drop, round_.run, root)
        detail = {"reason": why}
        await asyncio.to_thread(self.site.journal.note, "model dropped", detail, round_=round_)
        raise NotReadyError(f"{why}: fetching it again", retry_after_s=0.0)

    def _sync_later(self, run: RunId, root: Digest) -> None:
        """Get a model to the disk once the node has had time for more urgent things.

        Nothing that was said rests on it: what a power failure tears is told by its digests at the
        next start, and fetched again.
        """

        async def later() -> None:
            await asyncio.sleep(SYNC_AFTER_S)
            try:
                await asyncio.to_thread(self.site.models.sync, run, root)
            except OSError as error:
                logger.warning("model %s is not on the disk yet: %s", root[:12], error)

        task = asyncio.create_task(later(), name="sync")
        self._syncing.add(task)
        task.add_done_callback(self._syncing.discard)

    async def close(self) -> None:
        """Give up what waits; the next start looks after it."""
        for task in tuple(self._syncing):
            task.cancel()
        await asyncio.gather(*self._syncing, return_exceptions=True)

    async def _tidy(self, round_: RoundId, *, current: bool) -> None:
        await asyncio.to_thread(tidy, self.site, round_, current=current)

    def _plan(self, round_: RoundId) -> Plan:
        record = self.site.journal.run(round_.run)
        if record is None:
            raise NotFoundError(f"the plan of run {round_.run} is not known here")
        return record.plan

    def _joined(self, round_: RoundId) -> RoundRecord:
        record = self.site.journal.round(round_)
        if record is None or not record.joined:
            raise NotFoundError(f"round {round_} was not joined")
        return record

    def _transfer(self, round_: RoundId, activity: str) -> Shown:
        return Shown(self.transfers, round_, Transfer(activity))


def _short(text: str) -> str:
    """One line of at most 400 characters, as the coordinator takes it."""
    return " ".join(text.split())[:400]
