"""Keeps one caller from using up what all share: rates, calls under way, and patience.

The decisions are in ``coordinator.limits``; here are the tables and the clock. A refused call is
answered late, as long as the caller has a place to wait in: whoever calls without pause then calls
as often as its places allow, not as often as its processor does. No table grows beyond a limit.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final, TypeAlias, TypeVar

import grpc
from cryptography import x509

from coordinator.limits import BULK, PRICES, Bucket, Limits, is_full, take, too_slow
from protocols.canonical import sha256_hex
from protocols.errors import NotReadyError, TooManyRequestsError

logger = logging.getLogger(__name__)
T = TypeVar("T")
Context: TypeAlias = grpc.aio.ServicerContext
MAX_CALLERS: Final = 20_000  # buckets that are kept
LATE_S: Final = 0.5  # how long a refused call waits for its answer
WAITING: Final = 64  # refused calls of one caller that wait at the same time
WAITING_ALL: Final = 512
TELL_S: Final = 10.0  # between two lines about refused calls


@lru_cache(maxsize=4096)
def _name(pem: bytes) -> str:
    """Who a certificate of ours names; of another one, its digest: it is refused soon."""
    try:
        names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound):
        uris = []
    return uris[0] if len(uris) == 1 else sha256_hex(pem)


def caller_of(context: Context) -> str:
    """The name that a caller's calls are counted under: of its certificate, else its address."""
    pem = context.auth_context().get("x509_pem_cert")
    return _name(pem[0]) if pem else address_of(context.peer())


def address_of(peer: str) -> str:
    """The address in gRPC's name of a peer; of IPv6 the network, for a host has many addresses."""
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    if kind == "ipv6":
        try:
            return str(ipaddress.ip_network((host.partition("%")[0], 64), strict=False))
        except ValueError:
            return "ipv6"
    return host or kind


class Guard:
    """The tables of one port.

    Args:
        limits: of each caller.
        clock: seconds, only forward.
        joins: this is the port of those without a certificate: its rate is another one.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        joins: bool = False,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.limits = limits
        self.refused = 0  # calls, since the process began
        self._clock = clock
        self._sleep = sleep
        self._per_s = limits.joins_per_s if joins else limits.calls_per_s
        self._burst = limits.joins_burst if joins else limits.calls_burst
        self._buckets: dict[str, Bucket] = {}
        self._open: dict[tuple[str, bool], int] = {}  # (caller, bulk) -> calls under way
        self._waiting: dict[str, int] = {}
        self._told: tuple[float, int] | None = None  # when, and how many were refused by then

    async def admit(self, method: str, caller: str) -> None:
        """Take the price of a call.

        Raises:
            TooManyRequestsError: it says when to come again.
        """
        taken = take(
            self._buckets.get(caller),
            price=PRICES.get(method, 1.0),
            per_s=self._per_s,
            burst=self._burst,
            now=self._clock(),
        )
        self._keep(caller, taken.bucket)
        if taken.wait_s:
            await self._late(caller)
            raise TooManyRequestsError(
                f"more than {self._per_s:g} calls a second; the next one in {taken.wait_s:.1f} s",
                retry_after_s=max(0.1, taken.wait_s),
            )

    async def place(self, method: str, caller: str) -> None:
        """Look whether a caller has a place left for another call.

        Raises:
            TooManyRequestsError: too many are under way.
        """
        bulk = method in BULK
        others = self._open.get((caller, bulk), 0)
        everything = others + (self._open.get((caller, False), 0) if bulk else 0)
        most = self.limits.bulk_open if bulk else self.limits.calls_open
        if others >= most or everything >= self.limits.calls_open:
            await self._late(caller)
            raise TooManyRequestsError(
                f"{others} calls of this caller are under way; at most {most} are served"
            )

    @contextmanager
    def under_way(self, method: str, caller: str) -> Iterator[None]:
        """Count a call for as long as it lasts."""
        key = (caller, method in BULK)
        self._open[key] = self._open.get(key, 0) + 1
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def calls_open(self) -> int:
        """Calls that are under way."""
        return sum(self._open.values())

    def callers(self) -> int:
        """Callers that are remembered."""
        return len(self._buckets)

    def _keep(self, caller: str, bucket: Bucket) -> None:
        self._buckets.pop(caller, None)
        self._buckets[caller] = bucket  # last: the table is in the order of the last call
        if len(self._buckets) > MAX_CALLERS:
            now = self._clock()
            kept = {
                name: old
                for name, old in self._buckets.items()
                if not is_full(old, per_s=self._per_s, burst=self._burst, now=now)
            }
            while len(kept) > MAX_CALLERS // 2:  # those that called longest ago begin anew
                del kept[next(iter(kept))]
            self._buckets = kept

    def _tell(self, caller: str) -> None:
        now = self._clock()
        at, before = self._told or (now - TELL_S, 0)
        if now - at >= TELL_S:
            self._told = (now, self.refused)
            logger.warning(
                "%d calls were over the limits, the last by %.200s", self.refused - before, caller
            )

    async def _late(self, caller: str) -> None:
        self.refused += 1
        self._tell(caller)
        waiting = self._waiting.get(caller, 0)
        if waiting >= WAITING or sum(self._waiting.values()) >= WAITING_ALL:
            return
        self._waiting[caller] = waiting + 1
        try:
            await self._sleep(LATE_S)
        finally:
            self._waiting[caller] -= 1
            if not self._waiting[caller]:
                del self._waiting[caller]

    # -- patience ----------------------------------------------------------------------------

    async def patient(self, waiting: Awaitable[T]) -> T:
        """Wait for one message of a caller.

        Raises:
            NotReadyError: it did not come in time.
        """
        try:
            async with asyncio.timeout(self.limits.message_s):
                return await waiting
        except TimeoutError:
            raise NotReadyError(
                f"no whole message came within {self.limits.message_s:g} s", retry_after_s=0.0
            ) from None

    async def steady(self, read: Callable[[], Awaitable[Any]]) -> AsyncIterator[Any]:
        """The raw messages of a stream, while they come fast enough.

        Args:
            read: the next message, ``grpc.aio.EOF`` at the end.

        Raises:
            NotReadyError: too slow; what was acknowledged stays.
        """
        received, waited = 0, 0.0
        while True:
            since = self._clock()
            message = await self.patient(read())
            if message is grpc.aio.EOF:
                return
            waited += self._clock() - since
            received += len(message)
            if too_slow(received=received, elapsed_s=waited, limits=self.limits):
                raise NotReadyError(
                    f"{received} bytes came in {waited:.0f} s; a stream brings at least"
                    f" {self.limits.stream_bytes_per_s:g} bytes a second",
                    retry_after_s=0.0,
                )
            yield message
