"""Hostile coordinators and hostile nodes that speak the real protocol.

The coordinator is the real server behind real mutual TLS. For the rounds that a ``Liar`` has taken
over, ``Post`` keeps whatever it hears, ``Get`` answers what the liar wants that node to believe,
and vectors are stored unchecked; the honest rounds of the same server are served as ever. Nodes are
``SecureNode`` with single steps overridden. A ``Puppet`` is a member whose keys the coordinator
holds: a colluder, a Sybil, or a forgery of somebody else. What they do is caught by a named check
and goes through without it: see ``tests.support.without``.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from coordinator import app
from coordinator.drivers.rounds import RoundDriver
from coordinator.secure_sum import read_message, sender_of
from coordinator.services import bulk
from coordinator.services.secure_sum import SecureSumService
from coordinator.spool import upload_path
from protocols.errors import FederationError
from protocols.gen import rounds_pb2, secure_sum_pb2
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.secagg import coordinator as lists
from protocols.secagg import node as machine
from protocols.secagg import shamir
from protocols.secagg.attempts import NO_CHECKPOINT, attempt_of
from protocols.secagg.checks import Agreed, Listed, Started, packet_leaves
from protocols.secagg.codec import from_bytes
from protocols.secagg.context import Attempt, ctx_of, survivors_digest
from protocols.secagg.dealing import make_bundle, open_parcels, where
from protocols.secagg.errors import CheckFailedError
from protocols.secagg.keys import AttemptKeys
from protocols.secagg.masks import MaskAdder, MaskKey, node_masks
from protocols.secagg.messages import (
    Commit,
    CommitCertificate,
    DealBundle,
    DealOk,
    Delivery,
    Parcel,
    Ready,
    Signed,
    Start,
    Survivors,
    Transcript,
    Upload,
)
from protocols.secagg.packets import HeldShares, Kind
from protocols.secagg.paths import inclusion_path
from protocols.secagg.unmask import OpenedSecrets, mask_remover
from protocols.secagg.verify import recompute_sum, verify_transcript
from protocols.tensors.planar import accumulate
from protocols.tensors.units import UnitHasher
from protocols.wire import read_round
from tests.support.door import Client, Door
from tests.support.secagg import unpack_all
from tests.support.secure_nodes import SecureNode, SecureRound, secure_changes

SEEN = Digest("0" * 64)


# -- a coordinator that lies -------------------------------------------------------------------


class Liar:
    """What a hostile coordinator knows of one round, and what it says to whom.

    Lists that it does not lie about are made of all it heard, without any check of its own.
    """

    def __init__(self, play: HostileRound) -> None:
        self.play = play
        self.said: list[tuple[str, int, NodeId, Any]] = []  # kind, attempt, sender, message
        self.lies: dict[tuple[str, str], bytes | Callable[[int], bytes]] = {}
        self.shown: dict[tuple[NodeId, int], Digest] = {}  # H(U3) that a node was last shown
        self.checkpoint = NO_CHECKPOINT

    # -- what nodes see ----------------------------------------------------------------------

    def take(self, kind: str, body: bytes) -> None:
        """Keep a message; refuse nothing that can be read."""
        message = read_message(kind, body)
        sender, attempt = sender_of(message)
        self.said.append((kind, attempt, sender, message))

    def give(self, node: NodeId, kind: str, attempt: int) -> bytes:
        """What this node is told."""
        lie = self.lies.get((kind, node))
        data = lie if isinstance(lie, bytes) else lie(attempt) if lie else None
        if data is None:
            match kind:
                case "start":
                    data = lists.make_start(self.heard("ready", attempt)).to_bytes()
                case "delivery":
                    data = self.deliveries(attempt)[node].to_bytes()
                case "go":
                    data = lists.make_go(self.heard("deal_ok", attempt)).to_bytes()
                case "survivors":
                    data = lists.make_survivors(self.heard("upload", attempt)).to_bytes()
                case _:
                    commits = self.commits_to(self.shown[node, attempt], attempt)
                    data = CommitCertificate(commits=commits).to_bytes()
        if kind == "survivors":
            survivors = from_bytes(Survivors, data)
            bodies = [signed.body.to_bytes() for signed in survivors.headers]
            ctx = survivors.headers[0].body.ctx
            self.shown[node, attempt] = survivors_digest(ctx, bodies)
        return data

    def lie(self, kind: str, data: bytes, to: Iterable[str]) -> None:
        """From now on tell these nodes this."""
        for name in to:
            self.lies[kind, name] = data

    def list_of(self, names: Iterable[str], attempt: int = 1) -> bytes:
        """A survivor list of these nodes."""
        headers = self.heard("upload", attempt)
        return lists.make_survivors({NodeId(n): headers[NodeId(n)] for n in names}).to_bytes()

    def commits_to(self, digest: Digest, attempt: int = 1) -> tuple[Signed[Commit], ...]:
        """Commits to one list, in order of nodes."""
        found = {
            node: message
            for kind, number, node, message in self.said
            if (kind, number) == ("commit", attempt) and message.body.survivors == digest
        }
        return tuple(found[node] for node in sorted(found))

    # -- what it knows -----------------------------------------------------------------------

    def heard(self, kind: str, attempt: int = 1) -> dict[NodeId, Any]:
        """The last message of a kind from each node."""
        return {n: m for k, number, n, m in self.said if (k, number) == (kind, attempt)}

    def add(self, kind: str, messages: Iterable[Any], attempt: int = 1) -> None:
        """Messages of puppets, which need no wire."""
        for message in messages:
            self.said.append((kind, attempt, sender_of(message)[0], message))

    def attempt(self, number: int = 1) -> Attempt:
        """As everybody derives it."""
        play = self.play
        model = play.door.snapshots[play.plan.run].model_root
        return attempt_of(play.plan, play.round, number, model)

    def started(self, number: int = 1, start: Start | None = None) -> Started:
        """U1, unchecked."""
        start = start or lists.make_start(self.heard("ready", number))
        attempt = self.attempt(number)
        readys = {signed.body.node: signed.body for signed in start.readys}
        return Started(attempt=attempt, readys=readys, ctx_deal=start.ctx_deal(attempt))

    def agreed(
        self,
        number: int = 1,
        *,
        started: Started | None = None,
        bundles: Mapping[NodeId, DealBundle] | None = None,
    ) -> Agreed:
        """The deals and ctx, unchecked."""
        started = started or self.started(number)
        bundles = bundles or self.heard("deal", number)
        deals = {node: bundles[node].deal.body for node in sorted(bundles)}
        ctx = ctx_of(started.ctx_deal, [d.to_bytes() for d in deals.values()], self.checkpoint)
        return Agreed(started=started, deals=deals, ctx=ctx)

    def listed(self, agreed: Agreed, headers: Mapping[NodeId, Signed[Upload]]) -> Listed:
        """A survivor list, unchecked."""
        bodies = {node: headers[node].body for node in sorted(headers)}
        digest = survivors_digest(agreed.ctx, [body.to_bytes() for body in bodies.values()])
        return Listed(agreed=agreed, headers=bodies, digest=digest)

    def deliveries(
        self,
        number: int = 1,
        *,
        started: Started | None = None,
        bundles: Mapping[NodeId, DealBundle] | None = None,
    ) -> dict[NodeId, Delivery]:
        """What each node is sent, unchecked."""
        started = started or self.started(number)
        bundles = bundles or self.heard("deal", number)
        parcels: dict[NodeId, list[Parcel]] = {node: [] for node in started.readys}
        for dealer in sorted(bundles):
            sealed = {packet.to: packet.sealed for packet in bundles[dealer].packets}
            leaves = packet_leaves(dealer, sealed, started)
            for to, place in started.places.items():
                path = () if to == dealer else inclusion_path(leaves, place)
                parcels[to].append(
                    Parcel(deal=bundles[dealer].deal, sealed=sealed.get(to), path=path)
                )
        return {
            node: Delivery(parcels=tuple(found), checkpoint=self.checkpoint)
            for node, found in parcels.items()
        }

    def secret(self, of: str, kind: Kind, number: int = 1) -> bytes:
        """A member's secret from whatever shares of it were ever revealed."""
        attempt = self.attempt(number)
        shares = {
            attempt.roster.index(node): share.share
            for sort, at, node, message in self.said
            if (sort, at) == ("reveal", number)
            for share in message.body.shares
            if (share.of, share.kind) == (of, kind)
        }
        return shamir.reconstruct(shares, threshold=attempt.terms.threshold)

    def vector(self, name: str, number: int = 1) -> bytes:
        """The masked vector that a node sent, from the spool."""
        play = self.play
        path = upload_path(play.door.config.spool, play.round, number, NodeId(name))
        return path.read_bytes()

    def forget_upload(self, name: str, number: int = 1) -> bytes:
        """Put a vector aside and pretend that it was never sent."""
        play, node = self.play, NodeId(name)
        data = self.vector(name, number)
        path = upload_path(play.door.config.spool, play.round, number, node)
        path.unlink()
        play.door.parts.spool._verified.pop(path, None)
        statement = sa.text(
            "DELETE FROM uploads WHERE run_id = :run AND attempt = :attempt AND node_id = :node"
        )
        play.door.ledger(
            lambda tx: tx._write(statement, run=play.round.run, attempt=number, node=node)
        )
        return data

    # -- what it makes of it -----------------------------------------------------------------

    def strip(self, masked: bytes, masks: Iterable[MaskKey]) -> np.ndarray:
        """Residues of one vector with these masks taken off."""
        return self.strip_lanes(self.play.residues(masked), masks)

    def strip_lanes(self, lanes: np.ndarray, masks: Iterable[MaskKey]) -> np.ndarray:
        """The same of lanes that are unpacked already."""
        off = [MaskKey(key=mask.key, sign=-mask.sign) for mask in masks]
        MaskAdder(off, self.play.ring).add(0, lanes)
        return lanes & (self.play.ring.modulus - 1)

    def open_one(self, agreed: Agreed, name: str, masked: bytes, *, b: bytes, rk: bytes) -> Any:
        """Residues of one vector, from both secrets of its owner."""
        masks = node_masks(
            agreed.ctx,
            index=agreed.started.indices[NodeId(name)],
            self_seed=b,
            rk_secret=rk,
            rks=agreed.rks,
        )
        return self.strip(masked, masks)

    def open_sum(
        self,
        survivors: Iterable[str],
        number: int = 1,
        *,
        vectors: Mapping[str, bytes] | None = None,
    ) -> np.ndarray:
        """Residues of the sum over ``survivors``, from the revealed shares alone."""
        agreed = self.agreed(number)
        inside = sorted(NodeId(name) for name in survivors)
        opened = OpenedSecrets(
            self_seeds={n: self.secret(n, Kind.SEED, number) for n in inside},
            pair_secrets={
                n: self.secret(n, Kind.KEY, number) for n in agreed.deals if n not in inside
            },
        )
        remover = mask_remover(
            agreed.ctx,
            self.play.ring,
            roster=agreed.started.attempt.roster,
            deals=agreed.deals,
            opened=opened,
        )
        found = [(vectors or {}).get(n) or self.vector(n, number) for n in inside]
        readers = [lambda o, length, v=v: v[o : o + length] for v in found]
        packed = accumulate(readers, self.play.layout, self.play.ring, adjust=remover)
        return self.play.residues(b"".join(packed))


