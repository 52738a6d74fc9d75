"""A clock that is wrong for good: of one node it costs that node at most.

Nobody sets it right again. Without a round log no decision asks a node's clock. With one, a
witness's cosignature more than five minutes ahead of the reader's clock is no cosignature
(protocols/spec/log.md), and a view of the log older than a day opens no round: such a node is to
the others as if it were down, so a quorum of them has to be left.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from protocols.rounds import Released
from tests.simulation.making import world_of
from tests.simulation.schedules import SLICE, Player
from tests.simulation.world import (
    COORDINATOR,
    LOGGED,
    MASKED_LOGGED,
    OPEN_TWICE,
    PRIVATE_LOGGED,
    Setting,
)

NEAR = (-40, 40)  # seconds: nobody should notice
FAR = (-2 * 86_400, -3_600, 3_600, 2 * 86_400)
LOOKS = 100  # of the oracle, until a run has ended


def _all_in(player: Player) -> list[frozenset[str]]:
    """Who is in the sum of each round that was released."""
    return [row.phase.survivors for row in player.oracle.rows if isinstance(row.phase, Released)]


async def _until_it_ends(player: Player) -> None:
    for _ in range(LOOKS):
        await player.wait(SLICE)
        if player.oracle.status != "active":
            break
    await player.wait(4 * SLICE)  # verdicts
    player.oracle.look()
    player.oracle.check_models()


async def _wrong_for_good(player: Player, who: str, seconds: int, after_s: float) -> None:
    player.world.start()
    await player.wait(after_s)
    player.world.victim(who).set_clock(timedelta(seconds=seconds))
    await _until_it_ends(player)


def _played(setting: Setting, who: str, seconds: int, after_s: float = 0.0) -> Player:
    with world_of(setting, 5) as world:
        player = Player(world)
        world.loop.run_until_complete(_wrong_for_good(player, who, seconds, after_s))
        return player


@pytest.mark.parametrize("seconds", [*NEAR, *FAR])
@pytest.mark.parametrize("setting", [OPEN_TWICE, MASKED_LOGGED, PRIVATE_LOGGED], ids=repr)
def test_a_node_whose_clock_is_wrong_costs_itself_at_most(setting: Setting, seconds: int):
    player = _played(setting, "b", seconds)

    assert player.oracle.status == "done"
    sums, everybody = _all_in(player), frozenset(setting.names)
    at_least = everybody - {"b"} if setting.log and seconds in FAR else everybody
    assert len(sums) == setting.rounds
    assert all(at_least <= survivors for survivors in sums), sums


@pytest.mark.parametrize("seconds", [*NEAR, 3_600, 2 * 86_400])
@pytest.mark.parametrize("setting", [OPEN_TWICE, PRIVATE_LOGGED], ids=repr)
def test_a_coordinator_whose_clock_jumps_for_good_goes_on(setting: Setting, seconds: int):
    player = _played(setting, COORDINATOR, seconds, after_s=0.3)

    assert player.oracle.status == "done"
    assert _all_in(player) == [frozenset(setting.names)] * setting.rounds


def test_a_coordinator_set_back_before_its_certificates_takes_nobody_until_it_is_right_again():
    async def wrong_and_right(player: Player) -> int:
        await _wrong_for_good(player, COORDINATOR, -3_600, 0.3)
        meanwhile = len(_all_in(player))
        player.world.victim(COORDINATOR).set_clock(timedelta())
        await _until_it_ends(player)
        return meanwhile

    with world_of(OPEN_TWICE, 5) as world:
        player = Player(world)
        assert world.loop.run_until_complete(wrong_and_right(player)) == 0
    assert player.oracle.status == "done"
    assert len(_all_in(player)) == OPEN_TWICE.rounds


def test_three_witnesses_have_no_clock_to_spare():
    """A quorum of three is all three: one that is an hour ahead is missed as if it were down."""
    player = _played(LOGGED, "b", 3_600)

    assert player.oracle.status == "failed"
    assert not _all_in(player)
