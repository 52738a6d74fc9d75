"""An override: an exception from one rule, for one plan, for a short time, signed by enough.

It is a value. Whoever reads it has verified its signatures before and says here whose they were.
It can never touch a rule of ``never_overridable``, whatever was signed, and there is no way to
write one that names a site's rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from policies.consortium import ConsortiumPolicy, never_overridable
from policies.decision import Decision, Why, all_of, from_whys
from policies.document import (
    FederationName,
    RuleId,
    Section,
    Utc,
    Word,
    parse_utc,
    read_document,
)
from protocols.canonical import canonical_bytes, sha256_hex
from protocols.identifiers import Digest

OVERRIDE_SCHEMA: Final = "minga.override/1"
OVERRIDE_PREFIX: Final = "policy/override-"  # of its path in the trust repository
PlainDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Rules that say who counts, or that a document is the one in force: an exception makes no sense.
_STRUCTURAL: Final = (
    "policy.",
    "terms.",
    "override.",
    "site.",
    "fed.",
    "cedar.",
    "trust.",
    "plan.",
)


class Override(Section):
    """What admins sign to let one plan past one rule."""

    schema_: Literal["minga.override/1"] = Field(alias="schema")
    federation: FederationName
    plan: PlainDigest  # digest of the plan
    rule: RuleId
    code: Word  # why, as a code: reasons that name people are kept elsewhere
    granted_at: Utc
    expires: Utc

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if parse_utc(self.expires) <= parse_utc(self.granted_at):
            raise ValueError("expires is not after granted_at")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON: what is signed."""
        return canonical_bytes(self.to_value())

    @property
    def digest(self) -> Digest:
        """SHA-256 of the bytes."""
        return sha256_hex(self.to_bytes())

    @property
    def path(self) -> str:
        """Where the trust repository publishes it."""
        return f"{OVERRIDE_PREFIX}{self.digest[:16]}.json"

    @classmethod
    def from_bytes(cls, data: bytes) -> Override:
        """Read an override. Raises: MalformedMessageError."""
        return read_document(cls, data, "override")


def check_override_terms(override: Override, policy: ConsortiumPolicy) -> Decision:
    """Whether such an override could ever count, whoever signs it.

    override.never        the rule can never be overridden
    override.site         it names a site's rule
    override.rule         the rule is not one that a plan can break
    override.federation   it is of another federation
    override.ttl          it lasts longer than the policy allows
    """
    rules, whys = policy.governance.override, []
    if override.rule in never_overridable(policy):
        whys.append(Why("override.never", f"nobody may override {override.rule}"))
    if override.rule == "site" or override.rule.startswith("site."):
        whys.append(Why("override.site", "an override never binds a site"))
    elif override.rule.startswith(_STRUCTURAL):
        whys.append(Why("override.rule", f"{override.rule} is no rule that a plan can break"))
    if override.federation != policy.federation:
        whys.append(Why("override.federation", f"it is of federation {override.federation}"))
    lasts = parse_utc(override.expires) - parse_utc(override.granted_at)
    if lasts > timedelta(hours=rules.ttl_hours):
        whys.append(Why("override.ttl", f"an override lasts {rules.ttl_hours} hours at most"))
    return from_whys(whys)


def check_override(
    override: Override, policy: ConsortiumPolicy, *, signers: frozenset[str], now: datetime
) -> Decision:
    """Whether an override counts now: its terms, and besides them

    override.quorum       too few distinct admins of distinct institutions signed
    override.expired, override.not_yet

    Args:
        override: as signed.
        policy: in force.
        signers: institutions whose admins' signatures were verified; each counts once.
        now: UTC.
    """
    need, whys = policy.governance.override.threshold, []
    if len(signers) < need:
        whys.append(
            Why("override.quorum", f"admins of {len(signers)} institutions signed, {need} must")
        )
    if now < parse_utc(override.granted_at):
        whys.append(Why("override.not_yet", f"it counts from {override.granted_at} on"))
    if now >= parse_utc(override.expires):
        whys.append(Why("override.expired", f"it expired at {override.expires}"))
    return all_of([check_override_terms(override, policy), from_whys(whys)])


def overridden_rules(
    overrides: Iterable[tuple[Override, frozenset[str]]],
    policy: ConsortiumPolicy,
    *,
    plan: Digest,
    now: datetime,
) -> frozenset[str]:
    """Rules that are set aside for one plan now; whatever is wrong with an override: not set aside.

    Args:
        overrides: each with the institutions whose signatures were verified.
        policy: in force.
        plan: digest of the plan.
        now: UTC.
    """
    return frozenset(
        override.rule
        for override, signers in overrides
        if override.plan == plan and check_override(override, policy, signers=signers, now=now)
    )
