"""A node whose worker, disk or mind fails, in a real federation: it says so and goes on.

The coordinator is a process of its own, behind mutual TLS; the agent runs here, with a worker
(tests/support/fake_worker.py) that misbehaves when it is told to. What is injected is shown to have
happened by the worker's list of starts, or by the journal.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.runs.facts import RunReport
from node_agent.agent import Agent
from node_agent.carry import folder_of, waiting
from node_agent.client import Backoff
from node_agent.config import NodeFolder, load_config
from node_agent.journal import Journal
from node_agent.keys import KeyStore
from node_agent.launchers.jobs import GIVE_UP
from node_agent.launchers.local import LocalLauncher
from node_agent.lock import FolderLock
from node_agent.site import open_site
from node_agent.spool import Spool
from node_agent.status import read_status
from protocols.errors import LedgerBusyError
from protocols.identifiers import RunId
from tests.support.federation import PATIENCE_S, Running, running
from tests.support.node import NOW, rng

ROOT = Path(__file__).parents[2]
NODE = "node-1"
TRAINS = {"kind": "builtin", "max_steps": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A coordinator, and one node that has joined; its agent runs in the tests."""
    folder = tmp_path_factory.mktemp("agent") / "federation"
    with running(folder, nodes=1, start=False) as made:
        node = made.folder / "nodes" / NODE
        text = node / "text.jsonl"
        text.write_text('{"text":"minga"}\n')
        config = node / "config.toml"
        lines = config.read_text().splitlines()
        lines = [f'train = ["{text}"]' if line.startswith("train") else line for line in lines]
        config.write_text("\n".join(lines) + "\n")
        yield made


class Bench:
    """An agent with a fake worker, driven until something is so."""

    def __init__(self, federation: Running) -> None:
        self.federation = federation
        self.folder = NodeFolder(federation.folder / "nodes" / NODE)
        self.spool = Spool(self.folder.spool.absolute()).make()
        self.agent: Agent

    def behave(self, *words: str) -> None:
        """What the next starts of the worker do."""
        (self.spool.root / "behave").write_text("\n".join(words))
        (self.spool.root / "starts").unlink(missing_ok=True)

    @property
    def starts(self) -> int:
        """How often the worker was started."""
        with suppress(FileNotFoundError):
            return len((self.spool.root / "starts").read_text().split())
        return 0

    def _launcher(self) -> LocalLauncher:
        command = [
            *(sys.executable, "-m", "tests.support.fake_worker", "--spool", str(self.spool.root)),
            *("--exit-with-parent", "--parent-pid", str(os.getpid())),
        ]
        return LocalLauncher(
            spool=self.spool,
            command=lambda: command,
            environment={**os.environ, "PYTHONPATH": str(ROOT)},
            start_within_s=60.0,
            hangs_after_s=60.0,
            rng=rng(),
            backoff=Backoff(first_s=0.01, cap_s=0.02),
        )

    def until(
        self, run: RunId, wanted: Callable[[RunReport], bool], *, before: Callable[..., None] = id
    ) -> RunReport:
        """Run the agent until the run is as wanted."""

        async def drive() -> RunReport:
            site = open_site(self.folder, load_config(self.folder), rng=rng())
            self.agent = Agent(replace(site, launchers={"builtin": self._launcher()}))
            before(self.agent)
            working = asyncio.create_task(self.agent.run())
            give_up = time.monotonic() + PATIENCE_S
            try:
                while True:
                    report = await asyncio.to_thread(self.federation.client.show, run)
                    if wanted(report):
                        return report
                    assert time.monotonic() < give_up, (report, read_status(self.folder.status))
                    assert not working.done(), working.exception()
                    await asyncio.sleep(0.1)
            finally:
                self.agent.stop()
                await working

        with FolderLock(self.folder, pid=os.getpid()):
            return asyncio.run(drive())

    def said(self, run: RunId) -> list[tuple[str, str]]:
        """What the journal says about a run: what, and rule or code."""
        journal = Journal(self.folder.journal, now=lambda: NOW, read_only=True)
        try:
            entries = journal.entries(run=run)
        finally:
            journal.close()
        return [(e.what, e.detail.get("rule") or e.detail.get("code") or "") for e in entries]


@pytest.fixture
def bench(federation: Running) -> Bench:
    return Bench(federation)


def logged(federation: Running, run: RunId, kind: str) -> list[dict[str, Any]]:
    """Predicates of a run's leaves in the round log, oldest first."""
    path = federation.folder / "coordinator" / "ledger.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        query = 'select entry from log_leaf where run_id = ? and kind = ? order by "index"'
        rows = ledger.execute(query, (run, kind)).fetchall()
    payloads = [base64.b64decode(json.loads(entry)["payload"]) for (entry,) in rows]
    return [json.loads(payload)["predicate"] for payload in payloads]


