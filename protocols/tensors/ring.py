"""The ring of integers modulo 2**bits in which updates are added.

A sum in the ring is exact and does not depend on the order of its terms, so that it can be hashed,
relayed and recomputed. Residues are uint32; a centred value lies in [-2**(bits-1), 2**(bits-1)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocols.tensors.sizes import CHUNK, MAX_NODES

_PLANES = {16: 0, 20: 1, 24: 2}  # half bytes per coordinate beside the 16-bit plane


@dataclass(frozen=True, slots=True)
class Ring:
    """Integers modulo 2**bits; 16, 20 and 24 bits have a packed form."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in _PLANES:
            raise ValueError(f"a ring has 16, 20 or 24 bits, not {self.bits}")

    @property
    def modulus(self) -> int:
        """2**bits."""
        return 1 << self.bits

    def clamp_limit(self, nodes: int) -> int:
        """Largest magnitude Q that one node may send, so that ``nodes`` of them cannot wrap.

        ``nodes`` is the size of the plan's roster: known before the round, never less than the
        survivors. Q = floor((2**(bits-1) - 1) / nodes).
        """
        if not 1 <= nodes <= MAX_NODES:
            raise ValueError(f"a sum has 1 to {MAX_NODES} nodes, not {nodes}")
        return ((1 << (self.bits - 1)) - 1) // nodes

    def noisy_limit(self) -> int:
        """Largest magnitude accepted in a sum that carries noise: floor(0.9 * 2**(bits-1)).

        Noise has no bound; a sum this close to the edge may have wrapped.
        """
        return (9 << (self.bits - 1)) // 10

    def centre(
        self, x_m: NDArray[np.uint32] | NDArray[np.int32], out: NDArray[np.int32] | None = None
    ) -> NDArray[np.int32]:
        """Residues (any uint32 or int32, shape [m]) to centred int32, shape [m].

        The bits above the ring are shifted out, the sign is shifted back in.
        """
        shift = 32 - self.bits
        centred = np.empty(x_m.shape, np.int32) if out is None else out
        np.left_shift(x_m.view(np.uint32), shift, out=centred.view(np.uint32))
        np.right_shift(centred, shift, out=centred)
        return centred

    def reduce(self, x_m: NDArray[np.int32] | NDArray[np.uint32]) -> NDArray[np.uint32]:
        """int32 or uint32 of any size to residues uint32 in [0, 2**bits), shape [m]; a copy."""
        return x_m.view(np.uint32) & np.uint32(self.modulus - 1)

    def bytes_per_chunk(self, coordinates: int = CHUNK) -> int:
        """Packed bytes of a chunk: 2 per coordinate, and a half or a whole one beside it."""
        return 2 * coordinates + (coordinates * _PLANES[self.bits] + 1) // 2


def packed_size(coordinates: int, ring: Ring) -> int:
    """Bytes of a packed vector of ``coordinates``."""
    whole, rest = divmod(coordinates, CHUNK)
    return whole * ring.bytes_per_chunk(CHUNK) + ring.bytes_per_chunk(rest)


def packed_offset(chunk_index: int, ring: Ring) -> int:
    """Where chunk ``chunk_index`` begins in a packed vector, in bytes."""
    return chunk_index * ring.bytes_per_chunk(CHUNK)
