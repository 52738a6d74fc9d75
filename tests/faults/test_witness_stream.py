"""A witness whose stream is given up before it stands goes on with the next coordinator process.

The first address takes connections and says nothing, as a machine behind a broken middlebox does:
the call is there, its connection is not. grpc.aio's ``write`` then waits for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from datetime import timedelta
from random import Random

from cryptography.hazmat.primitives.serialization import Encoding

from node_agent.client import Connection
from node_agent.enrol import join
from node_agent.keys import KeyStore
from node_agent.log import LogPaths, open_node_log
from protocols.enrolment import Invitation
from protocols.identifiers import NodeId
from tests.support.door import Door

NODE = NodeId("cl-univ-1")
PATIENCE_S = 30.0


async def enrolled_log(root, door, deaf):
    """A node's log that would rather talk to the deaf address."""
    (root / "keys").mkdir(parents=True)
    keys = KeyStore(root / "keys")
    secret = os.urandom(32)
    until = door.parts.clock.now() + timedelta(hours=1)
    digest = hashlib.sha256(secret).digest()
    await asyncio.to_thread(door.ledger, lambda tx: tx.add_token(digest, NODE, until))
    invitation = Invitation(
        institution=NODE,
        secret=secret,
        root_der=door.authority.certificate.public_bytes(Encoding.DER),
    )
    enrolled = await join(
        keys, invitation, enrolment=door.enrolment, rng=Random(1), log=LogPaths(root)
    )
    return open_node_log(
        root,
        node=enrolled.node,
        federation=enrolled.federation,
        key=keys.signing_key(),
        connection=Connection((deaf, door.address), enrolled.identity, rng=Random(2)),
        rng=Random(3),
        require=True,
    )


async def story(tmp_path):
    knocked = asyncio.Event()

    async def deaf(_reader, _writer):
        knocked.set()
        await asyncio.sleep(3600)

    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    door = await asyncio.to_thread(Door, tmp_path / "federation", log=True)
    await asyncio.to_thread(door.start)
    log = await enrolled_log(tmp_path / "node", door, address)
    asking = asyncio.create_task(log.cosign())
    try:
        await asyncio.wait_for(knocked.wait(), PATIENCE_S)
        await asyncio.sleep(0.1)  # the first message waits for the connection now
        assert NODE not in door.parts.log.hub.heads
        log.connection.turn_from(address)  # a poll was not answered
        for _ in range(int(PATIENCE_S / 0.05)):
            if NODE in door.parts.log.hub.heads:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the witness never came back")
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await log.connection.close()
        log.store.close()
        log.witness.store.close()
        server.close()
        await asyncio.to_thread(door.stop)


def test_a_witness_whose_call_is_given_up_before_it_is_connected_asks_again(tmp_path):
    asyncio.run(story(tmp_path))
