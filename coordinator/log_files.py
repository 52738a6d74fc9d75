"""The static directory of a log, and the ratchet: files that are whole or not there.

    tile/<L>/<N>[.p/<W>]  tile/entries/<N>[.p/<W>]   never change once they are full
    checkpoints/<size>                               every checkpoint that was published
    checkpoint                                       the latest
    log.vkey  trust-policy.txt                       for readers; they bring their own anchors
    blobs/sha256/<hex>                               what is too large for a leaf

Each file is written beside its place, made durable and renamed; tiles come before the checkpoint
that needs them. The tiles are a copy of the ledger's leaves: whatever a crash left out is written
again from there. The ratchet is not a copy of anything: it is the memory that a restored database
has lost.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from protocols.errors import CorruptStateError, MalformedMessageError, StorageFullError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.note import Note
from protocols.tlog.proofs import SubtreeHashes
from protocols.tlog.tiles import WIDTH, Tile, tiles_between, write_bundle, write_tile

_TEMPORARY: Final = ".tmp-"
Entries = Callable[[int, int], list[bytes]]  # (first, end) -> entries


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole and durable, or leave what was there.

    Raises:
        StorageFullError: no room; nothing changed.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageFullError(f"{path} cannot be written: {error.strerror}") from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class LogFiles:
    """One log directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folder; remove what a crash left half written."""
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.rglob(f"{_TEMPORARY}*"):
            leftover.unlink(missing_ok=True)

    def published(self) -> Checkpoint | None:
        """The head in ``checkpoint``; None before the first. Its signatures are not looked at.

        Raises:
            CorruptStateError: the file is no checkpoint.
        """
        found = self.published_note()
        return None if found is None else found[1]

    def published_note(self) -> tuple[Note, Checkpoint] | None:
        """The same with its signatures and cosignatures.

        Raises:
            CorruptStateError: the file is no checkpoint.
        """
        try:
            note = Note.parse((self.root / "checkpoint").read_bytes())
            return note, Checkpoint.parse(note.text)
        except FileNotFoundError:
            return None
        except MalformedMessageError as error:
            raise CorruptStateError(f"{self.root / 'checkpoint'}: {error}") from None

    def grow(self, old: int, new: int, *, hashes: SubtreeHashes, entries: Entries) -> None:
        """Write the tiles of a log of ``new`` leaves that one of ``old`` does not have.

        Tiles are written again where they are there already: ``old`` may be too small.
        """
        for tile in tiles_between(old, new):
            if tile.level is None:
                first = tile.n * WIDTH
                data = write_bundle(entries(first, first + tile.width))
            else:
                data = write_tile(hashes, tile)
            self._write(tile.path, data)

    def publish(self, note: bytes, size: int) -> None:
        """Make a checkpoint public; its tiles are there.

        A larger one stays: another process took over while this one stood still.
        """
        found = self.published()
        if found is not None and found.size > size:
            return
        self._write(f"checkpoints/{size}", note)
        self._write("checkpoint", note)

    def drop_partials(self, old: int, new: int) -> None:
        """Remove partial tiles whose full tile exists: after its checkpoint was published."""
        for tile in tiles_between(old, new):
            if tile.width == WIDTH:
                shutil.rmtree(self.root / f"{tile.path}.p", ignore_errors=True)

    def describe(self, *, vkey: str, policy: bytes) -> None:
        """Write the key and the trust policy, where they changed."""
        for name, data in (("log.vkey", vkey.encode() + b"\n"), ("trust-policy.txt", policy)):
            path = self.root / name
            if not path.exists() or path.read_bytes() != data:
                self._write(name, data)

    def keep_blob(self, data: bytes) -> str:
        """Keep what is too large for a leaf; its SHA-256, hex."""
        name = hashlib.sha256(data).hexdigest()
        if not (self.root / "blobs/sha256" / name).exists():
            self._write(f"blobs/sha256/{name}", data)
        return name

    def bundle(self, tile: Tile) -> bytes:
        """The bytes of a tile. Raises: FileNotFoundError."""
        return (self.root / tile.path).read_bytes()

    def _write(self, path: str, data: bytes) -> None:
        replace_file(self.root / path, data)


class Ratchet:
    """The last head that was signed, outside the database and outside the log directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def last(self) -> Checkpoint | None:
        """None: nothing was ever signed here.

        Raises:
            CorruptStateError: the file is damaged. Do not remove it: ask the witnesses.
        """
        try:
            return Checkpoint.parse(self.path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (MalformedMessageError, UnicodeDecodeError) as error:
            raise CorruptStateError(f"{self.path}: {error}") from None

    def turn(self, head: Checkpoint) -> None:
        """Remember a head durably; only then may it be signed."""
        replace_file(self.path, head.to_text().encode())
