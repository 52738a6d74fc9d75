"""What the coordinator logs as a round goes on: a change of phase and its leaf are one transaction.

The leaves are made when the transaction ends, from the log as it then is: indices of updates, who
joined, which attempt is under way come from there and not from the ledger's own tables, so that a
leaf never says something that the log before it does not bear out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from datetime import datetime
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from coordinator.ledger import Ledger, RoundRow, RunRow, Tx
from policies.audit.replay import Replay, peek
from policies.audit.rounds import RoundState, Verdict
from protocols.canonical import parse_canonical, sha256_hex
from protocols.crypto.identity import spki_digest
from protocols.errors import (
    FederationError,
    MalformedMessageError,
    NotListedError,
    PlanRefusedError,
)
from protocols.identifiers import Digest, FederationId, NodeId, RoundId
from protocols.plan import Plan
from protocols.rounds import (
    Aborted,
    Burned,
    Committing,
    Dealing,
    Phase,
    Released,
    Training,
    Uploading,
)
from protocols.secagg.attempts import roster_of
from protocols.tlog import kinds
from protocols.tlog.kinds import Predicate, Role, parse_round_subject, round_subject

MAX_INLINE: Final = 12 * 1024  # bytes of a plan that stands in its leaf; larger ones are blobs
COORDINATOR: Final = "coordinator"
Make = Callable[[Replay], Predicate | None]


def plan_sha256(plan: Plan) -> Digest:
    """What the subjects of round leaves name: plain SHA-256 of the plan's canonical bytes."""
    return sha256_hex(plan.to_bytes())


def _say(tx: Tx, plan: Plan, round_id: RoundId, said: Predicate | Make, now: datetime) -> None:
    tx.append_own(
        said,
        subject=round_subject(plan.federation_id, round_id),
        digest=plan_sha256(plan),
        now=now,
    )


# -- the plan ------------------------------------------------------------------------------------


def say_plan(tx: Tx, run: RunRow, row: RoundRow, now: datetime) -> None:
    """``round.plan``: in the transaction that opens the round."""
    if not tx.logs:
        return
    plan, request = run.plan, run.request
    signed = None if request is None else kinds.SignedRequest.model_validate_json(request)
    code = kinds.CodeUsed(image=plan.terms.code.image) if plan.terms else None

    def make(log: Replay) -> Predicate:
        return said.model_copy(update={"tuf": in_force(log)})

    said = kinds.RoundPlan(
        run=plan.run,
        round=row.round.number,
        index=row.index,
        plan=parse_canonical(run.plan_bytes) if len(run.plan_bytes) <= MAX_INLINE else None,
        plan_digest=plan.digest,
        roster_root=roster_of(plan).root if plan.secagg else None,
        model_in=row.start_root,
        code=code,
        secagg=(
            kinds.SecaggUsed(t=plan.secagg.threshold, m_min=plan.secagg.min_surviving)
            if plan.secagg
            else None
        ),
        mode=plan.mode,
        request=signed,
        request_sha256=None if signed is None else sha256_hex(signed.body.encode()),
    )
    _say(tx, plan, row.round, make, now)


def in_force(log: Replay) -> dict[str, kinds.Published]:
    """The newest metadata file of each role that the log holds: what the round rests on."""
    newest: dict[str, int] = {}
    for role, version in log.published:
        newest[role] = max(version, newest.get(role, 0))
    found = {}
    for role, version in sorted(newest.items()):
        digests = log.published[role, version]
        if len(digests) == 1:  # two would be an equivocation: none of them is named
            found[role] = kinds.Published(version=version, sha256=next(iter(digests)))
    return found


# -- phases --------------------------------------------------------------------------------------


