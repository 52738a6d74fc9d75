"""What a peer's processes report while they run. Standard library only, Python 3.10 or newer.

Each process appends JSON lines to a file of its own in the folder that MINGA_BENCH_EVENTS names.
"""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

import json
import os
import time
from pathlib import Path


def emit(event, **fields):
    """Append one event with the time of the machine, seconds since 1970."""
    path = Path(os.environ["MINGA_BENCH_EVENTS"]) / f"{os.getpid()}.jsonl"
    line = json.dumps({"at": time.time(), "event": event, **fields})
    with path.open("a") as file:
        file.write(line + "\n")


def emit_values(event, array, **fields):
    """Report an array by its size and by the smallest and largest of every 1009th value.

    Looking at every value would be charged to the peer's round time.
    """
    sample = array.reshape(-1)[::1009]
    emit(
        event,
        bytes=int(array.nbytes),
        dtype=str(array.dtype),
        low=float(sample.min()),
        high=float(sample.max()),
        **fields,
    )
