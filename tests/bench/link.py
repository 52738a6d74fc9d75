"""Transfer over long links: 100 ms round trip, 1 Gb/s, and 100 Mb/s as most institutions have it;
ours, one TLS stream, and gRPC as it is.

What decides there is how much may be under way before an answer: the receive windows. The floor is
one TLS connection that moves the same bytes from memory to memory, once it is warm, for what is
promised; and from its first byte on, since every upload of ours opens connections. Beside it gRPC
with the options that Flower 1.41 gives it (message sizes only, so default windows), in unary
messages of 20 MiB, one after the other, which is how Flower sends the parts of an array. Each has
the link to itself.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc

from infra.runs.operator import find_operator
from tests.bench import floor, netlink
from tests.bench.certificates import make_identities
from tests.bench.ours import transfers
from tests.bench.processes import MB, Stage
from tests.bench.rows import NEW_TLS, OURS, RAW_TLS, Row, Spread

DELAY_S = 0.05  # one way
WORK = "transfer of {mib} MiB over 100 ms and {rate}, one node, {way}"
DEFAULTS = "gRPC with default windows, as Flower's"
_PART = 20 * 2**20  # bytes of one unary message
_PORT = 8443


@dataclass(frozen=True, slots=True)
class Case:
    """A link and what is sent over it."""

    size: int  # bytes
    bits_per_s: float  # each direction
    rate: str  # as people say it
    most: int = 99  # repetitions: a slow link takes its time

    def what(self, way: str) -> str:
        """The name of its row."""
        return WORK.format(mib=self.size >> 20, rate=self.rate, way=way)


CASES = (  # the longer one shows the rate, the shorter one also the beginning
    Case(256 * 2**20, 1e9, "1 Gb/s"),
    Case(2**30, 1e9, "1 Gb/s"),
    Case(128 * 2**20, 1e8, "100 Mb/s", most=3),
)


def rows(*, repetitions: int, work: Path | None = None) -> Iterator[Row]:
    """Of each case: floor, ours, gRPC as it is, and the floor again."""
    why = netlink.unavailable()
    for case in CASES:
        if why is None:
            yield from _rows(case, repetitions=min(repetitions, case.most), work=work)
            continue
        for way in ("up", "down"):
            yield Row(what=case.what(way), system=OURS, skipped=why)


def _rows(case: Case, *, repetitions: int, work: Path | None) -> Iterator[Row]:
    size = case.size
    with netlink.Link(delay_s=DELAY_S, bits_per_s=case.bits_per_s) as link:
        half = max(1, repetitions // 2)
        before = _floor(link, size, half, work)
        ours = _ours(link, size, repetitions, work)
        plain = _defaults(link, size, half, work)
        after = _floor(link, size, half, work)
    for way in ("up", "down"):
        for system, speeds, note in (
            (
                RAW_TLS,
                before[way] + after[way],
                "one TLS connection that is warm; nothing is stored",
            ),
            (NEW_TLS, before[f"new {way}"] + after[f"new {way}"], "its first bytes, as ours are"),
            (OURS, ours[way], "checked against unit hashes; durable"),
            (DEFAULTS, plain[way], "unary messages of 20 MiB, one after the other"),
        ):
            yield Row(
                what=case.what(way),
                system=system,
                nodes=1,
                mb_per_s=Spread.of(speeds),
                bytes_per_node={way: size},
                note=note,
            )


Speeds = dict[str, list[float]]  # way, or "new" and the way -> MB/s of each repetition


def _floor(link: netlink.Link, size: int, repetitions: int, work: Path | None) -> Speeds:
    ends = {"server": link.near, "client": link.far}
    with tempfile.TemporaryDirectory(prefix="minga-link-", dir=work) as folder:
        times = floor.measure(
            nodes=1, up=size, down=size, disk=False, repetitions=repetitions + 1,
            folder=Path(folder), timeout_s=120 + 60 * (repetitions + 1), host=netlink.NEAR,
            place=lambda role, argv: link.inside(ends[role], argv),
        )  # fmt: skip
    speeds: Speeds = {}
    for way in ("up", "down"):
        first, *warm = [size / line[f"{way}_s"] / MB for line in times]
        speeds |= {way: warm, f"new {way}": [first]}
    return speeds


def _ours(link: netlink.Link, size: int, repetitions: int, work: Path | None) -> Speeds:
    with (
        tempfile.TemporaryDirectory(prefix="minga-link-", dir=work) as folder,
        Stage(folder=Path(folder) / "logs") as stage,
    ):
        place = Path(folder) / "federation"
        minga = [sys.executable, "-m", "infra.cli", "coordinator"]
        addresses = [f"{netlink.NEAR}:{_PORT}", f"{netlink.NEAR}:{_PORT + 1}"]
        init = [
            *minga, "init", "--dir", str(place), "--federation", "bench",
            "--address", addresses[0], "--enrolment", addresses[1], "--ungoverned", "--no-log",
        ]  # fmt: skip
        stage.run("init", init, timeout_s=90)
        serve = link.inside(link.near, [*minga, "serve", "--dir", str(place)])
        stage.start("coordinator", serve, role="server")
        return _client(link, stage, ["ours", str(place), folder, str(repetitions), str(size)])


def _defaults(link: netlink.Link, size: int, repetitions: int, work: Path | None) -> Speeds:
    with (
        tempfile.TemporaryDirectory(prefix="minga-link-", dir=work) as folder,
        Stage(folder=Path(folder) / "logs") as stage,
    ):
        make_identities(Path(folder) / "tls", ["server", "node-0"], now=datetime.now(UTC))
        me = [sys.executable, "-m", "tests.bench.link", "grpc-server", folder]
        stage.start("server", link.inside(link.near, me), role="server")
        return _client(link, stage, ["grpc-client", folder, str(repetitions), str(size)])


def _client(link: netlink.Link, stage: Stage, words: list[str]) -> Speeds:
    """The far end's side: a process of its own, since it lives in another namespace."""
    me = link.inside(link.far, [sys.executable, "-m", "tests.bench.link", *words])
    stage.run("client", me, timeout_s=400, role="client")
    found: Speeds = json.loads((stage.folder / "client.log").read_text().splitlines()[-1])
    return found


