"""The small types that the leaves' fields are made of, and the base of their models."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from protocols.identifiers import parse_digest, parse_node_id
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.note import KeyType, VerifierKey

MAX_LIST: Final = 1024
MAX_INT: Final = 2**53 - 1


class Role(StrEnum):
    """Whose key signs."""

    COORDINATOR = "coordinator"  # who orders the leaves
    OPERATOR = "operator"
    NODE = "node"
    INSTITUTION = "institution"  # a member's own keys, from the signed membership
    ADMIN = "admin"
    AUDITOR = "auditor"


def _vkey(text: str) -> str:
    if VerifierKey.parse(text).type not in (KeyType.ED25519, KeyType.ED25519_COSIGNATURE):
        raise ValueError("not the vkey of a log or a witness")
    return text


def _origin(text: str) -> str:
    Checkpoint(origin=text, size=0, root=bytes(32))
    return text


DigestText = Annotated[str, AfterValidator(parse_digest)]
# Every leaf names nodes: of each name one copy is kept, however long the log is.
NodeName = Annotated[str, AfterValidator(parse_node_id), AfterValidator(sys.intern)]
KeyText = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # a raw Ed25519 public key
Code = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.:-]{0,63}$")]  # no prose
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Attempt = Annotated[int, Field(ge=1, le=10**6)]
TimeText = Annotated[
    str, Field(pattern=r"^[2-9][0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")
]
Vkey = Annotated[str, Field(max_length=400), AfterValidator(_vkey)]
Origin = Annotated[str, Field(max_length=255), AfterValidator(_origin)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$")]  # an id, no prose
Micro = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]  # millionths
Nodes = Annotated[tuple[NodeName, ...], Field(max_length=MAX_LIST)]
Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{0,512}={0,2}$")]
SpiffeUri = Annotated[
    str, Field(pattern=r"^spiffe://[a-z0-9.-]+(/[A-Za-z0-9._-]+)+$", max_length=512)
]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Predicate(Part):
    """The fields of one kind of leaf, beyond those that every leaf has."""

    KIND: ClassVar[str]
    SIGNERS: ClassVar[frozenset[Role]] = frozenset({Role.COORDINATOR})

    def to_fields(self) -> dict[str, Any]:
        """What stands in the statement."""
        fields: dict[str, Any] = self.model_dump(mode="json")
        return fields


class RoundPredicate(Predicate):
    """A leaf about a round: its subject is the round, its digest that of the plan."""


def check_ascending(nodes: tuple[str, ...], what: str) -> None:
    if list(nodes) != sorted(set(nodes)):
        raise ValueError(f"{what} must be unique and in ascending order")


def first_sentence(what: str, error: ValidationError) -> str:
    """What is wrong first, for a refusal."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole"
    return f"{what}: {where}: {first['msg'].removeprefix('Value error, ')}"
