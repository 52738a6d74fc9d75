"""One process of the floor: ``python floor_process.py JOB.json``. Standard library only.

The protocol is the least that moves the bytes. On one TLS connection per node the server sends one
command byte; then

    U   the node sends ``up`` bytes; the server stores them in units and fsyncs each
    D   the server sends ``down`` bytes; the node stores them likewise and answers one byte
    Q   the node ends

With ``"disk": false`` nothing is stored: bytes go from memory to memory. With ``"hash": true``
whoever sends an upload, and whoever receives, takes the SHA-256 of each unit.
The server prints one JSON line per repetition: seconds of the upload, of the download, of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import ssl
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

UNIT = 4 * 2**20  # bytes: what Minga stores, hashes and acknowledges at once
SLICE = 2**20  # bytes handed to the TLS library in one call, as one message of Minga's


def context(job: dict[str, Any], *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 only, both sides with certificates."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(job["certificate"], job["key"])
    made.load_verify_locations(job["ca"])
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def send(
    connection: ssl.SSLSocket, source: memoryview, count: int, *, hashed: bool = False
) -> None:
    """Send ``count`` bytes, reading ``source`` (one unit) over and over."""
    sent = 0
    while sent < count:
        start = sent % UNIT
        if hashed and not start:
            hashlib.sha256(source[: min(UNIT, count - sent)]).digest()
        size = min(SLICE, UNIT - start, count - sent)
        connection.sendall(source[start : start + size])
        sent += size


class Receiver:
    """Receives on one connection. While one unit is stored, the next one arrives."""

    def __init__(self, connection: ssl.SSLSocket, *, hashed: bool = False) -> None:
        self._connection = connection
        self._hashed = hashed
        self._units = [memoryview(bytearray(UNIT)), memoryview(bytearray(UNIT))]
        self._storing = ThreadPoolExecutor(max_workers=1)

    def receive(self, count: int, path: Path | None) -> None:
        """Receive ``count`` bytes; with a path, return when the last of them is durable."""
        file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        stored: Future[None] | None = None
        try:
            left = count
            while left:
                unit = self._units[0][: min(UNIT, left)]
                self._fill(unit)
                left -= len(unit)
                if file is not None:
                    if stored is not None:
                        stored.result()
                    stored = self._storing.submit(store, file, unit, hashed=self._hashed)
                    self._units.reverse()
            if stored is not None:
                stored.result()
        finally:
            if file is not None:
                os.close(file)

    def _fill(self, unit: memoryview) -> None:
        got = 0
        while got < len(unit):
            read = self._connection.recv_into(unit[got:])
            if not read:
                raise ConnectionError("the other side closed the connection")
            got += read


def store(file: int, unit: memoryview, *, hashed: bool) -> None:
    """Append one unit and make it durable."""
    if hashed:
        hashlib.sha256(unit).digest()
    written = 0
    while written < len(unit):
        written += os.write(file, unit[written:])
    os.fsync(file)


def serve(job: dict[str, Any]) -> None:
    folder, nodes = Path(job["folder"]), job["nodes"]
    barrier = threading.Barrier(nodes + 1)
    source = memoryview(os.urandom(UNIT))
    failures: list[str] = []

    def one(connection: ssl.SSLSocket, index: int) -> None:
        receiver = Receiver(connection, hashed=job["hash"])
        path = folder / f"up-{index}" if job["disk"] else None
        try:
            for _ in range(job["repetitions"]):
                barrier.wait()
                connection.sendall(b"U")
                receiver.receive(job["up"], path)
                barrier.wait()  # the sum exists only when every upload does
                connection.sendall(b"D")
                send(connection, source, job["down"])
                if connection.recv(1) != b"A":
                    raise ConnectionError("no acknowledgement")
                barrier.wait()
            connection.sendall(b"Q")
        except (OSError, threading.BrokenBarrierError) as error:
            failures.append(f"node {index}: {error}")
            barrier.abort()

    listener = socket.create_server((job["host"], 0), backlog=nodes)
    # A finished file appears under its name only when it is whole: the nodes wait for it.
    draft = folder / "port.tmp"
    draft.write_text(str(listener.getsockname()[1]))
    draft.rename(folder / "port")
    tls = context(job, server=True)
    threads = []
    for index in range(nodes):
        plain, _ = listener.accept()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = tls.wrap_socket(plain, server_side=True)
        threads.append(threading.Thread(target=one, args=(connection, index), daemon=True))
    for thread in threads:
        thread.start()
    try:
        for _ in range(job["repetitions"]):
            for old in folder.glob("up-*"):
                old.unlink()  # a new file each time, removed outside the measured time
            barrier.wait()
            begun = time.perf_counter()
            barrier.wait()
            half = time.perf_counter()
            barrier.wait()
            end = time.perf_counter()
            times = {"up_s": half - begun, "down_s": end - half, "round_s": end - begun}
            print(json.dumps(times), flush=True)
    except threading.BrokenBarrierError:
        sys.exit(f"the floor failed: {'; '.join(failures)}")
    for thread in threads:
        thread.join()


def node(job: dict[str, Any]) -> None:
    port_file = Path(job["folder"]) / "port"
    until = time.monotonic() + 30
    while not port_file.exists():
        if time.monotonic() > until:
            sys.exit("the floor's server did not come up within 30 s")
        time.sleep(0.02)
    plain = socket.create_connection((job["host"], int(port_file.read_text())))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = context(job, server=False).wrap_socket(plain, server_hostname="localhost")
    source = memoryview(os.urandom(UNIT))
    receiver = Receiver(connection, hashed=job["hash"])
    path = Path(job["folder"]) / f"down-{job['index']}" if job["disk"] else None
    while (command := connection.recv(1)) in (b"U", b"D"):
        if command == b"U":
            if path is not None:
                path.unlink(missing_ok=True)
            send(connection, source, job["up"], hashed=job["hash"])
        else:
            receiver.receive(job["down"], path)
            connection.sendall(b"A")
    if command != b"Q":
        sys.exit("the floor's server closed the connection")


if __name__ == "__main__":
    description = json.loads(Path(sys.argv[1]).read_text())
    (serve if description["role"] == "server" else node)(description)
