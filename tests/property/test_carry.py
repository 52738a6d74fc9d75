"""Late work is sent once: whatever rounds do, and wherever the agent is killed.

The world: rounds of one run, each with its own stretch of work (a vector of whole numbers, so that
sums are exact in float32). A round's update is its work and what it took. What was delivered and
what still waits must be all the work that finished, each stretch once.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node_agent import carry
from node_agent.carry import (
    STALE,
    carries,
    choose,
    close,
    delta_of,
    folder_of,
    key_of,
    left_out,
    note_mean,
    note_unsent,
    take,
    waiting,
    was_sent,
)
from node_agent.spool import Spool
from tests.support.plans import plan
from tests.support.private_plans import private_plan
from tests.support.worker import RUN

SIZE = 24  # rounds at most: one coordinate for each


class Killed(BaseException):
    """No handler catches it."""


@dataclass
class Disk:
    """Counts what reaches the disk, and dies before a chosen change."""

    left: int | None = None

    def change(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


class World:
    """One node's rounds; the journal is what ``sent`` remembers."""

    def __init__(self, root: Path) -> None:
        self.spool = Spool(root / "spool").make()
        self.sent: dict[int, np.ndarray] = {}
        self.made: set[int] = set()  # rounds of which the journal has a vector
        self.finished: set[int] = set()

    def job(self, number: int, selection: tuple[str, ...]) -> None:
        """The worker finishes the round's job: its own work and what it was told to add."""
        delta = np.zeros(SIZE, dtype="<f4")
        delta[number] = 1.0
        for path in take(self.spool, RUN, number, selection)[0]:
            delta += np.fromfile(path, dtype="<f4")
        path = self.spool.delta(f"{RUN}.{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        delta.tofile(path)
        self.finished.add(number)

    def close(self, number: int, selection: tuple[str, ...]) -> None:
        """What ``tidy`` does for a round that is over."""
        path = self.spool.delta(f"{RUN}.{number}")
        result = SimpleNamespace(delta_coordinates=SIZE) if path.exists() else None
        close(
            self.spool,
            RUN,
            number,
            sent=was_sent(self.spool, RUN, number, made=number in self.made),
            result=result,
            delta=path,
            selection=selection,
        )
        shutil.rmtree(self.spool.out(f"{RUN}.{number}"), ignore_errors=True)

    def waits(self) -> np.ndarray:
        folder = folder_of(self.spool, RUN)
        found = [np.fromfile(delta_of(folder, one.round), dtype="<f4") for one in waiting(folder)]
        return np.sum(found, axis=0) if found else np.zeros(SIZE)


def until_done(disk: Disk, action, left: int | None) -> None:
    """Do a step; if it is killed on the way, do it again as the next agent does."""
    disk.left = left
    try:
        action()
    except Killed:
        disk.left = None
        action()
    disk.left = None


FATES = st.sampled_from(["sent", "late", "left out", "no result", "killed worker"])
ROUNDS = st.lists(
    st.tuples(FATES, st.sampled_from(["A", "B"]), st.none() | st.integers(0, 12)),
    min_size=1,
    max_size=SIZE,
)


def watch(patch: pytest.MonkeyPatch, disk: Disk) -> None:
    """Every change that ``carry`` makes on disk asks first."""
    write, name, link, unlink = carry.atomic_write, carry.publish, os.link, Path.unlink

    def before(real):
        def asked(*args, **more):
            disk.change()
            return real(*args, **more)

        return asked

    patch.setattr(carry, "atomic_write", before(write))
    patch.setattr(carry, "publish", before(name))
    patch.setattr(os, "link", before(link))
    patch.setattr(Path, "unlink", before(unlink))


@settings(max_examples=120, deadline=None)
@given(rounds=ROUNDS)
def test_all_work_that_finished_is_sent_once_or_waits(tmp_path_factory, rounds):
    world, disk = World(tmp_path_factory.mktemp("w")), Disk()
    lost: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, disk)
        for number, (fate, tensors, dies) in enumerate(rounds):
            selection = (tensors,)
            until_done(disk, lambda n=number, s=selection: take(world.spool, RUN, n, s), dies)
            if fate in ("sent", "late", "left out"):
                world.job(number, selection)
            if fate in ("sent", "left out"):
                world.made.add(number)
            if fate == "left out":
                until_done(disk, lambda n=number: note_unsent(world.spool, RUN, n), dies)
            if fate == "sent":
                path = world.spool.delta(f"{RUN}.{number}")
                world.sent[number] = np.fromfile(path, dtype="<f4")
            until_done(disk, lambda n=number, s=selection: world.close(n, s), dies)

            delivered = np.sum([*world.sent.values(), np.zeros(SIZE)], axis=0)
            total = delivered + world.waits()
            assert (total <= 1).all(), (number, total)  # nothing twice, after every round
            lost |= {n for n in world.finished if total[n] == 0}
        # Only what nobody could take for STALE rounds is gone: its tensors had no turn.
        for one in lost:
            later = rounds[one + 1 : one + 1 + STALE]
            assert not any(
                fate == "sent" and tensors == rounds[one][1] for fate, tensors, _ in later
            ), (one, rounds)


