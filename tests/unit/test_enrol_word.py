"""A node's keys stand in the log with the word of its institution; nobody is certified without."""

from __future__ import annotations

import pytest

from policies.audit.approvals import approval_of
from policies.audit.replay import LeafRefusedError
from protocols.canonical import sha256_hex
from protocols.governance.approval import Statement, approve
from protocols.identifiers import FederationId
from protocols.tlog import kinds
from protocols.tlog.leaf import key_id_of
from tests.support.leaves import World, key, key_hex
from tests.unit.test_statements import published

FEDERATION = FederationId("andes")


def vouched(node="br-univ-1", *, by=None, **changes):
    """A request of a node, approved by a key; ``changes`` are made after it was signed."""
    csr = b"request of " + node.encode()
    statement = Statement(
        federation=FEDERATION,
        institution=node,
        node="1",
        signing_key=key_hex(f"fresh {node}"),
        csr_sha256=sha256_hex(csr),
        spki_sha256=sha256_hex(node.encode()),
        approved_at="2026-12-01T00:00:00Z",
    )
    said = kinds.EnrolRequest(
        institution=node,
        node=node,
        signing_key=statement.signing_key,
        witness_vkey=None,
        csr_sha256=statement.csr_sha256,
        spki_sha256=statement.spki_sha256,
        approval=approval_of(approve(statement, key(by or f"institution {node}")).to_bytes()),
    )
    return said.model_copy(update=changes)


@pytest.mark.parametrize(
    ("said", "fails"),
    [
        (vouched(), None),
        (vouched(by="coordinator"), "does not name"),
        (vouched(by="institution ar-univ-1"), "does not name"),
        (vouched(signing_key=key_hex("mallory")), "not signed by its key"),
        (vouched(approval=None), "carries no approval"),
    ],
)
def test_nobody_is_certified_without_the_word_of_its_institution(said, fails):
    """Once the log knows the institutions' keys: also the coordinator cannot."""
    world = World().begin()
    published(
        world,
        institution={
            name: (key_hex(f"institution {name}"),) for name in ("ar-univ-1", "br-univ-1")
        },
    )
    signer = "mallory" if said.signing_key == key_hex("mallory") else f"fresh {said.node}"
    world.say(signer, said)
    world.certify(said.node)
    if fails is None:
        assert world.replay().holders[key_id_of(bytes.fromhex(said.signing_key))].name == said.node
        return
    with pytest.raises(LeafRefusedError, match=fails) as caught:
        world.replay()
    assert caught.value.rule == "log.approval"


def test_a_renewal_needs_no_new_word():
    world = World().begin()
    published(world, institution={"br-univ-1": (key_hex("institution br-univ-1"),)})
    world.enrol("br-univ-1")
    world.replay()
