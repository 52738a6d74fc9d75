"""A thousand nodes that ask and do nothing else: ``python -m tests.bench.pollers JOB``.

Each has a certificate and a connection of its own. Three ways of asking, one after the other:
waiting for news as nodes do; asking at once, so many times a second all together; and asking again
as soon as there is an answer, by a few at a time, which shows how much there is to be had. What
each took is written to the file that JOB names.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio

from protocols.gen import rounds_pb2

SYNC = "/minga.v1.Rounds/Sync"


class Pollers:
    """The connections."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        root = Path(job["root"]).read_bytes()
        self.calls = []
        for number, (key, certificate) in enumerate(job["identities"]):
            credentials = grpc.ssl_channel_credentials(root, key.encode(), certificate.encode())
            channel = grpc.aio.secure_channel(
                job["address"],
                credentials,
                options=[("grpc.use_local_subchannel_pool", 1), ("minga.number", number)],
            )
            self.calls.append(
                channel.unary_unary(
                    SYNC,
                    rounds_pb2.SyncRequest.SerializeToString,
                    rounds_pb2.SyncResponse.FromString,
                )
            )

    async def ask(self, number: int, *, seen: int = 0, wait_ms: int = 0) -> tuple[float, int]:
        """One poll: seconds, and the version that was answered."""
        begun = time.perf_counter()
        request = rounds_pb2.SyncRequest(seen=seen, wait_ms=wait_ms, state="running")
        answer = await self.calls[number](request, timeout=120, wait_for_ready=True)
        return time.perf_counter() - begun, answer.version

    async def connect(self) -> int:
        """Everybody once, some at a time; the version."""
        gate, version = asyncio.Semaphore(32), 0

        async def one(number: int) -> None:
            nonlocal version
            async with gate:
                _, version = await self.ask(number)

        await asyncio.gather(*(one(number) for number in range(len(self.calls))))
        return version

    async def waiting(self, version: int, seconds: float) -> dict[str, Any]:
        """Long polls of 20 s, for some time."""
        until, done = time.monotonic() + seconds, 0

        async def one(number: int) -> None:
            nonlocal done
            seen = version
            while time.monotonic() < until:
                left = max(1, min(20_000, int((until - time.monotonic()) * 1000)))
                _, seen = await self.ask(number, seen=seen, wait_ms=left)
                done += 1

        await asyncio.gather(*(one(number) for number in range(len(self.calls))))
        return {"calls": done}

    async def paced(self, per_s: float, seconds: float) -> dict[str, Any]:
        """So many polls a second, spread over all nodes and over time; latencies."""
        rng, found, until = Random(7), [], time.monotonic() + seconds
        interval = len(self.calls) / per_s

        async def one(number: int) -> None:
            await asyncio.sleep(rng.uniform(0, interval))
            while time.monotonic() < until:
                took, _ = await self.ask(number)
                found.append(took)
                await asyncio.sleep(max(0.0, interval - took))

        begun = time.monotonic()
        await asyncio.gather(*(one(number) for number in range(len(self.calls))))
        return quantiles(found, time.monotonic() - begun)

    async def closed(self, at_once: int, seconds: float) -> dict[str, Any]:
        """A few that never rest, each node in turn."""
        found, until = [], time.monotonic() + seconds
        numbers = iter(range(10**9))

        async def one() -> None:
            while time.monotonic() < until:
                took, _ = await self.ask(next(numbers) % len(self.calls))
                found.append(took)

        begun = time.monotonic()
        await asyncio.gather(*(one() for _ in range(at_once)))
        return quantiles(found, time.monotonic() - begun)


def quantiles(found: list[float], seconds: float) -> dict[str, Any]:
    """Calls a second, and milliseconds at the median and at 99 of 100."""
    ordered = sorted(found)
    return {
        "calls": len(ordered),
        "per_s": len(ordered) / seconds,
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p99_ms": 1000 * ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }


async def main(job: dict[str, Any]) -> None:
    """Ask in each way; a mark before and after each, so that others can look meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))
    pollers, marks = Pollers(job), []

    async def part(name: str, work: Any) -> None:
        begun = time.time()
        found = await work
        marks.append({"name": name, "from": begun, "to": time.time(), **(found or {})})

    version = await pollers.connect()
    await part("waiting", pollers.waiting(version, job["seconds"]))
    await part("paced", pollers.paced(job["per_s"], job["seconds"]))
    await part("closed", pollers.closed(job["at_once"], job["seconds"]))
    out = Path(job["out"])
    out.write_text(json.dumps(marks))  # noqa: ASYNC240 - at the end


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
