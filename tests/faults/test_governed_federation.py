"""A governed federation of real processes: keys change in mid-run, and no site is talked into it.

Coordinator and agents are processes over mutual TLS; updates are synthetic. Every node asks what
is in force before every round, so a node that could not follow the rotation would decline.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from infra.admin.keys import card_path, make_key, read_card
from infra.admin.proposals import propose_emergency, propose_rotation
from infra.demo.federation import Federation
from infra.demo.governance import ADMINS, MIN_COUNTRIES, PASSPHRASE, THRESHOLD, DemoGovernance
from infra.demo.policy import TERMS, demo_policy
from infra.demo.processes import Household
from infra.runs.plan_file import complete_plan, federation_of, read_initial_model
from infra.runs.submission import submit
from node_agent.cli.showing import journal_facts
from node_agent.code_digest import installed_code
from policies.consortium import ConsortiumPolicy
from policies.effect import POLICY_DOCUMENT
from protocols.governance.documents import Denials
from protocols.governance.keys import Holder
from protocols.identifiers import FederationId, NodeId, RunId
from protocols.tensors.manifest import Manifest, TensorSpec
from tests.support.federation import GRID, ON_GRID, Running

SITES = ("ar-norte", "br-sul")


def written(rounds: int, sites: tuple[str, ...]) -> dict:
    return {
        "run": "run-1",
        "mode": "open",
        "roster": sorted(sites),
        "min_participants": len(sites),
        "rounds": rounds,
        "model": {"family": "vector"},
        "local_step": {"kind": "synthetic", "synthetic": {"delta": ON_GRID}},
        "vector": {
            "ring_bits": 20,
            "clip_norm": 100.0,
            "scale": {"mode": "fixed", "exponent": GRID},
        },
        "deadlines": dict.fromkeys(("join", "train", "deal", "upload", "commit", "reveal"), 60),
    }


@contextmanager
def governed(
    folder: Path,
    rounds: int,
    sites: tuple[str, ...] = SITES,
    rules: Mapping[str, str] | None = None,
):
    """A founded federation of sites at work on a signed plan.

    Args:
        folder: empty.
        rounds: of the plan.
        sites: who takes part.
        rules: what stands in the ``policy.cedar`` of some of them.
    """
    start = folder / "start"
    start.mkdir(parents=True)
    (start / "manifest.json").write_bytes(Manifest((TensorSpec("vector", (1000,)),)).to_bytes())
    np.zeros(1000, "<f4").tofile(start / "theta.f32")
    model = read_initial_model(start)
    with Household(folder) as household:
        federation = Federation(folder=folder, household=household)
        federation.initialise(name="demo", governed=True)
        people = DemoGovernance(folder=folder, sites=sites)
        people.make_people()
        federation.start_coordinator()
        with federation.client() as client:
            federation.wait_until_serving(client)
            name = federation_of(federation.operator().certificate)
            first = complete_plan(written(rounds, sites), model, name)
            policy = demo_policy(
                federation=FederationId("demo"),
                sites=sites,
                base=first.snapshot.model_root,
                code=installed_code(),
                admins=[holder.person for holder in ADMINS],
                threshold=THRESHOLD,
                witnesses=len(sites),
                now=datetime.now(UTC),
                min_countries=MIN_COUNTRIES,
            )
            people.found({POLICY_DOCUMENT: policy.to_bytes()}, client)
            for site in sites:
                data = federation.data_folder(site)
                data.mkdir(parents=True)
                for file in ("train.jsonl", "valid.jsonl"):
                    (data / file).write_text('{"text": "hola", "lang": "es"}\n')
                federation.join(site, client.invite(site), approving=people.approving(site))
                federation.declare(site, ["es"])
                if rules and site in rules:
                    (federation.node_folder(site) / "policy.cedar").write_text(rules[site])
            for site in sites:  # the log's witnesses: what is signed waits for them
                federation.start_node(site)
            made = complete_plan(
                written(rounds, sites) | {"terms": TERMS},
                model,
                name,
                client.signing_keys(),
                policy=ConsortiumPolicy.from_bytes(policy.to_bytes()),
                code=installed_code(),
            )
            people.sign_plan(made.plan, client)
            submit(client, made, model)
            yield Running(federation=federation, client=client, sites=sites), people


def released(count: int):
    return lambda report: len(report.released) >= count


def seen_root(running: Running, site: str) -> int:
    path = running.federation.node_folder(site) / "trust" / "last" / "root.json"
    return int(json.loads(path.read_bytes())["signed"]["version"])


def answer(folder: Path, question: str) -> str:
    """An auditor's answer, from the log and the first root."""
    root = folder / "tuf" / "metadata" / "1.root.json"
    command = [sys.executable, "-m", "infra.cli", "audit", "verify", str(folder / "log"), "--json"]
    made = subprocess.run(
        [*command, "--root", str(root)], capture_output=True, text=True, check=False
    )
    found = [item for item in json.loads(made.stdout)["records"] if item["id"] == question]
    assert len(found) == 1, made.stdout
    return str(found[0]["result"]) if found[0]["result"] == "pass" else str(found[0])


