"""Different views: another model, another log, another sum or upload than was agreed.

Rows of the attack table: different models to different nodes, split view of the log, wrong sum
published. Four members, t = m = 3.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.aggregation.release import release
from coordinator.spool import upload_path
from protocols.canonical import hash_hex
from protocols.identifiers import NodeId
from protocols.rounds import Released
from protocols.secagg import checks
from protocols.secagg import node as machine
from protocols.secagg.context import Attempt
from protocols.secagg.dealing import check_bundle
from protocols.secagg.states import AbortSent
from tests.support import hostile
from tests.support.hostile import Complained, HostileRound, Member, SharedRound, audit
from tests.support.secure_nodes import STEPS
from tests.support.without import Check, Rule, check_attack, layers

# -- another model -----------------------------------------------------------------------------

SAME_MODEL = Check(
    clause="3.2", function=checks.check_ready, says="goes by model", marker="goes by"
)
SAME_START = Check(clause="4.1", function=checks.check_deal, says="it was shown another START")
OPENS = Check(clause="4.6", function=check_bundle, says="the packet from n03 does not open")


def _model_forgotten(real):
    """A context that everything but the model goes into."""
    return lambda attempt, bodies: real(replace(attempt, model_root="0" * 64), bodies)


BOUND_MODEL = Rule(
    clause="5",
    function=Attempt.ctx_deal,
    says="",
    target=Attempt,
    name="ctx_deal",
    instead=_model_forgotten,
)


class Misled(Member):
    """Was given another starting model, and trained on it in good faith."""

    def __init__(self, *args):
        super().__init__(*args)
        self.model = hash_hex("a model that tells more about its readers")


@pytest.mark.parametrize(
    ("removed", "caught"),
    [
        pytest.param((), SAME_MODEL, id="all-checks"),
        pytest.param((SAME_MODEL,), SAME_START, id="3.2-away"),
        pytest.param((SAME_MODEL, SAME_START), OPENS, id="3.2+4.1-away"),
        pytest.param((SAME_MODEL, BOUND_MODEL), None, id="3.2+binding-away"),
    ],
)
def test_one_node_is_given_another_model(door, removed, caught):
    """The coordinator hands n03 a crafted model and wants its update of it in the sum.

    Caught by 3.2, READYs name the model that each node derived. Behind it the model is bound into
    ctx_deal: the DEAL of n03 is on another context (4.1), and if that is overlooked its packets do
    not open (4.6), its masks would not cancel (tests/unit/test_secagg_masks.py shows the noise).
    Only a protocol that neither compares nor binds the model sums it up.
    """

    def attack():
        play = HostileRound(door, node_type={"n03": Misled})
        play.all("ready", "deal", "acknowledge")
        for node in play.nodes.values():
            if isinstance(node.state, AbortSent):
                raise Complained(
                    f"the packet from {node.state.complaint.body.against} does not open"
                )
        play.all("mask", "upload", "commit", "reveal")
        assert play.is_plain(play.liar.open_sum(play.nodes), play.nodes)

    check_attack(attack, removed, caught)


# -- another log -------------------------------------------------------------------------------

SAME_CONTEXT = Check(
    clause="4.8", function=checks.check_deal_ok, says="was shown other DEALs or another checkpoint"
)
OWN_CHECKPOINT = Check(
    clause="4.10", function=machine.acknowledge, says="names a checkpoint nobody verified"
)
FORK = b"minga: the log as it is shown to n03 alone\n"


class OnFork(Member):
    """Follows a forked log: its checkpoint is witnessed as far as this node can tell."""

    def acknowledge(self) -> None:
        """DEAL_OK on the checkpoint of its own log."""
        self.send(machine.acknowledge(self.state, self.get("delivery"), self.key, checkpoint=FORK))


def _forked_delivery(play: HostileRound) -> None:
    """DELIVERY for n03 with the fork's checkpoint."""
    told = play.liar.deliveries()[NodeId("n03")]
    play.liar.lie("delivery", replace(told, checkpoint=FORK).to_bytes(), to=["n03"])


