"""What a node does next in a secure sum: one row for each stage, and for each state that was lost.

A state that is older than what the coordinator shows was rolled back (a restored backup): going on
could put two vectors under one set of masks, so the node says nothing more in that round.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent.decide import MakeVector, SecureStep, Upload, decide
from node_agent.secure_state import SecureKnown
from protocols.cohort import terms_of
from protocols.identifiers import NodeId
from protocols.rounds import Aborted, Burned, Committing, Dealing, Revealing, Training, Uploading
from tests.support.node import (
    ME,
    NOW,
    ROUND,
    joined,
    round_seen,
    run_seen,
    situation,
    the_plan,
    uploaded,
)

CLOSES = NOW + timedelta(minutes=1)
OTHERS = frozenset({NodeId("b"), NodeId("c")})
ALL = OTHERS | {ME}
SECURE = the_plan(
    mode="aggregate-only",
    min_participants=3,
    secagg={
        "threshold": 2,
        "colluders": 0,
        "min_surviving": 2,
        "keys": {
            name: Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)
            .public_key()
            .public_bytes_raw()
            .hex()
            for n, name in enumerate("abc")
        },
    },
)
SECURE_TERMS = terms_of(SECURE)
HANDED_IN = uploaded(receipt=bytes(32))
JUST_ME = frozenset({ME})


def secure(phase, stage="ready", *, attempt=1, record=None, **changes):
    """A node in the ready set, its state of the sum at a stage; None: the state is lost."""
    known = None if stage is None else SecureKnown(round=ROUND, attempt=attempt, stage=stage)
    return situation(
        run_seen(round_seen(phase), digest_=SECURE.digest),
        plan=SECURE,
        record=record or joined(outcome="ready"),
        secure=known,
        **changes,
    )


def dealing(**changes):
    return Dealing(terms=SECURE_TERMS, closes_at=CLOSES, **({"attempt": 1, "ready": ALL} | changes))


def uploading(**changes):
    return Uploading(
        terms=SECURE_TERMS, closes_at=CLOSES, **({"attempt": 1, "ready": ALL} | changes)
    )


def committing(**changes):
    values = {"attempt": 1, "ready": ALL, "survivors": ALL}
    return Committing(terms=SECURE_TERMS, closes_at=CLOSES, **(values | changes))


def revealing(**changes):
    values = {"attempt": 1, "ready": ALL, "survivors": ALL, "commits": ALL}
    return Revealing(terms=SECURE_TERMS, closes_at=CLOSES, **(values | changes))


def step(name, attempt=1):
    return [SecureStep(ROUND, attempt, name)]


LOST_STATE = "round r1/0: secagg.state_lost: "
TABLE = [
    (
        "keys of a restarted attempt that were not handed in before a crash",
        secure(dealing(attempt=2), "ready", attempt=2),
        step("ready", 2),
        "round r1/0: handing in the keys of attempt 2",
    ),
    (
        "nobody deals before all fresh keys are there",
        secure(dealing(attempt=2, keyed=JUST_ME), "ready", attempt=2),
        [],
        "round r1/0: attempt 2, waiting for the others' fresh keys",
    ),
    (
        "the restarted attempt goes on",
        secure(dealing(attempt=2, keyed=ALL), "ready", attempt=2),
        step("deal", 2),
        "round r1/0: dealing shares",
    ),
    (
        "a masked vector is not made before the shares are dealt",
        secure(Training(terms=SECURE_TERMS, closes_at=CLOSES, cohort=ALL, ready=JUST_ME)),
        [],
        "round r1/0: ready, waiting for the others",
    ),
    ("deal", secure(dealing()), step("deal"), "round r1/0: dealing shares"),
    ("deal again after a lost answer", secure(dealing(), "dealt"), step("deal"), None),
    (
        "dealt",
        secure(dealing(dealt=JUST_ME), "dealt"),
        [],
        "round r1/0: dealt, waiting for the others",
    ),
    (
        "agree",
        secure(dealing(dealt=ALL), "dealt"),
        step("acknowledge"),
        "round r1/0: checking what was dealt",
    ),
    (
        "agreed",
        secure(dealing(dealt=ALL, agreed=JUST_ME), "agreed"),
        [],
        "round r1/0: agreed, waiting for the others",
    ),
    (
        "a new attempt begins with fresh keys",
        secure(dealing(attempt=2), "agreed"),
        step("ready", 2),
        "round r1/0: attempt 2 begins with fresh keys",
    ),
    ("without us", secure(dealing(ready=OTHERS)), [], "round r1/0 goes on without this node"),
    # a state that was lost or rolled back says nothing more
    (
        "no state",
        secure(dealing(), None),
        [],
        LOST_STATE + "this node has no state of its secure sum",
    ),
    (
        "rolled back before its deal",
        secure(dealing(dealt=JUST_ME), "ready"),
        [],
        LOST_STATE + "the state is older than what this node has sent",
    ),
    (
        "rolled back before its agreement",
        secure(dealing(dealt=ALL, agreed=JUST_ME), "dealt"),
        [],
        LOST_STATE + "the state is older than what this node has sent",
    ),
    (
        "rolled back to an earlier attempt",
        secure(dealing(attempt=2, dealt=JUST_ME), "dealt"),
        [],
        LOST_STATE + "the state is of an earlier attempt",
    ),
    (
        "rolled back before its vector was fixed",
        secure(uploading(received=JUST_ME), "agreed"),
        [],
        LOST_STATE + "the state is older than what this node has sent",
    ),
    (
        "no state while uploading",
        secure(uploading(), None),
        [],
        LOST_STATE + "this node has no state of its secure sum",
    ),
    (
        "rolled back before its commit",
        secure(committing(commits=JUST_ME), "fixed"),
        [],
        LOST_STATE + "the state is older than what this node has sent",
    ),
    (
        "rolled back before its shares",
        secure(revealing(revealed=JUST_ME), "committed"),
        [],
        LOST_STATE + "the state is older than what this node has sent",
    ),
    # vector, verdict, shares
    ("mask", secure(uploading(), "agreed"), [MakeVector(ROUND, 1)], None),
    ("send", secure(uploading(), "fixed", upload=uploaded()), [Upload(ROUND, 1)], None),
    (
        "sent",
        secure(uploading(), "fixed", upload=HANDED_IN),
        [],
        "round r1/0: uploaded, waiting for the others",
    ),
    (
        "commit",
        secure(committing(), "fixed", upload=HANDED_IN),
        step("commit"),
        "round r1/0: checking the survivor list",
    ),
    (
        "committed",
        secure(committing(commits=JUST_ME), "committed", upload=HANDED_IN),
        [],
        "round r1/0: committed, waiting for the others",
    ),
    (
        "left out although it was handed in",
        secure(committing(survivors=OTHERS), "fixed", upload=HANDED_IN),
        step("abort"),
        "round r1/0: left out though its update was handed in",
    ),
    (
        "left out because it was late",
        secure(committing(survivors=OTHERS), "fixed", upload=uploaded()),
        [],
        "round r1/0: the survivor list is being signed",
    ),
    (
        "too few to hide anybody: only an abort is signed",
        secure(committing(survivors=JUST_ME), "fixed", upload=HANDED_IN),
        step("abort"),
        "round r1/0: signing an abort",
    ),
    ("an abort stands", secure(committing(), "aborted", upload=HANDED_IN), step("abort"), None),
    (
        "aborted",
        secure(committing(aborts=JUST_ME), "aborted", upload=HANDED_IN),
        [],
        "round r1/0: aborted, waiting for the others",
    ),
    (
        "reveal",
        secure(revealing(), "committed", upload=HANDED_IN),
        step("reveal"),
        "round r1/0: revealing shares",
    ),
    (
        "nothing is revealed before its own verdict",
        secure(revealing(commits=OTHERS), "fixed", upload=HANDED_IN),
        step("commit"),
        "round r1/0: checking the survivor list",
    ),
    (
        "nothing is revealed after an abort",
        secure(revealing(commits=OTHERS), "aborted", upload=HANDED_IN),
        [],
        "round r1/0: this node gave attempt 1 up",
    ),
    (
        "revealed",
        secure(revealing(revealed=JUST_ME), "revealed", upload=HANDED_IN),
        [],
        "round r1/0: revealed, waiting for the others",
    ),
    (
        "not a survivor",
        secure(revealing(survivors=OTHERS, commits=OTHERS), "fixed", upload=HANDED_IN),
        [],
        "round r1/0: the masks are being taken off",
    ),
    # secrets are erased when the round is over, however it ended
    ("aborted round", secure(Aborted(code="x", reason="no"), "agreed"), step("close"), None),
    ("burned round", secure(Burned(code="x", reason="no"), "revealed"), step("close"), None),
    ("closed", secure(Aborted(code="x", reason="no"), "closed"), [], "round r1/0 ended: no"),
]


@pytest.mark.parametrize(
    ("s", "actions", "why"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_decision(s, actions, why):
    decision = decide(s)

    assert list(decision.actions) == actions
    if why is not None:
        assert decision.why == why


def test_every_step_of_a_secure_sum_is_reached():
    reached = {a.step for row in TABLE for a in row[2] if isinstance(a, SecureStep)}

    assert reached == {"ready", "deal", "acknowledge", "commit", "abort", "reveal", "close"}


@pytest.mark.parametrize("stage", ["aborted", "closed"])
def test_a_node_that_gave_an_attempt_up_never_reveals(stage):
    """Whatever the coordinator shows."""
    for commits in (ALL, OTHERS):
        for survivors in (ALL, OTHERS):
            shown = revealing(commits=commits, survivors=survivors)
            decision = decide(secure(shown, stage, upload=HANDED_IN))

            assert not [a for a in decision.actions if getattr(a, "step", "") == "reveal"]
