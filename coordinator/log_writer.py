"""Integrates leaves: signs heads of the log, and makes the static directory of what is witnessed.

One process writes, under a lease; the others show their readers what it published, and one of them
takes over when the lease runs out. In order, for each growth of the log:

    1. the new leaves enter the tree; the head must extend the ratchet's (``check_may_sign``)
    2. the ratchet turns, durably, and only then the head is signed
    3. witnesses are asked (``log_hub``); a quorum of cosignatures makes the head witnessed
    4. plans that their leaves only name, tiles, then the checkpoint, are written; whoever follows
       is told at 3 already

Before it signs for the first time after a start, the writer compares the ledger with the ratchet
and with what a quorum of witnesses says it cosigned last: a database restored from an old backup
would otherwise fork the log. A leaf that a round waits for is signed at once, others within
``GATHER_S``, so that a burst of joins costs one cosignature of each witness. When nothing happened
for an hour, a heartbeat leaf shows that the log is alive.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

from coordinator.clock import Clock
from coordinator.ledger import LeafRow, LeaseLostError, Ledger, Tx
from coordinator.log_files import LogFiles, Ratchet
from coordinator.log_hub import LogHub
from policies.audit.committee import counted
from policies.audit.replay import peek, policy_text, witness_policy
from protocols.canonical import sha256_hex
from protocols.errors import CorruptStateError, FederationError, IntegrityError
from protocols.identifiers import Digest
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.kinds import Heartbeat, RoundPlan
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.tlog.note import Note, SignerKey, VerifierKey
from protocols.tlog.proofs import make_consistency
from protocols.tlog.ratchet import ForkError, check_may_sign, check_start
from protocols.tlog.trust_policy import TrustPolicy

logger = logging.getLogger(__name__)
LEASE: Final = "log"
LEASE_TTL: Final = timedelta(seconds=4)
RENEW_S: Final = 1.0
FOLLOW_S: Final = 0.1  # between two looks at what another process published
GATHER_S: Final = 0.1  # a leaf that nobody waits for may wait so long for company
BATCH: Final = 1024  # leaves read at once
HEARTBEAT: Final = timedelta(hours=1)
RETRY_S: Final = 1.0
PATIENCE_S: Final = 10.0  # before a new writer says that witnesses are silent
COMPLAIN_S: Final = 60.0  # between two complaints about silent witnesses
URGENT: Final = frozenset({"round.plan", "round.start", "round.survivors", "round.aggregate"})


@dataclass(slots=True, kw_only=True)
class LogWriter:
    """The driver of one process.

    Args:
        signer: the log's private key.
        auditors: witnesses beside those of nodes, each of which must cosign.
        members: active members by the signed list; None: there is none, and all witnesses count.
    """

    ledger: Ledger
    clock: Clock
    hub: LogHub
    files: LogFiles
    ratchet: Ratchet
    signer: SignerKey = field(repr=False)
    auditors: Sequence[VerifierKey] = ()
    members: Callable[[], Collection[str] | None] = lambda: None
    heartbeat: timedelta = HEARTBEAT
    holder: str = field(
        default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    )
    _fence: int | None = None
    _policy: TrustPolicy | None = None  # of the log as it is
    _policy_bytes: bytes = b""
    _members: Collection[str] | None = None  # by which the policy was made
    _compared: bool = False  # with a quorum of witnesses, since the start
    _complain_at: float = 0.0  # by the event loop's clock
    _quiet_since: datetime | None = None
    _written: int = 0  # size of the last published checkpoint
    _tail: tuple[int, Sequence[bytes]] = (0, ())  # index and entries of the tile that is not full

    # -- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write until cancelled.

        Raises:
            IntegrityError: the ledger is older than what was signed, or a leaf is damaged: nothing
                is signed any more, and the process must stop.
        """
        try:
            while True:
                try:
                    if await self._hold():
                        await self._lead()
                    await self._follow()
                except IntegrityError:
                    raise
                except FederationError as error:
                    logger.warning("the log writer waits: %s", error)
                    self._resign()
                    await asyncio.sleep(RETRY_S)
        finally:
            fence, self._fence = self._fence, None
            self.hub.lead(False)
            if fence is not None:
                with suppress(FederationError):
                    await self.ledger.run(
                        "release_lease", lambda tx: tx.release_lease(LEASE, fence)
                    )

    def _resign(self) -> None:
        self._fence, self._compared = None, False
        self.hub.lead(False)

    async def _hold(self) -> bool:
        now, fence = self.clock.now(), self._fence
        if fence is None:
            self._fence = await self.ledger.run(
                "take_lease", lambda tx: tx.take_lease(LEASE, self.holder, now, LEASE_TTL)
            )
        elif not await self.ledger.run(
            "renew_lease", lambda tx: tx.renew_lease(LEASE, fence, now, LEASE_TTL)
        ):
            raise LeaseLostError("another process writes the log now")
        return self._fence is not None

    async def _follow(self) -> None:
        """Show what the writer published, until it is time to ask for the lease again."""
        until = asyncio.get_running_loop().time() + RENEW_S
        while asyncio.get_running_loop().time() < until:
            found = await asyncio.to_thread(self.files.published_note)
            shown = self.hub.witnessed
            if found is not None and (shown is None or found[0] != shown.note):
                await self._show(*found)
            await asyncio.sleep(FOLLOW_S)

    async def _show(self, note: Note, head: Checkpoint) -> None:
        tree = self.hub.tree
        if tree.size < head.size:
            first = tree.size
            hashes = await self.ledger.read("leaf_hashes", lambda tx: tx.leaf_hashes(first))
            await asyncio.to_thread(tree.extend, hashes)
        if tree.size < head.size or tree.root(head.size) != head.root:
            raise ForkError(f"the log directory has a head of size {head.size} that is not ours")
        self.hub.show(note, head)

    async def _lead(self) -> None:
        """Write as long as the lease holds; files are written beside the signing.

        Raises:
            FederationError: the lease is lost, or the files cannot be written now.
        """
        await self._begin()
        publishing = asyncio.create_task(self._publish_loop(), name="log files")
        renew = asyncio.get_running_loop().time() + RENEW_S
        try:
            while not publishing.done():
                version = self.ledger.version()
                now = asyncio.get_running_loop().time()
                if now >= renew:
                    await self._hold()
                    renew = now + RENEW_S
                if not await self._step():
                    if self._compared:
                        await self.ledger.changed(version, max(0.0, min(RENEW_S, renew - now)))
                    else:
                        await self.hub.changed(0.1)  # witnesses that come back
            publishing.result()
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)

    # -- the tree ------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Load the tree, and refuse to go on from a ledger that is older than what was signed."""
        await asyncio.to_thread(self.files.prepare)
        hashes = await self.ledger.read("leaf_hashes", lambda tx: tx.leaf_hashes(0))
        tree = type(self.hub.tree)()
        await asyncio.to_thread(tree.extend, hashes)
        last = await asyncio.to_thread(self.ratchet.last)
        self.hub.tree = tree
        if last is not None:
            self._check_ratchet(last, self._head(tree.size))
        published = await asyncio.to_thread(self.files.published)
        if published is not None:
            if published.size > tree.size or tree.root(published.size) != published.root:
                raise ForkError(
                    f"the log directory has size {published.size}, the ledger {tree.size}: it is"
                    " older, or another one"
                )
            self._written = published.size
        # Nothing was ever signed, by this process or another: there is nobody to ask.
        self._compared = last is None and published is None
        self._complain_at = asyncio.get_running_loop().time() + PATIENCE_S
        await self._read_policy()
        self._quiet_since = self.clock.now()
        self.hub.lead(True)
        if tree.size:
            await self._sign_when_compared()

    def _head(self, size: int) -> Checkpoint:
        tree = self.hub.tree
        root = tree.root(size) if size else EMPTY_ROOT
        return Checkpoint(origin=self.signer.name, size=size, root=root)

    def _check_ratchet(self, last: Checkpoint, head: Checkpoint) -> None:
        proof: tuple[bytes, ...] = ()
        if 0 < last.size < head.size:
            proof = make_consistency(self.hub.tree.hashes, last.size, head.size)
        check_may_sign(last, head, proof)

    async def _read_policy(self) -> None:
        """The trust policy that the log's own leaves make."""
        state = await self.ledger.run("log_state", Tx.log_state)
        self._members = self.members()
        nodes = counted(state.witnesses, self._members)
        self._policy_bytes = policy_text(self.signer.verifier, nodes, self.auditors)
        self._policy = TrustPolicy.parse(self._policy_bytes)
        # All are asked: a node that has not read the newest list yet still counts by an older one.
        everybody = witness_policy(self.signer.verifier, state.witnesses, self.auditors)
        self.hub.keys = dict(everybody.witnesses)
        await asyncio.to_thread(
            self.files.describe, vkey=self.signer.verifier.to_text(), policy=self._policy_bytes
        )

    async def _step(self) -> bool:
        """Take new leaves and sign. Returns whether there was anything to do."""
        tree, now = self.hub.tree, self.clock.now()
        first = tree.size
        end = first + BATCH
        rows = await self.ledger.read("leaves", lambda tx: tx.leaves(first, end))
        until = asyncio.get_running_loop().time() + GATHER_S
        while rows and len(rows) < BATCH and not any(row.kind in URGENT for row in rows):
            left = until - asyncio.get_running_loop().time()
            if left <= 0:
                break
            await self.ledger.changed(self.ledger.version(), left)
            more = partial(Tx.leaves, first=first + len(rows), end=end)
            rows += await self.ledger.read("leaves", more)
        if self.members() != self._members:
            await self._read_policy()
        if not rows:
            if not self._compared and tree.size:
                await self._sign_when_compared()
            if self._quiet_since is not None and now - self._quiet_since >= self.heartbeat:
                self._quiet_since = now
                await self.ledger.run("heartbeat", partial(beat, interval=self.heartbeat))
            return False
        self._take(rows)
        self._quiet_since = now
        if any(row.kind in ("cert.issued", "enrol.request", "tuf.published") for row in rows):
            await self._read_policy()
        await self._sign_when_compared()
        return True

    def _take(self, rows: Sequence[LeafRow]) -> None:
        tree = self.hub.tree
        for row in rows:
            if row.index != tree.size:
                raise CorruptStateError(f"leaf {tree.size} is missing in the ledger")
            tree.extend([bytes.fromhex(row.leaf_hash)])
        if tree.root(tree.size) != rows[-1].root:
            raise CorruptStateError(f"the root after leaf {rows[-1].index} is not the ledger's")

    # -- signing -------------------------------------------------------------------------------

    async def _sign_when_compared(self) -> None:
        if not self._compared and not self._compare():
            return
        head = self._head(self.hub.tree.size)
        signed = self.hub.signed
        if signed is not None and signed.size == head.size:
            return
        await asyncio.to_thread(self._turn, head)
        # Who read the log up to the last witnessed head goes by the witnesses it knows from there.
        before = self.hub.witnessed.policies[:1] if self.hub.witnessed else ()
        policies = (self._policy, *before) if self._policy is not None else before
        self.hub.offer(sign_checkpoint(head, self.signer), head, policies)

    def _turn(self, head: Checkpoint) -> None:
        last = self.ratchet.last()
        if last is not None:
            self._check_ratchet(last, head)
        self.ratchet.turn(head)

    def _compare(self) -> bool:
        """Whether enough witnesses have said what they cosigned last; none may be ahead.

        Raises:
            ForkError: a witness has seen more than the ledger has, or another tree.
        """
        policy = self._policy
        if policy is None:
            return False
        spoken = self.hub.answered(policy.witnesses)
        heads = [head for head in spoken.values() if head is not None]
        own = self._head(self.hub.tree.size)
        check_start(own, heads, need=0)
        for head in heads:
            if self.hub.tree.root(head.size) != head.root and head.size:
                raise ForkError(f"a witness has seen another tree of size {head.size}")
        self._compared = policy.satisfied(spoken.keys())
        heard = self._compared
        self.hub.silent = () if heard else tuple(sorted(policy.witnesses.keys() - spoken.keys()))
        self._complain()
        return self._compared

    def _complain(self) -> None:
        """Say now and then which witnesses hold a new writer up."""
        now, names = asyncio.get_running_loop().time(), ", ".join(self.hub.silent)
        if names and now >= self._complain_at:
            logger.warning("nothing is signed until enough of %s say what they cosigned", names)
            self._complain_at = now + COMPLAIN_S

    # -- files ---------------------------------------------------------------------------------

    async def _publish_loop(self) -> None:
        """Write the directory of the newest witnessed head; add cosignatures that come later."""
        shown = b""
        while True:
            head = self.hub.witnessed
            if head is not None and (head.size > self._written or head.to_bytes() != shown):
                if head.size > self._written:
                    await self._grow(head.size)
                shown = head.to_bytes()
                await asyncio.to_thread(self.files.publish, shown, head.size)
                old, self._written = self._written, max(self._written, head.size)
                await asyncio.to_thread(self.files.drop_partials, old, head.size)
                continue
            await self.hub.changed(5.0)

    async def _grow(self, size: int) -> None:
        old = self._written
        first = old - old % 256
        kept_from, kept = self._tail
        rows = list(kept) if (kept_from, kept_from + len(kept)) == (first, old) else []
        while first + len(rows) < size:
            at = first + len(rows)
            end = min(size, at + BATCH)
            found = await self.ledger.read("entries", partial(Tx.leaves, first=at, end=end))
            if not found:
                raise CorruptStateError(f"leaf {at} is missing in the ledger")
            rows += [row.entry for row in found]
            for row in found:
                if row.kind == "round.plan" and row.index >= old:  # the others are shown already
                    await self._keep_plan(row)
        tree = self.hub.tree

        def write() -> None:
            self.files.grow(
                old,
                size,
                hashes=tree.hashes,
                entries=lambda low, high: rows[low - first : high - first],
            )

        await asyncio.to_thread(write)
        at = size - size % 256
        self._tail = (at, rows[at - first : size - first])

    async def _keep_plan(self, row: LeafRow) -> None:
        """Put a plan that is too large for its leaf beside the log, before the leaf is shown."""
        found = peek(row.entry)
        if found is None or row.round is None:
            raise CorruptStateError(f"leaf {row.index} is no plan")
        statement, said = found
        if not isinstance(said, RoundPlan) or said.plan is not None:
            return
        run = row.round.run
        data = (await self.ledger.read("plan", lambda tx: tx.run(run))).plan_bytes
        if sha256_hex(data) != statement.digest:
            raise CorruptStateError(f"the plan of {run} is not the one that leaf {row.index} names")
        await asyncio.to_thread(self.files.keep_blob, data)


def beat(tx: Tx, *, interval: timedelta) -> None:
    """Say that nothing happened."""
    seconds = max(1, int(interval.total_seconds()))
    tx.append_own(
        Heartbeat(interval_s=seconds),
        subject="log/heartbeat",
        digest=Digest(sha256_hex(b"heartbeat")),
    )


def load_signer(path: Path) -> SignerKey:
    """Read the log's private key.

    Raises:
        CorruptStateError: missing or damaged; the sentence does not repeat it.
    """
    try:
        return SignerKey.parse_private(path.read_text("utf-8").strip())
    except (OSError, ValueError):
        raise CorruptStateError(f"{path} cannot be read as the key of a log") from None
