"""The consortium's policy: what the admins signed, as one value that everybody reads alike.

    bytes (canonical JSON) -> ConsortiumPolicy -> digest (SHA-256 of the bytes)

Every section is required: one that is missing is an error and never means "no limit". A site may
narrow what stands here and never widen it. What changed between two versions, in words, and how
many admins must sign that: ``policies.changes``. Normative text: protocols/spec/policy.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from policies.decision import Decision, Why, from_whys
from policies.document import (
    MINUTES,
    Clock,
    Countries,
    Country,
    Digest256,
    FederationName,
    Institution,
    Licence,
    Licences,
    Number,
    Period,
    Permille,
    Positive,
    RuleId,
    RuleIds,
    Section,
    Share,
    Signed,
    Utc,
    Word,
    Words,
    minute_of_day,
    parse_utc,
    period_days,
    read_document,
    read_section,
)
from protocols.canonical import canonical_bytes, sha256_hex
from protocols.identifiers import Digest
from protocols.plan import Mode

POLICY_SCHEMA: Final = "minga.policy/1"
# No admin may ever overrule these, whatever the document says: it may only add to them.
NEVER_OVERRIDABLE: Final = ("privacy.budget", "residency", "secagg.required")
EVERYBODY: Final = "*"


# -- governance ------------------------------------------------------------------------------------


class Admins(Section):
    """The keys that rule together."""

    n: Annotated[int, Field(ge=3, le=64)]  # keys, each of another institution
    threshold: Annotated[int, Field(ge=2, le=64)]  # signatures of the ordinary roles
    min_countries: Annotated[int, Field(ge=1, le=64)]  # among the signers
    max_keys_per_institution: Literal[1]


class Emergency(Section):
    """Deny-only decisions of few, for a short time."""

    threshold: Annotated[int, Field(ge=2, le=64)]
    ttl_hours: Annotated[int, Field(ge=1, le=168)]


class OverrideRule(Section):
    """Exceptions for one plan from one rule of the consortium; never from a site's."""

    threshold: Annotated[int, Field(ge=2, le=64)]
    ttl_hours: Annotated[int, Field(ge=1, le=168)]
    never: RuleIds  # rules that no override may name


class ReleaseBoard(Section):
    """Who signs a model that leaves the federation."""

    n: Annotated[int, Field(ge=1, le=64)]
    threshold: Annotated[int, Field(ge=1, le=64)]


class Decisions(Section):
    """The decision table: distinct admin signatures that each kind of decision needs."""

    admit: Annotated[int, Field(ge=2, le=64)]
    suspend: Annotated[int, Field(ge=2, le=64)]  # to keep a suspension after the emergency ends
    expel: Annotated[int, Field(ge=2, le=64)]  # after the hearing is logged
    policy: Annotated[int, Field(ge=2, le=64)]
    root: Annotated[int, Field(ge=2, le=64)]
    code_approvers: Annotated[int, Field(ge=1, le=64)]  # of different institutions
    budget_increase: Annotated[int, Field(ge=2, le=64)]  # and the institution itself
    amendment: Annotated[int, Field(ge=2, le=64)]
    amendment_notice_days: Annotated[int, Field(ge=0, le=365)]

    @property
    def highest(self) -> int:
        """What a change needs that nobody classified."""
        return max(
            self.admit, self.suspend, self.expel, self.policy, self.root, self.budget_increase,
            self.amendment,
        )  # fmt: skip


class Governance(Section):
    """Who decides."""

    admins: Admins
    decisions: Decisions
    emergency: Emergency
    override: OverrideRule
    policy_delay_hours: Annotated[int, Field(ge=0, le=8760)]
    release_board: ReleaseBoard

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        admins, board = self.admins, self.release_board
        if not admins.n // 2 + 1 <= admins.threshold <= admins.n:
            raise ValueError(
                f"admins: a threshold of {admins.threshold} of {admins.n} is no majority of them"
            )
        if admins.min_countries > admins.threshold:
            raise ValueError("admins: min_countries is more than the signers that are needed")
        for name in ("admit", "suspend", "expel", "policy", "root", "budget_increase", "amendment"):
            needed = getattr(self.decisions, name)
            if not admins.threshold <= needed <= admins.n:
                raise ValueError(
                    f"decisions.{name}={needed} must be from the admins' threshold"
                    f" {admins.threshold} to their number {admins.n}"
                )
        if not admins.threshold <= self.override.threshold <= admins.n:
            raise ValueError("override.threshold must be at least the admins' threshold")
        if not 2 <= self.emergency.threshold <= admins.n:
            raise ValueError("emergency.threshold is more than there are admins")
        if not board.n // 2 + 1 <= board.threshold <= board.n:
            raise ValueError("release_board: the threshold is no majority")
        missing = set(NEVER_OVERRIDABLE) - set(self.override.never)
        if missing:
            raise ValueError(f"override.never lacks {', '.join(sorted(missing))}")
        return self


