"""A run that breaks the signed policy is refused when it is submitted, by the rule of the nodes.

The real services. Every plan was signed by enough admins: what stands against it is the policy.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import grpc
import pytest

from infra.admin.proposals import propose_override, propose_plan, propose_policy
from policies.consortium import ConsortiumPolicy
from policies.drafting import terms_value
from policies.effect import POLICY_DOCUMENT
from policies.overrides import Override
from protocols.canonical import canonical_bytes
from protocols.gen import admin_pb2
from protocols.governance.documents import time_text
from protocols.identifiers import Digest
from tests.support.door import served
from tests.support.governed import change
from tests.support.trust import NOW, World

SITES = ["site-a", "site-b", "site-c"]
CODE = "c" * 64
DATA = {"classes": ["public"], "licences": ["CC0-1.0"], "use": "research", "personal": "none"}


def fitting(world: World, base: str, **changes: Any) -> ConsortiumPolicy:
    """A policy that small plans of three nodes can keep."""
    values = {
        "valid_from": time_text(NOW - timedelta(days=1)),
        "expires": time_text(NOW + timedelta(days=90)),
        "participation__min_participants": 3,
        "participation__min_countries": 2,
        "participation__max_weight_share_permille": 1000,
        "participation__dropout_permille": 1000,
        "secagg__min_surviving": 2,
        "rounds__max_duration_min": 600,
        "updates__parts": ["all"],
        "models__bases": [
            {"id": "base-1", "digest": f"sha256:{base}", "format": "float32",
             "licence": "CC0-1.0", "obligations": []}
        ],
        "code__allowed": [
            {"image": f"sha256:{CODE}", "source_commit": "installed", "provenance": "none",
             "approved_by": ["ana", "bruno"], "expires": time_text(NOW + timedelta(days=90))}
        ],
    }  # fmt: skip
    return ConsortiumPolicy.from_bytes(world.policy(**values | changes))


class Place:
    """A governed coordinator with enrolled nodes and a policy for them."""

    def __init__(self, door: Any) -> None:
        self.door, self.world = door, World()
        self.base = door.make_run("probe", submit=False, roster=SITES).model.initial
        self.policy = fitting(self.world, self.base)
        self.world.found_at(door, policy={POLICY_DOCUMENT: self.policy.to_bytes()})
        for site in SITES:
            door.enrol(site)
        self.runs = 0

    def plan(self, changes: dict[str, Any] | None = None) -> Any:
        """A signed plan, with some values replaced."""
        self.runs += 1
        terms = terms_value(
            self.policy, initial=Digest(self.base), written={"data": DATA}, code=None
        )
        value = {
            "run": f"run-{self.runs}",
            "roster": SITES,
            "min_participants": 3,
            "vector": {"clip_norm": 0.5},
            "deadlines": {"train": 3600, "upload": 1800},
            "terms": terms,
        }
        made = self.door.make_run(submit=False, **change(value, changes or {}))
        self.world.enact_at(self.door, propose_plan(self.world.base(), made), ["ana", "bruno"])
        return made

    def submit(self, plan: Any) -> Any:
        """As the operator does."""
        request = admin_pb2.SubmitRunRequest(
            plan=plan.to_bytes(), snapshot=self.door.snapshots[plan.run].to_bytes()
        )
        return self.door.operator().admin.SubmitRun(request, timeout=30)

    def rule(self, plan: Any) -> str:
        """Why it is refused."""
        with pytest.raises(grpc.RpcError) as caught:
            self.submit(plan)
        return dict(caught.value.trailing_metadata() or ()).get("minga-rule", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with served(tmp_path_factory.mktemp("submission"), governed=True) as door:
        yield Place(door)


def test_a_plan_that_keeps_to_the_policy_is_taken(place):
    assert place.submit(place.plan()).run


REFUSED = [
    ("terms.missing", {"terms": "-"}),
    ("terms.policy", {"terms.policy.sha256": "f" * 64}),
    ("participation.minimum", {"min_participants": 2}),
    ("rounds.duration", {"deadlines.train": 86_000}),
    ("updates.clip", {"vector.clip_norm": 2.0}),
    ("join.base", {"terms.base.id": "base-2"}),
    ("join.code", {"terms.code.image": "d" * 64}),
    ("data.licence", {"terms.data.licences": ["CC-BY-NC-4.0"]}),
    ("secagg.required", {"terms.data.classes": ["public", "sensitive"]}),
    ("resources.energy", {"terms.limits.energy_wh": 10**9, "terms.limits.energy_wh_node": 1}),
]


@pytest.mark.parametrize(("rule", "changes"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_plan_that_breaks_it_is_refused_early(place, rule, changes):
    assert place.rule(place.plan(changes)) == rule


def test_an_override_lets_one_plan_past_one_rule_here_too(place):
    plan = place.plan({"deadlines.train": 86_000})
    override = Override.from_bytes(
        canonical_bytes(
            {
                "schema": "minga.override/1", "federation": "demo", "plan": plan.digest,
                "rule": "rounds.duration", "code": "trial", "granted_at": time_text(NOW),
                "expires": time_text(NOW + timedelta(hours=12)),
            }
        )
    )  # fmt: skip
    assert place.rule(plan) == "rounds.duration"
    request = propose_override(place.world.base(), override)
    place.world.enact_at(place.door, request, ["ana", "bruno"])
    assert place.submit(plan).run == plan.run


def test_a_policy_that_waits_for_its_delay_allows_nothing_yet(tmp_path):
    """A plan for the new policy waits as the policy does; a plan for the old one runs."""
    with served(tmp_path, governed=True) as door:
        place = Place(door)
        delayed = fitting(
            place.world, place.base, policy_version=8, governance__policy_delay_hours=72
        )
        place.world.enact_at(
            door,
            propose_policy(place.world.base(), {POLICY_DOCUMENT: delayed.to_bytes()}),
            ["ana", "bruno", "carla"],
        )
        looser = fitting(
            place.world,
            place.base,
            policy_version=9,
            governance__policy_delay_hours=72,
            participation__min_participants=2,
        )
        place.world.enact_at(
            door,
            propose_policy(place.world.base(), {POLICY_DOCUMENT: looser.to_bytes()}),
            ["ana", "bruno"],
        )
        place.policy = looser
        assert place.rule(place.plan({"min_participants": 2})) == "terms.policy"
        place.policy = delayed
        assert place.submit(place.plan()).run
