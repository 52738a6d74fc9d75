"""The node and the round log: it reads, it cosigns, and it signs what it does.

    follow   pages of witnessed leaves -> ``LogVerifier``; news wake the agent
    cosign   checkpoints to cosign     -> ``Witness``
    leaf     an act -> the leaf that says it, durable before it is sent, behind the one before

Each loop reconnects by itself; nothing is remembered in memory that a restart needs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Final

import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent.client import Backoff, Connection, rebuild_error
from node_agent.log_store import LogStore, OwnLeaf
from node_agent.log_verifier import LogVerifier, read_policy
from node_agent.witness import Witness, make_witness, open_witness
from policies.audit.approvals import approval_of
from policies.audit.gate import Gate, Shown, Stops, Waits, gate
from protocols.canonical import sha256_hex
from protocols.crypto.signatures import public_bytes
from protocols.errors import (
    ConfigurationError,
    FederationError,
    MalformedMessageError,
    NotReadyError,
    UnreachableError,
)
from protocols.gen import log_pb2
from protocols.identifiers import Digest, FederationId, NodeId, RoundId
from protocols.plan import Plan
from protocols.tlog.kinds import EnrolRequest, Incident, Predicate, round_subject
from protocols.tlog.leaf import (
    FIRST_PREV,
    ChainHead,
    Leaf,
    Seen,
    Statement,
    key_id_of,
    sign_leaf,
)
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.tlog.note import KeyRing, VerifierKey
from protocols.tlog.witness import Answer

logger = logging.getLogger(__name__)
RESULT_S: Final = 30.0  # how long a computed model waits for the log to name it, in one go
_PAUSE: Final = Backoff(first_s=0.2, cap_s=5.0)


def now_unix() -> int:
    """Unix seconds by this machine's clock."""
    return int(datetime.now(UTC).timestamp())


# -- joining -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogPaths:
    """Where a node keeps what belongs to the log."""

    root: Path  # the node's folder

    @property
    def vkey(self) -> Path:
        """The log's key: the anchor."""
        return self.root / "keys" / "log.vkey"

    @property
    def policy(self) -> Path:
        """The trust policy that the site pinned, if it did."""
        return self.root / "trust-policy.txt"

    @property
    def store(self) -> Path:
        """What was verified and said."""
        return self.root / "log.sqlite"

    @property
    def witness(self) -> Path:
        """Key and memory of the witness."""
        return self.root / "witness"


def witness_key(paths: LogPaths, node: NodeId) -> VerifierKey:
    """The witness key of a node; made the first time it is asked for."""
    try:
        return make_witness(paths.witness, f"witness.{node}.minga.example/w1").verifier
    except FileExistsError:
        return open_witness(paths.witness, {}, now=now_unix).signer.verifier


def enrol_leaf(
    store: LogStore,
    *,
    key: Ed25519PrivateKey,
    node: NodeId,
    csr: bytes,
    spki: Digest,
    witness: VerifierKey | None,
    seen: Seen | None = None,
    approval: bytes = b"",
) -> OwnLeaf:
    """``enrol.request``: what the node asks to be certified; the same bytes for the same.

    Args:
        approval: the institution's, as it was sent or will be; empty: a renewal, or no member list.
    """
    said = EnrolRequest(
        institution=node,
        node=node,
        signing_key=public_bytes(key).hex(),
        witness_vkey=None if witness is None else witness.to_text(),
        csr_sha256=sha256_hex(csr),
        spki_sha256=spki,
        approval=approval_of(approval) if approval else None,
    )
    return _sign(
        store,
        f"enrol.request {said.csr_sha256}",
        said,
        key=key,
        subject=f"node/{node}",
        digest=Digest(said.csr_sha256),
        seen=seen or Seen(size=0, root=EMPTY_ROOT),
    )


def incident_leaf(
    store: LogStore,
    *,
    key: Ed25519PrivateKey,
    node: NodeId,
    alarm: int,
    code: str,
    evidence: Digest,
    seen: Seen,
) -> OwnLeaf:
    """``incident``: what a person of the site found out about an alarm; the same bytes again."""
    return _sign(
        store,
        f"incident alarm {alarm}",
        Incident(klass="node.alarm", code=code, evidence_sha256=evidence),
        key=key,
        subject=f"node/{node}",
        digest=evidence,
        seen=seen,
    )


