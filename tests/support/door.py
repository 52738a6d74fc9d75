"""A real coordinator in this process, behind real mutual TLS, and clients that knock on its door.

The server's event loop runs in a thread of its own; tests use gRPC's blocking stubs, so a test
reads like what a client does. No driver runs: tests put rounds into the phase they need.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.app import Parts, build, enrolment_server, log_drivers, main_server
from coordinator.ca import CertificateAuthority, certificate_pem, key_pem, new_tls_key
from coordinator.clock import SystemClock
from coordinator.config import load_config
from coordinator.ledger import Tx
from coordinator.setup import initialise
from protocols.cohort import terms_of
from protocols.crypto.identity import Identity, spki_digest
from protocols.crypto.signatures import Context, sign
from protocols.enrolment import enrolment_proof_body
from protocols.gen import (
    accounting_pb2_grpc,
    admin_pb2_grpc,
    bulk_pb2_grpc,
    enrolment_pb2,
    enrolment_pb2_grpc,
    rounds_pb2_grpc,
    trust_pb2_grpc,
)
from protocols.identifiers import NodeId, RoundId
from protocols.plan import Plan
from protocols.rounds import NOBODY, Nodes, Phase, Uploading
from protocols.tensors.ring import Ring
from protocols.tensors.scales import initial_scales
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import UnitHasher
from tests.support.plans import MANIFEST, plan_value

Result = TypeVar("Result")
EPOCH_KEY = bytes(range(32))


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Credentials:
    """A client's key and certificate."""

    key: Any = field(repr=False)
    certificate: x509.Certificate

    def channel(self, address: str, root: bytes) -> grpc.Channel:
        """A mutual-TLS channel with these credentials."""
        return grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(
                root, key_pem(self.key), certificate_pem(self.certificate)
            ),
            [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)],
        )


@dataclass
class Client:
    """Stubs over one channel."""

    channel: grpc.Channel

    def __post_init__(self) -> None:
        self.bulk = bulk_pb2_grpc.BulkStub(self.channel)
        self.rounds = rounds_pb2_grpc.RoundsStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self.channel)
        self.renewal = enrolment_pb2_grpc.RenewalStub(self.channel)
        self.accounting = accounting_pb2_grpc.AccountingStub(self.channel)
        self.trust = trust_pb2_grpc.TrustStub(self.channel)

    def append(self, upload_id: bytes, offset: int, messages: list[bytes], **kwargs: Any) -> int:
        """Send raw messages; the durable offset."""
        call = self.channel.stream_unary("/minga.v1.Bulk/Append", None, None)
        metadata = (("minga-upload-bin", upload_id), ("minga-offset", str(offset)))
        answer = call(iter(messages), metadata=metadata, timeout=20, **kwargs)
        return int.from_bytes(answer, "big")

    def fetch(self, request: bytes, **kwargs: Any) -> bytes:
        """Read raw messages to their end."""
        call = self.channel.unary_stream("/minga.v1.Bulk/Fetch", None, None)
        return b"".join(call(request, timeout=20, **kwargs))


