"""Reading a log from its first leaf: a good one passes, and each forbidden leaf names its rule."""

from __future__ import annotations

import pytest

from policies.audit.replay import LeafRefusedError, Replay, policy_text, witness_policy
from policies.audit.rounds import opened
from protocols.crypto.signatures import BadSignatureError
from protocols.errors import IntegrityError, MalformedMessageError
from protocols.tlog import kinds
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.leaf import BrokenChainError, ChainHead
from protocols.tlog.merkle import leaf_hash, tree_root
from protocols.tlog.trust_policy import TrustPolicy
from tests.support.leaves import NODES, ORIGIN, PLAN, D, World, key_hex, log_signer, witness_signer

A, B, C, M = NODES


def test_a_whole_log_is_taken_and_has_its_root():
    world = World().begin().round(0).round(1)
    state = world.replay()
    assert state.size == len(world.entries)
    assert state.root == tree_root([leaf_hash(entry) for entry in world.entries])
    (first, second) = state.rounds.values()
    assert [len(r.attempts) for r in (first, second)] == [1, 1]
    assert first.attempts[0].closed_at is not None
    assert set(state.witnesses) == set(NODES)


def test_what_rounds_say_alike_is_kept_once():
    world = World().begin().round(0).round(1)
    first, second = world.replay().rounds.values()
    assert second.plan.plan == PLAN
    assert second.plan.plan is first.plan.plan
    assert (second.plan.index, second.plan_at) != (first.plan.index, first.plan_at)


def test_of_another_plan_nothing_is_taken_over():
    one, true = (World().plan(plan={**PLAN, "rounds": value}) for value in (1, True))
    assert one.plan == true.plan  # to Python; their digests differ
    first = opened(one, index=3, leaf=D["a"], digest=D["a"])
    other = opened(true, index=9, leaf=D["b"], digest=D["b"], before=first)
    assert other.plan.plan["rounds"] is True


def test_an_open_round_too():
    assert World(secure=False).begin().round().replay().size


def test_a_copy_is_tried_out_and_the_original_stays():
    world = World().begin().round(upto="round.start")
    state = world.replay()
    before = (state.size, state.root, dict(state.rounds))
    twin = state.copy()
    twin.take(world.say(A, world.commit(A), **world.subject()))
    assert (state.size, state.root, dict(state.rounds)) == before
    assert twin.size == state.size + 1


def about(world, number=0):
    return world.subject(number)


def _say(who, make, upto, *, number=0, **kwargs):
    """A log up to a kind, and one leaf more that must be refused."""

    def build(world):
        world.begin().round(upto=upto)
        world.say(who, make(world), **{**about(world, number), **kwargs})

    return build


def _aborted(**changes):
    said = {
        "attempt": 1,
        "outcome": "aborted",
        "phase": "Dealing",
        "code": "lost",
        "actor": "coordinator",
    }
    return kinds.RoundAborted(**{**said, **changes})


def _confirm(world, node, **changes):
    at = [i for i, entry in enumerate(world.entries)]
    own = changes.pop("commit", world.hashes[len(at) - 5 + NODES.index(node)])
    said = {"attempt": 1, "node": node, "model_out": D["m1"], "commit": own}
    return kinds.RoundConfirm(**{**said, **changes})


def _listed(world):
    start = len(world.entries) - 3
    return {node: start + place for place, node in enumerate(NODES[:-1])}


