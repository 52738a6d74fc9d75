"""The sizes everybody must agree on. Normative text: protocols/spec/vector.md, section 1."""

from __future__ import annotations

from typing import Final

CHUNK: Final = 2**18  # coordinates of a packed chunk; the last chunk of a vector may be short
BLOCK: Final = 2**16  # coordinates under one scale, at most; a block never spans two tensors
UNIT: Final = 4 * 2**20  # bytes: hashed, resumed and acknowledged as one piece
STREAM_WINDOW: Final = 2 * 2**20  # bytes under way on one connection: upload.md, 3.9
MAX_NODES: Final = 64  # addends of a sum
MAX_ADDENDS: Final = 4096  # packed chunks that one PlanarSum may add before a carry could be lost
LIMBS: Final = 6  # coordinates of a metric, 8 bits each
WEIGHT_ONE: Final = 65_536  # weight units of a weight of 1.0
EXPONENTS: Final = (-100, 100)  # a scale is 2**e: float32 keeps it, and its inverse, normal
