"""What each kind of leaf says, and whose key may say it: one strict model for each predicate.

A leaf is a DSSE envelope (``leaf``); its ``fields`` are read here. Strict means: no unknown field,
no missing one, no float, nothing longer than it has to be, so that a leaf has one meaning and no
room for anything else. Whether what it says is *true* is the business of ``policies.audit``.

Roles are those of ``policies.audit.replay``, which knows whose key stands for which role at an
index of the log. Normative text: protocols/spec/log.md, section 11.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from pydantic import ValidationError

from protocols.canonical import canonical_bytes, sha256_hex
from protocols.errors import MalformedMessageError
from protocols.identifiers import FederationId, RoundId, parse_federation_id
from protocols.tlog.fields import Predicate, Role, RoundPredicate, first_sentence
from protocols.tlog.kinds_general import (
    Approval,
    AuditReport,
    Ballot,
    CertIssued,
    CodeApproved,
    DatasetDeclared,
    EmergencyNotice,
    EnrolApproval,
    EnrolRequest,
    EvalReport,
    GateResult,
    Genesis,
    Heartbeat,
    Incident,
    LogClosed,
    MemberStatement,
    ObjectionResolved,
    OverrideGranted,
    PolicyProposed,
    Previous,
    ReleaseApproved,
    ReleaseWithdrawn,
    Speakers,
    TufPublished,
)
from protocols.tlog.kinds_round import (
    CodeUsed,
    DatasetUsed,
    Dropped,
    Published,
    ResourcesUsed,
    RoundAborted,
    RoundAggregate,
    RoundClosed,
    RoundConfirm,
    RoundDecline,
    RoundJoin,
    RoundObjection,
    RoundPlan,
    RoundStart,
    RoundSurvivors,
    RunRequest,
    SecaggUsed,
    SignedRequest,
    Survivor,
    UpdateCommit,
    Weight,
)
from protocols.tlog.leaf import KINDS, Statement

__all__ = [
    "MODELS",
    "PEOPLE",
    "Approval",
    "AuditReport",
    "Ballot",
    "CertIssued",
    "CodeApproved",
    "CodeUsed",
    "DatasetDeclared",
    "DatasetUsed",
    "Dropped",
    "EmergencyNotice",
    "EnrolApproval",
    "EnrolRequest",
    "EvalReport",
    "GateResult",
    "Genesis",
    "Heartbeat",
    "Incident",
    "LogClosed",
    "MemberStatement",
    "ObjectionResolved",
    "OverrideGranted",
    "PolicyProposed",
    "Predicate",
    "Previous",
    "Published",
    "ReleaseApproved",
    "ReleaseWithdrawn",
    "ResourcesUsed",
    "Role",
    "RoundAborted",
    "RoundAggregate",
    "RoundClosed",
    "RoundConfirm",
    "RoundDecline",
    "RoundJoin",
    "RoundObjection",
    "RoundPlan",
    "RoundStart",
    "RoundSurvivors",
    "RunRequest",
    "SecaggUsed",
    "SignedRequest",
    "Speakers",
    "Survivor",
    "TufPublished",
    "UpdateCommit",
    "Weight",
    "is_about_round",
    "parse_round_subject",
    "predicate_of",
    "read_predicate",
    "round_subject",
]


def _all_models() -> dict[str, type[Predicate]]:
    found: dict[str, type[Predicate]] = {}
    todo: list[type[Predicate]] = [Predicate]
    while todo:
        for model in todo.pop().__subclasses__():
            todo.append(model)
            if "KIND" in vars(model):
                found[model.KIND] = model
    return found


MODELS: Final[Mapping[str, type[Predicate]]] = _all_models()
if MODELS.keys() != KINDS:  # a kind without a model could say anything
    raise AssertionError(f"kinds and models differ: {MODELS.keys() ^ KINDS}")


# What an admin or an institution says by hand; every other kind goes with an act.
PEOPLE: Final = frozenset(
    {
        "audit.report",
        "ballot",
        "code.approved",
        "dataset.declared",
        "emergency.notice",
        "eval.report",
        "incident",
        "member.statement",
        "objection.resolved",
        "override.granted",
        "policy.proposed",
        "release.approved",
        "release.withdrawn",
    }
)


def read_predicate(kind: str, fields: Mapping[str, Any]) -> Predicate:
    """Read the fields of a leaf.

    Raises:
        MalformedMessageError: an unknown kind, or a field that is missing, unknown or wrong.
    """
    model = MODELS.get(kind)
    if model is None:
        raise MalformedMessageError(f"no leaf is of the kind {kind!r:.80}")
    try:
        # As JSON: there, and only there, strict reading takes arrays for tuples.
        return model.model_validate_json(json.dumps(dict(fields)))
    except ValidationError as error:
        raise MalformedMessageError(first_sentence(kind, error)) from None


def predicate_of(statement: Statement) -> Predicate:
    """What a statement says, typed; for round leaves the subject is checked as well.

    Raises:
        MalformedMessageError: see ``read_predicate``; or the subject is not the one of the fields.
    """
    found = read_predicate(statement.kind, statement.fields)
    if isinstance(found, RoundPredicate):
        _, round_ = parse_round_subject(statement.subject)
        if isinstance(found, RoundPlan):
            if (round_.run, round_.number) != (found.run, found.round):
                raise MalformedMessageError("round.plan names another round than its subject")
            if found.plan is not None and sha256_hex(canonical_bytes(found.plan)) != (
                statement.digest
            ):
                raise MalformedMessageError("round.plan: the subject's digest is not the plan's")
    return found


def is_about_round(kind: str) -> bool:
    """Whether leaves of this kind are about a round."""
    return issubclass(MODELS[kind], RoundPredicate)


def round_subject(federation: FederationId, round_: RoundId) -> str:
    """``fed/<federation>/<run>/round/<number>``."""
    return f"fed/{federation}/{round_.run}/round/{round_.number}"


@lru_cache(maxsize=4096)  # many leaves are about one round
def parse_round_subject(subject: str) -> tuple[FederationId, RoundId]:
    """Raises: MalformedMessageError: another form."""
    match subject.split("/"):
        case ["fed", federation, run, "round", number]:
            return parse_federation_id(federation), RoundId.parse(f"{run}/{number}")
        case _:
            raise MalformedMessageError(f"not the subject of a round leaf: {subject!r:.80}")
