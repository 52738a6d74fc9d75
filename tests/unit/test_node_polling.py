"""How long a poll is held: a dead connection is found in time, however often polls are given up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

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
