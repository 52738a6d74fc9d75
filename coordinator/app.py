"""The coordinator process: services on two ports, drivers beside them, one ledger between.

The mutual-TLS port serves everything; the enrolment port serves callers who have no certificate
yet and holds nothing but ``Enrolment.Join``. Plaintext is not offered.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from coordinator.blobs import Blobs
from coordinator.ca import CertificateAuthority
from coordinator.clock import Clock, SystemClock
from coordinator.config import CoordinatorConfig
from coordinator.drivers.retention import RetentionDriver
from coordinator.drivers.rounds import RoundDriver
from coordinator.layouts import Layouts
from coordinator.ledger import Ledger
from coordinator.limits import Limits
from coordinator.log_parts import LogParts, open_log
from coordinator.log_push import push
from coordinator.services.accounting import AccountingService
from coordinator.services.admin import AdminService
from coordinator.services.bulk import BulkService, raw_handlers
from coordinator.services.caller import Callers
from coordinator.services.enrolment import EnrolmentService, RenewalService
from coordinator.services.errors import ErrorInterceptor
from coordinator.services.guard import Guard
from coordinator.services.log import LogService, WitnessService
from coordinator.services.rounds import RoundsService
from coordinator.services.secure_sum import SecureSumService
from coordinator.services.trust import TrustService
from coordinator.spool import Spool
from coordinator.static_http import StaticServer
from coordinator.trust_log import TrustLog
from coordinator.trust_repository import ONLINE_KEY, TrustRepository, load_online_key
from protocols.errors import ConfigurationError
from protocols.gen import (
    accounting_pb2_grpc,
    admin_pb2_grpc,
    bulk_pb2_grpc,
    enrolment_pb2_grpc,
    log_pb2_grpc,
    rounds_pb2_grpc,
    secure_sum_pb2_grpc,
    trust_pb2_grpc,
)
from protocols.tensors.sizes import STREAM_WINDOW

logger = logging.getLogger(__name__)

MAX_CONTROL_MESSAGE = 6 * 2**20  # bytes: a plan, a manifest's hashes; payload messages are 1 MiB
MAX_ENROLMENT_MESSAGE = 65_536  # bytes
_GRACE_S = 3.0
# gRPC's own probe lets the windows of 33 senders grow to gigabytes when the disk is slower than the
# senders; a fixed receive window bounds memory by the number of streams, and one stream's speed by
# window / round trip: over a long link an upload has several streams.
_FILES_KEPT = 512  # file descriptors that connections leave to the ledger, blobs and logs
_CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_CONTROL_MESSAGE),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
    ("grpc.keepalive_time_ms", 210_000),  # middleboxes drop idle connections
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Connections end and are opened again, so that what the TLS layer checks is checked again.
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 30_000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", STREAM_WINDOW),
    ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
    # Whoever opens a connection has this long for TLS and HTTP/2 to begin; one that is used by
    # nobody is closed. A node has a poll under way all the time.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 900_000),
    ("grpc.max_concurrent_streams", 128),
    ("grpc.max_metadata_size", 16_384),
    ("grpc.absolute_max_metadata_size", 32_768),
    # Identity alone: limits are of what is sent, and so they are of what is unpacked.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.per_message_decompression", 0),
)


def _options(limits: Limits, largest: int) -> list[tuple[str, int]]:
    """What gRPC itself holds callers to."""
    room = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES_KEPT)
    return [
        *_CHANNEL_OPTIONS,
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_allowed_incoming_connections", min(limits.connections, room)),
    ]


def use_all_files() -> None:
    """Raise this process's own limit of open files to what the machine allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1_048_576
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What one coordinator process is made of; tests build it with their own clock."""

    config: CoordinatorConfig
    clock: Clock
    ledger: Ledger
    blobs: Blobs
    spool: Spool
    layouts: Layouts
    authority: CertificateAuthority
    callers: Callers
    trust: TrustRepository | None  # None: a coordinator made before there was governance
    log: LogParts | None  # None: the federation keeps no round log


def open_trust(config: CoordinatorConfig, clock: Clock) -> TrustRepository | None:
    """The trust repository of a coordinator.

    Raises:
        ConfigurationError: governance is required and the online key is missing.
        TrustRefusedError, ForgedError: the folder does not verify.
    """
    path = config.keys / ONLINE_KEY
    if not config.governed and not path.exists():
        return None
    trust = TrustRepository(
        config.trust,
        federation=config.federation,
        key=load_online_key(path),
        clock=clock,
        required=config.governed,
    )
    trust.load()
    return trust


async def build(config: CoordinatorConfig, clock: Clock) -> Parts:
    """Open ledger and folders.

    Raises:
        ConfigurationError: keys or folders are missing.
        LedgerBusyError: another coordinator holds the SQLite file.
    """
    authority = CertificateAuthority.load(config.federation, config.keys)
    opened = open_log(config)
    log, sequencer = opened or (None, None)
    ledger = Ledger(config.ledger_url, clock=clock, sequencer=sequencer)
    await ledger.open()
    blobs = Blobs(config.blobs)
    blobs.prepare()
    spool = Spool(config.spool, min_free_bytes=config.min_free_bytes)
    spool.prepare()
    layouts = Layouts(blobs)
    trust = open_trust(config, clock)
    if trust is not None and log is not None:
        trust.announce = announce = TrustLog(ledger, log.hub)
        trust.heard, trust.evaluated = announce.heard, announce.evaluated
    return Parts(
        config=config,
        clock=clock,
        ledger=ledger,
        blobs=blobs,
        spool=spool,
        layouts=layouts,
        authority=authority,
        callers=Callers(config.federation, ledger, clock, trust),
        trust=trust,
        log=log,
    )


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None


def main_server(parts: Parts) -> grpc.aio.Server:
    """The mutual-TLS server with every service."""
    limits = parts.config.limits
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(Guard(limits))],
        options=_options(limits, MAX_CONTROL_MESSAGE),
        maximum_concurrent_rpcs=4096,
    )
    callers, ledger, clock = parts.callers, parts.ledger, parts.clock
    bulk = BulkService(
        callers=callers,
        ledger=ledger,
        clock=clock,
        spool=parts.spool,
        blobs=parts.blobs,
        layouts=parts.layouts,
    )
    rounds_pb2_grpc.add_RoundsServicer_to_server(
        RoundsService(
            callers=callers,
            ledger=ledger,
            clock=clock,
            caps=parts.config.caps,
            trust=parts.trust,
        ),
        server,
    )
    secure_sum_pb2_grpc.add_SecureSumServicer_to_server(
        SecureSumService(callers=callers, ledger=ledger, clock=clock), server
    )
    accounting_pb2_grpc.add_AccountingServicer_to_server(
        AccountingService(callers=callers, ledger=ledger, clock=clock), server
    )
    admin_pb2_grpc.add_AdminServicer_to_server(
        AdminService(
            callers=callers,
            ledger=ledger,
            clock=clock,
            blobs=parts.blobs,
            authority=parts.authority,
            trust=parts.trust,
            caps=parts.config.caps,
            hub=parts.log.hub if parts.log else None,
            prices=parts.config.prices,
        ),
        server,
    )
    if parts.log is not None:
        hub = parts.log.hub
        log_pb2_grpc.add_LogServicer_to_server(
            LogService(callers=callers, ledger=ledger, hub=hub), server
        )
        log_pb2_grpc.add_WitnessServicer_to_server(
            WitnessService(callers=callers, hub=hub, clock=clock), server
        )
    if parts.trust is not None:
        trust_pb2_grpc.add_TrustServicer_to_server(
            TrustService(callers=callers, ledger=ledger, trust=parts.trust), server
        )
    # Registered first for the methods protoc knows; the raw ones are a second handler.
    bulk_pb2_grpc.add_BulkServicer_to_server(bulk, server)
    server.add_generic_rpc_handlers((raw_handlers(bulk),))
    renewal = RenewalService(
        callers=parts.callers,
        authority=parts.authority,
        ledger=parts.ledger,
        clock=parts.clock,
        hours=parts.config.node_certificate_hours,
        trust=parts.trust,
        log_vkey=parts.log.vkey if parts.log else "",
    )
    enrolment_pb2_grpc.add_RenewalServicer_to_server(renewal, server)
    keys = parts.config.keys
    credentials = grpc.ssl_server_credentials(
        [(_read_key(keys / "coordinator.key"), _read_key(keys / "coordinator.crt"))],
        root_certificates=_read_key(keys / "ca.crt"),
        require_client_auth=True,
    )
    _listen(server, parts.config.address, credentials)
    return server


def enrolment_server(parts: Parts) -> grpc.aio.Server:
    """The server for callers without a certificate."""
    limits = parts.config.limits
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(Guard(limits, joins=True))],
        options=_options(limits, MAX_ENROLMENT_MESSAGE),
        maximum_concurrent_rpcs=64,
    )
    service = EnrolmentService(
        authority=parts.authority,
        ledger=parts.ledger,
        clock=parts.clock,
        hours=parts.config.node_certificate_hours,
        person_hours=parts.config.person_certificate_hours,
        trust=parts.trust,
        log_vkey=parts.log.vkey if parts.log else "",
    )
    enrolment_pb2_grpc.add_EnrolmentServicer_to_server(service, server)
    keys = parts.config.keys
    credentials = grpc.ssl_server_credentials(
        [(_read_key(keys / "coordinator.key"), _read_key(keys / "coordinator.crt"))]
    )
    _listen(server, parts.config.enrolment_address, credentials)
    return server


def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> None:
    try:
        bound = server.add_secure_port(address, credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigurationError(f"cannot listen on {address}: is the port in use?")


def log_drivers(parts: Parts) -> set[asyncio.Task[None]]:
    """Start what keeps the round log, if there is one."""
    log = parts.log
    if log is None:
        return set()
    members = parts.trust.active_members if parts.trust is not None else lambda: None
    tasks = {
        asyncio.create_task(log.writer(parts.ledger, parts.clock, members).run(), name="log writer")
    }
    for place, witness in enumerate(log.config.witnesses, start=1):
        asking = push(log.hub, parts.clock, f"auditor.{place}", witness.url)
        tasks.add(asyncio.create_task(asking, name=f"witness {place}"))
    return tasks


def static_server(config: CoordinatorConfig) -> StaticServer | None:
    """The plain HTTP server of log and trust repository; None: nobody is served.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    if config.log is None or config.log.http is None:
        return None
    tuf = config.log.folder.parent / "tuf"
    return StaticServer(config.log.http, {"log": config.log.folder, "tuf": tuf}, config.limits)


