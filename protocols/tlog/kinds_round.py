"""Leaves about rounds: from the plan to the verdict of each node."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from protocols.canonical import canonical_bytes, sha256_hex
from protocols.errors import MalformedMessageError
from protocols.identifiers import parse_federation_id, parse_run_id
from protocols.tlog.fields import (
    MAX_INT,
    MAX_LIST,
    Attempt,
    Base64,
    Code,
    Count,
    DigestText,
    KeyText,
    Name,
    NodeName,
    Nodes,
    Part,
    Role,
    RoundPredicate,
    TimeText,
    check_ascending,
    first_sentence,
)

# -- a round -------------------------------------------------------------------------------------


class RunRequest(Part):
    """What an operator signs when a run is submitted: this plan, this first model, now."""

    schema_: Literal["minga.run-request/1"] = Field(default="minga.run-request/1", alias="schema")
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    run: Annotated[str, AfterValidator(parse_run_id)]
    plan_sha256: DigestText
    model_root: DigestText
    time: TimeText

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    def to_bytes(self) -> bytes:
        """Canonical JSON: what is signed, under ``Context.RUN_REQUEST``."""
        return canonical_bytes(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> RunRequest:
        """Raises: MalformedMessageError: any other form."""
        try:
            request = cls.model_validate_json(data)
        except ValidationError as error:
            raise MalformedMessageError(first_sentence("a run request", error)) from None
        if request.to_bytes() != data:
            raise MalformedMessageError("the run request is not in canonical form")
        return request


class SignedRequest(Part):
    """A request with its signature, as it stands in a plan leaf."""

    body: Annotated[str, Field(max_length=2048)]  # the request's canonical text
    key: KeyText  # a hint: the key that counts is that of log.genesis or the membership
    signature: Base64


class Published(Part):
    """A metadata file that a round rests on."""

    version: Annotated[int, Field(ge=1, le=MAX_INT)]
    sha256: DigestText


class CodeUsed(Part):
    """What the sites run."""

    image: DigestText | None = None
    source_commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")] | None = None
    provenance_sha256: DigestText | None = None
    approvals: Annotated[tuple[DigestText, ...], Field(max_length=64)] = ()  # leaf hashes


class SecaggUsed(Part):
    """The secure sum's sizes, as in the plan."""

    protocol: Literal["bonawitz17/1"] = "bonawitz17/1"
    t: Annotated[int, Field(ge=2, le=MAX_LIST)]
    m_min: Annotated[int, Field(ge=2, le=MAX_LIST)]


class RoundPlan(RoundPredicate):
    """A round opens under a plan. ``plan`` is the plan itself where it fits, else a blob."""

    KIND = "round.plan"
    run: Annotated[str, AfterValidator(parse_run_id)]
    round: Annotated[int, Field(ge=0, le=10**6)]
    index: Annotated[int, Field(ge=0, le=10**6)]  # which of the plan's rounds
    plan: dict[str, Any] | None  # the subject's digest is that of its canonical bytes
    plan_digest: DigestText  # as uploads and messages name it
    roster_root: DigestText | None  # None: no secure sum
    tuf: Annotated[dict[Name, Published], Field(max_length=128)] = Field(default_factory=dict)
    model_in: DigestText
    code: CodeUsed | None = None
    secagg: SecaggUsed | None
    mode: Literal["open", "aggregate-only", "record-local", "record-distributed", "institution"]
    request: SignedRequest | None  # None: the log was begun without operator keys
    request_sha256: DigestText | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.request is None) != (self.request_sha256 is None):
            raise ValueError("request and request_sha256 go together")
        if self.request is not None and self.request_sha256 != sha256_hex(
            self.request.body.encode()
        ):
            raise ValueError("request_sha256 is not that of the request")
        if (self.secagg is None) != (self.roster_root is None) or (self.secagg is None) != (
            self.mode == "open"
        ):
            raise ValueError("secagg and roster_root are given exactly when mode is not open")
        return self


class RoundJoin(RoundPredicate):
    """A node takes part, from this model."""

    KIND = "round.join"
    SIGNERS = frozenset({Role.NODE})
    node: NodeName
    plan_sha256: DigestText
    model_in: DigestText
    site_policy_sha256: DigestText | None = None


class RoundDecline(RoundPredicate):
    """A node does not, by these rules."""

    KIND = "round.decline"
    SIGNERS = frozenset({Role.NODE})
    node: NodeName
    plan_sha256: DigestText
    site_policy_sha256: DigestText | None = None
    rules: Annotated[tuple[Code, ...], Field(min_length=1, max_length=32)]


class RoundStart(RoundPredicate):
    """An attempt begins: this ready set, these keys."""

    KIND = "round.start"
    attempt: Attempt
    ready: Nodes
    ctx_deal: DigestText | None  # None: an open sum deals no shares

    @model_validator(mode="after")
    def _order(self) -> Self:
        check_ascending(self.ready, "ready")
        return self


