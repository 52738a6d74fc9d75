"""`minga demo` itself: it learns, it is resumed after its own SIGKILL, it leaves nobody behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from infra.demo.processes import Process, alive, end
from protocols.tensors.manifest import Manifest
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import blob_digest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SITES = ("br-saude", "cl-leyes", "pe-escuela")
PATIENCE_S = 400.0  # a busy machine starts torch four times


def demo(folder: Path, *arguments: str, output: Path) -> subprocess.Popen[bytes]:
    """Start the command; it prints plain lines into a file."""
    command = [sys.executable, "-P", "-m", "infra.cli", "demo", "--dir", str(folder), *arguments]
    with output.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def wait_for_line(process: subprocess.Popen[bytes], output: Path, words: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while words not in output.read_text("utf-8", "replace"):
        assert process.poll() is None, output.read_text("utf-8", "replace")
        assert time.monotonic() < until, output.read_text("utf-8", "replace")
        time.sleep(0.1)


def recorded(folder: Path) -> frozenset[Process]:
    """The processes that the demonstration says it has started."""
    listed = json.loads((folder / "processes.json").read_text("utf-8"))
    return frozenset(Process(item["pid"], item["started"]) for item in listed)


def of_folder(folder: Path) -> list[str]:
    """Command lines of all processes that name the folder."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                line = (path / "cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            if str(folder) in line and int(path.name) != os.getpid():
                found.append(line.replace("\0", " "))
    return found


def test_the_demonstration_is_killed_resumed_and_learns(tmp_path):
    folder, first, second = tmp_path / "demo", tmp_path / "first.txt", tmp_path / "second.txt"
    process = demo(
        folder, "--sites", ",".join(SITES), "--rounds", "2", "--nodes-two-ranks", "1",
        output=first,
    )  # fmt: skip
    try:
        wait_for_line(process, first, "round demo-1/0  Released")
        left = recorded(folder)
        process.kill()
        process.wait()
        assert alive(left) == left  # coordinator and agents do not need the demonstration
        assert len(left) == 4

        process = demo(folder, "--resume", output=second)
        assert process.wait(PATIENCE_S) == 0, second.read_text("utf-8", "replace")
    finally:
        process.kill()
        end(recorded(folder) if (folder / "processes.json").exists() else [], grace_s=2)

    text = second.read_text("utf-8", "replace")
    assert "ended 4 processes that an earlier demonstration had left" in text
    assert "3 of 3 nodes computed the very same last model" in text
    assert "every training step is differentially private by document" in text
    for site in SITES:
        assert f"{site} has spent epsilon " in text
    assert alive(left) == frozenset()
    assert of_folder(folder) == []
    check_summary(folder)
    check_model(folder)
    check_apart(folder)


def check_summary(folder: Path) -> None:
    """It learned, for an epsilon that is said, and every sum has all nodes exactly once."""
    facts = json.loads((folder / "report" / "summary.json").read_text("utf-8"))
    assert facts["learned"] is True
    assert facts["bits_per_byte"]["all"]["before"] == pytest.approx(8.0, abs=0.2)  # knows nothing
    assert facts["bits_per_byte"]["all"]["after"] < 7.4  # two private rounds; six get to 4.6
    assert facts["mode"]["masked"] is True
    assert facts["mode"]["differentially_private"] is True
    for spent in facts["run"]["privacy"]:
        assert 2 < float(spent["epsilon"]) < float(spent["budget"]) == 8
        assert spent["rounds_spent"] == 2
    assert [site["training_processes"] for site in facts["sites"]] == [2, 1, 1]
    assert [round_["metrics"]["nodes"] for round_ in facts["run"]["rounds"]] == [3, 3, 3]
    assert all(entry["bytes_up"] > 0 for entry in facts["traffic"].values())


def check_model(folder: Path) -> None:
    """What was exported is what every node holds and what the last round released."""
    model = folder / "model"
    snapshot = Snapshot.from_bytes((model / "snapshot.json").read_bytes())
    manifest = Manifest.from_bytes((model / "manifest.json").read_bytes())
    theta = (model / "theta.f32").read_bytes()
    facts = json.loads((folder / "report" / "summary.json").read_text("utf-8"))
    assert snapshot.model_root == facts["run"]["rounds"][-1]["model_out"]
    assert snapshot.theta == blob_digest(theta)
    assert len(theta) == 4 * manifest.coordinates
    assert np.isfinite(np.frombuffer(theta, "<f4")).all()
    for site in SITES:
        held = folder / "nodes" / site / "models" / "demo-1" / snapshot.model_root / "theta.f32"
        assert held.read_bytes() == theta


def check_apart(folder: Path) -> None:
    """No byte of a site's text is in what the coordinator or the other site keeps."""
    texts = {
        site: json.loads(
            (folder / "nodes" / site / "data" / "train.jsonl").read_text("utf-8").splitlines()[0]
        )["text"].encode()
        for site in SITES
    }
    for site, text in texts.items():
        own = folder / "nodes" / site
        for path in folder.rglob("*"):
            if path.is_file() and own not in path.parents:
                assert text[:40] not in path.read_bytes(), path
