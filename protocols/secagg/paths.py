"""Inclusion paths in the small Merkle trees of a DEAL (RFC 6962, section 2.1.1).

A dealer commits to all its shares under one root and to all its packets under another; a path
shows that one share or packet was among them. The trees have at most 128 leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocols.errors import MalformedMessageError
from protocols.tlog.merkle import node_hash, tree_root

MAX_PATH = 7  # hashes: two shares for each of 64 members


def inclusion_path(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Hashes from the leaf's sibling up to the root's child.

    Raises:
        ValueError: no such leaf.
    """
    size = len(leaf_hashes)
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of {size}")
    if size == 1:
        return ()
    k = 1 << ((size - 1).bit_length() - 1)  # largest power of two below size
    if index < k:
        return (*inclusion_path(leaf_hashes[:k], index), tree_root(leaf_hashes[k:]))
    return (*inclusion_path(leaf_hashes[k:], index - k), tree_root(leaf_hashes[:k]))


def root_from_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that ``path`` leads to.

    Args:
        leaf: hash of the leaf.
        index: its place from 0; size: leaves of the tree.

    Raises:
        MalformedMessageError: the path has not the length that index and size demand.
    """
    if not 0 <= index < size:
        raise MalformedMessageError(f"no leaf {index} in a tree of {size}")
    inner = (index ^ (size - 1)).bit_length()
    border = (index >> inner).bit_count()
    if len(path) != inner + border:
        raise MalformedMessageError(f"a path of {len(path)} hashes, want {inner + border}")
    found = leaf
    for level, sibling in enumerate(path):
        if level >= inner or index >> level & 1:
            found = node_hash(sibling, found)
        else:
            found = node_hash(found, sibling)
    return found
