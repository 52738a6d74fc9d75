"""``torchrun ... -m tests.support.dying_worker``: the worker, ended by a signal at a chosen step.

``MINGA_TEST_DIES=<rank>:<step>:KILL``: that rank is SIGKILLed in the middle of the step, after its
gradient is there and before the weights move. Nothing of it runs on, as when the kernel ends a
process that has taken too much memory. ``…:TERM``: rank and torchrun are told to leave there.
"""

from __future__ import annotations

import os
import signal

from node_agent.resident import end_at_once
from node_agent.worker.__main__ import main
from node_agent.worker.optimizer import InnerOptimizer

_RANK, _STEP, _HOW = os.environ["MINGA_TEST_DIES"].split(":")
_apply = InnerOptimizer.apply
_done = [0]


def _die_at(self: InnerOptimizer) -> None:
    if (str(_done[0]), os.environ["RANK"]) == (_STEP, _RANK):
        if _HOW == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    _done[0] += 1
    _apply(self)


if __name__ == "__main__":
    InnerOptimizer.apply = _die_at  # type: ignore[method-assign]
    end_at_once(main)
