"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares give them back, fewer say nothing.

Over the prime field of p = 2**256 + 297, the least prime above 2**256, so that every 32-byte
secret is one element. The share of index x (1 to 64, never 0: the value there is the secret) is
f(x), 33 bytes big-endian. Source: Shamir, "How to share a secret", CACM 1979.

Secrets and shares are plain ``bytes`` here; the values that carry them elsewhere keep them out of
their repr. Python integers do not run in constant time: shares are computed on a machine that
holds the secret anyway, and never on behalf of another party.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final

from protocols.errors import MalformedMessageError
from protocols.secagg.errors import BadShareError, TooFewSharesError
from protocols.secagg.threshold import MAX_ROSTER

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def split(
    secret: bytes, *, threshold: int, indices: Sequence[int], randomness: bytes
) -> list[bytes]:
    """Deal one share for each index.

    Args:
        secret: 32 bytes.
        threshold: shares needed to reconstruct, 1 to 64.
        indices: distinct, 1 to 64.
        randomness: 32 bytes for each of the ``threshold - 1`` coefficients, used once and secret.

    Returns:
        33-byte shares in the order of ``indices``.

    Guarantees:
        Fewer than ``threshold`` shares are independent of the secret, up to a statistical distance
        of (threshold - 1) * 297 / 2**256: coefficients are uniform over 2**256 values of p. A
        leading coefficient of zero is kept: leaving it out would tell something.

    Raises:
        ValueError: lengths, threshold or indices out of range: the caller's mistake.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes")
    if not 1 <= threshold <= MAX_ROSTER or len(randomness) != 32 * (threshold - 1):
        raise ValueError("need 32 random bytes for each of threshold - 1 coefficients")
    _check_indices(indices)
    coefficients = [int.from_bytes(secret, "big")] + [
        int.from_bytes(randomness[32 * k : 32 * k + 32], "big") for k in range(threshold - 1)
    ]
    shares = []
    for x in indices:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def parse_share(share: bytes) -> int:
    """A share as a field element.

    Raises:
        MalformedMessageError: not 33 bytes, or not below p.
    """
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise MalformedMessageError(f"a share is {SHARE_BYTES} bytes below 2**256 + 297")
    return value


def reconstruct(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """The secret from at least ``threshold`` shares, all of which must agree.

    The ``threshold`` shares of lowest index are interpolated; every further share must lie on the
    same polynomial, so a wrong share shows whenever there is one to spare.

    Args:
        shares: index to 33-byte share.

    Returns:
        32 bytes.

    Raises:
        TooFewSharesError: fewer than ``threshold`` shares.
        BadShareError: an extra share is off the polynomial, or the result is above 32 bytes.
            Without an extra share a wrong one may go unseen: only the dealer's commitment to the
            secret proves a result right.
        MalformedMessageError: a share cannot be read.
        ValueError: threshold or an index out of range.
    """
    if threshold < 1:
        raise ValueError("threshold must be at least 1")
    _check_indices(list(shares))
    if len(shares) < threshold:
        raise TooFewSharesError(f"{len(shares)} shares, {threshold} needed")
    ordered = sorted(shares)
    base, extra = tuple(ordered[:threshold]), ordered[threshold:]
    values = [parse_share(shares[x]) for x in base]
    for x in extra:
        if _evaluate(base, values, x) != parse_share(shares[x]):
            raise BadShareError(
                f"the share of index {x} is not on the polynomial of the first {threshold}"
            )
    secret = _evaluate(base, values, 0)
    if secret >= 2**256:
        raise BadShareError("the shares give a number above 32 bytes: at least one is wrong")
    return secret.to_bytes(SECRET_BYTES, "big")


def _check_indices(indices: Sequence[int]) -> None:
    if len(set(indices)) != len(indices) or not all(1 <= x <= MAX_ROSTER for x in indices):
        raise ValueError(f"share indices must be distinct and from 1 to {MAX_ROSTER}")


def _evaluate(base: tuple[int, ...], values: Sequence[int], at: int) -> int:
    weights = _lagrange(base, at)
    return sum(map(int.__mul__, weights, values)) % PRIME


@functools.lru_cache(maxsize=512)  # keyed by public indices only; one set serves a whole round
def _lagrange(base: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Weights w with f(at) = sum of w[k] * f(base[k]) mod p for every f of degree < len(base)."""
    weights = []
    for x in base:
        numerator = denominator = 1
        for other in base:
            if other != x:
                numerator = numerator * (at - other) % PRIME
                denominator = denominator * (x - other) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(weights)
