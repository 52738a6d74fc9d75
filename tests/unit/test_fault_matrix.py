"""The matrix of faults visits every commit point of the source, and the page is its outcome."""

from __future__ import annotations

import ast

import pytest

from tests.matrix.points import (
    ELSEWHERE,
    NOT_YET,
    _of_module,
    commit_points,
    names,
    reason_elsewhere,
)
from tests.matrix.render import FACTS, PAGE, page, read_facts, rows_of

pytestmark = pytest.mark.skipif(not FACTS.exists(), reason="`make faults` has not run yet")
PARTS = ("coordinator", "node", "worker")
HOW = "run `make faults` (see tests/matrix/__main__.py), or say in ELSEWHERE why it is not visited"


@pytest.fixture(scope="module")
def visited() -> set[str]:
    """Commit points at which a process was killed, before or after."""
    return {row["point"].partition("@")[0] for row in rows_of(read_facts()) if row["point"]}


@pytest.mark.parametrize("part", PARTS)
def test_every_commit_point_is_visited_or_has_a_reason(part, visited):
    new = {point for point in commit_points(part) if not reason_elsewhere(point)} - visited
    assert not new - NOT_YET, f"{sorted(new - NOT_YET)}: {HOW}"


def test_no_debt_is_kept_that_was_paid(visited):
    assert not NOT_YET & visited


def test_no_reason_is_given_for_what_is_no_point_any_more():
    points = {point for part in PARTS for point in commit_points(part)}
    stale = {name for name in ELSEWHERE if not any(names(name, each) for each in points)}
    assert not stale


def test_every_fault_ended_with_the_results_of_the_undisturbed_run():
    bad = [row for row in rows_of(read_facts()) if row["outcome"] != "same"]
    assert bad == []


def test_the_page_is_made_of_the_facts():
    assert PAGE.read_text("utf-8") == page(read_facts()), "run python -m tests.matrix --render"


SOURCE = """
class Service:
    async def call(self):
        await self._ledger.run("new_transaction", lambda tx: None)
        await self._handed_on("another", 1)

    async def _handed_on(self, name, value):
        return await self._ledger.run(name, value)

    def keep(self, path, text):
        os.fsync(1)
        path.replace(text)
        text.replace("a", "b")
"""


def test_a_new_transaction_and_a_new_file_are_found():
    """The oracle can fail."""
    assert set(_of_module("coordinator.new", ast.parse(SOURCE))) == {
        "tx:new_transaction",
        "tx:another",
        "file:coordinator.new.Service.keep#fsync",
        "file:coordinator.new.Service.keep#replace",
    }


def test_a_transaction_without_a_fixed_name_is_refused():
    source = SOURCE.replace('"new_transaction"', "self.name()")
    with pytest.raises(ValueError, match="without a fixed name"):
        set(_of_module("coordinator.new", ast.parse(source)))
