"""The models this node holds, and how it computes the next one itself.

    models/<run>/plan.json, manifest.json
    models/<run>/<model_root>/theta.f32, <buffer>.f32, scales.bin, snapshot.json
    models/<run>/<model_root>/synced     the files above survive a power failure

After a release the node downloads the integer sum, applies the outer step to the model that the
round started from, and compares roots: what the coordinator publishes is a claim until then. A
node that lacks the earlier model fetches the published files, checked against their digests.

A state is usable as soon as it has its name; it is synced to the disk some seconds later, if it is
still there. After a crash every state without the mark ``synced`` is hashed again, and dropped if
it is not what it says.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from node_agent.bulk import Progress, fetch, fetch_bytes
from node_agent.client import Connection
from node_agent.spool import atomic_write, sync_folder
from protocols.errors import (
    CorruptStateError,
    FederationError,
    ManifestMismatchError,
    NotFoundError,
    StorageFullError,
)
from protocols.identifiers import Digest, RoundId, RunId
from protocols.outer_step import apply_outer_step, next_snapshot
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.tensors.manifest import Manifest
from protocols.tensors.planar import PackedVector
from protocols.tensors.scales import Scales
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import UnitHasher

_MANIFEST_LIMIT = 64 * 2**20  # bytes
_READ = 4 * 2**20  # bytes


def _silent(_done: int, _total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """One model on disk."""

    snapshot: Snapshot
    manifest: Manifest
    folder: Path

    @property
    def theta_path(self) -> Path:
        """Raw little-endian float32, manifest order."""
        return self.folder / "theta.f32"

    def theta(self) -> NDArray[np.float32]:
        """Shape [D], mapped, read only."""
        return self._array("theta")

    def buffers(self) -> dict[str, NDArray[np.float32]]:
        """Outer buffers by name, each shape [D], mapped, read only."""
        return {name: self._array(name) for name in self.snapshot.buffers}

    def scales(self) -> Scales:
        """Scales of the round that starts from this model."""
        return Scales.from_bytes((self.folder / "scales.bin").read_bytes(), self.manifest)

    def checked(self, name: str) -> Path:
        """The file of ``theta`` or of a buffer, of the size that it must have.

        Raises:
            CorruptStateError: it has another one.
        """
        path = self.folder / f"{name}.f32"
        if not path.exists() or path.stat().st_size != 4 * self.manifest.coordinates:
            raise CorruptStateError(f"{path} does not have {self.manifest.coordinates} float32")
        return path

    def _array(self, name: str) -> NDArray[np.float32]:
        path = self.checked(name)
        return np.memmap(path, dtype="<f4", mode="r", shape=(self.manifest.coordinates,))


def _files(snapshot: Snapshot) -> dict[str, Digest]:
    """The files of a state and their digests."""
    buffers = {f"{name}.f32": digest for name, digest in snapshot.buffers.items()}
    return {"theta.f32": snapshot.theta, **buffers, "scales.bin": snapshot.scales}


def _digest_of_file(path: Path) -> Digest | None:
    hasher = UnitHasher()
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_READ):
                hasher.update(piece)
    except FileNotFoundError:
        return None
    return hasher.digest()


def _reader(stack: ExitStack, path: Path) -> Callable[[int, int], bytes]:
    """``read(offset, length)`` of a file that stays open as long as ``stack``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)

    def read(offset: int, length: int) -> bytes:
        data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise CorruptStateError(f"{path} ends before byte {offset + length}")
        return data

    return read


