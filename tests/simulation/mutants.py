"""Mistakes put back into Minga on purpose: each must be found by the simulation.

Each is a context manager that breaks one thing, the settings in which that thing exists, and how
many schedules may pass until a violation is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from coordinator.drivers.rounds import RoundDriver
from coordinator.ledger import Ledger
from coordinator.services.bulk import BulkService
from node_agent import decide
from node_agent import secure as secure_module
from node_agent.journal import Journal
from node_agent.privacy import PrivacyGuard
from node_agent.secure_state import SecureStates
from policies.privacy.budget import SpendStatus
from tests.simulation.schedules import Schedule, kills, losses, one_kill, schedule
from tests.simulation.world import MASKED, OPEN, PRIVATE, Setting

Break = Callable[[], AbstractContextManager[None]]


@contextmanager
def counts_a_repeated_upload_twice() -> Iterator[None]:
    """An upload that is handed in again is another upload."""
    real, finish = RoundDriver._uploads_of, BulkService.FinishUpload
    handed_in: Counter[tuple[Any, bytes]] = Counter()  # by the ledger that took it

    async def again(self: Any, request: Any, context: Any) -> Any:
        answer = await finish(self, request, context)
        handed_in[self._ledger, request.upload_id] += 1
        return answer

    def uploads(self: Any, tx: Any, round_id: Any, phase: Any) -> Any:
        ids = {row.node: row.upload_id for row in tx.uploads(round_id, phase.attempt)}
        paths = real(self, tx, round_id, phase)
        nodes = sorted(phase.survivors)
        return [
            path
            for path, node in zip(paths, nodes, strict=True)
            for _ in range(handed_in[self._ledger, ids[node]])
        ]

    with (
        mock.patch.object(RoundDriver, "_uploads_of", uploads),
        mock.patch.object(BulkService, "FinishUpload", again),
    ):
        yield


@contextmanager
def forgets_what_it_is_about_to_send() -> Iterator[None]:
    """The journal keeps a vector's header in memory only."""
    kept: dict[Any, Any] = {}  # by the journal itself: an id is another journal's once it is gone

    def add(self: Any, record: Any, _detail: Any) -> None:
        kept[self, record.round, record.attempt] = record

    def get(self: Any, round_: Any, attempt: int) -> Any:
        return kept.get((self, round_, attempt))

    def nothing(*_: Any) -> None: ...

    with (
        mock.patch.object(Journal, "add_upload", add),
        mock.patch.object(Journal, "upload", get),
        mock.patch.object(Journal, "add_receipt", nothing),
        mock.patch.object(Journal, "upload_files", return_value={}),
    ):
        yield


@contextmanager
def begins_an_attempt_over() -> Iterator[None]:
    """The state of a secure sum is not written; a node that lost it makes fresh keys for it."""
    real = decide.while_secure

    def begins(s: Any, round_: Any, phase: Any) -> Any:
        if s.secure is None and s.node in phase.ready:
            step = decide.SecureStep(round_, phase.attempt, "ready")
            return decide.Decision(actions=(step,), why="once more")
        return real(s, round_, phase)

    def keep(self: Any, run: Any, state: Any) -> None:
        self._cache[run] = state

    with (
        mock.patch.object(SecureStates, "keep", keep),
        mock.patch.object(Journal, "stage", return_value=None),
        mock.patch.object(decide, "lost_state", return_value=None),
        mock.patch.object(decide, "while_secure", begins),
        mock.patch.object(secure_module, "check_not_lost", return_value=None),
    ):
        yield


@contextmanager
def refunds_what_was_released() -> Iterator[None]:
    """The node's ledger takes a spend back when its round is over."""
    real = PrivacyGuard.over

    def over(self: Any, plan: Any, round_: Any, *, in_sum: bool) -> Any:
        return real(self, plan, round_, in_sum=False)

    with (
        mock.patch.object(PrivacyGuard, "over", over),
        mock.patch.object(PrivacyGuard, "releases", return_value=None),
        mock.patch.object(Journal, "made_vector", return_value=False),
    ):
        yield


@contextmanager
def answers_before_it_has_committed() -> Iterator[None]:
    """A receipt is given for an upload that the ledger does not always keep."""
    real = Ledger._write
    calls = [0]

    class _Undone(Exception):
        pass

    def write(self: Any, name: str, work: Any) -> Any:
        calls[0] += 1
        if name != "accept_upload" or calls[0] % 5:
            return real(self, name, work)
        answer: list[Any] = []

        def lost(tx: Any) -> None:
            answer.append(work(tx))
            raise _Undone

        try:
            real(self, name, lost)
        except _Undone:
            return answer[0]

    with mock.patch.object(Ledger, "_write", write):
        yield


@contextmanager
def believes_what_is_published() -> Iterator[None]:
    """The coordinator publishes the sum of all but one, and says that all are in it."""
    real = RoundDriver._uploads_of

    def uploads(self: Any, tx: Any, round_id: Any, phase: Any) -> Any:
        return list(real(self, tx, round_id, phase))[:-1]

    with mock.patch.object(RoundDriver, "_uploads_of", uploads):
        yield


@contextmanager
def takes_spends_back_at_the_coordinator() -> Iterator[None]:
    """The coordinator refunds a spend when a node says again that it joined."""
    from coordinator.ledger.privacy import PrivacySpends

    real = PrivacySpends.settle_spend

    def settle(self: Any, round_id: Any, node: Any, status: Any, now: Any) -> None:
        status = SpendStatus.VOID if status is SpendStatus.RELEASED and node == "b" else status
        real(self, round_id, node, status, now)

    with mock.patch.object(PrivacySpends, "settle_spend", settle):
        yield


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake, and where to look for it."""

    breaks: Break
    setting: Setting
    within: int  # schedules
    says: tuple[str, ...]  # one of these is in the violation
    made: Callable[[int, Setting], Schedule] = schedule  # of a seed


MUTANTS = (
    Mutant(counts_a_repeated_upload_twice, OPEN, 20, ("the sum is",), made=losses),
    Mutant(
        forgets_what_it_is_about_to_send,
        OPEN,
        40,
        ("two different things: vector", "unknown_upload"),
        made=one_kill,
    ),
    Mutant(begins_an_attempt_over, MASKED, 15, ("two different things",), made=kills),
    Mutant(refunds_what_was_released, PRIVATE, 5, ("its own ledger says",)),
    Mutant(answers_before_it_has_committed, OPEN, 10, ("not_in_sum",)),
    Mutant(believes_what_is_published, OPEN, 3, ("the sum is",)),
    Mutant(takes_spends_back_at_the_coordinator, PRIVATE, 3, ("spent nothing",)),
)
