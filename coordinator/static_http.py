"""Serves ``log/`` and ``tuf/`` read-only over plain HTTP: GET and HEAD of files that are public.

Everything in them is signed, so neither TLS nor authentication is needed to read; nothing can be
written, listed, or reached outside the two folders. Unfinished files stay hidden.

Anybody may connect, so what a connection can hold is bounded: a number of connections, of them half
for one address; a time for the head of a request however it is dripped; a least rate for whoever
reads. Files are sent piece by piece, so memory does not depend on who asks for what.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Final

from coordinator.limits import Limits
from protocols.errors import ConfigurationError

logger = logging.getLogger(__name__)
_PATH: Final = re.compile(r"/(log|tuf)((?:/[A-Za-z0-9_%-][A-Za-z0-9._%-]*){1,12})", re.ASCII)
_TYPES: Final = {"checkpoint": "text/plain; charset=utf-8", "json": "application/json"}
_PIECE: Final = 65_536  # bytes
_READ_BYTES_PER_S: Final = 8192  # least rate of a reader
_LOOK_S: Final = 0.25
_FULL: Final = (
    b"HTTP/1.1 503 busy\r\nConnection: close\r\nContent-Length: 0\r\nRetry-After: 5\r\n\r\n"
)


class _Server(ThreadingHTTPServer):
    """Counts connections, and ends those whose time is over."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: Any, limits: Limits) -> None:
        super().__init__(address, handler)
        self.limits = limits
        self._lock = threading.Lock()
        self._until: dict[socket.socket, float] = {}
        self._from: Counter[str] = Counter()
        self._closed = threading.Event()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve, or refuse at once: every connection costs a thread."""
        host = str(client_address[0])
        with self._lock:
            most = self.limits.http_connections
            full = len(self._until) >= most or self._from[host] >= max(1, most // 2)
            if not full:
                self._from[host] += 1
                self._until[request] = time.monotonic() + self.limits.http_request_s
        if full:
            try:
                request.settimeout(0)
                request.send(_FULL)
            except OSError:
                logger.debug("a connection beyond the limit was gone already")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            host = str(client_address[0])
            with self._lock:
                self._until.pop(request, None)
                self._from[host] -= 1
                if self._from[host] <= 0:
                    del self._from[host]

    def allow(self, request: Any, seconds: float) -> None:
        """Give a connection so much time from now on."""
        with self._lock:
            if request in self._until:
                self._until[request] = time.monotonic() + seconds

    def connections(self) -> int:
        """How many are open."""
        with self._lock:
            return len(self._until)

    def watch(self) -> None:
        """End connections whose time is over, until the server is closed."""
        while not self._closed.wait(_LOOK_S):
            now = time.monotonic()
            with self._lock:
                late = [request for request, until in self._until.items() if now > until]
            for request in late:
                try:
                    request.shutdown(socket.SHUT_RDWR)  # its thread sees the end and leaves
                except OSError:
                    logger.debug("a late connection was gone already")

    def server_close(self) -> None:
        """Listen no more."""
        self._closed.set()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is its caller's business; ours would be in the diagnostics."""
        logger.debug("a connection of %s ended early", client_address[0])


class StaticServer:
    """A listening socket and the threads that answer.

    Args:
        address: HOST:PORT.
        folders: what ``log`` and ``tuf`` stand for; a folder that does not exist yet is empty.
        limits: of all connections together.
    """

    def __init__(
        self, address: str, folders: dict[str, Path], limits: Limits | None = None
    ) -> None:
        host, _, port = address.rpartition(":")
        roots = {name: folder.resolve() for name, folder in folders.items()}
        bounds = limits or Limits()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_version = "minga"
            sys_version = ""
            timeout = bounds.http_request_s
            server: _Server

            def handle_one_request(self) -> None:
                self.server.allow(self.connection, bounds.http_request_s)
                super().handle_one_request()

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def _answer(self, *, body: bool) -> None:
                if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
                    self.close_connection = True  # a body is not read, so nothing follows it
                found = find(roots, self.path)
                if found is None:
                    self.send_error(404)
                    return
                path, file, size = found
                with file:
                    self.server.allow(
                        self.connection, bounds.http_request_s + size / _READ_BYTES_PER_S
                    )
                    self.send_response(200)
                    self.send_header("Content-Type", content_type(path))
                    self.send_header("Content-Length", str(size))
                    fixed = path.parts[-1].isdigit() or "sha256" in path.parts
                    self.send_header("Cache-Control", "max-age=604800" if fixed else "no-cache")
                    self.end_headers()
                    while body and size > 0 and (piece := file.read(min(_PIECE, size))):
                        self.wfile.write(piece)
                        size -= len(piece)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
                logger.debug(format, *args)

        try:
            self._server = _Server((host.strip("[]"), int(port)), Handler, bounds)
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {address}: {error.strerror}") from None
        self.port = self._server.server_address[1]
        self.connections = self._server.connections
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (
                ("static http", self._server.serve_forever),
                ("static http watch", self._server.watch),
            )
        ]

    def start(self) -> None:
        """Answer from now on."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()


def find(roots: dict[str, Path], path: str) -> tuple[Path, BinaryIO, int] | None:
    """The file that a path names, opened, and its size; None: there is none that is public."""
    match = _PATH.fullmatch(path.partition("?")[0])
    if match is None or match[1] not in roots:
        return None
    root = roots[match[1]]
    file = root.joinpath(*match[2].strip("/").split("/"))
    try:
        if not file.resolve().is_relative_to(root) or not file.is_file():
            return None
        opened = file.open("rb")
    except OSError:
        return None
    return file, opened, os.fstat(opened.fileno()).st_size


def content_type(path: Path) -> str:
    """Of a file of the log or the trust repository."""
    if path.name in _TYPES or path.parent.name == "checkpoints":
        return _TYPES["checkpoint"]
    if path.suffix == ".json":
        return _TYPES["json"]
    if path.name in ("log.vkey", "trust-policy.txt"):
        return _TYPES["checkpoint"]
    return "application/octet-stream"
