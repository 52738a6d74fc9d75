"""Many nodes in one process, speaking the real protocol: ``python -m tests.bench.light_nodes JOB``.

For measuring the coordinator alone, with more nodes than this machine could run as agents. They use
the agent's own client, upload and download code and encode one real vector per round; but they hold
no model: all nodes send the same vector (each under its own signed header), and confirm what the
coordinator computed without computing it. The benchmark looks at the values afterwards.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent import bulk, uploads
from node_agent.client import Connection
from node_agent.contribution import Terms, make_contribution, synthetic_work
from node_agent.enrol import join
from node_agent.keys import KeyStore
from protocols.enrolment import Invitation
from protocols.gen import rounds_pb2
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.plan import Plan
from protocols.round_vector import round_layout
from protocols.tensors.manifest import Manifest
from protocols.tensors.scales import Scales
from protocols.tensors.snapshot import Snapshot
from protocols.upload import UploadHeader, sign_header

SMALL = 64 * 2**20  # bytes: manifests and scales are smaller


@dataclass(slots=True)
class Vectors:
    """The one vector of each attempt, encoded by whoever needs it first."""

    folder: Path
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    made: dict[tuple[str, int], Any] = field(default_factory=dict)

    async def of(
        self, connection: Connection, terms: Terms, start: Snapshot, key: Ed25519PrivateKey
    ) -> Any:
        """The upload record of an attempt; its header is the first node's."""
        async with self.lock:
            name = (str(terms.round), terms.attempt)
            if name not in self.made:
                for old in self.folder.glob("*.bin"):
                    old.unlink()
                manifest = Manifest.from_bytes(
                    await bulk.fetch_bytes(connection, start.manifest, limit=SMALL)
                )
                scales = await bulk.fetch_bytes(connection, start.scales, limit=SMALL)
                step = terms.plan.local_step.synthetic
                if step is None:
                    raise ValueError("the benchmark's plan has a synthetic local step")
                self.made[name] = await asyncio.to_thread(
                    make_contribution,
                    synthetic_work(step.delta, round_layout(terms.plan, terms.index, manifest)),
                    terms=terms,
                    manifest=manifest,
                    scales=Scales.from_bytes(scales, manifest),
                    seed=secrets.token_bytes(32),
                    signing_key=key,
                    uploads=self.folder,
                )
            return self.made[name]


class LightNode:
    """One node: joins, is ready, uploads, downloads the sum, confirms."""

    def __init__(
        self, connection: Connection, node: NodeId, key: Ed25519PrivateKey, vectors: Vectors
    ) -> None:
        self._connection = connection
        self._node = node
        self._key = key
        self._vectors = vectors
        self._plan: Plan | None = None
        self._did: set[tuple[str, str, int]] = set()  # (round, what, attempt)

    async def play(self, run: str) -> None:
        """Until the run has ended."""
        seen = 0
        while True:
            request = rounds_pb2.SyncRequest(seen=seen, wait_ms=20_000, state="running")
            answer = await self._connection.ask(lambda c: c.rounds.Sync, request, timeout_s=40.0)
            seen = answer.version
            for view in answer.runs:
                if view.run == run:
                    await self._act(view)
                    if view.status != "active":
                        return

    async def _act(self, view: Any) -> None:
        if view.HasField("last_released") and self._first(view.last_released, "confirm"):
            await self._confirm(view.last_released)
        if not view.HasField("current"):
            return
        current = view.current
        start = Snapshot.from_bytes(current.start_snapshot)
        match current.phase.name:
            case "Open" if self._first(current, "join"):
                await self._call(
                    "Join",
                    rounds_pb2.JoinRequest(
                        round=current.round,
                        plan_digest=view.plan_digest,
                        model_root=start.model_root,
                    ),
                )
            case "Training" if self._first(current, "ready"):
                await self._call(
                    "Ready",
                    rounds_pb2.ReadyRequest(round=current.round, model_root=start.model_root),
                )
            case "Uploading" if self._first(current, "upload"):
                await self._upload(view.run, current, start)
            case _:
                pass  # nothing to do in this phase, or done already

    def _first(self, round_: Any, what: str) -> bool:
        done = (f"{round_.round.run}/{round_.round.number}", what, round_.phase.attempt)
        if done in self._did:
            return False
        self._did.add(done)
        return True

    async def _call(self, method: str, request: Any) -> None:
        await self._connection.ask(lambda c: getattr(c.rounds, method), request)

    async def _upload(self, run: str, current: Any, start: Snapshot) -> None:
        if self._plan is None:
            request = rounds_pb2.GetPlanRequest(run=run)
            answer = await self._connection.ask(lambda c: c.rounds.GetPlan, request)
            self._plan = Plan.from_bytes(answer.plan)
        terms = Terms(
            plan=self._plan,
            node=self._node,
            round=RoundId.parse(f"{current.round.run}/{current.round.number}"),
            index=current.index,
            attempt=current.phase.attempt,
            model_root=start.model_root,
        )
        record = await self._vectors.of(self._connection, terms, start, self._key)
        header = replace(UploadHeader.from_bytes(record.header), node=self._node)
        await uploads.upload(
            self._connection,
            self._vectors.folder / record.file,
            uploads.Announcement(
                header=header.to_bytes(),
                signature=sign_header(self._key, header),
                unit_hashes=record.unit_hashes,
            ),
        )

    async def _confirm(self, released: Any) -> None:
        round_ = RoundId.parse(f"{released.round.run}/{released.round.number}")
        path = self._vectors.folder / f"{self._node}.sum"
        await bulk.fetch(
            self._connection, Digest(released.phase.sum), path, round_=round_, durable=False
        )
        path.unlink()
        await self._call(
            "Confirm",
            rounds_pb2.ConfirmRequest(round=released.round, model_root=released.phase.model_root),
        )


async def main(job: Mapping[str, Any]) -> None:
    """Enrol every node with its invitation, then play until the run has ended."""
    folder = Path(job["folder"])
    vectors = Vectors(folder / "vectors")
    vectors.folder.mkdir(parents=True)
    players = []
    for name, token in job["invitations"].items():
        keys = KeyStore(folder / name / "keys")
        enrolled = await join(
            keys, Invitation.parse(token), enrolment=job["enrolment"], rng=Random(name)
        )
        connection = Connection(job["address"], enrolled.identity, rng=Random(name))
        player = LightNode(connection, enrolled.node, keys.signing_key(), vectors)
        players.append((connection, player))
    (folder / "enrolled").touch()
    try:
        await asyncio.gather(*(player.play(job["run"]) for _, player in players))
    finally:
        for connection, _ in players:
            await connection.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