class Door:
    """A served coordinator and the means to knock."""

    def __init__(
        self, folder: Path, *, governed: bool = False, log: bool = False, again: bool = False
    ) -> None:
        """Make a coordinator's folder; ``again``: it is there already, addresses and all."""
        self.folder = folder
        if again:
            self._read()
            return
        self.address = f"127.0.0.1:{free_port()}"
        self.enrolment = f"127.0.0.1:{free_port()}"
        initialise(
            folder=folder,
            federation="demo",
            address=self.address,
            enrolment=self.enrolment,
            public=self.address,
            hosts=(),
            ledger="sqlite:///ledger.sqlite",
            operator="cenia",
            governed=governed,
            log=log,
        )
        self._read()

    def _read(self) -> None:
        self.config = load_config(self.folder / "coordinator" / "config.toml")
        self.address = self.config.address
        self.enrolment = self.config.enrolment_address
        self.authority = CertificateAuthority.load(self.config.federation, self.config.keys)
        self.root = certificate_pem(self.authority.certificate)
        self.snapshots: dict[str, Snapshot] = {}
        self.coordinates: dict[str, int] = {}
        self.parts: Parts
        self._loop: asyncio.AbstractEventLoop
        self._channels: list[grpc.Channel] = []

    @staticmethod
    def signing_key(name: str) -> Ed25519PrivateKey:
        """The signing key of a node; the same in every test."""
        return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())

    # -- the server --------------------------------------------------------------------------

    def start(self) -> None:
        """Serve from a thread."""
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._failure: BaseException | None = None

        async def serve() -> None:
            try:
                self.parts = await build(self.config, SystemClock())
                self._servers = [main_server(self.parts), enrolment_server(self.parts)]
                for server in self._servers:
                    await server.start()
                self.drivers = log_drivers(self.parts)
            except BaseException as error:
                self._failure = error
                ready.set()
                raise
            ready.set()
            self._stopping = asyncio.Event()
            await self._stopping.wait()
            for driver in self.drivers:
                driver.cancel()
            await asyncio.gather(*self.drivers, return_exceptions=True)
            await asyncio.gather(*(server.stop(0.2) for server in self._servers))
            await self.parts.ledger.close()

        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(serve()), daemon=True
        )
        self._thread.start()
        ready.wait(20)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop serving; what is on disk stays."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(20)

    def restart(self) -> None:
        """Another process on the same disk, as far as state in memory goes."""
        self.stop()
        self.start()

    def call(self, coroutine: Any) -> Any:
        """Run on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def ledger(self, work: Callable[[Tx], Result]) -> Result:
        """One transaction."""
        result: Result = self.call(self.parts.ledger.run("test", work))
        return result

    # -- clients -----------------------------------------------------------------------------

    def issue(self, identity: Identity, **changes: Any) -> Credentials:
        """A certificate by the federation's authority; not in the ledger."""
        key = new_tls_key()
        arguments = {"now": datetime.now(UTC), "lifetime": timedelta(hours=1)} | changes
        certificate = self.authority.issue(key.public_key(), identity, **arguments)
        return Credentials(key, certificate)

    def register(self, credentials: Credentials, identity: Identity) -> None:
        """Enter a certificate in the ledger."""
        certificate = credentials.certificate
        self.ledger(
            lambda tx: tx.add_certificate(
                serial=certificate.serial_number,
                spki_sha256=spki_digest(certificate),
                subject_role=identity.role,
                subject_name=identity.name,
                not_after=certificate.not_valid_after_utc,
                der=certificate.public_bytes(serialization.Encoding.DER),
            )
        )

    def connect(self, credentials: Credentials) -> Client:
        """A client with these credentials."""
        channel = credentials.channel(self.address, self.root)
        self._channels.append(channel)
        return Client(channel)

    def enrol(self, name: str) -> Client:
        """A node, entered in the ledger directly."""
        identity = Identity("node", name)
        credentials = self.issue(identity)
        public = self.signing_key(name).public_key().public_bytes_raw()
        self.ledger(lambda tx: tx.add_node(NodeId(name), public, datetime.now(UTC)))
        self.register(credentials, identity)
        return self.connect(credentials)

    def operator(self) -> Client:
        """The operator that ``init`` made."""
        keys = self.config.keys
        key = serialization.load_pem_private_key((keys / "operator.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((keys / "operator.crt").read_bytes())
        return self.connect(Credentials(key, certificate))

    def enrolment_stub(self) -> enrolment_pb2_grpc.EnrolmentStub:
        """The door for those without a certificate."""
        channel = grpc.secure_channel(self.enrolment, grpc.ssl_channel_credentials(self.root))
        self._channels.append(channel)
        return enrolment_pb2_grpc.EnrolmentStub(channel)

    # -- runs --------------------------------------------------------------------------------

    def make_run(
        self, run: str = "r1", coordinates: int = 1000, *, submit: bool = True, **changes: Any
    ) -> Plan:
        """A run over a zero vector, its blobs in place; no round is open yet."""
        from protocols.tensors.manifest import Manifest, TensorSpec

        manifest = Manifest((TensorSpec("vector", (coordinates,)),))
        draft = Plan.from_value(
            plan_value(run=run, **changes)
            | {"model": {"family": "vector", "manifest": manifest.digest, "initial": "0" * 64}}
        )
        scales = initial_scales(
            manifest, draft.vector.scale, Ring(draft.vector.ring_bits), len(draft.roster)
        )
        blobs = self.parts.blobs
        theta = blobs.put_bytes(np.zeros(coordinates, "<f4").tobytes())
        blobs.put_bytes(manifest.to_bytes())
        blobs.put_bytes(scales.to_bytes())
        snapshot = Snapshot.initial(manifest, theta, scales)
        value = plan_value(run=run, **changes) | {
            "model": {
                "family": "vector",
                "manifest": manifest.digest,
                "initial": snapshot.model_root,
            }
        }
        plan = Plan.from_value(value)
        if submit:
            self.ledger(lambda tx: tx.add_run(plan, snapshot.to_bytes(), datetime.now(UTC)))
        self.snapshots[run] = snapshot
        self.coordinates[run] = coordinates
        return plan

    def open_round(
        self,
        plan: Plan,
        phase: Phase | None = None,
        number: int = 0,
        received: Nodes = NOBODY,
    ) -> RoundId:
        """A round in a phase: Uploading with everybody ready, if none is given."""
        now = datetime.now(UTC)
        phase = phase or Uploading(
            terms=terms_of(plan),
            closes_at=now + timedelta(hours=1),
            attempt=1,
            ready=frozenset(plan.roster_ids),
            received=received,
        )
        round_ = RoundId(plan.run_id, number)
        snapshot = self.snapshots[plan.run].to_bytes()
        self.ledger(
            lambda tx: tx.open_round(
                round_, index=0, phase=phase, start_snapshot=snapshot, why="test", now=now
            )
        )
        return round_


def enrol_request(
    institution: str, secret: bytes, signing: Ed25519PrivateKey, key: Any = None, **changes: Any
) -> enrolment_pb2.EnrolRequest:
    """What `minga node join` sends."""
    key = key or new_tls_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    public = signing.public_key().public_bytes_raw()
    body = enrolment_proof_body(hashlib.sha256(secret).digest(), csr, public)
    values = {
        "institution": institution,
        "token_secret": secret,
        "csr_der": csr,
        "signing_key": public,
        "proof": sign(signing, Context.ENROLMENT, body),
    }
    return enrolment_pb2.EnrolRequest(**values | changes)


def packed(data: bytes) -> tuple[bytes, tuple[bytes, ...]]:
    """Root and unit hashes of an upload."""
    hasher = UnitHasher()
    hasher.update(data)
    return hasher.root(), hasher.hashes()


@contextmanager
def served(folder: Path, *, governed: bool = False, log: bool = False) -> Iterator[Door]:
    """A door that is open for the length of a test."""
    door = Door(folder, governed=governed, log=log)
    door.start()
    try:
        yield door
    finally:
        door.stop()


__all__ = ["MANIFEST", "Client", "Credentials", "Door", "enrol_request", "free_port", "packed"]
