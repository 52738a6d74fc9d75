"""A witness: cosigns the largest consistent tree of a log that it has seen, and no other.

    node agent         pulls over gRPC (``Witness.NextCheckpoint``)
    minga audit witness  listens over HTTP (``POST add-checkpoint``)

Both ask the same pure function (``protocols.tlog.witness``). Reading the latest head, deciding and
storing the new one are one SQLite transaction, on the disk before the answer leaves: two requests
that both read the old head would get cosignatures on two branches. The key signs nothing else. A
witness that lost its database is retired with its key; it must never start again from nothing, so
the database remembers that it was made for this key, and the key's file is made with it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.decimals import read_decimal
from protocols.errors import ConfigurationError, CorruptStateError, StorageFullError
from protocols.tlog.note import KeyRing, KeyType, Note, SignatureLine, SignerKey
from protocols.tlog.text import decode_base64, encode_base64
from protocols.tlog.witness import (
    MAX_REQUEST,
    TEXT_CONTENT_TYPE,
    Answer,
    Head,
    Request,
    add_checkpoint,
    add_lines,
    monitoring_path,
)

logger = logging.getLogger(__name__)
KEY_FILE: Final = "witness.key"
DATABASE: Final = "witness.sqlite"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS made (one INTEGER PRIMARY KEY CHECK (one = 1), vkey TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS heads (
    origin TEXT PRIMARY KEY, size INTEGER NOT NULL, root BLOB NOT NULL, note BLOB NOT NULL);
"""


def write_key(path: Path, name: str, seed: bytes) -> None:
    """Write a witness key, 0600; never over another.

    Raises:
        FileExistsError: there is one.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(f"{name} {encode_base64(seed)}\n")
        file.flush()
        os.fsync(file.fileno())


def read_key(path: Path) -> SignerKey:
    """Read a witness key.

    Raises:
        ConfigurationError: missing or damaged; the sentence does not repeat it.
    """
    try:
        name, seed = path.read_text("utf-8").strip().split(" ")
        return SignerKey(
            name=name, type=KeyType.ED25519_COSIGNATURE, seed=decode_base64(seed, "the key")
        )
    except (OSError, ValueError):
        raise ConfigurationError(f"{path} cannot be read as a witness key") from None


class WitnessStore:
    """The latest head of each origin, compared and replaced in one durable transaction."""

    def __init__(self, path: Path, vkey: str, *, fresh: bool = False) -> None:
        """Open the database.

        Args:
            path: of the database.
            vkey: of the key that it belongs to.
            fresh: the key was made just now; else a missing database is an error.

        Raises:
            CorruptStateError: it is missing, damaged, or of another key.
        """
        if not fresh and not path.exists():
            raise CorruptStateError(
                f"{path} is missing: a witness without its memory is retired with its key; make"
                " another"
            )
        self._path = path
        self._guard = threading.Lock()
        try:
            self._c = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._c.execute("PRAGMA journal_mode=WAL")
            self._c.execute("PRAGMA synchronous=FULL")
            self._c.executescript(_SCHEMA)
            self._c.execute("INSERT OR IGNORE INTO made VALUES (1, ?)", (vkey,))
            found = self._c.execute("SELECT vkey FROM made").fetchone()[0]
            path.chmod(0o600)
        except sqlite3.Error as error:
            raise CorruptStateError(f"{path}: {error}") from None
        if found != vkey:
            raise CorruptStateError(f"{path} belongs to another witness key")

    def close(self) -> None:
        """Let go of the file."""
        with self._guard:
            self._c.close()

    def latest(self, origin: str) -> bytes | None:
        """The checkpoint of an origin that was cosigned last, with the cosignature."""
        with self._guard:
            row = self._c.execute("SELECT note FROM heads WHERE origin = ?", (origin,)).fetchone()
        return None if row is None else bytes(row[0])

    def decide(self, body: bytes, answer: Callable[[Mapping[str, Head]], Answer]) -> Answer:
        """Answer one request; whatever is cosigned is on the disk when this returns."""
        with self._guard:
            try:
                self._c.execute("BEGIN IMMEDIATE")
                rows = self._c.execute("SELECT origin, size, root FROM heads").fetchall()
                said = answer({row[0]: Head(size=row[1], root=bytes(row[2])) for row in rows})
                if said.store is not None:
                    request = Request.parse(body)
                    line = SignatureLine.parse(said.body.decode().rstrip("\n"))
                    note = add_lines(
                        Note(text=request.note.text, signatures=request.note.signatures), [line]
                    )
                    self._c.execute(
                        "INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?)",
                        (
                            request.checkpoint.origin,
                            said.store.size,
                            said.store.root,
                            note.to_bytes(),
                        ),
                    )
                self._c.execute("COMMIT")
            except sqlite3.Error as error:
                if self._c.in_transaction:
                    self._c.execute("ROLLBACK")
                raise StorageFullError(f"{self._path}: {error}") from None
            except BaseException:
                if self._c.in_transaction:
                    self._c.execute("ROLLBACK")
                raise
            return said


class Witness:
    """A key, its memory, and the logs it watches.

    Args:
        logs: the keys of each origin.
        now: Unix seconds.
    """

    def __init__(
        self,
        signer: SignerKey,
        store: WitnessStore,
        logs: Mapping[str, KeyRing],
        *,
        now: Callable[[], int],
    ) -> None:
        self.signer = signer
        self.store = store
        self._logs = dict(logs)
        self._now = now

    def add(self, body: bytes) -> Answer:
        """Answer add-checkpoint. Blocking.

        Raises:
            StorageFullError: it could not be stored; nothing was cosigned.
        """
        said = self.store.decide(
            body,
            lambda latest: add_checkpoint(
                body, logs=self._logs, latest=latest, signer=self.signer, now=self._now()
            ),
        )
        if said.status != 200:
            logger.warning("refused a checkpoint: %d, %s", said.status, said.why)
        return said

    def monitor(self, path: str) -> bytes | None:
        """The latest checkpoint of the origin that a monitoring path names."""
        for origin in self._logs:
            if monitoring_path(origin) == path:
                return self.store.latest(origin)
        return None


def make_witness(folder: Path, name: str) -> SignerKey:
    """A new witness: key and empty memory.

    Raises:
        FileExistsError: there is a key already.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    seed = Ed25519PrivateKey.generate().private_bytes_raw()
    signer = SignerKey(name=name, type=KeyType.ED25519_COSIGNATURE, seed=seed)
    database = folder / DATABASE
    if (folder / KEY_FILE).exists():
        raise FileExistsError(str(folder / KEY_FILE))
    database.unlink(missing_ok=True)  # of a key that was never written
    WitnessStore(database, signer.verifier.to_text(), fresh=True).close()
    write_key(folder / KEY_FILE, name, seed)
    return signer


