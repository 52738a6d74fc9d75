"""A member that does everything a member should not: ``python -m tests.support.attacker JOB``.

It has one node's real certificate, which its institution may have lost, and what anybody has: the
ports. All at once, until the file JOB names as ``stop`` appears: joins as fast as they go over many
connections, calls whose message never comes, messages as large as they may be and larger, packed
ones, random bytes, connections that never say anything, joins without an invitation, and HTTP heads
that drip. What each was answered is counted and written beside the job: an attack that reached
nobody would show nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from node_agent.keys import KeyStore
from protocols.gen import enrolment_pb2, rounds_pb2

MIB = 2**20
JOIN = "/minga.v1.Rounds/Join"


class Attacker:
    """One certificate, and patience."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.stop = Path(job["stop"])
        self.counts: dict[str, Counter[str]] = {}
        identity = KeyStore(Path(job["keys"])).tls()
        self.credentials = grpc.ssl_channel_credentials(identity.root, identity.key, identity.chain)
        self.anonymous = grpc.ssl_channel_credentials(identity.root)
        self._channels = 0

    def channel(self, *, enrolment: bool = False, compression: Any = None) -> grpc.aio.Channel:
        """A connection of its own."""
        self._channels += 1
        return grpc.aio.secure_channel(
            self.job["enrolment"] if enrolment else self.job["address"],
            self.anonymous if enrolment else self.credentials,
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_send_message_length", -1),
                ("minga.connection", self._channels),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
            compression=compression,
        )

    async def until_stopped(self, name: str, work: Callable[[], Awaitable[str]]) -> None:
        """Again and again; what came of it is counted."""
        counts = self.counts.setdefault(name, Counter())
        while not self.enough(name):
            for _ in range(20):
                if self.enough(name):
                    return
                try:
                    counts[await work()] += 1
                except grpc.aio.AioRpcError as error:
                    counts[error.code().name] += 1
                except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                    counts[type(error).__name__] += 1
            await asyncio.sleep(0)

    def enough(self, name: str) -> bool:
        """Whether to end; not before there were ``least`` joins, however slow the machine is."""
        least = self.job["least"] if name == "joins" else 0
        return self.stop.exists() and self.counts[name].total() >= least

    # -- what it does ------------------------------------------------------------------------

    async def joins(self, channel: grpc.aio.Channel) -> str:
        """A join, and no wait for anything after it."""
        call = channel.unary_unary(JOIN, None, None)
        reference = rounds_pb2.RoundRef(run="attacked", number=0)
        await call(rounds_pb2.JoinRequest(round=reference).SerializeToString(), timeout=30)
        return "OK"

    async def invitations(self, channel: grpc.aio.Channel) -> str:
        """A join without an invitation."""
        request = enrolment_pb2.EnrolRequest(institution="x", token_secret=secrets.token_bytes(32))
        call = channel.unary_unary("/minga.v1.Enrolment/Join", None, None)
        await call(request.SerializeToString(), timeout=30)
        return "OK"

    async def silent(self, channel: grpc.aio.Channel, method: str) -> str:
        """A call whose message does not come."""

        async def nothing() -> AsyncIterator[bytes]:
            while not self.stop.exists():  # noqa: ASYNC110 - a file of another process
                await asyncio.sleep(0.2)
            for message in ():
                yield message

        await channel.stream_unary(method, None, None)(nothing(), timeout=60)
        return "OK"

    async def large(self, channel: grpc.aio.Channel, size: int) -> str:
        """A message of zeros."""
        await channel.unary_unary("/minga.v1.Bulk/BeginUpload", None, None)(bytes(size), timeout=30)
        return "OK"

    async def connect(self, address: str, first: bytes, *, hold_s: float) -> str:
        """A connection that says ``first`` and then nothing, or a byte now and then."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        until = time.monotonic() + hold_s
        try:
            writer.write(first)
            while time.monotonic() < until and not self.stop.exists():
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        if not await reader.read(1000):
                            return "ended"
                writer.write(b"x" if first else b"")
        finally:
            writer.close()
        return "held"

    async def run(self) -> None:
        """All of it."""
        job, tasks = self.job, []

        def start(name: str, work: Callable[[], Awaitable[str]]) -> None:
            tasks.append(asyncio.create_task(self.until_stopped(name, work)))

        for _ in range(job.get("connections", 6)):
            channel = self.channel()
            for _ in range(40):
                start("joins", lambda channel=channel: self.joins(channel))
        open_ = self.channel(enrolment=True)
        for _ in range(8):
            start("invitations", lambda: self.invitations(open_))
        quiet = self.channel()
        for number in range(40):
            method = ("/minga.v1.Rounds/Sync", "/minga.v1.Bulk/Append")[number % 2]
            start("silent", lambda method=method: self.silent(quiet, method))
        heavy, packed = self.channel(), self.channel(compression=grpc.Compression.Gzip)
        for size in (6 * MIB - 64, 6 * MIB - 64, 7 * MIB):
            start("large", lambda size=size: self.large(heavy, size))
        start("packed", lambda: self.large(packed, 64 * MIB))
        head = b"GET /log/checkpoint HTTP/1.1\r\nX-A: "
        for number in range(60):
            port = (job["address"], job["enrolment"])[number % 2]
            start("idle", lambda port=port: self.connect(port, b"", hold_s=30))
            start("noise", lambda port=port: self.connect(port, secrets.token_bytes(900), hold_s=5))
            start("http", lambda: self.connect(job["http"], head, hold_s=30))
        Path(job["ready"]).touch()  # noqa: ASYNC240 - once
        await asyncio.wait(tasks)


async def main(job: dict[str, Any]) -> None:
    """Attack, then say what happened."""
    attacker = Attacker(job)
    await attacker.run()
    facts = {name: dict(counts) for name, counts in attacker.counts.items()}
    Path(job["out"]).write_text(json.dumps(facts))  # noqa: ASYNC240 - once


if __name__ == "__main__":
    os.nice(5)  # elsewhere it would not share the processors with those it attacks
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
