"""The signed documents: who is a member, who decides, what is forbidden for now.

Each is canonical JSON (RFC 8785), a target of one role of the trust repository, and read strictly:
an unknown field, a second spelling or a missing section is an error, never a default. What an
emergency notice can say is only what is *denied*: it has no field that allows anything.

membership/members.json   minga.members/1    institutions, their status and their keys
membership/admins.json    minga.admins/1     people by role, the key each holds, their terms
emergency/<name>.json     minga.emergency/1  denials, for 72 hours at most
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocols.canonical import canonical_bytes, parse_canonical
from protocols.crypto.signatures import parse_public_key
from protocols.errors import MalformedMessageError
from protocols.governance.errors import TrustRefusedError
from protocols.governance.keys import parse_country
from protocols.identifiers import (
    Digest,
    NodeId,
    RunId,
    parse_digest,
    parse_federation_id,
    parse_node_id,
    parse_run_id,
)

MEMBERS: Final = "membership/members.json"
ADMINS: Final = "membership/admins.json"
EMERGENCY_HOURS: Final = 72
MAX_MEMBERS: Final = 1000
_MAX_DOCUMENT: Final = 2**20  # bytes

MemberStatus = Literal["active", "suspended", "expelled", "left"]
PersonRole = Literal["admin", "auditor", "operator", "partner", "witness", "release-board"]

D = TypeVar("D", bound="Document")


def _hex_key(text: str) -> str:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raise MalformedMessageError("a key is 64 hexadecimal digits") from None
    if raw.hex() != text:
        raise MalformedMessageError("a key is written in lower-case hexadecimal")
    parse_public_key(raw)
    return text


def parse_time(text: object) -> datetime:
    """``2026-12-01T00:00:00Z``. Raises: MalformedMessageError."""
    if isinstance(text, str) and len(text) == 20 and text.isascii():
        try:
            return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        except ValueError:
            pass
    raise MalformedMessageError(f"a time is written like 2026-12-01T00:00:00Z, got {text!r:.60}")


def time_text(at: datetime) -> str:
    """UTC, whole seconds."""
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"


def _time(text: str) -> str:
    if time_text(parse_time(text)) != text:
        raise MalformedMessageError(f"there is no time {text}")
    return text


Name = Annotated[str, AfterValidator(parse_node_id)]
Country = Annotated[str, AfterValidator(parse_country)]
HexKey = Annotated[str, AfterValidator(_hex_key)]  # 32 raw bytes of an Ed25519 public key
TimeText = Annotated[str, AfterValidator(_time)]
DigestText = Annotated[str, AfterValidator(parse_digest)]
Code = Annotated[str, Field(pattern=r"^[a-z][a-z0-9.-]{0,63}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """A document from what a person said. Raises: MalformedMessageError."""
        return cls.from_value(fields)

    @classmethod
    def from_value(cls, value: Any) -> Self:
        """Read parsed JSON.

        Raises:
            MalformedMessageError: the sentence names the first wrong field.
            TrustRefusedError: it says what no document of its kind may say.
        """
        try:
            return cls.model_validate(_tuples(value))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            message = first["msg"].removeprefix("Value error, ")
            name = cls.__name__.lower()
            raise MalformedMessageError(f"{name}: {where}: {message}") from None


class Document(_Part):
    """A signed document; ``to_bytes`` and ``from_bytes`` are each other's inverse."""

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_bytes(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read canonical bytes. Raises: as ``from_value``."""
        made = cls.from_value(parse_canonical(data, limit=_MAX_DOCUMENT))
        if made.to_bytes() != data:
            raise MalformedMessageError(f"{cls.__name__.lower()}: not every field is written out")
        return made


def _tuples(value: Any) -> Any:
    """Lists of JSON are tuples of frozen documents; depth is bounded by the parser."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


# -- members -------------------------------------------------------------------------------------


class Institution(_Part):
    """One institution: whether it may take part, and which keys speak for it."""

    id: Name
    country: Country
    status: MemberStatus
    roles: tuple[Literal["member", "observer", "partner", "witness"], ...] = Field(min_length=1)
    keys: tuple[HexKey, ...] = Field(min_length=1, max_length=3)  # approve its certificates
    nodes: tuple[Literal["1"], ...] = Field(max_length=1)
    witnesses: tuple[Annotated[str, Field(min_length=8, max_length=300)], ...] = Field(max_length=2)
    since: TimeText

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("a key stands twice")
        if list(self.roles) != sorted(set(self.roles)):
            raise ValueError("roles must be unique and in ascending order")
        if self.nodes and "member" not in self.roles:
            raise ValueError("only a member has a node")
        return self


class Members(Document):
    """Everybody who is or was a member. Nobody is removed: a status says who left."""

    schema_: Literal["minga.members/1"] = Field(default="minga.members/1", alias="schema")
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    institutions: tuple[Institution, ...] = Field(max_length=MAX_MEMBERS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [item.id for item in self.institutions]
        if names != sorted(set(names)):
            raise ValueError("institutions must be unique and in ascending order")
        keys = [key for item in self.institutions for key in item.keys]
        if len(set(keys)) != len(keys):
            raise ValueError("two institutions have the same key")
        return self

    def get(self, name: str) -> Institution | None:
        """One institution; None: it never was a member."""
        return next((item for item in self.institutions if item.id == name), None)

    def active(self) -> tuple[NodeId, ...]:
        """Who may take part, ascending."""
        return tuple(NodeId(item.id) for item in self.institutions if item.status == "active")

    def keys_of(self, name: str) -> tuple[bytes, ...]:
        """The institution's keys, 32 raw bytes each; none where it is no active member."""
        found = self.get(name)
        if found is None or found.status != "active":
            return ()
        return tuple(bytes.fromhex(key) for key in found.keys)


# -- people --------------------------------------------------------------------------------------


class Person(_Part):
    """A holder of one key, by role. The name is a handle: people are key ids in the log."""

    id: Name
    institution: Name
    country: Country
    keyid: DigestText
    roles: tuple[PersonRole, ...] = Field(min_length=1)
    term_from: TimeText
    term_until: TimeText

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if list(self.roles) != sorted(set(self.roles)):
            raise ValueError("roles must be unique and in ascending order")
        if parse_time(self.term_from) >= parse_time(self.term_until):
            raise ValueError("the term ends before it begins")
        return self


class Admins(Document):
    """The people who hold the federation's keys, and how many must agree."""

    schema_: Literal["minga.admins/1"] = Field(default="minga.admins/1", alias="schema")
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    threshold: int = Field(ge=2, le=64)
    min_countries: int = Field(ge=1, le=64)
    people: tuple[Person, ...] = Field(min_length=3, max_length=256)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [person.id for person in self.people]
        if names != sorted(set(names)):
            raise ValueError("people must be unique and in ascending order")
        if len(self.admins()) < 3:
            raise ValueError("a federation has three admins or more")
        return self

    def admins(self) -> tuple[Person, ...]:
        """Those who decide."""
        return tuple(person for person in self.people if "admin" in person.roles)

    def check_duties(self) -> None:
        """Separation of duties.

        An auditor has no other role; a key has one holder; an institution has one admin; the
        operator is no admin (who runs the machine does not also decide what it enforces).

        Raises:
            TrustRefusedError: trust.duties, trust.alias or trust.institution.
        """
        for person in self.people:
            if "auditor" in person.roles and len(person.roles) > 1:
                other = ", ".join(role for role in person.roles if role != "auditor")
                raise TrustRefusedError(
                    f"{person.id} is an auditor and also {other}: an auditor has no other role",
                    rule="trust.duties",
                )
            if {"admin", "operator"} <= set(person.roles):
                raise TrustRefusedError(
                    f"{person.id} is an admin and also the operator", rule="trust.duties"
                )
        by_key: dict[str, str] = {}
        for person in self.people:
            other = by_key.setdefault(person.keyid, person.id)
            if other != person.id:
                raise TrustRefusedError(
                    f"{other} and {person.id} hold the same key", rule="trust.alias"
                )
        seats: dict[str, str] = {}
        for person in self.admins():
            other = seats.setdefault(person.institution, person.id)
            if other != person.id:
                raise TrustRefusedError(
                    f"{other} and {person.id} are admins of one institution, {person.institution}",
                    rule="trust.institution",
                )


# -- emergencies ---------------------------------------------------------------------------------


class Denials(_Part):
    """What is forbidden. There is no field that allows anything."""

    institutions: tuple[Name, ...] = Field(max_length=MAX_MEMBERS)
    runs: tuple[Annotated[str, AfterValidator(parse_run_id)], ...] = Field(max_length=1000)
    plans: tuple[DigestText, ...] = Field(max_length=1000)
    code: tuple[DigestText, ...] = Field(max_length=1000)
    certificates: tuple[DigestText, ...] = Field(max_length=1000)  # SHA-256 of their SPKI
    all_rounds: bool

    @model_validator(mode="after")
    def _something(self) -> Self:
        lists = (self.institutions, self.runs, self.plans, self.code, self.certificates)
        if not self.all_rounds and not any(lists):
            raise ValueError("an emergency notice denies something")
        return self


class Emergency(Document):
    """A notice that forbids, for a while, until it is ratified in the membership or lapses."""

    schema_: Literal["minga.emergency/1"] = Field(default="minga.emergency/1", alias="schema")
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    code: Code  # why, as a code: reasons that name people are kept elsewhere
    issued_at: TimeText
    until: TimeText
    deny: Denials

    @model_validator(mode="after")
    def _short(self) -> Self:
        lasts = parse_time(self.until) - parse_time(self.issued_at)
        if not timedelta() < lasts <= timedelta(hours=EMERGENCY_HOURS):
            raise ValueError(f"an emergency lasts {EMERGENCY_HOURS} hours at most")
        return self

    def in_force(self, now: datetime) -> bool:
        """Whether it forbids at ``now`` (also a little before its own clock says so)."""
        return now < parse_time(self.until)


# -- questions -----------------------------------------------------------------------------------


def member_refusal(
    members: Members,
    emergencies: Mapping[str, Emergency],
    institution: str,
    now: datetime,
) -> TrustRefusedError | None:
    """Why an institution may not take part now; None: it may.

    Rights are membership AND NOT emergency. What is not surely active is refused.
    """
    found = members.get(institution)
    if found is None:
        return TrustRefusedError(f"{institution} is not a member", rule="trust.member")
    if found.status != "active":
        return TrustRefusedError(f"{institution} is {found.status}", rule="trust.member")
    for name, notice in sorted(emergencies.items()):
        if institution in notice.deny.institutions and notice.in_force(now):
            return TrustRefusedError(
                f"{institution} is suspended until {notice.until} by {name} ({notice.code})",
                rule="trust.emergency",
            )
    return None


def run_refusal(
    emergencies: Mapping[str, Emergency], run: RunId, plan: Digest, now: datetime
) -> TrustRefusedError | None:
    """Why no round of a run may open now; None: nothing stands against it."""
    for name, notice in sorted(emergencies.items()):
        deny = notice.deny
        if notice.in_force(now) and (deny.all_rounds or run in deny.runs or plan in deny.plans):
            what = "every round" if deny.all_rounds else f"run {run}"
            return TrustRefusedError(
                f"{what} is stopped until {notice.until} by {name} ({notice.code})",
                rule="trust.emergency",
            )
    return None
