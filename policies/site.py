"""The site's own policy: ``policy.toml``, which never leaves the site and can only narrow.

    effective limit = min(consortium, site, declaration of the data set)

Every key is written out: a missing one is an error and the node says no, because a limit that was
forgotten is not a limit that was lifted. Where a site adds nothing it says so: ``"consortium"``.
Only a salted digest leaves the site, in the round's join. Normative text: protocols/spec/policy.md,
section 5.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from policies.consortium import within
from policies.decision import Why
from policies.document import (
    Clock,
    Country,
    Digest256,
    Institution,
    Licence,
    Number,
    Section,
    Sentence,
    Word,
    Words,
    read_section,
)
from protocols.canonical import canonical_bytes, hash_hex
from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest

SITE_SCHEMA: Final = "minga.site-policy/1"
CROISSANT: Final = "http://mlcommons.org/croissant/1.1"
_SPDX: Final = "https://spdx.org/licenses/"
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
NoLimit = Literal["consortium"]  # the site adds nothing to what the consortium says
Limit = NoLimit | Number
# How many documents, to the power of ten: enough to judge a budget, too coarse to single one out.
Records = Literal["below-1e3", "1e3-1e4", "1e4-1e5", "1e5-1e6", "1e6-1e7", "above-1e7"]
DatasetId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,8}(-[a-z0-9]{1,8})*$")]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]


def narrow(limit: int, *others: Limit) -> int:
    """The least of the consortium's limit and those of others; never more than the first."""
    return min([limit, *(other for other in others if other != "consortium")])


class Hours(Section):
    """When rounds may be joined: local wall-clock time, also over midnight."""

    days: Annotated[tuple[Day, ...], Field(min_length=1, max_length=7)]  # on which it begins
    from_: Clock = Field(alias="from")
    to: Clock  # exclusive

    def covers(self, local: datetime) -> bool:
        """Whether a local time is inside; after midnight the day is that on which it began."""
        minute, day = local.hour * 60 + local.minute, DAYS[local.weekday()]
        if not within(minute, self.from_, self.to):
            return False
        over_midnight = self.to != "24:00" and self.to < self.from_
        if over_midnight and within(minute, "00:00", self.to):
            day = DAYS[(local.weekday() - 1) % 7]
        return day in self.days


class SiteLimits(Section):
    """What a round, or a day, may use at this site."""

    gpu_minutes_round: Limit
    gpu_minutes_day: Limit
    energy_wh_round: Limit
    energy_wh_day: Limit
    eps_round_max_micro: Limit
    bandwidth_bytes_round: Limit


class Deny(Section):
    """What this site does not run although the consortium allows it."""

    bases: Words  # ids
    code: Annotated[tuple[Digest256, ...], Field(max_length=1000)]
    modes: Annotated[
        tuple[
            Literal["open", "aggregate-only", "record-local", "record-distributed", "institution"],
            ...,
        ],
        Field(max_length=5),
    ]
    institutions: Annotated[tuple[Institution, ...], Field(max_length=1000)]  # with whom: never


