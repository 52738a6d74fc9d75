"""Proofs against RFC 6962 word by word, and a spoiled bit in every place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.tlog.merkle import leaf_hash
from protocols.tlog.proofs import (
    BadProofError,
    make_consistency,
    make_inclusion,
    root_of,
    stored,
    verify_consistency,
    verify_inclusion,
)
from tests.support.tlog import entries_of, mth, path, proof

sizes = st.integers(min_value=1, max_value=80)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_inclusion_is_the_rfc_and_no_other_leaf_is_included(data):
    size = data.draw(sizes)
    index = data.draw(st.integers(0, size - 1))
    other = data.draw(st.integers(0, size - 1))
    entries = entries_of(size)
    hashes = stored([leaf_hash(entry) for entry in entries])
    root, found = mth(entries), make_inclusion(hashes, index, size)

    assert list(found) == path(index, entries)
    assert root == root_of(hashes, size)
    leaf = leaf_hash(entries[other])
    if other == index:
        verify_inclusion(leaf=leaf, index=index, size=size, root=root, proof=found)
    else:
        for at in (index, other):
            with pytest.raises(BadProofError):
                verify_inclusion(leaf=leaf, index=at, size=size, root=root, proof=found)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_consistency_is_the_rfc_and_a_changed_past_is_found(data):
    new = data.draw(sizes)
    old = data.draw(st.integers(1, new))
    entries = entries_of(new)
    forged = list(entries)
    forged[data.draw(st.integers(0, old - 1))] = b"FORGED"
    hashes = stored([leaf_hash(entry) for entry in entries])
    lying = stored([leaf_hash(entry) for entry in forged])

    assert list(make_consistency(hashes, old, new)) == proof(old, entries)
    was = mth(entries[:old])
    verify_consistency(
        old=old,
        old_root=was,
        new=new,
        new_root=mth(entries),
        proof=make_consistency(hashes, old, new),
    )
    for source in (hashes, lying):
        with pytest.raises(BadProofError):
            verify_consistency(
                old=old,
                old_root=was,
                new=new,
                new_root=mth(forged),
                proof=make_consistency(source, old, new),
            )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_is_found(data):
    new = data.draw(st.integers(2, 80))
    old = data.draw(st.integers(1, new - 1))
    hashes = stored([leaf_hash(entry) for entry in entries_of(new)])
    good = make_consistency(hashes, old, new)
    roots = [root_of(hashes, old), root_of(hashes, new)]
    parts = [*roots, *good]
    at = data.draw(st.integers(0, len(parts) - 1))
    bit = 1 << data.draw(st.integers(0, 255))
    parts[at] = (int.from_bytes(parts[at], "big") ^ bit).to_bytes(32, "big")

    with pytest.raises(BadProofError):
        verify_consistency(old=old, old_root=parts[0], new=new, new_root=parts[1], proof=parts[2:])