REFUSALS = [
    ("log.second_plan", _say("coordinator", lambda w: w.plan(), "round.join")),
    (
        "log.second_plan",
        _say(
            "coordinator",
            lambda w: w.plan(plan=None, request=w.request(plan_sha256=D["a"])),
            "round.join",
            digest=D["a"],
        ),
    ),
    ("log.phase", _say(A, lambda w: w.join(A), "round.plan", number=7)),
    ("log.plan", _say(A, lambda w: w.join(A, plan_sha256=D["a"]), "round.plan")),
    ("log.model_in", _say(A, lambda w: w.join(A, model_in=D["m1"]), "round.plan")),
    ("log.second_answer", _say(A, lambda w: w.join(A), "round.join")),
    (
        "log.second_answer",
        _say(
            A,
            lambda w: kinds.RoundDecline(node=A, plan_sha256=w.plan_sha256, rules=("site.hours",)),
            "round.join",
        ),
    ),
    ("log.second_answer", _say(A, lambda w: w.join(A), "round.start")),
    ("log.ready", _say("coordinator", lambda w: w.start(), "round.plan")),
    ("log.second_start", _say("coordinator", lambda w: w.start(), "round.start")),
    ("log.second_start", _say("coordinator", lambda w: w.start(attempt=2), "round.start")),
    ("log.ctx", _say("coordinator", lambda w: w.start(ctx_deal=None), "round.join")),
    ("log.phase", _say(A, lambda w: w.commit(A), "round.join")),
    ("log.second_commit", _say(A, lambda w: w.commit(A, bytes=7), "update.commit")),
    ("log.ctx", _say(M, lambda w: w.commit(M, ctx=None), "update.commit")),
    ("log.second_commit", _say(A, lambda w: w.commit(A, bytes=9), "round.survivors")),
    (
        "log.survivors",
        _say("coordinator", lambda w: w.survivors({**_listed(w), M: 3}), "update.commit"),
    ),
    (
        "log.survivors",
        _say("coordinator", lambda w: w.survivors(_listed(w), ctx=D["c"]), "update.commit"),
    ),
    (
        "log.dropped",
        _say("coordinator", lambda w: w.survivors(_listed(w), dropped=()), "update.commit"),
    ),
    (
        "log.second_survivors",
        _say(
            "coordinator",
            lambda w: w.survivors({A: len(w.entries) - 4, B: len(w.entries) - 3}),
            "round.survivors",
        ),
    ),
    (
        "log.phase",
        _say("coordinator", lambda w: w.aggregate(w.survivors(_listed(w))), "update.commit"),
    ),
    (
        "log.included",
        _say("coordinator", lambda w: w.aggregate(w.survivors({A: 0, B: 1})), "round.survivors"),
    ),
    (
        "log.threshold",
        _say(
            "coordinator",
            lambda w: w.aggregate(w.survivors(dict.fromkeys(NODES[:-1], 0)), t=2),
            "round.survivors",
        ),
    ),
    (
        "log.transcript",
        _say(
            "coordinator",
            lambda w: w.aggregate(
                w.survivors(dict.fromkeys(NODES[:-1], 0)), transcript_sha256=None
            ),
            "round.survivors",
        ),
    ),
    (
        "log.second_aggregate",
        _say(
            "coordinator",
            lambda w: w.aggregate(w.survivors(dict.fromkeys(NODES[:-1], 0)), model_out=D["m0"]),
            "round.aggregate",
        ),
    ),
    ("log.model_out", _say(A, lambda w: _confirm(w, A, model_out=D["m0"]), "round.aggregate")),
    ("log.own_commit", _say(A, lambda w: _confirm(w, A, commit=None), "round.aggregate")),
    ("log.own_commit", _say(M, lambda w: _confirm(w, M, commit=D["a"]), "round.aggregate")),
    (
        "log.second_verdict",
        _say(
            A,
            lambda w: kinds.RoundObjection(attempt=1, node=A, code="late", model_out=None),
            "round.confirm",
        ),
    ),
    (
        "log.verdicts",
        _say(
            "coordinator",
            lambda w: kinds.RoundClosed(attempt=1, confirmations=(A, B), objections=()),
            "round.confirm",
        ),
    ),
    (
        "log.second_end",
        _say(
            "coordinator",
            lambda w: kinds.RoundClosed(attempt=1, confirmations=NODES[:-1], objections=()),
            "round.closed",
        ),
    ),
    (
        "log.abort_certificate",
        _say("coordinator", lambda w: _aborted(phase="Committing"), "update.commit"),
    ),
    ("log.phase", _say("coordinator", lambda w: _aborted(attempt=0), "round.start")),
    ("log.phase", _say("coordinator", lambda w: _aborted(), "round.aggregate")),
    # who
    ("log.signer", _say(A, lambda w: w.plan(1), "round.plan", number=1)),
    ("log.signer", _say("coordinator", lambda w: w.join(A), "round.plan")),
    ("log.name", _say(A, lambda w: w.join(B), "round.plan")),
    ("log.request", _say("coordinator", lambda w: w.plan(1, request=None), "round.plan", number=1)),
    (
        "log.request",
        _say(
            "coordinator",
            lambda w: w.plan(1, request=w.request(run="r2")),
            "round.plan",
            number=1,
        ),
    ),
    (
        "log.request",
        _say(
            "coordinator",
            lambda w: w.plan(1, request=w.request("coordinator")),
            "round.plan",
            number=1,
        ),
    ),
]


