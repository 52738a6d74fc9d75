"""Consortium, site and persons, as a node finds them out: a signed repository, real files."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.admin.proposals import propose_emergency, propose_override, propose_policy
from infra.demo.policy import TERMS, demo_site_policy
from node_agent.code_digest import installed_code
from node_agent.config import DataConfig
from node_agent.governance import Governance
from node_agent.governed import Approval, write_approval
from node_agent.journal import Journal
from node_agent.models import Models
from node_agent.site_policy import STARTING_RULES
from policies.consortium import ConsortiumPolicy
from policies.document import MAX_NUMBER
from policies.drafting import terms_value
from policies.effect import POLICY_DOCUMENT
from policies.overrides import Override
from policies.privacy.micro import micro
from policies.trust import compare
from protocols.canonical import canonical_bytes
from protocols.cohort import terms_of
from protocols.governance.documents import Denials, time_text
from protocols.governance.errors import TrustRefusedError
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.plan import Plan
from protocols.rounds import Open
from tests.support.governed import change
from tests.support.node import node_config, node_folder, round_seen, run_seen
from tests.support.plans import plan as any_plan
from tests.support.plans import plan_value
from tests.support.trust import NOW, World

SITES = ["site-a", "site-b", "site-c"]
BASE = "1" * 64
PLENTY = {
    "valid_from": time_text(NOW - timedelta(days=1)),
    "expires": time_text(NOW + timedelta(days=90)),
    "participation__min_participants": 3,
    "participation__min_countries": 2,
    "participation__max_weight_share_permille": 1000,
    "participation__dropout_permille": 1000,
    "secagg__min_surviving": 2,
    "rounds__min_interval_min": 0,
    "updates__parts": ["all"],
    "data__declaration_required": ["datasheet"],
    "models__bases": [
        {"id": "base-1", "digest": f"sha256:{BASE}", "format": "float32", "licence": "CC0-1.0",
         "obligations": []}
    ],
    "code__allowed": [
        {"image": f"sha256:{installed_code()}", "source_commit": "installed", "provenance": "none",
         "approved_by": ["ana", "bruno"], "expires": time_text(NOW + timedelta(days=90))}
    ],
}  # fmt: skip


def the_policy(world, **changes):
    return world.policy(**PLENTY | changes)


def the_plan(policy: ConsortiumPolicy, changes: dict[str, Any] | None = None) -> Plan:
    value = plan_value(
        federation="demo",
        roster=SITES,
        min_participants=3,
        model={"family": "vector", "manifest": "2" * 64, "initial": BASE},
        local_step={"kind": "builtin", "max_steps": 10},
        vector={"clip_norm": 0.5},
    )
    value["terms"] = terms_value(policy, initial=Digest(BASE), written=TERMS, code=None)
    return Plan.from_value(change(value, changes or {}))


@dataclass
class Node:
    """A node's folder, and what is in force."""

    folder: Path
    world: World = field(default_factory=World)

    def __post_init__(self):
        self.world.found(policy={POLICY_DOCUMENT: the_policy(self.world)})
        self.node = node_folder(self.folder)
        self.now = NOW
        paths = [str(self.node.root / name) for name in ("train.jsonl", "valid.jsonl")]
        self.text = demo_site_policy("ar-a", paths=paths, languages=["es"], salt=bytes(32))
        self.write(self.text)
        self.node.rules.write_text(STARTING_RULES, "utf-8")
        self.config = node_config(
            institution=NodeId("site-a"), data=DataConfig(train=(paths[0],), valid=(paths[1],))
        )
        self.journal = Journal(self.node.journal, now=lambda: self.now)
        self.site = SimpleNamespace(
            folder=self.node, config=self.config, journal=self.journal, node=NodeId("site-a"),
            models=Models(self.node.models), now=lambda: self.now, monotonic=lambda: 0.0,
            trust=SimpleNamespace(state=self.world.state, policy=lambda _: self.policy),
            privacy=None, log=None,
        )  # fmt: skip
        self.governance = Governance(self.site)

    def write(self, text):
        self.node.policy.write_text(text, "utf-8")

    @property
    def policy(self):
        return ConsortiumPolicy.from_bytes(self.world.state.documents[POLICY_DOCUMENT])

    def enact(self, request, people=("ana", "bruno")):
        self.site.trust.state = self.world.enact(request, people)

    def replace_policy(self, **changes):
        document = the_policy(self.world, policy_version=8, **changes)
        self.enact(propose_policy(self.world.base(), {POLICY_DOCUMENT: document}))

    def rule(self, plan=None, runs=()):
        seen = run_seen(round_seen(OPEN))
        found = self.governance.refusal(plan or self.plan(), seen, (seen, *runs), index=0)
        return None if found is None else found.rule

    def plan(self, changes=None):
        return the_plan(self.policy, changes)


