"""How long the coordinator may hold one Sync, a node's long poll, and when a node gives one up.

A poll is given up when the node has something to report, and the next one is sent on the same
connection. A connection that a middlebox forgot looks open; what tells is a poll that is not
answered in time. So silence counts from the first poll that was given up, and when it has lasted as
long as a poll is ever held, none is given up any more: otherwise a node that reports something now
and then would never know.
"""

from __future__ import annotations

from typing import Final

IDLE_WAIT_MS: Final = 25_000  # while nothing moves
BUSY_WAIT_MS: Final = 2_000  # while there is progress to report
ANSWER_S: Final = 15.0  # for the answer itself, after the wait


def poll_wait_ms(*, busy: bool, silent_s: float) -> int:
    """How long the next Sync may be held.

    Args:
        busy: there is progress to report.
        silent_s: since the oldest poll was sent that was not answered but given up; 0: none was.

    Returns:
        Milliseconds. With ``may_give_up_s`` a dead connection is known for one ``IDLE_WAIT_MS`` +
        ``BUSY_WAIT_MS`` and ``ANSWER_S`` after the first poll on it.
    """
    if busy:
        return BUSY_WAIT_MS
    return max(BUSY_WAIT_MS, IDLE_WAIT_MS - int(1000 * silent_s))


def may_give_up_s(silent_s: float) -> float:
    """For how long from now a poll may be given up in order to report something, seconds."""
    return max(0.0, IDLE_WAIT_MS / 1000 - silent_s)
