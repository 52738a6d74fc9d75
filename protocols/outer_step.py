"""The outer step: (model, state, integer sum, plan) -> (model, state), the same bits everywhere.

The coordinator publishes the integer sum S of a round; every node and every auditor applies this
function to it and compares digests. So nothing in it may depend on the machine: elementwise IEEE
float32 in a fixed order, factors rounded once from float64, statistics and scales in whole
numbers, no BLAS, no sums of floats, no library powers.

    mean = float32(S) * float32(float64(65536 / W) * 2**-e)       W: the metric ``weight``
    average     theta' = theta + lr * mean
    nesterov    g = -mean;  v' = mu * v + g;  theta' = theta - lr * (g + mu * v')
    flower:X    Flower's own strategy on the weighted mean of the models, see outer_flower.py

Work goes on in units of 4 MiB of theta, so that each unit is computed, hashed and written while it
is in the cache; memory is O(threads * unit). Tensors that the round did not exchange keep their
weights, buffers and scales bit for bit. Normative text: protocols/spec/vector.md, section 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import local
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from protocols.errors import (
    IntegrityError,
    ManifestMismatchError,
    NonFiniteUpdateError,
    WrappedSumError,
)
from protocols.identifiers import Digest
from protocols.outer_optimizers import Average, Float32, Nesterov, OuterOptimizer, optimizer_for
from protocols.plan import Outer, Scale
from protocols.tensors.layout import Run, VectorLayout
from protocols.tensors.manifest import Manifest
from protocols.tensors.metrics import decode_metrics
from protocols.tensors.ordered import ordered_map
from protocols.tensors.planar import PackedVector, Reader
from protocols.tensors.ring import Ring
from protocols.tensors.scales import Scales, next_scales
from protocols.tensors.sizes import BLOCK, CHUNK, UNIT, WEIGHT_ONE
from protocols.tensors.snapshot import STEPS, Snapshot
from protocols.tensors.units import digest_of_units
from protocols.tlog.merkle import leaf_hash

# (file, offset in bytes, bytes): ``theta`` or a buffer's name. Called once for every unit, in any
# order and from several threads; the bytes are only valid during the call.
Writer = Callable[[str, int, memoryview], None]
# An array (may be a mapped file), or ``read(offset, length)`` in bytes: then memory stays flat.
FloatSource = Float32 | Reader
SumReader = PackedVector | bytes | bytearray | memoryview | Callable[[int], NDArray[np.uint32]]

THETA = "theta"
_UNIT_COORDINATES = UNIT // 4

__all__ = [
    "THETA",
    "Average",
    "FloatSource",
    "Nesterov",
    "OuterOptimizer",
    "OuterResult",
    "Writer",
    "apply_outer_step",
    "next_snapshot",
    "optimizer_for",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterResult:
    """What an outer step made. Files went to the writer; here is what they are called."""

    theta_root: Digest | None  # None: the round exchanged no tensor, the model is as before
    buffer_roots: Mapping[str, Digest]
    unit_hashes: Mapping[str, tuple[bytes, ...]] = field(repr=False)  # of ``theta`` and buffers
    next_scales: Scales = field(repr=False)
    counters: Mapping[str, int]
    weight_sum_units: int  # W, sum of the survivors' weights, in units of 1/65536
    metrics: Mapping[str, int]  # sums over the survivors
    norm: float  # L2 norm of the mean update, in parameter units
    max_abs: int  # largest magnitude in S


def next_snapshot(before: Snapshot, result: OuterResult) -> Snapshot:
    """The snapshot that the next round starts from."""
    if result.theta_root is None:
        return replace(before, round=before.round + 1)
    return Snapshot(
        round=before.round + 1,
        manifest=before.manifest,
        theta=result.theta_root,
        buffers=dict(result.buffer_roots),
        scales=result.next_scales.digest,
        counters=dict(result.counters),
    )


def apply_outer_step(
    *,
    outer: Outer,
    scale_rule: Scale,
    layout: VectorLayout,
    manifest: Manifest,
    snapshot_counters: Mapping[str, int],
    theta: FloatSource,
    buffers: Mapping[str, FloatSource],
    scales: Scales,
    sum_reader: SumReader,
    ring: Ring,
    nodes: int,
    roster: int,
    writer: Writer,
    noisy: bool = False,
    threads: int = 1,
) -> OuterResult:
    """Apply the integer sum of a round to the model.

    Args:
        outer: the plan's optimizer.
        scale_rule: the plan's rule for scales.
        layout: of the round.
        manifest: of the model.
        snapshot_counters: counters of the snapshot that the round started from.
        theta: float32, shape [D], read only; an array, or a reader of its file, which keeps memory
            flat where the pages of a mapped file would count.
        buffers: outer buffers by name, as theta; missing ones are zeros.
        scales: those of the round.
        sum_reader: S as a packed vector (a buffer, or a PackedVector over a buffer or a reader), or
            a function from a chunk's index to its residues, uint32.
        ring: of the plan.
        nodes: number of survivors.
        roster: number of nodes in the plan; it fixes the clamp limit, known before the round.
        writer: receives the new files; see ``Writer``. Not called where nothing changes.
        noisy: the integers carry noise, so the clamp limit does not bound the sum.
        threads: units worked on at once. The bits do not depend on it.

    Returns:
        Names of the new files, the next scales, the decoded metrics.

    Raises:
        WrappedSumError: S is larger than ``nodes`` clamped vectors can make it (with noise: than
            0.9 * 2**(bits-1)), or a metric's limb or the weight is out of range.
        IntegrityError: the metric ``nodes`` is not the number of survivors.
        NonFiniteUpdateError: the next model would hold NaN or infinity.
        ManifestMismatchError: theta, a buffer, scales or the sum have another size.
        PlanRefusedError: see ``optimizer_for``.
    """
    optimizer = optimizer_for(outer)
    source = _sum_source(sum_reader, layout, ring)
    scales.check(manifest)
    state = {name: buffers.get(name) for name in optimizer.buffer_names}
    for name, array in ((THETA, theta), *state.items()):
        _check_size(name, array, manifest)
    metrics = _read_metrics(source, layout, nodes)
    if not layout.segments:
        return _at_rest(scales, snapshot_counters, metrics)
    job = _Job(
        optimizer=optimizer,
        layout=layout,
        manifest=manifest,
        theta=theta,
        buffers=state,
        scales=scales,
        source=source,
        limit=ring.noisy_limit() if noisy else nodes * ring.clamp_limit(roster),
        counters=snapshot_counters,
        metrics=metrics,
        weight=_check_weight(metrics, nodes),
        writer=writer,
    )
    return job.run(partial(_following, scale_rule, ring, roster, layout, scales), threads)


def _following(
    rule: Scale,
    ring: Ring,
    roster: int,
    layout: VectorLayout,
    scales: Scales,
    *,
    squares: Mapping[int, int],
    weight: int,
) -> Scales:
    if rule.mode == "fixed":
        return scales
    return next_scales(
        squares,
        weight,
        scales,
        layout,
        k_permille=rule.k_permille,
        floor=rule.floor,
        ring=ring,
        nodes=roster,
    )


def _check_size(name: str, array: FloatSource | None, manifest: Manifest) -> None:
    if array is None or callable(array):  # a reader's size is checked unit by unit
        return
    if array.dtype != np.float32 or array.shape != (manifest.coordinates,):
        raise ManifestMismatchError(
            f"{name} is {array.dtype} of shape {list(array.shape)}; the manifest has"
            f" {manifest.coordinates} float32"
        )


def _at_rest(scales: Scales, counters: Mapping[str, int], metrics: dict[str, int]) -> OuterResult:
    """The result of a round that exchanged metrics only."""
    return OuterResult(
        theta_root=None,
        buffer_roots={},
        unit_hashes={},
        next_scales=scales,
        counters=dict(counters),
        weight_sum_units=metrics.get("weight", 0),
        metrics=metrics,
        norm=0.0,
        max_abs=0,
    )


def _read_metrics(source: _SumSource, layout: VectorLayout, nodes: int) -> dict[str, int]:
    limbs = np.empty(layout.coordinates - layout.model_coordinates, np.int32)
    source.read_centred(layout.model_coordinates, layout.coordinates, limbs)
    metrics = decode_metrics(limbs, layout.metrics, nodes=nodes)
    if metrics.get("nodes", nodes) != nodes:
        raise IntegrityError(
            f"the sum counts {metrics['nodes']} nodes, but {nodes} survived: one is missing, a"
            " stranger, or counted twice"
        )
    return metrics


def _check_weight(metrics: Mapping[str, int], nodes: int) -> int:
    if "weight" not in metrics:
        raise ValueError("a layout that exchanges tensors needs the metric weight")
    weight = metrics["weight"]
    if not nodes <= weight <= nodes * WEIGHT_ONE:
        raise WrappedSumError(f"the weights of {nodes} nodes cannot sum to {weight} units")
    return weight


class _SumSource(Protocol):
    def read_centred(self, start: int, stop: int, out: NDArray[np.int32]) -> None: ...


class _ChunkSource:
    """Centred coordinates from a function that gives whole chunks of residues."""

    def __init__(
        self, chunk: Callable[[int], NDArray[np.uint32]], layout: VectorLayout, ring: Ring
    ) -> None:
        self._chunk, self._layout, self._ring = chunk, layout, ring
        self._last = local()  # the latest chunk of each thread

    def read_centred(self, start: int, stop: int, out: NDArray[np.int32]) -> None:
        at = start
        while at < stop:
            index = at // CHUNK
            begin, end = self._layout.chunk(index)
            if getattr(self._last, "index", None) != index:
                self._last.residues, self._last.index = self._chunk(index), index
            residues = self._last.residues
            if residues.dtype != np.uint32 or residues.shape != (end - begin,):
                raise ManifestMismatchError(f"chunk {index} of the sum has another size")
            cut = min(stop, end)
            self._ring.centre(residues[at - begin : cut - begin], out[at - start : cut - start])
            at = cut


def _sum_source(reader: SumReader, layout: VectorLayout, ring: Ring) -> _SumSource:
    if isinstance(reader, PackedVector):
        if (reader.coordinates, reader.ring) != (layout.coordinates, ring):
            raise ManifestMismatchError("the packed sum has another size or ring than the round")
        return reader
    if callable(reader):
        return _ChunkSource(reader, layout, ring)
    return PackedVector(reader, layout.coordinates, ring)


class _Scratch:
    """Working memory of one thread."""

    def __init__(self, size: int, tile: int, names: tuple[str, ...]) -> None:
        self.out = {name: np.empty(size, np.float32) for name in names}
        self.sums = np.empty(BLOCK, np.int32)
        self.wide = np.empty(BLOCK, np.int64)
        self.mean = np.empty(min(size, tile), np.float32)


class _UnitDone(NamedTuple):
    hashes: dict[str, bytes]
    squares: dict[int, int]  # by block: exact sum of S**2 over the part in this unit
    max_abs: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The arguments that every unit shares."""

    optimizer: OuterOptimizer
    layout: VectorLayout
    manifest: Manifest
    theta: FloatSource
    buffers: Mapping[str, FloatSource | None]
    scales: Scales
    source: _SumSource
    limit: int
    counters: Mapping[str, int]
    metrics: Mapping[str, int]
    weight: int  # W, units
    writer: Writer

    @cached_property
    def factors(self) -> Float32:
        """What one step of S is worth in the mean, for each block of the manifest."""
        quotient = np.float64(WEIGHT_ONE) / np.float64(self.weight)
        exponents = -self.scales.exponents.astype(np.int32)
        return np.ldexp(quotient, exponents).astype(np.float32)

    @property
    def steps(self) -> int:
        return self.counters.get(STEPS, 0)

    def scratch(self) -> _Scratch:
        size = min(_UNIT_COORDINATES, self.manifest.coordinates)
        return _Scratch(size, self.optimizer.tile, (THETA, *self.buffers))

    def run(self, following: Callable[..., Scales], threads: int) -> OuterResult:
        """All units, then what follows from the whole."""
        units = -(-self.manifest.coordinates // _UNIT_COORDINATES)
        hashes: dict[str, list[bytes]] = {name: [] for name in (THETA, *self.buffers)}
        squares: dict[int, int] = {}
        max_abs = 0
        for done in ordered_map(self.unit, units, self.scratch, threads=threads):
            for name, digest in done.hashes.items():
                hashes[name].append(digest)
            for block, part in done.squares.items():
                squares[block] = squares.get(block, 0) + part
            max_abs = max(max_abs, done.max_abs)
        roots = {name: digest_of_units(list_) for name, list_ in hashes.items()}
        return OuterResult(
            theta_root=roots.pop(THETA),
            buffer_roots=roots,
            unit_hashes={name: tuple(list_) for name, list_ in hashes.items()},
            next_scales=following(squares=squares, weight=self.weight),
            counters={**self.counters, STEPS: self.steps + 1},
            weight_sum_units=self.weight,
            metrics=self.metrics,
            norm=_norm(squares, self.scales, self.weight),
            max_abs=max_abs,
        )

    def unit(self, index: int, scratch: _Scratch) -> _UnitDone:
        """Compute, hash and write one unit of theta and of every buffer."""
        begin = index * _UNIT_COORDINATES
        end = min(begin + _UNIT_COORDINATES, self.manifest.coordinates)
        out = {name: array[: end - begin] for name, array in scratch.out.items()}
        theta = _load(THETA, self.theta, begin, end)
        for name, old in self.buffers.items():
            np.copyto(out[name], 0.0 if old is None else _load(name, old, begin, end))
        squares: dict[int, int] = {}
        max_abs, done = 0, begin
        # Overflow and NaN are looked for in the result; warnings would only repeat it.
        with np.errstate(all="ignore"):
            for run in self.layout.runs(begin, end):
                rest = slice(done - begin, run.theta_start - begin)
                np.copyto(out[THETA][rest], theta[rest])
                top = self._step(run, begin, theta, out=out, squares=squares, scratch=scratch)
                max_abs = max(max_abs, top)
                done = run.theta_stop
        np.copyto(out[THETA][done - begin :], theta[done - begin :])
        hashes = {}
        for name, array in out.items():
            view = array.data.cast("B")
            hashes[name] = leaf_hash(view)
            self.writer(name, 4 * begin, view)
        return _UnitDone(hashes, squares, max_abs)

    def _step(
        self,
        run: Run,
        begin: int,
        theta: Float32,
        *,
        out: Mapping[str, Float32],
        squares: dict[int, int],
        scratch: _Scratch,
    ) -> int:
        """Step the coordinates of a run from ``theta`` into ``out``, both a unit that begins at
        ``begin``; returns the largest |S|."""
        max_abs = 0
        for at in range(run.theta_start, run.theta_stop, self.optimizer.tile):
            stop = min(at + self.optimizer.tile, run.theta_stop)
            mean = scratch.mean[: stop - at]
            first = run.start + at - run.theta_start
            max_abs = max(max_abs, self._mean(first, mean, squares, scratch))
            part = slice(at - begin, stop - begin)
            self.optimizer.step(
                theta=theta[part],
                mean=mean,
                out=out[THETA][part],
                buffers={name: out[name][part] for name in self.buffers},
                steps=self.steps,
                weight=self.weight / WEIGHT_ONE,
            )
            self._refuse_non_finite(out[THETA][part], at)
        return max_abs

    def _mean(self, first: int, mean: Float32, squares: dict[int, int], scratch: _Scratch) -> int:
        """The mean update from vector coordinate ``first`` on; adds to ``squares``; max |S|."""
        top = 0
        for block, lo, hi, _ in self.layout.pieces(first, first + mean.size):
            sums, wide = scratch.sums[: hi - lo], scratch.wide[: hi - lo]
            self.source.read_centred(lo, hi, sums)
            top = max(top, int(sums.max()), -int(sums.min()))
            if top > self.limit:
                raise WrappedSumError(
                    f"the sum of tensor {self.layout.tensor_at(lo)} reaches {top}; the survivors'"
                    f" clamped updates reach at most {self.limit}"
                )
            np.copyto(wide, sums)
            # In int64, so exact in any order: at most 2**46 each, 2**62 over a block.
            squares[block] = squares.get(block, 0) + int(np.einsum("i,i->", wide, wide))
            part = mean[lo - first : hi - first]
            np.copyto(part, sums, casting="unsafe")  # exact: |S| < 2**23
            np.multiply(part, self.factors[block], out=part)
        return top

    def _refuse_non_finite(self, new: Float32, start: int) -> None:
        if not (np.isfinite(new.max()) and np.isfinite(new.min())):
            bad = start + int(np.flatnonzero(~np.isfinite(new))[0])
            name = self.manifest.tensor_at(bad)
            raise NonFiniteUpdateError(f"the next model would hold NaN or infinity in {name}")


def _load(name: str, source: FloatSource, begin: int, end: int) -> Float32:
    """Coordinates [begin, end) of theta or a buffer."""
    if not callable(source):
        return np.asarray(source[begin:end])
    data = np.frombuffer(source(4 * begin, 4 * (end - begin)), np.float32)
    if data.size != end - begin:
        raise ManifestMismatchError(f"{name} is shorter than the manifest says")
    return data


def _norm(squares: Mapping[int, int], scales: Scales, weight: int) -> float:
    """L2 norm of the mean, from exact integers: one rounding for the sum, one for the root."""
    exponents = {block: int(scales.exponents[block]) for block in squares}
    top = max(exponents.values())
    total = sum(value << 2 * (top - exponents[block]) for block, value in squares.items())
    return math.ldexp(math.sqrt(total), -top) * (WEIGHT_ONE / weight)
