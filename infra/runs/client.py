"""The operator's connection to the coordinator: Admin calls and blobs, over mutual TLS.

Every call is idempotent, so a call that nobody answered may be made again. Errors arrive as the
same classes that the coordinator raised; a coordinator that is away is an UnreachableError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import grpc

from infra.runs.facts import RunReport, read_run_facts
from infra.runs.operator import Operator
from policies.planning import SiteOutlook
from protocols.errors import (
    FederationError,
    IntegrityError,
    NotReadyError,
    UnreachableError,
    error_from_code,
)
from protocols.gen import (
    admin_pb2,
    admin_pb2_grpc,
    bulk_pb2,
    bulk_pb2_grpc,
    log_pb2,
    log_pb2_grpc,
    trust_pb2,
    trust_pb2_grpc,
)
from protocols.identifiers import Digest, RoundId, RunId
from protocols.plan import Plan
from protocols.tensors.units import UnitHasher
from protocols.wire import round_ref

CALL_S: Final = 20.0  # one control call
MESSAGE: Final = 2**20  # bytes of one raw message
_READ: Final = 4 * 2**20  # bytes
_TRIES: Final = 5  # failures in a row without progress, each from where the last one got
_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 210_000),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 8 * 2**20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def error_of(error: grpc.RpcError, address: str) -> FederationError:
    """The error that a failed call stands for.

    Args:
        error: as grpc raised it.
        address: HOST:PORT, for the sentence when nobody answered.
    """
    metadata: Mapping[str, str] = {
        str(key): value.decode() if isinstance(value, bytes) else str(value)
        for key, value in (error.trailing_metadata() or ())
    }
    sentence = error.details() or "no reason given"
    if "minga-code" in metadata:
        details = {
            key.removeprefix("minga-").replace("-", "_"): value
            for key, value in metadata.items()
            if key.startswith("minga-") and key != "minga-code"
        }
        return error_from_code(metadata["minga-code"], sentence, details)
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return UnreachableError(f"no coordinator answers at {address}: {_first_line(sentence)}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableError(f"the coordinator at {address} took too long to answer")
        case code:
            return NotReadyError(f"the coordinator answered {code.name}: {_first_line(sentence)}")


def _first_line(text: str) -> str:
    return text.splitlines()[0][:200] if text else ""


class AdminClient:
    """Calls as an operator. Use as a context manager; the channel opens with the first call."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._address = operator.address
        credentials = grpc.ssl_channel_credentials(
            root_certificates=operator.ca,
            private_key=operator.key,
            certificate_chain=operator.certificate,
        )
        self._channel = grpc.secure_channel(operator.address, credentials, options=_OPTIONS)
        admin_stub: Any = admin_pb2_grpc.AdminStub  # generated without types
        bulk_stub: Any = bulk_pb2_grpc.BulkStub
        self._admin = admin_stub(self._channel)
        self._bulk = bulk_stub(self._channel)
        trust_stub: Any = trust_pb2_grpc.TrustStub
        self._trust = trust_stub(self._channel)
        log_stub: Any = log_pb2_grpc.LogStub
        self._log = log_stub(self._channel)
        self._put = self._channel.stream_unary("/minga.v1.Bulk/Put", None, None)
        self._fetch = self._channel.unary_stream("/minga.v1.Bulk/Fetch", None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; a call under way in another thread ends with an error."""
        self._channel.close()

    def _call(self, method: Callable[..., Any], request: Any, *, timeout_s: float = CALL_S) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            self._fail(error)

    def _fail(self, error: grpc.RpcError) -> NoReturn:
        raise error_of(error, self._address) from None

    # -- runs ------------------------------------------------------------------------------------

    def wait_until_serving(
        self, *, timeout_s: float, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Return when the coordinator answers.

        Args:
            timeout_s: how long to wait.
            alive: called before each try; raises to give up early.

        Raises:
            UnreachableError: nobody answered in time.
        """
        until = time.monotonic() + timeout_s
        while True:
            alive()
            try:
                self._call(self._admin.ListRuns, admin_pb2.ListRunsRequest(), timeout_s=2.0)
            except NotReadyError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.1)
            else:
                return

    def invite(self, institution: str, *, valid_hours: int = 24) -> str:
        """A one-time token for one institution; it is shown once and kept by nobody."""
        request = admin_pb2.InviteRequest(institution=institution, valid_hours=valid_hours)
        return str(self._call(self._admin.Invite, request).token)

    def submit(self, plan: bytes, snapshot: bytes) -> RunReport:
        """Submit a plan and its starting snapshot; their blobs were put before."""
        signed = self._operator.sign_request(Plan.from_bytes(plan), datetime.now(UTC))
        body, signature = signed or (b"", b"")
        request = admin_pb2.SubmitRunRequest(
            plan=plan, snapshot=snapshot, request=body, request_signature=signature
        )
        return read_run_facts(self._call(self._admin.SubmitRun, request))

    def runs(self) -> tuple[RunReport, ...]:
        """All runs, without their rounds."""
        answer = self._call(self._admin.ListRuns, admin_pb2.ListRunsRequest())
        return tuple(read_run_facts(entry) for entry in answer.runs)

    def show(self, run: RunId) -> RunReport:
        """A run with all its rounds."""
        return read_run_facts(self._call(self._admin.ShowRun, admin_pb2.ShowRunRequest(run=run)))

    def stop(self, run: RunId, reason: str) -> RunReport:
        """Open no other round of a run."""
        request = admin_pb2.StopRunRequest(run=run, reason=reason)
        return read_run_facts(self._call(self._admin.StopRun, request))

    def plan_run(self, plan: Plan, coordinates: int) -> tuple[SiteOutlook, ...]:
        """What a plan would cost each institution, by the coordinator's ledger."""
        from infra.runs.outlook import read_outlook

        request = admin_pb2.PlanRunRequest(plan=plan.to_bytes(), coordinates=coordinates)
        return read_outlook(self._call(self._admin.PlanRun, request).sites)

    def why(self, round_: RoundId) -> admin_pb2.WhyResponse:
        """What a round is waiting for, by the function that the coordinator acts on."""
        request = admin_pb2.WhyRequest(round=round_ref(round_))
        answer: admin_pb2.WhyResponse = self._call(self._admin.Why, request)
        return answer

    def nodes(self) -> tuple[admin_pb2.NodeFacts, ...]:
        """All nodes, with what they say they are doing."""
        return tuple(self._call(self._admin.ListNodes, admin_pb2.ListNodesRequest()).nodes)

    def signing_keys(self) -> dict[str, str]:
        """Hex Ed25519 keys of all enrolled nodes, as the coordinator has them."""
        return {facts.node: facts.signing_key.hex() for facts in self.nodes()}

    def watch(self, run: RunId, *, after: int = 0) -> Iterator[admin_pb2.HistoryEntry]:
        """What happened after entry ``after``, then what happens, until the run ends."""
        call = self._admin.WatchRun(admin_pb2.WatchRunRequest(run=run, after=after))
        try:
            yield from call
        except grpc.RpcError as error:
            self._fail(error)
        finally:
            call.cancel()

    # -- governance ------------------------------------------------------------------------------

    def publish_trust(self, files: Mapping[str, bytes]) -> list[str]:
        """Bring what admins signed; what came into force, in words."""
        request = trust_pb2.PublishTrustRequest(files=dict(files))
        return list(self._call(self._trust.Publish, request, timeout_s=90.0).changes)

    def deliver(self, entry: bytes) -> None:
        """Bring a leaf that an admin or an institution signed; again is harmless."""
        self._call(self._log.Deliver, log_pb2.SubmitRequest(entries=[entry]))

    # -- blobs -----------------------------------------------------------------------------------

    def put(self, path: Path) -> Digest:
        """Bring a file to the coordinator, from where an earlier try got.

        Returns:
            Its name: the root of its units.

        Raises:
            NotReadyError: the transfer broke again and again.
        """
        hasher = UnitHasher()
        with path.open("rb") as file:
            while piece := file.read(_READ):
                hasher.update(piece)
        digest = hasher.digest()
        info = bulk_pb2.BlobInfo(
            digest=bytes.fromhex(digest), size=hasher.size, unit_hashes=hasher.hashes()
        )
        failures, reached = 0, -1
        while True:
            try:
                state = self._call(self._bulk.BeginPut, info)
                if state.complete:
                    return digest
                if int(state.durable) > reached:  # connections end now and then: not a failure
                    failures, reached = 0, int(state.durable)
                self._put_from(path, digest, reached)
            except NotReadyError as error:
                failures += 1
                if failures >= _TRIES:
                    raise
                time.sleep(error.retry_after_s)

    def _put_from(self, path: Path, digest: Digest, offset: int) -> None:
        def pieces() -> Iterator[bytes]:
            with path.open("rb") as file:
                file.seek(offset)
                while piece := file.read(MESSAGE):
                    yield piece

        metadata = (
            ("minga-digest-bin", bytes.fromhex(digest)),
            ("minga-offset", str(offset)),
        )
        try:
            self._put(pieces(), metadata=metadata)
        except grpc.RpcError as error:
            self._fail(error)

    def fetch(self, digest: Digest, target: Path) -> None:
        """Write a blob to a file; it gets its name only when its bytes are what it is called.

        Raises:
            IntegrityError: the coordinator sent other bytes.
        """
        temporary = target.with_name(f".{target.name}.tmp")
        hasher = UnitHasher()
        at, failures = 0, 0
        with temporary.open("wb") as file:
            while True:
                before = at
                try:
                    for piece in self._fetch(bytes.fromhex(digest) + at.to_bytes(8, "big")):
                        hasher.update(piece)
                        at += file.write(piece)
                    break
                except grpc.RpcError as error:
                    failures = 0 if at > before else failures + 1
                    if failures >= _TRIES or error.code() is not grpc.StatusCode.UNAVAILABLE:
                        self._fail(error)
        if hasher.digest() != digest:
            temporary.unlink()
            raise IntegrityError(f"the coordinator sent other bytes than blob {digest[:12]}…")
        temporary.replace(target)
