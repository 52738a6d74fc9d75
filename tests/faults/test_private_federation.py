"""The private modes among real processes: three nodes, each with its own ledger and budget."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.cli import main
from node_agent.privacy_ledger import PrivacyLedger
from node_agent.worker.data import index_corpus
from node_agent.worker.init_model import write_model
from node_agent.worker.records import Records
from policies.privacy.budget import SpendStatus
from policies.privacy.terms import noise_terms
from protocols.identifiers import RunId
from protocols.plan import Plan
from tests.statistics.evidence import fits_scale
from tests.support.federation import GRID, PATIENCE_S, Running, results, running
from tests.support.private_worker import plain_sum
from tests.support.training import reference_model
from tests.support.worker import TINY, write_text

COORDINATES = 400
RECORD = {
    "unit": "document",
    "max_sequences": 4,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "sampling_rate": 0.05,
    "expected_batch": 16.0,
    "delta": "1e-5",
}
INSTITUTION = {
    "unit": "institution",
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "delta": "1e-5",
    "colluders": 1,
    "dataset": "letters",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("private") / "federation", nodes=3) as made:
        yield made


def folder(federation: Running, site: str) -> Path:
    return federation.folder / "nodes" / site


def spends(federation: Running, site: str, run: RunId) -> list[SpendStatus]:
    """What a site's ledger says of a run, less the rounds of which nothing left it."""
    path = folder(federation, site) / "privacy.sqlite"
    ledger = PrivacyLedger(path, now=lambda: datetime.now(UTC), read_only=True)
    try:
        kept = [row.status for row in ledger.records() if row.round.run == run]
    finally:
        ledger.close()
    return [status for status in kept if status is not SpendStatus.VOID]


def rewrite(federation: Running, site: str, *pairs: tuple[str, str]) -> None:
    """Change a site's configuration while its agent is down."""
    federation.household.stop(site)
    path = folder(federation, site) / "config.toml"
    text = path.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, (old, text)
        text = text.replace(old, new)
    path.write_text(text)
    federation.start_node(site)


def model_of(federation: Running, report: Any) -> np.ndarray:
    root = report.released[-1].model_out
    home = folder(federation, "node-1") / "models" / report.run / root
    return np.fromfile(home / "theta.f32", "<f4")


def plan_of(federation: Running, site: str, run: RunId) -> Plan:
    home = folder(federation, site) / "models" / run
    return Plan.from_bytes(next(home.glob("plan.json")).read_bytes())


def submit(federation: Running, run: str, mode: str, **changes: Any) -> RunId:
    terms: dict[str, Any] = {"rounds": 1, "coordinates": COORDINATES, "mode": mode}
    return federation.submit(run, **terms | changes)


def status(federation: Running, site: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "infra.cli", "node", "status", "--json"]
    done = subprocess.run(
        [*command, "--dir", str(folder(federation, site))], capture_output=True, check=True
    )
    return json.loads(done.stdout)


def declined(federation: Running, site: str) -> dict[str, Any]:
    """A site's status once it says that its newest run was declined.

    The agent writes its status after it has told the coordinator, so the history may be ahead.
    """
    give_up = time.monotonic() + PATIENCE_S
    while True:
        said = status(federation, site)
        if said["agent"]["runs"][-1]["declined"] or time.monotonic() > give_up:
            return said
        time.sleep(0.2)


def test_record_local_spends_and_sums_as_ever(federation):
    """Local steps carry their own noise: the sum is that of any masked run, and is paid for."""
    plain = federation.confirmed(submit(federation, "plain", "aggregate-only"))
    run = submit(federation, "local", "record-local", privacy=RECORD | {"steps": 5})
    report = federation.confirmed(run)

    assert [one[1] for one in results(report)] == [one[1] for one in results(plain)]
    for site in federation.sites:
        assert spends(federation, site, run) == [SpendStatus.RELEASED]
        assert spends(federation, site, plain.run) == []
    assert {round_.metrics["tokens"] for round_ in report.released} == {0}


def test_record_distributed_adds_noise_of_the_size_that_is_charged(federation):
    step = {"kind": "synthetic", "synthetic": {"delta": 2.0**-GRID}}
    run = submit(
        federation,
        "shared",
        "record-distributed",
        privacy=RECORD | {"steps": 1, "colluders": 1},
        local_step=step | {"optimizer": "sgd", "lr": 1.0, "keep_optimizer": False},
    )
    report = federation.confirmed(run)

    noise = model_of(federation, report) - 2.0**-GRID  # what three nodes sent, and their noise
    plan = plan_of(federation, "node-1", run)
    want = noise_terms(plan, COORDINATES).share_sigma * np.sqrt(3) / 3
    assert 2 / 3 * want < noise.std() < 3 / 2 * want
    assert spends(federation, "node-2", run) == [SpendStatus.RELEASED]


