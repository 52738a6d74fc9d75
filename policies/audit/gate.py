"""Log before act: may a node act on what the coordinator shows? One function, four uses.

    round.plan       before it joins and trains
    round.start      before it deals shares, or hands in an update
    round.survivors  before it signs the survivor list
    round.aggregate  before it believes the new model

What was read is known to be in the log, under a checkpoint that extends the last one and that the
trust policy accepts, and nothing in it is contradictory: ``LogVerifier`` and ``Replay`` let nothing
else in. Here is decided whether it is *fresh*, whether this node's own leaves are in it, and
whether the leaf says what the coordinator showed. Spec: protocols/spec/log.md, section 13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from policies.audit.replay import Replay
from policies.audit.rounds import AttemptState, RoundState
from protocols.identifiers import Digest, RoundId
from protocols.tlog.trust_policy import CHECKPOINT_S, FRESH_S, TrustPolicy

MISSING_AFTER_S: Final = 2 * CHECKPOINT_S  # then its signer raises an alarm


@dataclass(frozen=True, slots=True)
class Passed:
    """Act."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Not yet; nothing is wrong so far."""

    why: str


@dataclass(frozen=True, slots=True)
class Stops:
    """Do not act: decline, abort or object, with this rule."""

    rule: str
    why: str


Gate = Passed | Waits | Stops


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a node has verified of the log."""

    log: Replay
    policy: TrustPolicy  # under which the last checkpoint was accepted
    cosigned: Mapping[str, int]  # Unix seconds by witness, of that checkpoint
    alarm: Stops | None = None  # the log was caught lying: nothing passes any more
    undelivered: Mapping[Digest, int] = field(default_factory=dict)
    # own leaves that the coordinator has taken and the log does not hold: when it took them


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanShown:
    """The coordinator shows an open round."""

    plan_sha256: Digest
    model_in: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class StartShown:
    """It shows an attempt and its ready set."""

    attempt: int
    ready: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivorsShown:
    """It shows a survivor list."""

    attempt: int
    survivors: frozenset[str]
    node: str  # who asks
    upload_root: Digest | None  # of its own update, if it handed one in


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateShown:
    """It shows a result."""

    attempt: int
    sum_blob: Digest
    model_out: Digest
    survivors: frozenset[str]


Shown = PlanShown | StartShown | SurvivorsShown | AggregateShown


def gate(known: Known | None, round_: RoundId, shown: Shown, *, now: int) -> Gate:
    """Decide.

    Args:
        known: what was verified; None: nothing of the log was seen yet.
        round_: which round is acted on.
        shown: what the coordinator shows, which the log must say as well.
        now: Unix seconds.
    """
    if known is None:
        return Waits("no checkpoint of the log was seen yet")
    if known.alarm is not None:
        return known.alarm
    recent = {name for name, time in known.cosigned.items() if time >= now - FRESH_S}
    if not known.policy.satisfied(recent):
        return Stops("log.stale", "no quorum of witnesses has cosigned within a day")
    lost = [leaf for leaf, at in known.undelivered.items() if now - at > MISSING_AFTER_S]
    if lost and isinstance(shown, PlanShown):
        return Stops("log.own_leaf", f"this node's leaf {lost[0][:12]}… is missing in the log")
    state = known.log.rounds.get(round_)
    if state is None:
        return Waits(f"the plan of round {round_} is not in the witnessed log yet")
    match shown:
        case PlanShown():
            return _plan(state, shown)
        case StartShown():
            return _start(state, shown)
        case SurvivorsShown():
            return _survivors(state, shown)
        case AggregateShown():
            return _aggregate(state, shown)


def _plan(state: RoundState, shown: PlanShown) -> Gate:
    if state.plan_sha256 != shown.plan_sha256:
        return Stops("log.plan", "the log holds another plan for this round")
    if state.plan.model_in != shown.model_in:
        return Stops("log.model_in", "the log names another model that the round starts from")
    if state.ended is not None or state.attempts:
        return Stops("log.phase", "by the log, this round is past joining")
    return Passed()


def _attempt(state: RoundState, number: int) -> AttemptState | Waits | Stops:
    found = state.started(number)
    if found is not None:
        if found.aborted is not None:
            return Stops("log.phase", f"by the log, attempt {number} is over")
        return found
    if state.ended is not None:
        return Stops("log.phase", "by the log, the round is over")
    return Waits(f"the start of attempt {number} is not in the witnessed log yet")


def _start(state: RoundState, shown: StartShown) -> Gate:
    found = _attempt(state, shown.attempt)
    if not isinstance(found, AttemptState):
        return found
    if frozenset(found.ready) != shown.ready:
        return Stops("log.ready", "the log names another ready set")
    return Passed()


def _survivors(state: RoundState, shown: SurvivorsShown) -> Gate:
    found = _attempt(state, shown.attempt)
    if not isinstance(found, AttemptState):
        return found
    if found.survivors is None:
        return Waits(f"the survivors of attempt {shown.attempt} are not in the witnessed log yet")
    if frozenset(found.survivors) != shown.survivors:
        return Stops("log.survivors", "the log names other survivors")
    if shown.node in found.survivors and (
        found.commits[shown.node].upload_root != shown.upload_root
    ):
        return Stops("log.survivors", "the log lists this node with another update")
    return Passed()


def _aggregate(state: RoundState, shown: AggregateShown) -> Gate:
    found = state.started(shown.attempt)
    if found is None or found.aggregate is None:
        if found is not None and found.aborted is not None:
            return Stops("log.phase", f"by the log, attempt {shown.attempt} ended without a sum")
        return Waits(f"the result of attempt {shown.attempt} is not in the witnessed log yet")
    said = found.aggregate
    if (said.sum_blob, said.model_out) != (shown.sum_blob, shown.model_out):
        return Stops("log.aggregate", "the log names another sum or model")
    if frozenset(said.included) != shown.survivors:
        return Stops("log.included", "the log names others whose updates are in the sum")
    return Passed()
