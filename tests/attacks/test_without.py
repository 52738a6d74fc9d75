"""The tool of the attack tests: it takes out one check, the right one, and puts it back."""

from __future__ import annotations

import pytest

from protocols.errors import MalformedMessageError
from protocols.secagg import checks, keys, shamir
from tests.support.without import Check, Rule, check_attack, layers, without

SPARE = Check(clause="8.4", function=shamir.reconstruct, says="is not on the polynomial")
SHARES = dict(
    zip(
        (1, 2, 3),
        shamir.split(b"s" * 32, threshold=2, indices=(1, 2, 3), randomness=b"r" * 32),
        strict=True,
    )
)
BAD = SHARES | {3: bytes(33)}


def test_the_check_is_gone_inside_and_back_outside():
    with pytest.raises(checks.BadShareError):
        shamir.reconstruct(BAD, threshold=2)
    with without(SPARE):
        assert shamir.reconstruct(BAD, threshold=2) == b"s" * 32
    with pytest.raises(checks.BadShareError):
        shamir.reconstruct(BAD, threshold=2)


def test_nothing_else_is_gone():
    with without(SPARE), pytest.raises(checks.BadShareError, match="above 32 bytes"):
        shamir.reconstruct({1: b"\1" + bytes(32)}, threshold=1)


@pytest.mark.parametrize(
    "check",
    [
        Check(clause="8.4", function=shamir.reconstruct, says="no such sentence"),
        Check(clause="8.4", function=shamir.reconstruct, says="the", marker="raise"),
    ],
    ids=["no-such-check", "more-than-one"],
)
def test_a_check_that_moved_is_noticed(check):
    """Else a renamed check would silently be tested no more."""
    with pytest.raises(AssertionError, match="times"), without(check):
        pass


def test_what_was_remembered_meanwhile_is_forgotten():
    low = Check(
        clause="4.3",
        function=keys.parse_x25519,
        says="low order",
        forget=keys.parse_x25519.cache_clear,
    )
    with without(low):
        assert keys.parse_x25519(bytes(32)) == bytes(32)
    with pytest.raises(MalformedMessageError):
        keys.parse_x25519(bytes(32))


def test_an_attack_that_fails_without_the_check_is_no_attack():
    """``check_attack`` does not take silence for success, nor one refusal for another."""
    with pytest.raises(ZeroDivisionError):
        check_attack(lambda: 1 // 0, (SPARE,), None)
    with pytest.raises(pytest.fail.Exception):
        check_attack(lambda: None, (), SPARE)
    other = Check(clause="8.4", function=shamir.reconstruct, says="another sentence")
    with pytest.raises(AssertionError, match="want 'another sentence'"):
        check_attack(lambda: shamir.reconstruct(BAD, threshold=2), (), other)


def test_layers_are_taken_away_one_after_the_other():
    rule = Rule(
        clause="1.3", function=None, says="", target=shamir, name="PRIME", instead=lambda real: 1613
    )
    rows = [row.values for row in layers(SPARE, rule).args[1]]
    assert rows == [((), SPARE), ((SPARE,), rule), ((SPARE, rule), None)]
    with without(rule):
        assert shamir.PRIME == 1613
    assert shamir.PRIME == 2**256 + 297
