"""The one connection of a node: outbound, mutual TLS, control calls as protobuf, errors as ours.

The coordinator's certificate must come from the trust anchor of the invitation and name the host
that was dialled. Node certificates of the same authority name no host, so no member can stand in
for the coordinator. A renewed certificate gets a new channel; calls under way finish on the old.

A consortium may run several coordinator processes over one database, each at an address of its own.
All of them serve every call, so a node talks to one and turns to the next when that one does not
answer. Only the stream of cosignatures has to reach the process that writes the log: it has a
channel of its own, which goes round until it is there.

Only errors that say "later" (``NotReadyError``, and gRPC's UNAVAILABLE and DEADLINE_EXCEEDED) are
retried, with exponential backoff and jitter. Every call may be repeated: protocols/proto.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from node_agent.keys import TlsIdentity
from protocols.errors import (
    FederationError,
    NotEnrolledError,
    NotReadyError,
    RefusedError,
    TooManyRequestsError,
    UnreachableError,
    error_from_code,
)
from protocols.gen import (
    accounting_pb2_grpc,
    bulk_pb2_grpc,
    enrolment_pb2_grpc,
    log_pb2_grpc,
    rounds_pb2_grpc,
    secure_sum_pb2_grpc,
    trust_pb2_grpc,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_MESSAGE: Final = 8 * 2**20  # bytes: a plan or a list of unit hashes, with room
KEEPALIVE_MS: Final = 210_000  # middleboxes drop idle connections after 4 minutes
CALL_TIMEOUT_S: Final = 30.0
_RECENT: Final = 32  # answered calls whose time is remembered
TURNED_GRACE_S: Final = 60.0  # for calls under way when another coordinator process is turned to
OPTIONS: Final = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    # A restarted coordinator is found again within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
    # Nothing is compressed, so that no small message can become a large one.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.per_message_decompression", 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before trying again: exponential, capped, with jitter."""

    first_s: float = 0.25
    cap_s: float = 20.0

    def delay(self, attempt: int, rng: Random, *, at_least: float = 0.0) -> float:
        """Seconds before try number ``attempt`` + 1; at least what the other side asked for."""
        full: float = min(self.cap_s, self.first_s * 2.0 ** min(attempt, 16))
        return max(at_least, full * rng.uniform(0.5, 1.0))


