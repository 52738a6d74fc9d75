"""What a node does next about one run: a pure function of what it sees, said and has.

    view (a claim)  +  journal (what this node said)  +  worker (what is done)  ->  actions, why

It reads no clock and does no input or output. Level-based: it looks at states, never at the event
that woke the loop, so a lost answer, a restart or a skipped turn changes nothing: the next turn
decides the same again. Carrying out an action twice is harmless; the journal is written before
anything is sent. `minga node status` prints the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, assert_never

from node_agent.records import ConfirmRecord, RoundRecord, UploadRecord
from node_agent.rules import Refusal
from node_agent.secure_state import RANK, SecureKnown
from node_agent.view import RoundSeen, RunSeen, View
from policies.audit.gate import Gate, Passed, Stops, Waits
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.plan import Plan
from protocols.rounds import (
    Aborted,
    Burned,
    Committing,
    Dealing,
    Open,
    Phase,
    Released,
    Revealing,
    Training,
    Uploading,
)

# -- what may be done ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Read the run's plan and keep it."""

    run: RunId


@dataclass(frozen=True, slots=True)
class ObtainModel:
    """Fetch the model that a round starts from."""

    round: RoundId
    root: Digest


@dataclass(frozen=True, slots=True)
class SayJoin:
    """Take part, from this model."""

    round: RoundId
    root: Digest


@dataclass(frozen=True, slots=True)
class SayDecline:
    """Do not take part, by a rule."""

    round: RoundId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Train:
    """Hand the round's job to the worker."""

    round: RoundId


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Stop the round's job: nobody waits for it any more."""

    round: RoundId


@dataclass(frozen=True, slots=True)
class FinishEarly:
    """Ask for what the round's job has done so far: a later round takes it along."""

    round: RoundId


@dataclass(frozen=True, slots=True)
class SayReady:
    """Check what the local step produced and say that it is there."""

    round: RoundId


@dataclass(frozen=True, slots=True)
class SayLeave:
    """Say that the local step cannot be finished."""

    round: RoundId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class MakeVector:
    """Encode, spool and sign the vector of an attempt."""

    round: RoundId
    attempt: int


@dataclass(frozen=True, slots=True)
class Upload:
    """Send the vector and get its receipt."""

    round: RoundId
    attempt: int


@dataclass(frozen=True, slots=True)
class SecureStep:
    """The next message of a secure sum."""

    round: RoundId
    attempt: int
    step: Literal["ready", "deal", "acknowledge", "commit", "abort", "reveal", "close"]


@dataclass(frozen=True, slots=True)
class ComputeNext:
    """Download the sum, apply the outer step, compare models."""

    round: RoundId


@dataclass(frozen=True, slots=True)
class SayConfirm:
    """Tell what was computed, or object."""

    round: RoundId


@dataclass(frozen=True, slots=True)
class SettleSpend:
    """Write down what became of a round's reserved privacy."""

    round: RoundId
    in_sum: bool  # the sum was opened with this node's update


Action = (
    FetchPlan
    | ObtainModel
    | SayJoin
    | SayDecline
    | Train
    | Withdraw
    | FinishEarly
    | SayReady
    | SayLeave
    | MakeVector
    | Upload
    | SecureStep
    | ComputeNext
    | SayConfirm
    | SettleSpend
)