def open_witness(folder: Path, logs: Mapping[str, KeyRing], *, now: Callable[[], int]) -> Witness:
    """The witness of a folder.

    Raises:
        ConfigurationError, CorruptStateError: key or memory is missing or damaged.
    """
    signer = read_key(folder / KEY_FILE)
    store = WitnessStore(folder / DATABASE, signer.verifier.to_text())
    return Witness(signer, store, logs, now=now)


def serve_http(witness: Witness, host: str, port: int) -> ThreadingHTTPServer:
    """A server for a witness, not yet running; ``serve_forever`` runs it.

    Raises:
        OSError: the address cannot be listened on.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version = "minga-witness"
        sys_version = ""
        timeout = 20.0

        def do_POST(self) -> None:
            size = read_decimal(self.headers.get("Content-Length", ""), most=MAX_REQUEST)
            if self.path != "/add-checkpoint":
                self._send(404, b"", TEXT_CONTENT_TYPE)
            elif size is None:
                self.close_connection = True
                self._send(400, b"no length, or too long\n", TEXT_CONTENT_TYPE)
            else:
                try:
                    said = witness.add(self.rfile.read(size))
                except StorageFullError as error:
                    self._send(503, f"{error}\n".encode(), TEXT_CONTENT_TYPE)
                    return
                self._send(said.status, said.body, said.content_type)

        def do_GET(self) -> None:
            found = witness.monitor(self.path.lstrip("/"))
            if found is None:
                self._send(404, b"", TEXT_CONTENT_TYPE)
            else:
                self._send(200, found, TEXT_CONTENT_TYPE)

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
            logger.debug(format, *args)

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server
