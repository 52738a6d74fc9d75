"""A tree that grows, with every complete subtree at hand: what a log makes its proofs from.

Hashes are kept as bytes in one array for each level: 64 bytes for a leaf in all.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocols.tlog.merkle import node_hash
from protocols.tlog.proofs import root_of
from protocols.tlog.text import HASH_BYTES


class GrowingTree:
    """The hashes of a log. ``hashes`` is what provers and tile writers ask for."""

    def __init__(self) -> None:
        self._levels: list[bytearray] = [bytearray()]

    @property
    def size(self) -> int:
        """Leaves."""
        return len(self._levels[0]) // HASH_BYTES

    def extend(self, leaf_hashes: Iterable[bytes]) -> None:
        """Append leaf hashes, 32 bytes each."""
        for leaf in leaf_hashes:
            self._levels[0] += leaf
            level = 0
            while len(self._levels[level]) // HASH_BYTES % 2 == 0:
                pair = self._levels[level][-2 * HASH_BYTES :]
                level += 1
                if level == len(self._levels):
                    self._levels.append(bytearray())
                self._levels[level] += node_hash(bytes(pair[:HASH_BYTES]), bytes(pair[HASH_BYTES:]))

    def hashes(self, level: int, index: int) -> bytes:
        """Root over the 2**level leaves from index * 2**level on.

        Raises:
            ValueError: the subtree is not complete.
        """
        at = index * HASH_BYTES
        row = self._levels[level] if 0 <= level < len(self._levels) else b""
        if not 0 <= at < len(row):
            raise ValueError(f"no complete subtree {index} of level {level}")
        return bytes(row[at : at + HASH_BYTES])

    def root(self, size: int) -> bytes:
        """Root of the first ``size`` leaves."""
        return root_of(self.hashes, size)