def test_record_distributed_through_real_workers(federation):
    """Each site's worker clips and sums, its agent adds a share: against the arithmetic itself.

    At a sampling rate of 1 every record is in the sample, so the sum without noise is known.
    """
    documents, names = 48, ("lm_head.weight", "model.layers.1.mlp.down_proj.weight")
    start = federation.folder / "start" / "worked"
    manifest, _ = write_model(start, config=TINY, seed=7)
    for number, site in enumerate(federation.sites):
        path = federation.federation.data_folder(site) / "train.jsonl"
        write_text(path, documents=documents, seed=number)
    terms = {"sampling_rate": 1.0, "expected_batch": float(documents), "noise_multiplier": 1.5}
    torch.set_num_threads(1)
    run = federation.submit_written(
        start,
        {
            "run": "worked",
            "mode": "record-distributed",
            "roster": list(federation.sites),
            "min_participants": 3,
            "rounds": 1,
            "model": {"family": "llama", "config": TINY, "seed": 7},
            "trainable": list(names),
            "local_step": {
                "optimizer": "sgd",
                "lr": 1.0,
                "sequence_length": 32,
                "max_steps": 1,
                "keep_optimizer": False,
            },
            "evaluation": {"languages": []},
            "vector": {"ring_bits": 20, "scale": {"mode": "fixed", "exponent": 15}},
            "privacy": RECORD | {"steps": 1, "colluders": 1, "max_sequences": 2} | terms,
        },
    )
    report = federation.confirmed(run)

    plan, theta = plan_of(federation, "node-1", run), np.fromfile(start / "theta.f32", "<f4")
    chosen = np.concatenate([np.arange(s.start, s.stop) for s in manifest.select(names)])
    moved = model_of(federation, report) - theta
    assert np.count_nonzero(np.delete(moved, chosen)) == 0
    model, wanted = reference_model(theta, manifest), np.zeros(chosen.size)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    for site in federation.sites:
        path = federation.federation.data_folder(site) / "train.jsonl"
        records = Records(
            index_corpus((str(path),)), unit="document", max_sequences=2, sequence_length=32
        )
        assert len(records) == documents
        wanted -= plain_sum(model, [records.read(n) for n in range(documents)], 1.0)
    wanted /= 3 * documents
    sigma = noise_terms(plan, chosen.size).share_sigma * np.sqrt(3) / 3
    noise = moved[chosen] - wanted
    assert fits_scale(noise, sigma**2)
    length = np.linalg.norm(wanted)
    assert length > 25 * sigma, (length, sigma)  # the records agree, and that is in the model:
    assert abs(noise @ wanted / length) < 5 * sigma
    for site in federation.sites:
        assert spends(federation, site, run) == [SpendStatus.RELEASED]


def test_a_site_without_a_budget_declines_and_one_that_gives_it_takes_part(federation):
    run = submit(federation, "unasked", "institution", privacy=INSTITUTION)
    with federation.history(run) as history:
        entry = federation.entries(history, lambda entry: "privacy.dataset" in entry.why)
    assert "letters" in entry.why
    report = federation.wait(run)  # every round of it ends like the first one
    assert report.status == "failed"
    home = folder(federation, "node-1")
    said = declined(federation, entry.node)
    assert "privacy.dataset" in said["agent"]["runs"][-1]["declined"]
    assert [line["dataset"] for line in said["privacy"]] == ["default"]

    lines = ('dataset = "letters"', 'unit = "institution"', "epsilon = 30.0", "delta = 1e-4")
    budget = ("[limits]", "\n".join(("[[privacy.budget]]", *lines, "", "[limits]")))
    for site in federation.sites:
        rewrite(federation, site, ('dataset = "default"  #', 'dataset = "letters"  #'), budget)
    run = submit(federation, "whole", "institution", privacy=INSTITUTION)
    report = federation.confirmed(run)

    moved = model_of(federation, report)
    plan = plan_of(federation, "node-1", run)
    terms = noise_terms(plan, COORDINATES)
    # 400 coordinates of 2**-10 are 0.02 long: shorter than C, so nothing is clipped.
    noise = moved - 2.0**-GRID
    assert 2 / 3 < noise.std() / (terms.share_sigma * np.sqrt(3) / 3) < 3 / 2
    assert spends(federation, "node-3", run) == [SpendStatus.RELEASED]
    assert home.joinpath("privacy.sqlite").stat().st_mode & 0o777 == 0o600


def test_the_planner_answers_from_the_ledger(federation, tmp_path, capsys):
    """The run of the test before, once more: what it would come to, and by whose account."""
    plan = plan_of(federation, "node-1", RunId("whole"))
    (tmp_path / "plan.json").write_bytes(plan.to_bytes())
    start = federation.folder / "start" / "whole"
    arguments = ["--snapshot", str(start), "--dir", str(federation.folder)]
    for command in (["plan"], ["submit", "--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            main(["run", *command, str(tmp_path / "plan.json"), "--json", *arguments])
        assert not ended.value.code
        said = json.loads(capsys.readouterr().out)
        facts = said.get("outlook", said)
        assert [site["node"] for site in facts["sites"]] == list(plan.roster)
        assert all(float(site["after"]) > float(site["before"]) > 4 for site in facts["sites"])
        assert facts["noise"]["shares"] == 2
        assert set(facts["traffic"]["seconds_per_round"]) == {"100 Mb/s", "1 Gb/s"}
    with pytest.raises(SystemExit):
        main(["run", "plan", str(tmp_path / "plan.json"), *arguments])
    assert "not known here: each site's own budget" in capsys.readouterr().out


def test_an_exhausted_budget_declines_whatever_the_coordinator_says(federation):
    """Two runs of one data set share its budget: the second one finds it spent."""
    site = "node-2"
    ledger = PrivacyLedger(
        folder(federation, site) / "privacy.sqlite", now=lambda: datetime.now(UTC), read_only=True
    )
    spent = [row.round.run for row in ledger.records("letters") if row.spend.counts]
    ledger.close()
    assert spent == ["whole"]
    rewrite(federation, site, ("epsilon = 30.0", "epsilon = 5.0"))  # one round costs 4.75
    run = submit(federation, "again", "institution", privacy=INSTITUTION)
    with federation.history(run) as history:
        entry = federation.entries(history, lambda entry: "privacy.budget" in entry.why)
    assert entry.node == site
    assert spends(federation, site, run) == []
