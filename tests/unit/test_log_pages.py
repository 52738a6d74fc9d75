"""Pages of the log: read once for all who follow from one head, again after a failure, few kept."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from coordinator.services.log import KEPT_PAGES, LogService
from protocols.errors import LedgerBusyError


class Leaves:
    """The one thing that a page asks of a ledger, counted: leaves by their indices."""

    def __init__(self) -> None:
        self.reads = 0
        self.away = False

    async def read(self, _name, work):
        self.reads += 1
        await asyncio.sleep(0)
        if self.away:
            raise LedgerBusyError("the ledger is busy")
        leaves = [SimpleNamespace(entry=b"leaf %d" % index) for index in range(10)]
        return work(SimpleNamespace(leaves=lambda first, end: leaves[first:end]))


def play(story) -> None:
    async def main() -> None:
        ledger = Leaves()
        await story(LogService(callers=None, ledger=ledger, hub=None), ledger)

    asyncio.run(main())


def test_all_who_follow_from_one_head_have_one_read():
    async def story(service, ledger):
        pages = await asyncio.gather(*(service._page(2, 5) for _ in range(33)))
        assert {tuple(page.entries) for page in pages} == {(b"leaf 2", b"leaf 3", b"leaf 4")}
        assert ledger.reads == 1
        assert list((await service._page(5, 7)).entries) == [b"leaf 5", b"leaf 6"]
        assert ledger.reads == 2

    play(story)


def test_a_read_that_failed_is_tried_again():
    async def story(service, ledger):
        ledger.away = True
        with pytest.raises(LedgerBusyError):
            await service._page(0, 3)
        ledger.away = False
        assert len((await service._page(0, 3)).entries) == 3

    play(story)


def test_who_stops_waiting_does_not_stop_the_others():
    async def story(service, ledger):
        first, second = (asyncio.create_task(service._page(0, 3)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert len((await second).entries) == 3
        assert first.cancelled()
        assert ledger.reads == 1

    play(story)


def test_few_pages_are_kept():
    async def story(service, _ledger):
        for first in range(9):
            await service._page(first, 10)
            assert len(service._read) <= KEPT_PAGES

    play(story)
