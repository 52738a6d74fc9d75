"""Inclusion and consistency proofs, made and verified as in RFC 6962 section 2.1.

A proof is a list of 32-byte hashes. For an inclusion proof the leaf's sibling comes first and the
root's child last. Provers ask for the hash of a complete subtree, ``hashes(level, index)``: the
root over the 2**level leaves from index * 2**level on; a list in memory (``stored``) and tiles
(``tiles.tile_hashes``) both answer that. Verifiers see only numbers, roots and the proof.
Normative text: protocols/spec/log.md, section 2.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence

from protocols.errors import IntegrityError
from protocols.tlog.merkle import EMPTY_ROOT, node_hash
from protocols.tlog.text import HASH_BYTES

SubtreeHashes = Callable[[int, int], bytes]  # (level, index) -> 32 bytes


class BadProofError(IntegrityError):
    """A proof does not show what it is said to show."""

    code = "bad_proof"
    advice = "Keep both checkpoints: if their signatures are good, the log may have been rewritten."


def stored(leaf_hashes: Sequence[bytes]) -> SubtreeHashes:
    """Every complete subtree over a list of leaf hashes, hashed once and kept in memory."""
    levels = [list(leaf_hashes)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        levels.append(
            [node_hash(below[i], below[i + 1]) for i in range(0, len(below) - len(below) % 2, 2)]
        )
    return lambda level, index: levels[level][index]


def _split(count: int) -> int:
    """The largest power of two strictly below ``count``, for ``count`` of 2 or more."""
    return 1 << ((count - 1).bit_length() - 1)


def range_root(hashes: SubtreeHashes, low: int, high: int) -> bytes:
    """Root over the leaves ``low`` to ``high - 1``.

    ``low`` must be a multiple of the largest power of two that is at most ``high - low``: every
    range that the recursion of RFC 6962 meets is. So it is one row of complete subtrees, each
    smaller than the one before, joined from the right.
    """
    roots: list[bytes] = []
    while low < high:
        level = (high - low).bit_length() - 1
        roots.append(hashes(level, low >> level))
        low += 1 << level
    if not roots:
        return EMPTY_ROOT
    root = roots.pop()
    while roots:
        root = node_hash(roots.pop(), root)
    return root


def root_of(hashes: SubtreeHashes, size: int) -> bytes:
    """Root of the first ``size`` leaves; SHA-256("") for 0."""
    return range_root(hashes, 0, size)


def make_inclusion(hashes: SubtreeHashes, index: int, size: int) -> tuple[bytes, ...]:
    """PATH(index, D[size]) of RFC 6962 section 2.1.1.

    Raises:
        ValueError: there is no leaf ``index`` in a tree of ``size``: the caller's mistake.
    """
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of {size}")
    path: list[bytes] = []
    low, high = 0, size
    while high - low > 1:  # from the root down, so the path is built backwards
        middle = low + _split(high - low)
        if index < middle:
            path.append(range_root(hashes, middle, high))
            high = middle
        else:
            path.append(range_root(hashes, low, middle))
            low = middle
    return tuple(reversed(path))


def make_consistency(hashes: SubtreeHashes, old: int, new: int) -> tuple[bytes, ...]:
    """PROOF(old, D[new]) of RFC 6962 section 2.1.2; empty where the sizes are equal.

    Raises:
        ValueError: not 0 < old <= new. Everything is consistent with the empty tree, so a
            "proof" from 0 would look like evidence and be none.
    """
    if not 0 < old <= new:
        raise ValueError(f"want 0 < old <= new, got old={old} new={new}")
    path: list[bytes] = []
    low, high = 0, new
    while high != old:  # the old tree ends inside this range
        middle = low + _split(high - low)
        if old <= middle:
            path.append(range_root(hashes, middle, high))
            high = middle
        else:
            path.append(range_root(hashes, low, middle))
            low = middle
    if low:  # the verifier knows the old root, but not this part of it
        path.append(range_root(hashes, low, high))
    return tuple(reversed(path))


def _check_hashes(*hashes: bytes) -> None:
    if any(len(value) != HASH_BYTES for value in hashes):
        raise BadProofError(f"a hash in the proof does not have {HASH_BYTES} bytes")


def _inner(seed: bytes, proof: Sequence[bytes], position: int) -> bytes:
    for level, sibling in enumerate(proof):
        right = position >> level & 1
        seed = node_hash(sibling, seed) if right else node_hash(seed, sibling)
    return seed


def _inner_right(seed: bytes, proof: Sequence[bytes], position: int) -> bytes:
    for level, sibling in enumerate(proof):
        if position >> level & 1:
            seed = node_hash(sibling, seed)
    return seed


def _border(seed: bytes, proof: Sequence[bytes]) -> bytes:
    for sibling in proof:
        seed = node_hash(sibling, seed)
    return seed


def verify_inclusion(
    *, leaf: bytes, index: int, size: int, root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that ``leaf`` is the leaf hash at ``index`` of the tree of ``size`` with ``root``.

    Up to the level where the paths of the leaf and of the last leaf join (``inner`` hashes), the
    bits of the index say on which side a sibling stands; above (``border``) all stand on the left.

    Raises:
        BadProofError: it does not, the length is not exactly right, or a hash is not 32 bytes.
    """
    if not 0 <= index < size:
        raise BadProofError(f"no leaf {index} in a tree of {size}")
    _check_hashes(leaf, root, *proof)
    inner = (index ^ (size - 1)).bit_length()
    want = inner + (index >> inner).bit_count()
    if len(proof) != want:
        raise BadProofError(f"an inclusion proof of {len(proof)} hashes, want {want}")
    found = _border(_inner(leaf, proof[:inner], index), proof[inner:])
    if not hmac.compare_digest(found, root):
        raise BadProofError(f"leaf {index} is not in the tree of {size} with this root")


def verify_consistency(
    *, old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the tree of ``new`` leaves begins with the tree of ``old`` leaves.

    Raises:
        BadProofError: it does not, the length is not exactly right, a hash is not 32 bytes, or
            ``old`` is 0, which nothing can contradict (a witness handles first contact itself).
    """
    if not 0 < old <= new:
        raise BadProofError(f"want 0 < old <= new, got old={old} new={new}")
    _check_hashes(*proof)  # a root of another length equals no hash, and parsers pass none on
    if old == new:
        if proof:
            raise BadProofError("between equal sizes the proof is empty")
        if not hmac.compare_digest(old_root, new_root):
            raise BadProofError(f"two roots for one size {old}")
        return
    shift = (old & -old).bit_length() - 1  # levels of the last complete subtree of the old tree
    inner = ((old - 1) ^ (new - 1)).bit_length()
    border = ((old - 1) >> inner).bit_count()
    inner -= shift
    whole = old == 1 << shift  # then the old tree is one complete subtree, and its root the seed
    want = inner + border + (0 if whole else 1)
    if len(proof) != want:
        raise BadProofError(f"a consistency proof of {len(proof)} hashes, want {want}")
    seed, rest = (old_root, proof) if whole else (proof[0], proof[1:])
    position = (old - 1) >> shift
    was = _border(_inner_right(seed, rest[:inner], position), rest[inner:])
    now = _border(_inner(seed, rest[:inner], position), rest[inner:])
    if not hmac.compare_digest(was, old_root):
        raise BadProofError(f"the proof does not lead to the old root, size {old}")
    if not hmac.compare_digest(now, new_root):
        raise BadProofError(f"the proof does not lead to the new root, size {new}")
