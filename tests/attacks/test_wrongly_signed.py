"""Enough people signed, and it is refused all the same: at publishing, and by every node.

The real services over mutual TLS. The coordinator refuses to publish it; a coordinator that serves
it nevertheless is refused by the node's own client (tuf's, and what we check beyond it).
"""

from __future__ import annotations

import grpc
import pytest

from infra.admin import acts
from infra.admin.keys import make_key
from protocols.errors import FederationError
from protocols.gen import trust_pb2
from protocols.governance.errors import TrustRefusedError
from protocols.governance.keys import Holder
from protocols.identifiers import NodeId
from tests.attacks.test_governed_nodes import Node, plan, serve
from tests.support.door import served
from tests.support.trust import NOW, World
from tests.support.wrongly_signed import ATTACKS, an_admin_who_is_auditor


@pytest.fixture(scope="module")
def founded(tmp_path_factory):
    """A founded federation; nothing that is tried here changes it."""
    with served(tmp_path_factory.mktemp("wrong"), governed=True) as door:
        world = World()
        world.found_at(door)
        yield door, world


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_coordinator_does_not_publish_it(founded, name):
    door, world = founded
    rule, attack = ATTACKS[name]
    before = door.parts.trust.file("metadata/timestamp.json")
    message = trust_pb2.PublishTrustRequest(files=attack(world))

    with pytest.raises(grpc.RpcError) as caught:
        door.operator().trust.Publish(message, timeout=20)

    found = dict(caught.value.trailing_metadata() or ())
    assert rule in (found.get("minga-rule"), found.get("minga-code")), caught.value
    assert door.parts.trust.file("metadata/timestamp.json") == before


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_node_does_not_take_it_from_a_coordinator_that_serves_it(founded, name, tmp_path):
    door, world = founded
    rule, attack = ATTACKS[name]
    honest = dict(door.parts.trust._files)
    node = Node(door, tmp_path / "nodes")
    node.refresh()
    refresh = door.parts.trust.refresh_from_disk
    try:
        serve(door, world.publish(attack(world)))
        with pytest.raises(FederationError) as caught:
            node.refresh()
        found = {getattr(caught.value, "rule", None), caught.value.code}
        assert rule in found, caught.value
        assert node.trust.refusal_for(plan()) is not None  # and nothing is joined meanwhile
        assert node.trust.state.versions == world.state.versions  # what held before still does
    finally:
        serve(door, honest)
        door.parts.trust.refresh_from_disk = refresh


def test_an_admin_does_not_sign_a_list_that_mixes_duties(founded, tmp_path):
    """Refused before anything is signed, on the admin's own machine."""
    _, world = founded
    request = tmp_path / "people.request"
    acts.write_request(request, an_admin_who_is_auditor(world))
    holder = Holder(person="ana", institution=NodeId("ar-univ-1"), country="AR")
    make_key(tmp_path / "ana", holder, "correct horse")

    with pytest.raises(TrustRefusedError) as caught:
        acts.sign(
            request,
            tmp_path / "ana",
            root=world.files["metadata/1.root.json"],
            secret=lambda: "correct horse",
            module=None,
            confirm=lambda _: pytest.fail("nobody is asked to sign this"),
            now=NOW,
        )
    assert caught.value.rule == "trust.duties"
    assert not list(tmp_path.glob("*.sig.json"))