class HostileService(SecureSumService):
    """The real service; the rounds of a liar are answered by the liar."""

    liars: dict[RoundId, Liar] = {}  # noqa: RUF012 - one table for all services of a test process

    async def Post(self, request: Any, context: Any) -> Any:
        """Take a signed message."""
        liar = self.liars.get(read_round(request.round))
        if liar is None:
            return await super().Post(request, context)
        await self._callers.node(context)
        liar.take(request.kind, request.body)
        return rounds_pb2.RoundReply(why="noted")

    async def Get(self, request: Any, context: Any) -> Any:
        """Give a list."""
        liar = self.liars.get(read_round(request.round))
        if liar is None:
            return await super().Get(request, context)
        node = await self._callers.node(context)
        body = liar.give(node, request.kind, request.attempt)
        return secure_sum_pb2.GetResponse(body=body)


class HostileDoor(Door):
    """A door whose coordinator may be lied with, kept open for many rounds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.clients: dict[str, Client] = {}
        self.numbers = itertools.count(1)

    def start(self) -> None:
        """Serve; one driver for all rounds, for it holds a lease."""
        super().start()
        self.driver = RoundDriver(
            ledger=self.parts.ledger,
            clock=self.parts.clock,
            blobs=self.parts.blobs,
            layouts=self.parts.layouts,
            spool=self.config.spool,
        )

    def client(self, name: str) -> Client:
        """The node's connection, made once."""
        if name not in self.clients:
            self.clients[name] = self.enrol(name)
        return self.clients[name]


