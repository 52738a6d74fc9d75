"""Trust policies, the arithmetic of quorums, and the ratchet of the log."""

from __future__ import annotations

import pytest

from protocols.crypto.signatures import BadSignatureError
from protocols.errors import MalformedMessageError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.tlog.note import Note
from protocols.tlog.proofs import make_consistency
from protocols.tlog.ratchet import ForkError, check_may_sign, check_start
from protocols.tlog.trust_policy import (
    FRESH_S,
    QuorumError,
    TrustPolicy,
    accept_checkpoint,
    least_quorum,
    split_view_is_impossible,
)
from tests.support.tlog import NOW, big_tree, head_of, policy_text, signed, witness_vectors

VECTORS = witness_vectors()["trust_policy"]
QUORUM = witness_vectors()["quorum"]


@pytest.mark.parametrize("row", VECTORS["accept"], ids=lambda row: row["name"])
def test_policies(row):
    policy = TrustPolicy.parse(row["text"].encode())
    for names, want in row["cosigned_and_result"]:
        assert policy.satisfied(set(names)) is want
    assert policy.satisfied({"a stranger"}) is (policy.quorum is None)


@pytest.mark.parametrize("row", VECTORS["refuse"], ids=lambda row: row["why"])
def test_policies_that_are_refused(row):
    with pytest.raises(MalformedMessageError):
        TrustPolicy.parse(row["text"].encode())


BASE = policy_text("")


@pytest.mark.parametrize(
    "tail",
    [
        b"quorum w1",  # no newline
        b"quorum w1 # comment\n",
        b"group g all w1 w2 # comment\nquorum g\n",
        b"group # any w1\nquorum #\n",
        b"group g 01 w1\nquorum g\n",
        b"group g ALL w1\nquorum g\n",
        b"group g any g\nquorum g\n",
        b"witness none witness.x.example/w1+00000000+AAAA\nquorum w1\n",
        b"quorum w1\x00\n",
        b"quorum \xff\n",
        b"quorum\n",
        b"log\nquorum w1\n",
        b"QUORUM w1\n",
        b"group g 99999999999999999999 w1\nquorum g\n",
    ],
)
def test_more_policies_that_are_refused(tail):
    assert TrustPolicy.parse(BASE + b"quorum w1\n").quorum == "w1"
    with pytest.raises(MalformedMessageError):
        TrustPolicy.parse(BASE + tail)


def test_the_refused_policies_convict_a_reader_that_forgets_members(monkeypatch):
    """Without the rule, a witness that is a member of two groups counts twice."""
    from protocols.tlog import trust_policy

    row = next(r for r in VECTORS["refuse"] if r["why"] == "member of two groups")
    monkeypatch.setattr(trust_policy, "set", _Forgetful, raising=False)
    assert TrustPolicy.parse(row["text"].encode()).satisfied({"w1"})


class _Forgetful(set):
    def add(self, _item):
        pass


def test_a_quorum_line_cannot_be_forgotten_in_a_file_of_comments():
    with pytest.raises(MalformedMessageError, match="no quorum line"):
        TrustPolicy.parse(b"# quorum w1\n")


# -- acceptance ----------------------------------------------------------------------------------

POLICY = TrustPolicy.parse(policy_text())


def test_a_checkpoint_with_a_quorum_says_who_and_when():
    accepted = accept_checkpoint(POLICY, signed(600, "w4", "w1", "w2").to_bytes(), now=NOW)
    assert dict(accepted.times) == {"w1": NOW, "w2": NOW, "w4": NOW}
    assert accepted.opened.checkpoint == head_of(600)


def test_too_few_or_repeated_witnesses_are_no_quorum():
    with pytest.raises(QuorumError, match="w1, w2"):
        accept_checkpoint(POLICY, signed(600, "w1", "w2").to_bytes(), now=NOW)
    note = signed(600, "w1", "w2", "w2")
    with pytest.raises(QuorumError):
        accept_checkpoint(POLICY, note.to_bytes(), now=NOW)
    with pytest.raises(QuorumError, match="nobody"):
        accept_checkpoint(POLICY, signed(600).to_bytes(), now=NOW)


