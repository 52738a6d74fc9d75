"""A ledger to test on: the fixture ``url`` runs each test on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.clock import ManualClock
from coordinator.ledger import Ledger
from tests.support.ledgers import START
from tests.support.postgres import PostgresServer


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty ledger is."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.sqlite"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


def with_ledger(url: str, story: Callable[[Ledger], Any]) -> None:
    """Run ``story``, a coroutine function, on an open ledger."""

    async def play() -> None:
        async with Ledger(url, clock=ManualClock(START)) as ledger:
            await story(ledger)

    asyncio.run(play())
