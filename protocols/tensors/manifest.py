"""The manifest of a parameter set: which tensors a model has, in which order.

theta is one float32 vector of D coordinates: the tensors one after the other in manifest order,
each in C order. The manifest's digest stands in the plan and in every snapshot, so that two
parties never put different tensors at the same coordinate.

    {"schema":"minga.manifest/1","tensors":[{"name":"w","shape":[2,3]},{"name":"b","shape":[3]}]}
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from protocols.canonical import canonical_bytes, parse_canonical
from protocols.errors import MalformedMessageError, ManifestMismatchError
from protocols.identifiers import Digest
from protocols.tensors.sizes import BLOCK
from protocols.tensors.units import blob_digest

MANIFEST_SCHEMA = "minga.manifest/1"
MAX_COORDINATES = 2**40
_MAX_DIMENSIONS = 16
_NAME = re.compile(r"[!-~]{1,255}", re.ASCII)  # printable ASCII, no space


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One float32 tensor: its name in the model and its shape; () is a single number."""

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or _NAME.fullmatch(self.name) is None:
            raise MalformedMessageError(
                f"a tensor name is 1 to 255 printable ASCII characters, got {self.name!r:.80}"
            )
        if not isinstance(self.shape, tuple) or len(self.shape) > _MAX_DIMENSIONS:
            raise MalformedMessageError(
                f"tensor {self.name}: a shape is a list of at most {_MAX_DIMENSIONS} sizes"
            )
        for size in self.shape:
            if type(size) is not int or not 1 <= size <= MAX_COORDINATES:
                raise MalformedMessageError(
                    f"tensor {self.name}: a size must be a whole number of at least 1"
                )

    @property
    def coordinates(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Number of scale blocks."""
        return -(-self.coordinates // BLOCK)


@dataclass(frozen=True, slots=True)
class Segment:
    """A tensor that is selected in a round, as a range of theta."""

    name: str
    start: int  # first coordinate in theta
    stop: int  # one past the last
    first_block: int  # index of its first scale block, counted over the whole manifest

    @property
    def coordinates(self) -> int:
        """Number of coordinates."""
        return self.stop - self.start


@dataclass(frozen=True)
class Manifest:
    """Float32 tensors in the order that everybody uses."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise MalformedMessageError("a manifest must name at least one tensor")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise MalformedMessageError("a manifest names a tensor twice")
        if self.coordinates > MAX_COORDINATES:
            raise MalformedMessageError(
                f"a manifest of {self.coordinates} coordinates; at most 2**40 are taken"
            )

    @cached_property
    def coordinates(self) -> int:
        """D, the number of coordinates of theta."""
        return sum(tensor.coordinates for tensor in self.tensors)

    @cached_property
    def blocks(self) -> int:
        """Number of scale blocks of all tensors: the length of a round's scales."""
        return sum(tensor.blocks for tensor in self.tensors)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Every tensor as a range of theta, in order."""
        found, start, block = [], 0, 0
        for tensor in self.tensors:
            stop = start + tensor.coordinates
            found.append(Segment(tensor.name, start, stop, block))
            start, block = stop, block + tensor.blocks
        return tuple(found)

    @cached_property
    def _by_name(self) -> dict[str, Segment]:
        return {segment.name: segment for segment in self.segments}

    def segment(self, name: str) -> Segment:
        """The range of one tensor.

        Raises:
            ManifestMismatchError: there is no such tensor.
        """
        found = self._by_name.get(name)
        if found is None:
            raise ManifestMismatchError(f"the manifest has no tensor {name!r:.80}")
        return found

    def offset(self, name: str) -> int:
        """First coordinate of a tensor in theta.

        Raises:
            ManifestMismatchError: there is no such tensor.
        """
        return self.segment(name).start

    def select(self, names: Sequence[str] | Literal["all", "none"]) -> tuple[Segment, ...]:
        """The tensors whose update is exchanged, in manifest order whatever the order given.

        Raises:
            ManifestMismatchError: there is no such tensor.
            MalformedMessageError: a name is given twice.
        """
        if names == "all":
            return self.segments
        if names == "none":
            return ()
        if isinstance(names, str):
            raise MalformedMessageError(f"select takes all, none or a list, not {names!r:.80}")
        if len(set(names)) != len(names):
            raise MalformedMessageError("a tensor is selected twice")
        return tuple(sorted((self.segment(name) for name in names), key=lambda s: s.start))

    def tensor_at(self, coordinate: int) -> str:
        """Name of the tensor that holds a coordinate of theta, for diagnostics."""
        return next(s.name for s in self.segments if s.start <= coordinate < s.stop)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        tensors = [{"name": t.name, "shape": list(t.shape)} for t in self.tensors]
        return canonical_bytes({"schema": MANIFEST_SCHEMA, "tensors": tensors})

    @cached_property
    def digest(self) -> Digest:
        """Name of the manifest's blob: what plans and snapshots name."""
        return blob_digest(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            MalformedMessageError: not canonical, unknown fields, a name twice, a size below 1.
        """
        value = parse_canonical(data)
        if not isinstance(value, dict) or set(value) != {"schema", "tensors"}:
            raise MalformedMessageError("a manifest has the fields schema and tensors")
        if value["schema"] != MANIFEST_SCHEMA or not isinstance(value["tensors"], list):
            raise MalformedMessageError(f"a manifest is a {MANIFEST_SCHEMA} with a list of tensors")
        return cls(tuple(_tensor(item) for item in value["tensors"]))


def _tensor(item: Any) -> TensorSpec:
    if not isinstance(item, dict) or set(item) != {"name", "shape"}:
        raise MalformedMessageError("a tensor has the fields name and shape")
    if not isinstance(item["shape"], list):
        raise MalformedMessageError("the shape of a tensor is a list")
    return TensorSpec(item["name"], tuple(item["shape"]))
