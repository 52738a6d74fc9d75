"""What a node does next: one row for each thing that can be seen, said and had.

The table is the specification of ``node_agent/decide.py``; its last column is what people read in
`minga node status`, so the reasons are pinned as well.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from node_agent.decide import (
    ComputeNext,
    FetchPlan,
    FinishEarly,
    MakeVector,
    ObtainModel,
    SayConfirm,
    SayDecline,
    SayJoin,
    SayLeave,
    SayReady,
    Train,
    Upload,
    Withdraw,
    Work,
    decide,
)
from node_agent.journal import RoundRecord
from node_agent.rules import Refusal
from protocols.cohort import terms_of
from protocols.identifiers import NodeId, RoundId
from protocols.rounds import (
    Aborted,
    Burned,
    Open,
    Opened,
    Released,
    Training,
    Uploading,
)
from tests.support.node import (
    FIRST,
    ME,
    NOW,
    ROUND,
    RUN,
    SECOND,
    confirmed,
    digest,
    joined,
    round_seen,
    run_seen,
    situation,
    snapshot,
    the_plan,
    uploaded,
)

TERMS = terms_of(the_plan())
CLOSES = NOW + timedelta(minutes=1)
OTHERS = frozenset({NodeId("b"), NodeId("c")})
ALL = OTHERS | {ME}
NO = Refusal("site.data", "no text")
LOST = Refusal("worker.lost", "it died")
PAUSED = Refusal("site.paused", "the site paused its node")

OPEN = Open(terms=TERMS, closes_at=CLOSES)
TRAINING = Training(terms=TERMS, closes_at=CLOSES, cohort=ALL)
UPLOADING = Uploading(terms=TERMS, closes_at=CLOSES, attempt=1, ready=ALL)
RELEASED = Released(
    attempt=1, survivors=ALL, opened=Opened(sum=digest("sum"), model_root=SECOND.model_root)
)
LAST = round_seen(RELEASED, following=SECOND)
DECLINED = RoundRecord(
    round=ROUND,
    index=0,
    start_root=FIRST.model_root,
    joined=False,
    refusal=NO,
    outcome=None,
    left=None,
)


def running(phase, **changes):
    """The first round in a phase."""
    return situation(run_seen(round_seen(phase)), **changes)


def after(phase, **changes):
    """Round 1 in a phase, round 0 released before it."""
    current = round_seen(phase, number=1)
    return situation(run_seen(current, last=LAST), **changes)


LATE = Uploading(terms=TERMS, closes_at=CLOSES, attempt=1, ready=OTHERS)
FINISHING = Work(state="running", step=3, finishing="asked")
OVERDUE = Work(state="running", step=3, finishing="overdue")
BEFORE = ((ROUND, Work(state="running", step=3)),)


def next_round(phase, earlier, **changes):
    """Round 1 in a phase, while a worker is still on the job of round 0, which others ended."""
    known = {
        "record": joined(1),
        "held": frozenset({FIRST.model_root, SECOND.model_root}),
        "carries": True,
        "earlier": earlier,
    }
    return situation(run_seen(round_seen(phase, number=1)), **known | changes)


TABLE = [
    # -- the plan
    ("no plan yet", running(OPEN, plan=None), [FetchPlan(RUN)], "reading the plan"),
    (
        "no plan, the run is over",
        situation(run_seen(status="done"), plan=None),
        [],
        "the run is done",
    ),
    (
        "the plan cannot be taken",
        running(OPEN, plan=None, refusal=NO),
        [SayDecline(ROUND, NO)],
        "no text [site.data]",
    ),
    ("no round yet", situation(run_seen()), [], "no round has begun"),
    # -- Open
    ("open", running(OPEN), [SayJoin(ROUND, FIRST.model_root)], "joining round r1/0"),
    (
        "open, model missing",
        running(OPEN, held=frozenset()),
        [ObtainModel(ROUND, FIRST.model_root)],
        "round r1/0: fetching its model",
    ),
    (
        "open, refused",
        running(OPEN, refusal=NO),
        [SayDecline(ROUND, NO)],
        "declining round r1/0: no text [site.data]",
    ),
    (
        "open, refused before a model is fetched for nothing",
        running(OPEN, refusal=NO, held=frozenset()),
        [SayDecline(ROUND, NO)],
        "declining round r1/0: no text [site.data]",
    ),
    (
        "open, paused",
        running(OPEN, paused=True),
        [SayDecline(ROUND, PAUSED)],
        "declining round r1/0: the site paused its node [site.paused]",
    ),
    (
        "open, stopped",
        running(OPEN, stopped=NO),
        [SayDecline(ROUND, NO)],
        "declining round r1/0: no text [site.data]",
    ),
    (
        "open, joined in the journal only",
        running(OPEN, record=joined(), paused=True, refusal=NO),
        [SayJoin(ROUND, FIRST.model_root)],
        "joining round r1/0",
    ),
    (
        "open, joined and acknowledged",
        running(OPEN, record=joined(), delivered=frozenset({SayJoin(ROUND, FIRST.model_root)})),
        [],
        "round r1/0: joined, waiting for the others",
    ),
    (
        "open, joined and shown",
        running(Open(terms=TERMS, closes_at=CLOSES, joined=frozenset({ME})), record=joined()),
        [],
        "round r1/0: joined, waiting for the others",
    ),
    (
        "open, declined in the journal only, reason gone by now",
        running(OPEN, record=DECLINED),
        [SayDecline(ROUND, NO)],
        "declining round r1/0: no text [site.data]",
    ),
    (
        "open, declined and shown",
        running(Open(terms=TERMS, closes_at=CLOSES, declined=frozenset({ME})), record=DECLINED),
        [],
        "round r1/0: declined: no text [site.data]",
    ),
    (
        "open, joined under a journal that was lost",
        running(Open(terms=TERMS, closes_at=CLOSES, joined=frozenset({ME}))),
        [],
        "round r1/0: an answer of this node stands that its journal lacks",
    ),
    (
        "open, joined from another model",
        situation(
            run_seen(round_seen(OPEN, number=1)),
            record=joined(0),
            held=frozenset({SECOND.model_root}),
        ),
        [],
        "round r1/1 was joined from another model: it is not this round",
    ),
    # -- Training
    ("train", running(TRAINING, record=joined()), [Train(ROUND)], None),
    (
        "training",
        running(TRAINING, record=joined(), work=Work(state="running", step=3, max_steps=9)),
        [],
        "round r1/0: training, step 3 of 9",
    ),
    (
        "training, paused meanwhile: what was joined is finished",
        running(TRAINING, record=joined(), paused=True, work=Work(state="finished")),
        [SayReady(ROUND)],
        None,
    ),
    (
        "trained",
        running(TRAINING, record=joined(), work=Work(state="finished")),
        [SayReady(ROUND)],
        None,
    ),
    (
        "failed",
        running(TRAINING, record=joined(), work=Work(state="failed", refusal=LOST)),
        [SayLeave(ROUND, LOST)],
        "leaving round r1/0: it died [worker.lost]",
    ),
    (
        "left in the journal only",
        running(TRAINING, record=joined(left=LOST), work=Work(state="finished")),
        [SayLeave(ROUND, LOST)],
        None,
    ),
    (
        "left and acknowledged",
        running(TRAINING, record=joined(left=LOST), delivered=frozenset({SayLeave(ROUND, LOST)})),
        [],
        "round r1/0: left: it died [worker.lost]",
    ),
    (
        "stopped while training",
        running(TRAINING, record=joined(), stopped=NO, work=Work(state="running")),
        [SayLeave(ROUND, NO)],
        None,
    ),
    (
        "in the cohort, but the journal was lost",
        running(TRAINING),
        [
            SayLeave(
                ROUND, Refusal("site.journal", "this node's journal does not know that it joined")
            )
        ],
        None,
    ),
    (
        "model gone",
        running(TRAINING, record=joined(), held=frozenset()),
        [ObtainModel(ROUND, FIRST.model_root)],
        None,
    ),
    (
        "ready in the journal only: say it, and encode meanwhile",
        running(TRAINING, record=joined(outcome="ready")),
        [SayReady(ROUND), MakeVector(ROUND, 1)],
        "round r1/0: saying ready",
    ),
    (
        "ready, encoding early",
        running(
            Training(terms=TERMS, closes_at=CLOSES, cohort=ALL, ready=frozenset({ME})),
            record=joined(outcome="ready"),
        ),
        [MakeVector(ROUND, 1)],
        "round r1/0: ready, waiting for the others",
    ),
    (
        "ready, encoded",
        running(
            Training(terms=TERMS, closes_at=CLOSES, cohort=ALL, ready=frozenset({ME})),
            record=joined(outcome="ready"),
            upload=uploaded(),
        ),
        [],
        "round r1/0: ready, waiting for the others",
    ),
    (
        "without us",
        running(Training(terms=TERMS, closes_at=CLOSES, cohort=OTHERS), record=DECLINED),
        [],
        "round r1/0 trains without this node",
    ),
    # -- Uploading
    (
        "uploading, nothing encoded",
        running(UPLOADING, record=joined(outcome="ready")),
        [MakeVector(ROUND, 1)],
        None,
    ),
    (
        "uploading, encoded",
        running(UPLOADING, record=joined(outcome="ready"), upload=uploaded()),
        [Upload(ROUND, 1)],
        None,
    ),
    (
        "uploading, a vector of an earlier attempt is not sent",
        running(
            Uploading(terms=TERMS, closes_at=CLOSES, attempt=2, ready=ALL),
            record=joined(outcome="ready"),
            upload=uploaded(attempt=1),
        ),
        [MakeVector(ROUND, 2)],
        None,
    ),
    (
        "uploaded",
        running(UPLOADING, record=joined(outcome="ready"), upload=uploaded(receipt=bytes(32))),
        [],
        "round r1/0: uploaded, waiting for the others",
    ),
    (
        "counted, but the receipt was lost: ask again",
        running(
            Uploading(
                terms=TERMS, closes_at=CLOSES, attempt=1, ready=ALL, received=frozenset({ME})
            ),
            record=joined(outcome="ready"),
            upload=uploaded(),
        ),
        [Upload(ROUND, 1)],
        None,
    ),
    (
        "uploading, the journal was lost: nothing can be signed",
        running(UPLOADING),
        [],
        "round r1/0: this node's journal does not know that it is ready",
    ),
    (
        "too late: the worker is stopped",
        running(
            Uploading(terms=TERMS, closes_at=CLOSES, attempt=1, ready=OTHERS),
            record=joined(),
            work=Work(state="running"),
        ),
        [Withdraw(ROUND)],
        "round r1/0 goes on without this node; stopping the local step",
    ),
    (
        "too late, and what is done may go into a later update: it is asked for",
        running(LATE, record=joined(), work=Work(state="running"), carries=True),
        [FinishEarly(ROUND)],
        "round r1/0 goes on without this node; stopping the local step",
    ),
    (
        "too late while the agent was away: likewise",
        running(LATE, record=joined(), work=Work(left_over=True), carries=True),
        [FinishEarly(ROUND)],
        None,
    ),
    (
        "it was asked for",
        running(LATE, record=joined(), work=FINISHING, carries=True),
        [],
        "round r1/0 goes on without this node; keeping what the local step has done",
    ),
    (
        "it takes too long: as without",
        running(LATE, record=joined(), work=OVERDUE, carries=True),
        [Withdraw(ROUND)],
        None,
    ),
    (
        "this node takes no further part: there is no later update",
        running(LATE, record=joined(), work=Work(state="running"), carries=True, stopped=NO),
        [Withdraw(ROUND)],
        None,
    ),
    # -- jobs of rounds that others have finished since
    (
        "the next round is joined meanwhile",
        next_round(Open(terms=TERMS, closes_at=CLOSES), BEFORE, record=None),
        [FinishEarly(ROUND), SayJoin(RoundId(RUN, 1), SECOND.model_root)],
        "joining round r1/1",
    ),
    (
        "its training waits for the worker",
        next_round(TRAINING, ((ROUND, FINISHING),)),
        [],
        "round r1/1: the worker ends its work for round r1/0 first",
    ),
    (
        "not for ever",
        next_round(TRAINING, ((ROUND, OVERDUE),)),
        [Withdraw(ROUND)],
        "round r1/1: the worker ends its work for round r1/0 first",
    ),
    ("until it has ended", next_round(TRAINING, ()), [Train(RoundId(RUN, 1))], None),
    (
        "nothing is carried over: stopped at once",
        next_round(TRAINING, BEFORE, carries=False),
        [Withdraw(ROUND)],
        None,
    ),
    # -- the end
    (
        "released, not open",
        running(Released(attempt=1, survivors=ALL), record=joined(outcome="ready")),
        [],
        "round r1/0: the sum is being opened",
    ),
    (
        "aborted while training",
        running(
            Aborted(code="stopped", reason="by hand"), record=joined(), work=Work(state="running")
        ),
        [Withdraw(ROUND)],
        "round r1/0 ended: by hand; stopping the local step",
    ),
    (
        "aborted while this node was away",
        running(
            Aborted(code="stopped", reason="by hand"),
            record=joined(),
            work=Work(state="none", left_over=True),
        ),
        [Withdraw(ROUND)],
        "round r1/0 ended: by hand; stopping the local step",
    ),
    ("burned", running(Burned(code="x", reason="no")), [], "round r1/0 ended: no"),
    (
        "the run was stopped while training",
        situation(
            run_seen(round_seen(Aborted(code="stopped", reason="by hand")), status="stopped"),
            record=joined(),
            work=Work(state="running"),
        ),
        [Withdraw(ROUND)],
        "the run is stopped; stopping the local step",
    ),
    (
        "the same where late work is carried over: no round will take it",
        situation(
            run_seen(round_seen(Aborted(code="stopped", reason="by hand")), status="stopped"),
            record=joined(),
            work=Work(state="running"),
            carries=True,
        ),
        [Withdraw(ROUND)],
        None,
    ),
    # -- after a release
    (
        "compute, then join what follows",
        after(OPEN),
        [ComputeNext(ROUND)],
        "computing the model after round r1/0; round r1/1: its model is being computed",
    ),
    (
        "computed: confirm and join at once",
        after(
            OPEN,
            confirm=confirmed(computed=SECOND.model_root, answered=False),
            held=frozenset({FIRST.model_root, SECOND.model_root}),
        ),
        [SayConfirm(ROUND), SayJoin(RoundId(RUN, 1), SECOND.model_root)],
        "confirming the model of round r1/0; joining round r1/1",
    ),
    (
        "computed and known: only join",
        after(
            OPEN,
            confirm=confirmed(computed=SECOND.model_root, answered=True),
            held=frozenset({SECOND.model_root}),
        ),
        [SayJoin(RoundId(RUN, 1), SECOND.model_root)],
        "joining round r1/1",
    ),
    (
        "objection: say it, decline the rest",
        after(
            OPEN,
            confirm=confirmed(
                computed=digest("mine"), objection="model_disagreement", answered=False
            ),
            stopped=Refusal("model_disagreement", "theirs is another"),
        ),
        [
            SayConfirm(ROUND),
            SayDecline(RoundId(RUN, 1), Refusal("model_disagreement", "theirs is another")),
        ],
        None,
    ),
    (
        "rounds were missed: fetch",
        after(OPEN, held=frozenset({snapshot(9).model_root})),
        [ObtainModel(RoundId(RUN, 1), SECOND.model_root)],
        None,
    ),
    (
        "the model of a round it took part in was lost: fetch it again, and compute",
        after(OPEN, held=frozenset(), took_part=True),
        [ObtainModel(ROUND, FIRST.model_root)],
        (
            "fetching again the model that round r1/0 started from;"
            " round r1/1: its model is being computed"
        ),
    ),
    (
        "lost after it was computed: fetch what follows",
        after(
            OPEN,
            held=frozenset(),
            took_part=True,
            confirm=confirmed(computed=SECOND.model_root, answered=True),
        ),
        [ObtainModel(RoundId(RUN, 1), SECOND.model_root)],
        None,
    ),
    (
        "the coordinator shows another model than the round's own result: fetched, not waited for",
        situation(
            run_seen(
                round_seen(OPEN, number=2),
                last=round_seen(RELEASED, following=SECOND),
            ),
        ),
        [ComputeNext(ROUND), ObtainModel(RoundId(RUN, 2), snapshot(2).model_root)],
        None,
    ),
    (
        "the last round of a run is computed too",
        situation(run_seen(LAST, last=LAST, status="done"), record=joined(outcome="ready")),
        [ComputeNext(ROUND)],
        "computing the model after round r1/0; the run is done",
    ),
    (
        "all said",
        situation(
            run_seen(LAST, last=LAST, status="done"),
            record=joined(outcome="ready"),
            confirm=confirmed(computed=SECOND.model_root, answered=True),
        ),
        [],
        "the run is done",
    ),
]


@pytest.mark.parametrize(
    ("s", "actions", "why"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_decision(s, actions, why):
    decision = decide(s)

    assert list(decision.actions) == actions
    assert decision.why
    if why is not None:
        assert decision.why == why


def test_every_action_is_reached():
    """A table that never trains proves little."""
    reached = {type(action) for row in TABLE for action in row[2]}

    assert reached == {
        ComputeNext,
        FetchPlan,
        FinishEarly,
        MakeVector,
        ObtainModel,
        SayConfirm,
        SayDecline,
        SayJoin,
        SayLeave,
        SayReady,
        Train,
        Upload,
        Withdraw,
    }


def test_deciding_twice_is_deciding_once():
    for _, s, _, _ in TABLE:
        assert decide(s) == decide(s)
