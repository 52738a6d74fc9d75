"""Dealers whose shares are worth nothing: found, named, and nobody else is blamed.

Row of the attack table: bad shares, disruption by members. The coordinator is honest and drives the
round; n03 deals badly. Four members, t = m = 3.
"""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest

from protocols import outer_step
from protocols.errors import IntegrityError
from protocols.rounds import Burned, Dealing, Released, Revealing
from protocols.secagg import checks, dealing, packets, unmask
from protocols.secagg.keys import AttemptKeys
from protocols.secagg.messages import DealBundle, Packet, Signed
from protocols.secagg.states import AbortSent
from protocols.tensors import metrics
from protocols.tlog.merkle import tree_root
from tests.support.hostile import Complained, Member, SharedRound
from tests.support.secure_nodes import STEPS
from tests.support.without import Check, check_attack, layers, without

AS_COMMITTED = Check(
    clause="4.6",
    function=packets.unseal,
    says="the b share of n03 is not the one it committed to",
    marker="check_opening(held.opening(kind)",
)
AS_DEALT = Check(
    clause="8.1",
    function=checks.check_reveal,
    says="the b share of n03 is not the one it committed to",
    marker="check_opening(",
)
RIGHT_SEED = Check(
    clause="8.3",
    function=unmask.check_secret,
    says="the b shares that n03 dealt do not open",
    marker="the opened self seed of",
)


class DealsOneBadShare(Member):
    """Seals for n00 another b share than the one under its share_root."""

    def deal(self) -> None:
        """DEAL with one bad packet, properly signed."""
        super().deal()
        started = self.state.started()
        keys = AttemptKeys.derive(self.state.seed, self.state.attempt, self.name)
        own, to = started.indices[self.name], started.indices["n00"]
        held = dealing._shares(started, self.name, keys).held[to]
        bad = replace(held, b_share=held.b_share[:-1] + bytes([held.b_share[-1] ^ 1]))
        packet = packets.seal(
            bad, started.ctx_deal, keys, started.readys["n00"].ek, dealer=own, to=to
        )
        sealed = {p.to: p.sealed for p in self.state.bundle.packets} | {"n00": packet}
        root = tree_root(checks.packet_leaves(self.name, sealed, started)).hex()
        body = replace(self.state.bundle.deal.body, packets_root=root)
        self.bundle = DealBundle(
            deal=Signed.make(self.key, body),
            packets=tuple(Packet(to=name, sealed=sealed[name]) for name in sorted(sealed)),
        )
        self.state = replace(self.state, bundle=self.bundle)

    def post(self, kind, body):
        """Hold the honest DEAL back."""
        return None if kind == "deal" else super().post(kind, body)


@layers(AS_COMMITTED, AS_DEALT)
def test_a_share_other_than_the_committed_one(door, removed, caught):
    """n03 seals a bad b share for n00. Caught by 4.6: n00 complains, and anybody can open the
    packet with the EK that it gives and see that n03 is at fault.

    Without 4.6 the bad share shows when n00 reveals it (8.1), and honest n00 is blamed. Without
    both, b of n03 comes out wrong.
    """

    def attack():
        play = SharedRound(door, node_type={"n03": DealsOneBadShare})
        play.all("join", "ready", "deal")
        bad = play.nodes["n03"]
        Member.post(bad, "deal", bad.bundle.to_bytes())
        play.nodes["n00"].acknowledge()
        if isinstance(play.nodes["n00"].state, AbortSent):
            assert play.nodes["n00"].state.complaint.body.against == "n03"
            raise Complained("the b share of n03 is not the one it committed to")
        play.all("acknowledge", but=("n00",))
        play.all("mask", "upload", "commit")
        assert isinstance(play.phase, Revealing)
        play.nodes["n00"].reveal()
        play.all("reveal", but=("n00", "n03"))
        row = play.until_open()
        assert isinstance(row.phase, Burned)
        assert "n03 dealt do not open" in row.phase.reason

    check_attack(attack, removed, caught)


def test_the_dealer_is_dropped_and_the_others_go_on(door):
    """What follows the complaint: attempt 2 without n03, with fresh keys, and a sum of three."""
    play = SharedRound(door, node_type={"n03": DealsOneBadShare})
    play.all("join", "ready", "deal")
    bad = play.nodes["n03"]
    Member.post(bad, "deal", bad.bundle.to_bytes())
    play.nodes["n00"].acknowledge()
    phase = play.phase
    assert isinstance(phase, Dealing)
    assert (phase.attempt, sorted(phase.ready)) == (2, ["n00", "n01", "n02"])
    play.all("next_attempt", *STEPS[2:], but=("n03",))
    play.until_open()
    assert play.opened_sum() == play.plain_sum(["n00", "n01", "n02"])


