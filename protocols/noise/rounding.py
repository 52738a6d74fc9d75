"""Rounding by chance, until the rounded update is as short as it must be.

A clipped update of norm C, scaled by s and rounded by chance, may come out longer than s * C. The
noise hides one institution only if no update is longer than the noise was made for. So the norm of
the *integers* is measured, exactly, and the dither drawn again until it is within the bound. The
sensitivity is then a fact about whole numbers, whatever floats did before.

Draw j takes its dither from HKDF-Expand(root, label || j): the same root gives the same bytes after
a crash. With the bound of ``policies.privacy.sensitivity`` a draw fails with probability at most
exp(-1/2), and in practice almost never. How many draws were needed depends on the update and stays
inside the node.

Source: Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", ICML 2021, Theorem 1 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray

from protocols.errors import CorruptStateError, MalformedMessageError
from protocols.noise.streams import SEED_BYTES
from protocols.tensors import EncodeReport, Ring, Scales, VectorLayout, encode_vector
from protocols.tensors.encode import Noise
from protocols.tensors.planar import LaneAdder
from protocols.tensors.sizes import WEIGHT_ONE

# exp(-1/2) ** 128 = 2e-28: an update that fails so often was not clipped to this bound.
MOST_DRAWS: Final = 128
_LABEL = b"minga/conditional-rounding/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedDraw:
    """A dither under which the integers are short enough. Private: never leaves the node."""

    draw: int = field(repr=False)  # from 0
    seed: bytes = field(repr=False)  # 32 bytes, for ``encode_vector``
    sum_squares: int = field(repr=False)  # of the integers, before noise
    max_squares: int  # the bound it was held to


def draw_seed(root: bytes, draw: int) -> bytes:
    """The dither seed of one draw, 32 bytes."""
    if len(root) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes")
    info = _LABEL + draw.to_bytes(4, "big")
    return HKDFExpand(algorithm=SHA256(), length=SEED_BYTES, info=info).derive(root)


def find_draw(root: bytes, max_squares: int, measure: Callable[[bytes], int]) -> AcceptedDraw:
    """The first draw whose integers have a sum of squares of at most ``max_squares``.

    Args:
        root: 32 secret bytes, fresh for each attempt and used for nothing else.
        max_squares: D2 squared, of ``IntegerSensitivity``.
        measure: the exact sum of squares of the integers under a dither seed.

    Raises:
        MalformedMessageError: no draw was short enough: the clip norm, the scales and the bound do
            not belong together. Nothing may be sent; there is no fallback.
    """
    if max_squares < 0:
        raise ValueError("the bound must not be negative")
    for draw in range(MOST_DRAWS):
        seed = draw_seed(root, draw)
        squares = measure(seed)
        if squares <= max_squares:
            return AcceptedDraw(draw=draw, seed=seed, sum_squares=squares, max_squares=max_squares)
    raise MalformedMessageError(
        f"the rounded update is longer than the noise allows in each of {MOST_DRAWS} draws;"
        " nothing was sent"
    )


def encode_bounded(
    delta: NDArray[np.float32],
    layout: VectorLayout,
    scales: Scales,
    *,
    root: bytes,
    max_squares: int,
    clip_factor: float,
    metrics: Mapping[str, int],
    ring: Ring,
    limit: int,
    sink: Callable[[bytes], None],
    noise: Noise,
    mask_adder: LaneAdder,
    weight_units: int = WEIGHT_ONE,
    threads: int = 1,
) -> EncodeReport:
    """``encode_vector`` under a dither whose integers were checked, with noise and masks.

    Arguments as there; ``noise`` and ``mask_adder`` are not optional here. ``weight_units`` must be
    public and fixed: a weight that follows from the data is not covered by the noise.

    **What is in ``sink`` counts only if this returns**: the second pass reads the update again and
    measures it again, because a mapped file can change between two passes. Metrics carry no noise:
    only those that are public anyway may hold more than zeros.

    Raises:
        MalformedMessageError: as ``find_draw``, and as ``encode_vector``.
        CorruptStateError: the update changed while it was encoded.
        NonFiniteUpdateError, ManifestMismatchError: as ``encode_vector``.
    """

    def run(
        seed: bytes,
        into: Callable[[bytes], None],
        add: Noise | None,
        masks: LaneAdder | None,
    ) -> EncodeReport:
        return encode_vector(
            delta,
            layout,
            scales,
            weight_units=weight_units,
            clip_factor=clip_factor,
            metrics=metrics,
            seed=seed,
            ring=ring,
            limit=limit,
            sink=into,
            mask_adder=masks,
            noise=add,
            measure_squares=True,
            count_clamped=False,
            threads=threads,
        )

    accepted = find_draw(root, max_squares, lambda seed: _squares(run(seed, _drop, None, None)))
    report = run(accepted.seed, sink, noise, mask_adder)
    if _squares(report) != accepted.sum_squares:
        raise CorruptStateError("the update changed while it was encoded; nothing may be sent")
    return replace(report, sum_squares=None)  # private, and nobody needs it any more


def _drop(data: bytes) -> None:
    """The sink of a pass that only measures."""
    del data


def _squares(report: EncodeReport) -> int:
    if report.sum_squares is None:
        raise ValueError("the sum of squares was not asked for")
    return report.sum_squares