def confirmed(report: RunReport) -> bool:
    return report.ended and all(
        line.confirmed for round_ in report.released for line in round_.traffic
    )


def test_a_run_with_a_resident_worker(bench):
    bench.behave("well")
    vector = {"scale": {"mode": "fixed", "exponent": 10}, "resources": True}
    run = bench.federation.submit("plain", rounds=3, local_step=TRAINS, vector=vector)

    report = bench.until(run, confirmed)

    assert report.status == "done"
    assert [round_.metrics["tokens"] for round_ in report.released] == [20, 20, 20]
    assert bench.starts == 1  # one worker served all rounds
    for round_ in report.released:  # what it cost: named, and in the sum
        assert round_.used[NODE].gpu_ms == 3000
        assert (round_.metrics["gpu_ms"], round_.metrics["reporting"]) == (3000, 1)
    costs = [leaf["resources"] for leaf in logged(bench.federation, run, "update.commit")]
    assert [(cost["gpu_seconds"], cost["source"]) for cost in costs] == [(3, "none")] * 3
    assert all(cost["bytes"] > 5_000 for cost in costs)
    bench.until(run, lambda _: True)  # it may have been stopped before it had tidied up
    assert list((bench.spool.root / "out").iterdir()) == []  # nothing is left of what is over
    assert list(bench.folder.uploads.iterdir()) == []
    held = [path for path in bench.folder.run_models(run).iterdir() if path.is_dir()]
    assert len(held) <= 3


