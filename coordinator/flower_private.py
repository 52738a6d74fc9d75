"""The Flower names that are not public API and that a Grid cannot do without. Nowhere else.

Any Flower release may change them. tests/conformance/test_flower_names.py says which one did.

* An instruction ``Message`` takes run, node and task from an identity of the whole process.
* Its id has no setter, yet replies refer to it.
* ``Grid.run`` is a ``Run``.
"""

from __future__ import annotations

import os

# Before any import of flwr: it phones home by default.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from typing import Any, Final

from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER: Final = 1  # the node id Flower gives the server's side
_TASK: Final = 1


def identify(run_id: int) -> None:
    """Make this process the server's side of a run: from now on its messages belong to it."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER
    TaskIdentity.task_id = _TASK


def name_message(message: Any, message_id: str) -> None:
    """Give an instruction the id that its reply will refer to."""
    message.metadata.__dict__["_message_id"] = message_id


def empty_run(run_id: int) -> Any:
    """What ``Grid.run`` answers."""
    return Run.create_empty(run_id)
