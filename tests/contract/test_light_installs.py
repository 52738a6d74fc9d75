"""Who needs little installs little: real environments, made with pip from a wheel of this tree.

An auditor's or admin's install (no extra) has no torch, no Flower, no gRPC and no database; a
coordinator's has no torch. Both must work, and neither may reach for what is not there. pip needs
the network; where there is none these tests are skipped and say so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protocols", "policies", "coordinator", "node_agent", "infra")
TRAINING = {"torch", "transformers", "peft", "opacus"}
SERVER = {"flwr", "grpc", "sqlalchemy", "alembic", "psycopg", "google.protobuf"}
SITES = ("ar-archivo", "br-saude", "cl-leyes", "pe-escuela")

# What pip prints when nothing answers; not when an answer was bad.
NO_NETWORK = re.compile(
    r"connection broken by|NewConnectionError|NameResolutionError|Read timed out|ProxyError"
    r"|Temporary failure in name resolution|Network is unreachable"
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """An environment of its own, outside of the working tree."""

    folder: Path

    def run(self, *arguments: str, program: str = "python") -> subprocess.CompletedProcess[str]:
        """Run one of its programs where no module of the working tree can be found."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def python(self, code: str) -> str:
        """What a piece of code prints; it must not fail."""
        done = self.run("-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def missing(self, modules: set[str]) -> set[str]:
        """Which of these cannot be found there."""
        code = """if True:
            import importlib.util, json, sys
            def found(name):
                try:
                    return importlib.util.find_spec(name) is not None
                except ModuleNotFoundError:
                    return False
            print(json.dumps([n for n in json.loads(sys.argv[1]) if not found(n)]))"""
        done = self.run("-c", code, json.dumps(sorted(modules)))
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout))


def pip(*arguments: str) -> None:
    """Run this environment's pip; skip the test when the network is why it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    output = done.stdout + done.stderr
    if NO_NETWORK.search(output):
        pytest.skip(f"pip reached no package index: {NO_NETWORK.search(output)[0]}")
    pytest.fail(f"pip {' '.join(arguments)}\n{output[-4000:]}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the working tree, built from a copy so that no build folder is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    copy.mkdir()
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy))
    (built,) = folder.glob("minga-*.whl")
    return built


def installed(wheel: Path, folder: Path, extra: str) -> Install:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip(
        "--python", python, "install", "--quiet", "--no-compile",
        "--constraint", str(ROOT / "constraints.txt"), f"{wheel}{extra}",
    )  # fmt: skip
    return Install(folder=folder)


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("base"), "")


@pytest.fixture(scope="module")
def coordinator(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("coordinator"), "[coordinator]")


def test_the_wheel_holds_the_code_the_corpus_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {f"{package}/__init__.py" for package in PACKAGES} <= names
    assert {f"infra/demo/corpus/{s}/{p}.jsonl" for s in SITES for p in ("train", "valid")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests/") for name in names)


def test_the_base_install_has_neither_training_nor_server_libraries(base):
    assert base.missing(TRAINING | SERVER) == TRAINING | SERVER
    assert base.missing({"cryptography", "numpy"}) == set()  # the question can be answered no


def test_the_base_install_works(base):
    done = base.run("--help", program="minga")

    assert done.returncode == 0, done.stderr
    assert "Usage: minga" in done.stdout
    assert base.python("import protocols, policies, infra.cli; print('fine')") == "fine\n"


def test_the_base_install_audits_a_log(base, tmp_path):
    """Verify, recompute and report with nothing but what an auditor has."""
    from tests.support.audit_disk import copy_run

    run = copy_run(tmp_path / "run")
    log, uploads = str(run / "log"), str(run / "uploads")
    for arguments in (
        ("verify", log, "--trust-policy", str(run / "anchor.txt")),
        ("recompute", log, "--uploads", uploads),
        ("report", log, "--out", str(run / "report.html")),
        ("export", log, "--out", str(run / "exports")),
        ("proof", log, "7", "--out", str(run / "7.tlog-proof")),
    ):
        done = base.run("audit", *arguments, program="minga")

        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


def test_the_base_install_reads_and_signs_what_admins_propose(base, tmp_path):
    """An admin needs no server, no database and no network: a request, a key, a passphrase."""
    from infra.admin.proposals import propose_founding
    from protocols.governance.requests import canonical_request
    from tests.support.trust import World

    secret = tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    made = base.run(
        "admin", "key", "make", str(tmp_path / "key"), "--person", "ana", "--institution", "ar-1",
        "--country", "AR", "--passphrase-file", str(secret), program="minga",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    world = World()
    request = tmp_path / "founding.request"
    request.write_bytes(canonical_request(propose_founding(world.founding(), now=world.now)))
    shown = base.run("admin", "key", "show", str(request), program="minga")

    assert shown.returncode == 0, shown.stderr
    assert "founds federation demo: 2 of 3 admins decide" in shown.stdout
    lacking = base.run("admin", "key", "publish", str(request), "--dir", "new", program="minga")
    assert lacking.returncode == 3
    assert "Traceback" not in lacking.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("demo --dir new", "coordinator,node"),
        ("coordinator init --dir new", "coordinator"),
        ("coordinator serve --dir new", "coordinator"),
        ("node run --dir new", "node"),
        ("node journal --dir new", "node"),
        ("run list --dir new", "coordinator"),
    ],
)
def test_the_base_install_says_what_a_command_lacks(base, command, extra):
    """One sentence with the command that helps, and the status of a refusal; no traceback."""
    done = base.run(*command.split(), program="minga")

    assert done.returncode == 3, done.stderr
    assert f"pip install 'minga[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (base.folder / "new").exists()


def test_the_coordinators_install_has_no_training_libraries(coordinator):
    assert coordinator.missing(TRAINING) == TRAINING
    assert coordinator.missing({"grpc", "sqlalchemy", "flwr"}) == set()


def test_the_coordinators_install_works(coordinator):
    done = coordinator.run("coordinator", "--help", program="minga")

    assert done.returncode == 0, done.stderr
    assert coordinator.python("import coordinator.app; print('fine')") == "fine\n"


# -- what is never imported, where everything is installed ---------------------------------------


def imported(modules: str) -> set[str]:
    """Top-level names in ``sys.modules`` after importing ``modules``, in a process of its own."""
    code = f"import {modules}, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    ("modules", "never"),
    [
        ("infra.cli", TRAINING | {"flwr", "grpc", "sqlalchemy", "coordinator", "node_agent"}),
        ("coordinator.app", TRAINING | {"flwr", "node_agent"}),
        (
            "infra.audit.cli, infra.audit.loading, infra.audit.report, infra.audit.export",
            TRAINING | {"flwr", "grpc", "sqlalchemy", "coordinator", "node_agent", "dp_accounting"},
        ),
        ("node_agent.agent", TRAINING | {"flwr", "coordinator"}),
    ],
)
def test_a_process_imports_only_what_it_is_for(modules, never):
    """Nothing heavy comes in by a side door: torch in the agent would take it down with CUDA."""
    assert imported(modules) & never == set()


def test_an_import_is_seen():
    """The oracle above can fail."""
    assert imported("sqlalchemy, protocols.canonical") >= {"sqlalchemy", "protocols"}