async def retrying(
    call: Callable[[], Awaitable[T]],
    *,
    rng: Random,
    backoff: Backoff,
    attempts: int,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """Call until it is answered, refused, or has failed ``attempts`` times.

    Raises:
        FederationError: refused, an integrity failure, or the last NotReadyError.
    """
    for attempt in range(attempts - 1):
        try:
            return await call()
        except NotReadyError as error:
            await sleep(backoff.delay(attempt, rng, at_least=error.retry_after_s))
    return await call()


_LATER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def rebuild_error(error: grpc.aio.AioRpcError, address: str) -> FederationError:
    """A gRPC failure as one of our errors: by its ``minga-code``, else by its status."""
    metadata = {str(key): value for key, value in (error.trailing_metadata() or ())}
    sentence = " ".join((error.details() or "").split())[:500]
    code = metadata.get("minga-code")
    if isinstance(code, str):
        details = {
            key.removeprefix("minga-").replace("-", "_"): value
            for key, value in metadata.items()
            if key.startswith("minga-") and isinstance(value, str)
        }
        return error_from_code(code, sentence, details)
    match error.code():
        case status if status in _LATER:
            # The backoff decides how soon to try again: it may be back at once.
            what = sentence or status.name
            return UnreachableError(f"no answer from {address}: {what}", retry_after_s=0.0)
        case grpc.StatusCode.UNAUTHENTICATED:
            return NotEnrolledError(sentence or f"{address} does not know this certificate")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in sentence:
            return RefusedError(f"{address}: {sentence}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return TooManyRequestsError(sentence or f"{address} takes no more for now")
        case grpc.StatusCode.UNIMPLEMENTED:
            return RefusedError(f"{address} does not offer this call: is it an older version?")
        case status:
            return RefusedError(f"{address} answered {status.name}: {sentence}")


def _credentials(identity: TlsIdentity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=identity.root,
        private_key=identity.key,
        certificate_chain=identity.chain,
    )


class Connection:
    """A channel to the coordinator that can be replaced when the certificate is renewed.

    Args:
        addresses: HOST:PORT of each coordinator process, in the order of preference; or the one.
        identity: certificate and key.
        rng: jitter only.
    """

    def __init__(
        self, addresses: str | Sequence[str], identity: TlsIdentity, *, rng: Random
    ) -> None:
        self.addresses = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        self.rng = rng
        self._took: deque[float] = deque([math.inf], maxlen=_RECENT)
        self.upload_rate = math.inf  # bytes per second of the last upload; infinite: none yet
        self._at = 0
        self._witness_at = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._streams: set[Any] = set()
        self._open(identity)

    @property
    def round_trip_s(self) -> float:
        """Seconds of the quickest of the last calls that were answered; infinite before the first.

        What the other side does before it answers is in it, so it is an upper bound.
        """
        return min(self._took)

    @property
    def address(self) -> str:
        """Whom this node talks to now."""
        return self.addresses[self._at]

    def _channel(self, address: str) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, _credentials(self._identity), options=list(OPTIONS))

    @asynccontextmanager
    async def channels(self, count: int) -> AsyncIterator[list[grpc.aio.Channel]]:
        """``count`` channels to whom this node talks to now, each with a connection of its own: a
        receive window belongs to a connection. The first is the one that everything uses."""
        more = [self._channel(self.address) for _ in range(count - 1)]
        try:
            yield [self.channel, *more]
        finally:
            for channel in more:
                await channel.close(None)

    def _open(self, identity: TlsIdentity) -> None:
        self._identity = identity
        self._open_calls()
        self._open_witness()

    def _open_calls(self) -> None:
        self.channel = self._channel(self.address)
        self.accounting: Any = accounting_pb2_grpc.AccountingStub(self.channel)
        self.rounds: Any = rounds_pb2_grpc.RoundsStub(self.channel)
        self.bulk: Any = bulk_pb2_grpc.BulkStub(self.channel)
        self.secure_sum: Any = secure_sum_pb2_grpc.SecureSumStub(self.channel)
        self.trust: Any = trust_pb2_grpc.TrustStub(self.channel)
        self.log: Any = log_pb2_grpc.LogStub(self.channel)
        self.renewal: Any = enrolment_pb2_grpc.RenewalStub(self.channel)

    def _open_witness(self) -> None:
        alone = len(self.addresses) == 1
        address = self.addresses[self._witness_at]
        self.witness_channel = self.channel if alone else self._channel(address)
        self.witness: Any = log_pb2_grpc.WitnessStub(self.witness_channel)

    def turn_from(self, address: str) -> None:
        """Talk to the next coordinator process, if ``address`` is the one that did not answer.

        Calls under way on the old channel have a while to finish: it may only be slow.
        """
        if len(self.addresses) > 1 and address == self.address:
            self._at = (self._at + 1) % len(self.addresses)
            logger.warning("%s does not answer: turning to %s", address, self.address)
            old = self.channel
            self._open_calls()
            self._close_later(old, TURNED_GRACE_S)
            self._end_streams()

    def dial_again(self, silent: grpc.aio.Channel) -> None:
        """Make a new channel to the same place, if the one that did not answer is still in use.

        A connection that a middlebox forgot looks open until a keepalive fails, minutes later.
        """
        if silent is self.channel:
            alone = self.witness_channel is silent
            self._open_calls()
            if alone:
                self._open_witness()
            self._close_later(silent, TURNED_GRACE_S)
            self._end_streams()

    @contextmanager
    def stream(self, call: T) -> Iterator[T]:
        """A call without an end of its own: it ends when its channel is given up.

        Nobody else would notice that a stream on a dead connection brings nothing any more.

        Raises:
            grpc.aio.UsageError: its channel was given up; ask again on the new one.
        """
        self._streams.add(call)
        try:
            yield call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call in self._streams or task is None or task.cancelling():
                raise
            raise grpc.aio.UsageError("the channel was given up") from None
        finally:
            self._streams.discard(call)
            call.cancel()  # type: ignore[attr-defined]

    def _end_streams(self) -> None:
        while self._streams:
            self._streams.pop().cancel()

    def turn_witness(self) -> None:
        """Offer cosignatures to the next coordinator process: this one does not write the log."""
        if len(self.addresses) > 1:
            self._witness_at = (self._witness_at + 1) % len(self.addresses)
            old = self.witness_channel
            self._open_witness()
            self._close_later(old, 0.0)

    def renew(self, identity: TlsIdentity, *, grace_s: float = 600.0) -> None:
        """Use another certificate from now on; calls under way have ``grace_s`` to finish."""
        old = {self.channel, self.witness_channel}
        self._open(identity)
        for channel in old:
            self._close_later(channel, grace_s)

    def _close_later(self, channel: grpc.aio.Channel, grace_s: float) -> None:
        task = asyncio.get_running_loop().create_task(channel.close(grace_s))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close the channels; calls under way are cancelled."""
        for task in self._closing:
            task.cancel()
        for channel in {self.channel, self.witness_channel}:
            await channel.close(None)

    async def call(self, method: Any, request: Any, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """One control call, once.

        Raises:
            FederationError: as the coordinator said, or UnreachableError.
        """
        address, channel = self.address, self.channel
        now = asyncio.get_running_loop().time
        begun = now()
        try:
            answer = await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            known = rebuild_error(error, address)
            if isinstance(known, UnreachableError):
                self.turn_from(address)
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self.dial_again(channel)
            raise known from None
        except grpc.aio.UsageError:
            # The channel was replaced between reading the stub and calling it.
            raise UnreachableError("the connection was being renewed", retry_after_s=0.1) from None
        self._took.append(now() - begun)
        return answer

    async def ask(
        self,
        method: Callable[[Connection], Any],
        request: Any,
        *,
        attempts: int = 4,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        """One control call, repeated while the answer is "later".

        Args:
            method: picks the stub's method, anew for each try: the channel may have been renewed.
            request: the message.
            attempts: at most so many tries.
            timeout_s: of each try.

        Raises:
            FederationError: as the coordinator said, or UnreachableError.
        """
        return await retrying(
            lambda: self.call(method(self), request, timeout_s=timeout_s),
            rng=self.rng,
            backoff=Backoff(),
            attempts=attempts,
        )
