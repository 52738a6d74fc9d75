"""The quick way to canonical bytes writes what RFC 8785 writes, or is not taken."""

from __future__ import annotations

import json

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from protocols.canonical import _is_plain, canonical_bytes
from protocols.errors import MalformedMessageError

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(values)
def test_canonical_bytes_are_rfc_8785(value):
    assert canonical_bytes(value) == rfc8785.dumps(value)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53) + 1, 2**53 - 1)
        | st.text('\x00\x1f\b"\\/aé\u2028\x7f😀'),
        lambda inner: st.lists(inner) | st.dictionaries(st.text('aAzZ09_-\n"\\~'), inner),
        max_leaves=10,
    )
)
def test_the_quick_way_is_taken_and_agrees(value):
    assert _is_plain(value)
    assert canonical_bytes(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [1.0, 2**53, -(2**53), {"é": 1}, {"a": [0.5]}, (1, 2), {1: 2}])
def test_the_quick_way_is_not_taken(value):
    assert not _is_plain(value)


@pytest.mark.parametrize("value", ["\ud800", {"a": "\udfff"}, 2**53, float("nan"), {"\ud800": 1}])
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(MalformedMessageError):
        canonical_bytes(value)


def test_key_order_is_where_the_two_differ():
    """U+FFFF sorts before U+10000 by code point, after it in UTF-16, which RFC 8785 wants."""
    value = {"\U00010000": 1, "\uffff": 2}
    quick = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert quick != rfc8785.dumps(value) == canonical_bytes(value)
