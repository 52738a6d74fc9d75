"""What time it is. Everything that needs to know is given a clock; nothing reads the system's own.

All times are aware and UTC. The coordinator's clock decides deadlines; the nodes' clocks never do.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> datetime:
        """The time now, aware, UTC."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """The time now, aware, UTC."""
        return datetime.now(UTC)


class ManualClock:
    """A clock that stands still until somebody moves it: for simulations."""

    def __init__(self, start: datetime) -> None:
        if start.tzinfo is None:
            raise ValueError("a time without a zone")
        self._now = start.astimezone(UTC)

    def now(self) -> datetime:
        """The time it was last set to."""
        return self._now

    def advance(self, by: timedelta) -> datetime:
        """Let time pass; return the new time."""
        if by < timedelta():
            raise ValueError("time does not run backwards")
        self._now += by
        return self._now
