"""Light nodes that also sign for the round log: ``python -m tests.bench.signing_nodes JOB``.

As ``light_nodes``, with a leaf for joining, uploading and confirming, so that a run fills the
coordinator's log as real agents fill it. They are no witnesses and read no log: what they sign is
checked by the coordinator as everybody's is.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent import enrol, uploads
from node_agent import log as node_log
from node_agent.client import Connection
from node_agent.contribution import Terms
from node_agent.keys import KeyStore
from node_agent.log_store import LogStore
from protocols.canonical import sha256_hex
from protocols.crypto.identity import spki_digest
from protocols.enrolment import Invitation
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.plan import Plan
from protocols.tensors.snapshot import Snapshot
from protocols.tlog.kinds import Predicate, RoundConfirm, RoundJoin, UpdateCommit, round_subject
from protocols.tlog.leaf import Seen
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.upload import UploadHeader, sign_header
from tests.bench.light_nodes import LightNode, Vectors


class SigningNode(LightNode):
    """One node with a chain of its own in the log."""

    def __init__(
        self,
        connection: Connection,
        node: NodeId,
        key: Ed25519PrivateKey,
        vectors: Vectors,
        store: LogStore,
    ) -> None:
        super().__init__(connection, node, key, vectors)
        self._store = store
        self._commits: dict[str, str] = {}

    def _leaf(self, round_: RoundId, said: Predicate, act: str) -> Any:
        plan = self._read_plan
        return node_log._sign(
            self._store,
            f"{round_} {act}",
            said,
            key=self._key,
            subject=round_subject(plan.federation_id, round_),
            digest=Digest(sha256_hex(plan.to_bytes())),
            seen=Seen(size=0, root=EMPTY_ROOT),
        )

    @property
    def _read_plan(self) -> Plan:
        if self._plan is None:
            raise ValueError("the plan was not read yet")
        return self._plan

    async def _act(self, view: Any) -> None:
        if self._plan is None:
            from protocols.gen import rounds_pb2

            request = rounds_pb2.GetPlanRequest(run=view.run)
            answer = await self._connection.ask(lambda c: c.rounds.GetPlan, request)
            self._plan = Plan.from_bytes(answer.plan)
        await super()._act(view)

    async def _call(self, method: str, request: Any) -> None:
        round_ = RoundId.parse(f"{request.round.run}/{request.round.number}")
        said: Predicate | None = None
        if method == "Join":
            said = RoundJoin(
                node=self._node,
                plan_sha256=sha256_hex(self._read_plan.to_bytes()),
                model_in=request.model_root,
            )
        elif method == "Confirm":
            said = RoundConfirm(
                attempt=1,
                node=self._node,
                model_out=request.model_root,
                commit=self._commits.get(str(round_)),
            )
        if said is not None:
            request.leaf = self._leaf(round_, said, method).entry
        await super()._call(method, request)

    async def _upload(self, run: str, current: Any, start: Snapshot) -> None:
        round_ = RoundId.parse(f"{current.round.run}/{current.round.number}")
        terms = Terms(
            plan=self._read_plan,
            node=self._node,
            round=round_,
            index=current.index,
            attempt=current.phase.attempt,
            model_root=start.model_root,
        )
        record = await self._vectors.of(self._connection, terms, start, self._key)
        header = replace(UploadHeader.from_bytes(record.header), node=self._node)
        said = UpdateCommit(
            attempt=header.attempt,
            node=self._node,
            ctx=None,
            deals_sha256=None,
            upload_root=header.root,
            bytes=header.size,
        )
        leaf = self._leaf(round_, said, "commit")
        self._commits = {str(round_): leaf.leaf_hash}
        await uploads.upload(
            self._connection,
            self._vectors.folder / record.file,
            uploads.Announcement(
                header=header.to_bytes(),
                signature=sign_header(self._key, header),
                unit_hashes=record.unit_hashes,
            ),
            leaf=leaf.entry,
        )


def asked(store: LogStore) -> Any:
    """What stands in for ``enrol._asked``: a request of a node that is no witness."""

    def ask(
        _: Any, key: Ed25519PrivateKey, invitation: Invitation, csr: bytes, approval: bytes
    ) -> bytes:
        node = invitation.institution
        spki = spki_digest(x509.load_der_x509_csr(csr))
        return node_log.enrol_leaf(
            store, key=key, node=node, csr=csr, spki=spki, witness=None, approval=approval
        ).entry

    return ask


async def main(job: Mapping[str, Any]) -> None:
    """Enrol every node with its invitation, then play until the run has ended."""
    folder = Path(job["folder"])
    vectors = Vectors(folder / "vectors")
    vectors.folder.mkdir(parents=True)
    players = []
    for name, token in job["invitations"].items():
        keys = KeyStore(folder / name / "keys")
        (folder / name).mkdir(exist_ok=True)
        store = LogStore(folder / name / "log.sqlite")
        enrol._asked = asked(store)
        enrolled = await enrol.join(
            keys, Invitation.parse(token), enrolment=job["enrolment"], rng=Random(name)
        )
        connection = Connection(job["address"], enrolled.identity, rng=Random(name))
        player = SigningNode(connection, enrolled.node, keys.signing_key(), vectors, store)
        players.append((connection, player))
    (folder / "enrolled").touch()
    try:
        await asyncio.gather(*(player.play(job["run"]) for _, player in players))
    finally:
        for connection, _ in players:
            await connection.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
