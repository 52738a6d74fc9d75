"""The reconcile loop of a node: look, decide, act; again and again, from whatever is there.

    sync      long poll: what the coordinator shows, heartbeats back
    reconcile for each run: view + journal + worker -> decide -> start what is not under way
    renew     a new certificate from two thirds of the lifetime on

Nothing is remembered in memory that is needed to go on: SIGKILL at any instant and a restart
continue with the same bytes. The agent never imports torch; a worker does the training.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from node_agent import consent
from node_agent.acting import Actor
from node_agent.carry import carries
from node_agent.client import Backoff
from node_agent.decide import (
    Action,
    Decision,
    SayDecline,
    SayJoin,
    SayLeave,
    SayReady,
    SecureStep,
    Situation,
    Work,
    decide,
    forgotten,
)
from node_agent.endings import LOOK_S, Endings
from node_agent.enrol import renew, renewal_due
from node_agent.governance import Governance
from node_agent.housekeeping import tidy
from node_agent.keys import TlsIdentity
from node_agent.plan_check import check_plan, check_round
from node_agent.polling import ANSWER_S, may_give_up_s, poll_wait_ms
from node_agent.privacy import check_budget
from node_agent.records import RoundRecord, RunRecord, UploadRecord
from node_agent.rules import Refusal
from node_agent.secure import SecureSum, check_roster
from node_agent.secure_state import SecureStates
from node_agent.site import Site
from node_agent.spool import job_id
from node_agent.status import NodeStatus, RunStatus, iso, write_status
from node_agent.view import RoundSeen, RunSeen, View, read_view
from policies.audit.gate import (
    Gate,
    Passed,
    PlanShown,
    StartShown,
    Stops,
    SurvivorsShown,
    Waits,
)
from protocols.canonical import sha256_hex
from protocols.errors import (
    FederationError,
    IntegrityError,
    MalformedMessageError,
    NotEnrolledError,
    NotFoundError,
    NotReadyError,
    StorageFullError,
)
from protocols.gen import rounds_pb2
from protocols.identifiers import RoundId, RunId
from protocols.plan import Plan
from protocols.plan_privacy import promise
from protocols.rounds import Committing, Dealing, Uploading
from protocols.upload import UploadHeader
from protocols.wire import round_ref, to_ms

logger = logging.getLogger(__name__)
TURN_S: Final = 2.0  # between two turns at the latest
TRAINING_TURN_S: Final = 0.25  # while a worker is at it
STATUS_S: Final = 0.25  # between two writes of the status file at least
FACTS_S: Final = 10.0  # how long a look at the site's disk is good for
REFUSED_S: Final = 30.0  # how long a refusal found while acting holds
DELIVERED_S: Final = 60.0  # then a statement that is still not shown is sent once more
_ACTIVITY: Final = 64  # characters of an activity that the coordinator takes
_MAX_SEEN: Final = 1000  # rounds remembered by when they were first seen
_MAX_REPORTS: Final = 16  # as many as the coordinator takes with one poll
BUG_S: Final = 30.0  # before an action that failed in an unknown way is tried again


@cache
def agent_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("minga")
    except PackageNotFoundError:
        return "unknown"


@dataclass(slots=True)
class _Failed:
    """An action that did not succeed: not tried again before a time, or before news."""

    times: int
    not_before: float  # monotonic seconds
    version: int | None  # try again as soon as the view has another version; None: time alone
    why: str = ""  # one sentence, for people


@dataclass(slots=True)
class Agent:
    """One node at work."""

    site: Site
    backoff: Backoff = field(default_factory=lambda: Backoff(first_s=0.5, cap_s=30.0))
    _view: View | None = None
    _offset: timedelta | None = None
    _trouble: str = "not connected yet"
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _nudge: asyncio.Event = field(default_factory=asyncio.Event)
    _reported: tuple[bool, bool] = (False, False)  # busy, paused: as the last poll said
    _busy_since: float | None = None  # monotonic seconds
    _tasks: dict[Action, asyncio.Task[None]] = field(default_factory=dict)
    _failed: dict[Action, _Failed] = field(default_factory=dict)
    _delivered: dict[Action, float] = field(default_factory=dict)  # monotonic seconds
    _refused: dict[str, tuple[float, Refusal]] = field(default_factory=dict)
    _first_seen: dict[RoundId, float] = field(default_factory=dict)  # monotonic seconds
    _facts: tuple[float, consent.SiteFacts] | None = None
    _runs: dict[RunId, RunRecord] = field(default_factory=dict)
    _why: dict[RunId, str] = field(default_factory=dict)
    _shown: NodeStatus | None = None
    _show_at: float = 0.0  # monotonic seconds: not before
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _actor: Actor = field(init=False)
    _identity: TlsIdentity = field(init=False)
    _states: SecureStates = field(init=False)
    _governance: Governance = field(init=False)

    def __post_init__(self) -> None:
        self._governance = Governance(self.site)
        self._identity = self.site.keys.tls()
        self._states = SecureStates(self.site.folder.secagg, node=self.site.node)
        self._actor = Actor(
            site=self.site,
            run_seen=self._run_seen,
            seen=self._seen,
            clock_offset=lambda: self._offset or timedelta(),
            refuse=self._refuse,
            wake=self._wake.set,
            secure=SecureSum(site=self.site, states=self._states),
        )

    # -- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until ``stop`` is called. The folder's lock is held by the caller."""
        await asyncio.to_thread(self._recover)
        loops = {
            asyncio.create_task(self._sync_loop(), name="sync"),
            asyncio.create_task(self._reconcile_loop(), name="reconcile"),
            asyncio.create_task(self._renew_loop(), name="renew"),
            asyncio.create_task(self._endings_loop(), name="endings"),
        }
        if self.site.log is not None:
            self.site.log.wake = self._wake.set
            loops.add(asyncio.create_task(self.site.log.follow(), name="log"))
            if self.site.log.witness is not None:
                loops.add(asyncio.create_task(self.site.log.cosign(), name="witness"))
        if self.site.trust is not None:
            trusting = self.site.trust.run(self._wake.set)
            loops.add(asyncio.create_task(trusting, name="trust"))
        stopping = asyncio.create_task(self._stopped(), name="stopping")
        try:
            done, _ = await asyncio.wait({*loops, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()  # a loop never ends by itself: raise what ended it
        finally:
            await self._close({*loops, stopping})

    def stop(self) -> None:
        """End the loop; what is under way is given up and goes on after the next start."""
        self._stopping.set()

    async def _stopped(self) -> None:
        await self._stopping.wait()

    async def _close(self, tasks: set[asyncio.Task[None]]) -> None:
        everything = {*tasks, *self._tasks.values()}
        for task in everything:
            task.cancel()
        await asyncio.wait(everything)
        await self._actor.close()
        self._show_at = 0.0
        self._show()  # what was last decided, not what it was a moment before
        for launcher in self.site.launchers.values():
            await launcher.close()
        await self.site.connection.close()
        self.site.journal.close()
        self.site.privacy.ledger.close()

    def _recover(self) -> None:
        for launcher in self.site.launchers.values():
            left = launcher.clear_leftovers()
            if left is not None:
                self.site.journal.note("worker", {"reason": left})
        for dropped in self.site.models.recover():
            self.site.journal.note("model dropped", {"reason": dropped})
        for over in self.site.journal.last_confirmed():
            tidy(self.site, over, current=False)  # killed between the confirm and this
        for leftover in self.site.folder.uploads.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        self._states.recover()
        detail = {"version": agent_version(), "pid": os.getpid()}
        self.site.journal.note("start", detail)

    # -- sync ------------------------------------------------------------------------------------

    async def _sync_loop(self) -> None:
        failures = 0
        asked: float | None = None  # when the oldest poll began that nothing has answered yet
        while True:
            seen = self._view.version if self._view else 0
            progress, paused = self._progress(), self._paused()
            now = self.site.monotonic()
            asked = now if asked is None else asked
            wait_ms = poll_wait_ms(busy=bool(progress), silent_s=now - asked)
            self._reported = (bool(progress), paused)
            self._nudge.clear()
            request = rounds_pb2.SyncRequest(
                seen=seen,
                wait_ms=wait_ms,
                progress=progress,
                agent_version=agent_version(),
                capability=str(self.site.capability),
                state="paused" if paused else "running",
            )
            try:
                view = await self._poll(request, may_give_up_s(now - asked))
                if view is not None:
                    self._take(view)
                    asked = None
                failures = 0
            except FederationError as error:
                asked = None
                if failures == 0:
                    logger.warning("no view of the federation: %s", error.diagnostics())
                self._trouble = error.diagnostics()
                later = error.retry_after_s if isinstance(error, NotReadyError) else 5.0
                delay = self.backoff.delay(failures, self.site.rng, at_least=min(later, 5.0))
                failures += 1
                self._wake.set()
                await asyncio.sleep(min(delay, 2.0) if isinstance(error, NotReadyError) else delay)

    async def _poll(self, request: rounds_pb2.SyncRequest, given_up_s: float) -> View | None:
        """One Sync; None when there is something to report before it was answered, unless it was
        silent for ``given_up_s`` by then."""
        connection = self.site.connection
        timeout_s = request.wait_ms / 1000 + ANSWER_S
        call = asyncio.ensure_future(
            connection.call(connection.rounds.Sync, request, timeout_s=timeout_s)
        )
        nudge = asyncio.ensure_future(self._nudge.wait())
        try:
            await asyncio.wait(
                {call, nudge}, timeout=given_up_s, return_when=asyncio.FIRST_COMPLETED
            )
            if nudge.done() and not call.done():
                return None
            return read_view(await call)
        finally:
            nudge.cancel()
            call.cancel()

    def _nudge_sync(self) -> None:
        """Do not let a long poll hide that work has begun or that the node was paused.

        Work that is over within a second is not worth a message.
        """
        now, busy = self.site.monotonic(), bool(self._progress())
        self._busy_since = (self._busy_since or now) if busy else None
        lasts = self._busy_since is not None and now - self._busy_since >= 1.0
        reported_busy, reported_paused = self._reported
        if (lasts and not reported_busy) or self._paused() != reported_paused:
            self._nudge.set()

    def _take(self, view: View) -> None:
        self._view = view
        self._offset = view.now - self.site.now()
        self._trouble = ""
        self._wake.set()

    def _progress(self) -> list[rounds_pb2.Progress]:
        now_ms = to_ms(self.site.now())
        lines = {
            round_: rounds_pb2.Progress(
                round=round_ref(round_),
                activity=transfer.activity,
                bytes_done=transfer.done,
                bytes_total=transfer.total,
                at_ms=now_ms,
            )
            for round_, transfer in list(self._actor.transfers.items())
        }
        for launcher in self.site.launchers.values():
            for round_, job in launcher.under_way():
                lines.setdefault(
                    round_,
                    rounds_pb2.Progress(
                        round=round_ref(round_),
                        activity=_activity(job),
                        step=job.step,
                        max_step=job.max_steps,
                        tokens=job.tokens,
                        at_ms=now_ms,
                    ),
                )
        return list(lines.values())[:_MAX_REPORTS]

    # -- reconcile -------------------------------------------------------------------------------

    async def _reconcile_loop(self) -> None:
        while True:
            self._wake.clear()
            training = False
            try:
                for launcher in self.site.launchers.values():
                    await launcher.tick()
                    training = training or bool(launcher.under_way())
            except OSError as error:  # most likely a full disk: nothing else stops for it
                logger.warning("the worker cannot be looked after: %s", error)
            for seen in self._view.runs if self._view else ():
                self._reconcile(seen)
            self._forget()
            soon = not self._show() or training
            self._nudge_sync()
            # Not wait_for: it forgets a cancellation that comes together with the wake-up.
            with suppress(TimeoutError):
                async with asyncio.timeout(TRAINING_TURN_S if soon else TURN_S):
                    await self._wake.wait()

    def _reconcile(self, seen: RunSeen) -> None:
        try:
            decision = self.decide_about(seen)
        except FederationError as error:
            decision = Decision(actions=(), why=error.diagnostics())
        if self._why.get(seen.run) != decision.why:
            logger.info("%s: %s", seen.run, decision.why)
        self._why[seen.run] = decision.why
        for action in decision.actions:
            self._start(action)

    def _forget(self) -> None:
        """Erase the secrets of runs that ended while this node was away."""
        if self._view is None:
            return
        known = [self._states.known(run) for run in self._states.runs()]
        for action in forgotten(self._view, [state for state in known if state is not None]):
            self._start(action)

    def decide_about(self, seen: RunSeen) -> Decision:
        """Observe one run and decide. Reads the journal and the disk, changes nothing."""
        return decide(self._observe(seen))

    def _observe(self, seen: RunSeen) -> Situation:
        site, journal = self.site, self.site.journal
        known = self._run_record(seen.run)
        current, last = seen.current, seen.last_released
        record = journal.round(current.round) if current else None
        confirm = journal.confirm(last.round) if last else None
        before = journal.round(last.round) if last and confirm is None else None
        refusal = self._lasting_refusal(seen.run)
        work, uploaded, waits = Work(), None, None
        earlier: tuple[tuple[RoundId, Work], ...] = ()
        if known is not None and current is not None:
            if record is None and refusal is None and current.raw_phase.name == "Open":
                waits = self._trust_waits(current.round)
                if waits is None:
                    refusal = self._consent(known.plan, seen)
                launcher = site.launchers.get(known.plan.local_step.kind)
                if refusal is None:
                    refusal = check_round(known.plan, seen, confirm)
                if refusal is None and launcher is not None:
                    refusal = launcher.refusal(known.plan)
                if refusal is None and waits is None:
                    waits = self._governance.waits(known.plan)
                if refusal is None and waits is None:
                    waits, refusal = self._plan_gate(known.plan, current)
            if record is not None and record.joined:
                work = self._work(current.round, known.plan)
                uploaded = self._uploaded(current, record)
            earlier = self._earlier(current.round, known.plan)
        return Situation(
            node=site.node,
            paused=self._paused(),
            seen=seen,
            plan=known.plan if known else None,
            stopped=known.stopped if known else None,
            refusal=refusal,
            record=record,
            upload=uploaded,
            confirm=confirm,
            took_part=before is not None and before.joined,
            held=site.models.held(seen.run) if known else frozenset(),
            delivered=self._recently_delivered(),
            work=work,
            earlier=earlier,
            carries=known is not None and carries(known.plan) and site.config.worker.carry_over,
            unsent=journal.unsent_confirms(seen.run) if known else (),
            secure=self._states.known(seen.run) if known and known.plan.secagg else None,
            said=journal.stage(seen.run) if known and known.plan.secagg else None,
            reserved=self._reserved(known.plan) if known else (),
            waits=waits,
            gate=self._gate(known.plan, current, uploaded) if known and current else Passed(),
        )

    def _plan_gate(self, plan: Plan, current: RoundSeen) -> tuple[str | None, Refusal | None]:
        """Whether the log bears out the round that is open: what is waited for, or a refusal."""
        if self.site.log is None:
            return None, None
        shown = PlanShown(
            plan_sha256=sha256_hex(plan.to_bytes()), model_in=current.start.model_root
        )
        match self.site.log.gate(current.round, shown):
            case Waits(why):
                return why, None
            case Stops(rule, why):
                return None, Refusal(rule, why)
            case _:
                return None, None

    def _gate(self, plan: Plan, current: RoundSeen, upload: UploadRecord | None) -> Gate:
        """Whether the log bears out the attempt, or the survivor list, that is shown."""
        if self.site.log is None:
            return Passed()
        match current.phase(plan):
            case Dealing() as phase if phase.without_keys:
                return Passed()  # the attempt begins when its keys are there
            case Dealing() | Uploading() as phase:
                start = StartShown(attempt=phase.attempt, ready=phase.ready)
                return self.site.log.gate(current.round, start)
            case Committing() as phase:
                root = UploadHeader.from_bytes(upload.header).root if upload else None
                listed = SurvivorsShown(
                    attempt=phase.attempt,
                    survivors=phase.survivors,
                    node=self.site.node,
                    upload_root=root,
                )
                return self.site.log.gate(current.round, listed)
            case _:
                return Passed()

    def _reserved(self, plan: Plan) -> tuple[RoundId, ...]:
        if plan.privacy is None:
            return ()
        return self.site.privacy.ledger.open_rounds(plan.run_id)

    def _trust_waits(self, round_: RoundId) -> str | None:
        """Whether what is in force has still to be asked for, since this round was first seen."""
        if self.site.trust is None:
            return None
        now = self.site.monotonic()
        first = self._first_seen.setdefault(round_, now)
        if len(self._first_seen) > _MAX_SEEN:
            self._first_seen = {round_: first}
        return self.site.trust.waits_for(first)

    def _recently_delivered(self) -> frozenset[Action]:
        """Statements acknowledged a short while ago: a peer's long poll need not show them yet."""
        now = self.site.monotonic()
        self._delivered = {a: at for a, at in self._delivered.items() if now - at < DELIVERED_S}
        return frozenset(self._delivered)

    def _run_record(self, run: RunId) -> RunRecord | None:
        """The journal's record; a plan never changes, so it is parsed once."""
        known = self._runs.get(run)
        if known is None or known.stopped is None:
            found = self.site.journal.run(run, known)
            if found is not None:
                self._runs[run] = found
            return found
        return known

    def _consent(self, plan: Plan, seen: RunSeen) -> Refusal | None:
        site = self.site
        refusal = check_plan(
            plan,
            said=seen.plan_digest,
            seen=seen,
            federation=site.config.federation,
            node=site.node,
        )
        pinned = site.journal.pinned_keys()
        if site.trust is not None:
            refusal = refusal or site.trust.refusal_for(plan)
            pinned = {}  # the institutions themselves vouch for their keys
        return (
            refusal
            or check_roster(plan, site.node, self._own_key(), pinned)
            or consent.check_site(plan, site.config, self._site_facts())
            or check_budget(plan, site.config)
            or self._governed(plan, seen)
        )

    def _governed(self, plan: Plan, seen: RunSeen) -> Refusal | None:
        """The consortium's policy and the site's own."""
        runs = self._view.runs if self._view else (seen,)
        index = seen.current.index if seen.current else 0
        return self._governance.refusal(plan, seen, runs, index=index)

    def _own_key(self) -> bytes:
        return self.site.signing_key.public_key().public_bytes_raw()

    def _site_facts(self) -> consent.SiteFacts:
        now = self.site.monotonic()
        if self._facts is None or now - self._facts[0] > FACTS_S:
            facts = consent.site_facts(self.site.config, self.site.folder.root)
            self._facts = (now, facts)
        return self._facts[1]

    def _work(self, round_: RoundId, plan: Plan) -> Work:
        launcher = self.site.launchers.get(plan.local_step.kind)
        if launcher is None:
            return Work(state="finished")  # the agent makes the update itself
        return launcher.work(job_id(round_))

    def _earlier(self, round_: RoundId, plan: Plan) -> tuple[tuple[RoundId, Work], ...]:
        """Jobs of earlier rounds that a worker is still on."""
        launcher = self.site.launchers.get(plan.local_step.kind)
        return () if launcher is None else launcher.unfinished(round_.run, round_.number)

    def _uploaded(self, current: RoundSeen, record: RoundRecord) -> UploadRecord | None:
        if record.outcome != "ready":
            return None
        return self.site.journal.upload(current.round, max(1, current.raw_phase.attempt))

    # -- actions ---------------------------------------------------------------------------------

    def _start(self, action: Action) -> None:
        if action in self._tasks:
            return
        failed = self._failed.get(action)
        if failed is not None:
            news = self._view is not None and failed.version not in (None, self._view.version)
            if self.site.monotonic() < failed.not_before and not news:
                return
        task = asyncio.create_task(self._carry_out(action), name=type(action).__name__)
        self._tasks[action] = task
        task.add_done_callback(lambda _: self._ended(action))

    def _ended(self, action: Action) -> None:
        self._tasks.pop(action, None)
        self._wake.set()

    async def _carry_out(self, action: Action) -> None:
        try:
            await self._actor.perform(action)
        except NotReadyError as error:
            # What a step of a secure sum waits for is told by the view; other calls are let be.
            news = isinstance(action, SecureStep)
            self._postpone(action, error, at_least=error.retry_after_s, await_news=news)
        except IntegrityError as error:
            with suppress(FederationError):  # a full disk: the reason is in the diagnostics
                await self._note_failure(action, error)
            self._postpone(action, error, at_least=REFUSED_S, await_news=False)
        except FederationError as error:
            # Mostly: the round has moved on. The next view says what to do instead.
            self._postpone(action, error, at_least=2.0, await_news=True)
        except OSError as error:  # most likely a full disk: nothing was said that is not kept
            room = StorageFullError(f"{error.filename or 'a file'}: {error.strerror or error}")
            self._postpone(action, room, at_least=2.0, await_news=False)
        except asyncio.CancelledError:
            raise
        except Exception:  # a bug must not end the node's other work
            logger.exception("%s failed", type(action).__name__)
            self._failed[action] = _Failed(1, self.site.monotonic() + BUG_S, None)
        else:
            self._failed.pop(action, None)
            if isinstance(action, SayJoin | SayDecline | SayReady | SayLeave | SecureStep):
                self._delivered[action] = self.site.monotonic()

    def _postpone(
        self, action: Action, error: FederationError, *, at_least: float, await_news: bool
    ) -> None:
        before = self._failed.get(action)
        times = before.times + 1 if before else 1
        delay = self.backoff.delay(times - 1, self.site.rng, at_least=at_least)
        seen = self._view.version if self._view and await_news else None
        until = self.site.monotonic() + delay
        self._failed[action] = _Failed(times, until, seen, why=str(error))
        logger.info("%s: %s", type(action).__name__, error.diagnostics())
        if len(self._failed) > 256:
            self._failed.pop(next(iter(self._failed)))

    async def _note_failure(self, action: Action, error: FederationError) -> None:
        round_ = getattr(action, "round", None)
        detail = {"action": type(action).__name__, "code": error.code, "reason": str(error)}
        await asyncio.to_thread(self.site.journal.note, "integrity", detail, round_=round_)

    def _run_seen(self, run: RunId) -> RunSeen:
        """The latest view of a run.

        Raises:
            NotFoundError: the coordinator does not show it any more.
        """
        for shown in self._view.runs if self._view else ():
            if shown.run == run:
                return shown
        raise NotFoundError(f"run {run} is not shown any more")

    def _seen(self, round_: RoundId) -> tuple[RunSeen, RoundSeen]:
        """The latest view of a round.

        Raises:
            NotFoundError: the coordinator does not show it any more.
        """
        for run in self._view.runs if self._view else ():
            for shown in (run.current, run.last_released):
                if shown is not None and shown.round == round_:
                    return run, shown
        raise NotFoundError(f"round {round_} is not shown any more")

    def _refuse(self, run: str, refusal: Refusal) -> None:
        self._refused[run] = (self.site.monotonic() + REFUSED_S, refusal)

    def _lasting_refusal(self, run: RunId) -> Refusal | None:
        until, refusal = self._refused.get(run, (0.0, None))
        return refusal if self.site.monotonic() < until else None

    def _paused(self) -> bool:
        return self.site.folder.paused.exists()

    async def _endings_loop(self) -> None:
        endings, site = Endings(), self.site
        while True:
            await asyncio.sleep(LOOK_S)
            if self._view is None or self._trouble:
                continue  # nothing is known of what is shown now
            try:
                await asyncio.to_thread(
                    endings.look,
                    site.launchers.values(),
                    self._view.runs,
                    site.journal,
                    now=site.now(),
                    monotonic=site.monotonic(),
                )
            except (FederationError, OSError) as error:
                logger.warning("what is left of earlier runs cannot be removed: %s", error)

    # -- certificate -----------------------------------------------------------------------------

    async def _renew_loop(self) -> None:
        failures = 0
        due = renewal_due(self._identity, rng=self.site.rng)
        while True:
            left = (due - self.site.now()).total_seconds()
            if left > 0:
                await asyncio.sleep(min(left, 3600.0))  # the clock may be set meanwhile
                continue
            try:
                identity = await renew(
                    self.site.keys,
                    self.site.connection,
                    node=self.site.node,
                    federation=self.site.config.federation,
                    log=self.site.log,
                )
            except FederationError as error:
                logger.warning("the certificate was not renewed: %s", error.diagnostics())
                delay = self.backoff.delay(failures, self.site.rng, at_least=1.0)
                failures += 1
                slow = isinstance(error, NotEnrolledError | MalformedMessageError)
                await asyncio.sleep(60.0 if slow else delay)
                continue
            failures, self._identity = 0, identity
            due = renewal_due(identity, rng=self.site.rng)
            detail = {"until": iso(identity.not_after), "serial": f"{identity.serial:x}"}
            await asyncio.to_thread(self.site.journal.note, "certificate renewed", detail)
            logger.info("the certificate was renewed until %s", detail["until"])

    # -- status ----------------------------------------------------------------------------------

    def _show(self) -> bool:
        """Write the status file where it changed; False: it is too soon for that."""
        site, view = self.site, self._view
        if site.monotonic() < self._show_at:
            return False
        offset = self._offset.total_seconds() if self._offset is not None else None
        status = NodeStatus(
            node=site.node,
            federation=site.config.federation,
            at=iso(site.now()),
            pid=os.getpid(),
            state="paused" if self._paused() else "running",
            coordinator=site.config.coordinator,
            connected=not self._trouble,
            trouble=self._trouble,
            clock_offset_s=round(offset, 1) if offset is not None else None,
            certificate_until=iso(self._identity.not_after),
            capability=str(site.capability),
            workers={kind: launcher.state for kind, launcher in site.launchers.items()},
            runs=tuple(self._run_status(seen) for seen in view.runs) if view else (),
        )
        if status != self._shown:
            self._shown, self._show_at = status, site.monotonic() + STATUS_S
            with suppress(OSError):  # a full disk must not end the node
                write_status(site.folder.status, status)
        return True

    def _declined(self, current: RoundSeen | None) -> str:
        record = self.site.journal.round(current.round) if current is not None else None
        return str(record.refusal) if record is not None and record.refusal is not None else ""

    def _why_now(self, run: RunId) -> str:
        """What the run waits for; with what keeps this node from doing its part, as on a full
        disk."""
        now = self.site.monotonic()
        failed = [
            f"{type(action).__name__} is tried again: {each.why}"
            for action, each in self._failed.items()
            if each.why and each.not_before > now and _run_of(action) == run
        ]
        return "; ".join(filter(None, (self._why.get(run, ""), *failed[-2:])))

    def _run_status(self, seen: RunSeen) -> RunStatus:
        known, current = self._runs.get(seen.run), seen.current
        doing = sorted(
            type(action).__name__ for action in self._tasks if _run_of(action) == seen.run
        )
        return RunStatus(
            run=seen.run,
            status=seen.status,
            round=str(current.round) if current else "",
            phase=current.raw_phase.name if current else "",
            why=self._why_now(seen.run),
            doing=tuple(doing),
            stopped=str(known.stopped) if known and known.stopped else "",
            declined=self._declined(current),
            privacy=promise(known.plan) if known else "",
        )


def _activity(work: Work) -> str:
    """What a worker is at, as the coordinator is told."""
    return work.waiting[:_ACTIVITY] or ("ending late work" if work.finishing else "training")


def _run_of(action: Action) -> RunId | None:
    """The run that an action belongs to."""
    found: RunId | None = getattr(action, "run", None)
    return found or getattr(getattr(action, "round", None), "run", None)


def handle_signals(agent: Agent, on: Callable[[int, Callable[[], None]], None]) -> None:
    """SIGTERM and SIGINT end the agent politely."""
    for number in (signal.SIGTERM, signal.SIGINT):
        on(number, agent.stop)


async def serve(site: Site) -> None:
    """Run an agent until a signal ends it. The folder's lock is held by the caller."""
    agent = Agent(site)
    handle_signals(agent, asyncio.get_running_loop().add_signal_handler)
    await agent.run()