def test_a_decision_is_kept(tmp_path):
    """What a job was told to add does not change while it is under way."""
    world = World(tmp_path)
    first = take(world.spool, RUN, 5, ("A",))
    world.job(3, ("A",))
    world.close(3, ("A",))

    assert first == take(world.spool, RUN, 5, ("A",)) == ((), None)
    assert len(take(world.spool, RUN, 6, ("A",))[0]) == 1


@pytest.mark.parametrize(
    ("late", "number", "tensors", "chosen"),
    [
        ([(3, "A")], 4, "A", [3]),
        ([(3, "A")], 4, "B", []),  # RoLoRA: the other factor's round
        ([(3, "A")], 3 + STALE, "A", [3]),
        ([(3, "A")], 4 + STALE, "A", []),
        ([(3, "A"), (4, "B"), (5, "A")], 6, "A", [3, 5]),
        ([(3, "A")], 3, "A", []),  # itself
    ],
)
def test_which_work_is_taken(late, number, tensors, chosen):
    found = [carry.Late(one, key_of((name,)), frozenset()) for one, name in late]
    assert choose(found, number=number, selection=key_of((tensors,))) == chosen


@pytest.mark.parametrize(
    ("receipts", "listed", "objection", "unsent"),
    [
        ([None], False, "", True),
        ([None, None], False, "", True),  # two attempts, none acknowledged
        ([], False, "", False),  # no vector was made: it is late work without this
        ([bytes([7])], False, "", False),  # acknowledged and left out: objected to, not sent again
        ([bytes([7]), None], False, "", False),
        ([None], True, "", False),  # the answer was lost, the vector was not
        ([None], False, "transcript", False),  # who was added is not known
    ],
)
def test_only_a_checked_sum_of_others_unsays_that_work_was_sent(
    receipts, listed, objection, unsent
):
    assert left_out(receipts, listed=listed, objection=objection) is unsent


def test_a_site_does_at_most_four_times_the_mean(tmp_path):
    """Rounded up; the cap of a job that was asked for stays what it was."""
    world = World(tmp_path)
    assert take(world.spool, RUN, 0, ("A",))[1] is None  # there was no round before
    note_mean(world.spool, RUN, 0, steps=31, nodes=3)
    assert take(world.spool, RUN, 0, ("A",))[1] is None
    assert take(world.spool, RUN, 1, ("A",))[1] == 42
    note_mean(world.spool, RUN, 1, steps=0, nodes=3)
    assert take(world.spool, RUN, 1, ("A",))[1] == 42
    assert take(world.spool, RUN, 2, ("A",))[1] is None


@pytest.mark.parametrize(
    ("mode", "carried"),
    [("record-local", False), ("record-distributed", False), ("institution", False)],
)
def test_nothing_is_carried_in_a_private_mode(mode, carried):
    """It would be released in a round that does not charge it."""
    assert carries(private_plan(mode)) is carried
    assert carries(plan(local_step={"kind": "builtin", "max_steps": 3}))
    assert not carries(plan(local_step={"kind": "synthetic", "synthetic": {"delta": 0.1}}))


def test_an_update_that_was_sent_is_not_kept_and_one_without_a_site_that_wants_it(tmp_path):
    for sent, keep in ((True, True), (False, False)):
        world = World(tmp_path / f"{sent}")
        world.job(0, ("A",))
        result = SimpleNamespace(delta_coordinates=SIZE)
        path = world.spool.delta(f"{RUN}.0")
        close(
            world.spool, RUN, 0, sent=sent, result=result, delta=path, selection=("A",), keep=keep
        )
        assert not waiting(folder_of(world.spool, RUN))