# -- what it rests on ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How far the local step of the current round is."""

    state: Literal["none", "running", "finished", "failed"] = "none"
    step: int = 0
    max_steps: int = 0  # 0: unknown
    tokens: int = 0
    waiting: str = ""  # of "running": for what it waits before it can begin, in a few words
    refusal: Refusal | None = None  # of "failed": code and sentence
    left_over: bool = False  # of "none": an earlier agent handed it in, a worker may take it up
    # of "running": only what is done so far is still wanted; "overdue": that takes too long
    finishing: Literal["", "asked", "overdue"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that one decision about one run rests on."""

    node: NodeId
    paused: bool
    seen: RunSeen
    plan: Plan | None  # journalled, its digest is the one that the run has
    stopped: Refusal | None  # journalled: this node takes no further part
    refusal: Refusal | None  # of plan_check and consent, for the current round
    record: RoundRecord | None  # journalled about the current round
    upload: UploadRecord | None  # journalled for the current round and attempt
    confirm: ConfirmRecord | None  # journalled about the last released round
    took_part: bool  # journalled: this node joined the last released round
    held: frozenset[Digest]  # roots of the models on disk
    delivered: frozenset[Action] = frozenset()  # acknowledged, though the view may not show it yet
    work: Work = field(default_factory=Work)
    earlier: tuple[tuple[RoundId, Work], ...] = ()  # jobs of earlier rounds that are not over
    carries: bool = False  # what was done and not sent is added to a later update
    unsent: tuple[RoundId, ...] = ()  # rounds whose computed model was not acknowledged yet
    gate: Gate = Passed()  # noqa: RUF009 - frozen; whether the log bears out what is shown
    secure: SecureKnown | None = None  # this node's state in a secure sum of this run
    said: SecureKnown | None = None  # the furthest it came in one, by the journal
    reserved: tuple[RoundId, ...] = ()  # rounds whose privacy is reserved and not settled
    waits: str | None = None  # what must be known before the current round can be answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now, and one line on why or on what is waited for."""

    actions: tuple[Action, ...]
    why: str


def _wait(why: str) -> Decision:
    return Decision(actions=(), why=why)


def _do(action: Action, why: str) -> Decision:
    return Decision(actions=(action,), why=why)


def decide(s: Situation) -> Decision:
    """The next actions about one run. They may be carried out at the same time."""
    if s.plan is None:
        if s.seen.status != "active":
            return _wait(f"the run is {s.seen.status}")
        if s.refusal is not None:  # the plan could be read and is not to be kept
            return _answer_refusal(s, s.refusal)
        return _do(FetchPlan(s.seen.run), "reading the plan")
    after, now = _after_release(s), _current(s, s.plan)
    closing = (*_late_confirms(s), *_leftover(s), *_unsettled(s), *_overtaken(s))
    if not after.actions:
        return Decision(actions=closing + now.actions, why=now.why)
    return Decision(actions=closing + after.actions + now.actions, why=f"{after.why}; {now.why}")


def _late_confirms(s: Situation) -> tuple[Action, ...]:
    """What was computed for earlier rounds is said, although the run has gone on since."""
    last = s.seen.last_released
    return tuple(SayConfirm(round_) for round_ in s.unsent if last is None or last.round != round_)


def _leftover(s: Situation) -> tuple[Action, ...]:
    """Erase the secrets of a secure sum as soon as its round is over, however it ended."""
    known, current = s.secure, s.seen.current
    if known is None or current is None or known.stage == "closed":
        return ()
    over = known.round != current.round or current.raw_phase.name in _OVER
    if not over:
        return ()
    return (SecureStep(known.round, known.attempt, "close"),)


def _unsettled(s: Situation) -> tuple[Action, ...]:
    """Settle what was reserved for rounds that are over."""
    current, last = s.seen.current, s.seen.last_released
    found = []
    for round_ in s.reserved:
        if current is not None and current.round == round_ and current.raw_phase.name not in _OVER:
            continue
        ended = [seen for seen in (current, last) if seen is not None and seen.round == round_]
        in_sum = any(s.node in seen.raw_phase.survivors for seen in ended)
        found.append(SettleSpend(round_, in_sum))
    return tuple(found)


def forgotten(view: View, states: Iterable[SecureKnown]) -> tuple[Action, ...]:
    """Erase the secrets of runs that are not shown any more: they ended long ago."""
    shown = {seen.run for seen in view.runs}
    return tuple(
        SecureStep(known.round, known.attempt, "close")
        for known in states
        if known.round.run not in shown and known.stage != "closed"
    )


def _overtaken(s: Situation) -> tuple[Action, ...]:
    """What becomes of jobs whose round is over, while a later one is shown."""
    ending = [_ending(s, round_, work) for round_, work in s.earlier]
    return tuple(action for action in ending if action is not None)


def _ending(s: Situation, round_: RoundId, work: Work) -> Action | None:
    """How a job ends that its round does not wait for any more; None: it is ending."""
    wanted = s.carries and s.stopped is None and s.seen.status == "active"
    if not wanted or work.finishing == "overdue":
        return Withdraw(round_)
    return FinishEarly(round_) if not work.finishing else None


_OVER = (Released.__name__, Aborted.__name__, Burned.__name__)


# -- the last released round -----------------------------------------------------------------------


def _after_release(s: Situation) -> Decision:
    last = s.seen.last_released
    if last is None or not last.opened:
        return _wait("")
    if s.confirm is not None:
        if s.confirm.answered:
            return _wait("")
        verb = "objecting to" if s.confirm.objection else "confirming"
        return _do(SayConfirm(last.round), f"{verb} the model of round {last.round}")
    if not _computes(s):
        return _wait("")  # it had no part in that round: the published model is fetched
    if last.start.model_root in s.held:
        return _do(ComputeNext(last.round), f"computing the model after round {last.round}")
    again = ObtainModel(last.round, last.start.model_root)
    return _do(again, f"fetching again the model that round {last.round} started from")


def _computes(s: Situation) -> bool:
    """Whether this node computes what followed from the last released round."""
    last = s.seen.last_released
    if last is None or s.confirm is not None or s.stopped is not None:
        return False
    return s.took_part or last.start.model_root in s.held


# -- the current round -----------------------------------------------------------------------------


def _current(s: Situation, plan: Plan) -> Decision:
    current = s.seen.current
    if current is None:
        active = s.seen.status == "active"
        return _wait("no round has begun" if active else f"the run is {s.seen.status}")
    phase = current.phase(plan)
    if s.seen.status != "active" and _is_over(phase):
        return _withdraw_or(s, current, f"the run is {s.seen.status}")
    match phase:
        case Open():
            return _while_open(s, current, phase)
        case Training():
            return _while_training(s, plan, current, phase)
        case Dealing() | Committing() | Revealing():
            return while_secure(s, current.round, phase) or _withdraw_or(
                s, current, f"round {current.round} goes on without this node"
            )
        case Uploading():
            return _while_uploading(s, plan, current, phase)
        case Released(opened=None):
            return _wait(f"round {current.round}: the sum is being opened")
        case Released():
            return _wait(f"round {current.round} is released; the next one has not begun")
        case Aborted(reason=reason) | Burned(reason=reason):
            return _withdraw_or(s, current, f"round {current.round} ended: {reason}")
        case _:
            assert_never(phase)


def _is_over(phase: Phase) -> bool:
    return isinstance(phase, Released | Aborted | Burned)


def _answer_refusal(s: Situation, refusal: Refusal) -> Decision:
    """Decline an open round; say nothing about one that is past joining."""
    current = s.seen.current
    if current is None or current.raw_phase.name != Open.__name__:
        return _wait(str(refusal))
    said = {*current.raw_phase.declined, *current.raw_phase.joined}
    if s.node in said or SayDecline(current.round, refusal) in s.delivered:
        return _wait(str(refusal))
    return _do(SayDecline(current.round, refusal), str(refusal))


def _while_open(s: Situation, current: RoundSeen, phase: Open) -> Decision:
    round_, root = current.round, current.start.model_root
    if s.record is not None:  # decided before: say the same again until it is known
        if s.record.joined:
            if s.node in phase.joined or SayJoin(round_, root) in s.delivered:
                return _wait(f"round {round_}: joined, waiting for the others")
            if s.record.start_root != root:
                return _wait(f"round {round_} was joined from another model: it is not this round")
            return _do(SayJoin(round_, root), f"joining round {round_}")
        refusal = s.record.refusal or Refusal("site.unknown", "declined before")
        if s.node in phase.declined or SayDecline(round_, refusal) in s.delivered:
            return _wait(f"round {round_}: declined: {refusal}")
        return _do(SayDecline(round_, refusal), f"declining round {round_}: {refusal}")
    if s.node in phase.joined or s.node in phase.declined:
        # The journal was lost or belongs to another node: nothing is known, so nothing is said.
        return _wait(f"round {round_}: an answer of this node stands that its journal lacks")
    refused = s.stopped or s.refusal
    if refused is None and s.waits is not None:
        return _wait(f"round {round_}: {s.waits}")
    if refused is None and s.paused:
        refused = Refusal("site.paused", "the site paused its node")
    if refused is not None:
        return _do(SayDecline(round_, refused), f"declining round {round_}: {refused}")
    last = s.seen.last_released
    following = last.following if last is not None else None
    if _computes(s) and following is not None and following.model_root == root:
        # Also when a model of that root is here already: first this node's own verdict on it.
        return _wait(f"round {round_}: its model is being computed")
    if root not in s.held:
        return _do(ObtainModel(round_, root), f"round {round_}: fetching its model")
    return _do(SayJoin(round_, root), f"joining round {round_}")


def _while_training(s: Situation, plan: Plan, current: RoundSeen, phase: Training) -> Decision:
    round_, root = current.round, current.start.model_root
    if s.node not in phase.cohort:
        return _withdraw_or(s, current, f"round {round_} trains without this node")
    if s.node in phase.left:
        return _withdraw_or(s, current, f"round {round_}: left")
    record = s.record
    if record is None or not record.joined or record.start_root != root:
        lost = Refusal("site.journal", "this node's journal does not know that it joined")
        return _do(SayLeave(round_, lost), f"leaving round {round_}: {lost}")
    if record.left is not None:
        if SayLeave(round_, record.left) in s.delivered:
            return _wait(f"round {round_}: left: {record.left}")
        return _do(SayLeave(round_, record.left), f"leaving round {round_}: {record.left}")
    if record.outcome == "ready":
        # The attempt of an open sum is known to be the first: encode while the others train.
        silent = _lost_ready(s, round_)
        if silent is not None:
            return silent
        early: tuple[Action, ...] = ()
        if plan.mode == "open" and s.upload is None:
            early = (MakeVector(round_, 1),)
        if s.node in phase.ready or SayReady(round_) in s.delivered:
            return Decision(actions=early, why=f"round {round_}: ready, waiting for the others")
        return Decision(actions=(SayReady(round_), *early), why=f"round {round_}: saying ready")
    if s.stopped is not None:
        return _do(SayLeave(round_, s.stopped), f"leaving round {round_}: {s.stopped}")
    if root not in s.held:
        return _do(ObtainModel(round_, root), f"round {round_}: fetching its model again")
    return _at_work(s, round_)


def _at_work(s: Situation, round_: RoundId) -> Decision:
    match s.work.state:
        case "none":
            if s.earlier:
                before, _ = s.earlier[0]
                return _wait(f"round {round_}: the worker ends its work for round {before} first")
            return _do(Train(round_), f"round {round_}: starting the local step")
        case "running":
            if s.work.waiting:
                return _wait(f"round {round_}: {s.work.waiting}")
            of = f" of {s.work.max_steps}" if s.work.max_steps else ""
            return _wait(f"round {round_}: training, step {s.work.step}{of}")
        case "finished":
            return _do(SayReady(round_), f"round {round_}: the local step is done")
        case "failed":
            why = s.work.refusal or Refusal("worker.failed", "the local step failed")
            return _do(SayLeave(round_, why), f"leaving round {round_}: {why}")
        case _:
            assert_never(s.work.state)


def _while_uploading(s: Situation, plan: Plan, current: RoundSeen, phase: Uploading) -> Decision:
    round_, attempt = current.round, phase.attempt
    if s.node not in phase.ready:
        return _withdraw_or(s, current, f"round {round_} goes on without this node")
    if plan.secagg is not None:
        lost = lost_state(s, round_, phase)
        if lost is not None:
            return lost
    if s.upload is None or s.upload.attempt != attempt:
        if s.record is None or s.record.outcome != "ready":
            return _wait(f"round {round_}: this node's journal does not know that it is ready")
        return _do(MakeVector(round_, attempt), f"round {round_}: encoding attempt {attempt}")
    if s.upload.receipt is None:
        if not isinstance(s.gate, Passed):
            return _wait(f"round {round_}: {s.gate.why}")
        return _do(Upload(round_, attempt), f"round {round_}: uploading attempt {attempt}")
    return _wait(f"round {round_}: uploaded, waiting for the others")


def _withdraw_or(s: Situation, current: RoundSeen, why: str) -> Decision:
    if s.work.state == "running" or s.work.left_over:
        ending = _ending(s, current.round, s.work)
        if ending is None:
            return _wait(f"{why}; keeping what the local step has done")
        return _do(ending, f"{why}; stopping the local step")
    return _wait(why)


# -- the secure sum --------------------------------------------------------------------------------

SecurePhase = Dealing | Uploading | Committing | Revealing


def _shown_stage(node: NodeId, phase: SecurePhase) -> str:
    """How far the coordinator shows this node to be: its state must be at least that far."""
    match phase:
        case Dealing():
            if node in phase.agreed:
                return "agreed"
            if node in phase.dealt:
                return "dealt"
            return "ready" if node in phase.keyed else ""
        case Uploading():
            return "fixed" if node in phase.received else "agreed"
        case Committing():
            if node in phase.commits:
                return "committed"
            return "fixed" if node in phase.survivors else "agreed"
        case Revealing():
            if node in phase.revealed:
                return "revealed"
            if node in phase.commits:
                return "committed"
            return "fixed" if node in phase.survivors else "agreed"
        case _:
            assert_never(phase)


def _lost(round_: RoundId, what: str) -> Decision:
    return _wait(f"round {round_}: secagg.state_lost: {what}")


def _lost_ready(s: Situation, round_: RoundId) -> Decision | None:
    """Whether a READY was signed under a state that is not there any more; None: it was not."""
    known, said = s.secure, s.said
    if said is None or said.round != round_:
        return None  # a crash came before the first READY: nothing was sent
    if known is None or known.order < said.order:
        return _lost(round_, "this node has no state of its secure sum")
    return None


def lost_state(s: Situation, round_: RoundId, phase: SecurePhase) -> Decision | None:
    """Whether this node did more in the attempt than its state knows; None: it did not.

    Then the state was lost or rolled back (a restored backup, a snapshot of the machine). Going on
    could put two vectors under one set of masks, or a second verdict beside the first, so the node
    says nothing more in this round. Two witnesses: what the coordinator shows, and what this node's
    own journal knows, which needs no honest coordinator.
    """
    known, said, shown = s.secure, s.said, _shown_stage(s.node, phase)
    if known is None or known.round != round_ or known.attempt > phase.attempt:
        return _lost(round_, "this node has no state of its secure sum")
    if said is not None and known.order < said.order:
        return _lost(round_, "the state is older than the journal")
    if known.attempt < phase.attempt:
        if shown or not isinstance(phase, Dealing):
            return _lost(round_, "the state is of an earlier attempt")
        return None
    if known.stage in ("aborted", "closed"):
        if known.stage == "aborted" and isinstance(phase, Committing):
            return None
        return _wait(f"round {round_}: this node gave attempt {known.attempt} up")
    if shown and RANK[known.stage] < RANK[shown]:
        return _lost(round_, "the state is older than what this node has sent")
    if s.upload is not None and RANK[known.stage] < RANK["fixed"]:
        return _lost(round_, "the state is older than the vector that this node has made")
    return None


def while_secure(
    s: Situation, round_: RoundId, phase: Dealing | Committing | Revealing
) -> Decision | None:
    """The next step of a secure sum; None: this node has no part in it."""
    if s.node not in phase.ready:
        return None
    lost = lost_state(s, round_, phase)
    if lost is not None:
        return lost
    known = s.secure
    if known is None:
        return None
    match phase:
        case Dealing():
            return _while_dealing(s, round_, phase, known)
        case Committing():
            return _while_committing(s, round_, phase, known)
        case Revealing():
            return _while_revealing(s, round_, phase, known)
        case _:
            assert_never(phase)


def _secure(
    s: Situation,
    round_: RoundId,
    attempt: int,
    step: Literal["ready", "deal", "acknowledge", "commit", "abort", "reveal"],
    why: str,
) -> Decision:
    action = SecureStep(round_, attempt, step)
    if action in s.delivered:
        return _wait(f"round {round_}: {why}, waiting for the others")
    return _do(action, f"round {round_}: {why}")


def _while_dealing(s: Situation, round_: RoundId, phase: Dealing, known: SecureKnown) -> Decision:
    attempt = phase.attempt
    if known.attempt < attempt:
        return _secure(s, round_, attempt, "ready", f"attempt {attempt} begins with fresh keys")
    if s.node in phase.without_keys:  # made, and perhaps not handed in before a crash
        return _secure(s, round_, attempt, "ready", f"handing in the keys of attempt {attempt}")
    if phase.without_keys:
        return _wait(f"round {round_}: attempt {attempt}, waiting for the others' fresh keys")
    gated = _gated(s, round_, attempt)
    if gated is not None:
        return gated
    if s.node not in phase.dealt:
        return _secure(s, round_, attempt, "deal", "dealing shares")
    if phase.dealt != phase.ready:
        return _wait(f"round {round_}: dealt, waiting for the others")
    if s.node not in phase.agreed:
        return _secure(s, round_, attempt, "acknowledge", "checking what was dealt")
    return _wait(f"round {round_}: agreed, waiting for the others")


def _while_committing(
    s: Situation, round_: RoundId, phase: Committing, known: SecureKnown
) -> Decision:
    quorum = phase.terms.quorum
    openable = quorum is not None and len(phase.survivors) >= quorum.to_open
    if known.stage == "aborted" or not openable:
        if s.node in phase.aborts:
            return _wait(f"round {round_}: aborted, waiting for the others")
        return _secure(s, round_, phase.attempt, "abort", "signing an abort")
    uploaded = s.upload is not None and s.upload.receipt is not None
    if s.node not in phase.survivors:
        if uploaded:
            return _secure(
                s, round_, phase.attempt, "abort", "left out though its update was handed in"
            )
        return _wait(f"round {round_}: the survivor list is being signed")
    if s.node not in phase.commits:
        gated = _gated(s, round_, phase.attempt)
        if gated is not None:
            return gated
        return _secure(s, round_, phase.attempt, "commit", "checking the survivor list")
    return _wait(f"round {round_}: committed, waiting for the others")


def _gated(s: Situation, round_: RoundId, attempt: int) -> Decision | None:
    """Log before act: wait until the log says what is shown, abort if it says something else."""
    match s.gate:
        case Waits(why):
            return _wait(f"round {round_}: {why}")
        case Stops(rule, why):
            return _secure(s, round_, attempt, "abort", f"{rule}: {why}")
        case _:
            return None


def _while_revealing(
    s: Situation, round_: RoundId, phase: Revealing, known: SecureKnown
) -> Decision:
    if s.node not in phase.survivors:
        return _wait(f"round {round_}: the masks are being taken off")
    if known.stage == "fixed":
        return _secure(s, round_, phase.attempt, "commit", "checking the survivor list")
    if s.node not in phase.revealed:
        return _secure(s, round_, phase.attempt, "reveal", "revealing shares")
    return _wait(f"round {round_}: revealed, waiting for the others")
