"""What a worker that ended said last: the line that an operator wants to read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_KEPT: Final = 16_384  # bytes of the end of a log that are read; torchrun's report takes 2,000
_LONGEST: Final = 400  # characters of a line that a sentence quotes
_START: Final = "minga: start "
_REMARK: Final = re.compile(
    r"srun:|slurmstepd|minga: |[A-Z]\d{4} .*torch/distributed/elastic/|[\W_]*$"
)
_RANK: Final = re.compile(r"^ *rank *: (\d+)", re.MULTILINE)
_SIGNAL: Final = re.compile(r"^ *traceback *: Signal \d+ \((\w+)\)", re.MULTILINE)


def start_line(start: int | str, attempt: int | str) -> str:
    """What a batch script prints before each of its workers: theirs is what follows.

    Args:
        start: how often Slurm started the job again.
        attempt: of the worker in it.
    """
    return f"{_START}{start}.{attempt} of the worker"


def last_words(text: str) -> str:
    """The signal that ended a rank, if one did, and the last line that the worker itself said.

    What Slurm and torchrun say around it is left out, unless there is nothing else; "" for nothing.
    """
    rest, ended = _without_reports(text.split("\n"))
    lines = [" ".join(line.split())[:_LONGEST] for line in rest]
    said = [line for line in lines if line]
    own = [line for line in said if not _REMARK.match(line)]
    if ended:
        return "; ".join([ended, *own[-1:]])
    return (own or said or [""])[-1]


def last_words_in(log: Path, *, since: int = 0, start: str = "") -> str:
    """The same of one worker in a log of several; "" where there is none.

    Args:
        log: of one worker after the other.
        since: bytes that were there before this worker began.
        start: its ``start_line``; empty: there are none.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since, size - _KEPT))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    if start:
        text = text.rpartition(f"{start}\n")[2].partition(_START)[0]
    return last_words(text)


def _without_reports(lines: list[str]) -> tuple[list[str], str]:
    """The lines without torchrun's reports of ranks that failed, and which one a signal ended.

    A report is a traceback of torchrun's own and a table between two bars.
    """
    rest: list[str] = []
    table: list[str] = []  # the last one
    inside = False
    for line in lines:
        if inside:
            table.append(line)
            inside = not _is_bar(line)
        elif _is_bar(line) and rest and "ChildFailedError:" in rest[-1]:
            rest.pop()
            _drop_traceback(rest)
            table, inside = [], True
        else:
            rest.append(line)
    return rest, _ended_by("\n".join(table))


def _is_bar(line: str) -> bool:
    return len(line) > 3 and set(line) == {"="}


def _drop_traceback(lines: list[str]) -> None:
    while lines and lines[-1].startswith(" "):
        lines.pop()
    if lines and lines[-1].startswith("Traceback "):
        lines.pop()


def _ended_by(table: str) -> str:
    _, found, root = table.rpartition("Root Cause")
    rank, signal = _RANK.search(root), _SIGNAL.search(root)
    return f"rank {rank[1]} was ended by {signal[1]}" if found and rank and signal else ""
