"""What the signed policy documents have in common: field types, and how they are read.

A document is canonical JSON (RFC 8785) and its digest is the plain SHA-256 of those bytes, so it
is also the hash under which the trust repository names it. No floats: shares are per mille, privacy
and scores millionths, energy watt hours, money cents. No number is above 2**40, so that no sum, and
no product with the small constants of a rule, leaves the 64 bits that the rule engine has.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from policies.decision import is_rule_id
from protocols.canonical import canonical_bytes, parse_canonical
from protocols.errors import MalformedMessageError
from protocols.identifiers import parse_federation_id, parse_node_id

MAX_NUMBER: Final = 2**40
MAX_POLICY: Final = 2**20  # bytes of one policy document
_UTC: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_CLOCK: Final = re.compile(r"([01]\d|2[0-3]):[0-5]\d|24:00", re.ASCII)
MINUTES: Final = 24 * 60  # of a day


def parse_utc(text: str) -> datetime:
    """``2026-12-01T00:00:00Z`` as a time; ``ValueError`` for anything else."""
    if not _UTC.fullmatch(text):
        raise ValueError(f"a time is written like 2026-12-01T00:00:00Z, not {text!r:.40}")
    return datetime.fromisoformat(text).astimezone(UTC)


def _utc(text: str) -> str:
    parse_utc(text)
    return text


def period_days(text: str) -> int:
    """``P1Y``, ``P3M``, ``P90D`` in days, rounded up: a longer period is the stricter one."""
    return int(text[1:-1]) * {"D": 1, "M": 31, "Y": 366}[text[-1]]


def minute_of_day(text: str) -> int:
    """``20:30`` as minutes after midnight, ``24:00`` as 1440; ``ValueError`` for anything else."""
    if not _CLOCK.fullmatch(text):
        raise ValueError(f"a time of day is written like 07:30, not {text!r:.40}")
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


def _clock(text: str) -> str:
    minute_of_day(text)
    return text


def _rule(text: str) -> str:
    if not is_rule_id(text):
        raise ValueError(f"{text!r:.60} is no rule id: area.rule, lower case")
    return text


def parse_share(text: str) -> Decimal:
    """A probability written as a decimal, between 0 and 1; ``ValueError`` for anything else."""
    if not re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,40})?(e-[0-9]{1,3})?", text):
        raise ValueError(f"{text!r:.40} is no decimal like 1e-8")
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r:.40} is no decimal like 1e-8") from None
    if not 0 < value < 1:
        raise ValueError(f"{text} is not between 0 and 1")
    return value


def _share(text: str) -> str:
    parse_share(text)
    return text


def _ascending(value: tuple[str, ...]) -> tuple[str, ...]:
    if list(value) != sorted(set(value)):
        raise ValueError("must be unique and in ascending order")
    return value


def _unique(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) != len(set(value)):
        raise ValueError("must name nothing twice")
    return value


Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Signed = Annotated[int, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]  # millionths of a score
Permille = Annotated[int, Field(ge=0, le=1000)]
Utc = Annotated[str, AfterValidator(_utc)]
Clock = Annotated[str, AfterValidator(_clock)]
RuleId = Annotated[str, AfterValidator(_rule)]
Share = Annotated[str, AfterValidator(_share)]
Digest256 = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/+-]{0,119}$")]
Sentence = Annotated[str, Field(min_length=1, max_length=400)]
# An SPDX licence id; LicenseRef-… for one that SPDX does not list. Not checked against the list.
Licence = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,79}$")]
Country = Annotated[str, Field(pattern=r"^[A-Z]{2}$")]  # ISO 3166-1 alpha-2
Institution = Annotated[str, AfterValidator(parse_node_id)]
FederationName = Annotated[str, AfterValidator(parse_federation_id)]
Period = Annotated[str, Field(pattern=r"^P[1-9][0-9]{0,3}[DMY]$")]  # ISO 8601: P1Y, P90D
Words = Annotated[tuple[Word, ...], Field(max_length=1000), AfterValidator(_unique)]
Licences = Annotated[tuple[Licence, ...], Field(max_length=1000), AfterValidator(_unique)]
Countries = Annotated[tuple[Country, ...], Field(max_length=249), AfterValidator(_unique)]
RuleIds = Annotated[tuple[RuleId, ...], Field(max_length=200), AfterValidator(_ascending)]
Institutions = Annotated[
    tuple[Institution, ...], Field(max_length=1000), AfterValidator(_ascending)
]


class Section(BaseModel):
    """A frozen part of a document: strict types, every field named, no field unknown."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    def to_value(self) -> Any:
        """The JSON value."""
        return self.model_dump(mode="json", by_alias=True)


SomeSection = TypeVar("SomeSection", bound=Section)


def first_problem(error: ValidationError, what: str) -> MalformedMessageError:
    """A library's list of problems as one sentence that names the first wrong field."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or what
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return MalformedMessageError(f"{what}: {where}: {message}{more}")


def read_section(cls: type[SomeSection], value: Any, what: str) -> SomeSection:
    """A document from a parsed JSON value.

    Raises:
        MalformedMessageError: the sentence names the first wrong or missing field.
    """
    try:
        # By way of JSON text: there a list is an array, and 1.0 is not the integer 1.
        return cls.model_validate_json(canonical_bytes(value))
    except ValidationError as error:
        raise first_problem(error, what) from None


def read_document(
    cls: type[SomeSection], data: bytes, what: str, *, limit: int = MAX_POLICY
) -> SomeSection:
    """A document from its bytes, which must be canonical.

    Raises:
        MalformedMessageError: too large, not canonical, or a field is wrong or missing.
    """
    return read_section(cls, parse_canonical(data, limit=limit), what)
