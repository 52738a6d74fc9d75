"""Bytes on their way, as heartbeats show them."""

from __future__ import annotations

from dataclasses import dataclass

from protocols.identifiers import RoundId


@dataclass(slots=True)
class Transfer:
    """What is being moved or made, and how far it is."""

    activity: str
    done: int = 0  # bytes
    total: int = 0  # bytes; 0: unknown

    def move(self, done: int, total: int) -> None:
        """A progress callback."""
        self.done, self.total = done, total


@dataclass(slots=True)
class Shown:
    """Shows a transfer while it lasts."""

    shown: dict[RoundId, Transfer]
    round: RoundId
    transfer: Transfer

    def __enter__(self) -> Transfer:
        self.shown[self.round] = self.transfer
        return self.transfer

    def __exit__(self, *_: object) -> None:
        if self.shown.get(self.round) is self.transfer:
            del self.shown[self.round]