# -- the log ---------------------------------------------------------------------------------------


class WitnessRule(Section):
    """Who must have cosigned a checkpoint."""

    committee: Annotated[int, Field(ge=1, le=64)]
    quorum: Annotated[int, Field(ge=1, le=64)]
    max_cosignature_age_hours: Positive
    auditor_required: bool

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.committee // 2 + 1 <= self.quorum <= self.committee:
            raise ValueError("witness: the quorum is no majority of the committee")
        return self


class LogRule(Section):
    """The round log."""

    origin: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9./_-]{0,199}$")]
    max_checkpoint_interval_s: Positive
    heartbeat_s: Positive
    witness: WitnessRule


# -- rounds ----------------------------------------------------------------------------------------


class Participation(Section):
    """Who must be in a round."""

    min_participants: Annotated[int, Field(ge=1, le=1000)]
    min_countries: Annotated[int, Field(ge=1, le=249)]
    max_weight_share_permille: Annotated[int, Field(ge=1, le=1000)]
    dropout_permille: Permille  # nodes that may be lost without losing the round
    allowed_status: Annotated[tuple[Literal["active"], ...], Field(min_length=1, max_length=1)]


class Rounds(Section):
    """How long and how often."""

    max_duration_min: Positive
    max_steps_local: Positive
    hours_utc: Annotated[tuple[tuple[Clock, Clock], ...], Field(min_length=1, max_length=24)]
    concurrent_max: Annotated[int, Field(ge=1, le=1000)]
    min_interval_min: Number

    def open_at(self, now: datetime) -> bool:
        """Whether a round may be joined at this time (UTC)."""
        minute = now.hour * 60 + now.minute
        return any(within(minute, start, end) for start, end in self.hours_utc)


def within(minute: int, start: str, end: str) -> bool:
    """Whether a minute of the day is in ``[start, end)``; a window may go over midnight."""
    first, last = minute_of_day(start), minute_of_day(end)
    if first == last:
        return False
    if first < last:
        return first <= minute < last
    return minute >= first or minute < last % MINUTES


class SecaggRule(Section):
    """The secure sum."""

    required: bool  # for everything but public data
    protocol: Words
    threshold: tuple[Positive, Positive]  # a fraction of the roster: numerator, denominator
    min_surviving: Annotated[int, Field(ge=2, le=64)]
    reveal: Literal["aggregate-only"]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not 1 / 2 < self.threshold[0] / self.threshold[1] <= 1:
            raise ValueError("secagg.threshold is a fraction above one half")
        return self


# -- privacy ---------------------------------------------------------------------------------------


class Accountant(Section):
    """What computes epsilon."""

    name: Word
    version: Word


class Budget(Section):
    """Privacy that one institution may spend on one dataset in one period."""

    eps_total_micro: Number
    period: Period
    reset: Literal["never-carry"]


class BudgetOverride(Section):
    """Less (or more) than the default, for some."""

    institution: Literal["*"] | Institution
    dataset_class: Word
    eps_total_micro: Number
    period: Period