class Dataset(Section):
    """What a site declares about one of its collections. Croissant-compatible: ``croissant``."""

    id: DatasetId
    title: Sentence
    paths: Annotated[tuple[PathText, ...], Field(min_length=1, max_length=1000)]
    class_: Word = Field(alias="class")  # "public": whoever may read it could train on it
    licence: Licence  # SPDX id
    jurisdiction: Country
    legal_basis: Word
    records: Records
    languages: Annotated[tuple[Language, ...], Field(max_length=64)]
    personal_data: Literal["none", "pseudonymised", "identified"]
    dpia: bool  # an impact assessment was made
    indigenous: bool
    fpic_record: Literal["none"] | Digest256  # free, prior and informed consent
    care_label: Literal["none"] | Word
    residency: Literal["in-institution", "in-country", "anywhere"]
    declarations: Words  # that exist: croissant-1.1, datasheet
    use: Words  # purposes
    eps_total_micro: Limit  # privacy budget, if less than the consortium's

    def croissant(self, institution: str) -> dict[str, Any]:
        """The declaration as Croissant 1.1 metadata with its Responsible-AI properties.

        No path and no record leaves the site: the description has no distribution.
        """
        licence = self.licence
        known = not licence.startswith("LicenseRef-")
        return {
            "@context": {
                "@vocab": "https://schema.org/",
                "sc": "https://schema.org/",
                "cr": "http://mlcommons.org/croissant/",
                "rai": "http://mlcommons.org/croissant/RAI/",
                "dct": "http://purl.org/dc/terms/",
                "conformsTo": "dct:conformsTo",
            },
            "@type": "sc:Dataset",
            "conformsTo": CROISSANT,
            "name": self.id,
            "description": self.title,
            "creator": {"@type": "sc:Organization", "name": institution},
            "license": f"{_SPDX}{licence}.html" if known else licence,
            "inLanguage": list(self.languages),
            "sc:spatialCoverage": self.jurisdiction,
            "rai:dataUseCases": list(self.use),
            "rai:personalSensitiveInformation": self.personal_data,
            "rai:dataReleaseMaintenancePlan": f"stays {self.residency}",
            "rai:dataLimitations": f"class {self.class_}; legal basis {self.legal_basis}",
            "sc:size": f"{self.records} documents",
        }


class SitePolicy(Section):
    """What one site allows of what the consortium allows."""

    schema_: Literal["minga.site-policy/1"] = Field(alias="schema")
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32,128}$")]  # so that the digest tells nothing
    time_zone: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}$")]
    requires_approval: bool  # by a person, of each plan: `minga node approve`
    approvers: Annotated[tuple[Word, ...], Field(max_length=100)]  # who may; empty: who can write
    hours: Annotated[tuple[Hours, ...], Field(min_length=1, max_length=50)]
    limits: SiteLimits
    deny: Deny
    datasets: Annotated[tuple[Dataset, ...], Field(max_length=100)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [item.id for item in self.datasets]
        if len(ids) != len(set(ids)):
            raise ValueError("datasets: an id stands twice")
        return self

    @classmethod
    def from_value(cls, value: Any) -> SitePolicy:
        """Read ``policy.toml`` after its TOML was parsed.

        Raises:
            MalformedMessageError: the sentence names the first missing or wrong key.
        """
        if not isinstance(value, dict) or not _is_json(value):
            raise MalformedMessageError("policy.toml: a value is neither text, number nor list")
        return read_section(cls, value, "policy.toml")

    def open_at(self, local: datetime) -> bool:
        """Whether the site's hours cover a local time."""
        return any(hours.covers(local) for hours in self.hours)

    def undeclared(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Paths that no declaration covers: nobody said what may be done with them."""
        declared = {path for item in self.datasets for path in item.paths}
        return tuple(path for path in paths if path not in declared)


def site_policy_digest(policy: SitePolicy, rules: str) -> Digest:
    """What a join tells of the site's policy: it binds the site, and tells nobody what it says.

    Salted by the policy itself: without the salt one could try all usual policies.
    """
    value = canonical_bytes(policy.to_value())
    return hash_hex("minga/site-policy/v1", value, rules.encode("utf-8"))


def _is_json(value: Any, depth: int = 0) -> bool:
    """TOML also has dates, times and floats; a policy has none."""
    if depth > 16:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_json(item, depth + 1) for item in value)
    return isinstance(value, str | bool) or (type(value) is int and abs(value) < 2**53)


def check_hours(policy: SitePolicy, local: datetime) -> list[Why]:
    """``site.hours``: it is not one of the hours in which the site takes part."""
    if policy.open_at(local):
        return []
    at = f"{DAYS[local.weekday()]} {local:%H:%M}"
    return [Why("site.hours", f"it is {at} here ({policy.time_zone}), outside the site's hours")]