# -- gRPC as it is -------------------------------------------------------------------------------

_SIZES = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


def _grpc_server(folder: Path) -> None:
    def push(request: bytes, _context: grpc.ServicerContext) -> bytes:
        return len(request).to_bytes(8, "big")

    def pull(request: bytes, _context: grpc.ServicerContext) -> bytes:
        return bytes(int.from_bytes(request, "big"))

    server = grpc.server(ThreadPoolExecutor(4), options=_SIZES)
    handlers = {
        "Push": grpc.unary_unary_rpc_method_handler(push),
        "Pull": grpc.unary_unary_rpc_method_handler(pull),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    tls = folder / "tls"
    credentials = grpc.ssl_server_credentials(
        [((tls / "server.key").read_bytes(), (tls / "server.pem").read_bytes())]
    )
    server.add_secure_port(f"{netlink.NEAR}:{_PORT}", credentials)
    server.start()
    server.wait_for_termination()


def _grpc_client(folder: Path, repetitions: int, total: int) -> Speeds:
    root = (folder / "tls" / "ca.pem").read_bytes()
    options = (*_SIZES, ("grpc.ssl_target_name_override", "localhost"))
    speeds: Speeds = {"up": [], "down": []}
    with grpc.secure_channel(
        f"{netlink.NEAR}:{_PORT}", grpc.ssl_channel_credentials(root), options=options
    ) as channel:
        grpc.channel_ready_future(channel).result(timeout=60)
        push, pull = channel.unary_unary("/bench/Push"), channel.unary_unary("/bench/Pull")
        parts = [min(_PART, total - at) for at in range(0, total, _PART)]
        for _ in range(repetitions + 1):
            for way in ("up", "down"):
                begun = time.perf_counter()
                for size in parts:
                    if way == "up":
                        push(bytes(size))
                    else:
                        pull(size.to_bytes(8, "big"))
                speeds[way].append(total / (time.perf_counter() - begun) / MB)
    return {way: found[1:] for way, found in speeds.items()}


def _main(what: str, *words: str) -> None:
    match what, words:
        case "grpc-server", (folder,):
            _grpc_server(Path(folder))
        case "grpc-client", (folder, repetitions, size):
            print(json.dumps(_grpc_client(Path(folder), int(repetitions), int(size))))
        case "ours", (place, folder, repetitions, size):
            operator = find_operator(folder=Path(place), config=None, environment={})
            found = asyncio.run(transfers(operator, Path(folder), int(repetitions), int(size)))
            print(json.dumps({way: speeds[1:] for way, speeds in found.items()}))
        case _:
            raise SystemExit("see the module's text")


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except subprocess.SubprocessError as error:
        raise SystemExit(str(error)) from None
