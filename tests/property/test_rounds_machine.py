"""Whatever is lost, late or repeated: each survivor is in the sum exactly once, nobody else is.

The oracle lives in tests/support/round_play.py; below it convicts planted mistakes, and the
schedules are shown to reach every end.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import rounds
from protocols.cohort import Quorum
from protocols.errors import EquivocationError, RefusedError, WrongPhaseError
from protocols.rounds import (
    Aborted,
    Burned,
    CommitArrived,
    Committing,
    Dealing,
    Phase,
    Released,
    Revealing,
    SharesArrived,
    Step,
    Training,
    UploadArrived,
    Uploading,
    step,
)
from tests.support import round_play
from tests.support.round_play import (
    FATES,
    KINDS,
    PLAYERS,
    PUBLIC,
    ROSTER,
    SECURE,
    Mistake,
    Move,
    Server,
    counted,
    play,
    random_schedule,
    vector,
)

MODES = pytest.mark.parametrize("terms", [SECURE, PUBLIC], ids=["secure", "open"])
SEEDS = 400

moves = st.builds(
    Move,
    kind=st.sampled_from(KINDS),
    who=st.integers(0, len(PLAYERS) - 1),
    fate=st.sampled_from(FATES),
    attempt=st.sampled_from([1, 1, 2]),
)
schedules = st.lists(moves, max_size=120)


@MODES
@settings(max_examples=150, deadline=None)
@given(schedule=schedules)
def test_each_survivor_is_in_the_sum_exactly_once(terms, schedule):
    play(schedule, Server(terms=terms))


def games(terms, **server):
    """The same schedules for everybody: by seed."""
    for seed in range(SEEDS):
        yield play(random_schedule(random.Random(seed)), Server(terms=terms, **server))


@MODES
def test_schedules_reach_every_end(terms):
    """A property over schedules means little if they do not get anywhere."""
    ends: Counter[str] = Counter()
    visited: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for game in games(terms):
        ends[type(game.phase).__name__] += 1
        visited.update(set(game.visited))
        lost.update(game.lost)

    assert ends["Released"] >= SEEDS // 8, ends
    assert ends["Aborted"] >= 10, ends
    assert min(lost.values()) > SEEDS, lost  # else nothing was tested
    if terms is SECURE:
        assert ends["Burned"] >= 5, ends
        for name in ("Dealing2", "Uploading2", "Committing1", "Revealing1", "Released2"):
            assert visited[name] >= 3, (name, visited)


@MODES
def test_a_release_is_reachable(terms):
    """Everybody does their part, one after the other."""
    game = play([Move("act", who) for _ in range(8) for who in range(len(ROSTER))], Server(terms))

    assert isinstance(game.phase, Released)
    assert game.phase.survivors == frozenset(ROSTER)
    assert counted(game.server.sum) == {(node, 1): 1 for node in ROSTER}


def test_who_is_lost_while_dealing_is_not_in_the_sum():
    acts = [Move("act", who) for _ in range(3) for who in range(5)]
    without_e = [Move("act", who) for _ in range(8) for who in range(4)]
    deal = [Move("act", who) for who in range(4)]
    game = play([*acts[:10], *deal, Move("expire"), *without_e], Server(SECURE))

    assert "Dealing2" in game.visited
    assert counted(game.server.sum) == {(node, 2): 1 for node in ROSTER[:4]}


def test_the_digits_name_node_and_attempt():
    total = vector(ROSTER[1], 1) * 2 + vector(ROSTER[4], 2)

    assert counted(total) == {(ROSTER[1], 1): 2, (ROSTER[4], 2): 1}


# -- the oracle can fail -------------------------------------------------------------------------


class Forgetful(Server):
    """Has no receipts: a vector that comes again is added again."""

    def store(self, node, attempt):
        value = vector(node, attempt)
        self.receipts[(node, attempt)] = self.receipts.get((node, attempt), 0) + value


class Indiscriminate(Server):
    """Adds up everything that ever came, not the survivors of the attempt."""

    def add_up(self, released):
        return sum(self.receipts.values())


def convictions(make_server) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in range(SEEDS):
        try:
            play(random_schedule(random.Random(seed)), make_server())
        except Mistake as mistake:
            found[str(mistake).split("(")[0][:30]] += 1
    return found


@MODES
@pytest.mark.parametrize("mistaken", [Forgetful])
def test_a_mistaken_server_is_convicted(terms, mistaken):
    assert convictions(lambda: mistaken(terms=terms)).total() > SEEDS // 20


def test_the_digits_show_a_double_count():
    """The very charge: a 2."""
    twice = [Move("act", 0), Move("again", 0)]
    acts = [Move("act", who) for _ in range(2) for who in range(5)]

    with pytest.raises(Mistake, match="'a', 1\\): 2"):
        play([*acts, *twice, *[Move("act", who) for who in range(1, 5)]], Forgetful(PUBLIC))


def _adopt_dropped(round_, phase, event, now) -> Step:
    """A node that the survivor list left out is let back in."""
    match phase, event:
        case ((Committing() | Revealing()), UploadArrived(node, _)) if node in phase.ready:
            return Step(replace(phase, survivors=phase.survivors | {node}), "mistake")
        case _:
            return step(round_, phase, event, now)


def _any_attempt(round_, phase, event, now) -> Step:
    """Vectors of another attempt count."""
    if isinstance(phase, Uploading) and isinstance(event, UploadArrived):
        phase = replace(phase, received=phase.received | {event.node})
        return step(round_, phase, rounds.TimePassed(), now)
    return step(round_, phase, event, now)


def _two_verdicts(round_, phase, event, now) -> Step:
    """Commits and aborts of one node both count."""
    try:
        return step(round_, phase, event, now)
    except EquivocationError:
        if isinstance(phase, Committing) and isinstance(event, CommitArrived):
            return Step(replace(phase, commits=phase.commits | {event.node}), "mistake")
        if isinstance(phase, Committing):
            return Step(replace(phase, aborts=phase.aborts | {event.node}), "mistake")
        raise


def _no_deadline(round_, phase, event, now) -> Step:
    """What comes late still counts."""
    try:
        return step(round_, phase, event, now)
    except WrongPhaseError:
        closes_at = rounds.deadline(phase)
        if closes_at is None or now < closes_at:
            raise
        return step(round_, replace(phase, closes_at=now + round_play.MINUTE), event, now)


def _one_too_few(round_, phase, event, now) -> Step:
    """Revealing after one commit too few, or released after one share set too few."""
    answer = step(round_, phase, event, now)
    match answer.phase:
        case Committing(commits=commits, terms=terms) if (
            terms.quorum and len(commits) == terms.quorum.threshold - 1
        ):
            return Step(
                Revealing(
                    terms=terms,
                    closes_at=now + terms.reveal,
                    attempt=answer.phase.attempt,
                    ready=answer.phase.ready,
                    survivors=answer.phase.survivors,
                    commits=commits,
                ),
                "mistake",
            )
        case _:
            return answer


def _early_release(round_, phase, event, now) -> Step:
    """One set of shares is enough."""
    if isinstance(phase, Revealing) and isinstance(event, SharesArrived):
        return Step(Released(attempt=phase.attempt, survivors=phase.survivors), "mistake")
    return step(round_, phase, event, now)


def _both_left_and_ready(round_, phase, event, now) -> Step:
    """A node that left is ready all the same."""
    try:
        return step(round_, phase, event, now)
    except EquivocationError:
        if isinstance(phase, Training) and isinstance(event, rounds.ReadyArrived):
            return Step(replace(phase, ready=phase.ready | {event.node}), "mistake")
        raise


def _undead(round_, phase, event, now) -> Step:
    """An aborted round goes on."""
    try:
        return step(round_, phase, event, now)
    except RefusedError:
        if isinstance(phase, Aborted | Burned) and isinstance(event, UploadArrived):
            return Step(Released(attempt=1, survivors=frozenset({event.node})), "mistake")
        raise


def _everybody_is_listed(round_, phase, event, now) -> Step:
    """No list is asked."""
    before, rounds._listed = rounds._listed, lambda *_: None
    try:
        return step(round_, phase, event, now)
    finally:
        rounds._listed = before


def _dropped_stay(round_, phase, event, now) -> Step:
    """Dealing starts over, but with those who were lost."""
    answer = step(round_, phase, event, now)
    if (
        isinstance(phase, Dealing)
        and isinstance(answer.phase, Dealing)
        and answer.phase.attempt > phase.attempt
    ):
        everybody: Phase = replace(answer.phase, ready=frozenset(ROSTER))
        return Step(everybody, "mistake")
    return answer


@pytest.mark.parametrize(
    ("mistake", "terms"),
    [
        (_adopt_dropped, SECURE),
        (_any_attempt, SECURE),
        (_two_verdicts, SECURE),
        (_no_deadline, SECURE),
        (_no_deadline, PUBLIC),
        (_one_too_few, SECURE),
        (_early_release, SECURE),
        (_both_left_and_ready, PUBLIC),
        (_undead, PUBLIC),
        (_everybody_is_listed, SECURE),
        (_everybody_is_listed, PUBLIC),
        (_dropped_stay, SECURE),
    ],
)
def test_a_planted_mistake_is_convicted(mistake, terms):
    assert convictions(lambda: Server(terms=terms, step=mistake)).total() >= 2


def test_adding_up_everything_is_convicted():
    """Vectors of an attempt that was given up, or of who was dropped, show in the digits."""
    terms = replace(SECURE, quorum=Quorum(roster=5, threshold=3, colluders=0, min_surviving=3))
    ready = [Move("act", who) for _ in range(2) for who in range(5)]
    deal = [Move("act", who) for _ in range(2) for who in range(5)]
    server = Indiscriminate(terms=terms)
    server.receipts[(ROSTER[4], 3)] = vector(ROSTER[4], 3)  # left behind by somebody

    with pytest.raises(Mistake, match="'e', 3"):
        play([*ready, *deal, *[Move("act", who) for _ in range(3) for who in range(5)]], server)
