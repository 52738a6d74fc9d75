"""Refusals of the round machine: one row, or more, for each MUST NOT of protocols/spec/round.md.

Clauses 4.21 to 4.25 need the ledger; their rows are in tests/unit/test_rounds_services.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from protocols.cohort import Quorum, Terms
from protocols.errors import (
    EquivocationError,
    MalformedMessageError,
    NotListedError,
    WrongPhaseError,
)
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.rounds import (
    AbortArrived,
    Aborted,
    AgreementArrived,
    Burned,
    CommitArrived,
    Committing,
    ComplaintUpheld,
    DealArrived,
    Dealing,
    DeclineArrived,
    JoinArrived,
    LeaveArrived,
    Open,
    Opened,
    ReadyArrived,
    Released,
    Revealing,
    SharesArrived,
    StopRequested,
    SumFailed,
    SumOpened,
    TimePassed,
    Training,
    UploadArrived,
    Uploading,
    step,
)

ROUND = RoundId(RunId("andes-1"), 0)
A, B, C, D, E, Z = (NodeId(name) for name in "abcdez")
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
SHUT = START + timedelta(minutes=1)

SECURE = Terms(
    roster=(A, B, C, D, E),
    min_participants=3,
    quorum=Quorum(roster=5, threshold=3, colluders=0, min_surviving=3),
    **dict.fromkeys(("train", "deal", "upload", "commit", "reveal"), timedelta(minutes=1)),
)
PUBLIC = replace(SECURE, min_participants=2, quorum=None)


def some(*nodes: NodeId) -> frozenset[NodeId]:
    return frozenset(nodes)


OPEN = Open(terms=SECURE, closes_at=SHUT, joined=some(A), declined=some(B))
TRAINING = Training(
    terms=SECURE, closes_at=SHUT, cohort=some(A, B, C, D), ready=some(A), left=some(B)
)
DEALING = Dealing(
    terms=SECURE,
    closes_at=SHUT,
    attempt=2,
    ready=some(A, B, C, D),
    keyed=some(A, B, C, D),
    dealt=some(A, B, C),
)
RESTARTED = replace(DEALING, keyed=some(A, B, C), dealt=some())
UPLOADING = Uploading(
    terms=SECURE, closes_at=SHUT, attempt=2, ready=some(A, B, C, D), received=some(A)
)
PUBLIC_UPLOADING = replace(UPLOADING, terms=PUBLIC, attempt=1)
COMMITTING = Committing(
    terms=SECURE,
    closes_at=SHUT,
    attempt=2,
    ready=some(A, B, C, D),
    survivors=some(A, B, C),
    commits=some(A),
    aborts=some(B),
)
TOO_SHORT = replace(COMMITTING, survivors=some(A, B), commits=some(), aborts=some())
REVEALING = Revealing(
    terms=SECURE,
    closes_at=SHUT,
    attempt=2,
    ready=some(A, B, C, D),
    survivors=some(A, B, C),
    commits=some(A, B, C),
    revealed=some(A),
)
RESULT = Opened(sum=Digest("1" * 64), model_root=Digest("2" * 64))
OTHER = replace(RESULT, model_root=Digest("3" * 64))
RELEASED = Released(attempt=2, survivors=some(A, B, C))
OPENED = replace(RELEASED, opened=RESULT)
ABORTED = Aborted(code="too_few_joined", reason="1 joined, 3 needed")
BURNED = Burned(code="no_verdict", reason="nobody signed")

TABLE = [
    ("4.1 stranger joins", OPEN, JoinArrived(Z), START, NotListedError),
    ("4.1 stranger declines", OPEN, DeclineArrived(Z), START, NotListedError),
    ("4.2 declined, joins", OPEN, JoinArrived(B), START, EquivocationError),
    ("4.2 joined, declines", OPEN, DeclineArrived(A), START, EquivocationError),
    ("4.3 late join", OPEN, JoinArrived(C), SHUT, WrongPhaseError),
    ("4.3 late decline", OPEN, DeclineArrived(C), SHUT, WrongPhaseError),
    ("4.3 joins in Training", TRAINING, JoinArrived(E), START, WrongPhaseError),
    ("4.3 declines in Training", TRAINING, DeclineArrived(A), START, WrongPhaseError),
    ("4.3 ready in Open", OPEN, ReadyArrived(A), START, WrongPhaseError),
    ("4.3 leaves in Open", OPEN, LeaveArrived(A), START, WrongPhaseError),
    ("4.4 not in the cohort, ready", TRAINING, ReadyArrived(E), START, NotListedError),
    ("4.4 not in the cohort, leaves", TRAINING, LeaveArrived(E), START, NotListedError),
    ("4.5 left, ready", TRAINING, ReadyArrived(B), START, EquivocationError),
    ("4.5 ready, leaves", TRAINING, LeaveArrived(A), START, EquivocationError),
    ("4.6 late ready", TRAINING, ReadyArrived(C), SHUT, WrongPhaseError),
    ("4.6 ready in Dealing", DEALING, ReadyArrived(E), START, WrongPhaseError),
    ("4.6 ready in Uploading", UPLOADING, ReadyArrived(E), START, WrongPhaseError),
    ("4.7 dropped, deals", DEALING, DealArrived(E, 2), START, NotListedError),
    ("4.7 dropped, agrees", DEALING, AgreementArrived(E, 2), START, NotListedError),
    ("4.7 complaint about nobody", DEALING, ComplaintUpheld(E, 2), START, NotListedError),
    ("4.8 deal of attempt 1", DEALING, DealArrived(D, 1), START, WrongPhaseError),
    ("4.8 agreement of attempt 1", DEALING, AgreementArrived(A, 1), START, WrongPhaseError),
    ("4.8 complaint of attempt 1", DEALING, ComplaintUpheld(A, 1), START, WrongPhaseError),
    ("4.8 update of attempt 1", UPLOADING, UploadArrived(B, 1), START, WrongPhaseError),
    ("4.8 update of attempt 3", UPLOADING, UploadArrived(B, 3), START, WrongPhaseError),
    ("4.8 commit of attempt 1", COMMITTING, CommitArrived(C, 1), START, WrongPhaseError),
    ("4.8 abort of attempt 1", COMMITTING, AbortArrived(D, 1), START, WrongPhaseError),
    ("4.8 shares of attempt 1", REVEALING, SharesArrived(B, 1), START, WrongPhaseError),
    ("4.8 keys of attempt 3", DEALING, ReadyArrived(A, 3), START, WrongPhaseError),
    ("4.8 ready for attempt 2", TRAINING, ReadyArrived(C, 2), START, WrongPhaseError),
    ("4.9 deals too early", RESTARTED, DealArrived(A, 2), START, WrongPhaseError),
    ("4.9 agrees too early", DEALING, AgreementArrived(A, 2), START, WrongPhaseError),
    ("4.10 deal in open mode", PUBLIC_UPLOADING, DealArrived(A, 1), START, WrongPhaseError),
    ("4.10 agreement", PUBLIC_UPLOADING, AgreementArrived(A, 1), START, WrongPhaseError),
    ("4.10 commit in open mode", PUBLIC_UPLOADING, CommitArrived(A, 1), START, WrongPhaseError),
    ("4.10 shares in open mode", PUBLIC_UPLOADING, SharesArrived(A, 1), START, WrongPhaseError),
    ("4.11 update in Training", TRAINING, UploadArrived(A, 1), START, WrongPhaseError),
    ("4.11 update in Dealing", DEALING, UploadArrived(A, 2), START, WrongPhaseError),
    ("4.11 late update", UPLOADING, UploadArrived(B, 2), SHUT, WrongPhaseError),
    ("4.11 stranger's update", UPLOADING, UploadArrived(E, 2), START, NotListedError),
    ("4.11 dropped, back", COMMITTING, UploadArrived(D, 2), START, WrongPhaseError),
    ("4.11 dropped, back later", REVEALING, UploadArrived(D, 2), START, WrongPhaseError),
    ("4.11 dropped, back at last", RELEASED, UploadArrived(D, 2), START, WrongPhaseError),
    ("4.12 no survivor, commits", COMMITTING, CommitArrived(D, 2), START, NotListedError),
    ("4.12 stranger aborts", COMMITTING, AbortArrived(E, 2), START, NotListedError),
    ("4.13 abort after commit", COMMITTING, AbortArrived(A, 2), START, EquivocationError),
    ("4.13 commit after abort", COMMITTING, CommitArrived(B, 2), START, EquivocationError),
    ("4.13 abort, list is chosen", REVEALING, AbortArrived(A, 2), START, EquivocationError),
    ("4.14 too short a list", TOO_SHORT, CommitArrived(A, 2), START, WrongPhaseError),
    ("4.15 late commit", COMMITTING, CommitArrived(C, 2), SHUT, WrongPhaseError),
    ("4.15 late abort", COMMITTING, AbortArrived(D, 2), SHUT, WrongPhaseError),
    ("4.15 abort, past verdict", REVEALING, AbortArrived(D, 2), START, WrongPhaseError),
    ("4.15 commit in Uploading", UPLOADING, CommitArrived(A, 2), START, WrongPhaseError),
    ("4.16 shares too early", COMMITTING, SharesArrived(A, 2), START, WrongPhaseError),
    ("4.16 late shares", REVEALING, SharesArrived(B, 2), SHUT, WrongPhaseError),
    ("4.16 no survivor's shares", REVEALING, SharesArrived(D, 2), START, NotListedError),
    ("4.17 sum in Uploading", UPLOADING, SumOpened(RESULT), START, WrongPhaseError),
    ("4.17 sum in Committing", COMMITTING, SumOpened(RESULT), START, WrongPhaseError),
    ("4.17 sum in Revealing", REVEALING, SumOpened(RESULT), START, WrongPhaseError),
    ("4.17 failure in Revealing", REVEALING, SumFailed("x", "y"), START, WrongPhaseError),
    ("4.18 another result", OPENED, SumOpened(OTHER), START, EquivocationError),
    ("4.18 fails once opened", OPENED, SumFailed("x", "y"), START, WrongPhaseError),
    ("4.19 join in Aborted", ABORTED, JoinArrived(A), START, WrongPhaseError),
    ("4.19 update in Aborted", ABORTED, UploadArrived(A, 1), START, WrongPhaseError),
    ("4.19 sum in Aborted", ABORTED, SumOpened(RESULT), START, WrongPhaseError),
    ("4.19 commit in Burned", BURNED, CommitArrived(A, 2), START, WrongPhaseError),
    ("4.19 shares in Burned", BURNED, SharesArrived(A, 2), START, WrongPhaseError),
    ("4.19 sum in Burned", BURNED, SumOpened(RESULT), START, WrongPhaseError),
]


@pytest.mark.parametrize(
    ("clause", "phase", "event", "now", "error"), TABLE, ids=[row[0] for row in TABLE]
)
def test_refused(clause, phase, event, now, error):
    with pytest.raises(error, match="andes-1/0") as caught:
        step(ROUND, phase, event, now)
    assert type(caught.value) is error


MASKED = [UPLOADING, COMMITTING, REVEALING, RELEASED]


@pytest.mark.parametrize("phase", MASKED, ids=lambda phase: type(phase).__name__)
def test_4_20_a_stop_does_not_abort_what_may_have_left_the_sites(phase):
    assert step(ROUND, phase, StopRequested("enough"), START).phase == phase


@pytest.mark.parametrize(
    "phase", [OPEN, TRAINING, DEALING, PUBLIC_UPLOADING], ids=lambda phase: type(phase).__name__
)
def test_a_stop_ends_what_has_not(phase):
    stopped = step(ROUND, phase, StopRequested("enough"), START).phase

    assert stopped == Aborted(code="stopped", reason="the run was stopped: enough")


# Repetitions: the same message again, in its phase and where its phase has just gone by.
REPEATED = [
    (OPEN, JoinArrived(A)),
    (OPEN, DeclineArrived(B)),
    (TRAINING, JoinArrived(A)),
    (TRAINING, ReadyArrived(A)),
    (TRAINING, LeaveArrived(B)),
    (DEALING, ReadyArrived(A)),
    (DEALING, DealArrived(A, 2)),
    (UPLOADING, ReadyArrived(A)),
    (UPLOADING, AgreementArrived(A, 2)),
    (UPLOADING, UploadArrived(A, 2)),
    (COMMITTING, UploadArrived(A, 2)),
    (COMMITTING, CommitArrived(A, 2)),
    (COMMITTING, AbortArrived(B, 2)),
    (REVEALING, UploadArrived(A, 2)),
    (REVEALING, CommitArrived(A, 2)),
    (REVEALING, SharesArrived(A, 2)),
    (RELEASED, SharesArrived(A, 2)),
    (RELEASED, CommitArrived(A, 2)),
    (OPENED, UploadArrived(A, 2)),
    (OPENED, SumOpened(RESULT)),
    (ABORTED, TimePassed()),
    (BURNED, TimePassed()),
    (ABORTED, StopRequested("again")),
]


@pytest.mark.parametrize(
    ("phase", "event"),
    REPEATED,
    ids=[f"{type(e).__name__} in {type(p).__name__}" for p, e in REPEATED],
)
def test_a_repetition_changes_nothing(phase, event):
    assert step(ROUND, phase, event, START).phase == phase


ENDINGS = [
    (OPEN, SHUT, Aborted, "too_few_joined"),
    (TRAINING, SHUT, Aborted, "too_few_ready"),
    (replace(DEALING, dealt=some(A)), SHUT, Aborted, "too_few_dealt"),
    (replace(PUBLIC_UPLOADING, received=some(A)), SHUT, Aborted, "too_few_uploads"),
    (COMMITTING, SHUT, Burned, "no_verdict"),
    (REVEALING, SHUT, Burned, "too_few_shares"),
]


@pytest.mark.parametrize(
    ("phase", "now", "kind", "code"), ENDINGS, ids=[row[-1] for row in ENDINGS]
)
def test_too_few_by_the_deadline(phase, now, kind, code):
    just_before = step(ROUND, phase, TimePassed(), now - timedelta(milliseconds=1))
    ended, why = step(ROUND, phase, TimePassed(), now)

    assert just_before.phase == phase
    assert isinstance(ended, kind)
    assert ended.code == code
    assert why


def test_enough_by_the_deadline():
    ready = replace(TRAINING, ready=some(A, C, D))
    assert step(ROUND, ready, TimePassed(), SHUT).phase == Dealing(
        terms=SECURE, closes_at=SHUT + SECURE.deal, attempt=1, ready=some(A, C, D)
    )
    uploads = replace(
        UPLOADING, received=some(A, B)
    )  # fewer than can be opened: shown all the same
    proposed = step(ROUND, uploads, TimePassed(), SHUT).phase
    assert isinstance(proposed, Committing)
    assert proposed.survivors == some(A, B)
    enough = replace(PUBLIC_UPLOADING, received=some(A, B))
    assert step(ROUND, enough, TimePassed(), SHUT).phase == Released(
        attempt=1, survivors=some(A, B)
    )


def test_who_makes_no_fresh_keys_is_dropped_and_the_others_go_on():
    """A node that dies as Dealing restarts must not cost the others the round."""
    again = step(ROUND, RESTARTED, TimePassed(), SHUT).phase

    assert again == Dealing(
        terms=SECURE, closes_at=SHUT + SECURE.deal, attempt=3, ready=some(A, B, C)
    )
    keyed = step(ROUND, RESTARTED, ReadyArrived(D, 2), START).phase
    assert isinstance(keyed, Dealing)
    assert not keyed.without_keys
    assert step(ROUND, keyed, DealArrived(A, 2), START).phase.dealt == some(A)


def test_a_complaint_drops_the_dealer_and_everybody_starts_over():
    again = step(ROUND, DEALING, ComplaintUpheld(D, 2), START).phase

    assert again == Dealing(
        terms=SECURE, closes_at=START + SECURE.deal, attempt=3, ready=some(A, B, C)
    )


@pytest.mark.parametrize(
    ("roster", "threshold", "colluders"), [(5, 2, 0), (5, 3, 1), (4, 2, 0), (5, 6, 0), (3, 2, 2)]
)
def test_5_sizes_that_allow_two_quorums_are_refused(roster, threshold, colluders):
    with pytest.raises(MalformedMessageError):
        Quorum(roster=roster, threshold=threshold, colluders=colluders, min_surviving=5)


@pytest.mark.parametrize("least", [2, 6])
def test_5_a_sum_that_hides_nobody_or_asks_for_more_than_there_are_is_refused(least):
    with pytest.raises(MalformedMessageError, match="min_surviving"):
        Quorum(roster=5, threshold=4, colluders=1, min_surviving=least)


def test_every_must_not_of_the_machine_has_a_row():
    """A MUST NOT without a row is not implemented yet."""
    spec = (Path(__file__).parents[2] / "protocols" / "spec" / "round.md").read_text("utf-8")
    clauses = set(re.findall(r"^\| (4\.\d+) \|", spec, re.MULTILINE))
    rows = {row[0].split()[0] for row in TABLE} | {"4.20"}

    assert clauses == rows | {f"4.{n}" for n in range(21, 26)}
