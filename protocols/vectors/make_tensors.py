"""Golden vectors of protocols/spec/vector.md: from a manifest to the model after a round."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocols.outer_step import apply_outer_step, next_snapshot
from protocols.plan import Outer, Scale
from protocols.tensors import (
    BLOCK,
    CHUNK,
    METRIC_BOUND,
    UNIT,
    Manifest,
    PlanarSum,
    Ring,
    Scales,
    Snapshot,
    TensorSpec,
    VectorLayout,
    accumulate,
    blob_digest,
    clip_factor,
    dither_stream,
    encode_metrics,
    encode_vector,
    first_scales,
    metric_names,
    pack,
    packed_size,
    stochastic_round,
    weight_units,
)
from protocols.tensors.scales import largest_exponent, next_exponent

SEED: Final = bytes(range(32))
RINGS: Final = (16, 20, 24)
BOUNDARIES: Final = (0, 1, 255, 256, 257, CHUNK - 1, CHUNK, CHUNK + 1)
METRICS: Final = metric_names(())

# Three tensors, one of them a single number; "norm" rests in the round below.
MANIFEST: Final = Manifest(
    (
        TensorSpec("embed", (3, 2)),
        TensorSpec("norm", (2,)),
        TensorSpec("head", (2, 2)),
        TensorSpec("bias", ()),
    )
)
LAYOUT: Final = VectorLayout.of(MANIFEST, ["embed", "head", "bias"], METRICS)
THETA: Final = np.arange(-6, 7, dtype=np.float32) / np.float32(7)
NODES: Final = 3
RING: Final = Ring(20)
SCALES: Final = first_scales(MANIFEST, bound=0.05, ring=RING, nodes=NODES)


def _hex(values: NDArray[Any]) -> str:
    return np.ascontiguousarray(values).tobytes().hex()


def lanes(count: int) -> NDArray[np.uint32]:
    """Lane i = (2654435761 * i + 12345) mod 2**32: any implementation can make them."""
    wide = np.arange(count, dtype=np.uint64) * np.uint64(2_654_435_761) + np.uint64(12_345)
    return (wide & np.uint64(0xFFFF_FFFF)).astype(np.uint32)


def site_delta(site: int) -> NDArray[np.float32]:
    """delta[i] = float32(((7 * i + 13 * site) mod 23 - 11) / 300)."""
    i = np.arange(LAYOUT.model_coordinates)
    return (((7 * i + 13 * site) % 23 - 11) / 300).astype(np.float32)


def site_values(site: int) -> dict[str, int]:
    """Metrics of a site; weights of 1, 1/2 and 1/4."""
    return dict.fromkeys(METRICS, 0) | {
        "weight": 65_536 >> site,
        "nodes": 1,
        "tokens": 1000 + site,
        "loss_micronats": 2_500_000_000 + site,
    }


def site_vector(site: int, ring: Ring = RING, scales: Scales = SCALES) -> bytes:
    """The packed vector of a site; its dither seed is SEED with the site in the first byte."""
    chunks: list[bytes] = []
    encode_vector(
        site_delta(site),
        LAYOUT,
        scales,
        weight_units=65_536 >> site,
        clip_factor=1.0,
        metrics=site_values(site),
        seed=bytes([site]) + SEED[1:],
        ring=ring,
        limit=ring.clamp_limit(NODES),
        sink=chunks.append,
    )
    return b"".join(chunks)


def _pack_vector(x: NDArray[np.uint32], ring: Ring) -> bytes:
    return b"".join(pack(x[at : at + CHUNK], ring) for at in range(0, x.size, CHUNK))


def _manifest() -> dict[str, Any]:
    return {
        "bytes": MANIFEST.to_bytes().decode(),
        "digest": MANIFEST.digest,
        "coordinates": MANIFEST.coordinates,
        "blocks": MANIFEST.blocks,
        "segments": [list(segment) for segment in _segments(MANIFEST)],
    }


def _segments(manifest: Manifest) -> list[tuple[str, int, int, int]]:
    return [(s.name, s.start, s.stop, s.first_block) for s in manifest.segments]


def _layout() -> dict[str, Any]:
    wide = Manifest(
        (TensorSpec("a", (BLOCK + 1,)), TensorSpec("b", (CHUNK,)), TensorSpec("c", (1,)))
    )
    layout = VectorLayout.of(wide, ["c", "a"], METRICS)
    return {
        "manifest": wide.to_bytes().decode(),
        "select": ["c", "a"],
        "metrics": list(METRICS),
        "model_coordinates": layout.model_coordinates,
        "coordinates": layout.coordinates,
        "chunks": [list(chunk) for chunk in layout.chunks()],
        "blocks": [list(block) for block in layout.blocks()],
    }


def _metrics() -> dict[str, Any]:
    values = [0, 1, 255, 256, 257, 65_536, METRIC_BOUND - 1]
    return {
        "rows": [
            {"value": value, "limbs": encode_metrics({"m": value}, ("m",)).tolist()}
            for value in values
        ],
        "names_es_pt": list(metric_names(["es", "pt"])),
    }


def _dither() -> dict[str, Any]:
    return {
        "seed": SEED.hex(),
        "rows": [
            {"start": start, "count": 4, "hex": dither_stream(SEED, start, 4).hex()}
            for start in (0, 1, 7, 8, 255, 256, 257, CHUNK, 2**40)
        ],
    }


def _rounding() -> list[dict[str, Any]]:
    cases: list[tuple[float, int, int, int]] = [  # value, exponent, dither, limit
        (0.0, 0, 0, 100),
        (0.5, 0, 32_767, 100),
        (0.5, 0, 32_768, 100),
        (-0.5, 0, 32_767, 100),
        (-0.5, 0, 32_768, 100),
        (1.0, 0, 0, 100),
        (-1.0, 0, 0, 100),
        (-(2.0**-30), 0, 65_535, 100),
        (2.0**-30, 0, 0, 100),
        (100.0, 0, 65_535, 100),
        (100.5, 0, 0, 100),
        (-100.5, 0, 0, 100),
        (3.0, 5, 65_535, 100),
        (3.0, -1, 32_767, 100),
        (3.0e38, 100, 0, 8_388_607),
        (8_388_606.5, 0, 0, 8_388_607),
    ]
    rows = []
    for value, exponent, dither, limit in cases:
        x = np.array([value], np.float32)
        q, clamped = stochastic_round(x, exponent, dither.to_bytes(2, "little"), limit)
        rows.append(
            {
                "x": _hex(x),
                "value": value,
                "exponent": exponent,
                "dither": dither,
                "limit": limit,
                "q": int(q[0]),
                "clamped": clamped,
            }
        )
    return rows


def _packing() -> list[dict[str, Any]]:
    rows = []
    for bits in RINGS:
        ring = Ring(bits)
        for count in BOUNDARIES:
            packed = _pack_vector(lanes(count), ring)
            row = {"bits": bits, "coordinates": count, "bytes": packed_size(count, ring)}
            rows.append(row | {"sha256": hashlib.sha256(packed).hexdigest()})
        for count in (1, 2, 3):
            packed = pack(lanes(count), ring)
            rows.append({"bits": bits, "coordinates": count, "hex": packed.hex()})
    return rows


def _sums() -> list[dict[str, Any]]:
    """``addends`` times the largest residue at every coordinate, and mixed lanes."""
    rows = []
    for bits in RINGS:
        ring = Ring(bits)
        for addends in (1, 2, 64, 4096):
            total = PlanarSum(3, ring)
            top = pack(np.full(3, ring.modulus - 1, np.uint32), ring)
            for _ in range(addends):
                total.add(top)
            rows.append({"bits": bits, "addends": addends, "sum": pack(total.result(), ring).hex()})
    return rows


def _limits() -> list[dict[str, Any]]:
    return [
        {
            "bits": bits,
            "nodes": nodes,
            "limit": Ring(bits).clamp_limit(nodes),
            "noisy_limit": Ring(bits).noisy_limit(),
        }
        for bits in RINGS
        for nodes in (1, 2, 3, 33, 64)
    ]


def _weights() -> dict[str, Any]:
    caps = [(0, None), (0, 100), (1, 3), (50, 100), (100, 100), (101, 100)]
    norms = [(0.0, 1.0), (0.5, 1.0), (4.0, 1.0), (3.0, 0.1)]
    return {
        "weights": [
            {"tokens": tokens, "cap": cap, "units": weight_units(tokens, cap)}
            for tokens, cap in caps
        ],
        "clip_factors": [
            {"norm": norm, "clip_norm": clip, "factor": clip_factor(norm, clip)}
            for norm, clip in norms
        ],
    }


def _scales() -> dict[str, Any]:
    firsts = [(15_887, 0.05), (15_887, 1.0), (992, 1e-7), (1, 3.0), (1, 1e30), (8192, 1.0)]
    rows = [
        # sum of squares, coordinates, old, W, k in thousandths, floor
        (0, 5, 18, 65_536, 8000, 1e-7),
        (64_000_000, 1, 0, 65_536, 1000, 1e-9),
        (64_000_001, 1, 0, 65_536, 1000, 1e-9),
        (12_345_678, 1000, 17, 3 * 65_536, 8000, 1e-7),
        (12_345_678, 1000, -3, 70_000, 8000, 1e-7),
        (2**62, BLOCK, 20, 64 * 65_536, 1_000_000, 1e-12),
        (1, BLOCK, 90, 1, 1, 0.5),
    ]
    return {
        "largest": [
            {"limit": limit, "bound": bound, "e": largest_exponent(limit, Fraction(bound))}
            for limit, bound in firsts
        ],
        "next": [
            {
                "sum_squares": str(squares),
                "coordinates": count,
                "old": old,
                "weight_sum_units": weight,
                "k_permille": k,
                "floor": floor,
                "limit": 1000,
                "e": next_exponent(
                    sum_squares=squares,
                    coordinates=count,
                    old=old,
                    weight_sum_units=weight,
                    k_permille=k,
                    floor=Fraction(floor),
                    limit=1000,
                ),
            }
            for squares, count, old, weight, k, floor in rows
        ],
        "bytes": Scales(np.array([-100, -1, 0, 100])).to_bytes().hex(),
    }


def _units() -> list[dict[str, Any]]:
    """Byte i of a blob is i mod 251."""
    rows = []
    for size in (0, 1, 255, 256, 257, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT, 3 * UNIT + 5):
        data = (np.arange(size, dtype=np.uint32) % 251).astype(np.uint8).tobytes()
        rows.append({"size": size, "root": blob_digest(data)})
    return rows


def _round(outer: Outer, buffers: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Three sites, one round: vectors, sum, next model, next scales, snapshots."""
    vectors = [site_vector(site) for site in range(NODES)]
    readers = [_reader(data) for data in vectors]
    total = b"".join(accumulate(readers, LAYOUT, RING))
    start = replace(
        Snapshot.initial(MANIFEST, blob_digest(THETA.tobytes()), SCALES),
        buffers={name: blob_digest(array.tobytes()) for name, array in buffers.items()},
    )
    written: dict[str, bytes] = {}

    def keep(name: str, offset: int, data: memoryview) -> None:
        assert offset == 0  # noqa: S101 - one unit
        written[name] = bytes(data)

    result = apply_outer_step(
        outer=outer,
        scale_rule=Scale(),
        layout=LAYOUT,
        manifest=MANIFEST,
        snapshot_counters=start.counters,
        theta=THETA,
        buffers=buffers,
        scales=SCALES,
        sum_reader=total,
        ring=RING,
        nodes=NODES,
        roster=NODES,
        writer=keep,
    )
    after = next_snapshot(start, result)
    return {
        "outer": outer.model_dump(mode="json"),
        "scales": SCALES.to_bytes().hex(),
        "vectors": [data.hex() for data in vectors],
        "vector_roots": [blob_digest(data) for data in vectors],
        "sum": total.hex(),
        "sum_root": blob_digest(total),
        "weight_sum_units": result.weight_sum_units,
        "metrics": dict(result.metrics),
        "max_abs": result.max_abs,
        "norm": result.norm,
        "theta": THETA.tobytes().hex(),
        "next": {name: data.hex() for name, data in written.items()},
        "next_scales": result.next_scales.to_bytes().hex(),
        "snapshot": start.to_bytes().decode(),
        "model_root": start.model_root,
        "next_snapshot": after.to_bytes().decode(),
        "next_model_root": after.model_root,
    }


def _reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def tensors() -> dict[str, Any]:
    """protocols/vectors/tensors.json."""
    return {
        "spec": "vector/1",
        "manifest": _manifest(),
        "layout": _layout(),
        "limits": _limits(),
        "weights": _weights(),
        "dither": _dither(),
        "rounding": _rounding(),
        "scales": _scales(),
        "packing": _packing(),
        "sums": _sums(),
        "metrics": _metrics(),
        "units": _units(),
    }


def rounds() -> dict[str, Any]:
    """protocols/vectors/tensors_round.json."""
    momentum = np.arange(13, dtype=np.float32) / np.float32(100)
    return {
        "spec": "vector/1",
        "seed": SEED.hex(),
        "limit": RING.clamp_limit(NODES),
        "select": ["embed", "head", "bias"],
        "average": _round(Outer(), {}),
        "nesterov": {"momentum": momentum.tobytes().hex()}
        | _round(Outer(optimizer="nesterov", lr=0.7, momentum=0.9), {"momentum": momentum}),
    }


FILES: Final = {"tensors.json": tensors, "tensors_round.json": rounds}
