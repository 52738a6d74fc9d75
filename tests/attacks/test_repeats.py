"""Doing things twice: two sums or two vectors that differ by what was to be hidden.

Rows of the attack table: replay of a step, retry with a subset (A, then A without u, same x), node
state rolled back, two uploads for one attempt. Four members, t = m = 3.
"""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from coordinator.services import bulk
from coordinator.services import secure_sum as service
from protocols.errors import FederationError
from protocols.gen import bulk_pb2
from protocols.rounds import Released
from protocols.secagg import checks
from protocols.secagg import coordinator as lists
from protocols.secagg import node as machine
from protocols.secagg.messages import AbortCertificate
from protocols.secagg.states import state_from_bytes
from tests.support.hostile import HostileRound, Member, SharedRound, audit, root_of
from tests.support.secure_nodes import STEPS
from tests.support.without import Check, check_attack, layers

LATER = Check(clause="9.1", function=machine._check_may_join, says="is not later than")
DONE = Check(clause="9.4", function=machine._check_may_join, says="it is done with the round")
NO_CERTIFICATE = Check(
    clause="9.3", function=machine._check_may_join, says="signed aborts of it", then="return"
)
QUORUM_OF_ABORTS = Check(
    clause="9.6", function=checks.check_abort_certificate, says="members aborted"
)


def _again_without(play: HostileRound, gone: str, number: int, first: np.ndarray) -> None:
    """Open attempt ``number`` over all but ``gone``; the difference is what ``gone`` sent."""
    play.all("deal", "acknowledge", "mask", "upload", "commit", "reveal", but=(gone,))
    second = play.liar.open_sum(play.others(gone), number)
    assert play.is_plain((first - second) & (play.ring.modulus - 1), [gone])


@layers(LATER, DONE)
def test_the_same_attempt_is_played_again_without_one_node(door, removed, caught):
    """After the sum of all four is open, the coordinator plays attempt 1 from READY again, to
    three. The difference of the two sums is the vector of the fourth.

    Caught by 9.1, for an attempt must be later than the last; behind it stands 9.4, for these
    nodes have committed in the round.
    """

    def attack():
        play = HostileRound(door)
        liar = play.liar
        play.up_to_upload()
        play.all("commit", "reveal")
        first = liar.open_sum(play.nodes)
        for name in play.others("n03"):
            liar.forget_upload(name)
        liar.said.clear()
        for name in play.others("n03"):
            play.nodes[name].rejoin(1)
        _again_without(play, "n03", 1, first)

    check_attack(attack, removed, caught)


@layers(DONE)
def test_the_round_is_tried_again_after_its_sum_was_opened(door, removed, caught):
    """The same as attempt 2, with an abort certificate that the coordinator has not got: 9.4
    alone is in the way, for it comes before any certificate is looked at."""

    def attack():
        play = HostileRound(door)
        play.up_to_upload()
        play.all("commit", "reveal")
        first = play.liar.open_sum(play.nodes)
        for name in play.others("n03"):
            play.nodes[name].rejoin(2)
        _again_without(play, "n03", 2, first)

    check_attack(attack, removed, caught)


@layers(NO_CERTIFICATE, DONE)
def test_the_round_is_tried_again_before_its_first_sum_is_dead(door, removed, caught):
    """n00 has uploaded but not committed; three others open attempt 1, and n00 is told to try
    again. 9.3 refuses: nothing proves that attempt 1 stays closed.

    Behind it stands 9.4: two of those who opened attempt 1 are needed for attempt 2 (quorums meet
    in 2t - n > c members), and they refuse. Without both, the difference is n03's vector.
    """

    def attack():
        play = HostileRound(door)
        play.up_to_upload()
        play.all("commit", "reveal", but=("n00",))
        first = play.liar.open_sum(play.nodes)
        for name in play.others("n03"):
            play.nodes[name].rejoin(2)
        _again_without(play, "n03", 2, first)

    check_attack(attack, removed, caught)


@layers(QUORUM_OF_ABORTS, DONE)
def test_a_certificate_of_too_few_aborts(door, removed, caught):
    """The same with a certificate of one abort, by the colluder n02 that committed as well (c = 1).
    9.6 counts to t; behind it stands 9.4, as before."""

    def attack():
        play = HostileRound(door)
        play.up_to_upload()
        record = play.nodes["n02"].state
        play.all("commit", "reveal", but=("n00",))
        first = play.liar.open_sum(play.nodes)
        colluder = play.nodes["n02"]
        colluder.state = record  # a colluder signs both verdicts
        colluder.abort()
        aborts = play.liar.heard("abort")
        certificate = AbortCertificate(aborts=tuple(aborts.values()))
        for name in play.others("n03"):
            play.nodes[name].rejoin(2, certificate)
        _again_without(play, "n03", 2, first)

    check_attack(attack, removed, caught)


# -- two vectors under one mask ----------------------------------------------------------------


