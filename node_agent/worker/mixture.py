"""Several data sets with weights: whose sequence comes next. No torch.

Weights are shares of *sequences*. They are rounded once to whole slots of a block of ``BLOCK``
sequences; each block holds every data set's slots in an order drawn from (seed, block). So data set
d has had exactly ``k * slots[d]`` sequences after k blocks: its own place follows from the position
in the run, and one integer is still the exact position of everything. Each data set has its own
endless row of epochs (data.py); a small one with a large weight is simply repeated more often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from node_agent.worker.data import Corpus, PackedText
from node_agent.worker.text_files import DataError, find_files
from node_agent.worker.tokens import BYTES, Encoder, Tokens

BLOCK: Final = 1024  # sequences


class Sequences(Protocol):
    """An endless row of training sequences."""

    per_epoch: int  # sequences after which the row's bookkeeping begins anew

    def predicted(self, position: int) -> int:
        """How many tokens sequence ``position`` predicts, without reading it."""

    def sequence(self, position: int) -> tuple[Tokens, Tokens]:
        """Inputs and labels of one sequence: int64 [sequence_length] each.

        Raises:
            DataError: data.changed.
        """

    def close(self) -> None:
        """Close the files."""


def slots_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as slots of a block: largest remainders, the first of equal ones.

    Raises:
        DataError: data.weights: a data set would get less than one slot.
    """
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    shares = [BLOCK * weight / total for weight in exact]
    slots = [int(share) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda d: (slots[d] - shares[d], d))
    for d in by_rest[: BLOCK - sum(slots)]:
        slots[d] += 1
    if min(slots) == 0:
        raise DataError(
            "data.weights", f"a weight is less than a {BLOCK}th of all: leave that data set out"
        )
    return tuple(slots)


def check_apart(paths: Sequence[str]) -> None:
    """Whether each file belongs to one data set.

    Raises:
        DataError: data.weights: a file belongs to two; data.missing, data.empty.
    """
    owner: dict[str, str] = {}
    for path in paths:
        for file in find_files((path,)):
            other = owner.setdefault(str(file.resolve()), path)
            if other != path:
                raise DataError("data.weights", f"{file} is in two weighted data sets")


class Mixture:
    """The row of sequences of several data sets."""

    per_epoch = BLOCK

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float],
        *,
        sequence_length: int,
        seed: int,
        encoder: Encoder = BYTES,
    ) -> None:
        self._slots = slots_of(weights)
        self._seed = seed
        self._texts = [
            PackedText(
                corpus, sequence_length=sequence_length, seed=_seed_of(seed, d), encoder=encoder
            )
            for d, corpus in enumerate(corpora)
        ]
        self._block = lru_cache(maxsize=2)(self._drawn)  # a batch touches two at most

    def close(self) -> None:
        """Close the files."""
        for text in self._texts:
            text.close()

    def where(self, position: int) -> tuple[int, int]:
        """Which data set's sequence comes at a position, and which of its own it is."""
        block, index = divmod(position, BLOCK)
        owners, ranks = self._block(block)
        d = int(owners[index])
        return d, block * self._slots[d] + int(ranks[index])

    def predicted(self, position: int) -> int:
        """See Sequences."""
        d, own = self.where(position)
        return self._texts[d].predicted(own)

    def sequence(self, position: int) -> tuple[Tokens, Tokens]:
        """See Sequences."""
        d, own = self.where(position)
        return self._texts[d].sequence(own)

    def _drawn(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each place in a block: its data set, and how many of it stand before."""
        owners = np.repeat(np.arange(len(self._slots)), self._slots)
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, block, len(self._slots)]))
        owners = owners[np.argsort(bits.random_raw(BLOCK), kind="stable")]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for d, count in enumerate(self._slots):
            ranks[owners == d] = np.arange(count)
        return owners, ranks


def _seed_of(seed: int, d: int) -> int:
    """Data sets of the same size must not be walked in step."""
    digest = hashlib.sha256(f"minga/data-set/v1 {seed} {d}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sequences(
    corpora: Sequence[Corpus],
    weights: Sequence[float],
    *,
    sequence_length: int,
    seed: int,
    encoder: Encoder = BYTES,
) -> Sequences:
    """The row of a site: of one corpus, or of several with weights.

    Args:
        corpora: one for each weight, or a single one.
        weights: empty for a single one.
        sequence_length, seed, encoder: see ``PackedText``.

    Raises:
        DataError: data.weights.
    """
    if not weights:
        [corpus] = corpora
        return PackedText(corpus, sequence_length=sequence_length, seed=seed, encoder=encoder)
    return Mixture(corpora, weights, sequence_length=sequence_length, seed=seed, encoder=encoder)
