"""From an update to packed integers: scale, clip, weigh, round by chance, clamp, mask, pack.

    v = x * 2**e          x is float32(delta * float32(weight * clip_factor)), e the block's scale
    v = clamp(v, -Q, Q)   and count it
    q = floor(v) + (u < 65536 * (v - floor(v)))      u: uint16 from the dither stream
    lane = q [+ noise] [+ masks] modulo 2**bits      then packed, chunk by chunk

Rounding is unbiased to 2**-16 of a step and leaves grid points alone. All scratch is allocated
once; work goes on in tiles that stay in the cache. Same arguments, same bytes, for any ``threads``.
Normative text: protocols/spec/vector.md, sections 3 to 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from protocols.errors import ManifestMismatchError, NonFiniteUpdateError
from protocols.tensors.layout import VectorLayout
from protocols.tensors.metrics import METRIC_BOUND, encode_metrics
from protocols.tensors.ordered import ordered_map
from protocols.tensors.planar import LaneAdder, PackScratch, pack_into
from protocols.tensors.ring import Ring
from protocols.tensors.scales import Scales
from protocols.tensors.sizes import CHUNK, WEIGHT_ONE

_TILE = 2**16  # coordinates: a tile and its scratch fit the second-level cache
_DITHER = 2  # bytes per coordinate
_CLIP_SLACK = 1.0 - 2.0**-20  # float32 rounding after the clip must not lift the norm above C

Noise = Callable[[int, int, NDArray[np.int32]], None]  # (chunk index, first coordinate, integers)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeReport:
    """What was encoded."""

    coordinates: int  # of the vector, with metrics
    clamped: int  # model coordinates that hit the limit
    sum_squares: int | None  # of the rounded model integers, before noise; when asked for
    metrics: Mapping[str, int] = field(repr=False)  # as encoded, with ``clamped`` filled in


def weight_units(tokens: int, cap_tokens: int | None) -> int:
    """A site's weight in units of 1/65536: 65,536 without a cap, else in proportion to the capped
    token count, rounded down, but at least 1."""
    if cap_tokens is None:
        return WEIGHT_ONE
    if tokens < 0 or cap_tokens < 1:
        raise ValueError("token counts are not negative, and a cap is at least 1")
    return max(1, min(tokens, cap_tokens) * WEIGHT_ONE // cap_tokens)


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What an update is multiplied by so that its L2 norm is at most ``clip_norm``.

    ====================  ==================================
    Case                  Result
    ====================  ==================================
    no clip               1.0
    zero norm             1.0
    norm is not finite    ValueError: check_finite comes first
    otherwise             min(1, clip_norm / norm) * (1 - 2**-20)
    ====================  ==================================
    """
    if not math.isfinite(norm) or norm < 0:
        raise ValueError("the norm must be finite and not negative")
    if clip_norm is None or norm == 0.0:
        return 1.0
    return min(1.0, clip_norm / norm) * _CLIP_SLACK


def check_finite(delta: NDArray[np.float32], layout: VectorLayout) -> float:
    """Look at every coordinate of an update; return its L2 norm, computed in float64.

    Args:
        delta: float32, shape [layout.model_coordinates], may be a mapped file.

    Raises:
        NonFiniteUpdateError: NaN or infinity; names the tensor.
        ManifestMismatchError: another number of coordinates.
    """
    _check_shape(delta, layout)
    plain, wide, total = np.asarray(delta), np.empty(_TILE, np.float64), 0.0
    for start in range(0, layout.model_coordinates, _TILE):
        part = plain[start : start + _TILE]
        tile = wide[: part.size]
        np.copyto(tile, part)
        np.multiply(tile, tile, out=tile)
        squares = float(tile.sum())
        if not math.isfinite(squares):
            _refuse_non_finite(part, start, layout)
        total += squares
    return math.sqrt(total)


def _check_shape(delta: NDArray[np.float32], layout: VectorLayout) -> None:
    if delta.dtype != np.float32 or delta.shape != (layout.model_coordinates,):
        raise ManifestMismatchError(
            f"the update is {delta.dtype} of shape {list(delta.shape)}; the round exchanges"
            f" float32 of {layout.model_coordinates} coordinates"
        )


