"""A node's real part in the round log of a real door: enrolled, with its witness."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from random import Random

from cryptography.hazmat.primitives.serialization import Encoding

from node_agent.client import Connection
from node_agent.enrol import join
from node_agent.keys import KeyStore
from node_agent.log import LogPaths, NodeLog, open_node_log
from protocols.enrolment import Invitation
from protocols.identifiers import NodeId
from tests.support.door import Door


def invite(door: Door, node: str) -> Invitation:
    """An invitation that is good for an hour."""
    secret = os.urandom(32)
    until = door.parts.clock.now() + timedelta(hours=1)
    digest = hashlib.sha256(secret).digest()
    door.ledger(lambda tx: tx.add_token(digest, NodeId(node), until))
    root = door.authority.certificate.public_bytes(Encoding.DER)
    return Invitation(institution=NodeId(node), secret=secret, root_der=root)


async def enrolled_log(root: Path, door: Door, node: str, addresses: Sequence[str] = ()) -> NodeLog:
    """Join and open the log; nothing runs yet.

    Args:
        root: the node's folder, to be made.
        addresses: of the coordinator, in order of preference; empty: the door's.
    """
    (root / "keys").mkdir(parents=True)
    keys = KeyStore(root / "keys")
    invitation = await asyncio.to_thread(invite, door, node)
    enrolled = await join(
        keys, invitation, enrolment=door.enrolment, rng=Random(1), log=LogPaths(root)
    )
    log = open_node_log(
        root,
        node=enrolled.node,
        federation=enrolled.federation,
        key=keys.signing_key(),
        connection=Connection(addresses or door.address, enrolled.identity, rng=Random(2)),
        rng=Random(3),
        require=True,
    )
    assert log is not None
    return log


async def close_log(log: NodeLog) -> None:
    """Close what it holds."""
    await log.connection.close()
    log.store.close()
    if log.witness is not None:
        log.witness.store.close()
