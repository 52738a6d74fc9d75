"""Who is woken by which news of the log: a head must not cost n² wakes, and nobody may sleep on."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import pytest

from coordinator.log_hub import LogHub
from policies.audit.replay import witness_policy
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import cosign
from protocols.tlog.merkle import leaf_hash
from tests.support.leaves import ORIGIN, log_signer, witness_signer

NODES = tuple(f"n{index:02d}" for index in range(10))  # 1 + floor(20/3) = 7 of them are enough
NOW = 1_750_000_000
LONG_S = 30.0  # nobody waits so long here


def make_hub() -> LogHub:
    hub = LogHub(log_signer().verifier)
    hub.keys = {node: witness_signer(node).verifier for node in NODES}
    hub.lead(True)
    for node in NODES:
        hub.greet(node, b"")
    return hub


def grow(hub: LogHub) -> None:
    """A leaf more, and its head signed."""
    hub.tree.extend([leaf_hash(b"%d" % hub.tree.size)])
    head = Checkpoint(origin=ORIGIN, size=hub.tree.size, root=hub.tree.root(hub.tree.size))
    policy = witness_policy(hub.log, hub.keys)
    hub.offer(sign_checkpoint(head, log_signer()), head, [policy])


def answer(hub: LogHub, node: str) -> None:
    head = hub.asks(node)
    assert head is not None
    line = cosign(head.note.text, signer=witness_signer(node), time=NOW)
    assert hub.answer(node, head, 200, line.to_text().encode(), now=NOW)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def follow(hub: LogHub, woken: Counter[str], node: str) -> None:
    at = 0
    while True:
        await hub.changed(LONG_S, partial(hub.goes_beyond, at))
        woken[node] += 1
        at = hub.witnessed.size if hub.witnessed else at


def test_followers_are_woken_once_for_a_witnessed_head_and_for_nothing_else():
    async def main() -> None:
        hub, woken = make_hub(), Counter()
        tasks = [asyncio.create_task(follow(hub, woken, node)) for node in NODES]
        await settle()
        grow(hub)
        for node in NODES[:6]:
            answer(hub, node)
            await settle()
        assert not woken
        for node in NODES[6:]:  # the seventh makes it a witnessed head; three come after it
            answer(hub, node)
            await settle()
        assert woken == dict.fromkeys(NODES, 1)
        for task in tasks:
            task.cancel()

    asyncio.run(main())


def test_a_follower_is_woken_when_nothing_is_shown_any_more():
    async def main() -> None:
        hub, woken = make_hub(), Counter()
        task = asyncio.create_task(follow(hub, woken, "n00"))
        await settle()
        hub.lead(False)
        await settle()
        assert woken == {"n00": 1}
        task.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("answered", [0, 3, 10])
def test_a_witness_is_woken_by_the_next_head_and_not_by_the_others_answers(answered):
    async def main() -> None:
        hub, woken = make_hub(), Counter()
        grow(hub)
        answer(hub, "n00")

        async def wait() -> None:
            await hub.changed(LONG_S, lambda: hub.asks("n00") is not None)
            woken["n00"] += 1

        task = asyncio.create_task(wait())
        await settle()
        for node in NODES[1:answered]:
            answer(hub, node)
        await settle()
        assert not woken
        grow(hub)
        await settle()
        assert woken == {"n00": 1}
        await task

    asyncio.run(main())


def test_who_waits_for_anything_is_woken_by_anything():
    async def main() -> None:
        hub = make_hub()
        grow(hub)
        waiting = asyncio.create_task(hub.changed(LONG_S))
        await settle()
        assert not waiting.done()
        answer(hub, "n03")
        await settle()
        assert waiting.done()

    asyncio.run(main())