@pytest.mark.parametrize("rolled_back", [False, True], ids=["record-kept", "record-rolled-back"])
def test_the_coordinator_asks_for_another_vector_under_the_same_masks(door, rolled_back):
    """The coordinator says that the bytes were lost, and n03 has trained again meanwhile.

    Caught by 5.4, the masks are gone with the record that the upload replaced; behind it 5.3, no
    other vector is signed. What these rest on is the durable record: when the machine's disk is
    set back to an older state (9.7) the node masks x' as it masked x, and the coordinator has
    x - x'. Afterwards both signed headers convict whoever sent them.
    """
    play = HostileRound(door)
    play.all("ready", "deal", "acknowledge")
    node, liar = play.nodes["n03"], play.liar
    node.state = machine.go(node.state, node.get("go")).state
    older = node.state.to_bytes()
    play.all("mask", "upload")
    first, x = liar.forget_upload("n03"), play.plain(["n03"])
    node.delta = node.delta * np.float32(0.5)

    if not rolled_back:
        with pytest.raises(FederationError, match="cannot take a request for masks") as refused:
            node.encode()
        assert refused.value.code == "wrong_phase"
        with pytest.raises(FederationError, match="fixed another masked vector") as refused:
            machine.upload(node.state, node.key, upload_root="0" * 64, length=1)
        assert refused.value.code == "conflicting_upload"
        return

    node.state = state_from_bytes(older)
    node.mask()
    node.upload()
    ring = play.ring
    difference = (play.residues(first) - play.residues(liar.vector("n03"))) & (ring.modulus - 1)
    assert np.array_equal(difference, (x - play.plain(["n03"])) & (ring.modulus - 1))
    assert difference.any()
    one, two = (m for kind, _, who, m in liar.said if (kind, who) == ("upload", "n03"))
    assert "two different Upload messages" in (lists.conflict(one, two) or "")


SECOND_HEADER = Check(
    clause="5.3",
    function=service.post,
    says="sent a second, different upload",
    marker="sent a second, different",
)
SIGNED_VECTOR = Check(
    clause="5.3",
    function=bulk.check_uploaded,
    says="is not the one that the signed header names",
)


class TwoFaced(Member):
    """Signs the header of one vector and sends another."""

    def mask(self) -> None:
        """The honest header goes out first, then that of the other vector."""
        super().mask()
        self.signed = self.vector
        body = self.state.header.body
        self.vector = bytes([self.vector[0] ^ 1]) + self.vector[1:]
        other = machine.Upload(
            federation=body.federation,
            round=body.round,
            attempt=body.attempt,
            node=body.node,
            ctx=body.ctx,
            upload_root=root_of(self.vector),
            length=len(self.vector),
        )
        self.post("upload", machine.Signed.make(self.key, other).to_bytes())


@layers(SECOND_HEADER, SIGNED_VECTOR)
def test_a_node_sends_two_uploads_for_one_attempt(door, removed, caught):
    """An honest coordinator, a node that signs two headers and sends the second vector.

    Caught by the coordinator: a second, different message is equivocation; behind it, the bytes
    must be those of the header that was kept. Without both the sum opens with a vector that no
    survivor list names, and the auditor is the one to see it.
    """

    def attack():
        play = SharedRound(door, node_type={"n03": TwoFaced})
        play.all(*STEPS)
        row = play.until_open()
        assert isinstance(row.phase, Released)
        assert play.opened_sum() != play.plain_sum(list(play.nodes))
        with pytest.raises(FederationError, match="upload of n03 is not the one it signed"):
            audit(play)

    check_attack(attack, removed, caught)


def test_the_same_messages_twice_are_one(door):
    """Every message and every vector again, as after lost answers: the same receipts, each vector
    in the sum once. Another vector under the same name is not even begun."""
    play = SharedRound(door)
    repeated = 0
    for step in STEPS[: STEPS.index("upload")]:
        play.all(step)
        for node in play.nodes.values():
            again = _may_repeat(node)
            repeated += len(again)
            node.send(machine.Move(state=node.state, send=again, why="again"))
    assert repeated == 4 * 4  # else nothing was tested
    for node in play.nodes.values():
        node.upload()
        assert node.begin_upload().complete
        request = bulk_pb2.FinishUploadRequest(upload_id=node.begin_upload().upload_id)
        receipts = {node.client.bulk.FinishUpload(request, timeout=20).receipt for _ in range(2)}
        assert len(receipts) == 1
    node = play.nodes["n00"]
    kept, node.vector = node.vector, bytes(len(node.vector))
    with pytest.raises(grpc.RpcError, match="announced another upload"):
        node.begin_upload()
    node.vector = kept
    play.all("commit", "reveal")
    play.until_open()
    assert play.opened_sum() == play.plain_sum(list(play.nodes))


def _may_repeat(node: Member) -> tuple:
    """What a node may send again in its state."""
    found = [getattr(node.state, name, None) for name in ("ready", "bundle", "deal_ok", "header")]
    return tuple(message for message in found if message is not None)
