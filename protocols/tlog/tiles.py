"""Where the hashes and entries of a log lie: C2SP tlog-tiles v0.1.0, height 8.

    tile/<L>/<N>[.p/<W>]         256 (or W) hashes of level 8 L; 32 bytes each
    tile/entries/<N>[.p/<W>]     256 (or W) entries, each behind a big-endian uint16 length
    <N>                          groups of three digits, all but the last behind an x: x001/x234/067

A tile of level L + 1 hashes only full tiles of level L, so a full tile never changes. Go's older
sumdb layout has one more element (``tile/8/...``, ``data``); such paths are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from protocols.errors import MalformedMessageError
from protocols.tlog.merkle import tree_root
from protocols.tlog.proofs import SubtreeHashes
from protocols.tlog.text import HASH_BYTES, MAX_SIZE

HEIGHT: Final = 8  # levels of the tree in one tile
WIDTH: Final = 256  # hashes or entries in a full tile
MAX_LEVEL: Final = 63
MAX_ENTRY: Final = 65_535  # bytes: the length has two of them. A leaf of ours is at most 32 KiB

_PATH: Final = re.compile(
    r"tile/(?P<level>entries|0|[1-9][0-9]?)/(?P<n>(?:x[0-9]{3}/)*[0-9]{3})"
    r"(?:\.p/(?P<width>[1-9][0-9]{0,2}))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Tile:
    """The name of one tile of hashes, or of one entry bundle."""

    level: int | None  # 0 to 63; None for an entry bundle
    n: int  # from 0
    width: int = WIDTH  # 1 to 255 for a partial tile

    def __post_init__(self) -> None:
        level_ok = self.level is None or 0 <= self.level <= MAX_LEVEL
        if not (level_ok and 0 <= self.n <= MAX_SIZE and 1 <= self.width <= WIDTH):
            raise MalformedMessageError(
                f"no tile has level {self.level}, number {self.n} and width {self.width}"
            )

    @classmethod
    def parse(cls, path: str) -> Tile:
        """Read a path; each tile has exactly one.

        Raises:
            MalformedMessageError: any other text.
        """
        match = _PATH.fullmatch(path) if len(path) <= 64 else None
        if match is None:
            raise MalformedMessageError(f"not the path of a tile: {path!r:.80}")
        level, width = match["level"], match["width"]
        tile = cls(
            level=None if level == "entries" else int(level),
            n=int(match["n"].replace("x", "").replace("/", "")),
            width=WIDTH if width is None else int(width),
        )
        if tile.path != path:  # x000/001, or .p/256
            raise MalformedMessageError(f"not the canonical path of a tile: {path!r:.80}")
        return tile

    @property
    def path(self) -> str:
        """Below the root of the log, without a slash in front."""
        digits = str(self.n)
        digits = digits.zfill(-(-len(digits) // 3) * 3)
        groups = [digits[i : i + 3] for i in range(0, len(digits), 3)]
        number = "/".join(["x" + group for group in groups[:-1]] + groups[-1:])
        level = "entries" if self.level is None else str(self.level)
        partial = "" if self.width == WIDTH else f".p/{self.width}"
        return f"tile/{level}/{number}{partial}"


def bundle_of(index: int, size: int) -> Tile:
    """The entry bundle that holds entry ``index`` in a log of ``size``.

    Raises:
        ValueError: there is no such entry.
    """
    if not 0 <= index < size:
        raise ValueError(f"no entry {index} in a log of {size}")
    n = index // WIDTH
    return Tile(level=None, n=n, width=min(WIDTH, size - n * WIDTH))


def tiles_between(old: int, new: int) -> Iterator[Tile]:
    """The tiles to write when a log grows: those of ``new`` that a log of ``old`` does not have.

    In the order in which they are written: entry bundles, then hashes from the lowest level up.
    ``tiles_between(0, size)`` are all tiles of a log. A partial tile may be deleted once the full
    one exists.

    Raises:
        ValueError: not 0 <= old <= new.
    """
    if not 0 <= old <= new <= MAX_SIZE:
        raise ValueError(f"want 0 <= old <= new, got old={old} new={new}")
    for level in (None, *range(MAX_LEVEL + 1)):
        shift = HEIGHT * (level or 0)
        had, has = old >> shift, new >> shift  # hashes of this level
        if has == had:
            if level is not None:
                return  # then no level above has grown either
            continue
        for n in range(had // WIDTH, has // WIDTH):
            yield Tile(level=level, n=n)
        if has % WIDTH:
            yield Tile(level=level, n=has // WIDTH, width=has % WIDTH)


def parse_tile(data: bytes, width: int) -> tuple[bytes, ...]:
    """The hashes in a tile of hashes.

    Raises:
        MalformedMessageError: not exactly ``width`` hashes of 32 bytes.
    """
    if len(data) != width * HASH_BYTES:
        raise MalformedMessageError(f"a tile of {len(data)} bytes, want {width * HASH_BYTES}")
    return tuple(data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES))


def write_tile(hashes: SubtreeHashes, tile: Tile) -> bytes:
    """The bytes of a tile of hashes.

    Raises:
        ValueError: the tile is an entry bundle.
    """
    if tile.level is None:
        raise ValueError("an entry bundle holds entries, not hashes")
    first = tile.n * WIDTH
    return b"".join(hashes(HEIGHT * tile.level, i) for i in range(first, first + tile.width))


def write_bundle(entries: Sequence[bytes]) -> bytes:
    """The bytes of an entry bundle.

    Raises:
        MalformedMessageError: an entry longer than 65,535 bytes, no entry, or more than 256.
    """
    if not 1 <= len(entries) <= WIDTH:
        raise MalformedMessageError(f"a bundle has 1 to {WIDTH} entries, this one {len(entries)}")
    longest = max(map(len, entries))
    if longest > MAX_ENTRY:
        raise MalformedMessageError(f"an entry of {longest} bytes; the format has {MAX_ENTRY}")
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def parse_bundle(data: bytes, width: int) -> tuple[bytes, ...]:
    """The entries in a bundle, as they were hashed.

    Raises:
        MalformedMessageError: not exactly ``width`` entries and nothing after them.
    """
    entries: list[bytes] = []
    at = 0
    while at < len(data) and len(entries) < width:
        start = at + 2
        at = start + int.from_bytes(data[at:start], "big")
        if start > len(data) or at > len(data):
            raise MalformedMessageError("an entry bundle ends inside an entry")
        entries.append(data[start:at])
    if len(entries) != width or at != len(data):
        raise MalformedMessageError(f"an entry bundle does not hold exactly {width} entries")
    return tuple(entries)


def tile_hashes(size: int, read: Callable[[Tile], bytes]) -> SubtreeHashes:
    """Subtree hashes out of the tiles of a log of ``size``: what provers ask for.

    Nothing is verified here: derive the root (``proofs.root_of``) and compare it with a checkpoint
    before believing a tile. The last 64 tiles are kept.

    Args:
        size: leaves; says which tiles are partial.
        read: the bytes of a tile; whatever it raises passes through.

    Returns:
        A function that raises MalformedMessageError when a tile does not have its length, and
        ValueError when asked for a subtree that is not complete at this size.
    """

    @lru_cache(maxsize=64)
    def row(level: int, n: int) -> tuple[bytes, ...]:
        width = min(WIDTH, (size >> HEIGHT * level) - n * WIDTH)
        return parse_tile(read(Tile(level=level, n=n, width=width)), width)

    def hashes(level: int, index: int) -> bytes:
        if (index + 1) << level > size:
            raise ValueError(f"no complete subtree {index} of level {level} in a log of {size}")
        above = level % HEIGHT  # levels between the row of the tile and what is asked for
        first = index << above
        part = row(level // HEIGHT, first // WIDTH)
        return tree_root(part[first % WIDTH : first % WIDTH + (1 << above)])

    return hashes
