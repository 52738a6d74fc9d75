"""Nodes lost in any phase of a secure round, through the real services: exactly the survivors.

The pure machines have this property for 3 to 33 members (test_secagg_sum.py); here the same goes
over gRPC, ledger, spool and driver. What must come out is computed from the schedule alone, by
``expected``; every vector has a coordinate of its own, so a wrong sum names who was counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from protocols.rounds import Aborted, Burned, Dealing, Released
from tests.support.hostile import Member, SharedRound, hostile

# Where a node falls silent: before this step; "half" is in the middle of its upload.
STEPS = ("join", "ready", "deal", "acknowledge", "mask", "upload", "commit", "reveal")
LOSSES = (*STEPS[:6], "half", *STEPS[6:], "never")
BEFORE_UPLOAD = ("mask", "upload", "half")


class Marked(Member):
    """Its vector is non-zero in one coordinate of its own, and in a common one."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.delta[:] = 0.0
        own = 1 + self.plan.roster.index(self.name)
        self.delta[0] = self.delta[own] = 2.0**-6

    def half(self) -> None:
        """Begin the upload, send half of it, and fall silent."""
        state = self.begin_upload()
        self.client.append(state.upload_id, 0, [self.vector[: len(self.vector) // 2]])


class Outcome(NamedTuple):
    """How a round ends, and who is in its sum."""

    phase: type
    survivors: frozenset
    attempt: int = 1


def expected(lost: dict[str, str], need: int) -> Outcome:
    """What must become of a round in which ``need`` members are needed at every turn."""

    def staying(*gone: str) -> set[str]:
        return {name for name, when in lost.items() if when not in gone}

    aborted = Outcome(Aborted, frozenset())
    here, attempt = staying("join", "ready"), 1
    if len(staying("join")) < need or len(here) < need:
        return aborted
    for when in ("deal", "acknowledge"):
        left = {name for name in here if lost[name] != when}
        if left != here:
            here, attempt = left, attempt + 1
        if len(here) < need:
            return aborted
    survivors = {name for name in here if lost[name] not in BEFORE_UPLOAD}
    if len(survivors) < need:
        # Those who are still there abort; with a quorum of them nothing is charged.
        aborting = {name for name in survivors if lost[name] != "commit"}
        return Outcome(Aborted if len(aborting) >= need else Burned, frozenset(), attempt)
    committing = {name for name in survivors if lost[name] != "commit"}
    revealing = {name for name in committing if lost[name] != "reveal"}
    if min(len(committing), len(revealing)) < need:
        return Outcome(Burned, frozenset(), attempt)
    return Outcome(Released, frozenset(survivors), attempt)


class Course:
    """One round in which each node falls silent when ``lost`` says so, and deadlines pass."""

    def __init__(self, door, lost: dict[str, str]) -> None:
        self.play = SharedRound(door, n=len(lost), coordinates=20, node_type=Marked)
        self.lost = lost
        self.here = list(lost)
        self.trail: list[str] = []  # what became of the round, step by step

    @property
    def over(self) -> bool:
        return isinstance(self.play.phase, Aborted | Burned)

    def leave(self, step: str) -> bool:
        """Those who are lost before ``step`` go; whether there are any."""
        before = len(self.here)
        self.here = [name for name in self.here if self.lost[name] != step]
        return len(self.here) < before

    def take(self, step: str) -> bool:
        """Who is left takes a step; if the round still waits for others, their deadline passes."""
        waiting, missing = type(self.play.phase), self.leave(step)
        for name in self.here:
            getattr(self.play.nodes[name], step)()
        if missing and step != "mask" and isinstance(self.play.phase, waiting):
            self.play.expire()
        self.trail.append(f"{step}: {type(self.play.phase).__name__}")
        return missing

    def deal(self) -> None:
        """Attempts, until one in which nobody is lost."""
        while isinstance(self.play.phase, Dealing):
            attempt = self.play.phase.attempt
            if (self.take("deal") or self.take("acknowledge")) and not self.over:
                assert self.play.phase.attempt == attempt + 1
                self.take("next_attempt")

    def upload(self) -> None:
        """Vectors; those of who was lost before do not come, or half."""
        gone = self.take("mask")
        for name in self.here:
            if self.lost[name] == "half":
                self.play.nodes[name].half()
        gone |= self.leave("half")
        if not self.take("upload") and gone:
            self.play.expire()

    def end(self) -> None:
        """Commits and reveals, or aborts if the list is too short to open."""
        if len(self.play.phase.survivors) < self.play.plan.secagg.threshold:
            self.leave("commit")
            self.take("abort")
            if not self.over:
                self.play.expire()
            return
        self.take("commit")
        if not self.over:
            self.take("reveal")
        if isinstance(self.play.phase, Released):
            self.play.until_open()

    def run(self) -> SharedRound:
        """From the beginning to the end."""
        for part in (lambda: self.take("join"), lambda: self.take("ready"), self.deal, self.upload):
            part()
            if self.over:
                return self.play
        self.end()
        return self.play


def check(play: SharedRound, lost: dict[str, str]) -> None:
    """The round ended as it must, and the sum is the plain sum of exactly the survivors."""
    want = expected(lost, play.plan.secagg.threshold)
    phase = play.phase
    assert type(phase) is want.phase
    if not isinstance(phase, Released):
        return
    assert (phase.survivors, phase.attempt) == (want.survivors, want.attempt)
    assert play.opened_sum() == play.plain_sum(sorted(want.survivors))
    assert play.row.metrics["nodes"] == len(want.survivors)


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with hostile(tmp_path_factory.mktemp("door")) as found:
        yield found


def schedule(*lost: str) -> dict[str, str]:
    return {f"n{i:02d}": when for i, when in enumerate(lost)}


# Mostly nobody is lost in a phase, else hardly a round would get to its end.
schedules = st.lists(
    st.one_of(st.just("never"), st.just("never"), st.sampled_from(LOSSES)), min_size=4, max_size=6
).map(lambda lost: schedule(*lost))


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(schedules)
@example(schedule("deal", "half", *["never"] * 4))
@example(schedule("acknowledge", "reveal", *["never"] * 4))
@example(schedule("mask", "upload", "never", "never"))
def test_whoever_is_lost_whenever(door, lost):
    play = Course(door, lost).run()
    event(type(play.phase).__name__)
    check(play, lost)


@pytest.mark.parametrize(
    ("when", "n", "outcome"),
    [
        *(pytest.param(when, 4, Released, id=f"one-{when}") for when in LOSSES),
        *(pytest.param(when, 3, Aborted, id=f"three-{when}") for when in ("join", "ready", "deal")),
        pytest.param("acknowledge", 3, Aborted, id="three-acknowledge"),
        *(pytest.param(when, 3, Burned, id=f"three-{when}") for when in LOSSES[4:-1]),
    ],
)
def test_one_node_is_lost_in_each_phase(door, when, n, outcome):
    """Of four one may go missing at any time; of three (t = 3) none, and no sum opens."""
    lost = schedule(when, *["never"] * (n - 1))
    course = Course(door, lost)
    play = course.run()
    assert type(play.phase) is outcome, course.trail
    check(play, lost)


def test_the_oracle_convicts_a_sum_of_others(door):
    """A sum with one survivor left out, or with the lost one in it, is not the plain sum."""
    lost = schedule("never", "upload", "never", "never")
    play = Course(door, lost).run()
    check(play, lost)
    for names in (["n00", "n02"], ["n00", "n01", "n02", "n03"], ["n00", "n01", "n02"]):
        assert play.opened_sum() != play.plain_sum(names)
    assert np.count_nonzero(play.residues(play.opened_sum())[:5]) == 4  # n01's mark is missing