def say_phase(
    tx: Tx,
    plan: Plan,
    round_id: RoundId,
    before: Phase,
    after: Phase,
    now: datetime,
    *,
    actor: NodeId | None = None,
    ctx_deal: Digest | None = None,
    certificate: Digest | None = None,
) -> None:
    """The leaves of one step of a round.

    Args:
        tx: in which the step is recorded.
        plan: of the run.
        round_id: which round.
        before, after: its phase.
        now: UTC.
        actor: whose message made the step, if a node's did.
        ctx_deal: of the attempt that begins, in a secure sum.
        certificate: SHA-256 of the aborts, where a quorum signed them.
    """
    if not tx.logs:
        return
    match after:
        case Dealing() if isinstance(before, Dealing) and before.attempt != after.attempt:
            lost = _ended(round_id, "aborted", before, "lost", actor, None)
            _say(tx, plan, round_id, lost, now)
        case Committing() if not isinstance(before, Committing):
            _say(tx, plan, round_id, _survivors(round_id, after.attempt, after.survivors), now)
        case Released() if isinstance(before, Uploading):
            _say(tx, plan, round_id, _survivors(round_id, after.attempt, after.survivors), now)
        case Aborted(code=code):
            end = _ended(round_id, "aborted", before, code, actor, certificate)
            _say(tx, plan, round_id, end, now)
        case Burned(code=code):
            end = _ended(round_id, "burned", before, code, actor, None)
            _say(tx, plan, round_id, end, now)
        case _:
            pass
    started = starts(before, after)
    if started is not None:
        attempt, ready = started
        said = kinds.RoundStart(attempt=attempt, ready=tuple(sorted(ready)), ctx_deal=ctx_deal)
        _say(tx, plan, round_id, said, now)


def starts(before: Phase, after: Phase) -> tuple[int, frozenset[NodeId]] | None:
    """The attempt whose keys are complete with this step, and its ready set; None: none is."""
    match after:
        case Dealing() if not after.without_keys:
            fresh = not isinstance(before, Dealing) or before.attempt != after.attempt
            return (after.attempt, after.ready) if fresh or before.without_keys else None  # type: ignore[union-attr]
        case Uploading() if isinstance(before, Training):
            return after.attempt, after.ready
        case _:
            return None


def _made(round_id: RoundId, make: Callable[[RoundState], Predicate | None]) -> Make:
    """A leaf that is made from the log as it is at the end of the transaction.

    Of a round that began before the log did, nothing is said.
    """

    def of(log: Replay) -> Predicate | None:
        state = log.rounds.get(round_id)
        return None if state is None else make(state)

    return of


def _survivors(round_id: RoundId, number: int, survivors: Iterable[NodeId]) -> Make:
    nodes = sorted(survivors)

    def make(state: RoundState) -> Predicate:
        attempt = state.started(number)
        if attempt is None:
            raise NotListedError(f"attempt {number} of round {round_id} is not logged")
        missing = [node for node in nodes if node not in attempt.commits]
        if missing:
            raise NotListedError(f"no update.commit of {', '.join(missing)} is in the log")
        commits = {node: attempt.commits[node] for node in nodes}
        return kinds.RoundSurvivors(
            attempt=number,
            ctx=next((each.ctx for each in commits.values()), None),
            survivors=tuple(
                kinds.Survivor(node=node, leaf=each.index, upload_root=each.upload_root)
                for node, each in commits.items()
            ),
            dropped=_dropped(state, set(nodes), attempt.ready),
        )

    return _made(round_id, make)


def _dropped(
    state: RoundState, survivors: Set[str], ready: tuple[str, ...]
) -> tuple[kinds.Dropped, ...]:
    first = state.attempts[0].ready
    lost = []
    for node in sorted(state.joins.keys() - survivors):
        phase, code = ("Uploading", "late")
        if node not in first:
            phase, code = ("Training", "not_ready")
        elif node not in ready:
            phase, code = ("Dealing", "lost")
        lost.append(kinds.Dropped(node=node, phase=phase, code=code))
    return tuple(lost)


def _ended(
    round_id: RoundId,
    outcome: Literal["aborted", "burned"],
    before: Phase,
    code: str,
    actor: NodeId | None,
    certificate: Digest | None,
) -> Make:
    def make(state: RoundState) -> Predicate:
        last = state.attempt
        return kinds.RoundAborted(
            attempt=0 if last is None or last.over else last.number,
            outcome=outcome,
            phase=type(before).__name__,
            code=code,
            actor=actor or COORDINATOR,
            certificate_sha256=certificate,
        )

    return _made(round_id, make)


# -- after the release ---------------------------------------------------------------------------


def say_aggregate(
    tx: Tx,
    plan: Plan,
    round_id: RoundId,
    now: datetime,
    *,
    attempt: int,
    sum_blob: Digest,
    model_out: Digest,
    norm: float,
    transcript_blob: Digest | None,
    transcript_sha256: Digest | None,
    certificate_sha256: Digest | None,
) -> None:
    """``round.aggregate``: in the transaction that makes the sum public."""
    if not tx.logs:
        return

    def make(state: RoundState) -> Predicate | None:
        found = state.started(attempt)
        if found is None or found.survivors is None:
            raise NotListedError(f"the survivors of round {round_id} are not logged")
        if found.aggregate is not None:
            return None  # recorded before
        return kinds.RoundAggregate(
            attempt=attempt,
            included=found.survivors,
            dropped=found.dropped,
            commit_certificate_sha256=certificate_sha256,
            transcript_sha256=transcript_sha256,
            transcript_blob=transcript_blob,
            sum_blob=sum_blob,
            survivors=len(found.survivors),
            t=plan.secagg.threshold if plan.secagg else max(1, plan.min_participants),
            model_out=model_out,
            norm_micro=math.ceil(min(norm, 9e9) * 1e6) if math.isfinite(norm) else None,
        )

    _say(tx, plan, round_id, _made(round_id, make), now)


