"""A node watches the log for certificates in its own name that it never asked for."""

from __future__ import annotations

from node_agent.log_store import LogStore
from node_agent.log_verifier import LogVerifier
from policies.audit.replay import Replay, Taken
from protocols.identifiers import NodeId
from protocols.tlog.kinds import CertIssued, EnrolRequest
from tests.support.leaves import World, log_signer


def watched(tmp_path, world: World, mine: set[str]):
    """What the alarm of ``mx-univ-1`` says after reading the world's log."""
    replay, issued = Replay(), []
    for entry in world.entries:
        taken: Taken = replay.take(entry)
        if isinstance(taken.said, CertIssued):
            issued.append(taken)
    store = LogStore(tmp_path / "log.sqlite")
    verifier = LogVerifier(store, log_signer().verifier, now=lambda: 0, node=NodeId("n1"))
    verifier._replay = replay
    verifier._watch(issued, mine, b"checkpoint")
    found = store.alarm()
    store.close()
    return found


def requests(world: World) -> list[str]:
    """Hashes of the requests of n1, in order."""
    replay = Replay()
    taken = [replay.take(entry) for entry in world.entries]
    return [
        each.leaf.hash
        for each in taken
        if isinstance(each.said, EnrolRequest) and each.said.node == "n1"
    ]


def test_its_own_certificates_are_no_alarm(tmp_path):
    world = World()
    world.genesis()
    world.enrol("n1")
    world.enrol("n2")
    assert watched(tmp_path, world, set(requests(world))) is None


def test_a_certificate_for_a_key_it_never_saw_is_an_alarm(tmp_path):
    """Whoever holds the authority's key and writes the log makes a key of its own for n1."""
    world = World()
    world.genesis()
    world.enrol("n1")
    world.enrol("n1")  # another request in its name: not among its own leaves
    first, *_ = requests(world)
    rule, why = watched(tmp_path, world, {first})
    assert rule == "log.certificate"
    assert "did not ask for" in why
