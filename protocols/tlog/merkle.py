"""Merkle trees as in RFC 6962: leaf and node hashes and the root of a list.

One tree hash for the whole project: the round log and the unit hashes of bulk data use it alike.
The prefixes 0x00 and 0x01 keep a leaf from being read as an inner node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes | bytearray | memoryview) -> bytes:
    """SHA-256(0x00 || data), 32 bytes."""
    digest = hashlib.sha256(b"\x00")
    digest.update(data)
    return digest.digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right), 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def tree_root(leaf_hashes: Sequence[bytes]) -> bytes:
    """Root of a list of leaf hashes; the empty list has SHA-256("").

    The recursion of RFC 6962 section 2.1 without the recursion: a stack of roots of complete
    subtrees, joined from the right at the end.
    """
    if not leaf_hashes:
        return EMPTY_ROOT
    stack: list[tuple[int, bytes]] = []  # (height, root)
    for leaf in leaf_hashes:
        height, root = 0, leaf
        while stack and stack[-1][0] == height:
            root = node_hash(stack.pop()[1], root)
            height += 1
        stack.append((height, root))
    root = stack.pop()[1]
    while stack:
        root = node_hash(stack.pop()[1], root)
    return root
