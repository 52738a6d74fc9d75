"""What a worker that ended said last: the line that an operator wants to read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_KEPT: Final = 16_384  # bytes of the end of a log that are read; torchrun's report takes 2,000
_LONGEST: Final = 400  # characters of a line that a sentence quotes
_REPORT: Final = re.compile(  # torchrun's, of a rank that failed: a traceback of its own, a table
    r"(?:^Traceback \(most recent call last\):\n(?:[ ~^].*\n)*)?^.*ChildFailedError:.*\n"
    r"^=+\n(?P<table>(?:.*\n)*?)^=+$",
    re.MULTILINE,
)
_ROOT: Final = re.compile(
    r"Root Cause.*?^\s*rank\s*: (?P<rank>\d+).*?^\s*traceback\s*: Signal \d+ \((?P<signal>\w+)\)",
    re.MULTILINE | re.DOTALL,
)
_REMARK: Final = re.compile(r"srun:|slurmstepd|[A-Z]\d{4} .*torch/distributed/elastic/|[\W_]*$")


def last_words(text: str) -> str:
    """The signal that ended a rank, if one did, and the last line that the worker itself said.

    What Slurm and torchrun say around it is left out, unless there is nothing else; "" for nothing.
    """
    reports = list(_REPORT.finditer(text))
    lines = [" ".join(line.split())[:_LONGEST] for line in _REPORT.sub("", text).split("\n")]
    said = [line for line in lines if line]
    own = [line for line in said if not _REMARK.match(line)]
    root = _ROOT.search(reports[-1]["table"]) if reports else None
    if root is None:
        return (own or said or [""])[-1]
    return "; ".join([f"rank {root['rank']} was ended by {root['signal']}", *own[-1:]])


def last_words_in(log: Path, *, since: int = 0) -> str:
    """The same of a log's end; "" where there is none.

    Args:
        log: of one worker after the other.
        since: bytes that were there before this worker began.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since, size - _KEPT))
            return last_words(file.read().decode("utf-8", "replace"))
    except OSError:
        return ""
