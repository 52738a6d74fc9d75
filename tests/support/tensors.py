"""Small parameter sets, updates and outer steps for tests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from protocols.outer_step import OuterResult, apply_outer_step
from protocols.plan import Outer, Scale
from protocols.tensors import (
    Manifest,
    Ring,
    Scales,
    TensorSpec,
    VectorLayout,
    encode_vector,
    metric_names,
)

METRICS = metric_names(())
PER_BLOCK = Scale()


def manifest_of(**shapes: tuple[int, ...]) -> Manifest:
    return Manifest(tuple(TensorSpec(name, shape) for name, shape in shapes.items()))


def site_metrics(layout: VectorLayout, *, weight: int = 65536, **values: int) -> dict[str, int]:
    """Metrics of one site: its weight, one node, zeros, and what the test sets."""
    return dict.fromkeys(layout.metrics, 0) | {"weight": weight, "nodes": 1} | values


def encode(
    delta: np.ndarray,
    layout: VectorLayout,
    scales: Scales,
    ring: Ring,
    *,
    roster: int,
    seed: bytes = bytes(32),
    weight: int = 65536,
    **options,
) -> bytes:
    """The packed vector of one site."""
    chunks: list[bytes] = []
    encode_vector(
        delta,
        layout,
        scales,
        weight_units=weight,
        clip_factor=options.pop("clip_factor", 1.0),
        metrics=options.pop("metrics", site_metrics(layout, weight=weight)),
        seed=seed,
        ring=ring,
        limit=ring.clamp_limit(roster),
        sink=chunks.append,
        **options,
    )
    return b"".join(chunks)


class Files:
    """A writer that keeps the new files in memory and counts how often each byte is written."""

    def __init__(self, coordinates: int) -> None:
        self.coordinates = coordinates
        self.data: dict[str, np.ndarray] = {}
        self.writes: dict[str, np.ndarray] = {}

    def __call__(self, name: str, offset: int, view: memoryview) -> None:
        size = 4 * self.coordinates
        data = self.data.setdefault(name, np.zeros(size, np.uint8))
        writes = self.writes.setdefault(name, np.zeros(size, np.uint8))
        data[offset : offset + len(view)] = np.frombuffer(view, np.uint8)
        writes[offset : offset + len(view)] += 1

    def __getitem__(self, name: str) -> np.ndarray:
        assert (self.writes[name] == 1).all(), "every byte is written once"
        return self.data[name].view("<f4")


def outer_step(
    packed_sum: bytes,
    *,
    manifest: Manifest,
    layout: VectorLayout,
    theta: np.ndarray,
    scales: Scales,
    ring: Ring,
    nodes: int,
    roster: int | None = None,
    outer: Outer | None = None,
    buffers: Mapping[str, np.ndarray] | None = None,
    steps: int = 0,
    rule: Scale = PER_BLOCK,
    **options,
) -> tuple[OuterResult, Files]:
    """Apply a packed sum; the result and the files it wrote."""
    files = Files(manifest.coordinates)
    result = apply_outer_step(
        outer=outer or Outer(),
        scale_rule=rule,
        layout=layout,
        manifest=manifest,
        snapshot_counters={"steps": steps},
        theta=theta,
        buffers=buffers or {},
        scales=scales,
        sum_reader=packed_sum,
        ring=ring,
        nodes=nodes,
        roster=roster or nodes,
        writer=files,
        **options,
    )
    return result, files


def reader_of(data: bytes):
    """``read(offset, length)`` over bytes in memory."""
    view = memoryview(data)
    return lambda offset, length: view[offset : offset + length]
