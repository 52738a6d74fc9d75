"""Whoever is lost whenever: the opened sum is the plain sum of exactly the survivors, or nothing.

Every member's vector begins with a row of marks, 1 in its own place: the opened marks name who was
counted, a 2 is a double count, anything else is a mask that stayed on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from protocols.secagg import masks as masks_module
from protocols.secagg.errors import CheckFailedError, TooFewSharesError
from protocols.secagg.unmask import unmask
from protocols.secagg.verify import recompute_sum, verify_transcript
from protocols.tensors.ring import Ring
from tests.support.secagg import (
    World,
    make_attempt,
    node_name,
    sum_chunk,
    unpack_all,
)

PHASES = ("never", "ready", "deal", "acknowledge", "upload", "commit", "reveal")


@dataclass(frozen=True)
class Outcome:
    """How a play ended: ``opened`` is uint32 [d] or None, with the reason."""

    why: str
    survivors: tuple = ()
    opened: np.ndarray | None = None
    attempts: int = 1


def marked(n: int, d: int, ring: Ring, seed: int):
    """Vectors whose first n coordinates name their owner; the others are as large as allowed."""
    limit = ring.clamp_limit(n)
    rng = np.random.default_rng(seed)

    def vector(index: int) -> np.ndarray:
        marks = np.zeros(n, np.int32)
        marks[index - 1] = 1
        return np.concatenate([marks, rng.integers(-limit, limit + 1, d, dtype=np.int32)])

    return vector


def refused_by(clause: str, step) -> bool:
    """Take a step; True if that clause refused it, an error if another did."""
    try:
        step()
    except CheckFailedError as error:
        if error.clause != clause:
            raise
        return True
    return False


def play(world: World, lost_at: dict, *, adjust=lambda world: None) -> Outcome:
    """One round: members fall silent at their phase; Dealing starts again without them.

    ``adjust`` lets a test plant a mistake between uploading and opening.
    """
    terms = world.attempt.terms
    here = list(world.members)
    attempts = 0
    while True:
        attempts += 1
        world = World(
            attempt=make_attempt(len(world.members), number=attempts),
            members=world.members,
            ring=world.ring,
        )
        here = [node for node in here if lost_at[node] != "ready"]
        if len(here) < terms.least_survivors:
            return Outcome("too few are ready", attempts=attempts)
        world.do_ready(here)
        dealt = [node for node in here if lost_at[node] != "deal"]
        world.do_deal(dealt)
        if dealt == here:
            world.do_deliver()
            silent = [node for node in here if lost_at[node] == "acknowledge"]
            for node in silent:
                del world.deliveries[node]
            world.do_acknowledge()
            if not silent:
                break
            dealt = [node for node in here if node not in silent]
        world.do_abort(dealt)  # nothing was uploaded: no certificate is needed
        here = dealt
    world.do_go()
    world.do_upload([node for node in here if lost_at[node] != "upload"])
    adjust(world)
    if refused_by("6.3", world.do_survivors):
        return Outcome("too few survivors", attempts=attempts)
    world.do_commit([node for node in world.headers if lost_at[node] != "commit"])
    revealing = [node for node in world.commits if lost_at[node] != "reveal"]
    if refused_by("7.1", lambda: world.do_reveal(revealing)):
        return Outcome("too few commits", attempts=attempts)
    try:
        transcript = world.do_open()
    except TooFewSharesError:
        return Outcome("too few reveals", attempts=attempts)
    verified = verify_transcript(transcript, world.attempt)
    survivors = tuple(verified.listed.headers)
    chunks = unmask(
        world.masked_sum(survivors), world.coordinates, world.ring, verified.remover(world.ring)
    )
    opened = np.concatenate(list(chunks))
    readers = {
        node: (lambda offset, length, data=world.spools[node]: data[offset : offset + length])
        for node in survivors
    }
    packed = b"".join(recompute_sum(verified, readers, world.coordinates, world.ring, threads=2))
    np.testing.assert_array_equal(unpack_all(packed, world.coordinates, world.ring), opened)
    return Outcome("opened", survivors=survivors, opened=opened, attempts=attempts)


def expected(n: int, lost_at: dict, terms) -> tuple[str, list]:
    """By counting alone: what must come of the round, and over whom."""
    at = {phase: [node for node in lost_at if lost_at[node] == phase] for phase in PHASES}
    dealt = n - len(at["ready"]) - len(at["deal"])
    least = terms.least_survivors
    if n - len(at["ready"]) < least or dealt < least:
        return "too few are ready", []
    dealt -= len(at["acknowledge"])
    if dealt < least:
        return "too few are ready", []
    survivors = sorted(at["never"] + at["commit"] + at["reveal"])
    if len(survivors) < least:
        return "too few survivors", []
    if len(survivors) - len(at["commit"]) < terms.threshold:
        return "too few commits", []
    if len(at["never"]) < terms.threshold:
        return "too few reveals", []
    return "opened", survivors


def check(world: World, lost_at: dict, outcome: Outcome) -> None:
    n = len(world.members)
    why, survivors = expected(n, lost_at, world.attempt.terms)
    assert outcome.why == why
    if why != "opened":
        assert outcome.opened is None
        return
    assert list(outcome.survivors) == survivors
    marks = outcome.opened[:n].tolist()
    assert marks == [int(node_name(i) in survivors) for i in range(1, n + 1)]
    np.testing.assert_array_equal(outcome.opened, world.plain_sum(survivors))


@st.composite
def schedules(draw):
    small = st.integers(3, 10)  # drawn more often: a large round takes seconds
    n = draw(small | small | small | st.integers(3, 33))
    nodes = [node_name(i) for i in range(1, n + 1)]
    lost_at = dict.fromkeys(nodes, "never")
    # Draw how many are lost first: losing each by a coin would hardly ever open large rounds.
    for node in draw(st.permutations(nodes))[: draw(st.integers(0, n // 3 + 1))]:
        lost_at[node] = draw(st.sampled_from(PHASES[1:]))
    return n, lost_at, draw(st.sampled_from([16, 20, 24])), draw(st.integers(1, 9))


@settings(max_examples=25, deadline=None)
@given(schedules())
def test_the_sum_is_of_exactly_the_survivors_or_nothing_opens(schedule):
    n, lost_at, bits, d = schedule
    ring = Ring(bits)
    world = World.make(n, bits=bits, vectors=marked(n, d, ring, seed=n))

    outcome = play(world, lost_at)

    event(outcome.why)
    event(f"attempts: {outcome.attempts}")
    check(world, lost_at, outcome)


@pytest.mark.parametrize(("n", "losses"), [(16, 5), (33, 0), (33, 11), (33, 12)])
def test_large_rounds_to_the_edge_of_what_is_tolerated(n, losses):
    world = World.make(n, vectors=marked(n, 3, Ring(20), seed=n))
    lost_at = {
        node: "upload" if index < losses else "never" for index, node in enumerate(world.members)
    }
    outcome = play(world, lost_at)
    assert (outcome.why == "opened") == (losses <= world.attempt.terms.losses_tolerated(n))
    check(world, lost_at, outcome)


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        ({}, "opened"),
        ({"ready": 1}, "opened"),
        ({"deal": 1}, "opened"),
        ({"acknowledge": 1}, "opened"),
        ({"upload": 1}, "opened"),
        ({"commit": 1}, "opened"),
        ({"reveal": 1}, "opened"),
        ({"ready": 2}, "too few are ready"),
        ({"deal": 2}, "too few are ready"),
        ({"upload": 2}, "too few survivors"),
        ({"commit": 2}, "too few commits"),
        ({"reveal": 2}, "too few reveals"),
    ],
)
def test_every_outcome_is_reachable(lost, why):
    """A property over schedules means little if some ends are never reached: four members."""
    world = World.make(4, vectors=marked(4, 2, Ring(20), seed=4))
    lost_at = dict.fromkeys(world.members, "never")
    for phase, count in lost.items():
        for node in list(lost_at)[:count]:
            lost_at[node] = phase
    outcome = play(world, lost_at)
    assert outcome.why == why
    check(world, lost_at, outcome)
    assert outcome.attempts == (2 if lost.keys() & {"deal", "acknowledge"} else 1)


def test_more_than_one_chunk():
    world = World.make(3, bits=20, vectors=marked(3, 2**18 + 11, Ring(20), seed=3))
    outcome = play(world, dict.fromkeys(world.members, "never"))
    check(world, dict.fromkeys(world.members, "never"), outcome)


# -- the oracle convicts -----------------------------------------------------------------------


def played(monkeypatch=None, adjust=lambda world: None, losses=1) -> tuple[World, dict, Outcome]:
    world = World.make(4, vectors=marked(4, 50, Ring(20), seed=1))
    lost_at = dict.fromkeys(world.members, "never")
    for node in list(lost_at)[:losses]:
        lost_at[node] = "upload"
    return world, lost_at, play(world, lost_at, adjust=adjust)


def convicted(world, lost_at, outcome) -> bool:
    try:
        check(world, lost_at, outcome)
    except AssertionError:
        return True
    return False


def test_the_oracle_acquits_the_real_thing():
    assert not convicted(*played())


def test_the_oracle_convicts_a_wrong_sign(monkeypatch):
    """A node that adds every pair mask with + : pairs no longer cancel."""
    real = masks_module._add_streams

    def all_plus(streams, part, scratch, width):
        real([(stream, 1) for stream, _ in streams], part, scratch, width)

    monkeypatch.setattr(masks_module, "_add_streams", all_plus)
    assert convicted(*played())


def test_the_oracle_convicts_a_double_count(monkeypatch):
    """A coordinator that adds one spool twice; the recomputation in ``play`` sees it first."""

    def twice(world, nodes):
        again = [*nodes, *list(nodes)[:1]]
        return lambda chunk: sum_chunk(world.spools, again, chunk, world.coordinates, world.ring)

    monkeypatch.setattr(World, "masked_sum", twice)
    world = World.make(4, vectors=marked(4, 50, Ring(20), seed=1))
    lost_at = dict.fromkeys(world.members, "never")
    with pytest.raises(AssertionError):
        check(world, lost_at, play(world, lost_at))


def test_the_oracle_convicts_a_mask_that_stays_on(monkeypatch):
    """An unmasking that forgets the pair masks of the lost member."""
    from protocols.secagg import unmask as unmask_module

    real = unmask_module.MaskAdder
    monkeypatch.setattr(unmask_module, "MaskAdder", lambda masks, ring: real(masks[:-1], ring))
    assert convicted(*played())


def test_the_oracle_convicts_another_vector_than_was_meant():
    """An upload that is one off in one coordinate."""

    def nudge(world):
        node = next(iter(world.headers))
        spool = bytearray(world.spools[node])
        spool[2 * 10] ^= 1
        world.spools[node] = bytes(spool)

    assert convicted(*played(adjust=nudge))
