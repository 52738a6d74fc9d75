"""What a node checks in a secure sum, and what it never does twice."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from node_agent.contribution import check_pinned, record_of_fixed, upload_name
from node_agent.decide import SayReady, SecureStep, decide, forgotten, lost_state
from node_agent.journal import Journal
from node_agent.records import UploadRecord
from node_agent.secure import SecureSum, check_own_part, check_roster, dither_seed
from node_agent.secure_state import RANK, SecureKnown, SecureStates, outline
from node_agent.view import View
from protocols.errors import (
    CorruptStateError,
    DigestMismatchError,
    EquivocationError,
    NotFoundError,
    WrongPhaseError,
)
from protocols.identifiers import NodeId, RoundId, RunId
from protocols.rounds import Released, Training
from protocols.secagg import node as machine
from protocols.secagg.verify import verify_transcript
from protocols.tensors.units import blob_digest
from protocols.upload import UploadHeader
from tests.support.node import FIRST, ME, NOW, ROUND, round_seen, run_seen, the_plan, uploaded
from tests.support.secagg import identity, make_attempt, seed_of
from tests.support.secagg_stages import A, B, C, D, at
from tests.unit.test_node_contribution import KEY, MANIFEST, make, work
from tests.unit.test_node_contribution import the_plan as plan_of_vectors
from tests.unit.test_node_decide_secure import (
    ALL,
    CLOSES,
    JUST_ME,
    OTHERS,
    SECURE,
    SECURE_TERMS,
    committing,
    dealing,
    revealing,
    secure,
    uploading,
)

STAGES = tuple(RANK)
RUN = RunId("run-1")
ATTEMPT = make_attempt(4)

# -- a state that was lost or rolled back ----------------------------------------------------------

# Per stage of the state on disk: . goes on, L lost or rolled back, g this node gave the attempt up
MATRIX = [  # ready dealt agreed masking fixed committed revealed aborted closed
    (dealing(), ". . . . . . . g g"),
    (dealing(dealt=JUST_ME), "L . . . . . . g g"),
    (dealing(dealt=ALL, agreed=JUST_ME), "L L . . . . . g g"),
    (uploading(), "L L . . . . . g g"),
    (uploading(received=JUST_ME), "L L L L . . . g g"),
    (committing(), "L L L L . . . . g"),
    (committing(survivors=OTHERS), "L L . . . . . . g"),
    (committing(commits=JUST_ME), "L L L L L . . . g"),
    (revealing(commits=OTHERS), "L L L L . . . g g"),
    (revealing(commits=OTHERS, survivors=OTHERS), "L L . . . . . g g"),
    (revealing(), "L L L L L . . g g"),
    (revealing(revealed=JUST_ME), "L L L L L L . g g"),
]


@pytest.mark.parametrize(("phase", "row"), MATRIX)
def test_every_stage_against_everything_that_can_be_shown(phase, row):
    found = []
    for stage in STAGES:
        decision = lost_state(secure(phase, stage), ROUND, phase)
        if decision is None:
            found.append(".")
        else:
            assert decision.actions == ()
            found.append("L" if "secagg.state_lost" in decision.why else "g")

    assert " ".join(found) == row


def said(stage, *, attempt=1, round_=ROUND):
    return SecureKnown(round=round_, attempt=attempt, stage=stage)


@pytest.mark.parametrize(("stage", "journal"), list(itertools.product(STAGES[:7], repeat=2)))
def test_the_journal_alone_finds_a_state_that_was_rolled_back(stage, journal):
    """The coordinator shows nothing of this node: it may be lying, or have forgotten."""
    s = secure(dealing(), stage, said=said(journal))

    lost = lost_state(s, ROUND, dealing())

    assert (lost is not None) == (RANK[stage] < RANK[journal])


@pytest.mark.parametrize("stage", ["agreed", "masking"])
def test_a_vector_in_the_journal_tells_of_a_lost_state(stage):
    for number, lost in ((1, True), (2, False)):
        phase = uploading(attempt=number)
        upload = uploaded(attempt=1) if number == 1 else None
        s = secure(phase, stage, attempt=number, upload=upload)

        assert (lost_state(s, ROUND, phase) is not None) == lost


def test_an_old_attempt_is_found_by_the_journal():
    s = secure(dealing(attempt=2), "dealt", said=said("ready", attempt=2))

    assert "secagg.state_lost" in decide(s).why
    assert decide(secure(dealing(attempt=2), "dealt", said=said("dealt"))).actions == (
        SecureStep(ROUND, 2, "ready"),
    )


TRAINING = Training(terms=SECURE_TERMS, closes_at=CLOSES, cohort=ALL)


@pytest.mark.parametrize(
    ("stage", "journal", "says_ready"),
    [
        (None, None, True),  # a crash between journal and state: nothing was sent
        ("ready", None, True),  # between state and journal
        ("ready", "ready", True),  # the answer was lost
        (None, "ready", False),
        (None, "fixed", False),  # a coordinator that shows the past again
        ("ready", "fixed", False),
    ],
)
def test_ready_is_not_signed_again_under_a_state_that_is_gone(stage, journal, says_ready):
    s = secure(TRAINING, stage, said=said(journal) if journal else None)

    decision = decide(s)

    assert list(decision.actions) == ([SayReady(ROUND)] if says_ready else [])
    assert ("secagg.state_lost" in decision.why) != says_ready


# -- erasing ---------------------------------------------------------------------------------------


def test_secrets_go_as_soon_as_the_round_is_released():
    phase = Released(attempt=1, survivors=ALL)

    assert decide(secure(phase, "committed")).actions == (SecureStep(ROUND, 1, "close"),)


def test_secrets_of_runs_that_are_not_shown_any_more_go():
    other = said("masking", round_=RoundId(RUN, 3))
    shown = View(version=1, now=NOW, runs=(run_seen(round_seen(TRAINING)),))

    assert forgotten(shown, [said("dealt"), other]) == (SecureStep(RoundId(RUN, 3), 1, "close"),)
    assert forgotten(shown, [replace(other, stage="closed")]) == ()


# -- keys ------------------------------------------------------------------------------------------

KEYS = SECURE.secagg.keys
MINE = bytes.fromhex(KEYS[ME])


@pytest.mark.parametrize(
    ("plan", "own", "pinned", "rule"),
    [
        (SECURE, MINE, {}, None),
        (SECURE, MINE, {NodeId("b"): KEYS["b"], NodeId("c"): KEYS["c"]}, None),
        (SECURE, MINE, {NodeId("z"): "0" * 64}, None),  # not in this plan
        (SECURE, bytes(32), {}, "secagg.own_key"),
        (SECURE, MINE, {NodeId("b"): KEYS["c"]}, "secagg.key_changed"),
        (the_plan(), bytes(32), {NodeId("b"): "0" * 64}, None),  # no secure sum, no roster
    ],
)
def test_the_roster_must_be_the_one_this_node_knows(plan, own, pinned, rule):
    refusal = check_roster(plan, ME, own, pinned)

    assert (refusal.rule if refusal else None) == rule


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path / "journal.sqlite", now=lambda: NOW)
    yield made
    made.close()


def test_a_key_is_pinned_once(journal):
    journal.pin_keys({"b": "1" * 64})
    journal.pin_keys({"b": "1" * 64, "c": "2" * 64})

    with pytest.raises(EquivocationError, match="b had another signing key"):
        journal.pin_keys({"a": "3" * 64, "b": "4" * 64})
    assert journal.pinned_keys() == {"b": "1" * 64, "c": "2" * 64}  # nothing of a refused list


def test_the_journal_keeps_the_furthest_stage(journal):
    for stage, attempt in (("ready", 1), ("fixed", 1), ("dealt", 1), ("ready", 2)):
        journal.add_stage(said(stage, attempt=attempt))

    assert journal.stage(ROUND.run) == said("ready", attempt=2)
    assert journal.stage(RunId("other")) is None
    lines = [e.detail for e in journal.entries() if e.what == "secure sum"]
    assert [(line["attempt"], line["stage"]) for line in lines] == [
        (1, "ready"),
        (1, "fixed"),
        (2, "ready"),
    ]


# -- steps -----------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path, journal):
    """Node A of a world, with its states and its journal; it sends nothing."""
    site = SimpleNamespace(node=A, signing_key=identity(1), journal=journal)
    return SecureSum(site=site, states=SecureStates(tmp_path / "secagg", node=A))


def put(node, stage):
    """Let the node be at a stage."""
    state = at(stage).members[A].state
    node._keep(machine.Move(state=state, why="test"))
    return state


def test_a_step_is_durable_and_in_the_journal_before_it_is_sent(node):
    put(node, "ready")

    move = node._step(ATTEMPT.round, 1, lambda s: machine.deal(s, at("ready").start, identity(1)))

    assert node.states.load(RUN) == move.state
    assert node.site.journal.stage(RUN) == outline(move.state)
    assert move.send


def test_a_late_step_finds_its_attempt_given_up(node):
    """Lists of attempt 1 that were asked for before Dealing began again change nothing."""
    put(node, "ready")
    record = SimpleNamespace(round=ATTEMPT.round)
    given_up = machine.abort(node.states.load(RUN), "secagg.restart", identity(1)).state
    node._keep(machine.Move(state=given_up, why="test"))
    second = machine.ready(
        given_up,
        make_attempt(4, number=2),
        A,
        identity(1),
        seed=seed_of(2),
        seen_size=0,
        seen_root=FIRST.model_root,
    )
    node._keep(second)

    with pytest.raises(NotFoundError):
        node._step(record.round, 1, lambda s: machine.deal(s, at("ready").start, identity(1)))
    assert node.states.load(RUN) == second.state


@pytest.mark.parametrize("back", ["ready", "dealt", "masking", None])
def test_no_step_is_made_from_a_state_that_was_put_back(node, tmp_path, back):
    put(node, "committed")
    path = tmp_path / "secagg" / "run-1.state"
    path.unlink()
    if back is not None:
        path.write_bytes(at(back).members[A].record)
    again = SecureSum(site=node.site, states=SecureStates(tmp_path / "secagg", node=A))

    with pytest.raises(CorruptStateError, match="state_lost"):
        again._step(ATTEMPT.round, 1, lambda s: pytest.fail("a step was made"))
    with pytest.raises(CorruptStateError, match="state_lost"):
        again._join_attempt(SimpleNamespace(round=ATTEMPT.round), SECURE, 2)


# -- the vector ------------------------------------------------------------------------------------


def test_the_dither_is_the_attempts_own():
    """The same after a crash; another one at each node and in each attempt."""
    world = at("masking")
    states = {name: world.members[name].state for name in (A, B, C, D)}
    seeds = {name: dither_seed(state) for name, state in states.items()}

    assert seeds == {name: dither_seed(at("masking").members[name].state) for name in seeds}
    assert len(set(seeds.values())) == 4
    assert not set(seeds.values()) & {state.self_seed for state in states.values()}
    other = replace(states[A], checkpoint=b"another checkpoint\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            type(other), "agreed", lambda self: SimpleNamespace(ctx="00" * 32), raising=True
        )
        assert dither_seed(other) != seeds[A]


def test_only_the_update_that_was_said_ready_is_encoded(tmp_path):
    path = tmp_path / "delta.f32"
    np.arange(5, dtype="<f4").tofile(path)
    pinned = blob_digest(path.read_bytes())
    check_pinned(path, pinned)

    np.arange(1, 6, dtype="<f4").tofile(path)

    for root in (pinned, None):
        with pytest.raises(DigestMismatchError, match="not the update"):
            check_pinned(path, root)


def test_the_root_of_an_update_is_in_the_journal(journal):
    journal.add_decision(ROUND, index=0, start_root=FIRST.model_root, refusal=None)
    root = blob_digest(b"update")

    journal.add_outcome(ROUND, left=None, detail={}, update=root)
    journal.add_outcome(ROUND, left=None, detail={}, update=blob_digest(b"another"))

    assert journal.round(ROUND).update == root


def test_the_record_of_a_fixed_vector_is_made_from_its_file(tmp_path):
    plan = plan_of_vectors()
    record, data = make(tmp_path, plan, work(np.zeros(70_000, np.float32)))
    root = UploadHeader.from_bytes(record.header).root

    def again():
        return record_of_fixed(
            terms=terms_of(plan),
            manifest=MANIFEST,
            root=root,
            signing_key=KEY,
            uploads=tmp_path / "uploads",
        )

    assert again() == record
    path = tmp_path / "uploads" / record.file
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptStateError, match="not the one that was fixed"):
        again()
    path.unlink()
    with pytest.raises(CorruptStateError, match="is gone"):
        again()


def terms_of(plan):
    """As ``make`` binds its vectors."""
    from node_agent.contribution import Terms

    return Terms(
        plan=plan,
        node=ME,
        round=RoundId(RunId("r1"), 4),
        index=0,
        attempt=1,
        model_root=plan.model.initial,
    )


# -- the transcript --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified():
    world = at("revealed")
    return verify_transcript(world.do_open(), world.attempt), world


def vector_of(world, name, **changes):
    """The journal's record of what a member sent."""
    body = world.headers[name].body
    header = UploadHeader(
        federation=body.federation,
        run=body.round.run,
        round=body.round.number,
        attempt=1,
        node=name,
        plan=world.attempt.plan_digest,
        model=world.attempt.model_root,
        coordinates=world.coordinates,
        ring=20,
        **{"size": body.length, "root": body.upload_root} | changes,
    )
    return UploadRecord(
        round=body.round,
        attempt=1,
        header=header.to_bytes(),
        signature=bytes(64),
        unit_hashes=(),
        file=upload_name(body.round, 1),
        receipt=None,
    )


def test_a_transcript_with_its_own_upload_is_accepted(verified):
    found, world = verified

    assert check_own_part(found, A, vector_of(world, A), frozenset({A, B, C})) == ("", "")
    assert check_own_part(found, D, None, frozenset({A, B, C})) == ("", "")  # was not in time


def test_a_transcript_is_objected_to(verified):
    found, world = verified
    survivors = frozenset({A, B, C})
    other_root = vector_of(world, A, root=blob_digest(b"another"))
    other_size = vector_of(world, A, size=world.headers[A].body.length + 1)

    for mine in (None, other_root, other_size):
        code, why = check_own_part(found, A, mine, survivors)
        assert (code, "another upload" in why) == ("secagg.transcript", True)
    for others in (survivors | {D}, survivors - {C}):
        code, why = check_own_part(found, A, vector_of(world, A), others)
        assert (code, "other nodes" in why) == ("secagg.transcript", True)


def test_a_node_past_masking_makes_no_masks(node):
    put(node, "uploaded")

    with pytest.raises(WrongPhaseError):
        node._step(ATTEMPT.round, 1, lambda s: machine.go(s, None))
