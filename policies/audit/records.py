"""The answers of an audit: one record for each question and round, and where the log is bad.

``unknown`` is an answer too, and never a pass: what could not be looked at is not known to be good.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Result(StrEnum):
    """How a question was answered."""

    PASS = "pass"  # noqa: S105 - not a secret
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The answer to one question about one round, or about the log."""

    id: str  # "1" to "22": the questions of protocols/spec/audit.md
    round: str | None  # RUN/NUMBER; None: about the whole log
    result: Result
    leaves: tuple[int, ...]  # indices of the leaves that the answer rests on; of a fail, the bad
    reason: str  # one sentence

    def to_json(self) -> dict[str, Any]:
        """As `minga audit verify --json` prints it."""
        return {
            "id": self.id,
            "round": self.round,
            "result": self.result.value,
            "leaves": list(self.leaves),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that does not hold, and where.

    A signature or a chain convicts one leaf. A root convicts a range: some leaf in it is not what
    was signed before, and nothing at hand says which.
    """

    check: str  # which check: checkpoint, entry, tile, signature, chain, phase, ...
    first: int  # index of the leaf; of a range, its first
    stop: int  # one behind the last; first + 1 for one leaf
    reason: str  # one sentence

    @classmethod
    def at(cls, check: str, index: int, reason: str) -> Fault:
        """One leaf is bad."""
        return cls(check=check, first=index, stop=index + 1, reason=reason)

    @property
    def place(self) -> str:
        """For a person."""
        if self.stop - self.first == 1:
            return f"leaf {self.first}"
        if self.stop <= self.first:
            return f"after leaf {self.first - 1}" if self.first else "the checkpoint"
        return f"leaves {self.first} to {self.stop - 1}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "check": self.check,
            "first": self.first,
            "last": self.stop - 1,
            "place": self.place,
            "reason": self.reason,
        }


def first_fault(faults: Iterable[Fault]) -> Fault | None:
    """The first bad place: the lowest leaf that is convicted by itself.

    A range is passed over when a convicted leaf lies in it, since that leaf explains it.
    Among faults of one place the earlier check counts, in the order given.
    """
    every = list(faults)
    exact = [fault for fault in every if fault.stop - fault.first == 1]
    ranges = [
        fault
        for fault in every
        if fault.stop - fault.first != 1
        and not any(fault.first <= leaf.first < fault.stop for leaf in exact)
    ]
    return min([*exact, *ranges], key=lambda fault: fault.first, default=None)


def worst(records: Sequence[Record]) -> Result:
    """Fail before unknown before pass; of nothing, unknown: nothing was shown."""
    found = {record.result for record in records}
    for result in (Result.FAIL, Result.UNKNOWN):
        if result in found:
            return result
    return Result.PASS if found else Result.UNKNOWN
