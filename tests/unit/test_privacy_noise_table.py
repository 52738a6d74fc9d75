"""The table is the exact law to 192 bits, decides ties by the rule, and shows no seed."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.errors import MalformedMessageError
from protocols.noise.discrete_gaussian import bernoulli_exp, discrete_gaussian, discrete_laplace
from protocols.noise.noise_table import TIE_BITS, U_BITS, NoiseShare, NoiseTable, half_weights
from protocols.noise.streams import Uniform, key_stream
from protocols.tensors import CHUNK

SEED = bytes(range(32))
TABLE = NoiseTable.build(Fraction(4))
VARIANCES = [Fraction(1, 4), Fraction(1), Fraction(4), Fraction(4225, 256), Fraction(90_000)]


def exact_pmf(variance: Fraction, reach: int) -> dict[int, mpmath.mpf]:
    """From the definition, to 400 bits."""
    with mpmath.workprec(400):
        v = mpmath.mpf(variance.numerator) / variance.denominator
        weights = {x: mpmath.exp(-mpmath.mpf(x * x) / (2 * v)) for x in range(-reach, reach + 1)}
        total = mpmath.fsum(weights.values())
        return {x: w / total for x, w in weights.items()}


def distance(table: NoiseTable, pmf) -> mpmath.mpf:
    """Total variation between a table and a law, to 400 bits."""
    with mpmath.workprec(400):
        own = dict(zip(range(-table.bound, table.bound + 1), table.weights(), strict=True))
        unit = mpmath.mpf(2) ** -U_BITS
        return mpmath.fsum(abs(own.get(x, 0) * unit - p) for x, p in pmf.items()) / 2


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_table_is_as_close_to_the_law_as_it_says(variance):
    table = NoiseTable.build(variance)
    claimed = mpmath.mpf(table.distance.numerator) / table.distance.denominator
    found = distance(table, exact_pmf(variance, table.bound + 40))

    assert sum(table.weights()) == 1 << U_BITS
    assert table.bound >= 12 * math.sqrt(variance) > table.bound - 1
    assert found <= claimed
    assert claimed < mpmath.mpf(10) ** -31


@pytest.mark.parametrize("variance", VARIANCES)
def test_before_the_tail_is_cut_nothing_is_lost_but_192_bits(variance):
    """Against the law given that the draw is within the bound: the tail hides nothing else."""
    table = NoiseTable.build(variance)
    found = distance(table, exact_pmf(variance, table.bound))

    assert found <= mpmath.mpf(2 * (2 * table.bound + 1)) / mpmath.mpf(2) ** U_BITS


def test_the_distance_convicts_one_wrong_entry():
    wrong = TABLE.alias.copy()
    wrong[5] += 1
    broken = dataclasses.replace(TABLE, alias=wrong)
    claimed = mpmath.mpf(TABLE.distance.numerator) / TABLE.distance.denominator

    assert distance(broken, exact_pmf(Fraction(4), TABLE.bound + 40)) > claimed
    assert broken.digest != TABLE.digest


def test_the_distance_convicts_thresholds_of_64_bits():
    """The trap of a table whose column and threshold come from one word."""
    short = dataclasses.replace(TABLE, cut_low=np.zeros_like(TABLE.cut_low))

    assert distance(short, exact_pmf(Fraction(4), TABLE.bound)) > mpmath.mpf(2) ** -70


def test_known_answers():
    one, half, two = (half_weights(v, 40) for v in (Fraction(1), Fraction(1, 4), Fraction(4)))

    def p(weights, x):
        return Fraction(weights[x], 2 * sum(weights) - weights[0])

    def var(weights):
        return float(2 * sum(x * x * p(weights, x) for x in range(41)))

    assert float(p(one, 0)) == pytest.approx(0.398942278266861706, abs=1e-16)
    assert float(p(one, 1)) == pytest.approx(0.24197072322446061, abs=1e-16)
    assert var(one) == pytest.approx(0.999999788767728083, abs=2e-16)
    assert float(1 / p(half, 0)) == pytest.approx(1.27134152218901523, abs=3e-16)
    assert var(half) == pytest.approx(0.215012675088138486, abs=1e-16)
    assert float(p(two, 0)) == pytest.approx(0.199471140200716339, abs=1e-16)
    assert TABLE.weights()[TABLE.bound] / 2**U_BITS == pytest.approx(
        0.199471140200716339, abs=1e-16
    )


def test_the_table_is_pinned():
    """Whole numbers only: the same on every machine. A change of this is a change of protocol."""
    assert TABLE.digest.hex() == "97a69572a9f668d6b7186843c5695f4aee247fb0fa6146c413c6c8c103e98663"
    assert NoiseTable.build(Fraction(8, 2)).digest == TABLE.digest
    assert NoiseTable.build(Fraction(41, 10)).digest != TABLE.digest


def test_the_table_is_symmetric():
    assert TABLE.weights() == TABLE.weights()[::-1]


# -- ties ----------------------------------------------------------------------------------------


def tie_bits(coordinate: int) -> int:
    """The 128 bits of a coordinate, from the block cipher itself."""
    block = ((1 << 127) + coordinate).to_bytes(16, "big")
    cipher = Cipher(algorithms.AES256(SEED), modes.ECB())  # noqa: S305 - one block, as in CTR
    return int.from_bytes(cipher.encryptor().update(block), "big")


def in_the_middle(table: NoiseTable) -> int:
    """A column whose cut is not at the end of a word's range: both outcomes happen."""
    low = [table.cut(c) & ((1 << TIE_BITS) - 1) for c in range(table.cut_high.size)]
    return min(range(len(low)), key=lambda c: abs(low[c] - (1 << TIE_BITS - 1)))


