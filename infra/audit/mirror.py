"""An incremental copy of a log over plain HTTP: fetched in bounds, verified, then kept.

    1. The checkpoint there is accepted under the trust policy.
    2. It is not smaller than the copy's, and not another one of the same size.
    3. Missing bundles and tiles are fetched; what an interrupted copy left is used again.
    4. The entries have the root of the new checkpoint, and of every checkpoint kept before: the log
       there is an extension of the copy.
    5. The old checkpoint goes to ``checkpoints/``, the new one takes its place. Last of all.

HTTP needs no protection here: nothing is believed that is not signed or hashed. A copy that is
refused leaves the last good one as it was; the refused checkpoint is kept under ``refused/``.
"""

from __future__ import annotations

import base64
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from infra.audit.folder import (
    CHECKPOINT,
    MAX_BUNDLE,
    MAX_TILE,
    POLICY,
    read_bounded,
    read_log,
    read_trust_policy,
    stated_size,
)
from policies.audit.tree import check_tree
from protocols.canonical import parse_json, sha256_hex
from protocols.errors import (
    ConfigurationError,
    DigestMismatchError,
    IntegrityError,
    MalformedMessageError,
    NotFoundError,
    UnreachableError,
)
from protocols.governance.repository import target_name
from protocols.identifiers import Digest, parse_digest
from protocols.tlog.kinds import TufPublished, predicate_of
from protocols.tlog.leaf import Statement
from protocols.tlog.note import MAX_NOTE
from protocols.tlog.tiles import Tile, parse_bundle, parse_tile, tiles_between
from protocols.tlog.trust_policy import MAX_POLICY, TrustPolicy, accept_checkpoint

TIMEOUT_S: Final = 30.0
MAX_GROWTH: Final = 5_000_000  # leaves in one copy: more is refused, the disk is not theirs to fill
MAX_BLOB: Final = 64 * 2**20  # bytes of one document beside the log
MAX_VKEY: Final = 1000  # bytes

Say = Callable[[str], None]


