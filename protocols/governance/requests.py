"""What admins sign offline, and what they send back.

    minga.signing-request/1   the repository as it is, the candidate files, and nothing secret
    minga.signatures/1        {"keyid", "sig"} for each candidate file, bound to one request

A request carries the whole present repository, so an admin without a network verifies it from the
root they hold before they read what is to change: the words that they read are computed on their
own machine. Putting signatures together and checking them needs no key.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from securesystemslib.signer import Signature, Signer
from tuf.api.metadata import Metadata, Root, Targets

from protocols.canonical import canonical_bytes, parse_json, sha256_hex
from protocols.errors import MalformedMessageError
from protocols.governance import roles
from protocols.governance.building import serialize
from protocols.governance.documents import Document, TimeText, parse_time, time_text
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import (
    MemoryFiles,
    TrustState,
    parse_metadata,
    verify_repository,
)
from protocols.governance.signers import Charter, Quorum, quorum, read_charter
from protocols.identifiers import Digest, FederationId

CANDIDATE_DAYS: Final = 14
MAX_REQUEST: Final = 64 * 2**20  # bytes
_NAME: Final = r"^(metadata|targets)/[A-Za-z0-9][A-Za-z0-9._/-]{0,200}$"

Base64 = Annotated[str, Field(max_length=12 * 2**20)]
FileName = Annotated[str, Field(pattern=_NAME)]


def _decode(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedMessageError("a file of the request is damaged") from None


class SigningRequest(Document):
    """A candidate, and what it is to replace."""

    schema_: Literal["minga.signing-request/1"] = Field(
        default="minga.signing-request/1", alias="schema"
    )
    federation: str
    title: str = Field(max_length=200)
    created: TimeText
    expires: TimeText
    base: dict[FileName, Base64] = Field(max_length=20_000)  # the repository; empty: the founding
    files: dict[FileName, Base64] = Field(min_length=1, max_length=2000)

    @property
    def digest(self) -> Digest:
        """What signatures name."""
        return sha256_hex(self.to_bytes())

    @classmethod
    def read(cls, data: bytes) -> SigningRequest:
        """Read a request. Raises: MalformedMessageError."""
        request = cls.from_value(parse_json(data, limit=MAX_REQUEST))
        for name in (*request.base, *request.files):
            if ".." in name or "//" in name:
                raise MalformedMessageError(f"{name!r:.100} is no file of a repository")
        return request

    def base_files(self) -> dict[str, bytes]:
        """The repository that is to change."""
        return {name: _decode(text) for name, text in self.base.items()}

    def candidate_files(self) -> dict[str, bytes]:
        """What is new, metadata without signatures."""
        return {name: _decode(text) for name, text in self.files.items()}


class Signatures(Document):
    """One person's signatures on a request."""

    schema_: Literal["minga.signatures/1"] = Field(default="minga.signatures/1", alias="schema")
    request: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    keyid: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    signatures: dict[FileName, Annotated[str, Field(pattern=r"^[0-9a-f]{64,2048}$")]] = Field(
        min_length=1, max_length=2000
    )


def make_request(
    *,
    federation: FederationId,
    title: str,
    base: Mapping[str, bytes],
    candidates: Mapping[str, Metadata[Any]],
    targets: Mapping[str, bytes],
    now: datetime,
) -> SigningRequest:
    """Put a request together.

    Args:
        federation: whose.
        title: what it is for, a few words.
        base: the present repository by file name; empty for the founding.
        candidates: metadata of new versions by role, without signatures.
        targets: new documents by file name (``targets/…``).
        now: UTC.
    """
    files = {name: b64encode(data).decode() for name, data in targets.items()}
    for role, made in candidates.items():
        files[f"metadata/{made.signed.version}.{role}.json"] = b64encode(serialize(made)).decode()
    return SigningRequest(
        federation=federation,
        title=title,
        created=time_text(now),
        expires=time_text(now + timedelta(days=CANDIDATE_DAYS)),
        base={name: b64encode(data).decode() for name, data in sorted(base.items())},
        files=files,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One metadata file of a request."""

    name: str
    role: str
    metadata: Metadata[Any]

    @property
    def version(self) -> int:
        """Of the candidate."""
        version: int = self.metadata.signed.version
        return version


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A request that was read and whose base was verified."""

    request: SigningRequest
    before: TrustState | None
    after_charter: Charter
    candidates: tuple[Candidate, ...]
    base: Mapping[str, bytes] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)

    def delegators(self, role: str) -> list[tuple[Root | Targets, Charter]]:
        """Who names the keys of a role: of the root, the old and the new one."""
        found = {item.role: item.metadata.signed for item in self.candidates}
        if role in (roles.ROOT, roles.TARGETS):
            new = found.get(roles.ROOT)
            result: list[tuple[Root | Targets, Charter]] = []
            if self.before is not None and (role == roles.ROOT or new is None):
                old = parse_metadata(self.before.metadata[roles.ROOT], Root).signed
                result.append((old, self.before.charter))
            if new is not None:
                result.append((new, self.after_charter))
            return result
        delegator = found.get(roles.TARGETS)
        if delegator is None:
            if self.before is None:
                raise TrustRefusedError("the founding has no targets", rule="trust.shape")
            delegator = parse_metadata(self.before.metadata[roles.TARGETS], Targets).signed
        return [(delegator, self.after_charter)]