def say_closed(
    tx: Tx, plan: Plan, round_id: RoundId, now: datetime, *, even_if_silent: bool = False
) -> None:
    """``round.closed``, once all in the sum have judged it, or nobody is waited for any more."""
    if not tx.logs:
        return

    def make(state: RoundState) -> Predicate | None:
        attempt = state.attempt
        if attempt is None or attempt.aggregate is None or attempt.over:
            return None
        if not even_if_silent and not set(attempt.aggregate.included) <= attempt.verdicts.keys():
            return None
        confirmed = {node for node, said in attempt.verdicts.items() if said is Verdict.CONFIRM}
        return kinds.RoundClosed(
            attempt=attempt.number,
            confirmations=tuple(sorted(confirmed)),
            objections=tuple(sorted(attempt.verdicts.keys() - confirmed)),
        )

    _say(tx, plan, round_id, _made(round_id, make), now)


# -- certificates --------------------------------------------------------------------------------


def say_certificate(
    tx: Tx, certificate: x509.Certificate, federation: FederationId, request: Digest | None
) -> None:
    """``cert.issued``: in the transaction that enters the certificate into the ledger."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    der = sha256_hex(certificate.public_bytes(Encoding.DER))
    said = kinds.CertIssued(
        certificate_sha256=der,
        spki_sha256=spki_digest(certificate),
        uri=uri,
        not_after=f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        request=request,
    )
    subject = f"fed/{federation}/certificate/{certificate.serial_number:x}"
    tx.append_own(said, subject=subject, digest=der)


# -- leaves of nodes -----------------------------------------------------------------------------


def take_leaf(
    tx: Tx,
    entry: bytes,
    *,
    node: NodeId,
    round_id: RoundId,
    kind: type[Predicate] | tuple[type[Predicate], ...],
    **says: object,
) -> Digest | None:
    """Append the leaf of a node's act, which must say just that.

    Args:
        entry: as it came; empty: none came.
        node: who acts.
        round_id: in which round.
        kind: what it must be.
        says: fields that must have these values.

    Returns:
        The leaf hash; None where there is no log.

    Raises:
        PlanRefusedError: no leaf came, or it says something else.
    """
    if not tx.logs:
        return None
    if not entry:
        raise PlanRefusedError(
            f"this federation keeps a round log: {node} must sign what it does", rule="log.leaf"
        )
    check_leaf(entry, round_id=round_id, kind=kind, node=node, **says)
    return tx.append_leaf(entry, by=(Role.NODE, node))


async def log_late(ledger: Ledger, node: NodeId, entry: bytes) -> None:
    """Append a leaf whose act came too late: a signer's chain has no holes.

    What may not stand at all is left out; the act itself is refused anyway.
    """
    with suppress(FederationError):
        await ledger.run("late_leaf", lambda tx: tx.append_leaf(entry, by=(Role.NODE, node)))


def joined_by_log(tx: Tx, round_id: RoundId) -> Set[str]:
    """Who joined a round, by the leaves."""
    state = tx.log_state().rounds.get(round_id)
    return set() if state is None else state.joins.keys()


def check_leaf(
    entry: bytes,
    *,
    round_id: RoundId,
    kind: type[Predicate] | tuple[type[Predicate], ...],
    **says: object,
) -> None:
    """Compare a leaf, not yet verified, with the act that it comes with.

    Raises:
        PlanRefusedError: it says something else.
    """
    found = peek(entry)
    try:
        about = None if found is None else parse_round_subject(found[0].subject)[1]
    except MalformedMessageError:
        about = None
    if found is None or about != round_id or not isinstance(found[1], kind):
        raise PlanRefusedError("the leaf is not about this act", rule="log.leaf")
    for name, value in says.items():
        if getattr(found[1], name) != value:
            raise PlanRefusedError(
                f"the leaf says another {name} than the message", rule="log.leaf"
            )
