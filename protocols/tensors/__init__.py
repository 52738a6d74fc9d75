"""Parameter sets as vectors of exact integers.

    manifest    which tensors a model has, in which order
    layout      which coordinate of a round's vector is what
    scales      public powers of two, decided from the previous public sum
    encode      float32 update -> rounded, clamped, masked, packed integers
    planar      packed chunks, and their sums without unpacking
    ring        integers modulo 2**bits
    metrics     losses and counts as coordinates of the same vector
    units       names of bulk data
    snapshot    the model between two rounds, as one document

Pure numpy, no I/O but through buffers and callables that are passed in. Normative text:
protocols/spec/vector.md.
"""

from protocols.tensors.encode import (
    EncodeReport,
    check_finite,
    clip_factor,
    dither_stream,
    encode_vector,
    stochastic_round,
    weight_units,
)
from protocols.tensors.layout import Block, Run, VectorLayout
from protocols.tensors.manifest import Manifest, Segment, TensorSpec
from protocols.tensors.metrics import (
    BASE_METRICS,
    METRIC_BOUND,
    PER_LANGUAGE,
    decode_metrics,
    encode_metrics,
    metric_names,
)
from protocols.tensors.planar import (
    LaneAdder,
    PackedVector,
    PlanarSum,
    Reader,
    accumulate,
    pack,
    unpack,
)
from protocols.tensors.ring import Ring, packed_offset, packed_size
from protocols.tensors.scales import (
    Scales,
    first_scales,
    fixed_scales,
    initial_scales,
    next_scales,
)
from protocols.tensors.sizes import BLOCK, CHUNK, MAX_NODES, UNIT, WEIGHT_ONE
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import (
    UnitHasher,
    blob_digest,
    digest_of_units,
    root_of_units,
    unit_count,
    unit_hashes,
)

__all__ = [
    "BASE_METRICS",
    "BLOCK",
    "CHUNK",
    "MAX_NODES",
    "METRIC_BOUND",
    "PER_LANGUAGE",
    "UNIT",
    "WEIGHT_ONE",
    "Block",
    "EncodeReport",
    "LaneAdder",
    "Manifest",
    "PackedVector",
    "PlanarSum",
    "Reader",
    "Ring",
    "Run",
    "Scales",
    "Segment",
    "Snapshot",
    "TensorSpec",
    "UnitHasher",
    "VectorLayout",
    "accumulate",
    "blob_digest",
    "check_finite",
    "clip_factor",
    "decode_metrics",
    "digest_of_units",
    "dither_stream",
    "encode_metrics",
    "encode_vector",
    "first_scales",
    "fixed_scales",
    "initial_scales",
    "metric_names",
    "next_scales",
    "pack",
    "packed_offset",
    "packed_size",
    "root_of_units",
    "stochastic_round",
    "unit_count",
    "unit_hashes",
    "unpack",
    "weight_units",
]