class DatasetUsed(Part):
    """A data set behind an update."""

    id: Name
    declaration_sha256: DigestText | None = None
    licence: Name | None = None
    jurisdiction: Annotated[str, Field(pattern=r"^[A-Z]{2}$")] | None = None
    legal_basis: Code | None = None
    records_bucket: Annotated[int, Field(ge=0, le=2**40)] | None = None  # a power of two, rounded


class ResourcesUsed(Part):
    """What a local step cost: a signed claim."""

    gpu_seconds: Count = 0
    energy_wh: Count = 0
    bytes: Count = 0
    source: Literal["measured", "estimated", "none"] = "none"


class UpdateCommit(RoundPredicate):
    """An update was handed in whole. The leaf's hash is the receipt."""

    KIND = "update.commit"
    SIGNERS = frozenset({Role.NODE})
    attempt: Attempt
    node: NodeName
    ctx: DigestText | None  # None: an open sum
    deals_sha256: DigestText | None
    upload_root: DigestText
    bytes: Count
    privacy: dict[str, Any] | None = None  # policies.privacy.claim reads it; None: not private
    datasets: Annotated[tuple[DatasetUsed, ...], Field(max_length=64)] = ()
    resources: ResourcesUsed = ResourcesUsed()


class Survivor(Part):
    """A node whose update is in the sum."""

    node: NodeName
    leaf: Annotated[int, Field(ge=0, le=MAX_INT)]  # index of its update.commit
    upload_root: DigestText


class Dropped(Part):
    """A node of the cohort whose update is not."""

    node: NodeName
    phase: Annotated[str, Field(pattern=r"^[A-Z][a-z]{2,15}$")]
    code: Code


class RoundSurvivors(RoundPredicate):
    """The list whose sum will be opened: every node on it has its ``update.commit`` in the log."""

    KIND = "round.survivors"
    attempt: Attempt
    ctx: DigestText | None
    survivors: Annotated[tuple[Survivor, ...], Field(max_length=MAX_LIST)]
    dropped: Annotated[tuple[Dropped, ...], Field(max_length=MAX_LIST)]

    @model_validator(mode="after")
    def _order(self) -> Self:
        check_ascending(tuple(s.node for s in self.survivors), "survivors")
        check_ascending(tuple(d.node for d in self.dropped), "dropped")
        return self


class Weight(Part):
    """A node's share of the sum."""

    node: NodeName
    permille: Annotated[int, Field(ge=0, le=1000)]


class RoundAggregate(RoundPredicate):
    """What came out: the sum, how it was opened, the next model."""

    KIND = "round.aggregate"
    attempt: Attempt
    included: Nodes
    dropped: Annotated[tuple[Dropped, ...], Field(max_length=MAX_LIST)]
    commit_certificate_sha256: DigestText | None  # of the canonical certificate; None: open sum
    transcript_sha256: DigestText | None  # of the transcript's bytes; None: open sum
    transcript_blob: DigestText | None
    sum_blob: DigestText
    survivors: Annotated[int, Field(ge=1, le=MAX_LIST)]
    t: Annotated[int, Field(ge=1, le=MAX_LIST)]
    model_out: DigestText
    norm_micro: Count | None = None  # L2 norm of the mean, rounded up; None: not computed
    weights: Annotated[tuple[Weight, ...], Field(max_length=MAX_LIST)] = ()  # empty: all equal

    @model_validator(mode="after")
    def _order(self) -> Self:
        check_ascending(self.included, "included")
        check_ascending(tuple(d.node for d in self.dropped), "dropped")
        if self.survivors != len(self.included):
            raise ValueError("survivors counts the included")
        return self


class RoundConfirm(RoundPredicate):
    """A node computed the same model, and found its own update in the sum."""

    KIND = "round.confirm"
    SIGNERS = frozenset({Role.NODE})
    attempt: Attempt
    node: NodeName
    model_out: DigestText  # as the node computed it
    commit: DigestText | None  # leaf hash of its own update.commit; None: it had none


class RoundObjection(RoundPredicate):
    """A node did not."""

    KIND = "round.objection"
    SIGNERS = frozenset({Role.NODE})
    attempt: Attempt
    node: NodeName
    code: Code
    model_out: DigestText | None  # as the node computed it; None: it could not
    evidence_sha256: DigestText | None = None


class RoundClosed(RoundPredicate):
    """The released attempt is over; verdicts may still come after this leaf."""

    KIND = "round.closed"
    attempt: Attempt
    confirmations: Nodes
    objections: Nodes

    @model_validator(mode="after")
    def _order(self) -> Self:
        check_ascending(self.confirmations, "confirmations")
        check_ascending(self.objections, "objections")
        return self


class RoundAborted(RoundPredicate):
    """An attempt, or a round before its first, ended without a release."""

    KIND = "round.aborted"
    attempt: Annotated[int, Field(ge=0, le=10**6)]  # 0: before any began
    outcome: Literal["aborted", "burned"]
    phase: Annotated[str, Field(pattern=r"^[A-Z][a-z]{2,15}$")]
    code: Code
    actor: Name
    certificate_sha256: DigestText | None = None  # of >= t signed aborts
