"""A member's whole life by the commands that people type: joins, is suspended and let back in,
changes its key, leaves, comes back, is expelled. After each act its node calls over mutual TLS.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from infra.admin.keys import card_path, read_card
from node_agent.cli.joining import JoinRequest, join_folder
from node_agent.client import Connection
from node_agent.config import NodeFolder, load_config
from node_agent.institution import approver
from node_agent.keys import KeyStore
from protocols.errors import FederationError, RefusedError
from protocols.gen import rounds_pb2
from tests.contract.test_admin_ceremony import FOUND, PASSPHRASE, desk, run
from tests.support.door import served
from tests.support.node import rng

__all__ = ["desk"]
ADMINS = ("admin-ar", "admin-br", "admin-cl")


class Life:
    """The federation, its admins, and the node of site-b."""

    def __init__(self, door, home: Path) -> None:
        self.door, self.home, self.count = door, home, 0
        self.tuf = door.config.trust

    def act(self, *words: str, people: tuple[str, ...] = ADMINS[:2], says: str) -> None:
        """Propose, sign, publish."""
        self.count += 1
        request = f"act-{self.count}.request"
        run("member", *words, "--repo", self.tuf, "--out", request)
        for person in people:
            run("member", "sign", request, "--key", f"keys/{person}", "--yes")
        run("member", "publish", request, "--dir", "fed", says=says)

    def join(self, folder: str, key: str) -> NodeFolder:
        """Be invited and join, with the institution's key at hand."""
        from coordinator.operator_client import operator_stub
        from protocols.gen import admin_pb2

        with operator_stub(Path("fed")) as admin:
            invite = admin_pb2.InviteRequest(institution="site-b", valid_hours=1)
            token = admin.Invite(invite, timeout=20).token
        passphrase = self.home / "passphrase"
        passphrase.write_text(PASSPHRASE)
        join_folder(
            JoinRequest(
                folder=Path(folder), token=token, coordinator=self.door.address,
                enrolment=self.door.enrolment, train=(), valid=(), ranks=1, device="cpu",
                threads=None, approve=approver(Path(key), passphrase),
            )
        )  # fmt: skip
        return NodeFolder(Path(folder))


def sync(node: NodeFolder) -> str:
    """One call of the node; the rule that refuses it, or nothing."""
    config = load_config(node)

    async def ask() -> str:
        connection = Connection(config.coordinator, KeyStore(node.keys).tls(), rng=rng())
        try:
            await connection.call(connection.rounds.Sync, rounds_pb2.SyncRequest())
        except FederationError as error:
            return str(getattr(error, "rule", error.code))
        finally:
            await connection.close()
        return ""

    return asyncio.run(ask())


def test_a_members_life(desk):
    with served(desk / "fed", governed=True) as door:
        run(*FOUND, "--coordinator", desk / "fed/coordinator/founding.json")
        for person in ADMINS[:2]:
            run("key", "sign", "founding.json", "--key", f"keys/{person}", "--yes")
        run("key", "publish", "founding.json", "--dir", "fed")
        life = Life(door, desk)
        node = life.join("node", "keys/site-b")
        assert sync(node) == ""

        # stopped by the admins' list, and let back in with the same certificate
        life.act("suspend", "site-b", "--ratify", says="suspends site-b")
        assert sync(node) == "trust.member"
        life.act("reinstate", "site-b", says="lets site-b back in")
        assert sync(node) == ""

        # another key speaks for it: the old one makes no node any more
        run("key", "make", "keys/new-b", "--person", "site-b", "--institution", "site-b",
            "--country", "BR")  # fmt: skip
        card = str(card_path(Path("keys/new-b")))
        life.act("keys", "site-b", card, says="changes the keys that speak for site-b")
        with pytest.raises(RefusedError, match="does not name"):
            life.join("again", "keys/site-b")
        assert sync(life.join("again", "keys/new-b")) == ""

        # it leaves, and comes back as a member with that key
        life.act("leave", "site-b", says="records that site-b left")
        assert sync(node) == "trust.member"
        with pytest.raises(RefusedError, match="is left"):
            life.join("third", "keys/new-b")
        life.act("admit", "keys/new-b.card.json", says="admits site-b again")
        assert sync(life.join("third", "keys/new-b")) == ""

        # suspended by two at once, then expelled by three: nothing is left of it
        life.act("suspend", "site-b", "--code", "key-leak", says="denies institution site-b")
        assert sync(NodeFolder(Path("third"))) == "trust.emergency"
        life.act("expel", "site-b", people=ADMINS, says="expels site-b")
        assert sync(NodeFolder(Path("third"))) == "trust.member"
        with pytest.raises(RefusedError, match="expelled"):
            life.join("fourth", "keys/new-b")
        assert read_card(card_path(Path("keys/new-b"))).holder.institution == "site-b"