@pytest.mark.parametrize("start", [0, 1, 1000])
def test_a_tie_is_decided_by_the_next_128_bits(start):
    column, m = in_the_middle(TABLE), 400
    words = np.full(m, TABLE.cut_high[column], np.uint64)  # injected: each equals the threshold
    out = np.empty(m, np.int32)
    ties = TABLE.decide(words, start, SEED, out)
    low = TABLE.cut(column) & ((1 << TIE_BITS) - 1)
    own, other = column - TABLE.bound, int(TABLE.alias[column])
    want = [own if tie_bits(start + i) < low else other for i in range(m)]

    assert ties == m  # else nothing was tested
    assert set(want) == {own, other}
    assert out.tolist() == want


def test_beside_a_tie_the_word_decides():
    column = in_the_middle(TABLE)
    cut = int(TABLE.cut_high[column])
    out = np.empty(2, np.int32)

    assert TABLE.decide(np.array([cut - 1, cut + 1], np.uint64), 0, SEED, out) == 0
    assert out.tolist() == [column - TABLE.bound, TABLE.alias[column]]


def test_the_ends_of_the_word_are_outcomes():
    out = np.empty(2, np.int32)
    TABLE.decide(np.array([0, 2**64 - 1], np.uint64), 0, SEED, out)

    assert np.abs(out).max() <= TABLE.bound


# -- streams -------------------------------------------------------------------------------------


def test_a_draw_belongs_to_its_coordinate():
    share = NoiseShare(TABLE, SEED)
    whole = share.draw(0, 2**16 + 300)

    for start, count in ((0, 1), (1, 7), (2, 8), (255, 3), (2**16 - 1, 3), (2**16 + 1, 250)):
        assert share.draw(start, count).tolist() == whole[start : start + count].tolist()
    assert whole[:4096].tolist() != NoiseShare(TABLE, bytes(32)).draw(0, 4096).tolist()


def test_the_words_are_the_plain_key_stream():
    words = np.frombuffer(key_stream(SEED, 0).update(bytes(8 * 64)), "<u8")
    out = np.empty(64, np.int32)
    TABLE.decide(words, 0, SEED, out)

    assert NoiseShare(TABLE, SEED).draw(0, 64).tolist() == out.tolist()


def test_noise_is_added_not_written():
    share = NoiseShare(TABLE, SEED)
    lanes = np.arange(50, dtype=np.int32)
    share(1, CHUNK, lanes)

    assert (lanes - np.arange(50)).tolist() == share.draw(CHUNK, 50).tolist()


def test_no_seed_is_shown():
    share, uniform = NoiseShare(TABLE, SEED), Uniform(SEED)

    for shown in (repr(share), str(share), repr(uniform), repr(TABLE)):
        assert SEED.hex() not in shown
        assert str(SEED) not in shown
        assert "\\x" not in shown
    assert repr(share) == "NoiseShare(variance=4)"


def test_numbers_below_n_are_all_reached_and_none_beyond():
    for n in (1, 2, 3, 255, 256, 257, 1000):
        uniform = Uniform(SEED)
        drawn = {uniform.below(n) for _ in range(20 * n)}
        assert drawn == set(range(n))


@pytest.mark.parametrize(
    ("error", "act"),
    [
        (MalformedMessageError, lambda: NoiseTable.build(Fraction(1, 17))),
        (MalformedMessageError, lambda: NoiseTable.build(Fraction(43_700**2))),
        (ValueError, lambda: NoiseShare(TABLE, bytes(31))),
        (ValueError, lambda: key_stream(bytes(16), 0)),
        (ValueError, lambda: key_stream(SEED, -1)),
        (ValueError, lambda: Uniform(SEED).below(0)),
        (ValueError, lambda: discrete_gaussian(Fraction(0), Uniform(SEED))),
        (ValueError, lambda: discrete_laplace(0, Uniform(SEED))),
        (ValueError, lambda: bernoulli_exp(Fraction(-1), Uniform(SEED))),
    ],
)
def test_refused(error, act):
    with pytest.raises(error):
        act()
