"""Minga's own rows: real coordinator, real node agents, the real protocol.

A measurement of ours that fails is a failure of the benchmark, not a skipped row: unlike a peer, it
is what this repository promises.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from infra.runs.operator import Operator, find_operator
from node_agent import bulk, uploads
from node_agent.client import Connection
from node_agent.keys import TlsIdentity
from protocols.gen import bulk_pb2
from protocols.identifiers import Digest
from protocols.tensors.units import UnitHasher
from tests.bench.federation import RUN, Federation, Job, Measured, measured
from tests.bench.floor import BULK, BULK_BYTES
from tests.bench.processes import MB, Stage
from tests.bench.rows import OURS, Row, Spread, millions, round_work


def institutions(count: int) -> list[str]:
    """Names in ascending order: site-01, site-02, ..."""
    return [f"site-{index + 1:02d}" for index in range(count)]


def _time_limit(params: int, nodes: int, rounds: int) -> float:
    """Seconds for a whole run: an order of magnitude above what it takes on two slow cores."""
    return 120 + (rounds + 2) * (20 + 2e-7 * params * nodes)


# -- rounds with real agents ---------------------------------------------------------------------


Processes = dict[str, subprocess.Popen[bytes]]


def _with_agents(federation: Federation, _stage: Stage, names: list[str]) -> Processes:
    return {
        name: federation.start_node(name, federation.join(name, token))
        for name, token in federation.invitations(names).items()
    }


def _with_light_nodes(federation: Federation, stage: Stage, names: list[str]) -> Processes:
    folder = federation.folder / "light"
    folder.mkdir()
    job = {
        "folder": str(folder),
        "address": federation.address,
        "enrolment": federation.enrolment,
        "run": RUN,
        "invitations": federation.invitations(names),
    }
    path = folder / "job.json"
    path.touch(mode=0o600)  # invitations are secrets until they are used
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.bench.light_nodes", str(path)]
    process = stage.start("light-nodes", command, role="client")
    until = time.monotonic() + 120
    while not (folder / "enrolled").exists():
        if process.poll() is not None or time.monotonic() > until:
            raise ChildProcessError(f"the nodes did not enrol: {stage.tail('light-nodes')}")
        time.sleep(0.1)
    return {"light-nodes": process}


def play(
    job: Job,
    *,
    light: bool,
    work: Path | None,
    beside: Callable[[Stage], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Measured:
    """Play the rounds of a job.

    Args:
        job: what.
        light: nodes that share a process, hold no model and sign no log; else real agents.
        work: where files go; None: the system's temporary folder.
        beside: what goes on while the rounds are played.
    """
    with (
        tempfile.TemporaryDirectory(prefix="minga-bench-", dir=work) as folder,
        Stage(folder=Path(folder) / "logs") as stage,
    ):
        federation = Federation(Path(folder) / "federation", stage)
        names = institutions(job.nodes)
        watched = {"coordinator": federation.start_coordinator(log=not light)}
        start = _with_light_nodes if light else _with_agents
        nodes = start(federation, stage, names)
        federation.submit(job, names)
        # Light nodes end with the run, so only the coordinator has to stay.
        with beside(stage):
            facts = federation.wait_until_done(job, watched if light else {**watched, **nodes})
        federation.check_model(facts, job)
        return measured(facts, job, stage)


def _row(what: str, job: Job, found: Measured, note: str) -> Row:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.phases.items())
    parts = (
        note,
        f"{len(found.seconds)} rounds after a warm-up",
        f"mean seconds by phase: {phases}",
        f"memory peak in {found.peak_in}, without mapped files {found.private_mb:.0f} MB",
    )
    return Row(
        what=what,
        system=OURS,
        params=job.params,
        nodes=job.nodes,
        seconds_per_round=Spread.of(found.seconds),
        server_peak_rss_mb=found.rss_mb,
        bytes_per_node={"up": found.up, "down": found.down},
        note="; ".join(parts),
    )


def round_row(*, params: int, nodes: int, rounds: int, work: Path | None = None) -> Row:
    """A whole round without training, with one agent process per node."""
    limit = _time_limit(params, nodes, rounds)
    job = Job(params=params, nodes=nodes, rounds=rounds, timeout_s=limit)
    found = play(job, light=False, work=work)
    note = "mode open, mutual TLS, SQLite, real agents, synthetic local step"
    return _row(round_work(params=params, nodes=nodes), job, found, note)


def memory_row(*, params: int, nodes: int, rounds: int = 2, work: Path | None = None) -> Row:
    """The coordinator's peak memory while nodes that hold no model play rounds."""
    limit = _time_limit(params, nodes, rounds)
    job = Job(params=params, nodes=nodes, rounds=rounds, timeout_s=limit)
    found = play(job, light=True, work=work)
    what = f"coordinator memory, {nodes} nodes, {millions(params)} parameters"
    note = "no round log; nodes share one process and compute no model"
    return _row(what, job, found, note)


