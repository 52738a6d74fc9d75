"""A second, slow reading of protocols/spec/vector.md, in plain Python.

It shares no code with protocols/tensors: whole numbers, Fractions, struct for IEEE rounding, and
the textbook recursion for Merkle roots. Tests compare the two; the golden vectors are made by the
real code and checked against this one.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from fractions import Fraction

UNIT = 4 * 2**20
CHUNK = 2**18
BLOCK = 2**16


def f32(value: float | Fraction) -> float:
    """Nearest float32 of a float64, ties to even."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def canonical(value: object) -> bytes:
    """RFC 8785 for documents of ASCII strings and small integers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def root(hashes: Sequence[bytes]) -> bytes:
    """RFC 6962 section 2.1, word by word."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    k = 1
    while 2 * k < len(hashes):
        k *= 2
    return hashlib.sha256(b"\x01" + root(hashes[:k]) + root(hashes[k:])).digest()


def blob_name(data: bytes) -> str:
    units = [data[at : at + UNIT] for at in range(0, len(data), UNIT)]
    return root([hashlib.sha256(b"\x00" + unit).digest() for unit in units]).hex()


def framed_hash(context: str, *fields: bytes) -> str:
    framed = len(context).to_bytes(4, "big") + context.encode()
    for field in fields:
        framed += len(field).to_bytes(8, "big") + field
    return hashlib.sha256(framed).hexdigest()


def pack_chunk(lanes: Sequence[int], bits: int) -> bytes:
    """One chunk, coordinate by coordinate."""
    residues = [lane % 2**bits for lane in lanes]
    low = b"".join((r & 0xFFFF).to_bytes(2, "little") for r in residues)
    high = [r >> 16 for r in residues]
    if bits == 16:
        return low
    if bits == 24:
        return low + bytes(high)
    half = (len(high) + 1) // 2
    second = [*high[half:], 0]
    return low + bytes(high[j] | second[j] << 4 for j in range(half))


def pack_vector(lanes: Sequence[int], bits: int) -> bytes:
    return b"".join(pack_chunk(lanes[at : at + CHUNK], bits) for at in range(0, len(lanes), CHUNK))


def centred(residue: int, bits: int) -> int:
    residue %= 2**bits
    return residue - 2**bits if residue >= 2 ** (bits - 1) else residue


def round_one(value: float, dither: int, limit: int) -> tuple[int, bool]:
    """Clamp and round one scaled float32 by its dither; whether it was clamped."""
    beyond = abs(value) > limit
    exact = Fraction(max(-limit, min(limit, value)))
    floor = exact.numerator // exact.denominator
    # float32 cannot hold 1 - tiny: there the fraction is 1 and the value always rounds up.
    fraction = f32(float(exact - floor))
    return floor + (Fraction(dither) < 65536 * Fraction(fraction)), beyond


def limbs(value: int) -> list[int]:
    return [value >> (8 * k) & 0xFF for k in range(6)]


def two_to(e: int) -> Fraction:
    return Fraction(2) ** e


def next_exponent(
    sums: Sequence[int],
    *,
    old: int,
    weight_units: int,
    k_permille: int,
    floor: float,
    limit: int,
) -> int:
    """The largest e in [-100, 100] with 2**e * max(floor, k * rms) <= limit, by trying them all.

    rms is irrational, so both sides are compared squared.
    """
    mean_square = (
        Fraction(sum(s * s for s in sums), len(sums))
        * (two_to(-old) * Fraction(65536, weight_units)) ** 2
    )
    best = -100
    for e in range(-100, 101):
        fits_floor = two_to(e) * Fraction(floor) <= limit
        fits_rms = (two_to(e) * Fraction(k_permille, 1000)) ** 2 * mean_square <= limit**2
        if fits_floor and fits_rms:
            best = e
    return best


def mean_of(total: int, *, exponent: int, weight_units: int) -> float:
    """The weighted mean update of one coordinate, as float32."""
    factor = f32(65536 / weight_units * 2.0**-exponent)
    return f32(f32(total) * factor)


def average(theta: float, mean: float, lr: float) -> float:
    return f32(theta + f32(mean * f32(lr)))


def nesterov(theta: float, v: float, mean: float, lr: float, mu: float) -> tuple[float, float]:
    g, mu, lr = -mean, f32(mu), f32(lr)
    v = f32(f32(v * mu) + g)
    return f32(theta - f32(lr * f32(g + f32(v * mu)))), v
