"""The key streams of a masked vector, added chunk by chunk.

A mask key is an AES-256-CTR key (NIST SP 800-38A, section 6.5) with the block counter starting at
zero; its key stream, read as little-endian lanes, is the mask: 16-bit lanes for a ring of 2**16,
32-bit lanes otherwise, of which the ring keeps the low bits. The stream is seekable: chunk k of
CHUNK coordinates starts at counter k * CHUNK * lane bytes / 16, so any thread can make any chunk.

    y_i = x_i + self_i + sum of p_ij for j > i - sum of p_ij for j < i    mod 2**w, j in U1

Every pair mask appears once with each sign and cancels in the sum over U1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from protocols.identifiers import Digest
from protocols.secagg.keys import pair_mask_key, self_mask_key
from protocols.tensors.ring import Ring
from protocols.tensors.sizes import CHUNK

# Bytes of key stream made at once. Lanes, key stream and plaintext of one slice stay in a core's
# second-level cache together; below 64 KiB the cost of each library call shows.
SLICE: Final = 128 * 1024
_ZEROS: Final = bytes(SLICE)  # the plaintext: CTR turns zeros into the bare key stream


def lane_dtype(ring: Ring) -> np.dtype[Any]:
    """Little-endian unsigned lanes of a ring: 2 bytes for 2**16, else 4."""
    return np.dtype("<u2") if ring.bits == 16 else np.dtype("<u4")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskKey:
    """One key stream and the sign it is added with."""

    key: bytes = field(repr=False)  # 32 bytes, AES-256
    sign: int  # +1 or -1

    def __post_init__(self) -> None:
        if len(self.key) != 32 or self.sign not in (1, -1):
            raise ValueError("a mask has 32 key bytes and the sign +1 or -1")


class _Scratch:
    """What one thread works with: a cipher for each mask, key stream bytes and the same as lanes,
    and a sum."""

    __slots__ = ("ciphers", "key_stream", "stream", "total")

    def __init__(self, masks: Sequence[MaskKey], dtype: np.dtype[Any], *, with_total: bool) -> None:
        zero = modes.CTR(bytes(16))
        self.ciphers = [
            (Cipher(algorithms.AES256(mask.key), zero).encryptor(), mask.sign) for mask in masks
        ]
        lanes = SLICE // dtype.itemsize
        self.stream = bytearray(SLICE)
        self.key_stream: NDArray[Any] = np.frombuffer(self.stream, dtype=dtype, count=lanes)
        self.total: NDArray[Any] | None = np.empty(lanes, dtype) if with_total else None


class MaskAdder:
    """Adds a fixed set of masks to one chunk at a time, in place.

    Safe to share among threads that work on different chunks: the keys are fixed, and each call
    takes its ciphers and buffers from a pool. Both the cipher and numpy leave the interpreter lock
    while they work, so chunks in parallel use as many cores as there are threads. Memory for each
    thread: at most 256 KiB, and about 1 KiB of cipher state for each mask.

    An instance is a ``LaneAdder`` of ``protocols.tensors``: call it with (chunk, start, lanes).
    """

    def __init__(self, masks: Sequence[MaskKey], ring: Ring) -> None:
        """
        Args:
            masks: for a node its self mask and one for each peer, ``node_masks``; for the sum
                those that did not cancel, ``unmask.mask_remover``.
        """
        self._masks = tuple(masks)
        self._dtype = lane_dtype(ring)
        self._scratch: deque[_Scratch] = deque()

    def __repr__(self) -> str:
        return f"MaskAdder({len(self._masks)} masks)"

    def __len__(self) -> int:
        return len(self._masks)

    def __call__(self, chunk: int, start: int, lanes: NDArray[np.uint32]) -> None:
        """``add``, with the first coordinate of the chunk given too.

        Raises:
            ValueError: ``start`` is not where chunk ``chunk`` begins.
        """
        if start != chunk * CHUNK:
            raise ValueError(f"chunk {chunk} starts at {chunk * CHUNK}, not {start}")
        self.add(chunk, lanes)

    def add(self, chunk: int, lanes: NDArray[Any]) -> None:
        """Add every mask's chunk ``chunk`` to ``lanes``.

        Args:
            chunk: index from 0; only the last chunk of a vector may be short.
            lanes: shape [m], 1 <= m <= CHUNK, C-contiguous, changed in place: uint32, of which the
                ring's low bits are the result, or uint16 in a ring of 16 bits.

        Raises:
            ValueError: other shape, type or length.
        """
        width = self._dtype.itemsize
        narrow = lanes.dtype == np.uint16 and width == 2
        if not (narrow or lanes.dtype == np.uint32) or not lanes.flags.c_contiguous:
            raise ValueError(f"want contiguous unsigned lanes of the ring, got {lanes.dtype}")
        if lanes.ndim != 1 or not 0 < lanes.size <= CHUNK or chunk < 0:
            raise ValueError(f"want chunk >= 0 and 1 to {CHUNK} coordinates")
        counter = chunk * (CHUNK * width // 16)
        block = counter.to_bytes(16, "big")
        scratch = self._borrow()
        streams = scratch.ciphers
        for stream, _ in streams:
            stream.reset_nonce(block)  # eight times cheaper than a new cipher
        step = SLICE // width
        for start in range(0, lanes.size, step):
            part = lanes[start : start + step]
            if narrow or width == 4:
                _add_streams(streams, part, scratch, width)
            else:  # sum in the 16-bit lanes of the mask, then widen once
                total = scratch.total[: part.size]  # type: ignore[index]
                total.fill(0)
                _add_streams(streams, total, scratch, width)
                np.add(part, total, out=part)
        self._scratch.append(scratch)  # not after an error: the next call makes a fresh one

    def _borrow(self) -> _Scratch:
        try:
            return self._scratch.pop()  # deque.pop and append are atomic
        except IndexError:
            return _Scratch(self._masks, self._dtype, with_total=self._dtype.itemsize == 2)


def _add_streams(
    streams: Sequence[tuple[CipherContext, int]],
    part: NDArray[Any],
    scratch: _Scratch,
    width: int,
) -> None:
    """Add the next ``part.size`` lanes of every stream to ``part``: at most SLICE bytes."""
    size = part.size * width
    zeros = _ZEROS if size == SLICE else _ZEROS[:size]
    key_stream = scratch.key_stream[: part.size]
    for stream, sign in streams:
        stream.update_into(zeros, scratch.stream)
        if sign > 0:
            np.add(part, key_stream, out=part)
        else:
            np.subtract(part, key_stream, out=part)


def node_masks(
    ctx: Digest,
    *,
    index: int,
    self_seed: bytes,
    rk_secret: bytes,
    rks: Mapping[int, bytes],
) -> list[MaskKey]:
    """The masks of one member's vector.

    Args:
        ctx: of the attempt.
        index: the member's own.
        self_seed: its b; rk_secret: its RK.
        rks: RK public of every member of U1 by index, its own among them.

    Returns:
        One mask for itself and one for each other member of U1.
    """
    own = (index, rks[index])
    masks = [MaskKey(key=self_mask_key(ctx, self_seed, index), sign=1)]
    for peer, rk in sorted(rks.items()):
        if peer != index:
            key = pair_mask_key(ctx, rk_secret, own=own, peer=(peer, rk))
            masks.append(MaskKey(key=key, sign=1 if peer > index else -1))
    return masks