@pytest.mark.parametrize(("rule", "build"), REFUSALS)
def test_refused(rule, build):
    world = World()
    build(world)
    state = Replay()
    for entry in world.entries[:-1]:
        state.take(entry)
    before = (state.size, state.root, dict(state.rounds), dict(state.chains))
    with pytest.raises(LeafRefusedError) as caught:
        state.take(world.entries[-1])
    assert caught.value.rule == rule
    assert (state.size, state.root, dict(state.rounds), dict(state.chains)) == before


def test_a_burned_round_is_over_and_an_aborted_attempt_is_not():
    world = World().begin().round(upto="round.start")
    world.say("coordinator", _aborted(), **world.subject())
    world.say("coordinator", world.start(*NODES[:3], attempt=2), **world.subject())
    assert world.replay().rounds
    world.say("coordinator", _aborted(attempt=2, outcome="burned"), **world.subject())
    state = world.replay()
    assert next(iter(state.rounds.values())).ended is not None
    world.say("coordinator", world.start(*NODES[:3], attempt=3), **world.subject())
    with pytest.raises(LeafRefusedError):
        world.replay()


def test_what_comes_too_late_stands_there_once_and_without_effect():
    """A signer's chain has no holes: what it signed in time must stand somewhere."""
    world = World().begin().round(upto="round.survivors")
    world.say(M, world.commit(M), **world.subject())
    state = world.replay()
    (round_,) = state.rounds.values()
    assert M not in round_.attempts[0].commits
    assert round_.late
    world.say(M, world.commit(M, bytes=9), **world.subject())
    with pytest.raises(LeafRefusedError) as caught:
        world.replay()
    assert caught.value.rule == "log.second_late"


def test_the_tree_that_a_secure_sum_binds():
    world = World().begin().round()
    state = world.replay()
    (round_,) = state.rounds
    at = state.rounds[round_].attempts[0].start
    root = tree_root([leaf_hash(entry) for entry in world.entries[: at + 1]])
    text = Checkpoint(origin=ORIGIN, size=at + 1, root=root).to_text().encode()
    assert state.bound_checkpoint(round_, 1) == text
    assert state.bound_checkpoint(round_, 2) is None


# -- keys --------------------------------------------------------------------------------------


def test_a_node_may_not_speak_before_its_certificate():
    world = World()
    world.genesis()
    world.enrol(A, certify=False)
    world.say("coordinator", world.plan(), **world.subject())
    world.say(A, world.join(A), **world.subject())
    with pytest.raises(BadSignatureError):
        world.replay()


def test_the_first_leaf_must_be_genesis_by_the_key_it_names():
    world = World()
    world.say("coordinator", kinds.Heartbeat(interval_s=3600))
    with pytest.raises(LeafRefusedError):
        world.replay()
    world = World()
    world.genesis(coordinator_key=key_hex("somebody else"))
    with pytest.raises(BadSignatureError):
        world.replay()
    world = World().begin()
    world.genesis()
    with pytest.raises(LeafRefusedError):
        world.replay()


