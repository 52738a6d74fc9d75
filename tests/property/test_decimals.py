"""Numbers that others write as text never stop who reads them, and have one text each."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.config import _address
from node_agent.config import parse_address
from policies.governance import at_pointer, parse_charter
from protocols.decimals import read_decimal, split_address
from protocols.errors import (
    MalformedMessageError,
    OffsetError,
    error_from_code,
)
from protocols.identifiers import RoundId

MANY = "1" * 5000  # more digits than int() takes
TRAPS = ["²", "٣", "1_0", "+1", "-1", " 1", "1 ", "01", "", MANY, "１"]


@given(number=st.integers(0, 2**70), most=st.integers(0, 2**70))
def test_a_number_is_read_if_it_is_not_too_large(number, most):
    assert read_decimal(str(number), most=most) == (number if number <= most else None)


@given(text=st.text(max_size=12), most=st.integers(0, 10**9))
@example(text="²", most=9)
@example(text="007", most=999)
def test_one_text_for_each_number(text, most):
    number = read_decimal(text, most=most)
    assert number is None or (str(number) == text and 0 <= number <= most)


@pytest.mark.parametrize("text", TRAPS)
def test_what_looks_like_a_number(text):
    assert read_decimal(text, most=2**63) is None
    assert split_address(f"host:{text}") is None
    with pytest.raises(MalformedMessageError):
        RoundId.parse(f"run-1/{text}")
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(f"host:{text}")
    with pytest.raises(ValueError, match="HOST:PORT"):
        _address(f"host:{text}")
    told = error_from_code("wrong_offset", "go on elsewhere", {"expected": text})
    assert isinstance(told, OffsetError)
    assert told.expected == 0
    with pytest.raises(LookupError):
        at_pointer([1, 2], f"/{text}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:0", ("a", 0)), ("a:65535", ("a", 65535)), ("[::1]:8443", ("[::1]", 8443)),
        ("a:65536", None), (":1", None), ("a", None), ("a:", None),
    ],
)  # fmt: skip
def test_addresses(text, found):
    assert split_address(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "---\npolicy: a\x1cb\x85c\u2028d\n---\n## 1. Purpose\n",
        f"---\npolicy: a\n---\n## {MANY}. Purpose\n",
        "---\npolicy: a\n---\n## ٣. Purpose\n",
    ],
)
def test_a_charter_that_is_written_strangely_has_problems_and_raises_nothing(text):
    assert parse_charter(text).problems


def test_what_other_tools_take_for_the_end_of_a_line_is_none():
    """Found by fuzzing under coverage guidance: it raised."""
    odd = "cons\x0bor\x1cti\x85um\u2028.json"
    charter = parse_charter(f"---\nminga-governance: 1\npolicy: {odd}\nversion: 7\n---\n")
    assert charter.front == {"minga-governance": "1", "policy": odd, "version": "7"}
    assert charter.problems == ()