def _open_with_all_seeds(play: HostileRound):
    """The sum of all four with every self mask taken off, as if all had been revealed."""
    lanes = sum(play.residues(play.liar.vector(name)) for name in play.nodes)
    return play.liar.strip_lanes(lanes, [node.adder._masks[0] for node in play.nodes.values()])


@layers(SAME_CONTEXT)
def test_one_node_is_kept_on_a_forked_log(door, removed, caught):
    """n03 believes in a fork of the log, with other terms or another roster in it. Caught by 4.8
    before any upload: its DEAL_OK is on another ctx than the others'. Without, masks are made on
    two contexts and what comes out is noise: the sum is lost, no vector is."""

    def attack():
        play = HostileRound(door, node_type={"n03": OnFork})
        play.all("ready", "deal")
        _forked_delivery(play)
        play.all("acknowledge", "mask", "upload")
        assert play.is_noise(_open_with_all_seeds(play), play.nodes)

    check_attack(attack, removed, caught)


def test_on_one_log_the_same_opening_gives_the_sum(door):
    """The oracle above acquits."""
    play = HostileRound(door)
    play.up_to_upload()
    assert play.is_plain(_open_with_all_seeds(play), play.nodes)


def test_a_checkpoint_that_the_node_did_not_verify(door):
    """The same DELIVERY for a node that follows the log: 4.10, before anything is signed."""
    play = HostileRound(door)
    play.all("ready", "deal")
    _forked_delivery(play)
    with pytest.raises(Exception) as refused:
        play.nodes["n03"].acknowledge()
    OWN_CHECKPOINT.recognise(refused.value)


# -- another sum -------------------------------------------------------------------------------

RECOMPUTED = Check(clause="8.5", function=hostile.audit, says="the published sum is not")
SIGNED_UPLOAD = Check(
    clause="8.5",
    function=hostile.audit,
    says="the upload of n01 is not the one it signed",
    marker="is not the one it signed",
)


def _one_off(path):
    """Change one unit of one coordinate of a vector."""
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


@layers(RECOMPUTED)
def test_the_coordinator_publishes_another_sum(door, removed, caught, tmp_path, monkeypatch):
    """The transcript is genuine, the published sum is one off in one coordinate. Caught by 8.5:
    the auditor adds the uploads up again. An auditor that only reads the transcript is deceived."""

    def lying(*, uploads, **rest):
        copies = []
        for path in uploads:
            copy = tmp_path / path.name
            copy.write_bytes(path.read_bytes())
            copies.append(copy)
        _one_off(copies[1])
        return release(uploads=copies, **rest)

    def attack():
        play = SharedRound(door)
        play.all(*STEPS)
        monkeypatch.setattr(door.driver, "_add_up", lying)
        row = play.until_open()
        assert isinstance(row.phase, Released)
        assert play.opened_sum() != play.plain_sum(list(play.nodes))
        hostile.audit(play)

    check_attack(attack, removed, caught)


@layers(SIGNED_UPLOAD)
def test_the_coordinator_exchanges_an_upload(door, removed, caught):
    """n01's vector is changed in the spool before it is added, and handed to the auditor so: the
    sum fits. Caught by 8.5: the vector has not the root that n01 signed."""

    def attack():
        play = SharedRound(door)
        play.all(*STEPS)
        _one_off(upload_path(door.config.spool, play.round, 1, NodeId("n01")))
        row = play.until_open()
        assert isinstance(row.phase, Released)
        assert play.opened_sum() != play.plain_sum(list(play.nodes))
        hostile.audit(play)

    check_attack(attack, removed, caught)


def test_an_honest_sum_passes_the_audit(door):
    """The auditor acquits."""
    play = SharedRound(door)
    play.all(*STEPS)
    play.until_open()
    audit(play)  # raises where something does not hold
    assert play.opened_sum() == play.plain_sum(list(play.nodes))
