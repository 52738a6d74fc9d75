"""What a round can be, and what may happen next.

    Open --all answered, or deadline--> Training --all ready, or deadline--+
      |                                    |                               |
      |                                    |        secure sum             |  plan mode "open"
      |                                    |   +---------------------------+----------+
      |                                    |   v                                      |
      |                                    | Dealing --everyone agreed--> Uploading <-+
      |                                    |   |  ^                       |       |
      |                                    |   |  '-someone lost: again,  |       | open: enough
      |                                    |   |    with fresh keys       |       | uploads
      |                                    |   |                          v       |
      |                                    |   |                     Committing   |
      |                                    |   |     threshold commits|   |  |    |
      |                                    |   |                      v   |  |    |
      |                                    |   |              Revealing --+--|-+  |
      |                                    |   |     threshold sets|      |  | |  |
      | too few                    too few |   | too few           v      |  | |  |
      v                                    v   v               Released <-|--|-|--'
    Aborted <------ threshold aborts -------------------------------------'  | |
    Burned  <------ neither quorum, too few shares, or the sum cannot stand -'-'

Each phase is a value that carries what is known in that phase and nothing else, so a sum cannot be
asked for before it exists. ``step`` decides; it reads no clock, draws no randomness and does no
input or output. The coordinator acts on its answer and ``minga run why`` prints it. Released means
that the sum may be opened; it is final once ``opened`` says what came out. Normative text:
protocols/spec/round.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import NamedTuple, assert_never

from protocols.cohort import Terms
from protocols.errors import EquivocationError, NotListedError, WrongPhaseError
from protocols.identifiers import Digest, NodeId, RoundId

Nodes = frozenset[NodeId]
NOBODY: Nodes = frozenset()


# -- phases ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """The plan is public. Nodes of the roster join, or decline with a rule id."""

    terms: Terms
    closes_at: datetime  # UTC
    joined: Nodes = NOBODY
    declined: Nodes = NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The cohort trains. A node that cannot go on leaves with a code."""

    terms: Terms
    closes_at: datetime  # UTC
    cohort: Nodes
    ready: Nodes = NOBODY
    left: Nodes = NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealing:
    """The ready set deals shares with fresh keys, then agrees on what was dealt."""

    terms: Terms
    closes_at: datetime  # UTC
    attempt: int  # from 1
    ready: Nodes
    keyed: Nodes = NOBODY  # made fresh keys for this attempt; the first attempt's came with READY
    dealt: Nodes = NOBODY
    agreed: Nodes = NOBODY

    @property
    def without_keys(self) -> Nodes:
        """Nodes whose fresh keys are missing: nobody can deal before all are there."""
        return NOBODY if self.attempt == 1 else self.ready - self.keyed

    @property
    def missing(self) -> Nodes:
        """Nodes whose next message is waited for."""
        return self.without_keys or (
            self.ready - (self.agreed if self.dealt == self.ready else self.dealt)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploading:
    """Integer vectors arrive; each counts once it is complete and its root is right."""

    terms: Terms
    closes_at: datetime  # UTC
    attempt: int
    ready: Nodes
    received: Nodes = NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class Committing:
    """The survivor list is proposed. Survivors may sign it, any ready node an abort; nobody both.

    A list too short to open is proposed as well: then only aborts can come, and their quorum is
    the proof that nothing was opened.
    """

    terms: Terms
    closes_at: datetime  # UTC
    attempt: int
    ready: Nodes
    survivors: Nodes
    commits: Nodes = NOBODY
    aborts: Nodes = NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class Revealing:
    """A quorum signed one list: survivors reveal one kind of share per peer."""

    terms: Terms
    closes_at: datetime  # UTC
    attempt: int
    ready: Nodes
    survivors: Nodes
    commits: Nodes
    revealed: Nodes = NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What came out of a round."""

    sum: Digest  # blob of the packed integer sum
    model_root: Digest  # of the snapshot that the outer step made


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The spend is recorded; the sum is, or is being, opened over exactly these survivors."""

    attempt: int
    survivors: Nodes
    opened: Opened | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborted:
    """Nothing can be opened; nothing is charged."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Burned:
    """A sum may have been opened, though none was released: charged as if it had been."""

    code: str
    reason: str


Phase = Open | Training | Dealing | Uploading | Committing | Revealing | Released | Aborted | Burned


# -- events: parsed, their signatures and senders verified -------------------------------------


@dataclass(frozen=True, slots=True)
class JoinArrived:
    """``node`` takes part."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class DeclineArrived:
    """``node`` does not take part, by one of its rules."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class ReadyArrived:
    """``node`` has an update to contribute; in a later attempt, fresh keys for it."""

    node: NodeId
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class LeaveArrived:
    """``node`` joined but cannot finish its training."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class DealArrived:
    """``node`` dealt its shares of ``attempt``."""

    node: NodeId
    attempt: int


@dataclass(frozen=True, slots=True)
class AgreementArrived:
    """``node`` opened its packets of ``attempt`` and confirms one context."""

    node: NodeId
    attempt: int


@dataclass(frozen=True, slots=True)
class ComplaintUpheld:
    """``against`` dealt a share of ``attempt`` that is provably wrong."""

    against: NodeId
    attempt: int


@dataclass(frozen=True, slots=True)
class UploadArrived:
    """The vector of ``node`` for ``attempt`` is complete, durable, and has the signed root."""

    node: NodeId
    attempt: int


@dataclass(frozen=True, slots=True)
class CommitArrived:
    """``node`` signed exactly the proposed survivor list of ``attempt``."""

    node: NodeId
    attempt: int


@dataclass(frozen=True, slots=True)
class AbortArrived:
    """``node`` signed an abort of ``attempt``."""

    node: NodeId
    attempt: int


@dataclass(frozen=True, slots=True)
class SharesArrived:
    """``node`` revealed its shares of ``attempt``."""

    node: NodeId
    attempt: int


@dataclass(frozen=True, slots=True)
class SumOpened:
    """The sum of the released survivors is on disk and the outer step is done."""

    opened: Opened


@dataclass(frozen=True, slots=True)
class SumFailed:
    """The sum of the released survivors cannot stand."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """A person stopped the run."""

    reason: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nobody called; the clock moved."""


NodeEvent = (
    JoinArrived
    | DeclineArrived
    | ReadyArrived
    | LeaveArrived
    | DealArrived
    | AgreementArrived
    | UploadArrived
    | CommitArrived
    | AbortArrived
    | SharesArrived
)
Event = NodeEvent | ComplaintUpheld | SumOpened | SumFailed | StopRequested | TimePassed


class Step(NamedTuple):
    """What a round becomes, and one line on why, for diagnostics and `minga run why`."""

    phase: Phase
    why: str


# -- the machine -------------------------------------------------------------------------------


def step(round_: RoundId, phase: Phase, event: Event, now: datetime) -> Step:
    """Decide what ``round_`` becomes.

    A repeated event leaves the phase as it is: after a lost answer a node sends the same message
    again, and must not be counted twice.

    Args:
        round_: for the sentences.
        phase: what the round is now.
        event: what happened; ``TimePassed`` if nothing did.
        now: UTC.

    Raises:
        WrongPhaseError: the event belongs to a phase this round is not in, or came too late.
        NotListedError: the node is not on the list that this phase asks.
        EquivocationError: the node has said the contrary before.
    """
    if isinstance(event, StopRequested):
        return _stop(phase, event)
    match phase:
        case Open():
            return _while_open(round_, phase, event, now)
        case Training():
            return _while_training(round_, phase, event, now)
        case Dealing():
            return _while_dealing(round_, phase, event, now)
        case Uploading():
            return _while_uploading(round_, phase, event, now)
        case Committing():
            return _while_committing(round_, phase, event, now)
        case Revealing():
            return _while_revealing(round_, phase, event, now)
        case Released():
            return _when_released(round_, phase, event)
        case Aborted() | Burned():
            if isinstance(event, TimePassed):
                return Step(phase, phase.reason)
            raise _wrong(round_, phase, event)
        case _:
            assert_never(phase)


def open_round(terms: Terms, *, now: datetime, join_s: int) -> Open:
    """The first phase of a round."""
    return Open(terms=terms, closes_at=now + timedelta(seconds=join_s))


def _while_open(round_: RoundId, phase: Open, event: Event, now: datetime) -> Step:
    _in_time(round_, phase, event, now)
    match event:
        case JoinArrived(node):
            _listed(round_, node, phase.terms.roster, "on the roster")
            if node in phase.declined:
                raise EquivocationError(f"{node} has declined round {round_} before")
            phase = replace(phase, joined=phase.joined | {node})
        case DeclineArrived(node):
            _listed(round_, node, phase.terms.roster, "on the roster")
            if node in phase.joined:
                raise EquivocationError(f"{node} has joined round {round_} before")
            phase = replace(phase, declined=phase.declined | {node})
        case TimePassed():
            pass
        case _:
            raise _wrong(round_, phase, event)

    need, joined = phase.terms.to_start, len(phase.joined)
    silent = set(phase.terms.roster) - phase.joined - phase.declined
    possible = joined + len(silent)
    if possible < need:
        return _abort("too_few_joined", f"{joined} joined, {need} needed, nobody else can join")
    if silent and now < phase.closes_at:
        by = _clock(phase.closes_at)
        return Step(phase, f"{joined} joined, {need} needed; until {by} for {_names(silent)}")
    if joined < need:
        return _abort("too_few_joined", f"{joined} joined by the deadline, {need} needed")
    training = Training(terms=phase.terms, closes_at=now + phase.terms.train, cohort=phase.joined)
    return Step(training, f"{joined} joined, {len(phase.declined)} declined")


def _while_training(round_: RoundId, phase: Training, event: Event, now: datetime) -> Step:
    _in_time(round_, phase, event, now)
    match event:
        case JoinArrived(node) if node in phase.cohort:
            return Step(phase, f"{node} repeated its join")
        case ReadyArrived(node, attempt):
            _listed(round_, node, phase.cohort, "in the cohort")
            _same_attempt(round_, 1, attempt)
            if node in phase.left:
                raise EquivocationError(f"{node} has left round {round_} before")
            phase = replace(phase, ready=phase.ready | {node})
        case LeaveArrived(node):
            _listed(round_, node, phase.cohort, "in the cohort")
            if node in phase.ready:
                raise EquivocationError(f"{node} was ready for round {round_} before")
            phase = replace(phase, left=phase.left | {node})
        case TimePassed():
            pass
        case _:
            raise _wrong(round_, phase, event)

    need, ready = phase.terms.to_start, len(phase.ready)
    missing = phase.cohort - phase.ready - phase.left
    if ready + len(missing) < need:
        return _abort("too_few_ready", f"{ready} ready, {need} needed, the others left")
    if missing and now < phase.closes_at:
        by = _clock(phase.closes_at)
        return Step(phase, f"{ready} ready, {need} needed; until {by} for {_names(missing)}")
    if ready < need:
        return _abort("too_few_ready", f"{ready} ready by the deadline, {need} needed")
    why = f"{ready} of {len(phase.cohort)} are ready"
    if phase.terms.quorum is None:
        return Step(
            Uploading(
                terms=phase.terms,
                closes_at=now + phase.terms.upload,
                attempt=1,
                ready=phase.ready,
            ),
            why,
        )
    return Step(_deal(phase.terms, 1, phase.ready, now), why)


def _while_dealing(round_: RoundId, phase: Dealing, event: Event, now: datetime) -> Step:
    _in_time(round_, phase, event, now)
    lost: Nodes = NOBODY
    match event:
        case ReadyArrived(node, attempt) if node in phase.ready and attempt < phase.attempt:
            return Step(phase, f"{node} repeated that it is ready")
        case ReadyArrived(node, attempt) if node in phase.ready:
            _same_attempt(round_, phase.attempt, attempt)
            phase = replace(phase, keyed=phase.keyed | {node}) if attempt > 1 else phase
        case DealArrived(node, attempt):
            _listed(round_, node, phase.ready, "in the ready set")
            _same_attempt(round_, phase.attempt, attempt)
            if phase.without_keys:
                raise WrongPhaseError(f"round {round_}: not everybody has fresh keys yet")
            phase = replace(phase, dealt=phase.dealt | {node})
        case AgreementArrived(node, attempt):
            _listed(round_, node, phase.ready, "in the ready set")
            _same_attempt(round_, phase.attempt, attempt)
            if phase.dealt != phase.ready:
                raise WrongPhaseError(f"round {round_}: not everybody has dealt yet")
            phase = replace(phase, agreed=phase.agreed | {node})
        case ComplaintUpheld(against, attempt):
            _listed(round_, against, phase.ready, "in the ready set")
            _same_attempt(round_, phase.attempt, attempt)
            lost = frozenset({against})
        case TimePassed():
            pass
        case _:
            raise _wrong(round_, phase, event)

    if not lost and phase.agreed == phase.ready:
        uploading = Uploading(
            terms=phase.terms,
            closes_at=now + phase.terms.upload,
            attempt=phase.attempt,
            ready=phase.ready,
        )
        return Step(uploading, f"all {len(phase.ready)} agreed on what was dealt")
    waiting = phase.missing
    if not lost:
        verb = "agree on what was dealt" if phase.dealt == phase.ready else "deal"
        verb = "make fresh keys" if phase.without_keys else verb
        if now < phase.closes_at:
            by = _clock(phase.closes_at)
            return Step(phase, f"until {by} for {_names(waiting)} to {verb}")
        lost = waiting
    left, need = phase.ready - lost, phase.terms.to_start
    if len(left) < need:
        return _abort("too_few_dealt", f"without {_names(lost)} {len(left)} remain, {need} needed")
    # Nothing was uploaded: the lost are dropped and the others start over with fresh keys.
    return Step(
        _deal(phase.terms, phase.attempt + 1, left, now),
        f"attempt {phase.attempt + 1} without {_names(lost)}",
    )


def _while_uploading(round_: RoundId, phase: Uploading, event: Event, now: datetime) -> Step:
    _in_time(round_, phase, event, now)
    match event:
        case ReadyArrived(node) if node in phase.ready:
            return Step(phase, f"{node} repeated that it is ready")
        case DealArrived(node, attempt) | AgreementArrived(node, attempt) if (
            node in phase.ready and attempt == phase.attempt and phase.terms.quorum
        ):
            return Step(phase, f"{node} repeated itself")
        case UploadArrived(node, attempt):
            _listed(round_, node, phase.ready, "in the ready set")
            _same_attempt(round_, phase.attempt, attempt)
            phase = replace(phase, received=phase.received | {node})
        case TimePassed():
            pass
        case _:
            raise _wrong(round_, phase, event)

    missing, received = phase.ready - phase.received, len(phase.received)
    if missing and now < phase.closes_at:
        by = _clock(phase.closes_at)
        return Step(
            phase, f"{received} of {len(phase.ready)} uploaded; until {by} for {_names(missing)}"
        )
    why = f"{received} of {len(phase.ready)} uploaded"
    if phase.terms.quorum is None:
        need = phase.terms.min_participants
        if received < need:
            return _abort("too_few_uploads", f"{why} by the deadline, {need} needed")
        return Step(Released(attempt=phase.attempt, survivors=phase.received), why)
    committing = Committing(
        terms=phase.terms,
        closes_at=now + phase.terms.commit,
        attempt=phase.attempt,
        ready=phase.ready,
        survivors=phase.received,
    )
    return Step(committing, why)


def _while_committing(round_: RoundId, phase: Committing, event: Event, now: datetime) -> Step:
    _in_time(round_, phase, event, now)
    quorum = phase.terms.quorum
    if quorum is None:
        raise ValueError("a round without a quorum cannot be Committing")
    openable = len(phase.survivors) >= quorum.to_open
    match event:
        case CommitArrived(node, attempt):
            _listed(round_, node, phase.survivors, "a survivor")
            _same_attempt(round_, phase.attempt, attempt)
            if not openable:
                raise WrongPhaseError(
                    f"round {round_}: {len(phase.survivors)} survivors are too few to commit to"
                )
            if node in phase.aborts:
                raise EquivocationError(f"{node} signed two verdicts for round {round_}")
            phase = replace(phase, commits=phase.commits | {node})
        case AbortArrived(node, attempt):
            _listed(round_, node, phase.ready, "in the ready set")
            _same_attempt(round_, phase.attempt, attempt)
            if node in phase.commits:
                raise EquivocationError(f"{node} signed two verdicts for round {round_}")
            phase = replace(phase, aborts=phase.aborts | {node})
        case UploadArrived(node, attempt) if node in phase.survivors and attempt == phase.attempt:
            return Step(phase, f"{node} repeated its update")
        case TimePassed():
            pass
        case _:
            raise _wrong(round_, phase, event)

    commits, aborts, need = len(phase.commits), len(phase.aborts), quorum.threshold
    tally = f"{commits} to commit, {aborts} to abort, {need} of either needed"
    if commits >= need:
        revealing = Revealing(
            terms=phase.terms,
            closes_at=now + phase.terms.reveal,
            attempt=phase.attempt,
            ready=phase.ready,
            survivors=phase.survivors,
            commits=phase.commits,
        )
        return Step(revealing, tally)
    if aborts >= need:
        return _abort("abort_certificate", tally)
    if now >= phase.closes_at:
        return Step(Burned(code="no_verdict", reason=f"{tally} by the deadline"), tally)
    return Step(phase, f"{tally} by {_clock(phase.closes_at)}")


def _while_revealing(round_: RoundId, phase: Revealing, event: Event, now: datetime) -> Step:
    _in_time(round_, phase, event, now)
    quorum = phase.terms.quorum
    if quorum is None:
        raise ValueError("a round without a quorum cannot be Revealing")
    match event:
        case SharesArrived(node, attempt):
            _listed(round_, node, phase.survivors, "a survivor")
            _same_attempt(round_, phase.attempt, attempt)
            phase = replace(phase, revealed=phase.revealed | {node})
        case CommitArrived(node, attempt) if node in phase.survivors and attempt == phase.attempt:
            phase = replace(phase, commits=phase.commits | {node})
        case UploadArrived(node, attempt) if node in phase.survivors and attempt == phase.attempt:
            return Step(phase, f"{node} repeated its update")
        case AbortArrived(node, attempt) if node in phase.ready and attempt == phase.attempt:
            if node in phase.commits:
                raise EquivocationError(f"{node} signed two verdicts for round {round_}")
            raise WrongPhaseError(f"round {round_} is past its verdict: cannot take an abort")
        case TimePassed():
            pass
        case _:
            raise _wrong(round_, phase, event)

    revealed, need = len(phase.revealed), quorum.threshold
    tally = f"{revealed} share sets, {need} needed"
    if revealed >= need:
        return Step(Released(attempt=phase.attempt, survivors=phase.survivors), tally)
    if now >= phase.closes_at:
        return Step(Burned(code="too_few_shares", reason=f"{tally} by the deadline"), tally)
    return Step(phase, f"{tally} by {_clock(phase.closes_at)}")


def _when_released(round_: RoundId, phase: Released, event: Event) -> Step:
    match event:
        case SumOpened(opened) if phase.opened is None:
            return Step(
                replace(phase, opened=opened),
                f"the sum of {len(phase.survivors)} updates is public",
            )
        case SumOpened(opened) if phase.opened == opened:
            return Step(phase, "the sum was opened before")
        case SumOpened():
            raise EquivocationError(f"round {round_} was opened with another result")
        case SumFailed(code, reason) if phase.opened is None:
            return Step(Burned(code=code, reason=reason), reason)
        case TimePassed():
            if phase.opened is None:
                return Step(phase, f"adding up {len(phase.survivors)} updates")
            return Step(phase, f"the sum of {len(phase.survivors)} updates is public")
        case (
            UploadArrived(node, attempt)
            | CommitArrived(node, attempt)
            | SharesArrived(node, attempt)
        ) if node in phase.survivors and attempt == phase.attempt:
            return Step(phase, f"{node} repeated itself")
        case _:
            raise _wrong(round_, phase, event)


def _stop(phase: Phase, event: StopRequested) -> Step:
    match phase:
        case Open() | Training() | Dealing():
            return _abort("stopped", f"the run was stopped: {event.reason}")
        case Uploading(terms=terms) if terms.quorum is None:
            return _abort("stopped", f"the run was stopped: {event.reason}")
        case Aborted() | Burned():
            return Step(phase, phase.reason)
        case _:
            # Something may have left the sites: the round finishes, the run opens no other.
            return Step(phase, "the run stops after this round")


# -- helpers -----------------------------------------------------------------------------------


def waiting_for(phase: Phase) -> tuple[NodeId, ...]:
    """The nodes whose next message the round waits for, ascending."""
    match phase:
        case Open():
            return tuple(sorted(set(phase.terms.roster) - phase.joined - phase.declined))
        case Training():
            return tuple(sorted(phase.cohort - phase.ready - phase.left))
        case Dealing():
            return tuple(sorted(phase.missing))
        case Uploading():
            return tuple(sorted(phase.ready - phase.received))
        case Committing():
            return tuple(sorted(phase.ready - phase.commits - phase.aborts))
        case Revealing():
            return tuple(sorted(phase.survivors - phase.revealed))
        case Released() | Aborted() | Burned():
            return ()
        case _:
            assert_never(phase)


def deadline(phase: Phase) -> datetime | None:
    """When the clock alone moves this phase; None if it never does."""
    match phase:
        case Released() | Aborted() | Burned():
            return None
        case _:
            return phase.closes_at


def is_final(phase: Phase) -> bool:
    """Whether nothing can happen to the round any more."""
    match phase:
        case Released(opened=opened):
            return opened is not None
        case Aborted() | Burned():
            return True
        case _:
            return False


def _deal(terms: Terms, attempt: int, ready: Nodes, now: datetime) -> Dealing:
    return Dealing(terms=terms, closes_at=now + terms.deal, attempt=attempt, ready=ready)


def _abort(code: str, reason: str) -> Step:
    return Step(Aborted(code=code, reason=reason), reason)


def _in_time(
    round_: RoundId,
    phase: Open | Training | Dealing | Uploading | Committing | Revealing,
    event: Event,
    now: datetime,
) -> None:
    if now >= phase.closes_at and not isinstance(event, TimePassed):
        raise WrongPhaseError(
            f"round {round_} is past {type(phase).__name__}: {_verb(event)} came too late"
        )


def _listed(round_: RoundId, node: NodeId, listed: Iterable[NodeId], role: str) -> None:
    if node not in listed:
        raise NotListedError(f"{node} is not {role} of round {round_}")


def _same_attempt(round_: RoundId, current: int, got: int) -> None:
    if got != current:
        raise WrongPhaseError(f"round {round_} is at attempt {current}, the message at {got}")


def _wrong(round_: RoundId, phase: Phase, event: Event) -> WrongPhaseError:
    return WrongPhaseError(f"round {round_} is {type(phase).__name__}: cannot take {_verb(event)}")


_VERBS: dict[type, str] = {
    JoinArrived: "a join",
    DeclineArrived: "a decline",
    ReadyArrived: "a ready message",
    LeaveArrived: "a leave",
    DealArrived: "a deal",
    AgreementArrived: "an agreement on deals",
    ComplaintUpheld: "a complaint",
    UploadArrived: "an update",
    CommitArrived: "a commit",
    AbortArrived: "an abort",
    SharesArrived: "shares",
    SumOpened: "a sum",
    SumFailed: "a failed sum",
    StopRequested: "a stop",
    TimePassed: "the time",
}


def _verb(event: Event) -> str:
    return _VERBS[type(event)]


def _names(nodes: Iterable[NodeId]) -> str:
    ordered = sorted(nodes)
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(ordered[:4]) + more if ordered else "nobody"


def _clock(at: datetime) -> str:
    return f"{at:%H:%M:%S}Z"
