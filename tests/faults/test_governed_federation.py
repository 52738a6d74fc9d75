"""A governed federation of real processes: all admin keys change while a run goes on.

Coordinator and agents are processes over mutual TLS; updates are synthetic. Every node asks what
is in force before every round, so a node that could not follow the rotation would decline.
"""

from __future__ import annotations

import json
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
from node_agent.code_digest import installed_code
from policies.consortium import ConsortiumPolicy
from policies.trust import POLICY_DOCUMENT
from protocols.governance.documents import Denials
from protocols.governance.keys import Holder
from protocols.identifiers import FederationId, NodeId, RunId
from protocols.tensors.manifest import Manifest, TensorSpec
from tests.support.federation import GRID, ON_GRID, Running

SITES = ("ar-norte", "br-sul")


def written(rounds: int) -> dict:
    return {
        "run": "run-1",
        "mode": "open",
        "roster": sorted(SITES),
        "min_participants": len(SITES),
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
def governed(folder: Path, rounds: int):
    """A founded federation of two sites at work on a signed plan."""
    start = folder / "start"
    start.mkdir(parents=True)
    (start / "manifest.json").write_bytes(Manifest((TensorSpec("vector", (1000,)),)).to_bytes())
    np.zeros(1000, "<f4").tofile(start / "theta.f32")
    model = read_initial_model(start)
    with Household(folder) as household:
        federation = Federation(folder=folder, household=household)
        federation.initialise(name="demo", governed=True)
        people = DemoGovernance(folder=folder, sites=SITES)
        people.make_people()
        federation.start_coordinator()
        with federation.client() as client:
            federation.wait_until_serving(client)
            name = federation_of(federation.operator().certificate)
            first = complete_plan(written(rounds), model, name)
            policy = demo_policy(
                federation=FederationId("demo"),
                sites=SITES,
                base=first.snapshot.model_root,
                code=installed_code(),
                admins=[holder.person for holder in ADMINS],
                threshold=THRESHOLD,
                witnesses=2,
                now=datetime.now(UTC),
                min_countries=MIN_COUNTRIES,
            )
            people.found({POLICY_DOCUMENT: policy.to_bytes()}, client)
            for site in SITES:
                data = federation.data_folder(site)
                data.mkdir(parents=True)
                for file in ("train.jsonl", "valid.jsonl"):
                    (data / file).write_text('{"text": "hola", "lang": "es"}\n')
                federation.join(site, client.invite(site), approving=people.approving(site))
                federation.declare(site, ["es"])
            for site in SITES:  # the log's witnesses: what is signed waits for them
                federation.start_node(site)
            made = complete_plan(
                written(rounds) | {"terms": TERMS},
                model,
                name,
                client.signing_keys(),
                policy=ConsortiumPolicy.from_bytes(policy.to_bytes()),
                code=installed_code(),
            )
            people.sign_plan(made.plan, client)
            submit(client, made, model)
            yield Running(federation=federation, client=client, sites=SITES), people


def released(count: int):
    return lambda report: len(report.released) >= count


def seen_root(running: Running, site: str) -> int:
    path = running.federation.node_folder(site) / "trust" / "last" / "root.json"
    return int(json.loads(path.read_bytes())["signed"]["version"])


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

        # The new admins are in force at once: two of them stop everything.
        deny = Denials(
            institutions=(), runs=(), plans=(), code=(), certificates=(), all_rounds=True
        )
        stop = propose_emergency(people.base(), "stop", deny=deny, code="drill")
        assert people.enact("stop", stop, ["admin-cl", "admin-pe"], running.client)
