"""From a folder on disk to an audit: the one way in which every command reads a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from infra.audit.blobs import BlobFolder
from infra.audit.folder import POLICY, read_bounded, read_log, read_trust_policy
from policies.audit.verify import Audit, audit
from protocols.canonical import sha256_hex
from protocols.errors import (
    ConfigurationError,
    IntegrityError,
    MalformedMessageError,
    NotFoundError,
)
from protocols.identifiers import Digest, parse_digest
from protocols.tlog.cosignature import open_checkpoint
from protocols.tlog.note import MAX_NOTE
from protocols.tlog.trust_policy import TrustPolicy

if TYPE_CHECKING:
    from policies.audit.tree import LogFiles

MAX_DOCUMENT: Final = 64 * 2**20  # bytes


class AuditFailedError(IntegrityError):
    """A log does not hold; the sentence names the first bad place."""

    code = "audit_failed"
    advice = "Keep the copy as it is: it is the evidence. `--json` lists everything that was found."


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things are; what is not given is looked for where a federation keeps it."""

    log: Path
    trust_policy: Path | None = None  # None: the one beside the log, which anchors nothing
    root: Path | None = None  # root.1.json from a safe place
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


def document(log: Path, digest: Digest) -> bytes | None:
    """A document beside the log, by its SHA-256; None where it is not here or is another one."""
    try:
        data = read_bounded(log / "blobs" / "sha256" / parse_digest(digest), MAX_DOCUMENT)
    except (NotFoundError, MalformedMessageError):
        return None
    return data if sha256_hex(data) == digest else None


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
    blobs = places.blob_folder

    def blob(digest: Digest) -> bytes | None:
        found = blobs.small(digest) if blobs is not None else None
        return found if found is not None else _mirrored(places.log, digest)

    found = audit(
        files,
        policy,
        now=now,
        anchored=places.anchored,
        documents=lambda digest: document(places.log, digest),
        blobs=blob,
    )
    return Loaded(places=places, files=files, policy=policy, audit=found)


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