class Budgets(Section):
    """Budgets; burned rounds count."""

    default: Budget
    overrides: Annotated[tuple[BudgetOverride, ...], Field(max_length=1000)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keys = [(item.institution, item.dataset_class) for item in self.overrides]
        if len(keys) != len(set(keys)):
            raise ValueError("privacy.budgets.overrides: one institution and class stands twice")
        return self

    def entry(self, institution: str, dataset_class: str) -> Budget | BudgetOverride:
        """The most specific budget; the default where there is none."""
        for who in (institution, EVERYBODY):
            for item in self.overrides:
                if (item.institution, item.dataset_class) == (who, dataset_class):
                    return item
        return self.default

    def epsilon_micro(self, institution: str, dataset_class: str) -> int:
        """Millionths of epsilon: the most specific entry; the default where there is none."""
        return self.entry(institution, dataset_class).eps_total_micro

    def largest(self, institution: str, classes: Iterable[str]) -> Budget | BudgetOverride:
        """The largest budget among classes of data, where it is not known which one it is."""
        entries = [self.entry(institution, name) for name in classes] or [self.default]
        return max(entries, key=lambda entry: entry.eps_total_micro)

    def longest_days(self, institution: str) -> int:
        """Days of the longest period of any budget of an institution."""
        mine = [item for item in self.overrides if item.institution in (institution, EVERYBODY)]
        periods = [self.default.period, *(item.period for item in mine)]
        return max(period_days(period) for period in periods)


class PrivacyRule(Section):
    """Which modes, and what they may cost."""

    modes: Annotated[tuple[Mode, ...], Field(min_length=1, max_length=5)]
    unit: Annotated[tuple[Word, ...], Field(min_length=1, max_length=16)]
    accountant: Accountant
    delta_max: Share
    eps_round_max_micro: Number
    budgets: Budgets
    on_exhausted: Literal["refuse"]
    dropout_noise: Literal["distributed-ge-threshold"]


class Updates(Section):
    """What leaves a site."""

    clip_norm_max_micro: Positive  # L2 norm of an update, in millionths
    norm_check: Literal["post-aggregate", "none"]
    bits: Annotated[tuple[Literal[16, 20, 24], ...], Field(min_length=1, max_length=3)]
    parts: Annotated[tuple[Literal["all", "lora"], ...], Field(min_length=1, max_length=2)]
    robust: Literal["none"]


# -- models, code, data ----------------------------------------------------------------------------


class Base(Section):
    """A model that a run may start from."""

    id: Word
    digest: Digest256  # root of the starting snapshot
    format: Word
    licence: Licence
    obligations: Words


class Outputs(Section):
    """What a run's models may look like."""

    max_growth_bytes: Number


class Models(Section):
    """Base models."""

    bases: Annotated[tuple[Base, ...], Field(max_length=1000)]
    outputs: Outputs

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [base.id for base in self.bases]
        if len(ids) != len(set(ids)):
            raise ValueError("models.bases names a base twice")
        return self


class ApprovedCode(Section):
    """Code that may train, and who read it."""

    image: Digest256
    source_commit: Word
    provenance: Word
    approved_by: Words  # key ids of admins of different institutions
    expires: Utc


class Code(Section):
    """Code that may run at a site."""

    allowed: Annotated[tuple[ApprovedCode, ...], Field(max_length=1000)]
    network: Literal["deny-all"]
    entrypoints: Words

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        images = [code.image for code in self.allowed]
        if len(images) != len(set(images)):
            raise ValueError("code.allowed names an image twice")
        return self


class PersonalData(Section):
    """Whether data about people may be used."""

    allowed: Literal["none", "pseudonymised", "any"]
    dpia_required: bool


class Indigenous(Section):
    """What a collection in an indigenous language must bring with it."""

    requires: Annotated[tuple[Literal["fpic-record", "care-label"], ...], Field(max_length=2)]


class Data(Section):
    """What may be trained on."""

    licences_allowed: Licences
    licences_denied: Licences
    declaration_required: Words
    personal_data: PersonalData
    indigenous: Indigenous
    use: Words

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        both = set(self.licences_allowed) & set(self.licences_denied)
        if both:
            raise ValueError(f"data: {', '.join(sorted(both))} is allowed and denied")
        return self

    def takes_licence(self, licence: str) -> bool:
        """Whether data under this licence may be used: listed, and not denied."""
        return licence in self.licences_allowed and licence not in self.licences_denied


class Residency(Section):
    """Where things stay."""

    raw_data: Literal["in-institution", "in-country"]
    updates: Literal["masked-only", "any"]


class Transfer(Section):
    """On what basis what was learned from personal data may cross a border."""

    from_: Country = Field(alias="from")
    to: Literal["*"] | Country
    basis: Word
    evidence: Digest256


class Jurisdictions(Section):
    """Borders."""

    residency: Residency
    transfers: Annotated[tuple[Transfer, ...], Field(max_length=1000)]
    blocked: Countries

    def may_transfer(self, origin: str, to: str) -> bool:
        """Whether there is a basis for a transfer between two countries."""
        return origin == to or any(
            item.from_ == origin and item.to in (to, EVERYBODY) for item in self.transfers
        )


# -- the rest --------------------------------------------------------------------------------------


class Resources(Section):
    """What a round may cost, over all nodes."""

    gpu_minutes_round: Number
    energy_wh_round: Number
    cost_usd_cents_round: Number
    bandwidth_bytes_node: Number  # of one node, up and down


class QualityGate(Section):
    """A score must not fall behind a reference."""

    id: RuleId
    metric: Word
    op: Literal[">=", "<="]
    ref: Word
    margin_micro: Signed


class LanguageGate(Section):
    """No language may lose."""

    id: RuleId
    no_regression_vs: Word
    per_language_min_micro: Annotated[dict[Word, Signed], Field(max_length=200)]


class MemorisationGate(Section):
    """A model must not recite."""

    id: RuleId
    test: Word
    max_micro: Number


class SafetyGate(Section):
    """Few answers may fail the safety questions."""

    id: RuleId
    max_fail_micro: Number


class ContaminationGate(Section):
    """Test questions must not be in the training text."""

    id: RuleId
    max_overlap_micro: Number


Gate = QualityGate | LanguageGate | MemorisationGate | SafetyGate | ContaminationGate


class Evaluators(Section):
    """Who evaluates."""

    min_independent: Annotated[int, Field(ge=1, le=64)]


class Retention(Section):
    """How long things are kept."""

    round_artifacts_days: Positive
    logs: Literal["permanent"]
    salts: Literal["until-erasure"]


class Audit(Section):
    """What auditors get."""

    access: Literal["public-log", "members"]
    evidence: Literal["auditors", "members"]
    objection_window_hours: Positive


class ConsortiumPolicy(Section):
    """The rules of one federation, at one version."""

    schema_: Literal["minga.policy/1"] = Field(alias="schema")
    policy_version: Annotated[int, Field(ge=1, le=2**31 - 1)]
    federation: FederationName
    valid_from: Utc
    expires: Utc
    governance: Governance
    log: LogRule
    participation: Participation
    rounds: Rounds
    secagg: SecaggRule
    privacy: PrivacyRule
    updates: Updates
    models: Models
    code: Code
    data: Data
    jurisdictions: Jurisdictions
    resources: Resources
    gates: Annotated[tuple[Gate, ...], Field(max_length=100)]
    evaluators: Evaluators
    retention: Retention
    audit: Audit

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if parse_utc(self.expires) <= parse_utc(self.valid_from):
            raise ValueError("expires is not after valid_from")
        gates = [gate.id for gate in self.gates]
        if len(gates) != len(set(gates)):
            raise ValueError("gates: an id stands twice")
        if self.secagg.required and self.secagg.min_surviving > self.participation.min_participants:
            raise ValueError("secagg.min_surviving is more than participation.min_participants")
        return self

    # -- bytes -------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Canonical JSON: what is signed."""
        return canonical_bytes(self.to_value())

    @property
    def digest(self) -> Digest:
        """SHA-256 of the bytes: the hash of the target in the trust repository."""
        return sha256_hex(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> ConsortiumPolicy:
        """Read a policy.

        Raises:
            MalformedMessageError: not canonical, or a field is missing or wrong; names the first.
        """
        return read_document(cls, data, "policy")

    @classmethod
    def from_value(cls, value: Any) -> ConsortiumPolicy:
        """Read a policy from parsed JSON or TOML, as a person drafts it.

        Raises:
            MalformedMessageError: the sentence names the first wrong field.
        """
        return read_section(cls, value, "policy")

    # -- in force ----------------------------------------------------------------------------

    def in_force(self, now: datetime) -> Decision:
        """Whether the policy counts at this time (UTC).

        ``policy.not_yet`` before ``valid_from``, ``policy.expired`` from ``expires`` on.
        """
        whys = []
        if now < parse_utc(self.valid_from):
            whys.append(Why("policy.not_yet", f"the policy counts from {self.valid_from} on"))
        if now >= parse_utc(self.expires):
            whys.append(Why("policy.expired", f"the policy expired at {self.expires}"))
        return from_whys(whys)


def never_overridable(policy: ConsortiumPolicy) -> frozenset[str]:
    """Rules that no override may name: those of the program and those of the document."""
    return frozenset(NEVER_OVERRIDABLE) | set(policy.governance.override.never)