def _sign(
    store: LogStore,
    act: str,
    said: Predicate,
    *,
    key: Ed25519PrivateKey,
    subject: str,
    digest: Digest,
    seen: Seen,
) -> OwnLeaf:
    def make(head: ChainHead | None) -> Leaf:
        statement = Statement(
            kind=said.KIND,
            subject=subject,
            digest=digest,
            seq=head.seq + 1 if head else 1,
            prev=head.leaf if head else FIRST_PREV,
            seen=seen,
            time=datetime.now(UTC).replace(microsecond=0),
            fields=said.to_fields(),
        )
        return sign_leaf(statement, key)

    return store.sign(act, key_id_of(public_bytes(key)), make)


# -- at work -----------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class NodeLog:
    """One node's part in the log."""

    node: NodeId
    federation: FederationId
    key: Ed25519PrivateKey = field(repr=False)
    connection: Connection
    store: LogStore
    verifier: LogVerifier
    witness: Witness | None
    rng: Random
    wake: Callable[[], None] = lambda: None  # the agent has something new to decide on
    trouble: str = "not connected yet"
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _handing: asyncio.Lock = field(default_factory=asyncio.Lock)

    # -- reading -------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Read the log for ever."""
        failures = 0
        while True:
            self.verifier.forget_trial()
            address = self.connection.address
            try:
                await self._read()
                failures = 0
            except grpc.aio.AioRpcError as error:
                known = rebuild_error(error, address)
                self.trouble = known.diagnostics()
                if isinstance(known, UnreachableError):
                    self.connection.turn_from(address)
            except grpc.aio.UsageError:
                failures = 0  # the channel was replaced: another coordinator is turned to
            except FederationError as error:
                logger.warning("the log: %s", error.diagnostics())
                self.trouble = error.diagnostics()
                failures += 2
            self.wake()
            await asyncio.sleep(_PAUSE.delay(failures, self.rng))
            failures = min(failures + 1, 6)

    async def _read(self) -> None:
        request = log_pb2.FollowRequest(size=self.verifier.size)
        with self.connection.stream(self.connection.log.Follow(request)) as pages:
            async for page in pages:
                accepted = await asyncio.to_thread(
                    self.verifier.take, page.first, list(page.entries), page.checkpoint
                )
                if accepted:
                    self.trouble = ""
                    self._changed.set()
                    self._changed = asyncio.Event()
                    self.wake()

    async def cosign(self) -> None:
        """Answer the coordinator's requests for cosignatures for ever."""
        witness, failures = self.witness, 0
        while witness is not None:
            try:
                async for _ in self._cosignatures(witness):
                    failures = 0
            except (grpc.aio.AioRpcError, grpc.aio.UsageError):
                logger.debug("no stream of checkpoints: away, or another process leads; ask again")
            except FederationError as error:
                logger.warning("the witness: %s", error.diagnostics())
            self.connection.turn_witness()
            # With several coordinators the next one may be the writer: it is asked soon.
            turns = failures // len(self.connection.addresses)
            await asyncio.sleep(_PAUSE.delay(turns, self.rng))
            failures = min(failures + 1, 6)

    async def _cosignatures(self, witness: Witness) -> AsyncIterator[Answer]:
        """Answer one stream of requests, until it ends.

        What is said comes from an iterator, not from ``call.write``: that waits for ever when its
        call is cancelled before the connection stood (grpcio 1.85), and a node that waits for ever
        is a witness less until it is started again.
        """
        latest = await asyncio.to_thread(witness.store.latest, self.verifier.origin)
        answers: asyncio.Queue[log_pb2.WitnessAnswer | None] = asyncio.Queue()
        answers.put_nowait(log_pb2.WitnessAnswer(latest=latest or b""))

        async def said() -> AsyncIterator[log_pb2.WitnessAnswer]:
            while (answer := await answers.get()) is not None:
                yield answer

        try:
            with self.connection.stream(self.connection.witness.NextCheckpoint(said())) as requests:
                async for request in requests:
                    answer = await asyncio.to_thread(witness.add, request.body)
                    answers.put_nowait(
                        log_pb2.WitnessAnswer(status=answer.status, body=answer.body)
                    )
                    yield answer
        finally:
            answers.put_nowait(None)  # whoever sends waits no longer

    # -- the gate ------------------------------------------------------------------------------

    def gate(self, round_: RoundId, shown: Shown) -> Gate:
        """Whether the log bears out what the coordinator shows."""
        found = gate(self.verifier.known(), round_, shown, now=now_unix())
        if isinstance(found, Waits) and self.trouble:
            return Waits(f"{found.why} ({self.trouble})")
        return found

    async def passes(self, round_: RoundId, shown: Shown) -> Stops | None:
        """Wait until the log says something; None: it bears it out.

        Raises:
            NotReadyError: it did not say anything in time.
        """
        deadline = asyncio.get_running_loop().time() + RESULT_S
        while True:
            changed = self._changed
            found = await asyncio.to_thread(self.gate, round_, shown)
            if not isinstance(found, Waits):
                return found if isinstance(found, Stops) else None
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise NotReadyError(f"round {round_}: {found.why}", retry_after_s=1.0)
            try:
                async with asyncio.timeout(min(left, 5.0)):
                    await changed.wait()
            except TimeoutError:
                continue

    def bound_checkpoint(self, round_: RoundId, attempt: int) -> bytes:
        """What an attempt's secure sum is bound to.

        Raises:
            NotReadyError: its start is not in the verified log yet.
        """
        found = self.verifier.bound_checkpoint(round_, attempt)
        if found is None:
            raise NotReadyError(f"the start of attempt {attempt} of {round_} is not logged yet")
        return found

    # -- saying --------------------------------------------------------------------------------

    async def leaf(self, plan: Plan, round_: RoundId, said: Predicate, act: str) -> OwnLeaf:
        """The leaf of an act; whatever this node said before it is handed over first.

        Args:
            act: names the act within the round, e.g. ``join``.

        Raises:
            FederationError: an earlier leaf is not taken.
        """
        own = await asyncio.to_thread(
            _sign,
            self.store,
            f"{said.KIND} {round_} {act}",
            said,
            key=self.key,
            subject=round_subject(self.federation, round_),
            digest=sha256_hex(plan.to_bytes()),
            seen=self.verifier.seen,
        )
        await self.hand_over(own.seq)
        return own

    async def renewal(self, csr: bytes, spki: Digest) -> OwnLeaf:
        """The leaf of a certificate request by this node's known key."""
        own = await asyncio.to_thread(
            enrol_leaf,
            self.store,
            key=self.key,
            node=self.node,
            csr=csr,
            spki=spki,
            witness=None if self.witness is None else self.witness.signer.verifier,
            seen=self.verifier.seen,
        )
        await self.hand_over(own.seq)
        return own

    async def hand_over(self, before: int) -> None:
        """Hand over what was signed before a leaf and never taken."""
        async with self._handing:
            left = await asyncio.to_thread(self.store.untaken, before)
            if not left:
                return
            request = log_pb2.SubmitRequest(entries=[leaf.entry for leaf in left[:64]])
            await self.connection.ask(lambda c: c.log.Submit, request)
            await asyncio.to_thread(self.store.taken, [leaf.seq for leaf in left], now_unix())

    async def taken(self, leaf: OwnLeaf) -> None:
        """The coordinator has taken a leaf with its act."""
        if leaf.taken_at is None:
            await asyncio.to_thread(self.store.taken, [leaf.seq], now_unix())


