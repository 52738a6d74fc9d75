"""A packed table is the table it was made of; a round that is over still says all it said."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.audit.packed import Packed, shared
from policies.audit.rounds import Committed
from tests.support.leaves import NODES, World

NAMES = st.text("abcdefghijklmnopqrstuvwxyz-0123456789", min_size=1, max_size=8)
PAIR = struct.Struct("<Qi")


def pair(big: int, small: int) -> tuple[int, int]:
    return big, small


@given(
    st.dictionaries(NAMES, st.tuples(st.integers(0, 2**64 - 1), st.integers(-(2**31), 2**31 - 1)))
)
def test_it_is_the_table_it_was_made_of(table):
    packed = Packed(PAIR, pair, table)
    assert packed == table
    assert dict(packed) == table
    assert list(packed) == sorted(table)
    assert len(packed) == len(table)
    assert "A name that none has" not in packed
    with pytest.raises(KeyError):
        packed["A name that none has"]
    for name, value in table.items():
        assert packed[name] == value


@pytest.mark.parametrize("secure", [False, True])
def test_a_round_that_is_over_still_says_what_it_said(secure):
    world = World(secure=secure).begin().round(upto="round.confirm")
    (before,) = world.replay().rounds.values()
    (after,) = World(secure=secure).begin().round().replay().rounds.values()
    assert isinstance(after.attempts[0].commits, Packed)
    assert not isinstance(before.attempts[0].commits, Packed)
    assert after.joins == before.joins
    assert after.joins.keys() == set(NODES)
    assert after.attempts[0].commits == before.attempts[0].commits
    assert all(isinstance(found, Committed) for found in after.attempts[0].commits.values())


def test_rounds_of_the_same_nodes_keep_their_names_once():
    first, second = World().begin().round(0).round(1).replay().rounds.values()
    assert first.attempts[0].survivors is second.attempts[0].survivors
    assert first.attempts[0].aggregate.included is first.attempts[0].survivors
    assert shared(tuple("abc")) is shared(tuple("abc"))