@pytest.mark.slow
def test_all_admin_keys_rotate_in_mid_run_and_no_round_stops(tmp_path):
    with governed(tmp_path, rounds=8) as (running, people):
        run = RunId("run-1")
        running.wait(run, released(2))
        coming = [
            Holder(person="admin-cl", institution=NodeId("cl-univ-1"), country="CL"),
            Holder(person="admin-mx", institution=NodeId("mx-univ-1"), country="MX"),
            Holder(person="admin-pe", institution=NodeId("pe-univ-1"), country="PE"),
        ]
        for holder in coming:
            make_key(people.admin_key(holder.person), holder, PASSPHRASE)
        request = propose_rotation(
            people.base(),
            add=[read_card(card_path(people.admin_key(item.person))) for item in coming],
            remove=[holder.person for holder in ADMINS],
        )
        signers = ["admin-ar", "admin-br", "admin-cl", "admin-mx"]
        assert people.enact("rotation", request, signers, running.client)

        report = running.confirmed(run)
        assert report.status == "done"
        assert len(report.released) == 8
        assert all(round_.phase == "Released" for round_ in report.rounds)  # none was lost
        for site in SITES:
            assert seen_root(running, site) == 2  # and they really followed
        assert (
            answer(running.folder, "16") == "pass"
        )  # the institutions asked for every certificate

        # The new admins are in force at once: two of them stop everything.
        deny = Denials(
            institutions=(), runs=(), plans=(), code=(), certificates=(), all_rounds=True
        )
        stop = propose_emergency(people.base(), "stop", deny=deny, code="drill")
        assert people.enact("stop", stop, ["admin-cl", "admin-pe"], running.client)


FORBID = 'forbid (principal, action == Minga::Action::"joinRound", resource is Minga::RoundPlan)'
TALKED_INTO_IT = {
    # A site file that tries to allow what nobody else does.
    "ar-norte": (f'@id("site.yes") permit{FORBID[6:]};', "a site can only forbid"),
    # A condition that errors: Cedar skips such a rule, and would answer Allow.
    "br-sul": (
        f'@id("site.sum") {FORBID} when {{ 4611686018427387904 * 4 > resource.gpuMinutes }};',
        "cedar.condition_error",
    ),
    # An attribute that the schema does not know.
    "uy-este": (f'@id("site.x") {FORBID} when {{ context.nope > 3 }};', "does not fit the schema"),
}


@pytest.mark.slow
def test_a_site_file_that_permits_errs_or_is_wrong_means_no(tmp_path):
    """Three real agents, each with a file that is no plain narrowing: all three say no."""
    rules = {site: text for site, (text, _) in TALKED_INTO_IT.items()}
    with governed(tmp_path, rounds=1, sites=tuple(TALKED_INTO_IT), rules=rules) as (running, _):
        run = RunId("run-1")
        report = running.wait(run)
        assert report.status != "done"
        assert not report.released
        for site, (_, says) in TALKED_INTO_IT.items():
            lines = journal_facts(running.federation.node_folder(site), run="run-1", last=None)
            said = [str(line) for line in lines if line["what"] == "decline"]
            assert said, lines
            assert all(says in line for line in said), said