def open_node_log(
    root: Path,
    *,
    node: NodeId,
    federation: FederationId,
    key: Ed25519PrivateKey,
    connection: Connection,
    rng: Random,
    require: bool | None,
) -> NodeLog | None:
    """A node's part in the log; None: the site does not ask for it.

    Raises:
        ConfigurationError: it is required, and the anchor is missing or damaged.
        CorruptStateError: what was kept is damaged, or the witness lost its memory.
    """
    paths = LogPaths(root)
    if require is False or (require is None and not paths.vkey.exists()):
        return None
    try:
        vkey = VerifierKey.parse(paths.vkey.read_text("utf-8").strip())
    except FileNotFoundError:
        raise ConfigurationError(
            f"{paths.vkey} is missing: the round log is required, join again"
        ) from None
    except (OSError, MalformedMessageError) as error:
        raise ConfigurationError(f"{paths.vkey}: {error}") from None
    store = LogStore(paths.store)
    verifier = LogVerifier(store, vkey, now=now_unix, pinned=read_policy(paths.policy), node=node)
    witness = None
    if paths.witness.exists():
        logs = {vkey.name: KeyRing.of([vkey])}
        witness = open_witness(paths.witness, logs, now=now_unix)
    return NodeLog(
        node=node,
        federation=federation,
        key=key,
        connection=connection,
        store=store,
        verifier=verifier,
        witness=witness,
        rng=rng,
    )