PUT = "/minga.v1.Bulk/Put"

# -- bulk transfer -------------------------------------------------------------------------------


def _identity(operator: Operator) -> TlsIdentity:
    """An operator's certificate in the form that the node's client takes."""
    now = datetime.now(UTC)
    return TlsIdentity(
        key=operator.key, chain=operator.certificate, root=operator.ca,
        not_before=now, not_after=now, serial=0,
    )  # fmt: skip


async def _put(connection: Connection, path: Path) -> tuple[Digest, float]:
    """Send a file; its name, and the seconds from the announcement to its last durable byte."""
    hasher = UnitHasher()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            hasher.update(piece)
    digest = hasher.digest()
    info = bulk_pb2.BlobInfo(
        digest=bytes.fromhex(digest), size=hasher.size, unit_hashes=hasher.hashes()
    )
    begun = time.perf_counter()
    state = await connection.ask(lambda c: c.bulk.BeginPut, info)
    # As a node sends its vector, but under the name of a blob, for which no round has to be played.
    place = uploads.Place(method=PUT, name=("minga-digest-bin", bytes.fromhex(digest)))
    await uploads.send(connection, path, place, state, set())
    seconds = time.perf_counter() - begun
    state = await connection.ask(lambda c: c.bulk.BeginPut, info)
    if not state.complete:
        raise ChildProcessError("the coordinator did not take the whole blob")
    return digest, seconds


async def transfers(
    operator: Operator, folder: Path, repetitions: int, size: int = BULK_BYTES
) -> dict[str, list[float]]:
    """A blob of ``size`` bytes up and down, once more than ``repetitions``: MB/s of each."""
    connection = Connection(operator.address, _identity(operator), rng=Random(0))
    speeds: dict[str, list[float]] = {"up": [], "down": []}
    try:
        for _ in range(repetitions + 1):
            path, back = folder / "out.bin", folder / "back.bin"
            path.write_bytes(os.urandom(size))
            digest, seconds = await _put(connection, path)
            speeds["up"].append(size / seconds / MB)
            begun = time.perf_counter()
            await bulk.fetch(connection, digest, back)
            speeds["down"].append(size / (time.perf_counter() - begun) / MB)
            back.unlink()
    finally:
        await connection.close()
    return speeds


def bulk_rows(*, repetitions: int, work: Path | None = None) -> list[Row]:
    """One blob up and down, checked unit by unit and durable on the receiving side."""
    with (
        tempfile.TemporaryDirectory(prefix="minga-bench-", dir=work) as folder,
        Stage(folder=Path(folder) / "logs") as stage,
    ):
        federation = Federation(Path(folder) / "federation", stage)
        federation.start_coordinator()
        operator = find_operator(folder=federation.folder, config=None, environment={})
        speeds = asyncio.run(transfers(operator, Path(folder), repetitions))
    return [
        Row(
            what=BULK.format(way=way),
            system=OURS,
            nodes=1,
            mb_per_s=Spread.of(speeds[way][1:]),
            bytes_per_node={way: BULK_BYTES},
            note="gRPC over mutual TLS; each 4 MiB unit checked against its hash; durable",
        )
        for way in ("up", "down")
    ]
