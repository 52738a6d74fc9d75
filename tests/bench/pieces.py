"""``python -m tests.bench.pieces``: what a whole round is made of, each piece alone on all cores.

A round of Minga hashes, sends, stores and computes things that its specifications ask for. Here the
same amounts are done piece by piece, with nothing else around: no round, no ledger, no log, no
waiting of one for another, two processes that share the work. A round of the same protocol cannot
be faster than those of them together that keep the cores busy; the disk works beside them. A whole
round is measured in the same run. So the page can say why a target is reached or not, and which
part of it is ours to improve.

    vectors   n up, n down, the coordinator's sum           2.5 bytes a parameter at 20 bits
    models    one at each node and one at the coordinator   4 bytes a parameter

Figures go to ``bench/pieces.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from protocols.outer_step import apply_outer_step
from protocols.plan import Outer, Scale
from protocols.tensors.encode import encode_vector
from protocols.tensors.layout import VectorLayout
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.metrics import metric_names
from protocols.tensors.planar import PackedVector, accumulate
from protocols.tensors.ring import Ring
from protocols.tensors.scales import first_scales
from protocols.tensors.sizes import STREAM_WINDOW, UNIT
from tests.bench import floor, ours
from tests.bench.__main__ import machine
from tests.bench.certificates import make_identities
from tests.bench.page import BENCH, FIGURES, PAGE, figures, load, render
from tests.bench.processes import MB, free_port

OUT: Final = BENCH / "pieces.json"
RING: Final = Ring(20)
NODES: Final = 4
METRICS: Final = metric_names(())
SAID: Final = {**dict.fromkeys(METRICS, 1), "weight": 65_536}
LEAST_PARAMS: Final = 1000
SHARES: Final = 2  # processes; the machine has as many cores
MESSAGE: Final = 2**20
WAIT_S: Final = 600.0  # for one piece; then its processes are killed

Piece = Callable[[int, int, Path], Callable[[], None]]  # of parameters, share, folder: the work


def model_bytes(params: int) -> int:
    return 4 * params


# -- the pieces; each process does its share -----------------------------------------------------


def hashing(params: int, share: int, _folder: Path) -> Callable[[], None]:
    """SHA-256 of every unit that somebody announces or takes: vectors at their nodes and at the
    coordinator, the sum there and at the nodes."""
    unit, total = bytes(UNIT), (3 * NODES + 1) * floor.vector_bytes(params)

    def work() -> None:
        for _ in range(share, -(-total // UNIT), SHARES):
            hashlib.sha256(unit).digest()

    return work


def storing(params: int, share: int, folder: Path) -> Callable[[], None]:
    """Write what is kept and read it back once: each vector at its node and at the coordinator, sum
    and next model at the coordinator, all of it fsynced; sum and next model at each node, which in
    short rounds are not."""
    vector, model = floor.vector_bytes(params), model_bytes(params)
    durable = [vector] * (2 * NODES + 1) + [model]
    sizes = [*durable, *[vector] * NODES, *[model] * NODES]
    unit = memoryview(os.urandom(UNIT))

    def work() -> None:
        for index in range(share, len(sizes), SHARES):
            path = folder / f"{index}.bin"
            with path.open("w+b", buffering=0) as file:
                for at in range(0, sizes[index], UNIT):
                    file.write(unit[: min(UNIT, sizes[index] - at)])
                if index < len(durable):
                    os.fdatasync(file.fileno())
                file.seek(0)
                while file.read(UNIT):
                    pass
            path.unlink()

    return work


def encoding(params: int, share: int, _folder: Path) -> Callable[[], None]:
    """Clip, scale, dither and pack an update, at each node."""
    delta = np.full(params, 0.01, np.float32)

    def work() -> None:
        for _ in range(share, NODES, SHARES):
            _encode(delta, nodes=NODES)

    return work


def adding(params: int, _share: int, _folder: Path) -> Callable[[], None]:
    """Add the packed vectors, at the coordinator: half of the coordinates in each process."""
    layout = _layout(params // SHARES)[1]
    zeros = memoryview(bytes(8 * 2**20))

    def work() -> None:
        for _ in accumulate([lambda _, length: zeros[:length]] * NODES, layout, RING):
            pass

    return work


def stepping(params: int, share: int, _folder: Path) -> Callable[[], None]:
    """The outer step and the hash of the model that it makes, at each node and the coordinator."""
    manifest, layout = _layout(params)
    packed = b"".join(_encode(np.zeros(params, np.float32), nodes=1))
    zeros = memoryview(bytes(64 * 2**20))
    scales = first_scales(manifest, bound=0.05, ring=RING, nodes=1)

    def work() -> None:
        for _ in range(share, NODES + 1, SHARES):
            apply_outer_step(
                outer=Outer(), scale_rule=Scale(), layout=layout, manifest=manifest,
                snapshot_counters={}, theta=lambda _, length: zeros[:length], buffers={},
                scales=scales, sum_reader=PackedVector(packed, layout.coordinates, RING),
                ring=RING, nodes=1, roster=NODES, writer=lambda *_: None,
            )  # fmt: skip

    return work


def sending(params: int, share: int, folder: Path) -> Callable[[], None]:
    """The vectors up and the sum down to each, by gRPC over mutual TLS in messages of 1 MiB."""
    side = _serve if share == 0 else _call
    return lambda: asyncio.run(side(params, folder))


PIECES: Final[dict[str, Piece]] = {
    piece.__name__: piece for piece in (hashing, sending, storing, encoding, adding, stepping)
}


def _layout(params: int) -> tuple[Manifest, VectorLayout]:
    manifest = Manifest(tensors=(TensorSpec("w", (params,)),))
    return manifest, VectorLayout.of(manifest, "all", METRICS)


def _encode(delta: NDArray[np.float32], *, nodes: int) -> list[bytes]:
    found: list[bytes] = []
    manifest, layout = _layout(delta.size)
    encode_vector(
        delta, layout, first_scales(manifest, bound=0.05, ring=RING, nodes=nodes),
        weight_units=65_536, clip_factor=1.0, metrics=SAID, seed=bytes(32), ring=RING,
        limit=RING.clamp_limit(nodes), sink=found.append,
    )  # fmt: skip
    return found


_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 8 * 2**20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", STREAM_WINDOW),
)


async def _serve(params: int, folder: Path) -> None:
    over, message = asyncio.Event(), os.urandom(MESSAGE)
    count = -(-floor.vector_bytes(params) // MESSAGE)

    async def up(messages: AsyncIterator[bytes], _: Any) -> bytes:
        return str(sum([len(message) async for message in messages])).encode()

    async def down(_request: bytes, _: Any) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield message

    async def end(_request: bytes, _: Any) -> bytes:
        over.set()
        return b""

    server = grpc.aio.server(options=_OPTIONS)
    handlers = {
        "up": grpc.stream_unary_rpc_method_handler(up),
        "down": grpc.unary_stream_rpc_method_handler(down),
        "end": grpc.unary_unary_rpc_method_handler(end),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("piece", handlers),))
    key, chain, ca = _tls(folder, "server")
    credentials = grpc.ssl_server_credentials([(key, chain)], ca, require_client_auth=True)
    server.add_secure_port(f"127.0.0.1:{(folder / 'port').read_text()}", credentials)
    await server.start()
    await over.wait()
    await server.stop(1.0)


async def _call(params: int, folder: Path) -> None:
    key, chain, ca = _tls(folder, "node-0")
    credentials = grpc.ssl_channel_credentials(ca, key, chain)
    message, count = os.urandom(MESSAGE), -(-floor.vector_bytes(params) // MESSAGE)

    async def messages() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield message

    async def one() -> None:
        async with grpc.aio.secure_channel(address, credentials, options=_OPTIONS) as channel:
            arrived = int(await channel.stream_unary("/piece/up")(messages(), wait_for_ready=True))
            came = sum([len(message) async for message in channel.unary_stream("/piece/down")(b"")])
            if not arrived == came == count * MESSAGE:
                raise ChildProcessError(f"{arrived} bytes went up and {came} came down")

    port = (folder / "port").read_text()
    while not _listens(int(port)):  # noqa: ASYNC110 - it is another process
        await asyncio.sleep(0.01)
    address = f"localhost:{port}"
    await asyncio.gather(*(one() for _ in range(NODES)))
    async with grpc.aio.secure_channel(address, credentials) as channel:
        await channel.unary_unary("/piece/end")(b"")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tls(folder: Path, name: str) -> tuple[bytes, bytes, bytes]:
    files = (f"{name}.key", f"{name}.pem", "ca.pem")
    key, chain, ca = ((folder / "tls" / file).read_bytes() for file in files)
    return key, chain, ca


# -- measuring them ------------------------------------------------------------------------------


def measure(name: str, params: int, work: Path | None) -> float:
    """Seconds from the moment all processes may begin to the moment the last has ended its share.

    Raises:
        ChildProcessError: one of them failed, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="minga-piece-", dir=work) as place:
        folder = Path(place)
        make_identities(folder / "tls", ["server", "node-0"], now=datetime.now(UTC))
        (folder / "port").write_text(str(free_port()))
        me = [sys.executable, "-m", "tests.bench.pieces", "--piece", name, "--folder", place]
        processes = [
            subprocess.Popen(
                [*me, "--params", str(params), "--share", str(share)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for share in range(SHARES)
        ]  # fmt: skip
        too_long = threading.Timer(WAIT_S, lambda: [process.kill() for process in processes])
        too_long.start()
        try:
            for process in processes:
                if process.stdout is None or process.stdout.readline() != "ready\n":
                    raise ChildProcessError(f"{name} did not begin")
            begun = time.perf_counter()
            for process in processes:
                if process.stdin is not None:
                    process.stdin.write("go\n")
                    process.stdin.flush()
            for process in processes:
                if process.stdout is None or process.stdout.readline() != "done\n":
                    raise ChildProcessError(f"{name} failed")
            return time.perf_counter() - begun
        finally:
            too_long.cancel()
            for process in processes:
                process.kill()
                process.communicate()


def share_of(name: str, params: int, share: int, folder: Path) -> None:
    """One process's part: prepare, say so, wait for the word, work."""
    work = PIECES[name](params, share, folder)
    print("ready", flush=True)
    sys.stdin.readline()
    work()
    print("done", flush=True)


def rows_of(pieces: dict[str, list[float]], rounds: list[float], params: int) -> list[Any]:
    """The lines of the page.

    Args:
        pieces: seconds of each repetition of each piece.
        rounds: seconds of whole rounds in the same run.
        params: of the model.
    """
    medians = {name: statistics.median(times) for name, times in pieces.items()}
    whole, disk = statistics.median(rounds), storing.__name__
    cores = sum(seconds for name, seconds in medians.items() if name != disk)
    what = f"whole round without training, {NODES} nodes, {params / 1e6:g} M parameters"

    def row(name: str, seconds: float, note: str) -> dict[str, Any]:
        return {
            "what": f"{what}: {name}", "ours": f"{seconds:.2f} s", "beside": "the round",
            "other": f"{whole:.2f} s", "ratio": round(seconds / whole, 2), "target": "",
            "met": None, "note": note,
        }  # fmt: skip

    def piece(name: str) -> dict[str, Any]:
        return row(name, medians[name], " ".join((PIECES[name].__doc__ or "").split()))

    busy = sorted(medians.keys() - {disk}, key=lambda name: -medians[name])
    rest = "rounds, ledger, log, waiting, storing, and what the pieces cost each other"
    return [
        *(piece(name) for name in busy),
        row("all of these", cores, "one after the other, each alone on all cores"),
        row("the rest", whole - cores, rest),
        piece(disk),
    ]


def main() -> None:
    """Measure the pieces and a round; keep and show them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pieces", description=__doc__)
    parser.add_argument("--params", type=int, default=25_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--piece", choices=tuple(PIECES), help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.params < LEAST_PARAMS or min(options.repetitions, options.rounds) < 1:
        parser.error(f"at least {LEAST_PARAMS} parameters, one repetition and one round")
    if options.piece is not None:
        share_of(options.piece, options.params, options.share, options.folder)
        return
    found_on = machine()
    pieces: dict[str, list[float]] = {name: [] for name in PIECES}
    rounds: list[float] = []
    for turn in range(options.repetitions):
        for name, times in pieces.items():
            times.append(measure(name, options.params, options.scratch))
            print(f"turn {turn + 1}: {name}: {times[-1]:.2f} s", file=sys.stderr, flush=True)
        row = ours.round_row(
            params=options.params, nodes=NODES, rounds=options.rounds, work=options.scratch
        )
        rounds += row.seconds_per_round.values if row.seconds_per_round is not None else ()
    rows = rows_of(pieces, rounds, options.params)
    for line in rows:
        print(f"{line['what']}: {line['ours']}  {line['ratio']}")
    bytes_hashed = (3 * NODES + 1) * floor.vector_bytes(options.params)
    facts = {
        "schema": FIGURES, "title": "Where the time of a round goes",
        "repeat": "make bench-pieces", "machine": found_on,
        "text": (
            "What a round must hash, send, store and compute, each piece alone on all cores, and a"
            f" whole round in the same run. Hashed beside the models: {bytes_hashed / MB:.0f} MB;"
            f" one core of this machine hashes {found_on['sha256_mb_per_s']} MB/s alone."
            f" Measured on {found_on['date']} at commit {found_on['commit']}."
        ),
        "rows": rows,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    if options.out == OUT:
        PAGE.write_text(render(load(), figures()))


if __name__ == "__main__":
    main()