OPEN = Open(closes_at=NOW, terms=terms_of(any_plan()))


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    yield made
    made.journal.close()


def test_a_signed_policy_and_a_declared_site_agree(node):
    assert node.rule() is None
    assert node.governance.waits(node.plan()) is None
    assert len(node.governance.digest()) == 64


def test_a_broken_or_missing_site_policy_is_a_no(node):
    node.write(node.text.replace("salt", "salz"))
    assert node.rule() == "site.policy"
    assert node.governance.digest() is None
    node.node.policy.unlink()
    assert node.rule() == "site.policy"
    node.write(node.text)
    node.node.rules.write_text('@id("site.a") permit (principal, action, resource);', "utf-8")
    assert node.rule() == "site.policy"
    node.node.rules.write_text(STARTING_RULES, "utf-8")
    assert node.rule() is None  # mended while the agent runs


def test_nothing_in_force_is_a_no(node):
    node.site.trust.state = None
    assert node.rule() == "trust.bootstrap"


def test_a_policy_of_another_version_is_a_no(node):
    old = node.plan()
    node.replace_policy(rounds__max_steps_local=5)

    assert node.rule(old) == "terms.policy"
    assert node.rule() == "rounds.steps"
    assert node.rule(node.plan({"local_step.max_steps": 5})) is None


def test_an_override_lets_one_plan_past_one_rule_until_it_ends(node):
    long = node.plan({"local_step.max_steps": 600})
    assert node.rule(long) == "rounds.steps"
    node.enact(propose_override(node.world.base(), override(long)))

    assert node.rule(long) is None
    assert node.rule(node.plan({"local_step.max_steps": 601})) == "rounds.steps"
    node.now += timedelta(hours=24)
    assert node.rule(long) == "rounds.steps"


def override(plan, rule="rounds.steps", **changes):
    value = {
        "schema": "minga.override/1", "federation": "demo", "plan": plan.digest, "rule": rule,
        "code": "long.texts", "granted_at": time_text(NOW - timedelta(hours=1)),
        "expires": time_text(NOW + timedelta(hours=23)),
    }  # fmt: skip
    return Override.from_bytes(canonical_bytes(value | changes))


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("override.never", {"rule": "secagg.required"}),
        ("override.never", {"rule": "privacy.budget"}),
        ("override.never", {"rule": "residency"}),
        ("override.site", {"rule": "site.hours"}),
        ("override.rule", {"rule": "terms.policy"}),
        ("override.federation", {"federation": "other"}),
        ("override.ttl", {"expires": time_text(NOW + timedelta(hours=24))}),
    ],
)
def test_an_override_that_could_never_count_is_not_even_published(node, rule, changes):
    """Signed by enough admins, and refused all the same: by whoever reads the repository."""
    before = node.world.state
    request = propose_override(node.world.base(), override(node.plan(), **changes))
    after = node.world.enact(request, ["ana", "bruno"])

    with pytest.raises(TrustRefusedError) as caught:
        compare(before, after)
    assert caught.value.rule == rule


def test_an_override_says_what_it_does(node):
    before = node.world.state
    node.enact(propose_override(node.world.base(), override(node.plan())))
    (change_,) = [c for c in compare(before, node.world.state) if c.kind == "override"]

    assert "past rounds.steps (long.texts) until" in change_.words
    assert change_.exactly == 2


def test_an_emergency_stops_a_program_and_a_member(node):
    deny = Denials(
        institutions=("site-b",), runs=(), plans=(), code=(installed_code(),), certificates=(),
        all_rounds=False,
    )  # fmt: skip
    request = propose_emergency(node.world.base(), "stop", code="key.lost", deny=deny)
    node.enact(request)
    found = node.governance.refusal(node.plan(), run_seen(), (), index=0)

    assert found.rule == "participation.status"
    assert "trust.emergency" in found.reason


