"""Values for tests of the node agent: views, situations, keys, folders."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from coordinator.ca import CertificateAuthority
from node_agent.config import (
    AllowConfig,
    DataConfig,
    LimitsConfig,
    NodeConfig,
    NodeFolder,
    WorkerConfig,
)
from node_agent.decide import Situation
from node_agent.journal import ConfirmRecord, RoundRecord, UploadRecord
from node_agent.keys import CertificateRequest, KeyStore, TlsIdentity
from node_agent.rules import Refusal
from node_agent.view import RoundSeen, RunSeen
from protocols.crypto.identity import Identity
from protocols.identifiers import Digest, FederationId, NodeId, RoundId, RunId
from protocols.plan import Plan
from protocols.rounds import Phase
from protocols.tensors.snapshot import Snapshot
from protocols.wire import phase_to_view
from tests.support.plans import MANIFEST, plan

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ME = NodeId("a")
RUN = RunId("r1")
ROUND = RoundId(RUN, 0)


def digest(text: str) -> Digest:
    """A digest that says what it stands for."""
    return Digest(text.encode().hex().ljust(64, "0")[:64])


def snapshot(number: int) -> Snapshot:
    """A snapshot that differs from that of another number."""
    return Snapshot(
        number, MANIFEST.digest, digest(f"theta{number}"), {}, digest("scales"), {"steps": number}
    )


FIRST = snapshot(0)
SECOND = snapshot(1)


def the_plan(**changes: Any) -> Plan:
    """A plan of a, b and c whose first model is ``FIRST``."""
    model = {"family": "vector", "manifest": MANIFEST.digest, "initial": FIRST.model_root}
    return plan(model=model, **changes)


def round_seen(
    phase: Phase, *, number: int = 0, index: int | None = None, following: Snapshot | None = None
) -> RoundSeen:
    """A round in a phase; it starts from the snapshot of its number."""
    return RoundSeen(
        round=RoundId(RUN, number),
        index=number if index is None else index,
        raw_phase=phase_to_view(phase),
        start=snapshot(number),
        following=following,
    )


def run_seen(
    current: RoundSeen | None = None,
    *,
    last: RoundSeen | None = None,
    status: str = "active",
    digest_: Digest | None = None,
) -> RunSeen:
    """The run as the coordinator shows it."""
    return RunSeen(
        run=RUN,
        plan_digest=digest_ or the_plan().digest,
        status=status,
        current=current,
        last_released=last,
    )


def situation(seen: RunSeen, **changes: Any) -> Situation:
    """A node that knows the plan and holds the first model, and has said nothing."""
    values: dict[str, Any] = {
        "node": ME,
        "paused": False,
        "seen": seen,
        "plan": the_plan(),
        "stopped": None,
        "refusal": None,
        "record": None,
        "upload": None,
        "confirm": None,
        "took_part": False,
        "held": frozenset({FIRST.model_root}),
    }
    return Situation(**values | changes)


def joined(
    number: int = 0, *, outcome: str | None = None, left: Refusal | None = None
) -> RoundRecord:
    """The journal after a join."""
    return RoundRecord(
        round=RoundId(RUN, number),
        index=number,
        start_root=snapshot(number).model_root,
        joined=True,
        refusal=None,
        outcome="leave" if left else outcome,
        left=left,
    )


def uploaded(*, attempt: int = 1, receipt: bytes | None = None) -> UploadRecord:
    """The journal after a vector was made."""
    return UploadRecord(
        round=ROUND,
        attempt=attempt,
        header=b"{}",
        signature=bytes(64),
        unit_hashes=(bytes(32),),
        file=f"r1.0.{attempt}.bin",
        receipt=receipt,
    )


def confirmed(*, computed: Digest | None, objection: str = "", answered: bool) -> ConfirmRecord:
    """The journal after the outer step of round 0."""
    return ConfirmRecord(
        round=ROUND,
        sum=digest("sum"),
        published=SECOND.model_root,
        computed=computed,
        objection=objection,
        detail="",
        answered=answered,
    )


# -- folders and keys ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Authority:
    """A federation's certificate authority and what it hands out."""

    ca: CertificateAuthority

    @classmethod
    def create(cls, federation: str = "demo", *, now: datetime | None = None) -> Authority:
        """A new root, valid for years."""
        made = now or datetime.now(UTC) - timedelta(days=1)
        return cls(CertificateAuthority.create(FederationId(federation), now=made))

    @property
    def root(self) -> bytes:
        """PEM of the root."""
        return self.ca.certificate.public_bytes(serialization.Encoding.PEM)

    def certify(
        self,
        request: CertificateRequest,
        name: str,
        *,
        lifetime: timedelta = timedelta(days=30),
        now: datetime | None = None,
        identity: Identity | None = None,
    ) -> bytes:
        """DER of a certificate for the request's key."""
        key = x509.load_der_x509_csr(request.csr).public_key()
        certificate = self.ca.issue(
            key,  # type: ignore[arg-type]
            identity or Identity("node", name),
            now=now or datetime.now(UTC),
            lifetime=lifetime,
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    def enrol(self, keys: KeyStore, name: str = ME, **changes: Any) -> TlsIdentity:
        """Give a key store its certificate, as a join does."""
        keys.make_signing_key()
        keys.forget_request()
        request = keys.request(name, purpose="test")
        return keys.accept(
            request,
            certificate=self.certify(request, name, **changes),
            issuers=(),
            root=self.root,
            node=NodeId(name),
            federation=self.ca.federation,
        )


def node_config(**changes: Any) -> NodeConfig:
    """A configuration of node a in federation demo, without data."""
    values: dict[str, Any] = {
        "institution": ME,
        "federation": FederationId("demo"),
        "coordinators": ("127.0.0.1:1",),
        "enrolment": "127.0.0.1:2",
        "data": DataConfig(),
        "worker": WorkerConfig(),
        "allow": AllowConfig(),
        "limits": LimitsConfig(),
    }
    return NodeConfig(**values | changes)


def node_folder(root: Path) -> NodeFolder:
    """An empty node folder."""
    return NodeFolder(root / "node").make()


def rng() -> Random:
    """The same jitter every time."""
    return Random(7)
