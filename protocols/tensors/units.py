"""Names of bulk data: the Merkle root over units of 4 MiB.

Every blob (a packed vector, a sum, theta, a document) is named by this root in hexadecimal. A unit
is hashed as an RFC 6962 leaf, SHA-256(0x00 || bytes); the last unit may be short; an empty blob has
no units and is named by SHA-256(""). A receiver can check and acknowledge unit by unit, and a
blob of at most 4 MiB is named by one hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from protocols.identifiers import Digest
from protocols.tensors.ordered import ordered_map
from protocols.tensors.sizes import UNIT
from protocols.tlog.merkle import leaf_hash, tree_root

Bytes = bytes | bytearray | memoryview


def root_of_units(hashes: Sequence[bytes]) -> bytes:
    """Root over unit hashes, 32 bytes."""
    return tree_root(hashes)


def digest_of_units(hashes: Sequence[bytes]) -> Digest:
    """Name of the blob that has these unit hashes."""
    return Digest(tree_root(hashes).hex())


def unit_count(size: int) -> int:
    """Units of a blob of ``size`` bytes."""
    return -(-size // UNIT)


class UnitHasher:
    """Hashes a blob that arrives piece by piece; pieces may be of any size."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._open = hashlib.sha256(b"\x00")
        self._filled = 0  # bytes in the open unit
        self.size = 0  # bytes so far

    def update(self, data: Bytes) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        while len(view):
            part = view[: UNIT - self._filled]
            self._open.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == UNIT:
                self._done.append(self._open.digest())
                self._open = hashlib.sha256(b"\x00")
                self._filled = 0

    def hashes(self) -> tuple[bytes, ...]:
        """Hashes of the units so far; a unit that is not full yet counts as the last."""
        return (*self._done, self._open.digest()) if self._filled else tuple(self._done)

    def root(self) -> bytes:
        """Root over the units so far, 32 bytes."""
        return tree_root(self.hashes())

    def digest(self) -> Digest:
        """Name of the blob so far."""
        return Digest(self.root().hex())


def unit_hashes(data: Bytes, *, threads: int = 1) -> tuple[bytes, ...]:
    """Unit hashes of a blob in memory or in a mapped file; the same for any ``threads``."""
    view = memoryview(data).cast("B")

    def work(index: int, _: None) -> bytes:
        return leaf_hash(view[index * UNIT : (index + 1) * UNIT])

    return tuple(ordered_map(work, unit_count(len(view)), lambda: None, threads=threads))


def blob_digest(data: Bytes) -> Digest:
    """Name of a blob in memory."""
    return digest_of_units(unit_hashes(data))
