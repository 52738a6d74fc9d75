"""What a round that is over keeps of each node, packed.

Coordinator and nodes keep the state of every round of the log in memory. A table of a round that is
over does not change any more: some bytes for each node then, and the names once for all rounds that
have the same ones, instead of some 500 bytes for a node and round.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

V = TypeVar("V")


@lru_cache(maxsize=64)
def _places(names: tuple[str, ...]) -> Mapping[str, int]:
    return {name: place for place, name in enumerate(names)}


@lru_cache(maxsize=256)
def shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names, in the one tuple that all who ask for these hold together."""
    return names


class Packed(Mapping[str, V], Generic[V]):
    """A table of records of one layout, by name, in the order of the names.

    Args:
        layout: of a record.
        make: makes a value of a record's fields.
        fields: name -> the fields of its record.
    """

    __slots__ = ("_data", "_layout", "_make", "_places")

    def __init__(
        self,
        layout: struct.Struct,
        make: Callable[..., V],
        fields: Mapping[str, Iterable[Any]],
    ) -> None:
        names = tuple(sorted(fields))
        self._layout, self._make, self._places = layout, make, _places(names)
        self._data = b"".join(layout.pack(*fields[name]) for name in names)

    def __getitem__(self, name: str) -> V:
        at = self._places[name] * self._layout.size
        return self._make(*self._layout.unpack_from(self._data, at))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