def _refuse_non_finite(part: NDArray[np.float32], start: int, layout: VectorLayout) -> None:
    bad = np.flatnonzero(~np.isfinite(part))
    if bad.size:
        name = layout.tensor_at(start + int(bad[0]))
        raise NonFiniteUpdateError(
            f"the update of tensor {name} holds NaN or infinity; nothing was sent"
        )


def _keystream(seed: bytes, start_coordinate: int) -> CipherContext:
    """AES-256-CTR whose next byte is byte ``2 * start_coordinate`` of the stream."""
    if len(seed) != 32:
        raise ValueError("a dither seed has 32 bytes")
    block, skip = divmod(_DITHER * start_coordinate, 16)
    counter = modes.CTR(block.to_bytes(16, "big"))
    stream = Cipher(algorithms.AES(seed), counter).encryptor()
    if skip:
        stream.update(bytes(skip))
    return stream


def dither_stream(seed: bytes, start_coordinate: int, count: int) -> bytes:
    """Two random bytes for each of ``count`` coordinates: AES-256-CTR, counter from 0, seekable.

    Args:
        seed: 32 secret bytes, fresh for every attempt and used for nothing else.
        start_coordinate: first coordinate of the vector.
        count: coordinates.

    Returns:
        2 * count bytes; coordinate i has the little-endian uint16 at byte 2 * i of the stream.
    """
    return _keystream(seed, start_coordinate).update(bytes(_DITHER * count))


class _Scratch:
    """All working memory of one encoding thread."""

    def __init__(self, chunk: int, ring: Ring) -> None:
        tile = min(_TILE, max(chunk, 1))
        self.value = np.empty(tile, np.float32)
        self.floor = np.empty(tile, np.float32)
        self.dither = np.empty(tile, np.float32)
        self.up = np.empty(tile, np.bool_)
        self.wide = np.empty(0, np.int64)  # allocated when squares are asked for
        self.zeros = bytes(_DITHER * tile)
        self.stream = bytearray(_DITHER * tile + 15)  # update_into wants a spare block
        self.lanes = np.empty(chunk, np.int32)
        self.packed = np.empty(ring.bytes_per_chunk(chunk), np.uint8)
        self.pack = PackScratch(chunk)


def _inside(value: NDArray[np.float32], limit: int) -> bool:
    """Whether all values are within the limit; false for NaN."""
    return not value.size or bool(value.max() <= limit and value.min() >= -limit)


def _round_tile(
    value: NDArray[np.float32],
    dither: NDArray[np.uint16],
    limit: int | None,
    out: NDArray[np.int32],
    scratch: _Scratch,
) -> int:
    """Clamp (unless ``limit`` is None) and round scaled values, no NaN among them.

    Destroys ``value``. Returns how many were beyond the limit.
    """
    clamped = 0
    if limit is not None:
        clamped = int(np.count_nonzero(value > limit) + np.count_nonzero(value < -limit))
        np.clip(value, -limit, limit, out=value)
    m = value.size
    floor, uniform, up = scratch.floor[:m], scratch.dither[:m], scratch.up[:m]
    np.floor(value, out=floor)
    np.subtract(value, floor, out=value)  # exact, or 1.0 for a tiny negative value: rounds to 0
    np.multiply(value, np.float32(65536), out=value)
    np.copyto(uniform, dither)
    np.less(uniform, value, out=up)
    np.copyto(out, floor, casting="unsafe")
    np.add(out, up, out=out)
    return clamped


