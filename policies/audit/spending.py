"""Privacy as the log shows it: which updates are spent, and what they come to.

Spent is what may have been opened: the commits of an attempt that released or burned, or whose end
is not in the log. Only an attempt that ended as aborted, with a certificate that is at hand and
holds, costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from policies.audit.certificates import abort_certificate
from policies.audit.evidence import Evidence
from policies.audit.records import Result
from policies.audit.replay import Taken
from policies.privacy.claim import Claim, claim_of, spent_by
from protocols.errors import MalformedMessageError, PlanRefusedError
from protocols.identifiers import Digest, RoundId
from protocols.plan import Plan
from protocols.round_vector import round_layout
from protocols.tensors.manifest import Manifest
from protocols.tlog.kinds import UpdateCommit, parse_round_subject

PRIVATE: Final = frozenset({"record-local", "record-distributed", "institution"})


class SpendingUnknownError(Exception):
    """The accountant is not installed; the sentence says how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What one institution's data set has spent, recomputed."""

    institution: str
    dataset: str
    unit: str
    claims: int  # updates that count
    epsilon: float
    delta: float
    printed: str


def spent_claims(evidence: Evidence) -> list[tuple[Taken, Claim]]:
    """The claims that count, with their leaves; malformed ones are among ``wrong_claims``."""
    found = []
    unspent: dict[tuple[RoundId, int], bool] = {}
    for taken in evidence.of(UpdateCommit):
        said = taken.said
        if not isinstance(said, UpdateCommit) or said.privacy is None:
            continue
        _, round_ = parse_round_subject(taken.statement.subject)
        if (round_, said.attempt) not in unspent:
            unspent[round_, said.attempt] = _cannot_be_opened(evidence, round_, said.attempt)
        if unspent[round_, said.attempt]:
            continue
        try:
            found.append((taken, Claim.from_value(said.privacy)))
        except MalformedMessageError:
            continue
    return found


def _cannot_be_opened(evidence: Evidence, round_: RoundId, number: int) -> bool:
    """What is not surely unspent is charged: an abort counts only with a certificate that holds."""
    state = evidence.rounds[round_]
    attempt = state.started(number)
    if attempt is None or attempt.aborted is None or attempt.aborted.outcome != "aborted":
        return False
    return abort_certificate(evidence, round_, state, attempt)[0] is Result.PASS


def wrong_claims(evidence: Evidence) -> tuple[list[tuple[Taken, str]], list[Taken]]:
    """Claims that are not what their plan gives, with the reason; and those that nobody can derive.

    Without the model's manifest the number of coordinates is not known, which some mechanisms'
    claims depend on.
    """
    wrong: list[tuple[Taken, str]] = []
    unknown: list[Taken] = []
    known: dict[tuple[Digest, int], Claim | None] = {}
    for taken in evidence.of(UpdateCommit):
        said = taken.said
        if not isinstance(said, UpdateCommit):
            continue
        _, round_ = parse_round_subject(taken.statement.subject)
        state = evidence.rounds[round_]
        plan, index = evidence.plan_of(state), state.plan.index
        if state.plan.mode not in PRIVATE:
            if said.privacy is not None:
                wrong.append((taken, f"{said.node} claims privacy in mode {state.plan.mode}"))
            continue
        try:
            claimed = None if said.privacy is None else Claim.from_value(said.privacy)
        except MalformedMessageError as error:
            wrong.append((taken, f"{said.node}: {error}"))
            continue
        key = (state.plan_sha256, index)
        if key not in known:
            due = _derive(evidence, plan, index)
            if due is _UNKNOWN:
                unknown.append(taken)
                continue
            known[key] = due if isinstance(due, Claim) else None
        if claimed != known[key]:
            wrong.append((taken, f"{said.node} claims another privacy cost than the plan gives"))
    return wrong, unknown


_UNKNOWN: Final = object()


def _derive(evidence: Evidence, plan: Plan | None, index: int) -> object:
    if plan is None:
        return _UNKNOWN
    if not plan.trains_in(index):
        return None
    data = evidence.blobs(Digest(plan.model.manifest))
    if data is None:
        return _UNKNOWN
    try:
        layout = round_layout(plan, index, Manifest.from_bytes(data))
        return claim_of(plan, index, layout.model_coordinates)
    except (MalformedMessageError, PlanRefusedError):
        return _UNKNOWN


def spending(evidence: Evidence) -> list[Spending]:
    """Epsilon for each institution, data set and unit, composed again from the claims.

    Raises:
        SpendingUnknownError: dp-accounting is not installed.
    """
    claims = [(str(taken.holder.name), claim) for taken, claim in spent_claims(evidence)]
    try:
        found = spent_by(claims)
    except ModuleNotFoundError:
        raise SpendingUnknownError(
            "epsilon is not recomputed: the accountant is not installed"
            " (pip install 'minga[privacy]')"
        ) from None
    return [
        Spending(
            institution=item.institution,
            dataset=item.dataset,
            unit=item.unit.value,
            claims=item.claims,
            epsilon=item.guarantee.epsilon,
            delta=float(item.guarantee.delta),
            printed=item.guarantee.printed(),
        )
        for item in found
    ]
