"""The work that every peer does, and what its processes report while they do it.

Needs numpy; Python 3.10 or newer.

Each process appends JSON lines to a file of its own in the folder that MINGA_BENCH_EVENTS names.
"""

# mypy: ignore-errors
# It runs in the peer's environment, whose packages are not installed here.

import json
import os
import time
from pathlib import Path

import numpy as np

STRIDE = 1009  # every how manieth value is looked at
PERIOD = 65521  # a prime: no two pieces of the model of any usual size are alike
GRAIN = 2.0**-24


def first_model(floats: int) -> "np.ndarray":
    """The model that round 0 starts from, float32, shape [floats]; values below 0.004.

    Not constant, because a system that sends equal pieces once would send a constant model in no
    time, and no real model is like that.
    """
    return (np.arange(floats) % PERIOD * GRAIN).astype(np.float32)


def trained(model, index):
    """What client ``index``, 0 to 3, makes of ``model``: a step of its own, 1e-3 on average.

    Steps differ for the same reason, and so that a mean of fewer than four shows.
    """
    return model + np.float32(1e-3 + (index - 1.5) * 2e-4)


def emit(event, **fields):
    """Append one event with the time of the machine, seconds since 1970."""
    path = Path(os.environ["MINGA_BENCH_EVENTS"]) / f"{os.getpid()}.jsonl"
    line = json.dumps({"at": time.time(), "event": event, **fields})
    with path.open("a") as file:
        file.write(line + "\n")


def emit_values(event, array, **fields):
    """Report an array: its size, and how far some of its values are from the first model's.

    Looking at every value would be charged to the peer's round time.
    """
    sample = array.reshape(-1)[::STRIDE].astype(np.float64)
    first = np.arange(0, array.size, STRIDE) % PERIOD * GRAIN
    emit(
        event,
        bytes=int(array.nbytes),
        dtype=str(array.dtype),
        low=float((sample - first).min()),
        high=float((sample - first).max()),
        **fields,
    )