def open_request(request: SigningRequest, *, trusted_root: bytes | None, now: datetime) -> Opened:
    """Verify what a request says is there now, and read what is to come.

    Args:
        request: as it was read.
        trusted_root: the root that the reader holds; None: the request's own first root, which
            proves nothing about who made the request.
        now: UTC.

    Raises:
        TrustRefusedError: trust.expired, trust.rollback, or what ``verify_repository`` finds.
        MalformedMessageError: a candidate cannot be read.
    """
    if now >= parse_time(request.expires):
        raise TrustRefusedError(
            f"the request expired at {request.expires}: propose it again", rule="trust.expired"
        )
    base, files = request.base_files(), request.candidate_files()
    before: TrustState | None = None
    if base:
        first = trusted_root or base.get("metadata/1.root.json")
        if first is None:
            raise TrustRefusedError("the request brings no root", rule="trust.shape")
        before = verify_repository(MemoryFiles(base), trusted_root=first, now=now, offline=True)
    candidates = []
    for name, data in sorted(files.items()):
        folder, _, rest = name.partition("/")
        if folder != "metadata":
            continue
        version, _, role = rest.removesuffix(".json").partition(".")
        kind: type[Any] = Root if role == roles.ROOT else Targets
        if role in roles.ONLINE:
            raise TrustRefusedError("admins do not sign snapshots", rule="trust.shape")
        metadata = parse_metadata(data, kind)
        known = before.versions.get(role, 0) if before else 0
        if str(metadata.signed.version) != version or metadata.signed.version != known + 1:
            raise TrustRefusedError(
                f"{role} {metadata.signed.version} does not follow {role} {known}: "
                "propose it again from the present repository",
                rule="trust.rollback",
            )
        candidates.append(Candidate(name=name, role=role, metadata=metadata))
    roots = [item for item in candidates if item.role == roles.ROOT]
    if before is None and not roots:
        raise TrustRefusedError("the founding has no root", rule="trust.shape")
    charter = read_charter(roots[0].metadata.signed) if roots else (before or _absent()).charter
    return Opened(
        request=request,
        before=before,
        after_charter=charter,
        candidates=tuple(candidates),
        base=base,
        files=files,
    )


def _absent() -> TrustState:
    raise AssertionError("checked before")


def sign_request(opened: Opened, signer: Signer) -> Signatures:
    """Sign every candidate that this key may sign.

    Raises:
        TrustRefusedError: trust.quorum: the key signs none of them.
    """
    keyid = signer.public_key.keyid
    made: dict[str, str] = {}
    for item in opened.candidates:
        mine = any(
            keyid in delegator.get_delegated_role(item.role).keyids
            for delegator, _ in opened.delegators(item.role)
        )
        if mine:
            made[item.name] = signer.sign(item.metadata.signed_bytes).signature
    if not made:
        raise TrustRefusedError(
            f"the key {keyid[:12]}… may sign nothing of this request", rule="trust.quorum"
        )
    return Signatures(request=opened.request.digest, keyid=keyid, signatures=made)


def add_signatures(opened: Opened, collected: Iterable[Signatures]) -> list[Candidate]:
    """The candidates with the signatures that were collected; they are not counted yet.

    Raises:
        TrustRefusedError: trust.quorum: signatures are for another request.
    """
    for item in opened.candidates:
        item.metadata.signatures.clear()
    for signed in collected:
        if signed.request != opened.request.digest:
            raise TrustRefusedError(
                f"the signatures of {signed.keyid[:12]}… are for another request",
                rule="trust.quorum",
            )
        for item in opened.candidates:
            if item.name in signed.signatures:
                item.metadata.signatures[signed.keyid] = Signature(
                    signed.keyid, signed.signatures[item.name]
                )
    return list(opened.candidates)


def tally(opened: Opened, candidates: Iterable[Candidate]) -> list[Quorum]:
    """Who has signed each candidate and who still must, by the old and the new root."""
    return [
        quorum(delegator, item.role, item.metadata, charter)
        for item in candidates
        for delegator, charter in opened.delegators(item.role)
    ]


def canonical_request(request: SigningRequest) -> bytes:
    """The bytes of a request file."""
    return canonical_bytes(request.model_dump(mode="json", by_alias=True))
