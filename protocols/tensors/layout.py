"""The layout of the exchanged vector: which coordinate of it is what.

    coordinate  0 ........... model_coordinates ........ coordinates
                selected tensors, manifest order | metrics, 6 limbs each
                chunk 0 | chunk 1 | ... | last chunk (may be short, holds both)

A round exchanges the tensors its plan selects, so a coordinate has two addresses: one in theta and
one in the vector. Scale blocks are counted over the whole manifest, so that a tensor which rests
for a round finds its scales untouched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

from protocols.tensors.manifest import Manifest, Segment
from protocols.tensors.ring import Ring, packed_size
from protocols.tensors.sizes import BLOCK, CHUNK, LIMBS


class Block(NamedTuple):
    """Coordinates under one scale, or the part of them that lies in a range asked for."""

    number: int  # among the blocks of the manifest
    start: int  # in the vector
    stop: int
    theta_start: int  # in theta


class Run(NamedTuple):
    """Selected coordinates that follow each other both in theta and in the vector."""

    theta_start: int
    theta_stop: int
    start: int  # in the vector


@dataclass(frozen=True)
class VectorLayout:
    """Selected segments, in ascending order, then the metrics of a round."""

    segments: tuple[Segment, ...]
    metrics: tuple[str, ...]

    def __post_init__(self) -> None:
        for left, right in pairwise(self.segments):
            if not left.stop <= right.start:
                raise ValueError("segments must be ascending and must not overlap")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("a metric is named twice")

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        select: Sequence[str] | Literal["all", "none"],
        metrics: Sequence[str],
    ) -> VectorLayout:
        """The layout of a round. Raises: as ``Manifest.select``."""
        return cls(manifest.select(select), tuple(metrics))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Where each segment begins in the vector, and where the model part ends."""
        starts = [0]
        for segment in self.segments:
            starts.append(starts[-1] + segment.coordinates)
        return tuple(starts)

    @cached_property
    def _theta_starts(self) -> tuple[int, ...]:
        return tuple(segment.start for segment in self.segments)

    @property
    def model_coordinates(self) -> int:
        """Selected coordinates of the model."""
        return self._starts[-1]

    @property
    def coordinates(self) -> int:
        """d, all coordinates of the vector."""
        return self.model_coordinates + LIMBS * len(self.metrics)

    @property
    def chunk_count(self) -> int:
        """Number of packed chunks."""
        return -(-self.coordinates // CHUNK)

    @property
    def block_count(self) -> int:
        """Number of scale blocks of the selected tensors."""
        return sum(-(-segment.coordinates // BLOCK) for segment in self.segments)

    def packed_size(self, ring: Ring) -> int:
        """Bytes of the packed vector."""
        return packed_size(self.coordinates, ring)

    def chunk(self, index: int) -> tuple[int, int]:
        """First coordinate of a chunk, and one past its last."""
        if not 0 <= index < self.chunk_count:
            raise IndexError(f"chunk {index} of {self.chunk_count}")
        return index * CHUNK, min((index + 1) * CHUNK, self.coordinates)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(index, start, stop) of every chunk."""
        for index in range(self.chunk_count):
            yield (index, *self.chunk(index))

    def blocks(self) -> Iterator[Block]:
        """Every scale block of the selected tensors."""
        return self.pieces(0, self.model_coordinates)

    def pieces(self, start: int, stop: int) -> Iterator[Block]:
        """The parts of scale blocks that lie in vector coordinates [start, stop).

        Coordinates of metrics belong to no block and are left out.
        """
        stop = min(stop, self.model_coordinates)
        at = bisect_right(self._starts, start) - 1
        while start < stop:
            segment, base = self.segments[at], self._starts[at]
            end = min(stop, self._starts[at + 1])
            while start < end:
                block = (start - base) // BLOCK
                cut = min(end, base + (block + 1) * BLOCK)
                theta = segment.start + start - base
                yield Block(segment.first_block + block, start, cut, theta)
                start = cut
            at += 1

    def runs(self, theta_start: int, theta_stop: int) -> Iterator[Run]:
        """The selected parts of theta coordinates [theta_start, theta_stop), joined where they
        touch."""
        at = max(0, bisect_right(self._theta_starts, theta_start) - 1)
        waiting: Run | None = None
        for index in range(at, len(self.segments)):
            segment = self.segments[index]
            if segment.start >= theta_stop:
                break
            begin, end = max(theta_start, segment.start), min(theta_stop, segment.stop)
            if begin >= end:
                continue
            if waiting is not None and waiting.theta_stop == begin:
                waiting = waiting._replace(theta_stop=end)
                continue
            if waiting is not None:
                yield waiting
            waiting = Run(begin, end, self._starts[index] + begin - segment.start)
        if waiting is not None:
            yield waiting

    def tensor_at(self, coordinate: int) -> str:
        """Name of the tensor (or ``a metric``) at a vector coordinate, for diagnostics."""
        if coordinate >= self.model_coordinates:
            return "a metric"
        return self.segments[bisect_right(self._starts, coordinate) - 1].name