@contextmanager
def hostile(folder: Path) -> Iterator[HostileDoor]:
    """Serve a coordinator that does not check what it hears in the rounds of a liar."""
    liars = HostileService.liars

    def honest_only(name: str, round_of: Callable[..., RoundId]) -> Callable[..., Any]:
        real = getattr(bulk, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return None if round_of(*args) in liars else real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "SecureSumService", HostileService)
        for name, round_of in (
            ("check_header", lambda header, node, expected: header.round_id),
            ("check_may_upload", lambda phase, header: header.round_id),
            ("check_uploaded", lambda tx, round_id, *rest: round_id),
            ("advance", lambda tx, round_id, *rest: round_id),
        ):
            patch.setattr(bulk, name, honest_only(name, round_of))
        door = HostileDoor(folder)
        door.start()
        try:
            yield door
        finally:
            door.stop()
            liars.clear()


# -- nodes and rounds --------------------------------------------------------------------------


class Complained(FederationError):
    """A node sent COMPLAINT: for attacks that end there."""


class Member(SecureNode):
    """An honest node that remembers its masks for the test, and may try an attempt again."""

    def masks(self) -> Any:
        """What is added to every chunk."""
        self.adder = super().masks()
        return self.adder

    def rejoin(self, number: int, certificate: Any = None) -> None:
        """READY of another attempt, as it is told."""
        self.number = number
        self.send(
            machine.ready(
                self.state,
                self.attempt(),
                self.name,
                self.key,
                seed=self.seed(),
                seen_size=0,
                seen_root=SEEN,
                certificate=certificate,
            )
        )