class Models:
    """All models of one node. Blocking methods say so; call them from a thread."""

    def __init__(self, root: Path) -> None:
        self._root = root

    # -- what is here ----------------------------------------------------------------------------

    def folder(self, run: RunId) -> Path:
        """The folder of one run."""
        return self._root / run

    def plan_path(self, run: RunId) -> Path:
        """Canonical plan, for the worker."""
        return self.folder(run) / "plan.json"

    def manifest_path(self, run: RunId) -> Path:
        """Canonical manifest, for the worker."""
        return self.folder(run) / "manifest.json"

    def held(self, run: RunId) -> frozenset[Digest]:
        """Roots of the complete models of a run."""
        with suppress(FileNotFoundError):
            return frozenset(
                Digest(path.name)
                for path in self.folder(run).iterdir()
                if not path.name.startswith(".") and (path / "snapshot.json").exists()
            )
        return frozenset()

    def open(self, run: RunId, root: Digest) -> HeldModel:
        """A model that is here.

        Raises:
            NotFoundError: it is not.
            CorruptStateError: the documents on disk contradict each other.
        """
        folder = self.folder(run) / root
        try:
            snapshot = Snapshot.from_bytes((folder / "snapshot.json").read_bytes())
            manifest = Manifest.from_bytes(self.manifest_path(run).read_bytes())
        except FileNotFoundError:
            raise NotFoundError(f"this node does not hold model {root[:12]}… of {run}") from None
        if snapshot.model_root != root or manifest.digest != snapshot.manifest:
            raise CorruptStateError(f"{folder} does not hold the model that it is named for")
        return HeldModel(snapshot=snapshot, manifest=manifest, folder=folder)

    def recover(self) -> list[str]:
        """At start: drop what is unfinished or not what it says. Blocking.

        Returns:
            One sentence for each state that was dropped.
        """
        dropped = []
        for run in sorted(path for path in self._root.iterdir() if path.is_dir()):
            for folder in sorted(path for path in run.iterdir() if path.is_dir()):
                if folder.name.startswith(".step-"):
                    shutil.rmtree(folder)
                elif not folder.name.startswith(".") and not (folder / "synced").exists():
                    if self._sound(folder):
                        self._sync(folder)
                    else:
                        shutil.rmtree(folder)
                        dropped.append(f"model {folder.name[:12]}… of {run.name} was torn")
        return dropped

    def sound(self, run: RunId, root: Digest) -> bool:
        """Whether a model's files are what their digests say. Blocking: every byte is read."""
        return self._sound(self.folder(run) / root)

    def drop(self, run: RunId, root: Digest) -> None:
        """Delete one model. Blocking."""
        shutil.rmtree(self.folder(run) / root, ignore_errors=True)

    def _sound(self, folder: Path) -> bool:
        try:
            snapshot = Snapshot.from_bytes((folder / "snapshot.json").read_bytes())
        except (OSError, FederationError):
            return False
        return snapshot.model_root == folder.name and all(
            _digest_of_file(folder / name) == digest for name, digest in _files(snapshot).items()
        )

    def sync(self, run: RunId, root: Digest) -> None:
        """Make a model survive a power failure. Blocking."""
        folder = self.folder(run) / root
        if folder.exists() and not (folder / "synced").exists():
            self._sync(folder)

    def _sync(self, folder: Path) -> None:
        with suppress(FileNotFoundError):  # superseded and removed while we sync
            for path in folder.iterdir():
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)
            sync_folder(folder.parent)
            (folder / "synced").touch()
            sync_folder(folder)

    def keep_only(self, run: RunId, roots: frozenset[Digest]) -> None:
        """Delete every other model of a run, and what was left half done. Blocking."""
        with suppress(FileNotFoundError):
            for path in self.folder(run).iterdir():
                if path.is_dir() and path.name.removeprefix(".fetch-") not in roots:
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name.startswith(".sum-") or ".sum-" in path.name:
                    path.unlink(missing_ok=True)

    def forget(self, run: RunId) -> None:
        """Delete everything of a run. Blocking."""
        shutil.rmtree(self.folder(run), ignore_errors=True)

    # -- fetching --------------------------------------------------------------------------------

    async def obtain(
        self,
        connection: Connection,
        plan: Plan,
        snapshot: Snapshot,
        *,
        round_: RoundId,
        progress: Progress = _silent,
    ) -> HeldModel:
        """Fetch a model's files, each checked against its digest; resumes what a crash left.

        Files that another model of the run shares are not fetched again.

        Raises:
            ManifestMismatchError: the snapshot is not of the plan's manifest.
            DigestMismatchError, NotFoundError, NotReadyError: as ``bulk.fetch``.
        """
        run, root = plan.run_id, snapshot.model_root
        if snapshot.manifest != plan.model.manifest:
            raise ManifestMismatchError(f"the model of round {round_} has another manifest")
        folder = self.folder(run)
        manifest = await self.manifest(connection, plan)
        if root in self.held(run):
            return self.open(run, root)
        work = folder / f".fetch-{root}"
        work.mkdir(exist_ok=True, mode=0o700)
        shared = self._shared(run)
        for name, digest in _files(snapshot).items():
            target = work / name
            if target.exists():
                continue
            if digest in shared:
                os.link(shared[digest], target)
                continue
            size = manifest.blocks if name == "scales.bin" else 4 * manifest.coordinates
            self._check_room(folder, size)
            await fetch(connection, digest, target, size=size, round_=round_, progress=progress)
        return self._finish(run, work, snapshot)

    async def manifest(self, connection: Connection, plan: Plan) -> Manifest:
        """The run's manifest, fetched the first time; plan and manifest are kept for the worker.

        Raises:
            ManifestMismatchError: it is not the one that the plan names.
            DigestMismatchError, NotFoundError, NotReadyError: as ``bulk.fetch_bytes``.
        """
        run = plan.run_id
        self.folder(run).mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.plan_path(run).exists():
            atomic_write(self.plan_path(run), plan.to_bytes())
        path = self.manifest_path(run)
        if not path.exists():
            digest = Digest(plan.model.manifest)
            data = await fetch_bytes(connection, digest, limit=_MANIFEST_LIMIT)
            found = Manifest.from_bytes(data)
            if found.digest != plan.model.manifest:
                raise ManifestMismatchError("the manifest is not the one that the plan names")
            atomic_write(path, data)
        return Manifest.from_bytes(path.read_bytes())

    def _shared(self, run: RunId) -> dict[Digest, Path]:
        found: dict[Digest, Path] = {}
        for root in self.held(run):
            folder = self.folder(run) / root
            if (folder / "synced").exists():
                snapshot = Snapshot.from_bytes((folder / "snapshot.json").read_bytes())
                found.update({d: folder / name for name, d in _files(snapshot).items()})
        return found

    def _check_room(self, folder: Path, size: int) -> None:
        free = shutil.disk_usage(folder).free
        if free < size + 64 * 2**20:
            raise StorageFullError(f"{size} bytes do not fit into {folder}: {free} are free")

    def _finish(self, run: RunId, work: Path, snapshot: Snapshot) -> HeldModel:
        root = snapshot.model_root
        atomic_write(work / "snapshot.json", snapshot.to_bytes())
        final = self.folder(run) / root
        if final.exists():  # without its snapshot.json it was never complete
            if (final / "snapshot.json").exists():
                shutil.rmtree(work)
                return self.open(run, root)
            shutil.rmtree(final)
        work.replace(final)
        return self.open(run, root)

    # -- computing -------------------------------------------------------------------------------

    def sum_path(self, run: RunId, digest: Digest) -> Path:
        """Where a downloaded sum lies until the outer step is done."""
        return self.folder(run) / f".sum-{digest}"

    def compute_next(
        self,
        *,
        plan: Plan,
        index: int,
        start: HeldModel,
        sum_path: Path,
        survivors: int,
        threads: int,
    ) -> tuple[HeldModel, Mapping[str, int]]:
        """Apply a round's sum to the model it started from. Blocking, O(unit) memory.

        Args:
            plan: of the run.
            index: which of the plan's rounds it was.
            start: the model that the round started from.
            sum_path: the packed sum, checked against its digest.
            survivors: nodes in the sum.
            threads: units worked on at once.

        Returns:
            The next model, on disk under its own root, and the round's summed metrics.

        Raises:
            IntegrityError: the sum cannot be one of these survivors; see ``apply_outer_step``.
            StorageFullError: no room.
        """
        run, manifest = plan.run_id, start.manifest
        layout, ring = round_layout(plan, index, manifest), round_ring(plan)
        work = self.folder(run) / f".step-{start.snapshot.model_root}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        self._check_room(work, 4 * manifest.coordinates * (1 + len(start.snapshot.buffers)))
        files: dict[str, int] = {}

        def write(name: str, offset: int, data: memoryview) -> None:
            if name not in files:
                path = work / f"{name}.f32"
                files[name] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            while data:
                written = os.pwrite(files[name], data, offset)
                offset, data = offset + written, data[written:]

        try:
            with ExitStack() as stack:
                # Read, not mapped: the pages of a mapped file would count as this process's memory.
                packed = PackedVector(_reader(stack, sum_path), layout.coordinates, ring)
                result = apply_outer_step(
                    outer=plan.outer,
                    scale_rule=plan.vector.scale,
                    layout=layout,
                    manifest=manifest,
                    snapshot_counters=start.snapshot.counters,
                    theta=_reader(stack, start.checked("theta")),
                    buffers={
                        name: _reader(stack, start.checked(name)) for name in start.snapshot.buffers
                    },
                    scales=start.scales(),
                    sum_reader=packed,
                    ring=ring,
                    nodes=survivors,
                    roster=len(plan.roster),
                    writer=write,
                    noisy=plan.adds_noise,
                    threads=threads,
                )
        except OSError as error:
            raise StorageFullError(f"{work}: {error.strerror}") from None
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        following = next_snapshot(start.snapshot, result)
        for name in _files(following):
            if not (work / name).exists() and name != "scales.bin":
                os.link(start.folder / name, work / name)  # what the round did not change
        (work / "scales.bin").write_bytes(result.next_scales.to_bytes())
        return self._finish(run, work, following), result.metrics