def stochastic_round(
    x_m: NDArray[np.float32],
    exponent: int | NDArray[np.integer],
    dither: bytes,
    limit: int,
) -> tuple[NDArray[np.int32], int]:
    """Round ``x * 2**exponent`` to a neighbouring integer by chance, clamped to +-limit.

    Args:
        x_m: float32, shape [m], finite.
        exponent: of the scale, one for all or one for each coordinate.
        dither: 2 * m random bytes.
        limit: largest magnitude kept, at most 2**23 - 1 (float32 holds it exactly).

    Returns:
        int32, shape [m], in [-limit, limit], and the number of coordinates beyond the limit.

    Guarantees:
        * an integer value within the limit is kept, whatever the dither;
        * otherwise the result is floor or ceiling, and its mean over the dither is above the value
          by less than 2**-16.

    Raises:
        NonFiniteUpdateError: NaN or infinity.
    """
    m = x_m.size
    if len(dither) != _DITHER * m:
        raise ValueError(f"{m} coordinates need {_DITHER * m} bytes of dither")
    if not 1 <= limit < 2**23:
        raise ValueError("the limit must be 1 to 2**23 - 1")
    if not np.isfinite(x_m).all():
        raise NonFiniteUpdateError("the values to round hold NaN or infinity")
    with np.errstate(over="ignore"):  # beyond float32 is beyond the limit
        value = np.ldexp(x_m.astype(np.float32, copy=False), exponent)
    out = np.empty(m, np.int32)
    scratch, clamped = _Scratch(min(m, _TILE), Ring(16)), 0
    uniform = np.frombuffer(dither, "<u2")
    for start in range(0, m, _TILE):
        cut = slice(start, start + _TILE)
        clamped += _round_tile(value[cut], uniform[cut], limit, out[cut], scratch)
    return out, clamped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """The arguments that every chunk shares."""

    delta: NDArray[np.float32]
    layout: VectorLayout
    multipliers: NDArray[np.float32]  # of each block of the manifest
    metrics: Mapping[str, int]
    seed: bytes = field(repr=False)
    ring: Ring
    limit: int
    mask_adder: LaneAdder | None
    noise: Noise | None
    measure_squares: bool
    count_clamped: bool

    def scratch(self) -> _Scratch:
        return _Scratch(min(CHUNK, self.layout.coordinates), self.ring)

    def chunk(self, index: int, scratch: _Scratch, clamped_before: int = 0) -> _Encoded:
        """Encode one chunk. ``clamped_before`` counts over all earlier chunks, and matters only
        where the chunk holds metrics."""
        start, stop = self.layout.chunk(index)
        model = self.layout.model_coordinates
        middle = min(max(model, start), stop)
        lanes = scratch.lanes[: stop - start]
        clamped, squares = self._model_part(start, middle, scratch)
        if middle < stop:
            values = self.counted(clamped_before + clamped)
            limbs = encode_metrics(values, self.layout.metrics)
            np.copyto(lanes[middle - start :], limbs[middle - model : stop - model])
        if self.noise is not None and start < middle:
            self.noise(index, start, lanes[: middle - start])
        if self.mask_adder is not None:
            self.mask_adder(index, start, lanes.view(np.uint32))
        packed = scratch.packed[: self.ring.bytes_per_chunk(stop - start)]
        pack_into(lanes, self.ring, packed, scratch.pack)
        return _Encoded(packed.tobytes(), clamped, squares)

    def counted(self, clamped: int) -> dict[str, int]:
        """The metrics with ``clamped`` filled in, where the layout has it."""
        values = dict(self.metrics)
        if "clamped" in self.layout.metrics and self.count_clamped:
            values["clamped"] = min(clamped, METRIC_BOUND - 1)
        return values

    def _model_part(self, start: int, stop: int, scratch: _Scratch) -> tuple[int, int]:
        """Round model coordinates [start, stop) into the lanes; (clamped, sum of squares)."""
        stream = _keystream(self.seed, start)
        clamped = squares = 0
        for begin in range(start, stop, _TILE):
            m = min(_TILE, stop - begin)
            value = scratch.value[:m]
            with np.errstate(over="ignore", invalid="ignore"):
                for block, lo, hi, _ in self.layout.pieces(begin, begin + m):
                    part = value[lo - begin : hi - begin]
                    np.multiply(self.delta[lo:hi], self.multipliers[block], out=part)
            outside = not _inside(value, self.limit)
            if outside:  # or NaN
                _refuse_non_finite(self.delta[begin : begin + m], begin, self.layout)
            stream.update_into(memoryview(scratch.zeros)[: _DITHER * m], scratch.stream)
            dither = np.frombuffer(scratch.stream, "<u2", m)
            out = scratch.lanes[begin - start : begin - start + m]
            clamped += _round_tile(value, dither, self.limit if outside else None, out, scratch)
            if self.measure_squares:
                squares += _sum_squares(out, scratch)
        return clamped, squares


class _Encoded(NamedTuple):
    data: bytes
    clamped: int
    squares: int


