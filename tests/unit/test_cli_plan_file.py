"""`minga run submit`: a plan file is completed from the snapshot and checked against it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from coordinator.setup import initialise
from infra.cli import main
from infra.runs.operator import find_operator
from infra.runs.plan_file import (
    complete_plan,
    federation_of,
    read_initial_model,
    read_plan_file,
)
from protocols.errors import (
    ConfigurationError,
    DigestMismatchError,
    MalformedMessageError,
    ManifestMismatchError,
)
from protocols.identifiers import FederationId
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.ring import Ring
from protocols.tensors.scales import first_scales
from protocols.tensors.units import blob_digest

ANDES = FederationId("andes")
PLAN = """
run = "andes-7"
title = "seven"
roster = ["a", "b", "c"]
min_participants = 2
rounds = 3

[model]
family = "vector"

[local_step]
kind = "synthetic"
synthetic = { delta = 0.25 }

[vector.scale]
first_bound = 0.5
"""


def snapshot_folder(folder: Path, *, coordinates: int = 100) -> Path:
    folder.mkdir()
    manifest = Manifest((TensorSpec("vector", (coordinates,)),))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    np.arange(coordinates, dtype="<f4").tofile(folder / "theta.f32")
    return folder


@pytest.fixture
def snapshot(tmp_path):
    return snapshot_folder(tmp_path / "snapshot")


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_what_follows_from_the_snapshot_is_filled_in(plan, snapshot):
    model = read_initial_model(snapshot)

    made = complete_plan(read_plan_file(plan), model, ANDES)

    assert made.plan.federation == "andes"
    assert made.plan.model.manifest == blob_digest((snapshot / "manifest.json").read_bytes())
    assert made.snapshot.theta == blob_digest((snapshot / "theta.f32").read_bytes())
    assert made.scales == first_scales(model.manifest, bound=0.5, ring=Ring(20), nodes=3)
    assert made.snapshot.scales == made.scales.digest
    assert made.plan.model.initial == made.snapshot.model_root
    assert (made.snapshot.round, made.snapshot.buffers) == (0, {})


def test_completing_a_complete_plan_changes_nothing(plan, snapshot, tmp_path):
    model = read_initial_model(snapshot)
    once = complete_plan(read_plan_file(plan), model, ANDES)
    written = tmp_path / "complete.json"
    written.write_bytes(once.plan.to_bytes())

    again = complete_plan(read_plan_file(written), model, FederationId("elsewhere"))

    assert again.plan.digest == once.plan.digest


def test_a_plan_for_another_parameter_set_is_an_integrity_failure(plan, snapshot, tmp_path):
    other = read_initial_model(snapshot_folder(tmp_path / "other", coordinates=101))
    written = read_plan_file(plan)
    written["model"]["manifest"] = other.manifest.digest

    with pytest.raises(ManifestMismatchError, match="names the parameter set"):
        complete_plan(written, read_initial_model(snapshot), ANDES)


def test_a_plan_for_another_initial_model_is_an_integrity_failure(plan, snapshot):
    written = read_plan_file(plan)
    written["model"]["initial"] = "1" * 64

    with pytest.raises(DigestMismatchError, match="starts from model 111111111111"):
        complete_plan(written, read_initial_model(snapshot), ANDES)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run = ", "plan.toml: Invalid value"),
        ("rounds = 3", "plan: model: the plan must say"),
        (PLAN.replace('run = "andes-7"', 'run = "Andes"'), "plan: run: a run id must be"),
        (PLAN.replace("rounds = 3", "rounds = 0"), "plan: rounds: "),
        (PLAN + "\n[outre]\n", "plan: outre: "),
        (PLAN.replace('["a", "b", "c"]', '["b", "a", "c"]'), "ascending order"),
    ],
)
def test_a_wrong_plan_gets_one_sentence(plan, snapshot, text, sentence):
    plan.write_text(text)

    with pytest.raises(MalformedMessageError) as error:
        complete_plan(read_plan_file(plan), read_initial_model(snapshot), ANDES)

    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path, snapshot):
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml cannot be read"):
        read_plan_file(tmp_path / "nowhere.toml")
    (snapshot / "theta.f32").unlink()
    with pytest.raises(ConfigurationError, match=r"theta\.f32 cannot be read"):
        read_initial_model(snapshot)


def test_a_short_theta_is_refused_with_both_sizes(snapshot):
    np.zeros(99, "<f4").tofile(snapshot / "theta.f32")

    with pytest.raises(ManifestMismatchError, match="396 bytes; 100 float32 coordinates have 400"):
        read_initial_model(snapshot)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def federation(tmp_path):
    folder = tmp_path / "federation"
    initialise(
        folder=folder,
        federation="andes",
        address="127.0.0.1:1",  # nobody listens there
        enrolment="127.0.0.1:2",
        public="127.0.0.1:1",
        hosts=(),
        ledger="sqlite:///ledger.sqlite",
        operator="cenia",
    )
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", *map(str, arguments)])
    return ended.value.code or 0


def test_a_dry_run_prints_the_digest_and_asks_nobody(plan, snapshot, federation, capsys):
    status = run("submit", plan, "--snapshot", snapshot, "--dir", federation, "--dry-run", "--json")

    facts = json.loads(capsys.readouterr().out)
    made = complete_plan(read_plan_file(plan), read_initial_model(snapshot), ANDES)
    assert status == 0
    assert facts.pop("outlook")["plan_digest"] == made.plan.digest
    assert facts == {
        "run": "andes-7",
        "plan_digest": made.plan.digest,
        "model_root": made.snapshot.model_root,
        "coordinates": 100,
        "rounds": 3,
        "submitted": False,
    }


def test_a_coordinator_that_is_away_is_not_ready(plan, snapshot, federation, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)

    assert run("list", "--dir", federation) == 4
    error = capsys.readouterr().err
    assert "no coordinator answers at 127.0.0.1:1" in error
    assert "[unreachable]" in error


def test_the_folder_may_stand_in_the_environment(plan, snapshot, federation, capsys, monkeypatch):
    monkeypatch.setenv("MINGA_DIR", str(federation))

    assert run("submit", plan, "--snapshot", snapshot, "--dry-run") == 0
    assert "checked, not submitted: run andes-7, 3 rounds" in capsys.readouterr().out


def test_an_operator_file_works_on_another_machine(federation, tmp_path):
    keys = federation / "coordinator" / "keys"
    for name in ("ca.crt", "operator.crt", "operator.key"):
        (tmp_path / name).write_bytes((keys / name).read_bytes())
    path = tmp_path / "operator.toml"
    path.write_text(
        'coordinator = "minga.example:8443"\nca = "ca.crt"\n'
        'certificate = "operator.crt"\nkey = "operator.key"\n'
    )

    operator = find_operator(folder=None, config=path, environment={})

    assert operator.address == "minga.example:8443"
    assert federation_of(operator.certificate) == "andes"
    assert "PRIVATE" in operator.key.decode()
    assert "PRIVATE" not in repr(operator)


@pytest.mark.parametrize(
    "text",
    [
        "",
        'coordinator = "x:1"\n',
        'coordinator = "x"\nca = "a"\ncertificate = "b"\nkey = "c"\n',
        'coordinator = 1\nca = "a"\ncertificate = "b"\nkey = "c"\n',
        'coordinator = "x:1"\nca = "a"\ncertificate = "b"\nkey = "c"\nextra = "d"\n',
        'coordinator = "x:1"\nca = "a"\ncertificate = "b"\nkey = "missing"\n',
        "not toml",
    ],
)
def test_a_wrong_operator_file_is_named(tmp_path, text):
    path = tmp_path / "operator.toml"
    path.write_text(text)

    with pytest.raises(ConfigurationError) as error:
        find_operator(folder=None, config=path, environment={})
    assert str(tmp_path) in str(error.value)


def test_a_certificate_of_nobody_names_no_federation():
    with pytest.raises(ConfigurationError, match="names no federation"):
        federation_of(b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