def test_witnesses_do_not_replace_the_log():
    note = signed(600, "w1", "w2", "w3")
    bare = Note(text=note.text, signatures=note.signatures[1:])
    with pytest.raises(BadSignatureError, match="of the log"):
        accept_checkpoint(POLICY, bare.to_bytes(), now=NOW)


def test_a_quorum_goes_stale_after_a_day():
    data = signed(600, "w1", "w2", "w3").to_bytes()
    accept_checkpoint(POLICY, data, now=NOW + FRESH_S, fresh_s=FRESH_S)
    accept_checkpoint(POLICY, data, now=NOW + FRESH_S + 1)
    with pytest.raises(QuorumError, match="no quorum of the last 86400 s"):
        accept_checkpoint(POLICY, data, now=NOW + FRESH_S + 1, fresh_s=FRESH_S)


# -- arithmetic ----------------------------------------------------------------------------------


def test_the_least_quorum():
    for n, k in QUORUM["min_k_when_m_equals_k"].items():
        assert least_quorum(int(n)) == k
        assert split_view_is_impossible(witnesses=int(n), honest=k, quorum=k)
        assert not split_view_is_impossible(witnesses=int(n), honest=k - 1, quorum=k - 1)
    with pytest.raises(ValueError, match="witness"):
        least_quorum(0)


def test_nine_of_which_seven():
    row = QUORUM["nine_of_which_seven"]
    n, k, bad = row["n"], row["k"], row["dishonest_tolerated_for_split_view"]
    assert n - k == row["may_be_unavailable"]
    assert split_view_is_impossible(witnesses=n, honest=n - bad, quorum=k)
    assert not split_view_is_impossible(witnesses=n, honest=n - bad - 1, quorum=k)


# -- 11: a restored backup -----------------------------------------------------------------------


def test_11_a_log_from_a_backup_may_not_sign():
    last, backup = head_of(600), head_of(257)

    with pytest.raises(ForkError, match="size 600 was signed"):
        check_may_sign(last, backup, ())
    forged = Checkpoint(origin=last.origin, size=700, root=bytes(32))
    with pytest.raises(ForkError, match="does not extend"):
        check_may_sign(last, forged, make_consistency(big_tree(), 600, 700))
    same_size = Checkpoint(origin=last.origin, size=600, root=bytes(32))
    with pytest.raises(ForkError, match="does not extend"):
        check_may_sign(last, same_size, ())
    with pytest.raises(ForkError, match="not of"):
        check_may_sign(last, head_of(700, "log.minga.example/other"), ())
    with pytest.raises(ForkError, match="one root only"):
        check_may_sign(None, Checkpoint(origin="x", size=0, root=bytes(32)), ())

    check_may_sign(last, head_of(700), make_consistency(big_tree(), 600, 700))
    check_may_sign(last, last, ())
    check_may_sign(None, head_of(5), ())
    check_may_sign(Checkpoint(origin=last.origin, size=0, root=EMPTY_ROOT), last, ())


def test_11_a_log_asks_the_witnesses_before_it_starts():
    own = head_of(257)
    check_start(own, [head_of(257), head_of(5), head_of(0)], need=3)
    with pytest.raises(ForkError, match="size 600"):
        check_start(own, [head_of(257), head_of(600), head_of(5)], need=3)
    with pytest.raises(ForkError, match="another root"):
        check_start(own, [Checkpoint(origin=own.origin, size=257, root=bytes(32))], need=1)
    with pytest.raises(ForkError, match="1 witnesses answered, 3"):
        check_start(own, [own], need=3)
    with pytest.raises(ForkError, match="not of"):
        check_start(own, [head_of(5, "log.minga.example/other")], need=1)
