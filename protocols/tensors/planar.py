"""Packed chunks: one plane of low bits, one of high bits, and sums without unpacking.

A chunk of m coordinates is a plane of m little-endian uint16 (bits 0..15 of each residue) and then

* 16 bits: nothing;
* 20 bits: a nibble plane of half = (m + 1) // 2 bytes; byte j holds bits 16..19 of coordinate j in
  its low half and those of coordinate j + half in its high half (0 when there is none);
* 24 bits: a plane of m bytes, bits 16..23.

2, 2.5 and 3 bytes per coordinate. Planes are added as they are: the low plane into uint32, the high
plane into bytes, whose overflow is a multiple of 16 (or 256) and so drops out of the ring by
itself. One carry at the end joins them. Normative text: protocols/spec/vector.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import local

import numpy as np
from numpy.typing import NDArray

from protocols.errors import MalformedMessageError
from protocols.tensors.layout import VectorLayout
from protocols.tensors.ordered import ordered_map
from protocols.tensors.ring import Ring, packed_offset, packed_size
from protocols.tensors.sizes import CHUNK, MAX_ADDENDS

Bytes = bytes | bytearray | memoryview | NDArray[np.uint8]
Reader = Callable[[int, int], Bytes]  # (offset, length) in bytes -> exactly that many bytes
LaneAdder = Callable[[int, int, NDArray[np.uint32]], None]  # (chunk index, first coordinate, lanes)

_U16 = np.dtype("<u2")


class PackScratch:
    """Working memory of ``pack_into``; one for each thread."""

    def __init__(self, coordinates: int = CHUNK) -> None:
        self.shifted = np.empty(coordinates, np.uint32)
        self.high = np.empty(coordinates, np.uint8)


def pack_into(
    x_m: NDArray[np.uint32] | NDArray[np.int32],
    ring: Ring,
    out: NDArray[np.uint8],
    scratch: PackScratch,
) -> None:
    """Pack m lanes; bits above the ring are dropped, which is the reduction modulo 2**bits.

    Args:
        x_m: uint32 or int32 (two's complement), shape [m], any values.
        ring: 16, 20 or 24 bits.
        out: uint8, shape [ring.bytes_per_chunk(m)], overwritten.
        scratch: for at least m coordinates.
    """
    lanes, m = x_m.view(np.uint32), x_m.size
    if out.size != ring.bytes_per_chunk(m):
        raise ValueError(f"{m} packed coordinates take {ring.bytes_per_chunk(m)} bytes")
    np.copyto(out[: 2 * m].view(_U16), lanes, casting="unsafe")
    if ring.bits == 16:
        return
    shifted = scratch.shifted[:m]
    np.right_shift(lanes, 16, out=shifted)
    if ring.bits == 24:
        np.copyto(out[2 * m :], shifted, casting="unsafe")
        return
    high, half, plane = scratch.high[:m], (m + 1) // 2, out[2 * m :]
    np.copyto(high, shifted, casting="unsafe")
    np.bitwise_and(high[:half], 0x0F, out=plane)
    np.multiply(high[half:], 16, out=high[half:])  # a shift by 4 that numpy has vectorised
    np.bitwise_or(plane[: m - half], high[half:], out=plane[: m - half])


def pack(x_m: NDArray[np.uint32] | NDArray[np.int32], ring: Ring) -> bytes:
    """``pack_into`` a new byte string."""
    out = np.empty(ring.bytes_per_chunk(x_m.size), np.uint8)
    pack_into(np.ascontiguousarray(x_m).view(np.uint32), ring, out, PackScratch(x_m.size))
    return out.tobytes()


def _as_bytes(data: Bytes, size: int) -> NDArray[np.uint8]:
    flat = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if flat.size != size:
        raise MalformedMessageError(f"a packed chunk of {flat.size} bytes; expected {size}")
    return flat


def unpack(
    data: Bytes, coordinates: int, ring: Ring, out: NDArray[np.uint32] | None = None
) -> NDArray[np.uint32]:
    """Residues of one packed chunk: uint32 in [0, 2**bits), shape [coordinates].

    Raises:
        MalformedMessageError: wrong length, or the unused half byte of an odd 20-bit chunk is not
            zero (one vector would have two packed forms).
    """
    m = coordinates
    flat = _as_bytes(data, ring.bytes_per_chunk(m))
    lanes = np.empty(m, np.uint32) if out is None else out
    if ring.bits == 20 and m % 2 and flat[-1] >> 4:
        raise MalformedMessageError("the unused half byte of a packed chunk is not zero")
    unpack_range(flat, m, ring, start=0, stop=m, out=lanes.view(np.int32))
    np.bitwise_and(lanes, ring.modulus - 1, out=lanes)
    return lanes


def unpack_range(
    flat: NDArray[np.uint8],
    coordinates: int,
    ring: Ring,
    *,
    start: int,
    stop: int,
    out: NDArray[np.int32],
) -> None:
    """Centred values of coordinates [start, stop) of one packed chunk, without reading the rest.

    Args:
        flat: uint8, the whole chunk.
        coordinates: of the chunk.
        ring: 16, 20 or 24 bits.
        start: first coordinate, counted from the beginning of the chunk.
        stop: one past the last.
        out: int32, shape [stop - start], overwritten with values in [-2**(bits-1), 2**(bits-1)).
    """
    m = coordinates
    low = flat[2 * start : 2 * stop].view(_U16)
    if ring.bits == 16:
        np.copyto(out, low.view("<i2"))
        return
    plane = flat[2 * m :]
    if ring.bits == 24:
        np.copyto(out, plane[start:stop].view(np.int8))
    else:
        half = (m + 1) // 2
        middle = min(max(half, start), stop)
        if start < middle:  # shift the low half byte up and back: its sign comes with it
            part = (plane[start:middle] * np.uint8(16)).view(np.int8)
            np.copyto(out[: middle - start], part >> 4)
        if middle < stop:
            part = plane[middle - half : stop - half].view(np.int8)
            np.copyto(out[middle - start :], part >> 4)
    np.left_shift(out, 16, out=out)
    np.bitwise_or(out, low, out=out)


class PlanarSum:
    """Adds packed chunks modulo 2**bits without unpacking them.

    Exact for at most 4,096 addends: a uint32 then still holds the sum of the low planes. The unused
    half byte of an odd 20-bit chunk is ignored, so no sender can spoil a sum with it.
    """

    def __init__(self, coordinates: int, ring: Ring) -> None:
        m = self.coordinates = coordinates
        self.ring = ring
        self.count = 0
        self._low = np.zeros(m, np.uint32)
        self._half = (m + 1) // 2
        width = {16: 0, 20: self._half, 24: m}[ring.bits]
        self._high = np.zeros(width, np.uint8)  # 24: bits 16..23. 20: whole bytes
        self._first = np.zeros(width if ring.bits == 20 else 0, np.uint8)  # 20: low half bytes
        self._masked = np.empty_like(self._first)
        self._spread = np.empty(m if ring.bits != 16 else 0, np.uint32)

    def clear(self) -> None:
        """Start a new sum in the same memory."""
        self.count = 0
        for plane in (self._low, self._high, self._first):
            plane.fill(0)

    def add(self, packed: Bytes) -> None:
        """Add one packed chunk.

        Raises:
            MalformedMessageError: wrong length.
        """
        if self.count >= MAX_ADDENDS:
            raise ValueError(f"a sum takes at most {MAX_ADDENDS} addends")
        m = self.coordinates
        flat = _as_bytes(packed, self.ring.bytes_per_chunk(m))
        np.add(self._low, flat[: 2 * m].view(_U16), out=self._low)
        if self.ring.bits != 16:
            plane = flat[2 * m :]
            np.add(self._high, plane, out=self._high)
            if self.ring.bits == 20:
                np.bitwise_and(plane, 0x0F, out=self._masked)
                np.add(self._first, self._masked, out=self._first)
        self.count += 1

    def result(self, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
        """The sum: uint32 in [0, 2**bits), shape [coordinates]. May be asked for repeatedly."""
        lanes = np.empty(self.coordinates, np.uint32) if out is None else out
        if self.ring.bits == 16:
            np.bitwise_and(self._low, 0xFFFF, out=lanes)
            return lanes
        if self.ring.bits == 24:
            np.copyto(self._spread, self._high)
        else:
            # bytes hold a + 16 b modulo 256, ``_first`` holds a: their difference is 16 b.
            rest = self.coordinates - self._half
            np.copyto(self._spread[: self._half], self._first)
            second = (self._high[:rest] - self._first[:rest]) >> 4
            np.copyto(self._spread[self._half :], second)
        np.left_shift(self._spread, 16, out=self._spread)
        np.add(self._low, self._spread, out=lanes)
        np.bitwise_and(lanes, self.ring.modulus - 1, out=lanes)
        return lanes


class _SumScratch:
    def __init__(self, coordinates: int, ring: Ring) -> None:
        size = min(CHUNK, coordinates)
        self.sum = PlanarSum(size, ring)
        self.lanes = np.empty(size, np.uint32)
        self.out = np.empty(ring.bytes_per_chunk(size), np.uint8)
        self.pack = PackScratch(size)


def accumulate(
    inputs: Sequence[Reader],
    coordinates: int | VectorLayout,
    ring: Ring,
    *,
    adjust: LaneAdder | None = None,
    threads: int = 1,
) -> Iterator[bytes]:
    """The sum of packed vectors modulo 2**bits, packed, chunk by chunk.

    Args:
        inputs: one ``read(offset, length)`` for each vector; called from ``threads`` threads.
        coordinates: of every vector, or their layout.
        ring: 16, 20 or 24 bits.
        adjust: called with (chunk index, first coordinate, lanes) and may change the lanes in
            place before they are reduced and packed: this is where masks are taken off.
        threads: chunks worked on at once. The bytes do not depend on it, memory is
            O(threads * chunk).

    Raises:
        MalformedMessageError: a reader returned another number of bytes.
    """
    d = coordinates if isinstance(coordinates, int) else coordinates.coordinates
    if not 1 <= len(inputs) <= MAX_ADDENDS:
        raise ValueError(f"a sum takes 1 to {MAX_ADDENDS} vectors, not {len(inputs)}")

    def work(index: int, scratch: _SumScratch) -> bytes:
        start = index * CHUNK
        m = min(CHUNK, d - start)
        offset, length = packed_offset(index, ring), ring.bytes_per_chunk(m)
        total = scratch.sum if m == scratch.sum.coordinates else PlanarSum(m, ring)
        total.clear()
        for read in inputs:
            total.add(read(offset, length))
        lanes, out = scratch.lanes[:m], scratch.out[:length]
        total.result(lanes)
        if adjust is not None:
            adjust(index, start, lanes)
        pack_into(lanes, ring, out, scratch.pack)
        return out.tobytes()

    return ordered_map(work, -(-d // CHUNK), lambda: _SumScratch(d, ring), threads=threads)


class PackedVector:
    """Random access to a packed vector in memory, in a mapped file, or behind a reader."""

    def __init__(self, source: Bytes | Reader, coordinates: int, ring: Ring) -> None:
        """Raises: MalformedMessageError: a buffer of the wrong length."""
        self.coordinates = coordinates
        self.ring = ring
        self._read: Reader | None = None
        self._flat = np.empty(0, np.uint8)
        self._last = local()  # the latest chunk that each thread has read
        if callable(source):
            self._read = source
        else:
            self._flat = _as_bytes(source, packed_size(coordinates, ring))

    def _chunk(self, index: int, length: int) -> NDArray[np.uint8]:
        offset = packed_offset(index, self.ring)
        if self._read is None:
            return self._flat[offset : offset + length]
        if getattr(self._last, "index", None) != index:
            self._last.index = None  # a failed read leaves no chunk under a wrong name
            self._last.flat = _as_bytes(self._read(offset, length), length)
            self._last.index = index
        flat: NDArray[np.uint8] = self._last.flat
        return flat

    def read_centred(self, start: int, stop: int, out: NDArray[np.int32]) -> None:
        """Centred coordinates [start, stop) into ``out``, int32, shape [stop - start]."""
        if not 0 <= start <= stop <= self.coordinates:
            raise IndexError(f"coordinates {start} to {stop} of {self.coordinates}")
        at = start
        while at < stop:
            index = at // CHUNK
            base = index * CHUNK
            m = min(CHUNK, self.coordinates - base)
            cut = min(stop, base + m)
            flat = self._chunk(index, self.ring.bytes_per_chunk(m))
            part = out[at - start : cut - start]
            unpack_range(flat, m, self.ring, start=at - base, stop=cut - base, out=part)
            at = cut
