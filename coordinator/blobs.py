"""Content-addressed files: snapshots, sums, plans, everything named by its units root.

    blobs/<first two hex digits>/<64 hex digits>          the bytes
    blobs/<first two hex digits>/<64 hex digits>.units    32 bytes per 4 MiB unit
    blobs/tmp/                                            what is being written

A blob appears under its name only when it is complete, hashed and durable; a crash leaves at most
a file under ``tmp``, which the next start removes. Writing the same bytes twice is harmless.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from protocols.errors import CorruptStateError, NotFoundError, StorageFullError
from protocols.identifiers import Digest, parse_digest
from protocols.tensors.behind import Behind
from protocols.tensors.sizes import UNIT
from protocols.tensors.units import UnitHasher, digest_of_units, unit_count

_HASH = 32


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a full disk into an error that the sender may retry after."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError(f"no room for {what}", retry_after_s=10.0) from None
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class BlobReader:
    """A complete blob on disk."""

    digest: Digest
    path: Path
    size: int  # bytes
    unit_hashes: tuple[bytes, ...]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes ``[offset, offset + length)``, fewer at the end."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


class BlobWriter:
    """Writes one blob; it exists only after ``finish``."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        handle, name = tempfile.mkstemp(dir=blobs.tmp)
        self._file: IO[bytes] = os.fdopen(handle, "wb", buffering=0)
        self._path = Path(name)
        self._hasher = UnitHasher()
        self._behind = Behind(lambda: os.fdatasync(self._file.fileno()))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append.

        Raises:
            StorageFullError: the disk is full.
        """
        view = memoryview(data).cast("B")
        units = self._hasher.size // UNIT
        self._hasher.update(view)
        with storage_errors("a blob"):
            while len(view):
                view = view[self._file.write(view) :]
        if self._hasher.size // UNIT > units:
            self._behind.more()

    def read(self, offset: int, length: int) -> bytes:
        """What was written, before it has a name. May be called from several threads."""
        return os.pread(self._file.fileno(), length, offset)

    def finish(self) -> Digest:
        """Make the blob durable under its name; the same bytes again are no error."""
        with storage_errors("a blob"):
            self._behind.finish()
        self._behind.close()
        self._file.close()
        digest = self._hasher.digest()
        self._blobs.adopt(self._path, digest, self._hasher.hashes())
        return digest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._behind.close()
        self._file.close()
        self._path.unlink(missing_ok=True)


class Blobs:
    """The folder of all blobs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tmp = root / "tmp"

    def prepare(self) -> None:
        """Make the folder and clear what an earlier process left unfinished."""
        self.tmp.mkdir(parents=True, exist_ok=True)
        for leftover in self.tmp.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def path(self, digest: Digest) -> Path:
        """Where a blob lies. The digest is checked: nothing else becomes part of a path."""
        return self.root / parse_digest(digest)[:2] / digest

    def has(self, digest: Digest) -> bool:
        """Whether the blob is here, complete."""
        return self.path(digest).is_file() and self._units_path(digest).is_file()

    def open(self, digest: Digest) -> BlobReader:
        """Find a blob.

        Raises:
            NotFoundError: it is not here.
            CorruptStateError: its unit hashes do not fit its name or size.
        """
        path = self.path(digest)
        try:
            packed = self._units_path(digest).read_bytes()
            size = path.stat().st_size
        except FileNotFoundError:
            raise NotFoundError(f"blob {digest[:12]}… is not here") from None
        hashes = tuple(packed[i : i + _HASH] for i in range(0, len(packed), _HASH))
        if len(hashes) != unit_count(size) or digest_of_units(hashes) != digest:
            raise CorruptStateError(f"blob {digest[:12]}… does not fit its unit hashes")
        return BlobReader(digest, path, size, hashes)

    def read_all(self, digest: Digest, *, limit: int = UNIT) -> bytes:
        """A small blob, verified.

        Raises:
            NotFoundError, CorruptStateError: see ``open``; also if the bytes are not the name's.
        """
        reader = self.open(digest)
        if reader.size > limit:
            raise CorruptStateError(f"blob {digest[:12]}… has {reader.size} bytes, not a document")
        data = reader.path.read_bytes()
        hasher = UnitHasher()
        hasher.update(data)
        if hasher.digest() != digest:
            raise CorruptStateError(f"blob {digest[:12]}… was changed on disk")
        return data

    def writer(self) -> BlobWriter:
        """Begin a blob."""
        return BlobWriter(self)

    def put_bytes(self, data: bytes) -> Digest:
        """Store a small blob."""
        with self.writer() as writer:
            writer.write(data)
            return writer.finish()

    def adopt(self, source: Path, digest: Digest, unit_hashes: tuple[bytes, ...]) -> None:
        """Give a durable file on the same file system its name; ``source`` is gone afterwards."""
        target = self.path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage_errors("a blob"):
            # The unit hashes first: a blob with its name is a blob with its hashes.
            handle, name = tempfile.mkstemp(dir=self.tmp)
            with os.fdopen(handle, "wb") as file:
                file.write(b"".join(unit_hashes))
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._units_path(digest))
            source.replace(target)
            sync_folder(target.parent)

    def remove(self, digest: Digest) -> None:
        """Delete a blob whose retention ended."""
        with suppress(FileNotFoundError):
            self.path(digest).unlink()
        with suppress(FileNotFoundError):
            self._units_path(digest).unlink()

    def _units_path(self, digest: Digest) -> Path:
        return self.path(digest).with_name(f"{digest}.units")
