"""Leaves about the log itself, members, certificates, code, data, releases."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from protocols.identifiers import parse_federation_id
from protocols.tlog.fields import (
    MAX_INT,
    Base64,
    Code,
    Count,
    DigestText,
    KeyText,
    Micro,
    Name,
    NodeName,
    Origin,
    Part,
    Predicate,
    Role,
    SpiffeUri,
    TimeText,
    Vkey,
)

# -- the log itself ----------------------------------------------------------------------------


class Previous(Part):
    """The shard before this one: its last checkpoint."""

    origin: Origin
    vkey: Vkey
    size: Count
    root: DigestText


class Genesis(Predicate):
    """Leaf 0: the keys from which everything before the signed membership is judged."""

    KIND = "log.genesis"
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    origin: Origin
    log_vkey: Vkey
    coordinator_key: KeyText  # signs the coordinator's leaves, this one too
    operator_keys: Annotated[dict[NodeName, KeyText], Field(max_length=64)]  # sign requests of runs
    witnesses: Annotated[tuple[Vkey, ...], Field(max_length=64)] = ()  # beside those of nodes
    ca_sha256: DigestText  # of the root certificate, DER
    tuf_root_sha256: DigestText | None = None  # of root.json version 1; None: no TUF yet
    previous: Previous | None = None


class LogClosed(Predicate):
    """The last leaf of a shard."""

    KIND = "log.closed"
    next_origin: Origin | None
    next_vkey: Vkey | None
    reason: Code


class Heartbeat(Predicate):
    """Nothing happened for a while; the log is alive."""

    KIND = "log.heartbeat"
    interval_s: Annotated[int, Field(ge=1, le=86_400)]


# -- policy, membership, certificates ------------------------------------------------------------


MAX_SPEAKERS: Final = 128  # keys in one leaf, so that it stays below its limit
Keys = Annotated[tuple[KeyText, ...], Field(min_length=1, max_length=MAX_SPEAKERS)]


class Speakers(Part):
    """Keys that may sign leaves from here on, by whose they are. Auditors compare them with the
    signed documents; nobody else acts on what they sign."""

    admin: Annotated[dict[NodeName, Keys], Field(max_length=MAX_SPEAKERS)]
    institution: Annotated[dict[NodeName, Keys], Field(max_length=MAX_SPEAKERS)]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        keys = [
            key for names in (self.admin, self.institution) for k in names.values() for key in k
        ]
        if len(set(keys)) != len(keys) or len(keys) > MAX_SPEAKERS:
            raise ValueError(f"a key stands once, and at most {MAX_SPEAKERS} do")
        return self


class TufPublished(Predicate):
    """A metadata file of the TUF repository is public. Its bytes are a blob of that digest."""

    KIND = "tuf.published"
    role: Name
    version: Annotated[int, Field(ge=1, le=MAX_INT)]
    sha256: DigestText
    length: Count
    speakers: Speakers | None = None  # with a timestamp: they replace those before; None: as before

    @model_validator(mode="after")
    def _with_a_timestamp(self) -> Self:
        if self.speakers is not None and self.role != "timestamp":
            raise ValueError("speakers stand with a timestamp")
        return self


class PolicyProposed(Predicate):
    """Candidate metadata that admins are asked to sign."""

    KIND = "policy.proposed"
    SIGNERS = frozenset({Role.COORDINATOR, Role.ADMIN})
    role: Name
    version: Annotated[int, Field(ge=1, le=MAX_INT)]
    sha256: DigestText
    change: Code
    expires: TimeText


class Approval(Part):
    """One signature under an act that needs several."""

    key: DigestText  # key id
    signature: Base64


class Ballot(Predicate):
    """A vote, so that dissent is on record; the TUF signatures are the decision.

    An admin signs its own. The coordinator enters a yes only with the signature that was given for
    the proposal (``approval``): it can invent none.
    """

    KIND = "ballot"
    SIGNERS = frozenset({Role.ADMIN, Role.COORDINATOR})
    proposal_sha256: DigestText  # of the bytes that are signed
    choice: Literal["yes", "no", "abstain"]
    code: Code | None = None
    approval: Approval | None = None

    @model_validator(mode="after")
    def _a_signature_is_a_yes(self) -> Self:
        if self.approval is not None and self.choice != "yes":
            raise ValueError("a signature under the proposal is a yes")
        return self


class MemberStatement(Predicate):
    """A member's reply or declaration; its text is a blob."""

    KIND = "member.statement"
    SIGNERS = frozenset({Role.INSTITUTION, Role.NODE})
    institution: NodeName
    topic: Code
    statement_sha256: DigestText


