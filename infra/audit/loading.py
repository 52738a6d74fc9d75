"""From a folder on disk to an audit: the one way in which every command reads a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from infra.audit.blobs import BlobFolder
from infra.audit.folder import POLICY, read_bounded, read_log, read_trust_policy
from policies.audit.verify import Audit, audit
from protocols.canonical import parse_canonical, sha256_hex
from protocols.errors import (
    ConfigurationError,
    IntegrityError,
    MalformedMessageError,
    NotFoundError,
)
from protocols.identifiers import Digest, parse_digest
from protocols.tlog.cosignature import open_checkpoint
from protocols.tlog.kinds import Genesis, predicate_of
from protocols.tlog.leaf import Statement
from protocols.tlog.note import MAX_NOTE
from protocols.tlog.text import decode_base64
from protocols.tlog.trust_policy import TrustPolicy

if TYPE_CHECKING:
    from policies.audit.tree import LogFiles

MAX_DOCUMENT: Final = 64 * 2**20  # bytes
MAX_FILES: Final = 100_000  # of a trust repository


class AuditFailedError(IntegrityError):
    """A log does not hold; the sentence names the first bad place."""

    code = "audit_failed"
    advice = "Keep the copy as it is: it is the evidence. `--json` lists everything that was found."


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things are; what is not given is looked for where a federation keeps it."""

    log: Path
    trust_policy: Path | None = None  # None: the one beside the log, which anchors nothing
    root: Path | None = None  # 1.root.json from a safe place; None: the one in the repository
    trust: Path | None = None  # the trust repository
    blobs: Path | None = None
    uploads: Path | None = None
    seen: Path | None = None  # a checkpoint that the auditor has from elsewhere

    @property
    def policy_file(self) -> Path:
        """The trust policy that is used."""
        return self.trust_policy or self.log / POLICY

    @property
    def anchored(self) -> bool:
        """Whether it came from outside the log's own folder."""
        if self.trust_policy is None:
            return False
        return not self.trust_policy.resolve().is_relative_to(self.log.resolve())

    @property
    def blob_folder(self) -> BlobFolder | None:
        """Sums, transcripts and models, where they are at hand."""
        found = self.blobs or self.log.parent / "blobs"
        if self.blobs is not None and not found.is_dir():
            raise ConfigurationError(f"{found} is no folder of blobs")
        return BlobFolder(found) if found.is_dir() else None

    @property
    def trust_folder(self) -> Path | None:
        """The signed policy's repository, where it is at hand."""
        found = self.trust or self.log.parent / "tuf"
        if self.trust is not None and not found.is_dir():
            raise ConfigurationError(f"{found} is no trust repository")
        return found if found.is_dir() else None

    @property
    def upload_folder(self) -> Path | None:
        """Masked vectors, where they are at hand."""
        found = self.uploads or self.log.parent / "coordinator" / "spool"
        if self.uploads is not None and not found.is_dir():
            raise ConfigurationError(f"{found} is no folder of uploads")
        return found if found.is_dir() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A log that was read and audited."""

    places: Places
    files: LogFiles
    policy: TrustPolicy
    audit: Audit


class DocumentFolder:
    """Documents by SHA-256: beside the log, and the files of the trust repository."""

    def __init__(self, log: Path, trust: Path | None) -> None:
        self._folder = log / "blobs" / "sha256"
        self._trust = trust
        self._index: dict[str, Path] | None = None

    def get(self, digest: Digest) -> bytes | None:
        """A document; None where it is not here or is another one."""
        for path in (self._folder / parse_digest(digest), self._published().get(digest)):
            try:
                data = read_bounded(path, MAX_DOCUMENT) if path is not None else b""
            except (NotFoundError, MalformedMessageError):
                continue
            if path is not None and sha256_hex(data) == digest:
                return data
        return None

    def _published(self) -> dict[str, Path]:
        """Files of the trust repository by SHA-256; hashed once, and again when they are read."""
        if self._index is None:
            self._index = {}
            files = sorted(self._trust.rglob("*")) if self._trust is not None else []
            for path in files[:MAX_FILES]:
                try:
                    self._index[sha256_hex(read_bounded(path, MAX_DOCUMENT))] = path
                except (NotFoundError, MalformedMessageError):
                    continue
        return self._index


def load(places: Places, *, now: int | None = None) -> Loaded:
    """Read and audit a log.

    Raises:
        NotFoundError: no log there, or no trust policy.
        MalformedMessageError: the trust policy cannot be read.
    """
    now = int(time.time()) if now is None else now
    files = read_log(places.log)
    policy = read_trust_policy(places.policy_file)
    if places.seen is not None:
        files = _with_seen(files, read_bounded(places.seen, MAX_NOTE), policy, now)
    blobs, documents = places.blob_folder, DocumentFolder(places.log, places.trust_folder)

    def blob(digest: Digest) -> bytes | None:
        found = blobs.small(digest) if blobs is not None else None
        return found if found is not None else _mirrored(places.log, digest)

    found = audit(
        files,
        policy,
        now=now,
        anchored=places.anchored,
        documents=documents.get,
        blobs=blob,
        root=_first_root(places, files, documents),
    )
    return Loaded(places=places, files=files, policy=policy, audit=found)


def _first_root(places: Places, files: LogFiles, documents: DocumentFolder) -> bytes | None:
    """The root that the auditor gave; else the one that the log's first leaf or the repository has.

    The latter show that policy, log and repository agree, and nothing about who the admins are.
    """
    if places.root is not None:
        return read_bounded(places.root, MAX_DOCUMENT)
    named = _named_root(files.entries[0]) if files.entries else None
    found = documents.get(named) if named is not None else None
    if found is not None:
        return found
    trust = places.trust_folder
    path = trust / "metadata" / "1.root.json" if trust is not None else None
    return read_bounded(path, MAX_DOCUMENT) if path is not None and path.is_file() else None


def _named_root(entry: bytes) -> Digest | None:
    """The root that a log's first leaf names; unverified, the leaf is checked later."""
    try:
        payload = decode_base64(parse_canonical(entry)["payload"], "the payload")
        said = predicate_of(Statement.parse(payload))
    except (MalformedMessageError, KeyError, TypeError):
        return None
    root = said.tuf_root_sha256 if isinstance(said, Genesis) else None
    return None if root is None else Digest(root)


def _mirrored(log: Path, digest: Digest) -> bytes | None:
    """A blob that was copied with the log."""
    return BlobFolder(log / "blobs").small(digest)


def _with_seen(files: LogFiles, seen: bytes, policy: TrustPolicy, now: int) -> LogFiles:
    """The log must begin with a tree that the auditor knows from elsewhere.

    Raises:
        MalformedMessageError, BadSignatureError: that is no checkpoint of this log.
    """
    from dataclasses import replace

    size = open_checkpoint(seen, policy.ring, now=now).checkpoint.size
    return replace(files, archive={**files.archive, size: seen})
