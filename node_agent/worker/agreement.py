"""Where the ranks of a worker meet: one sum per step decides for all.

Ranks run the same collectives in the same order or hang. So no rank leaves a loop or raises on its
own: what it has to say goes into a sum, and all draw the same conclusion. Only rank 0 looks at
the clock, the spool and signals; the others contribute zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from node_agent.resident import JobCancelledError, JobContext, JobFailedError, JobInterruptedError
from node_agent.worker.distributed import Ranks
from protocols.errors import FederationError

T = TypeVar("T")


class Decision(IntEnum):
    """What rank 0 wants next."""

    GO_ON = 0
    ENOUGH = 1
    CANCELLED = 2
    INTERRUPTED = 3
    PUT_AWAY = 4  # and go on


@dataclass(frozen=True, slots=True)
class Meeting:
    """What the ranks agreed on."""

    decision: Decision
    sums: list[float]


class Gate:
    """The meeting point of one job."""

    def __init__(self, ranks: Ranks, context: JobContext | None) -> None:
        self._ranks = ranks
        self._context = context  # on rank 0 only

    def meet(
        self,
        values: Sequence[float],
        *,
        enough: bool = False,
        due: bool = False,
        trouble: JobFailedError | None = None,
    ) -> Meeting:
        """Add up ``values`` over the ranks and hear rank 0's decision.

        Args:
            values: this rank's contribution.
            enough: rank 0: whether the work is done; ignored elsewhere.
            due: rank 0: whether it is time to put the middle away; ignored elsewhere.
            trouble: why this rank cannot go on, if so.

        Raises:
            JobFailedError: on every rank, if any rank is in trouble.
        """
        decision = Decision.GO_ON
        if self._context is not None:
            decision = self._decide(self._context, enough=enough, due=due)
        bad = 0.0 if trouble is None else 1.0
        chosen, troubles, *sums = self._ranks.summed([float(decision), bad, *values])
        if troubles:
            _raise_first(self._ranks, trouble)
        return Meeting(Decision(int(chosen)), sums)

    @staticmethod
    def _decide(context: JobContext, *, enough: bool, due: bool) -> Decision:
        if context.withdrawn():
            return Decision.CANCELLED
        if enough:  # before the interruption: what is finished need not be resumed
            return Decision.ENOUGH
        if context.stop.reason():
            return Decision.INTERRUPTED
        return Decision.PUT_AWAY if due else Decision.GO_ON

    def leave(self, decision: Decision) -> None:
        """End the job on every rank if it was cancelled or interrupted.

        Raises:
            JobCancelledError, JobInterruptedError.
        """
        if decision is Decision.CANCELLED:
            raise JobCancelledError
        if decision is Decision.INTERRUPTED:
            raise JobInterruptedError(self._context.stop.reason() if self._context else "")


def _raise_first(ranks: Ranks, mine: JobFailedError | None) -> None:
    said = ranks.from_all(None if mine is None else (mine.code, str(mine)))
    code, message = next(words for words in said if words is not None)
    raise JobFailedError(code, message) from mine


def agree(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; if it fails on one, the same error is raised on all.

    Raises:
        JobFailedError: with the code of the first rank that failed; ``storage`` for what the
            operating system refused.
    """
    error: JobFailedError | None = None
    result: T
    try:
        result = action()
    except JobFailedError as failed:
        error = failed
    except FederationError as refused:
        error = JobFailedError(refused.code, str(refused))
    except OSError as refused:
        error = JobFailedError("storage", f"{refused.filename or 'a file'}: {refused.strerror}")
    if ranks.summed([0.0 if error is None else 1.0])[0]:
        _raise_first(ranks, error)
    return result
