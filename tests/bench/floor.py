"""The floor: what the operating system and TLS alone need for the bytes that Minga moves.

Separate processes on loopback, Python's ``ssl``, TLS 1.3, a certificate on both sides (ECDSA
P-256), one connection per node. Nothing is encoded, masked, hashed, added or recorded in a ledger.
A round of Minga cannot be faster than this by much, so it is measured against this.

Beside it, without a promise, the same with the SHA-256 that checking costs: who uploads and who
receives hash every unit. On a processor without instructions for SHA-256 that alone is much.
"""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.certificates import make_identities
from tests.bench.processes import MB, Stage
from tests.bench.rows import FLOOR, HASHED, RAW_TLS, Row, Spread, round_work

BYTES_PER_PARAM = 2.5  # the ring of 20 bits, packed
PROCESS = Path(__file__).with_name("floor_process.py")
BULK_BYTES = 256 * 2**20
BULK = "bulk transfer over loopback, one node, {way}"


def vector_bytes(params: int) -> int:
    """Bytes of one packed vector of ``params`` coordinates at 20 bits."""
    return int(params * BYTES_PER_PARAM)


def measure(
    *,
    nodes: int,
    up: int,
    down: int,
    disk: bool,
    repetitions: int,
    folder: Path,
    timeout_s: float,
    hashed: bool = False,
    host: str = "127.0.0.1",
    place: Callable[[str, list[str]], list[str]] = lambda _role, argv: argv,
) -> list[dict[str, float]]:
    """Run the floor; returns the times of each repetition.

    Args:
        nodes: how many node processes.
        up, down: bytes per node and repetition.
        disk: whether receivers store and fsync each unit of 4 MiB.
        folder: an empty folder on the disk that is to be measured.
        hashed: whether each unit is hashed by who uploads it and by who receives it.
        host: address that the server listens on.
        place: makes the command of a role ("server", "client") one that runs in its place.

    Raises:
        ChildProcessError: a process failed, or the whole took longer than ``timeout_s``.
    """
    names = ["server", *(f"node-{i}" for i in range(nodes))]
    identities = make_identities(folder / "tls", names, now=dt.datetime.now(dt.UTC))
    with Stage(folder=folder / "logs") as stage:
        processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in names:
            role = "server" if name == "server" else "client"
            job = {
                "role": role,
                "folder": str(folder),
                "index": names.index(name),
                "nodes": nodes,
                "up": up,
                "down": down,
                "disk": disk,
                "hash": hashed,
                "host": host,
                "repetitions": repetitions,
                "ca": str(identities[name].ca),
                "certificate": str(identities[name].certificate),
                "key": str(identities[name].key),
            }
            path = folder / f"{name}.json"
            path.write_text(json.dumps(job))
            argv = place(role, [sys.executable, str(PROCESS), str(path)])
            processes[name] = stage.start(name, argv, role=role)
        try:
            status = processes["server"].wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildProcessError(f"the floor took longer than {timeout_s:.0f} s") from None
        if status != 0:
            raise ChildProcessError(f"the floor's server failed: {stage.tail('server')}")
        log = (stage.folder / "server.log").read_text()
    return [json.loads(line) for line in log.splitlines()]


def measure_rounds(
    *, params: int, nodes: int, rounds: int, work: Path | None = None, hashed: bool = False
) -> list[float]:
    """``nodes`` x 2.5 B/param up, then the same down to each: seconds of each of ``rounds``.

    One more is run first, as warm-up.
    """
    size = vector_bytes(params)
    with tempfile.TemporaryDirectory(prefix="minga-floor-", dir=work) as folder:
        times = measure(
            nodes=nodes,
            up=size,
            down=size,
            disk=True,
            repetitions=rounds + 1,
            folder=Path(folder),
            timeout_s=120 + 30 * (rounds + 1),
            hashed=hashed,
        )
    return [line["round_s"] for line in times[1:]]


def round_row(seconds: Sequence[float], *, params: int, nodes: int, hashed: bool = False) -> Row:
    """One row of what ``measure_rounds`` found.

    The floor's memory is left out: it is that of a Python process and two buffers.
    """
    size = vector_bytes(params)
    return Row(
        what=round_work(params=params, nodes=nodes),
        system=HASHED if hashed else FLOOR,
        params=params,
        nodes=nodes,
        seconds_per_round=Spread.of(seconds),
        bytes_per_node={"up": size, "down": size},
        note="Minga's bytes at 20 bits, stored and fsynced in 4 MiB units on both sides",
    )


Speeds = dict[tuple[str, str], list[float]]  # (system, way) -> MB/s of each repetition


def measure_bulk(*, repetitions: int, work: Path | None = None) -> Speeds:
    """One TLS connection up and down, memory to memory and with a durable receiver."""
    speeds: Speeds = {}
    for disk, system in ((False, RAW_TLS), (True, FLOOR)):
        with tempfile.TemporaryDirectory(prefix="minga-floor-", dir=work) as folder:
            times = measure(
                nodes=1,
                up=BULK_BYTES,
                down=BULK_BYTES,
                disk=disk,
                repetitions=repetitions + 1,
                folder=Path(folder),
                timeout_s=120 + 30 * (repetitions + 1),
            )
        for way in ("up", "down"):
            speeds[system, way] = [BULK_BYTES / line[f"{way}_s"] / MB for line in times[1:]]
    return speeds


def bulk_rows(measured: Sequence[Speeds]) -> list[Row]:
    """The rows of what ``measure_bulk`` found, each time it was called."""
    return [
        Row(
            what=BULK.format(way=way),
            system=system,
            nodes=1,
            mb_per_s=Spread.of([speed for speeds in measured for speed in speeds[system, way]]),
            bytes_per_node={way: BULK_BYTES},
            note="stored and fsynced in 4 MiB units" if system == FLOOR else "nothing is stored",
        )
        for system, way in measured[0]
    ]