class EnrolApproval(Part):
    """What the institution signed about the keys of a request (enrolment.md, section 5)."""

    key: KeyText  # of the institution
    approved_at: TimeText
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class EnrolRequest(Predicate):
    """What a node asks to be certified. Signed by the very key it names, which shows possession;
    ``approval`` is the word of its institution. A renewal has none: the key it is signed with has
    been approved before."""

    KIND = "enrol.request"
    SIGNERS = frozenset({Role.INSTITUTION, Role.NODE})
    institution: NodeName
    node: NodeName
    signing_key: KeyText
    witness_vkey: Vkey | None = None  # None: the node is no witness
    csr_sha256: DigestText
    spki_sha256: DigestText  # of the TLS key
    approval: EnrolApproval | None = None


class CertIssued(Predicate):
    """The authority certified a key. Without a request known to the member it is an alarm."""

    KIND = "cert.issued"
    certificate_sha256: DigestText  # DER
    spki_sha256: DigestText
    uri: SpiffeUri
    not_after: TimeText
    request: DigestText | None = None  # leaf hash of the enrol.request; None: not for a node


class CodeApproved(Predicate):
    """Code that rounds may run."""

    KIND = "code.approved"
    SIGNERS = frozenset({Role.ADMIN})
    image: DigestText | None = None
    source_commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")]
    provenance_sha256: DigestText | None = None
    expires: TimeText


class DatasetDeclared(Predicate):
    """A declaration of a data set; names are scoped to the institution."""

    KIND = "dataset.declared"
    SIGNERS = frozenset({Role.INSTITUTION, Role.NODE})
    institution: NodeName
    dataset: Name
    declaration_sha256: DigestText
    licence: Name
    jurisdiction: Annotated[str, Field(pattern=r"^[A-Z]{2}$")]


class OverrideGranted(Predicate):
    """A rule of the consortium is set aside for one plan."""

    KIND = "override.granted"
    SIGNERS = frozenset({Role.COORDINATOR, Role.ADMIN})
    plan_sha256: DigestText
    rule: Code
    code: Code
    expires: TimeText
    approvals: Annotated[tuple[Approval, ...], Field(max_length=64)]


class EmergencyNotice(Predicate):
    """A deny-only document is in force at once."""

    KIND = "emergency.notice"
    SIGNERS = frozenset({Role.COORDINATOR, Role.ADMIN})
    document_sha256: DigestText
    code: Code
    expires: TimeText


class ObjectionResolved(Predicate):
    """What became of an objection."""

    KIND = "objection.resolved"
    SIGNERS = frozenset({Role.ADMIN, Role.COORDINATOR})
    objection: DigestText  # leaf hash
    outcome: Literal["upheld", "dismissed"]
    code: Code
    evidence_sha256: DigestText | None = None


class GateResult(Part):
    """One gate of an evaluation."""

    gate: Code
    value_micro: Micro
    passed: bool


class EvalReport(Predicate):
    """An evaluation of a model by somebody independent."""

    KIND = "eval.report"
    SIGNERS = frozenset({Role.NODE, Role.INSTITUTION, Role.AUDITOR})
    model: DigestText
    evaluator: Name
    gates: Annotated[tuple[GateResult, ...], Field(max_length=64)]
    report_sha256: DigestText


class ReleaseApproved(Predicate):
    """A model may be given out."""

    KIND = "release.approved"
    SIGNERS = frozenset({Role.ADMIN, Role.COORDINATOR})
    model: DigestText
    card_sha256: DigestText
    reports: Annotated[tuple[DigestText, ...], Field(max_length=64)]  # leaf hashes
    approvals: Annotated[tuple[Approval, ...], Field(max_length=64)]


class ReleaseWithdrawn(Predicate):
    """It may not any more."""

    KIND = "release.withdrawn"
    SIGNERS = frozenset({Role.ADMIN, Role.COORDINATOR})
    model: DigestText
    code: Code


class Incident(Predicate):
    """Something went wrong; the account of it is a blob."""

    KIND = "incident"
    SIGNERS = frozenset({Role.COORDINATOR, Role.NODE, Role.ADMIN, Role.INSTITUTION, Role.AUDITOR})
    klass: Code
    code: Code
    evidence_sha256: DigestText | None = None


class AuditReport(Predicate):
    """Somebody verified the log up to a size."""

    KIND = "audit.report"
    SIGNERS = frozenset({Role.AUDITOR, Role.NODE, Role.INSTITUTION})
    size: Count
    root: DigestText
    result: Literal["pass", "fail", "unknown"]
    report_sha256: DigestText
