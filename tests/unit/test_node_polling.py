"""How long a poll is held: a dead connection is found in time, however often polls are given up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.agent import Agent
from node_agent.polling import ANSWER_S, BUSY_WAIT_MS, IDLE_WAIT_MS, may_give_up_s, poll_wait_ms

BOUND_S = (IDLE_WAIT_MS + BUSY_WAIT_MS) / 1000 + ANSWER_S


def test_a_poll_is_held_long_while_nothing_moves_and_briefly_while_something_does():
    assert poll_wait_ms(busy=False, silent_s=0.0) == IDLE_WAIT_MS
    assert poll_wait_ms(busy=True, silent_s=0.0) == BUSY_WAIT_MS
    assert poll_wait_ms(busy=False, silent_s=1000.0) == BUSY_WAIT_MS


@given(st.lists(st.floats(0.0, 30.0), max_size=40))
def test_however_polls_are_given_up_a_dead_connection_is_known_in_time(reports_after):
    """Nothing is answered. Each report ends a poll before its time, where it may."""
    now = 0.0
    for after in reports_after:
        if after >= may_give_up_s(now):
            break
        now += after
    known = now + poll_wait_ms(busy=False, silent_s=now) / 1000 + ANSWER_S

    assert known <= BOUND_S


class _Listens(Agent):
    """An agent's own loop of polls, on a clock of the test: each is silent for 10 s and then given
    up, the fifth is answered."""

    def __init__(self) -> None:
        self.clock, self.waits = 0.0, []
        self.site = SimpleNamespace(monotonic=lambda: self.clock, capability="cpu")
        self._view, self._nudge = None, asyncio.Event()

    async def _poll(self, request, given_up_s):
        self.waits.append((request.wait_ms, given_up_s))
        self.clock += 10.0
        if len(self.waits) == 7:
            raise asyncio.CancelledError
        return object() if len(self.waits) == 5 else None

    def _progress(self):
        return []

    def _paused(self):
        return False

    def _take(self, view):
        pass


def test_the_agent_counts_silence_until_something_is_answered():
    agent = _Listens()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(agent._sync_loop())

    silent = [(25_000, 25.0), (15_000, 15.0), (5_000, 5.0), (2_000, 0.0), (2_000, 0.0)]
    assert agent.waits == [*silent, *silent[:2]]