def _sum_squares(integers: NDArray[np.int32], scratch: _Scratch) -> int:
    """Exact: 2**16 squares below 2**46 stay below 2**62."""
    if scratch.wide.size < integers.size:
        scratch.wide = np.empty(_TILE, np.int64)
    wide = scratch.wide[: integers.size]
    np.copyto(wide, integers)
    np.multiply(wide, wide, out=wide)
    return int(wide.sum())


def encode_vector(
    delta: NDArray[np.float32],
    layout: VectorLayout,
    scales: Scales,
    *,
    weight_units: int,
    clip_factor: float,
    metrics: Mapping[str, int],
    seed: bytes,
    ring: Ring,
    limit: int,
    sink: Callable[[bytes], None],
    mask_adder: LaneAdder | None = None,
    noise: Noise | None = None,
    measure_squares: bool = False,
    count_clamped: bool = True,
    threads: int = 1,
) -> EncodeReport:
    """Encode an update and its metrics; hand the packed chunks to ``sink`` in order.

    Args:
        delta: float32, shape [layout.model_coordinates], the selected coordinates in manifest
            order; may be a mapped file. In parameter units.
        layout: of the round.
        scales: of the manifest.
        weight_units: 1 to 65,536; the weight is this over 65,536.
        clip_factor: above 0, at most 1; from the function of that name.
        metrics: of the site, whole numbers; ``clamped`` is filled in here, whatever is given.
        seed: 32 secret bytes for the dither, fresh for each attempt and used for nothing else.
        ring: of the plan.
        limit: ``ring.clamp_limit(roster size)``, or less where noise needs room.
        sink: gets one packed chunk at a time.
        mask_adder: called with (chunk index, first coordinate, uint32 lanes); adds in place, over
            model and metrics, before the reduction modulo 2**bits. Called from several threads at
            once when ``threads`` > 1, and not in order.
        noise: called likewise with the int32 integers of the chunk's model coordinates only; adds
            in place. Metrics carry no noise.
        measure_squares: also report the exact sum of squares of the rounded model integers. With a
            ``sink`` that drops the bytes this is the look ahead that conditional rounding needs.
        count_clamped: false sends ``clamped`` as given: no noise covers a count of the update.
        threads: chunks worked on at once; memory is O(threads * chunk).

    Raises:
        NonFiniteUpdateError: NaN or infinity; names the tensor.
        ManifestMismatchError: delta or scales do not fit the layout.
        MalformedMessageError: a metric is missing, unknown or out of range.
    """
    _check_shape(delta, layout)
    if not 1 <= weight_units <= WEIGHT_ONE or not 0.0 < clip_factor <= 1.0:
        raise ValueError("weight_units must be 1 to 65536, clip_factor above 0 and at most 1")
    if not 1 <= limit < 1 << (ring.bits - 1) or len(seed) != 32:
        raise ValueError("the limit must fit half the ring, and the seed has 32 bytes")
    job = _Job(
        delta=np.asarray(delta),  # a memmap's slices are slow
        layout=layout,
        multipliers=scales.multipliers(weight_units / WEIGHT_ONE * clip_factor, layout),
        metrics=metrics,
        seed=seed,
        ring=ring,
        limit=limit,
        mask_adder=mask_adder,
        noise=noise,
        measure_squares=measure_squares,
        count_clamped=count_clamped,
    )
    encode_metrics(job.counted(0), layout.metrics)  # refuse bad metrics before any work

    # Chunks that hold model coordinates alone, in parallel; then those with metrics, one by one,
    # because the metric ``clamped`` counts over all of the model.
    clamped = squares = 0
    pure = layout.model_coordinates // CHUNK
    for done in ordered_map(job.chunk, pure, job.scratch, threads=threads):
        clamped, squares = clamped + done.clamped, squares + done.squares
        sink(done.data)
    scratch = job.scratch()
    for index in range(pure, layout.chunk_count):
        done = job.chunk(index, scratch, clamped)
        clamped, squares = clamped + done.clamped, squares + done.squares
        sink(done.data)
    return EncodeReport(
        coordinates=layout.coordinates,
        clamped=clamped,
        sum_squares=squares if measure_squares else None,
        metrics=job.counted(clamped),
    )