@pytest.mark.parametrize(
    ("behaviour", "starts", "code", "sentence"),
    [
        (["nan"], 1, "non_finite", "is not finite"),
        (["short"], 1, "manifest_mismatch", "the selected tensors have 5000"),
        (["lie"], 1, "digest_mismatch", "is not what its result names"),
        (["result"], 1, "worker_failed", "result cannot be read"),
        (["status", "well"], 1, "worker.garbage", "status cannot be read"),
        (["fail"], 1, "data.malformed", "text.jsonl:3"),
        (["die"] * GIVE_UP, GIVE_UP, "worker.lost", "status 7: Segmentation fault"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_bad_worker_costs_one_round(bench, behaviour, starts, code, sentence):
    """The node leaves the round with one clear sentence, and takes part in the next one."""
    bench.behave(*behaviour)
    name = f"bad-{behaviour[0]}"
    run = bench.federation.submit(name, rounds=1, local_step=TRAINS)

    with bench.federation.history(run) as history:
        report = bench.until(run, lambda r: bool(r.rounds) and len(r.rounds) >= 2)
        entry = bench.federation.entries(history, lambda e: f"left ({code})" in e.why)

    assert bench.starts >= starts  # the fault happened
    assert sentence in entry.why
    assert "\n" not in entry.why
    assert report.rounds[0].phase == "Aborted"
    assert ("leave", code) in bench.said(run)
    bench.behave("well")
    (bench.spool.root / "steps").write_text("1")
    report = bench.until(run, confirmed)
    assert report.status == "done"


def test_too_few_steps_are_no_update(bench):
    """The fake worker says 2 steps; the plan wants 3."""
    bench.behave("well")
    run = bench.federation.submit(
        "few", rounds=1, local_step=TRAINS | {"max_steps": 9, "min_steps": 3}
    )

    with bench.federation.history(run) as history:
        bench.until(run, lambda r: len(r.rounds) >= 2)
        entry = bench.federation.entries(history, lambda e: "left (worker_failed)" in e.why)

    assert "2 steps in the time there was; the plan wants at least 3" in entry.why
    late = folder_of(bench.spool, run)  # what it did is not lost: it went into the next round's job
    bench.until(run, lambda _: any(one.holds for one in waiting(late)))
    assert ("carried over", "") in bench.said(run)
    bench.federation.client.stop(run, "seen enough")


def test_a_paused_node_declines_and_says_why(bench):
    bench.behave("well")
    bench.folder.paused.touch()
    run = bench.federation.submit("paused", rounds=1)

    with bench.federation.history(run) as history:
        bench.until(run, lambda r: len(r.rounds) >= 2)
        entry = bench.federation.entries(history, lambda e: "declined" in e.why)
    assert "site.paused" in entry.why
    status = read_status(bench.folder.status)
    assert status["state"] == "paused"
    assert status["capability"].startswith("T")
    (facts,) = [f for f in bench.federation.client.nodes() if f.node == NODE]
    assert facts.capability == status["capability"]

    bench.folder.paused.unlink()
    assert bench.until(run, confirmed).status == "done"
    assert ("decline", "site.paused") in bench.said(run)


def test_another_model_is_objected_to_and_ends_the_part_in_the_run(bench):
    """This node's outer step halves the learning rate, or the coordinator's doubles it."""
    run = bench.federation.submit("disagree", rounds=2)

    def declined(report: RunReport) -> bool:  # and its objection was taken
        line = next((round_.traffic[0].confirmed for round_ in report.released), "")
        return bool(line) and ("decline", "model_disagreement") in bench.said(run)

    def another(agent: Agent) -> None:
        models = agent.site.models
        compute = models.compute_next

        def computed(*, plan, **named):
            outer = plan.outer.model_copy(update={"lr": 0.5})
            return compute(plan=plan.model_copy(update={"outer": outer}), **named)

        models.compute_next = computed

    bench.until(run, declined, before=another)
    report = bench.federation.client.stop(run, "seen enough")

    first = report.released[0]
    assert first.traffic[0].confirmed.startswith("objection: model_disagreement")
    said = bench.said(run)
    assert ("stopped", "model_disagreement") in said
    assert ("decline", "model_disagreement") in said
    status = read_status(bench.folder.status)
    shown = next(line for line in status["runs"] if line["run"] == run)
    assert "model_disagreement" in shown["stopped"]
    evidence = [p.name for p in bench.folder.run_models(run).iterdir()]
    assert any(name.startswith(".sum-") for name in evidence)  # kept for whoever looks into it


def test_a_damaged_disk_is_not_the_coordinators_fault(bench):
    """One weight of the model on this node's disk changes: it is fetched again, and confirmed."""
    run = bench.federation.submit("damaged", rounds=2)
    damaged = []

    def damage(agent: Agent) -> None:
        models = agent.site.models
        compute = models.compute_next

        def computed(**named):
            if not damaged:
                damaged.append(named["start"].snapshot.model_root)
                with named["start"].theta_path.open("r+b") as file:
                    file.write(np.float32(0.5).tobytes())
            return compute(**named)

        models.compute_next = computed

    report = bench.until(run, confirmed, before=damage)

    assert len(damaged) == 1
    assert report.status == "done"
    assert [line.confirmed for round_ in report.released for line in round_.traffic] == [
        round_.model_out for round_ in report.released
    ]
    assert ("model dropped", "") in bench.said(run)


def test_heartbeats_show_the_training(bench, monkeypatch):
    """Long before the idle poll would have ended; the step is the worker's."""
    monkeypatch.setattr("node_agent.polling.IDLE_WAIT_MS", 600_000)  # never ends in this test
    bench.behave("slow")
    run = bench.federation.submit("slow", rounds=1, local_step=TRAINS)
    seen = []

    def trains(_report: RunReport) -> bool:
        (facts,) = [f for f in bench.federation.client.nodes() if f.node == NODE]
        seen.extend((p.activity, p.step) for p in facts.progress if p.round.run == run)
        return len({step for activity, step in seen if activity == "training" and step}) >= 2

    bench.until(run, trains)

    steps = [step for activity, step in seen if activity == "training"]
    assert steps == sorted(steps)
    bench.federation.client.stop(run, "seen enough")
    bench.behave("well")


def test_a_certificate_is_renewed_without_a_restart(bench, monkeypatch):
    """Due at once, then never again: the run goes on over the new channel."""
    keys = KeyStore(bench.folder.keys)
    before = keys.tls().serial
    due = iter([datetime(2020, 1, 1, tzinfo=UTC)])
    far = datetime(2100, 1, 1, tzinfo=UTC)
    monkeypatch.setattr("node_agent.agent.renewal_due", lambda *_args, **_named: next(due, far))
    run = bench.federation.submit("renews", rounds=2)

    assert bench.until(run, confirmed).status == "done"

    assert keys.tls().serial != before
    journal = Journal(bench.folder.journal, now=lambda: NOW, read_only=True)
    assert sum(entry.what == "certificate renewed" for entry in journal.entries()) == 1
    journal.close()


def test_a_second_agent_is_refused(bench):
    with (
        FolderLock(bench.folder, pid=4711),
        pytest.raises(LedgerBusyError, match="process 4711"),
        FolderLock(bench.folder, pid=4712),
    ):
        pass


def test_a_plan_the_site_does_not_allow_is_declined_by_its_rule(bench):
    run = bench.federation.submit(
        "flower", rounds=1, local_step={"kind": "flower", "app": "their.app:client"}
    )

    bench.until(run, lambda _: any(what == "decline" for what, _ in bench.said(run)))
    bench.federation.client.stop(run, "seen enough")

    assert {rule for what, rule in bench.said(run) if what == "decline"} == {"site.local_step"}