class SharedRound(SecureRound):
    """A secure round of its own run on a door that serves many."""

    door: HostileDoor

    def __init__(
        self,
        door: HostileDoor,
        n: int = 4,
        coordinates: int = 60,
        node_type: type[SecureNode] | Mapping[str, type[SecureNode]] = Member,
        **changes: Any,
    ) -> None:
        names = [f"n{i:02d}" for i in range(n)]
        clients = {name: door.client(name) for name in names}
        self.door, self.driver = door, door.driver
        self.plan = door.make_run(
            f"x{next(door.numbers)}", coordinates, **secure_changes(door, names, **changes)
        )
        self.round = RoundId(self.plan.run_id, 0)
        self.begin()
        types = node_type if isinstance(node_type, Mapping) else dict.fromkeys(names, node_type)
        self.nodes: dict[str, Any] = {
            name: types.get(name, Member)(door, name, self.plan, self.round, clients[name])
            for name in names
        }
        first = self.nodes[names[0]]
        self.ring, self.layout = first.ring, first.layout

    def begin(self) -> None:
        """Let the driver open the round."""
        self.drive()

    def residues(self, packed: bytes) -> np.ndarray:
        """uint32 [d] of a packed vector or sum; a fresh array."""
        return unpack_all(packed, self.layout.coordinates, self.ring).copy()

    def plain(self, names: Iterable[str]) -> np.ndarray:
        """Residues of the plain sum of these nodes; of one node: what it must keep to itself."""
        return self.residues(self.plain_sum(list(names)))

    def is_plain(self, found: np.ndarray, names: Iterable[str]) -> bool:
        """Whether residues are exactly the plain sum of these nodes."""
        return bool(np.array_equal(found, self.plain(names)))

    def is_noise(self, found: np.ndarray, names: Iterable[str]) -> bool:
        """Whether residues agree with the plain sum no more than by chance (2**-20 for each of
        about a hundred coordinates)."""
        return int((found == self.plain(names)).sum()) <= 1


class HostileRound(SharedRound):
    """A round that the coordinator lies in from its beginning."""

    def begin(self) -> None:
        """Take the round over."""
        self.door.open_round(self.plan)
        self.liar = Liar(self)
        HostileService.liars[self.round] = self.liar

    def others(self, *names: str) -> list[str]:
        """All nodes but these."""
        return [name for name in self.nodes if name not in names]

    def up_to_upload(self, but: tuple[str, ...] = ()) -> None:
        """The honest course of a round until all vectors have arrived."""
        self.all("ready", "deal", "acknowledge", "mask", "upload", but=but)


