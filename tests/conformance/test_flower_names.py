"""The Flower names that the Grid uses and that are not public: a new Flower must fail here.

And what is known of Flower's strategies: which there are, and what they remember.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid, strategy

from coordinator import flower_private, flower_strategies
from coordinator.flower import MingaGrid
from coordinator.flower_rounds import node_number
from tests.conformance.test_flower_grid import ALLOWED, REFUSED, fresh, made_grid

ROOT = Path(__file__).parents[2]


def test_the_grid_that_flower_asks_for():
    assert Grid.__abstractmethods__ == {
        "set_run", "run", "create_message", "get_node_ids",
        "push_messages", "pull_messages", "send_and_receive",
    }  # fmt: skip
    for name in sorted(Grid.__abstractmethods__ - {"run"}):
        theirs = inspect.signature(getattr(Grid, name)).parameters
        assert list(inspect.signature(getattr(MingaGrid, name)).parameters) == list(theirs)
    assert list(inspect.signature(Grid.send_and_receive).parameters) == [
        "self", "messages", "timeout",
    ]  # fmt: skip
    source = inspect.getsource(strategy.Strategy.start)
    assert source.count("messages=self.configure_train") == 1  # by keyword


def test_a_message_takes_its_run_from_the_identity_of_the_process(monkeypatch):
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError):
        Message(RecordDict(), 5, "train")
    flower_private.identify(4)
    made = Message(RecordDict(), 5, "train")

    assert (made.metadata.run_id, made.metadata.src_node_id) == (4, flower_private.SERVER)


def test_a_message_has_an_id_that_its_reply_refers_to():
    flower_private.identify(4)
    message = Message(RecordDict(), 5, "train")
    assert message.metadata.message_id == ""
    flower_private.name_message(message, "credit-1.5")
    assert message.metadata.message_id == "credit-1.5"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "credit-1.5"


def test_a_run_is_made_from_its_id():
    assert flower_private.empty_run(9).run_id == 9
    assert made_grid().run.run_id == node_number("credit")


def test_private_names_stay_in_one_module():
    for path in sorted((ROOT / "coordinator").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        modules = {
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr")
        } | {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name.startswith("flwr")
        }
        wanted = {
            "flower.py": {"flwr.app", "flwr.serverapp"},
            "flower_strategies.py": {"flwr.app", "flwr.serverapp"},
            "flower_private.py": {"flwr.supercore.run", "flwr.supercore.task_identity"},
        }
        assert modules == wanted.get(path.name, set()), path
        if path.name != "flower_private.py":
            assert "_message_id" not in path.read_text("utf-8")


def test_every_strategy_of_flower_was_looked_at():
    """A new one is refused; here it asks to be judged."""
    known = {*ALLOWED, *REFUSED}
    found = {
        name
        for name, kind in vars(strategy).items()
        if inspect.isclass(kind) and issubclass(kind, strategy.Strategy)
    }
    assert found - known == {"Strategy"}
    assert known <= found


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_strategy_remembers(name):
    """Whatever is None at first is state; flwr's constructor must not have more of it."""
    made = fresh(name)
    state = flower_strategies._STATE[name]
    assert set(state) == {key for key, value in vars(made).items() if value is None}


def test_flower_does_not_phone_home_and_is_not_imported_by_the_coordinator():
    code = (
        "import sys, os, coordinator.app, infra.cli, infra.runs.flower;"
        "print('flwr' in sys.modules);"
        "import coordinator.flower;"
        "print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'],"
        " 'torch' in sys.modules, 'sqlalchemy' in sys.modules and 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True,
        env={"FLWR_TELEMETRY_ENABLED": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip

    assert found.stdout.split()[:4] == [b"False", b"0", b"1", b"False"]
