"""`minga`: groups are imported when called, errors end in one sentence and the right status."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import typer

import infra.cli
from infra.cli import GROUPS, LazyGroup, main
from protocols.errors import (
    EXIT_STATUS,
    DigestMismatchError,
    FederationError,
    IntegrityError,
    MalformedMessageError,
    NotReadyError,
    RefusedError,
    StorageFullError,
    TokenRefusedError,
)

HEAVY = ("torch", "flwr", "grpc", "sqlalchemy", "transformers", "pydantic", "numpy", "rich")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


@pytest.fixture
def failing(monkeypatch):
    """A group `minga fail` whose one command raises what it is given."""
    module = types.ModuleType("tests_failing_group")
    module.app = typer.Typer()
    module.error = None

    @module.app.command()
    def fail() -> None:
        """Raise."""
        raise module.error

    monkeypatch.setitem(sys.modules, module.__name__, module)
    group = LazyGroup(module=module.__name__, help="Fail.", extra="dev")
    monkeypatch.setattr(infra.cli, "GROUPS", {**GROUPS, "fail": group})
    return module


def status_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code or 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RefusedError("no"), 3),
        (TokenRefusedError("used"), 3),
        (MalformedMessageError("not a plan"), 3),
        (NotReadyError("later"), 4),
        (StorageFullError("no room"), 4),
        (IntegrityError("two models"), 5),
        (DigestMismatchError("other bytes"), 5),
        (FederationError("of no family"), 1),
    ],
)
def test_an_error_ends_in_its_family_status_with_one_sentence(failing, capsys, error, status):
    failing.error = error

    assert status_of(["fail"]) == status

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == error.diagnostics() + "\n"
    assert "Traceback" not in captured.err


def test_every_family_has_a_status():
    assert set(FederationError.__subclasses__()) >= set(EXIT_STATUS)
    assert sorted(EXIT_STATUS.values()) == [3, 4, 5]


def test_ctrl_c_is_130(failing, capsys):
    failing.error = KeyboardInterrupt()

    assert status_of(["fail"]) == 130
    assert "Traceback" not in capsys.readouterr().err


LEAKY = """
import sys, types
import typer
import infra.cli

module = types.ModuleType("failing")
module.app = typer.Typer()

@module.app.command()
def fail():
    key = "".join(reversed("tnirp-ton-od-2retnuh"))
    raise ZeroDivisionError("a bug")

sys.modules["failing"] = module
infra.cli.GROUPS = {"fail": infra.cli.LazyGroup(module="failing", help="Fail.", extra="dev")}
infra.cli.main(["fail"])
"""


def test_a_bug_shows_a_traceback_without_local_variables(tmp_path):
    """A local variable may be a key or a share."""
    script = tmp_path / "leaky.py"
    script.write_text(LEAKY)

    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["run", "nonsense"], ["run", "why", "andes"]])
def test_a_usage_error_is_2(arguments, capsys):
    assert status_of(arguments) == 2
    assert "Error" in capsys.readouterr().err


def test_a_wrong_name_says_what_is_wrong_with_it(capsys):
    status_of(["run", "why", "Andes/7"])

    assert "lower-case letters" in capsys.readouterr().err


def test_the_version_is_the_distribution(capsys):
    assert status_of(["--version"]) == 0

    from importlib.metadata import version

    assert capsys.readouterr().out == f"minga {version('minga')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    """Start-up is quick because nothing is imported that the answer does not need."""
    loaded = json.loads(
        python(
            "import sys, io, json, contextlib, infra.cli\n"
            "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
            f"    infra.cli.main({arguments!r})\n"
            "print(json.dumps(sorted(sys.modules)))"
        )
    )

    assert "infra.cli" in loaded
    assert [name for name in HEAVY if name in loaded] == []
    assert [name for name in loaded if name.startswith(("coordinator", "node_agent"))] == []


@pytest.mark.parametrize("name", GROUPS)
def test_the_help_of_a_group_imports_no_torch_flwr_or_grpc(name):
    loaded = json.loads(
        python(
            "import sys, io, json, contextlib, infra.cli\n"
            "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
            f"    infra.cli.main([{name!r}, '--help'])\n"
            "print(json.dumps(sorted(sys.modules)))"
        )
    )

    assert [heavy for heavy in ("torch", "flwr", "grpc", "sqlalchemy") if heavy in loaded] == []


def test_no_coordinator_named_is_refused_with_advice(capsys, monkeypatch):
    monkeypatch.delenv("MINGA_DIR", raising=False)

    assert status_of(["run", "list"]) == 3
    assert "--dir DIR" in capsys.readouterr().err