class ShrunkError(IntegrityError):
    """The log there is smaller than, or differs from, what was copied before."""

    code = "log_shrunk"
    advice = "Keep this copy and the checkpoint under refused/: together they are evidence."


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy did."""

    origin: str
    before: int  # leaves that were here
    size: int  # leaves that are here now
    fetched: int  # files
    bytes: int
    anchored: bool  # the trust policy came from elsewhere

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Source:
    """A log behind a URL; counts what it fetched."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        if urlsplit(url).scheme not in {"http", "https"}:
            raise ConfigurationError(f"{url!r:.200} is not an http or https URL")
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self.files = 0
        self.bytes = 0

    def get(self, path: str, limit: int) -> bytes:
        """A file of at most ``limit`` bytes.

        Raises:
            NotFoundError: it is not there.
            MalformedMessageError: it is larger.
            UnreachableError: no answer, or not now.
        """
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            f"{self._url}/{path}",
            headers={"Cache-Control": "no-cache", "User-Agent": "minga-audit"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # noqa: S310
                data: bytes = answer.read(limit + 1)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (404, 410):
                    raise NotFoundError(f"{self._url}/{path} is not there") from None
                raise UnreachableError(f"{self._url}/{path}: status {error.code}") from None
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            raise UnreachableError(f"{self._url} does not answer: {reason}") from None
        if len(data) > limit:
            raise MalformedMessageError(f"{self._url}/{path} has more than {limit} bytes")
        self.files += 1
        self.bytes += len(data)
        return data


def write_file(path: Path, data: bytes) -> None:
    """Atomic and durable: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.new")
    with work.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)


def mirror(
    source: Source, folder: Path, *, trust_policy: Path | None, say: Say, now: int | None = None
) -> Copied:
    """Bring the copy in ``folder`` up to date.

    Args:
        trust_policy: from another place than the log; None: the copy's, or the first time the one
            that the log offers, which shows nothing about who the log is.

    Raises:
        UnreachableError, NotFoundError: try again; what was fetched is used.
        IntegrityError: the log there is not one that extends the copy.
        MalformedMessageError: a file there is none of a log.
    """
    now = int(time.time()) if now is None else now
    policy = _policy(source, folder, trust_policy)
    data = source.get(CHECKPOINT, MAX_NOTE)
    accepted = accept_checkpoint(policy, data, now=now)
    head = accepted.opened.checkpoint
    old = _kept(folder)
    before = stated_size(old) or 0 if old is not None else 0
    if head.size < before:
        _refuse(folder, data)
        raise ShrunkError(f"the log there has {head.size} leaves, the copy has {before}")
    if head.size - before > MAX_GROWTH:
        raise MalformedMessageError(f"the log grew by {head.size - before} leaves at once")
    if old is not None and before:
        write_file(folder / "checkpoints" / str(before), old)
    tiles = list(tiles_between(before, head.size))
    for number, tile in enumerate(tiles, 1):
        _fetch_tile(source, folder, tile)
        if number % 50 == 0 or number == len(tiles):
            say(f"{number} of {len(tiles)} files of leaves {before} to {head.size}")
    _check(folder, data, policy, now)
    _fetch_vkey(source, folder)
    write_file(folder / CHECKPOINT, data)
    return Copied(
        origin=head.origin,
        before=before,
        size=head.size,
        fetched=source.files,
        bytes=source.bytes,
        anchored=trust_policy is not None,
    )


def _policy(source: Source, folder: Path, given: Path | None) -> TrustPolicy:
    if given is not None:
        policy = read_trust_policy(given)
        write_file(folder / POLICY, read_bounded(given, MAX_POLICY))
        return policy
    if not (folder / POLICY).exists():
        data = source.get(POLICY, MAX_POLICY)
        TrustPolicy.parse(data)
        write_file(folder / POLICY, data)
    return read_trust_policy(folder / POLICY)


def _kept(folder: Path) -> bytes | None:
    try:
        return read_bounded(folder / CHECKPOINT, MAX_NOTE)
    except NotFoundError:
        return None


def _refuse(folder: Path, checkpoint: bytes) -> None:
    """Keep a checkpoint that contradicts the copy: two signed heads are evidence."""
    name = f"{stated_size(checkpoint)}-{int(time.time())}"
    write_file(folder / "refused" / name, checkpoint)


def _fetch_tile(source: Source, folder: Path, tile: Tile) -> None:
    path = folder / tile.path
    if path.exists() and _is_tile(path, tile):
        return  # from a copy that was interrupted; its content is checked with all the others
    limit = MAX_BUNDLE if tile.level is None else MAX_TILE
    data = source.get(tile.path, limit)
    if tile.level is None:
        parse_bundle(data, tile.width)
    else:
        parse_tile(data, tile.width)
    write_file(path, data)


def _is_tile(path: Path, tile: Tile) -> bool:
    try:
        if tile.level is None:
            parse_bundle(read_bounded(path, MAX_BUNDLE), tile.width)
        else:
            parse_tile(read_bounded(path, MAX_TILE), tile.width)
    except (NotFoundError, MalformedMessageError):
        return False
    return True


def _check(folder: Path, checkpoint: bytes, policy: TrustPolicy, now: int) -> None:
    """The entries that are here now have the new root and all the old ones."""
    files = read_log(folder, checkpoint=checkpoint)
    faults = check_tree(files, policy, now=now).faults
    if not faults:
        return
    _refuse(folder, checkpoint)
    # What was fetched for it is worth nothing; what the last good checkpoint covers stays.
    size = stated_size(checkpoint) or 0
    kept = _kept(folder)
    for tile in tiles_between(stated_size(kept) or 0 if kept else 0, size):
        (folder / tile.path).unlink(missing_ok=True)
    raise ShrunkError(f"the log there does not extend the copy: {faults[0].reason}")


def _fetch_vkey(source: Source, folder: Path) -> None:
    """For foreign tools; nothing here reads it."""
    if not (folder / "log.vkey").exists():
        try:
            write_file(folder / "log.vkey", source.get("log.vkey", MAX_VKEY))
        except NotFoundError:
            return


def mirror_documents(source: Source, folder: Path) -> int:
    """Copy the documents that leaves name, ``blobs/sha256/<hex>``; how many are here afterwards.

    Which digests name documents is not asked: every SHA-256 that stands in a leaf is tried, and a
    log need not have it.

    Raises:
        DigestMismatchError: what is served is not what the name says.
    """
    wanted: set[str] = set()
    for entry in read_log(folder).entries:
        wanted |= set(_SHA256.findall(_payload(entry)))
    return sum(
        _fetch_document(source, folder, f"blobs/sha256/{digest}", Digest(digest))
        for digest in sorted(wanted)
    )


def mirror_trust(source: Source, folder: Path) -> int:
    """Copy what the admins signed, as documents beside the log; how many are here afterwards.

    Every published metadata file is named by a leaf with its digest, and names its documents with
    theirs, so the repository is not believed: a file is what a leaf says, or is not taken.

    Raises:
        DigestMismatchError: a file there is another one than was published.
    """
    here = 0
    for entry in read_log(folder).entries:
        said = published_of(entry)
        if said is None:
            continue
        path = f"metadata/{said.version}.{said.role}.json"
        here += _fetch_document(source, folder, path, Digest(said.sha256))
        data = _kept_document(folder, Digest(said.sha256))
        for name, digest in _targets(data).items():
            here += _fetch_document(source, folder, target_name(name, digest), digest)
    return here


def published_of(entry: bytes) -> TufPublished | None:
    """What a leaf says was published; None where it says something else."""
    try:
        said = predicate_of(Statement.parse(_payload(entry).encode()))
    except MalformedMessageError:
        return None
    return said if isinstance(said, TufPublished) else None


def _targets(data: bytes | None) -> dict[str, Digest]:
    """Paths and digests of the documents that a metadata file lists."""
    try:
        listed = parse_json(data or b"{}")["signed"]["targets"]
        return {
            path: parse_digest(target["hashes"]["sha256"])
            for path, target in listed.items()
            if _TARGET.fullmatch(path)
        }
    except (MalformedMessageError, KeyError, TypeError, AttributeError):
        return {}


_TARGET = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+){0,2}/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r'sha256"?:"([0-9a-f]{64})"')


def _payload(entry: bytes) -> str:
    try:
        return base64.b64decode(parse_json(entry)["payload"]).decode()
    except (MalformedMessageError, ValueError, KeyError, TypeError):
        return ""


def _kept_document(folder: Path, digest: Digest) -> bytes | None:
    path = folder / "blobs" / "sha256" / digest
    return read_bounded(path, MAX_BLOB) if path.exists() else None


def _fetch_document(source: Source, folder: Path, name: str, digest: Digest) -> bool:
    path = folder / "blobs" / "sha256" / parse_digest(digest)
    if path.exists():
        return True
    try:
        data = source.get(name, MAX_BLOB)
    except (NotFoundError, MalformedMessageError):
        return False
    if sha256_hex(data) != digest:
        raise DigestMismatchError(f"{name} there is another document than was published")
    write_file(path, data)
    return True
