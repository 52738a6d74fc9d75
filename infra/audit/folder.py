"""Reading a copy of a log from disk: bounded, and believing nothing.

    checkpoint  checkpoints/<size>  tile/...  proofs/<index>.tlog-proof  blobs/sha256/<hex>
    log.vkey  trust-policy.txt

What cannot be read becomes a fault with its place, not an exception: an auditor wants the whole
list. The exception is a folder that is no log at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from policies.audit.records import Fault
from policies.audit.tree import LogFiles
from protocols.errors import MalformedMessageError, NotFoundError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.merkle import leaf_hash, tree_root
from protocols.tlog.note import MAX_NOTE, Note
from protocols.tlog.tiles import (
    HEIGHT,
    MAX_ENTRY,
    WIDTH,
    Tile,
    bundle_of,
    parse_bundle,
    parse_tile,
    tiles_between,
)
from protocols.tlog.trust_policy import MAX_POLICY, TrustPolicy

MAX_BUNDLE: Final = WIDTH * (MAX_ENTRY + 2)  # bytes
MAX_TILE: Final = WIDTH * 32  # bytes
MAX_ARCHIVE: Final = 1_000_000  # checkpoints
CHECKPOINT: Final = "checkpoint"
POLICY: Final = "trust-policy.txt"


def read_bounded(path: Path, limit: int) -> bytes:
    """A whole file of at most ``limit`` bytes.

    Raises:
        NotFoundError: it is not there.
        MalformedMessageError: it is larger, or no regular file.
    """
    try:
        if not path.is_file():
            raise NotFoundError(f"{path} is not there")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise MalformedMessageError(f"{path} has more than {limit} bytes")
    return data


def stated_size(checkpoint: bytes) -> int | None:
    """The size that a checkpoint states, whoever signed it."""
    try:
        return Checkpoint.parse(Note.parse(checkpoint).text).size
    except MalformedMessageError:
        return None


def read_log(folder: Path, *, checkpoint: bytes | None = None) -> LogFiles:
    """Everything of a log that ``policies.audit.tree`` checks.

    Args:
        checkpoint: to read under another head than the folder's.

    Raises:
        NotFoundError: the folder holds no checkpoint.
        MalformedMessageError: the checkpoint is larger than any can be.
    """
    archive = _read_archive(folder / "checkpoints")
    if checkpoint is None:
        checkpoint = read_bounded(folder / CHECKPOINT, MAX_NOTE)
        # A writer archives a head before it becomes the latest: the larger one is what was signed.
        newest = max(archive, default=0)
        if newest > (stated_size(checkpoint) or newest):
            checkpoint = archive.pop(newest)
    size = stated_size(checkpoint)
    torn: list[Fault] = []
    if size is None:  # then by what is there
        size = max((stated_size(data) or 0 for data in archive.values()), default=0)
    entries = _read_entries(folder, size, torn)
    row = _read_row(folder, min(size, len(entries)), torn)
    if len(row) == len(entries) == size:
        torn += _check_upper(folder, size, [leaf_hash(entry) for entry in entries], torn)
    return LogFiles(
        checkpoint=checkpoint, archive=archive, entries=entries, row=row, torn=tuple(torn)
    )


def read_trust_policy(path: Path) -> TrustPolicy:
    """Raises: NotFoundError, MalformedMessageError."""
    return TrustPolicy.parse(read_bounded(path, MAX_POLICY))


def _read_archive(folder: Path) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir())[:MAX_ARCHIVE]:
            if path.name.isascii() and path.name.isdigit() and str(int(path.name)) == path.name:
                found[int(path.name)] = read_bounded(path, MAX_NOTE)
    return found


def _tile(folder: Path, tile: Tile, limit: int) -> bytes:
    """A tile; of a partial one that was deleted, the part of the full one that replaced it."""
    path = folder / tile.path
    if tile.width == WIDTH or path.is_file():
        return read_bounded(path, limit)
    full = Tile(level=tile.level, n=tile.n)
    data = read_bounded(folder / full.path, limit)
    if tile.level is None:
        end = 0
        for _ in range(tile.width):
            end += 2 + int.from_bytes(data[end : end + 2], "big")
        return data[:end]
    return data[: tile.width * 32]


def _read_entries(folder: Path, size: int, torn: list[Fault]) -> list[bytes]:
    entries: list[bytes] = []
    for first in range(0, size, WIDTH):
        tile = bundle_of(first, size)
        try:
            entries += parse_bundle(_tile(folder, tile, MAX_BUNDLE), tile.width)
        except (NotFoundError, MalformedMessageError) as error:
            whole = _whole_entries(folder, tile)
            entries += whole
            torn.append(Fault.at("entry", first + len(whole), str(error)))
            break
    return entries


def _whole_entries(folder: Path, tile: Tile) -> list[bytes]:
    """The entries of a torn bundle up to where it is torn."""
    try:
        data = read_bounded(folder / tile.path, MAX_BUNDLE)
    except (NotFoundError, MalformedMessageError):
        return []
    found: list[bytes] = []
    at = 0
    while at + 2 <= len(data) and len(found) < tile.width:
        stop = at + 2 + int.from_bytes(data[at : at + 2], "big")
        if stop > len(data):
            break
        found.append(data[at + 2 : stop])
        at = stop
    return found if len(found) < tile.width else found[:-1]


def _read_row(folder: Path, size: int, torn: list[Fault]) -> list[bytes]:
    row: list[bytes] = []
    for first in range(0, size, WIDTH):
        tile = Tile(level=0, n=first // WIDTH, width=min(WIDTH, size - first))
        try:
            row += parse_tile(_tile(folder, tile, MAX_TILE), tile.width)
        except (NotFoundError, MalformedMessageError) as error:
            torn.append(
                Fault(check="tile", first=first, stop=first + tile.width, reason=str(error))
            )
            break
    return row


def _check_upper(
    folder: Path, size: int, hashes: list[bytes], torn: list[Fault]
) -> Iterator[Fault]:
    """Tiles above the lowest row hash the full tiles below; other readers rely on them."""
    below = hashes
    for level in range(1, 8):
        below = [
            tree_root(below[i : i + WIDTH])
            for i in range(0, len(below) - len(below) % WIDTH, WIDTH)
        ]
        if not below:
            return
        span = WIDTH**level
        for first in range(0, len(below), WIDTH):
            width = min(WIDTH, len(below) - first)
            tile = Tile(level=level, n=first // WIDTH, width=width)
            want = below[first : first + width]
            try:
                found = parse_tile(_tile(folder, tile, MAX_TILE), width)
            except (NotFoundError, MalformedMessageError) as error:
                stop = (first + width) * span
                yield Fault(check="tile", first=first * span, stop=stop, reason=str(error))
                continue
            for place, (mine, theirs) in enumerate(zip(want, found, strict=True)):
                if mine != theirs:
                    start = (first + place) * span
                    reason = f"{tile.path} does not follow from the tile below"
                    yield Fault(check="tile", first=start, stop=start + span, reason=reason)
                    break


def all_tiles(size: int) -> Iterator[Tile]:
    """Every tile of a log of that size."""
    yield from tiles_between(0, size)


Reader = Callable[[Tile], bytes]


def tile_reader(folder: Path) -> Reader:
    """Reads tiles for provers."""

    def read(tile: Tile) -> bytes:
        return _tile(folder, tile, MAX_BUNDLE if tile.level is None else MAX_TILE)

    return read


__all__ = [
    "CHECKPOINT",
    "HEIGHT",
    "POLICY",
    "all_tiles",
    "read_bounded",
    "read_log",
    "read_trust_policy",
    "stated_size",
    "tile_reader",
]