@pytest.mark.parametrize(
    "changes",
    [
        {"request": None},
        {"request": D["a"]},
        {"uri": "spiffe://andes.minga.example/inst/br-univ-1/node/1"},
        {"uri": "spiffe://other.minga.example/inst/ar-univ-1/node/1"},
        {"spki_sha256": D["a"]},
    ],
)
def test_a_certificate_answers_a_request(changes):
    world = World()
    world.genesis()
    world.enrol(A, certify=False)
    world.certify(A, **changes)
    with pytest.raises(LeafRefusedError):
        world.replay()


def test_two_nodes_do_not_share_a_witness_key():
    world = World().begin()
    said = kinds.EnrolRequest(
        institution="uy-univ-1",
        node="uy-univ-1",
        signing_key=key_hex("uy-univ-1"),
        witness_vkey=witness_signer(A).verifier.to_text(),
        csr_sha256=D["a"],
        spki_sha256=D["b"],
    )
    world.say("uy-univ-1", said)
    world.certify(
        "uy-univ-1", spki_sha256=D["b"], uri="spiffe://andes.minga.example/inst/uy-univ-1/node/1"
    )
    with pytest.raises(LeafRefusedError):
        world.replay()


def test_a_retired_key_signs_no_more():
    world = World().begin()
    state = world.replay()
    state.retire(kinds.Role.NODE, A)
    assert A not in state.witnesses
    world.say("coordinator", world.plan(), **world.subject())
    state.take(world.entries[-1])
    with pytest.raises(BadSignatureError):
        state.take(world.say(A, world.join(A), **world.subject()))


def test_a_leaf_that_was_dropped_is_missed_by_the_next():
    world = World().begin().round(upto="round.join")
    del world.entries[-1]
    world.say(M, world.commit(M), **world.subject())
    with pytest.raises(BrokenChainError):
        world.replay()


def test_a_leaf_does_not_stand_twice():
    world = World().begin()
    world.entries.append(world.entries[-1])
    with pytest.raises(LeafRefusedError):
        world.replay()


def test_a_fork_of_a_chain_is_refused():
    world = World().begin().round(upto="round.join")
    world.heads[A] = ChainHead(seq=1, leaf=world.heads[A].leaf)
    world.say(A, world.commit(A), **world.subject())
    with pytest.raises(BrokenChainError):
        world.replay()


def test_after_the_end_nothing_follows():
    world = World().begin()
    end = kinds.LogClosed(next_origin=None, next_vkey=None, reason="year")
    world.say("coordinator", end)
    assert world.replay().closed is not None
    world.say("coordinator", kinds.Heartbeat(interval_s=3600))
    with pytest.raises(LeafRefusedError):
        world.replay()


@pytest.mark.parametrize("cut", range(3))
def test_flipped_bytes_are_refused(cut):
    world = World().begin()
    state = world.replay()
    entry = bytearray(world.say("coordinator", world.plan(), **world.subject()))
    entry[len(entry) * (cut + 1) // 4] ^= 1
    with pytest.raises((IntegrityError, MalformedMessageError)):
        state.take(bytes(entry))


# -- the trust policy of a membership ----------------------------------------------------------


def test_the_policy_of_a_membership():
    state = World().begin().replay()
    log = log_signer().verifier
    policy = witness_policy(log, state.witnesses)
    assert policy.satisfied(set(NODES[:3]))
    assert not policy.satisfied(set(NODES[:2]))
    auditor = witness_signer("auditor-1").verifier
    strict = witness_policy(log, state.witnesses, [auditor])
    assert not strict.satisfied(set(NODES))
    assert strict.satisfied({*NODES[:3], "auditor.1"})
    assert TrustPolicy.parse(policy_text(log, {})).quorum is None
