"""From the uploads of the survivors to the next snapshot, chunk by chunk.

The uploads are added where they lie, in their packed form; the sum becomes a blob; the outer step
turns it into the next model. All of it is a function of the uploads, the plan and the starting
snapshot, so doing it again after a crash gives the same blobs under the same names. Memory is
O(chunk), flat in the number of sites and in the model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coordinator.blobs import Blobs, storage_errors
from coordinator.layouts import Layouts
from protocols.errors import CorruptStateError
from protocols.identifiers import Digest
from protocols.outer_step import THETA, OuterResult, apply_outer_step, next_snapshot
from protocols.plan import Plan
from protocols.round_vector import round_ring
from protocols.tensors.behind import Behind
from protocols.tensors.manifest import Manifest
from protocols.tensors.planar import LaneAdder, PackedVector, accumulate
from protocols.tensors.scales import Scales
from protocols.tensors.snapshot import Snapshot

Reader = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What came out of a round."""

    sum: Digest
    snapshot: Snapshot
    metrics: dict[str, int]
    norm: float  # L2 norm of the mean update, in parameter units


def release(
    *,
    plan: Plan,
    index: int,
    start: Snapshot,
    uploads: Sequence[Path],
    blobs: Blobs,
    layouts: Layouts,
    remover: LaneAdder | None = None,
    threads: int = 2,
) -> Release:
    """Add the uploads, take the outer step, store both.

    Args:
        plan: of the run.
        index: which of the plan's rounds.
        start: the snapshot the round started from; its blobs are here.
        uploads: packed vectors, one per survivor, each complete and of the layout's size.
        blobs: where sum and snapshot go.
        layouts: of the plan.
        remover: takes the remaining masks off each chunk of a masked sum.
        threads: chunks worked on at once.

    Raises:
        IntegrityError: the sum wrapped, its counters contradict the survivors, an upload is not
            of the right size, or the next model would not be finite. Nothing is published.
        StorageFullError: no room; try again.
    """
    layout = layouts.of(plan, index)
    ring = round_ring(plan)
    manifest = layouts.manifest(start.manifest)
    with ExitStack() as stack:
        readers = [_reader(path, layout.packed_size(ring), stack) for path in uploads]
        writer = stack.enter_context(blobs.writer())
        for chunk in accumulate(readers, layout, ring, adjust=remover, threads=threads):
            writer.write(chunk)
        # While the outer step is computed, the rest of the sum gets to the disk.
        result = _outer_step(
            plan, index, start, manifest, writer.read, len(uploads), blobs, layouts, threads
        )
        sum_digest = writer.finish()
    snapshot = next_snapshot(start, result)
    blobs.put_bytes(snapshot.to_bytes())  # for auditors, who have no ledger
    return Release(
        sum=sum_digest,
        snapshot=snapshot,
        metrics=dict(result.metrics),
        norm=result.norm,
    )


def _outer_step(
    plan: Plan,
    index: int,
    start: Snapshot,
    manifest: Manifest,
    sum_reader: Reader,
    survivors: int,
    blobs: Blobs,
    layouts: Layouts,
    threads: int,
) -> OuterResult:
    layout, ring = layouts.of(plan, index), round_ring(plan)
    scales_reader = blobs.open(start.scales)
    scales = Scales.from_bytes(scales_reader.read(0, scales_reader.size), manifest)
    with ExitStack() as stack, tempfile.TemporaryDirectory(dir=blobs.tmp) as folder:
        files = _Files(Path(folder), 4 * manifest.coordinates)
        try:
            result = apply_outer_step(
                outer=plan.outer,
                scale_rule=plan.vector.scale,
                layout=layout,
                manifest=manifest,
                snapshot_counters=start.counters,
                theta=_float_file(blobs, start.theta, manifest, stack),
                buffers={
                    name: _float_file(blobs, digest, manifest, stack)
                    for name, digest in start.buffers.items()
                },
                scales=scales,
                sum_reader=PackedVector(sum_reader, layout.coordinates, ring),
                ring=ring,
                nodes=survivors,
                roster=len(plan.roster),
                writer=files.write,
                noisy=plan.adds_noise,
                threads=threads,
            )
            files.sync()
        finally:
            files.close()
        if result.theta_root is not None:
            for name, digest in {THETA: result.theta_root, **result.buffer_roots}.items():
                blobs.adopt(files.path(name), digest, result.unit_hashes[name])
            blobs.put_bytes(result.next_scales.to_bytes())
    return result


class _Files:
    """The files of a snapshot that is being made; written from several threads."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._size = size
        self._open: dict[str, int] = {}
        self._behind: dict[int, Behind] = {}

    def path(self, name: str) -> Path:
        return self._folder / name

    def write(self, name: str, offset: int, data: memoryview) -> None:
        handle = self._open.get(name)
        if handle is None:
            fresh = os.open(self.path(name), os.O_RDWR | os.O_CREAT, 0o600)
            handle = self._open.setdefault(name, fresh)
            if handle is not fresh:
                os.close(fresh)
        behind = self._behind.get(handle)
        if behind is None:
            mine = Behind(partial(os.fdatasync, handle))
            behind = self._behind.setdefault(handle, mine)
        with storage_errors("the next model"):
            while len(data):
                written = os.pwrite(handle, data, offset)
                data, offset = data[written:], offset + written
        behind.more()

    def sync(self) -> None:
        with storage_errors("the next model"):
            for behind in self._behind.values():
                behind.finish()

    def close(self) -> None:
        for behind in self._behind.values():
            behind.close()
        for handle in self._open.values():
            os.close(handle)
        self._behind.clear()
        self._open.clear()


def _reader(path: Path, size: int, stack: ExitStack) -> Reader:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise CorruptStateError(f"the upload {path.name} is gone") from None
    stack.callback(_close, handle)
    if os.fstat(handle).st_size != size:
        raise CorruptStateError(f"the upload {path.name} is not of the round's size")
    return lambda offset, length: os.pread(handle, length, offset)


def _close(handle: int) -> None:
    """The uploads and the model that a round started from were read for the last time, but are
    kept for days: the system need not keep them in its cache as well, page by fresh page."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _float_file(blobs: Blobs, digest: Digest, manifest: Manifest, stack: ExitStack) -> Reader:
    """Reads theta or a buffer; mapped, its pages would count as this process's memory."""
    reader = blobs.open(digest)
    if reader.size != 4 * manifest.coordinates:
        raise CorruptStateError(
            f"blob {digest[:12]}… has {reader.size} bytes, a model of the manifest"
            f" {4 * manifest.coordinates}"
        )
    return _reader(reader.path, reader.size, stack)
