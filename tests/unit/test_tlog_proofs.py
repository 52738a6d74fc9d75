"""Trees and proofs: published vectors, boundary sizes, and an oracle that convicts."""

from __future__ import annotations

import hashlib

import pytest

from protocols.tlog import proofs
from protocols.tlog.merkle import EMPTY_ROOT, leaf_hash, tree_root
from protocols.tlog.proofs import (
    BadProofError,
    make_consistency,
    make_inclusion,
    root_of,
    stored,
    verify_consistency,
    verify_inclusion,
)
from tests.support.tlog import b64, big_tree, entries_of, formats, mth, path, proof

SIZES = (1, 2, 3, 255, 256, 257, 600, 65_535, 65_536, 70_000)


def hexes(texts):
    return tuple(map(bytes.fromhex, texts))


def test_the_reference_tree_of_certificate_transparency():
    vectors = formats()["rfc6962_reference"]
    leaves = [leaf_hash(bytes.fromhex(text)) for text in vectors["leaves_hex"]]
    roots = hexes(vectors["roots_hex_by_size"])
    hashes = stored(leaves)

    assert leaves == list(hexes(vectors["leaf_hashes_hex"]))
    for size, root in enumerate(roots):
        assert tree_root(leaves[:size]) == root_of(hashes, size) == root
    for row in vectors["inclusion"]:
        index, size, want = row["index"], row["size"], hexes(row["proof_hex"])
        assert make_inclusion(hashes, index, size) == want
        verify_inclusion(leaf=leaves[index], index=index, size=size, root=roots[size], proof=want)
    for row in vectors["consistency"]:
        old, new, want = row["old"], row["new"], hexes(row["proof_hex"])
        assert make_consistency(hashes, old, new) == want
        verify_consistency(old=old, old_root=roots[old], new=new, new_root=roots[new], proof=want)
    assert len(vectors["inclusion"]) == len(vectors["consistency"]) == 36


def probe(kind, row):
    """Whether we accept one row of the probes."""
    try:
        if kind == "inclusion":
            _, index, size, leaf, root, hashes, _ = row
            verify_inclusion(
                leaf=b64(leaf), index=index, size=size, root=b64(root), proof=list(map(b64, hashes))
            )
        else:
            _, old, new, old_root, new_root, hashes, _ = row
            verify_consistency(
                old=old,
                old_root=b64(old_root),
                new=new,
                new_root=b64(new_root),
                proof=list(map(b64, hashes)),
            )
    except BadProofError:
        return False
    return True


def disagreements():
    vectors = formats()["merkle_probes"]
    rows = [(kind, row) for kind in ("inclusion", "consistency") for row in vectors[kind]]
    assert len(rows) == 196
    return [row[0] for kind, row in rows if probe(kind, row) == row[-1]]


def test_every_probe_is_judged_as_its_source_says():
    assert disagreements() == []


@pytest.mark.parametrize(
    ("part", "planted"),
    [
        ("_border", lambda seed, _proof: seed),
        ("_inner_right", proofs._inner),
        ("_inner", lambda seed, proof, _position: proofs._border(seed, proof)),
        ("_check_hashes", lambda *_hashes: None),
        ("BadProofError", None),
    ],
)
def test_the_probes_convict_a_planted_mistake(monkeypatch, part, planted):
    if part == "_check_hashes":  # shows only where a hash has another length
        monkeypatch.setattr(proofs, part, planted)
        with pytest.raises(BadProofError):  # the root differs, all the same
            verify_inclusion(leaf=b"", index=0, size=1, root=bytes(32), proof=())
        return
    if part == "BadProofError":  # a verifier that never refuses
        monkeypatch.setattr(proofs.hmac, "compare_digest", lambda _a, _b: True)
    else:
        monkeypatch.setattr(proofs, part, planted)

    assert disagreements() != []


def test_go_sumdb_roots_and_proofs():
    vectors = formats()["go_tlog"]
    leaves = [leaf_hash(entry) for entry in entries_of(100)]
    hashes = stored(leaves)

    assert leaf_hash(b"hello world") == b64(vectors["leaf_hash_of_hello_world"])
    for size, root in vectors["roots_by_size"].items():
        assert root_of(hashes, int(size)) == b64(root)
    for row in vectors["inclusion"]:
        assert make_inclusion(hashes, row["index"], row["size"]) == tuple(map(b64, row["proof"]))
    for row in vectors["consistency"]:
        assert make_consistency(hashes, row["old"], row["new"]) == tuple(map(b64, row["proof"]))


@pytest.mark.parametrize("size", SIZES)
def test_proofs_at_boundary_sizes(size):
    hashes = big_tree()
    root = root_of(hashes, size)
    near = {0, 1, 254, 255, 256, 257, size // 2, 65_534, 65_535, 65_536, size - 2, size - 1}

    for index in sorted(i for i in near if 0 <= i < size):
        path_ = make_inclusion(hashes, index, size)
        leaf = leaf_hash(b"leaf %d" % index)
        verify_inclusion(leaf=leaf, index=index, size=size, root=root, proof=path_)
        with pytest.raises(BadProofError):
            verify_inclusion(leaf=bytes(32), index=index, size=size, root=root, proof=path_)
    for old in (s for s in SIZES if s <= size):
        path_ = make_consistency(hashes, old, size)
        was = root_of(hashes, old)
        verify_consistency(old=old, old_root=was, new=size, new_root=root, proof=path_)
        with pytest.raises(BadProofError):
            verify_consistency(old=old, old_root=bytes(32), new=size, new_root=root, proof=path_)


def test_roots_at_the_small_boundaries_agree_with_the_rfc_word_by_word():
    for size in (0, 1, 255, 256, 257):
        assert root_of(big_tree(), size) == mth(entries_of(size))
    assert list(make_inclusion(big_tree(), 255, 257)) == path(255, entries_of(257))
    assert list(make_consistency(big_tree(), 255, 257)) == proof(255, entries_of(257))


def test_6_consistency_from_0_is_an_error_on_both_sides():
    with pytest.raises(ValueError, match="old=0"):
        make_consistency(big_tree(), 0, 5)
    for new, root in ((0, EMPTY_ROOT), (5, root_of(big_tree(), 5))):
        with pytest.raises(BadProofError, match="old=0"):
            verify_consistency(old=0, old_root=EMPTY_ROOT, new=new, new_root=root, proof=())


def test_a_proof_of_a_hash_too_long_or_too_many_is_refused():
    hashes = big_tree()
    good = make_inclusion(hashes, 3, 7)
    base = {"leaf": leaf_hash(b"leaf 3"), "index": 3, "size": 7, "root": root_of(hashes, 7)}

    verify_inclusion(**base, proof=good)
    for bad in ((*good, bytes(32)), good[:-1], (good[0] + b"\0", *good[1:]), (b"", *good[1:])):
        with pytest.raises(BadProofError):
            verify_inclusion(**base, proof=bad)
    for index, size in ((-1, 7), (7, 7), (0, 0)):
        with pytest.raises(BadProofError):
            verify_inclusion(**{**base, "index": index, "size": size}, proof=good)
        with pytest.raises(ValueError, match="no leaf"):
            make_inclusion(hashes, index, size)


def test_a_leaf_is_never_an_inner_node():
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(left + right) != tree_root([left, right])
    assert hashlib.sha256(left + right).digest() != tree_root([left, right])
