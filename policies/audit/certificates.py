"""Whether an aborted attempt really cannot be opened: a quorum of its members signed that."""

from __future__ import annotations

from policies.audit.evidence import Evidence
from policies.audit.records import Result
from policies.audit.rounds import AttemptState, RoundState
from protocols.canonical import sha256_hex
from protocols.errors import FederationError
from protocols.identifiers import Digest, RoundId
from protocols.secagg.attempts import attempt_of
from protocols.secagg.checks import check_abort_certificate
from protocols.secagg.messages import AbortCertificate


def abort_certificate(
    evidence: Evidence, round_: RoundId, state: RoundState, attempt: AttemptState
) -> tuple[Result, str]:
    """Check the certificate that an attempt's terminal leaf names; with words for a person.

    Unknown where the certificate or the plan is not at hand.
    """
    said, plan = attempt.aborted, evidence.plan_of(state)
    digest = said.certificate_sha256 if said else None
    data = evidence.documents(Digest(digest)) if digest else None
    if data is None or plan is None:
        return Result.UNKNOWN, "; the certificate is not at hand"
    if sha256_hex(data) != digest:
        return Result.FAIL, "; the certificate at hand is another one"
    try:
        terms = attempt_of(plan, round_, attempt.number, Digest(state.plan.model_in))
        check_abort_certificate(AbortCertificate.from_bytes(data), terms)
    except FederationError as error:
        return Result.FAIL, f"; {error}"
    return Result.PASS, "; a quorum signed the abort"