@dataclass(frozen=True, kw_only=True)
class Puppet:
    """A member played by the coordinator, under the name of ``node`` and with whatever key."""

    attempt: Attempt
    node: NodeId
    key: Any

    @property
    def keys(self) -> AttemptKeys:
        """Its secrets of the attempt."""
        seed = hashlib.sha256(f"puppet {self.node}".encode()).digest()
        return AttemptKeys.derive(seed, self.attempt, self.node)

    def _sign(self, body: Any) -> Signed[Any]:
        return Signed.make(self.key, body)

    def ready(self, **changes: Any) -> Signed[Ready]:
        """READY."""
        values: dict[str, Any] = {
            "roster_root": self.attempt.roster.root,
            "model_root": self.attempt.model_root,
            "plan_digest": self.attempt.plan_digest,
            "ek": self.keys.ek,
            "seen_size": 0,
            "seen_root": SEEN,
        }
        return self._sign(Ready(**where(self.attempt, self.node), **values | changes))

    def bundle(self, started: Started, **changes: Any) -> DealBundle:
        """DEAL, with ``changes`` signed into its body."""
        made = make_bundle(started, self.node, self.keys, self.key)
        return replace(made, deal=self._sign(replace(made.deal.body, **changes)))

    def deal_ok(self, ctx: Digest) -> Signed[DealOk]:
        """DEAL_OK on any context."""
        return self._sign(DealOk(**where(self.attempt, self.node), ctx=ctx))

    def header(self, ctx: Digest, masked: bytes) -> Signed[Upload]:
        """UPLOAD of any vector on any context."""
        return self._sign(
            Upload(
                **where(self.attempt, self.node),
                ctx=ctx,
                upload_root=root_of(masked),
                length=len(masked),
            )
        )

    def held(self, delivery: Delivery, agreed: Agreed) -> dict[NodeId, HeldShares]:
        """The shares dealt to it, by dealer."""
        opened = open_parcels(delivery.parcels, agreed, self.node, self.keys)
        return {held.dealer: held for held in opened}


def secrets_from(held: Mapping[int, HeldShares], threshold: int) -> dict[str, bytes]:
    """Both secrets of one dealer from what its receivers hold: arguments of ``open_one``."""
    return {
        "b": shamir.reconstruct({x: h.b_share for x, h in held.items()}, threshold=threshold),
        "rk": shamir.reconstruct({x: h.rk_share for x, h in held.items()}, threshold=threshold),
    }


def root_of(data: bytes) -> Digest:
    """The root of a vector, as its header names it."""
    hasher = UnitHasher()
    hasher.update(data)
    return hasher.digest()


# -- an auditor --------------------------------------------------------------------------------


def audit(play: SharedRound, attempt: int = 1) -> None:
    """Check a released round from what is published and retained, as an auditor does.

    Raises:
        FederationError: what does not hold; 8.5 for the uploads and the sum.
    """
    row, blobs = play.row, play.door.parts.blobs
    transcript = from_bytes(Transcript, blobs.open(row.transcript).path.read_bytes())
    own = attempt_of(play.plan, play.round, attempt, play.door.snapshots[play.plan.run].model_root)
    verified = verify_transcript(transcript, own)
    uploads = {}
    for node, header in verified.listed.headers.items():
        data = upload_path(play.door.config.spool, play.round, attempt, node).read_bytes()
        if root_of(data) != header.upload_root:
            raise CheckFailedError(f"the upload of {node} is not the one it signed", clause="8.5")
        uploads[node] = lambda o, length, data=data: data[o : o + length]
    again = b"".join(recompute_sum(verified, uploads, play.layout.coordinates, play.ring))
    if again != play.opened_sum():
        raise CheckFailedError("the published sum is not that of the uploads", clause="8.5")


# -- uniformity --------------------------------------------------------------------------------

# Chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6; the limit is the mean
# plus 8 deviations, which a uniform vector passes but for about once in 10**12 keys.
CHI_SQUARE_LIMIT = 255 + 8 * (2 * 255) ** 0.5


def chi_squares(residues: np.ndarray, bits: int) -> tuple[float, float]:
    """Against the uniform law on the 256 values of the 8 highest and of the 8 lowest bits."""

    def one(values: np.ndarray) -> float:
        bins = np.bincount(values, minlength=256)
        mean = residues.size / 256
        return float(((bins - mean) ** 2 / mean).sum())

    return one(residues >> (bits - 8)), one(residues & 255)


__all__ = [
    "CHI_SQUARE_LIMIT",
    "Complained",
    "HostileDoor",
    "HostileRound",
    "Liar",
    "Member",
    "Puppet",
    "SharedRound",
    "audit",
    "chi_squares",
    "hostile",
    "root_of",
    "secrets_from",
]
