"""Layouts of rounds, from the plan and the manifest blob; read once and kept."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from coordinator.blobs import Blobs
from protocols.identifiers import Digest
from protocols.plan import Plan
from protocols.round_vector import metric_names, round_layout
from protocols.tensors.layout import VectorLayout
from protocols.tensors.manifest import Manifest

_KEEP = 64


@dataclass(slots=True)
class Layouts:
    """A small cache: nothing in it can go stale, a digest names one content for ever."""

    blobs: Blobs
    _manifests: dict[Digest, Manifest] = field(default_factory=dict)
    _layouts: dict[Hashable, VectorLayout] = field(default_factory=dict)

    def manifest(self, blob: Digest) -> Manifest:
        """The manifest stored as ``blob``."""
        found = self._manifests.get(blob)
        if found is None:
            found = Manifest.from_bytes(self.blobs.read_all(blob, limit=64 * 2**20))
            self._manifests[blob] = found
        return found

    def of(self, plan: Plan, index: int) -> VectorLayout:
        """Layout of the plan's round ``index``."""
        manifest = Digest(plan.model.manifest)
        key = (manifest, plan.selection_in(index), metric_names(plan, index))
        found = self._layouts.get(key)
        if found is None:
            found = round_layout(plan, index, self.manifest(manifest))
            if len(self._layouts) >= _KEEP:
                self._layouts.clear()
            self._layouts[key] = found
        return found
