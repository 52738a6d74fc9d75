"""Reads what `minga governance check` compares; decides nothing.

Without a trust repository the documents are those beside the policy that the text names
(``consortium.json``, ``members.json``, ``admins.json``); with one they are what is in force there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from policies.cedar import consortium_text, schema_text
from policies.cedar.engine import CONSORTIUM, read_rules
from policies.consortium import ConsortiumPolicy
from policies.governance import (
    Charter,
    Coverage,
    Finding,
    Signed,
    check_charter,
    coverage,
    parse_charter,
    with_annexes,
)
from policies.overrides import OVERRIDE_PREFIX, Override
from policies.rules import ALL
from protocols.errors import ConfigurationError, MalformedMessageError, NotFoundError
from protocols.governance.documents import ADMINS, MEMBERS, Admins, Members

POLICY_TARGET = "policy/consortium.json"
TEXT_TARGET = "governance/GOVERNANCE.md"
LANGUAGES = ("es", "pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was found."""

    charter: Charter
    findings: tuple[Finding, ...]
    coverage: Coverage
    policy: ConsortiumPolicy
    source: str  # where the documents are from


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Documents:
    policy: ConsortiumPolicy
    members: Members
    admins: Admins
    source: str
    overrides: tuple[Override, ...] = ()
    expires: Mapping[str, datetime] | None = None
    threshold: int | None = None
    keys: int | None = None
    text_digest: str | None = None


def _beside(policy_path: Path) -> _Documents:
    folder = policy_path.parent
    return _Documents(
        policy=ConsortiumPolicy.from_bytes(_read(policy_path)),
        members=Members.from_bytes(_read(folder / "members.json")),
        admins=Admins.from_bytes(_read(folder / "admins.json")),
        source=str(folder),
    )


def _from_repository(folder: Path, *, root: Path | None, now: datetime) -> _Documents:
    from infra.admin.proposals import read_base

    state = read_base(folder, now=now, root=_read(root) if root else None).state
    documents = state.documents
    for name in (POLICY_TARGET, MEMBERS, ADMINS):
        if name not in documents:
            raise NotFoundError(f"{folder} publishes no {name}")
    text = state.targets.get(TEXT_TARGET)
    return _Documents(
        policy=ConsortiumPolicy.from_bytes(documents[POLICY_TARGET]),
        members=state.members,
        admins=state.admins,
        source=f"{folder}, verified from {root or 'its own first root'}",
        overrides=tuple(
            Override.from_bytes(data)
            for path, data in sorted(documents.items())
            if path.startswith(OVERRIDE_PREFIX)
        ),
        expires=state.expires,
        threshold=state.charter.terms.threshold,
        keys=state.charter.terms.admins,
        text_digest=text.sha256 if text is not None else "",
    )


def check_text(
    path: Path, *, now: datetime, repository: Path | None = None, root: Path | None = None
) -> Checked:
    """Compare a charter with what is signed.

    Args:
        path: of the text; the files that it cites are relative to its folder.
        now: UTC.
        repository: a trust repository; None: the documents beside the policy that the text names.
        root: that the reader holds; None: the repository's own first, which anchors nothing.

    Raises:
        ConfigurationError, NotFoundError: a file is missing.
        MalformedMessageError: a document cannot be read.
        TrustRefusedError, ForgedError: the repository does not verify.
    """
    data = _read(path)
    charter = parse_charter(_text(data, path))
    base = path.resolve().parent
    if repository is not None:
        documents = _from_repository(repository, root=root, now=now)
    else:
        named = charter.front.get("policy")
        if not named:
            raise ConfigurationError(f"{path} names no policy in its header")
        documents = _beside(base / named)
    rules = read_rules(consortium_text(), prefix=CONSORTIUM, schema=schema_text(), what="rules")

    def exists(name: str, test: str) -> bool:
        found = base / name
        if name.startswith("/") or ".." in name.split("/") or not found.exists():
            return False
        return not test or f"def {test}(" in found.read_text("utf-8")

    signed = Signed(
        policy=documents.policy,
        members=documents.members,
        admins=documents.admins,
        cedar=frozenset(rule.id for rule in rules),
        rules=ALL,
        exists=exists,
        now=now,
        overrides=documents.overrides,
        expires=documents.expires or {},
        threshold=documents.threshold,
        keys=documents.keys,
        text_digest=documents.text_digest,
        own_digest=hashlib.sha256(data).hexdigest(),
    )
    translations = {
        other.name: parse_charter(_text(_read(other), other))
        for language in LANGUAGES
        if (other := path.with_suffix(f".{language}.md")).exists()
    }
    findings = check_charter(charter, signed, translations)
    return Checked(
        charter=charter,
        findings=tuple(findings),
        coverage=coverage(charter),
        policy=documents.policy,
        source=documents.source,
    )


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedMessageError(f"{path}: {error}") from None


def write_annexes(path: Path, *, now: datetime, repository: Path | None, root: Path | None) -> bool:
    """Write the generated annexes anew; whether anything changed."""
    text = _text(_read(path), path)
    base = path.resolve().parent
    if repository is not None:
        documents = _from_repository(repository, root=root, now=now)
    else:
        documents = _beside(base / parse_charter(text).front.get("policy", ""))
    new = with_annexes(text, documents.members, documents.policy)
    if new != text:
        path.write_text(new, "utf-8")
    return new != text
