"""A coordinator with one run and an open round, and the calls that nodes make of it."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from pathlib import Path

from protocols.crypto.identity import Identity
from protocols.gen import admin_pb2, rounds_pb2
from protocols.identifiers import NodeId, RoundId
from protocols.plan import Plan
from protocols.wire import round_ref
from tests.support.ledgers import NODES, START
from tests.support.spine import (
    OPERATOR,
    Network,
    SimulatedNode,
    Spine,
    as_context,
    quick_folder,
)

A, B, C, D = NODES
AS = {node: as_context(Identity("node", node)) for node in (*NODES, NodeId("zapala"))}
ZAPALA = NodeId("zapala")
PERSON = as_context(OPERATOR)


class World:
    """A coordinator with one run and an open round."""

    def __init__(self, spine: Spine, plan: Plan) -> None:
        self.spine, self.plan = spine, plan
        self.round = RoundId(plan.run_id, 0)
        self.ref = round_ref(self.round)
        self.root = plan.model.initial

    def join(self, node=A, *, plan="", model="", number=0):
        request = rounds_pb2.JoinRequest(
            round=round_ref(RoundId(self.plan.run_id, number)),
            plan_digest=plan or self.plan.digest,
            model_root=model or self.root,
        )
        return self.spine.rounds.Join(request, AS[node])

    def ready(self, node=A, model=""):
        request = rounds_pb2.ReadyRequest(round=self.ref, model_root=model or self.root)
        return self.spine.rounds.Ready(request, AS[node])

    def confirm(self, node=A, model="", objection="", detail=""):
        request = rounds_pb2.ConfirmRequest(
            round=self.ref, model_root=model, objection=objection, detail=detail
        )
        return self.spine.rounds.Confirm(request, AS[node])

    def sync(self, node=A, seen=0, wait_ms=0, **fields):
        request = rounds_pb2.SyncRequest(seen=seen, wait_ms=wait_ms, **fields)
        return self.spine.rounds.Sync(request, AS[node])

    async def finish(self) -> None:
        """Everybody acts until the run is done."""
        nodes = [SimulatedNode(node) for node in self.plan.roster_ids]
        for node in nodes:
            node.confirmed.update(f"{self.plan.run}/{n}" for n in range(9))  # says nothing
        network = Network(rng=random.Random(0), loss=0.0)
        for _ in range(4 * self.plan.rounds):
            for node in nodes:
                await node.act(self.spine, network)
            await self.spine.drive()

    async def facts(self):
        return await self.spine.admin.ShowRun(admin_pb2.ShowRunRequest(run=self.plan.run), PERSON)

    async def history(self):
        return await self.spine.ledger.read("history", lambda tx: tx.history())


@asynccontextmanager
async def world(folder: Path, **fields):
    spine = Spine(folder)
    await spine.start()
    try:
        plan = await spine.submit(rounds=1, **fields)
        for node in (ZAPALA,):
            await spine.ledger.run("enrol", lambda tx, n=node: tx.add_node(n, b"k" * 32, START))
        await spine.drive()
        yield World(spine, plan)
    finally:
        await spine.stop()


def story(coroutine_function, **fields):
    """Run a coroutine function in a world of its own."""

    async def play() -> None:
        with quick_folder() as folder:
            async with world(folder, **fields) as made:
                await coroutine_function(made)

    asyncio.run(play())