def keep_heap_small() -> None:
    """Keep what was needed once from being kept for ever; another C library is left as it is.

    glibc uses two heaps instead of eight for each core: threads come and go here, and each heap
    keeps the most it ever needed. What is larger than 2 MiB (units, chunks) gets pages of its own
    that go back when it is freed, and a heap's free end goes back from 8 MiB on. Messages of 1 MiB
    stay in the heap: new pages for each of them, filled twice while gRPC holds the interpreter,
    cost a round of 25 M parameters and 4 nodes an eighth of its time. Left alone, glibc raises both
    limits each time it sees a larger buffer freed (mallopt(3)).
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 2 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 8 * 2**20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # from glibc's malloc.h


async def serve(config: CoordinatorConfig, clock: Clock | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    keep_heap_small()
    use_all_files()
    parts = await build(config, clock or SystemClock())
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    servers = [main_server(parts), enrolment_server(parts)]
    static = static_server(config)
    driver = RoundDriver(
        ledger=parts.ledger,
        clock=parts.clock,
        blobs=parts.blobs,
        layouts=parts.layouts,
        spool=config.spool,
        trust=parts.trust,
    )
    retention = RetentionDriver(
        ledger=parts.ledger,
        clock=parts.clock,
        spool=config.spool,
        days=config.upload_retention_days,
        policy=parts.trust.policy if parts.trust is not None else lambda: None,
    )
    try:
        for server in servers:
            await server.start()
        if static is not None:
            static.start()
        logger.info(
            "serving federation %s on %s, enrolment on %s",
            config.federation,
            config.address,
            config.enrolment_address,
        )
        drivers = {
            asyncio.create_task(driver.run(), name="round driver"),
            asyncio.create_task(retention.run(), name="retention"),
            *log_drivers(parts),
        }
        if parts.trust is not None:
            drivers.add(asyncio.create_task(parts.trust.run(), name="trust"))
        stopped = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait({*drivers, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopped}:
            task.result()  # a driver never ends by itself: raise what stopped it
        for task in drivers:
            task.cancel()
        await asyncio.wait(drivers, timeout=_GRACE_S)
    finally:
        if static is not None:
            await asyncio.to_thread(static.stop)
        await asyncio.gather(*(server.stop(_GRACE_S) for server in servers))
        await parts.ledger.close()
