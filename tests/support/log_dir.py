"""Looking at a log directory from outside: nothing of the writer is used, all is read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from policies.audit.replay import Replay
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.cosignature import OpenedCheckpoint, open_checkpoint
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.note import KeyRing, VerifierKey
from protocols.tlog.proofs import root_of, stored
from protocols.tlog.tiles import WIDTH, parse_bundle, parse_tile, tiles_between


@dataclass(frozen=True)
class Read:
    """What a directory holds under its checkpoint."""

    head: Checkpoint
    opened: OpenedCheckpoint
    entries: tuple[bytes, ...]

    def replay(self) -> Replay:
        state = Replay()
        for entry in self.entries:
            state.take(entry)
        return state


def read_log(folder: Path, *, now: int = 2_000_000_000) -> Read:
    """Verify signature, every tile, every archived checkpoint, and give the leaves back."""
    vkey = VerifierKey.parse((folder / "log.vkey").read_text().strip())
    keys = [vkey]
    lines = (folder / "trust-policy.txt").read_text().splitlines()
    keys += [VerifierKey.parse(x.split(" ")[2]) for x in lines if x.startswith("witness ")]
    ring = KeyRing.of(keys)
    opened = open_checkpoint((folder / "checkpoint").read_bytes(), ring, now=now)
    head = opened.checkpoint
    entries: list[bytes] = []
    for n in range(-(-head.size // WIDTH)):
        width = min(WIDTH, head.size - n * WIDTH)
        entries += parse_bundle(_tile(folder, f"tile/entries/{n:03}", width), width)
    hashes = stored([leaf_hash(entry) for entry in entries])
    assert root_of(hashes, head.size) == head.root
    for tile in tiles_between(0, head.size):
        if tile.level is None:
            continue
        row = parse_tile((folder / tile.path).read_bytes(), tile.width)
        first = tile.n * WIDTH
        want = tuple(hashes(8 * tile.level, i) for i in range(first, first + tile.width))
        assert row == want, tile.path
    for path in (folder / "checkpoints").iterdir():
        if path.name.startswith("."):
            continue  # left by a crash
        old = open_checkpoint(path.read_bytes(), ring, now=now).checkpoint
        assert str(old.size) == path.name
        if old.size <= head.size:  # archived before it became the latest
            assert root_of(hashes, old.size) == old.root
    return Read(head=head, opened=opened, entries=tuple(entries))


def _tile(folder: Path, path: str, width: int) -> bytes:
    """A partial tile may have gone once the full one exists: its beginning is the same."""
    full = folder / path
    if width == WIDTH or full.exists():
        data = full.read_bytes()
        if width == WIDTH:
            return data
        at = 0
        for _ in range(width):
            at += 2 + int.from_bytes(data[at : at + 2], "big")
        return data[:at]
    return (folder / f"{path}.p" / str(width)).read_bytes()