def test_without_the_check_an_honest_node_is_blamed(door):
    """Why 4.6 is there: see the test before last, at the coordinator's door."""
    play = SharedRound(door, node_type={"n03": DealsOneBadShare})
    with without(AS_COMMITTED):
        play.all("join", "ready", "deal")
        bad = play.nodes["n03"]
        Member.post(bad, "deal", bad.bundle.to_bytes())
        play.all("acknowledge", "mask", "upload", "commit")
        with pytest.raises(grpc.RpcError) as refused:
            play.nodes["n00"].reveal()
    assert dict(refused.value.trailing_metadata())["minga-code"] == "bad_share"
    reveal = play.nodes["n00"].state.reveal
    listed = door.ledger(lambda tx: play.summed()(tx).listed())
    with pytest.raises(checks.BadShareError) as blamed:
        checks.check_reveal(reveal, listed)
    assert blamed.value.culprit == "n00"


class DealsAnotherSeed(Member):
    """Deals good shares of a secret that is not the b it commits to and masks with."""

    def deal(self) -> None:
        """DEAL in which everything fits but the secret itself."""
        super().deal()
        started = self.state.started()
        keys = AttemptKeys.derive(self.state.seed, self.state.attempt, self.name)
        other = dealing.make_bundle(
            started, self.name, replace(keys, self_seed=bytes(32)), self.key
        )
        commitment = self.state.bundle.deal.body.seed_commitment
        body = replace(other.deal.body, seed_commitment=commitment)
        self.bundle = replace(other, deal=Signed.make(self.key, body))
        self.state = replace(self.state, bundle=self.bundle)

    def acknowledge(self) -> None:
        """DEAL_OK, whatever its own share looks like."""
        keys = AttemptKeys.derive(self.state.seed, self.state.attempt, self.name)
        wrong = replace(keys, self_seed=bytes(32))
        real = dealing._shares
        dealing._shares = lambda started, node, own: real(
            started, node, wrong if node == self.name else own
        )
        try:
            super().acknowledge()
        finally:
            dealing._shares = real

    def post(self, kind, body):
        """Hold the honest DEAL back."""
        return None if kind == "deal" else super().post(kind, body)


# What no honest sum can be, protocols/spec/vector.md 6.3, 8.2 and 8.3: sees noise, names nobody.
LIMBS = Check(
    clause="vector 6.3",
    function=metrics.decode_metrics,
    says="is not one that 4 nodes can send",
    marker="is not one that",
)
COUNT = Check(clause="vector 8.2", function=outer_step._read_metrics, says="the sum counts")
WEIGHT = Check(clause="vector 8.2", function=outer_step._check_weight, says="cannot sum to")
RANGE = Check(clause="vector 8.3", function=outer_step._Job._mean, says="updates reach at most")


@pytest.mark.parametrize(
    ("removed", "caught"),
    [
        pytest.param((), RIGHT_SEED, id="all-checks"),
        pytest.param((RIGHT_SEED,), LIMBS, id="8.3-away"),
        pytest.param((RIGHT_SEED, LIMBS, COUNT, WEIGHT, RANGE), None, id="8.3+vector-away"),
    ],
)
def test_shares_of_another_secret_than_the_committed_one(door, removed, caught):
    """Every share is as committed, so nobody can complain; together they give a seed that n03 did
    not mask with. Caught by 8.3 and 8.4: the round is burned and n03 is named.

    Without 8.3 a stray mask stays on the sum, which then is none that four nodes can send: the
    round is burned, but nobody is named. Without that line either, the noise is published.
    """

    def attack():
        play = SharedRound(door, node_type={"n03": DealsAnotherSeed})
        play.all("join", "ready", "deal")
        bad = play.nodes["n03"]
        Member.post(bad, "deal", bad.bundle.to_bytes())
        play.all(*STEPS[3:])
        row = play.until_open()
        if isinstance(row.phase, Burned):
            raise IntegrityError(row.phase.reason)
        assert isinstance(row.phase, Released)
        assert play.opened_sum() != play.plain_sum(list(play.nodes))

    check_attack(attack, removed, caught)
