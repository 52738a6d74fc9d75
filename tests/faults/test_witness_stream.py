"""A witness whose stream is given up before it stands goes on with the next coordinator process.

The first address takes connections and says nothing, as a machine behind a broken middlebox does:
the call is there, its connection is not. grpc.aio's ``write`` then waits for ever.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from tests.support.door import Door
from tests.support.node_log import close_log, enrolled_log

NODE = "cl-univ-1"
PATIENCE_S = 30.0


async def came_true(what):
    for _ in range(int(PATIENCE_S / 0.05)):
        if what():
            return True
        await asyncio.sleep(0.05)
    return False


@asynccontextmanager
async def deaf():
    """An address that takes connections and says nothing; and an event: somebody has knocked."""
    knocked = asyncio.Event()

    async def listen(_reader, _writer):
        knocked.set()
        await asyncio.sleep(3600)

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", knocked
    finally:
        server.close()


@asynccontextmanager
async def asking(tmp_path, addresses=()):
    """A door with a log, and a witness that asks it, or others first."""
    door = await asyncio.to_thread(Door, tmp_path / "federation", log=True)
    await asyncio.to_thread(door.start)
    known = (*addresses, door.address) if addresses else ()
    log = await enrolled_log(tmp_path / "node", door, NODE, known)
    task = asyncio.create_task(log.cosign())
    try:
        yield door, log
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await close_log(log)
        await asyncio.to_thread(door.stop)


async def no_longer_leads(door):
    door.parts.log.hub.lead(False)  # another process writes the log: every stream of heads ends


def test_a_witness_whose_call_is_given_up_before_it_is_connected_asks_again(tmp_path):
    async def story():
        async with deaf() as (address, knocked), asking(tmp_path, (address,)) as (door, log):
            await asyncio.wait_for(knocked.wait(), PATIENCE_S)
            await asyncio.sleep(0.1)  # the first message waits for the connection now
            early = NODE in door.parts.log.hub.heads
            log.connection.turn_from(address)  # a poll was not answered
            return early, await came_true(lambda: NODE in door.parts.log.hub.heads)

    assert asyncio.run(story()) == (False, True)


def test_nobody_goes_on_sending_on_a_stream_that_its_coordinator_ended(tmp_path):
    """Each reconnect would leave a task behind."""

    def senders():
        return [each for each in asyncio.all_tasks() if "_consume_request_iterator" in repr(each)]

    async def story():
        async with asking(tmp_path) as (door, _):
            assert await came_true(lambda: NODE in door.parts.log.hub.heads)
            stood = senders()
            await asyncio.to_thread(door.call, no_longer_leads(door))
            over = await came_true(stood[0].done)
            return len(stood), over

    assert asyncio.run(story()) == (1, True)
