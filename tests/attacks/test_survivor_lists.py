"""Hostile survivor lists: the coordinator says who is alive, and must gain nothing by lying.

Rows of the attack table: fake dropouts, inconsistent survivor sets, tiny set, set of one. Four
members, any three open a sum (t = m = 3), unless a test says otherwise.
"""

from __future__ import annotations

import pytest

from protocols.errors import FederationError
from protocols.secagg import checks
from protocols.secagg import node as machine
from protocols.secagg.masks import node_masks
from protocols.secagg.messages import CommitCertificate
from protocols.secagg.packets import Kind
from protocols.secagg.states import Uploaded
from tests.support.hostile import HostileRound
from tests.support.without import Check, Rule, check_attack, layers

LIST_SIZE = Check(clause="6.3", function=checks.check_survivors, says="the survivor list has")
OWN_HEADER = Check(
    clause="6.2", function=machine.commit, says="the survivor list lacks this node's upload"
)
QUORUM = Check(clause="7.1", function=checks.check_commit_certificate, says="survivors committed")
SAME_LIST = Check(
    clause="7.1", function=checks.check_commit, says="committed to another survivor list"
)


def _forgetful(real):
    """Works on from a copy of its record before the verdict: nothing is remembered or erased."""
    before = {}

    def commit(state, survivors, key):
        if isinstance(state, Uploaded):
            before[state.node] = state
        return real(before[state.node], survivors, key)

    return commit


ONE_VERDICT = Rule(
    clause="6.4",
    function=machine.commit,
    says="cannot take SURVIVORS",
    target=machine,
    name="commit",
    instead=_forgetful,
)


@layers(ONE_VERDICT)
def test_a_live_node_is_called_dead_after_its_seed_was_opened(door, removed, caught):
    """Once all have revealed b of everybody, a list without n03 asks them for its RK as well.

    Caught by 6.4, one verdict in an attempt; with it goes the erasure of 7.3, for both are the
    one record that a verdict replaces. Without: both secrets of n03, and its plain vector.
    """

    def attack():
        play = HostileRound(door)
        liar, others = play.liar, play.others("n03")
        play.up_to_upload()
        play.all("commit", "reveal")
        liar.lie("survivors", liar.list_of(others), to=others)
        play.all("commit", "reveal", but=("n03",))
        found = liar.open_one(
            liar.agreed(),
            "n03",
            liar.vector("n03"),
            b=liar.secret("n03", Kind.SEED),
            rk=liar.secret("n03", Kind.KEY),
        )
        assert play.is_plain(found, ["n03"])

    check_attack(attack, removed, caught)


def test_the_same_between_commit_and_reveal(door):
    """6.4 again, while the shares are still there: the second list is equivocation."""
    play = HostileRound(door)
    play.up_to_upload()
    play.all("commit")
    play.liar.lie("survivors", play.liar.list_of(play.others("n03")), to=play.nodes)
    with pytest.raises(FederationError, match="committed to another list") as refused:
        play.nodes["n00"].commit()
    assert refused.value.code == "equivocation"


def test_who_is_called_dead_from_the_start_stays_under_its_seed(door):
    """The censored vector: RK of n03 opens, b does not, and y stays uniform under b (7.2).

    Censorship shows: n03's signed header was handed in, and n03 refuses the list (6.2).
    """
    play = HostileRound(door)
    liar, others = play.liar, play.others("n03")
    play.up_to_upload()
    liar.lie("survivors", liar.list_of(others), to=play.nodes)
    with pytest.raises(FederationError) as refused:
        play.nodes["n03"].commit()
    OWN_HEADER.recognise(refused.value)
    play.all("commit", "reveal", but=("n03",))
    assert play.is_plain(liar.open_sum(others), others)

    with pytest.raises(FederationError, match="0 shares"):
        liar.secret("n03", Kind.SEED)
    own, *pairs = play.nodes["n03"].adder._masks
    agreed, rk = liar.agreed(), liar.secret("n03", Kind.KEY)
    known = node_masks(agreed.ctx, index=4, self_seed=bytes(32), rk_secret=rk, rks=agreed.rks)
    assert known[1:] == pairs  # all its pair masks are known by now
    masked = liar.vector("n03")
    assert play.is_noise(liar.strip(masked, pairs), ["n03"])
    assert play.is_plain(liar.strip(masked, [own, *pairs]), ["n03"])  # only b was missing


@pytest.mark.parametrize(
    ("removed", "caught", "mixed"),
    [
        pytest.param((), QUORUM, False, id="own-commits-only"),
        pytest.param((), SAME_LIST, True, id="commits-of-its-members"),
        pytest.param((QUORUM,), None, False, id="7.1-quorum-away"),
        pytest.param((SAME_LIST,), None, True, id="7.1-same-list-away"),
    ],
)
def test_every_node_is_shown_another_list(door, removed, caught, mixed):
    """Five members, t = m = 3, nobody colludes: each sees three survivors, two open in truth.

    Each of n02, n03, n04 is dead on three lists or more, so RK of all three opens, though no list
    of two was ever shown (at n = 33 the same leaves 17 of 22). Caught by 7.1, whether the
    certificate holds the few commits to this list, or those of its members to whatever list.
    Both secrets of one node are out of reach even so, by 2t > n + c.
    """

    def attack():
        play = HostileRound(door, n=5, threshold=3, colluders=0, min_surviving=3)
        liar, pair = play.liar, ["n00", "n01"]
        play.up_to_upload()
        third = {"n00": "n04", "n01": "n03", "n02": "n02", "n03": "n03", "n04": "n04"}
        for name, alive in third.items():
            liar.lie("survivors", liar.list_of([*pair, alive]), to=[name])
        play.all("commit")
        if mixed:
            commits = liar.heard("commit")
            for name, alive in third.items():
                theirs = tuple(commits[n] for n in sorted({*pair, alive}))
                liar.lie("commits", CommitCertificate(commits=theirs).to_bytes(), to=[name])
        play.all("reveal")
        assert play.is_plain(liar.open_sum(pair), pair)

    check_attack(attack, removed, caught)


@layers(LIST_SIZE)
def test_a_list_shorter_than_the_plan_allows(door, removed, caught):
    """The plan opens no sum of fewer than five; the coordinator lists four. t = 4 would commit,
    so 6.3 alone is in the way."""

    def attack():
        play = HostileRound(door, n=5, min_surviving=5, min_participants=5)
        liar, four = play.liar, play.others("n04")
        play.up_to_upload()
        liar.lie("survivors", liar.list_of(four), to=four)
        play.all("commit", "reveal", but=("n04",))
        assert play.is_plain(liar.open_sum(four), four)

    check_attack(attack, removed, caught)


@layers(LIST_SIZE, OWN_HEADER, QUORUM)
def test_a_list_of_one(door, removed, caught):
    """The coordinator lists n03 alone: its sum would be its vector.

    Three lines: n03 refuses the size (6.3), the others a list without themselves (6.2), and
    whoever is left a certificate with one commit (7.1). Without all three the vector is plain.
    """

    def attack():
        play = HostileRound(door)
        liar = play.liar
        play.up_to_upload()
        liar.lie("survivors", liar.list_of(["n03"]), to=play.nodes)
        play.nodes["n03"].commit()
        play.all("commit", but=("n03",))
        only = liar.commits_to(liar.shown["n03", 1])[-1:]
        liar.lie("commits", CommitCertificate(commits=only).to_bytes(), to=play.nodes)
        play.all("reveal")
        assert play.is_plain(liar.open_sum(["n03"]), ["n03"])

    check_attack(attack, removed, caught)
