"""A strategy between two rounds, in one file: ``.npz`` without pickles. No flwr here.

What comes back is data, never code. Written under another name, synced and renamed: a process that
is killed leaves the state before its round or after it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocols.errors import CorruptStateError, StorageFullError

_SCHEMA: Final = "minga.strategy-state/1"
_HEADER: Final = "header"

Arrays = dict[str, NDArray[Any]]
Metrics = dict[str, Any]  # numbers, or lists of numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyState:
    """Everything that the next round needs."""

    name: str  # of the whole, as in RoundTerms
    strategy: str  # its class
    options: Mapping[str, Any]  # its settings: numbers and texts
    round: int  # the last one that is done; 0: none
    arrays: Arrays  # the model after it
    attributes: Mapping[str, Arrays | list[NDArray[Any]]] = field(default_factory=dict)
    metrics: Mapping[int, Metrics] = field(default_factory=dict)  # by round


def save(path: Path, state: StrategyState) -> None:
    """Write durably.

    Raises:
        StorageFullError: no room; the state before is still there.
    """
    blobs: list[NDArray[Any]] = []

    def kept(array: NDArray[Any]) -> int:
        blobs.append(np.asarray(array))
        return len(blobs) - 1

    header = {
        "schema": _SCHEMA,
        "name": state.name,
        "strategy": state.strategy,
        "options": dict(state.options),
        "round": state.round,
        "arrays": [[key, kept(array)] for key, array in state.arrays.items()],
        "attributes": {
            name: (
                {"list": [kept(array) for array in value]}
                if isinstance(value, list)
                else {"dict": [[key, kept(array)] for key, array in value.items()]}
            )
            for name, value in state.attributes.items()
        },
        "metrics": [[number, dict(values)] for number, values in state.metrics.items()],
    }
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    named = {f"a{number}": blob for number, blob in enumerate(blobs)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{_HEADER: text}, **named)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageFullError(f"{path}: {error.strerror}") from None


def load(path: Path) -> StrategyState | None:
    """The state of a file; None when there is none.

    Raises:
        CorruptStateError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file[_HEADER].tobytes())
            if header["schema"] != _SCHEMA:
                raise CorruptStateError(f"{path} is not a {_SCHEMA}")

            def held(pairs: list[list[Any]]) -> Arrays:
                return {key: file[f"a{number}"] for key, number in pairs}

            return StrategyState(
                name=header["name"],
                strategy=header["strategy"],
                options=header["options"],
                round=header["round"],
                arrays=held(header["arrays"]),
                attributes={
                    name: (
                        [file[f"a{number}"] for number in value["list"]]
                        if "list" in value
                        else held(value["dict"])
                    )
                    for name, value in header["attributes"].items()
                },
                metrics=dict(header["metrics"]),
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptStateError(f"the strategy's state {path} cannot be read: {error}") from None
