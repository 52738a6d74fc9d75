"""Content-addressed files beside the log, read for an audit: nothing is used before it was hashed.

BLOBS/<first two digits>/<digest>            sums, models, transcripts, by the root of their units
UPLOADS/<run>/<round>.<attempt>.<node>.vector   masked vectors, until their retention ends
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from protocols.errors import DigestMismatchError, MalformedMessageError, NotFoundError
from protocols.identifiers import Digest, NodeId, RoundId, parse_digest
from protocols.tensors.planar import Reader
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import UnitHasher

MAX_SMALL: Final = 64 * 2**20  # bytes of a document that is read whole
_MAX_SNAPSHOT: Final = 64 * 1024  # bytes
_PIECE: Final = 4 * 2**20


class BlobFolder:
    """Files named by the root of their 4 MiB units; each is hashed once, when it is first used."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checked: set[Path] = set()

    def path(self, digest: Digest) -> Path:
        """Where the blob lies."""
        return self._root / parse_digest(digest)[:2] / digest

    def small(self, digest: Digest) -> bytes | None:
        """A document; None where it is not here, is too large, or is another one."""
        path = self.path(digest)
        try:
            if path.stat().st_size > MAX_SMALL:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        hasher = UnitHasher()
        hasher.update(data)
        return data if hasher.digest() == digest else None

    def document(self, digest: Digest) -> bytes:
        """A document.

        Raises:
            NotFoundError: it is not here.
            DigestMismatchError: what lies here is another one.
        """
        self.check(self.path(digest), digest)
        data = self.small(digest)
        if data is None:
            raise MalformedMessageError(f"blob {digest[:12]}… is too large for a document")
        return data

    def check(self, path: Path, digest: Digest) -> None:
        """Hash a file.

        Raises:
            NotFoundError: it is not here.
            DigestMismatchError: it does not have this digest.
        """
        if path in self._checked:
            return
        hasher = UnitHasher()
        try:
            with path.open("rb", buffering=0) as file:
                while piece := file.read(_PIECE):
                    hasher.update(piece)
        except OSError:
            raise NotFoundError(f"{path.name:.80} is not here") from None
        if hasher.digest() != digest:
            raise DigestMismatchError(
                f"{path.name:.80} is not what its digest says: it was changed"
            )
        self._checked.add(path)

    def open(self, path: Path, digest: Digest, stack: ExitStack) -> Reader:
        """``read(offset, length)`` of a file that was hashed before the first byte is used.

        Raises:
            NotFoundError, DigestMismatchError: see ``check``.
        """
        self.check(path, digest)
        file = stack.enter_context(path.open("rb", buffering=0))
        descriptor = file.fileno()
        return lambda offset, length: os.pread(descriptor, length, offset)

    def snapshots(self) -> dict[Digest, Snapshot]:
        """Every snapshot document here, by model root."""
        found: dict[Digest, Snapshot] = {}
        for path in sorted(self._root.glob("[0-9a-f][0-9a-f]/*")):
            if path.suffix or path.stat().st_size > _MAX_SNAPSHOT:
                continue
            try:
                snapshot = Snapshot.from_bytes(path.read_bytes())
            except MalformedMessageError:
                continue
            found[snapshot.model_root] = snapshot
        return found


def upload_file(folder: Path, round_: RoundId, attempt: int, node: NodeId) -> Path:
    """Where a coordinator keeps a vector until its retention ends."""
    return folder / round_.run / f"{round_.number}.{attempt}.{node}.vector"
