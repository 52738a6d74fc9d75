"""`minga run` against a coordinator that serves: what it prints is what happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infra.cli import main
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.sizes import UNIT
from protocols.tensors.units import blob_digest
from tests.support.federation import Running, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
COORDINATES = 1_500_000  # theta has 6 MB: more than one resume unit

PLAN = """
run = "andes-7"
title = "seven [bold]rounds[/bold]"
roster = ["node-1", "node-2"]
min_participants = 2
rounds = 2

[model]
family = "vector"

[local_step]
kind = "synthetic"
synthetic = { delta = 0.001 }
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two nodes; the second one's agent is not running yet."""
    folder = tmp_path_factory.mktemp("runs") / "federation"
    with running(folder, nodes=2, start=False, log=False) as made:
        made.start_node("node-1")
        yield made


@pytest.fixture(scope="module")
def plan(federation: Running, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plan file and its snapshot folder."""
    folder = tmp_path_factory.mktemp("plan")
    manifest = Manifest((TensorSpec("vector", (COORDINATES,)),))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    np.arange(COORDINATES, dtype="<f4").tofile(folder / "theta.f32")
    (folder / "plan.toml").write_text(PLAN)
    return folder / "plan.toml", folder


def minga(capsys, *arguments: object) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_a_run_from_its_plan_to_its_end(federation, plan, capsys):
    """One story, because each step needs what the one before has left."""
    folder = ("--dir", federation.folder)
    plan_file, snapshot = plan

    # submit, and again: harmless
    status, out, _ = minga(capsys, "run", "submit", plan_file, "--snapshot", snapshot, *folder)
    assert status == 0
    assert out.startswith("submitted: run andes-7, 2 rounds\nplan  ")
    _, again, _ = minga(capsys, "run", "submit", plan_file, "--snapshot", snapshot, *folder)
    assert again == out
    theta = blob_digest((snapshot / "theta.f32").read_bytes())
    stored = federation.folder / "blobs" / theta[:2] / theta
    assert stored.stat().st_size == 4 * COORDINATES > UNIT

    # another plan of the same name is refused
    other = plan_file.with_name("other.toml")
    other.write_text(PLAN.replace("rounds = 2", "rounds = 3"))
    status, _, err = minga(capsys, "run", "submit", other, "--snapshot", snapshot, *folder)
    assert status == 3
    assert "andes-7" in err

    # list
    status, out, _ = minga(capsys, "run", "list", "--json", *folder)
    (listed,) = json.loads(out)
    assert (listed["run"], listed["status"], listed["rounds_planned"]) == ("andes-7", "active", 2)
    _, out, _ = minga(capsys, "run", "list", *folder)
    assert "andes-7" in out

    # why: the one agent that runs has joined, the other one is waited for
    federation.wait("andes-7", lambda report: bool(report.current and report.current.ready))
    status, out, _ = minga(capsys, "run", "why", "andes-7/0", *folder)
    assert status == 0
    assert out.startswith("andes-7/0 Open: 1 joined, 2 needed; until ")
    assert out.endswith(" for node-2\n")
    _, out, _ = minga(capsys, "run", "why", "andes-7/0", "--json", *folder)
    assert json.loads(out)["waiting_for"] == ["node-2"]
    status, _, err = minga(capsys, "run", "why", "andes-7/9", *folder)
    assert (status, "no round 9" in err) == (3, True)

    # watch: plain lines, since nobody's terminal is here
    federation.start_node("node-2")
    status, out, _ = minga(capsys, "run", "watch", "andes-7", *folder)
    assert status == 0
    assert out.splitlines()[-1] == "andes-7 done"
    assert "round andes-7/0  Released" in out
    assert "round andes-7/1  Released" in out
    status, out, _ = minga(capsys, "run", "watch", "andes-7", "--json", *folder)
    entries = [json.loads(line) for line in out.splitlines()]
    assert [entry["id"] for entry in entries] == sorted(entry["id"] for entry in entries)
    assert {"Open", "Training", "Uploading", "Released"} <= {entry["phase"] for entry in entries}

    # show
    federation.confirmed("andes-7")
    status, out, _ = minga(capsys, "run", "show", "andes-7", "--json", *folder)
    facts = json.loads(out)
    assert [round_["metrics"]["nodes"] for round_ in facts["rounds"]] == [2, 2]
    first, second = facts["rounds"]
    assert second["model_in"] == first["model_out"]
    for entry in first["traffic"]:
        assert entry["bytes_up"] >= COORDINATES * 5 // 2
        assert entry["confirmed"] == first["model_out"]
    _, out, _ = minga(capsys, "run", "show", "andes-7", *folder)
    assert "seven [bold]rounds[/bold]" in out  # a title is text, not markup

    # what is over cannot be stopped
    status, _, err = minga(capsys, "run", "stop", "andes-7", "--reason", "x", *folder)
    assert status == 3
    assert "nothing to stop" in err


def test_a_run_is_stopped_with_a_reason(federation, capsys):
    federation.household.pause(["node-2"])
    try:
        run = federation.submit("stopped", min_participants=2)
        federation.wait(run, lambda report: bool(report.current and report.current.ready))

        arguments = ("--reason", "the text was withdrawn", "--dir", federation.folder)
        status, out, _ = minga(capsys, "run", "stop", run, *arguments)
    finally:
        federation.household.resume(["node-2"])

    assert (status, out) == (0, "stopped stopped\n")
    report = federation.wait(run)
    assert report.status == "stopped"
    assert report.rounds[-1].phase == "Aborted"
    assert "the text was withdrawn" in report.rounds[-1].why


def test_what_is_not_there_is_refused(federation, capsys):
    status, _, err = minga(capsys, "run", "show", "nowhere", "--dir", federation.folder)

    assert status == 3
    assert "nowhere" in err


def test_a_blob_is_put_once_and_comes_back_the_same(federation, tmp_path):
    rng = np.random.default_rng(7)
    source = tmp_path / "blob"
    source.write_bytes(rng.bytes(2 * UNIT + 12_345))

    digest = federation.client.put(source)
    assert federation.client.put(source) == digest == blob_digest(source.read_bytes())
    federation.client.fetch(digest, tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_node_is_no_operator(federation, capsys, tmp_path):
    """A node's certificate is in force, but it may not submit or look at runs."""
    keys = federation.folder / "nodes" / "node-1" / "keys"
    pem = (keys / "tls.pem").read_bytes()
    for name in ("operator.crt", "operator.key"):
        (tmp_path / name).write_bytes(pem)
    ca = (federation.folder / "coordinator" / "keys" / "ca.crt").read_bytes()
    (tmp_path / "ca.crt").write_bytes(ca)
    (tmp_path / "operator.toml").write_text(
        f'coordinator = "{federation.federation.operator().address}"\nca = "ca.crt"\n'
        'certificate = "operator.crt"\nkey = "operator.key"\n'
    )

    status, _, err = minga(capsys, "run", "list", "--config", tmp_path / "operator.toml")

    assert status == 3
    assert "[not_permitted]" in err