def test_hours_days_and_other_runs_are_found_in_the_journal(node):
    plan = node.plan()
    limited = node.text.replace('gpu_minutes_day = "consortium"', "gpu_minutes_day = 2880000")
    node.write(limited)
    assert node.rule() is None
    node.journal.add_run(plan)
    node.journal.add_decision(
        RoundId(RunId("r1"), 0), index=0, start_root=Digest(BASE), refusal=None
    )
    assert node.rule() == "site.gpu_day"
    node.now += timedelta(hours=25)
    assert node.rule() is None


@pytest.mark.parametrize(
    ("used", "rule"),
    [
        ({"gpu_ms": 60_000, "cpu_ms": 0, "energy_mwh": 0, "source": "measured"}, None),
        ({"gpu_ms": 60_001, "cpu_ms": 0, "energy_mwh": 0, "source": "measured"}, "site.gpu_day"),
        ({"gpu_ms": 0, "cpu_ms": 9, "energy_mwh": 0, "source": "none"}, "site.energy_day"),
        ({"gpu_ms": 0, "cpu_ms": 9, "energy_mwh": 5_000_000, "source": "estimated"}, None),
        ({"gpu_ms": 0, "cpu_ms": 9, "energy_mwh": 5_000_001, "source": "measured"},
         "site.energy_day"),
    ],
)  # fmt: skip
def test_a_day_counts_what_a_round_used_once_that_is_known(node, used, rule):
    """The plan may use 2880000 minutes and 40000000 Wh; the round took one minute, or 5 kWh."""
    plan = node.plan()
    text = node.text.replace('gpu_minutes_day = "consortium"', "gpu_minutes_day = 2880001")
    node.write(text.replace('energy_wh_day = "consortium"', "energy_wh_day = 40005000"))
    node.journal.add_run(plan)
    first = RoundId(RunId("r1"), 0)
    node.journal.add_decision(first, index=0, start_root=Digest(BASE), refusal=None)
    node.journal.add_outcome(first, left=None, update=Digest("3" * 64), detail={"used": used})
    assert node.rule() == rule


def test_a_round_too_soon_after_the_last(node):
    node.replace_policy(rounds__min_interval_min=60)
    assert node.rule() is None
    node.journal.add_decision(
        RoundId(RunId("r1"), 0), index=0, start_root=Digest(BASE), refusal=None
    )
    assert node.rule() == "rounds.interval"
    node.now += timedelta(hours=1)
    assert node.rule() is None


def test_fewer_witnesses_than_the_policy_asks_for(node):
    node.site.log = SimpleNamespace(
        verifier=SimpleNamespace(demanded=lambda: 6, auditors=lambda: 1)
    )
    assert node.rule() == "log.witnesses"
    node.site.log.verifier.demanded = lambda: 7
    assert node.rule() is None
    node.site.log.verifier.auditors = lambda: 0
    assert node.rule() == "log.auditor"


def test_a_person_is_waited_for(node):
    node.write(node.text.replace("requires_approval = false", "requires_approval = true"))
    plan = node.plan()
    assert node.rule(plan) is None
    assert "minga node approve r1" in node.governance.waits(plan)
    write_approval(node.node, Approval(run="r1", plan=plan.digest, by="ana", at="now"))
    assert node.governance.waits(plan) is None


def test_another_program_than_the_installed_one(node):
    other = node.plan({"terms.code.image": "3" * 64})

    assert node.rule(other) == "join.code"
    found = node.governance.refusal(other, run_seen(), (), index=0)
    assert "code.installed" in found.reason


def test_without_governance_a_written_policy_still_counts(node):
    node.site.trust = None
    assert node.rule() is None
    node.write(node.text.replace("modes = [] ", 'modes = ["open"] '))
    assert node.rule() == "site.mode"
    node.node.policy.unlink()
    assert node.rule() == "site.policy"
    node.node.rules.unlink()
    assert node.rule() is None


def test_costs_are_rounded_up_and_bounded():
    assert micro(0.1) == 100_000
    assert micro(1e-9) == 1
    assert micro(float("inf")) == micro(float("nan")) == micro(1e30) == MAX_NUMBER + 1
    assert micro(-1.0) == 0
