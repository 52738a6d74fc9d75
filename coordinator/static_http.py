"""Serves ``log/`` and ``tuf/`` read-only over plain HTTP: GET and HEAD of files that are public.

Everything in them is signed, so neither TLS nor authentication is needed to read; nothing can be
written, listed, or reached outside the two folders. Unfinished files stay hidden.
"""

from __future__ import annotations

import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from protocols.errors import ConfigurationError

logger = logging.getLogger(__name__)
_PATH: Final = re.compile(r"/(log|tuf)((?:/[A-Za-z0-9_%-][A-Za-z0-9._%-]*){1,12})", re.ASCII)
_TYPES: Final = {"checkpoint": "text/plain; charset=utf-8", "json": "application/json"}
TIMEOUT_S: Final = 20.0


class StaticServer:
    """A listening socket and the thread that answers.

    Args:
        address: HOST:PORT.
        folders: what ``log`` and ``tuf`` stand for; a folder that does not exist yet is empty.
    """

    def __init__(self, address: str, folders: dict[str, Path]) -> None:
        host, _, port = address.rpartition(":")
        roots = {name: folder.resolve() for name, folder in folders.items()}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_version = "minga"
            sys_version = ""
            timeout = TIMEOUT_S

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def _answer(self, *, body: bool) -> None:
                found = find(roots, self.path)
                if found is None:
                    self.send_error(404)
                    return
                path, data = found
                self.send_response(200)
                self.send_header("Content-Type", content_type(path))
                self.send_header("Content-Length", str(len(data)))
                fixed = path.parts[-1].isdigit() or "sha256" in path.parts
                self.send_header("Cache-Control", "max-age=604800" if fixed else "no-cache")
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
                logger.debug(format, *args)

        try:
            self._server = ThreadingHTTPServer((host.strip("[]"), int(port)), Handler)
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {address}: {error.strerror}") from None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="static http", daemon=True
        )

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def find(roots: dict[str, Path], path: str) -> tuple[Path, bytes] | None:
    """The file that a path names, and its bytes; None: there is none, or it is not public."""
    match = _PATH.fullmatch(path.partition("?")[0])
    if match is None or match[1] not in roots:
        return None
    root = roots[match[1]]
    file = root.joinpath(*match[2].strip("/").split("/"))
    try:
        if not file.resolve().is_relative_to(root) or not file.is_file():
            return None
        return file, file.read_bytes()
    except OSError:
        return None


def content_type(path: Path) -> str:
    """Of a file of the log or the trust repository."""
    if path.name in _TYPES or path.parent.name == "checkpoints":
        return _TYPES["checkpoint"]
    if path.suffix == ".json":
        return _TYPES["json"]
    if path.name in ("log.vkey", "trust-policy.txt"):
        return _TYPES["checkpoint"]
    return "application/octet-stream"
