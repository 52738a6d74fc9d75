"""A growing tree that remembers only its right edge.

Whoever reads every leaf needs no proofs: the frontier of what was read before, extended by the new
leaves, gives the root that the next checkpoint must have. That shows inclusion of each leaf and
consistency with everything before at once, in O(log n) memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocols.tlog.merkle import EMPTY_ROOT, node_hash


@dataclass(frozen=True, slots=True)
class Frontier:
    """The roots of the complete subtrees of a tree, the largest first."""

    size: int = 0  # leaves
    roots: tuple[bytes, ...] = ()  # one for each bit of the size, 32 bytes each

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.roots) != self.size.bit_count():
            raise ValueError("a frontier has one root for each bit of its size")

    def extend(self, leaf_hashes: Iterable[bytes]) -> Frontier:
        """The tree with more leaves."""
        size, roots = self.size, list(self.roots)
        for leaf in leaf_hashes:
            root, rest = leaf, size
            while rest & 1:
                root = node_hash(roots.pop(), root)
                rest >>= 1
            roots.append(root)
            size += 1
        return Frontier(size, tuple(roots))

    @property
    def root(self) -> bytes:
        """32 bytes; SHA-256("") of no leaves."""
        if not self.roots:
            return EMPTY_ROOT
        root = self.roots[-1]
        for left in reversed(self.roots[:-1]):
            root = node_hash(left, root)
        return root
