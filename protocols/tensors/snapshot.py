"""The snapshot document: the model between two rounds, as the digests of its files.

    {"buffers":{},"counters":{"steps":0},"manifest":"..","round":0,"scales":"..",
     "schema":"minga.snapshot/1","theta":".."}

theta and every outer buffer are files of D little-endian float32 in manifest order; scales are one
signed byte for each block. ``model_root`` is what plans, masks, logs and nodes compare: two
parties with the same root start the next round from the same bits, momentum and scales included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from protocols.canonical import canonical_bytes, hash_hex, parse_canonical
from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest, parse_digest
from protocols.tensors.manifest import Manifest
from protocols.tensors.scales import Scales

SNAPSHOT_SCHEMA = "minga.snapshot/1"
STEPS = "steps"  # the counter of outer steps applied so far
_FIELDS = {"schema", "round", "manifest", "theta", "buffers", "scales", "counters"}
_KEY = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
_MAX_COUNT = 2**53 - 1


def _count(name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise MalformedMessageError(f"snapshot: {name} must be a whole number from 0 to 2**53 - 1")
    return value


@dataclass(frozen=True)
class Snapshot:
    """The state that round ``round`` starts from."""

    round: int  # 0: the initial model
    manifest: Digest
    theta: Digest  # name of the blob theta.f32
    buffers: Mapping[str, Digest]  # of the outer optimizer; one that is missing is all zeros
    scales: Digest
    counters: Mapping[str, int]  # ``steps``: outer steps so far

    def __post_init__(self) -> None:
        _count("round", self.round)
        for digest in (self.manifest, self.theta, self.scales, *self.buffers.values()):
            parse_digest(digest)
        for name in (*self.buffers, *self.counters):
            if not isinstance(name, str) or _KEY.fullmatch(name) is None:
                raise MalformedMessageError(f"snapshot: {name!r:.40} is not a name")
        for name, value in self.counters.items():
            _count(name, value)

    @classmethod
    def initial(cls, manifest: Manifest, theta: Digest, scales: Scales) -> Snapshot:
        """The snapshot of round 0: no buffers, no steps. Raises: ManifestMismatchError."""
        scales.check(manifest)
        return cls(0, manifest.digest, theta, {}, scales.digest, {STEPS: 0})

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_bytes(
            {
                "schema": SNAPSHOT_SCHEMA,
                "round": self.round,
                "manifest": self.manifest,
                "theta": self.theta,
                "buffers": dict(self.buffers),
                "scales": self.scales,
                "counters": dict(self.counters),
            }
        )

    @cached_property
    def model_root(self) -> Digest:
        """What parties compare."""
        return hash_hex("minga/snapshot/v1", self.to_bytes())

    def blobs(self) -> tuple[Digest, ...]:
        """Names of all blobs of the snapshot: theta, buffers by name, scales."""
        return (self.theta, *(self.buffers[name] for name in sorted(self.buffers)), self.scales)

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Read a snapshot document.

        Raises:
            MalformedMessageError: not canonical, unknown fields, or a field is wrong.
        """
        value = parse_canonical(data)
        if not isinstance(value, dict) or set(value) != _FIELDS:
            raise MalformedMessageError("a snapshot has other fields than it must")
        if value["schema"] != SNAPSHOT_SCHEMA:
            raise MalformedMessageError(f"a snapshot is a {SNAPSHOT_SCHEMA}")
        for name in ("buffers", "counters"):
            if not isinstance(value[name], dict):
                raise MalformedMessageError(f"snapshot: {name} must be an object")
        return cls(
            round=value["round"],
            manifest=value["manifest"],
            theta=value["theta"],
            buffers=value["buffers"],
            scales=value["scales"],
            counters=value["counters"],
        )
