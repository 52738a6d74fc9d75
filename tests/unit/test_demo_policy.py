"""The policies of the demonstration let it run, and nothing that they were not made for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.demo.policy import TERMS, country_of, demo_policy, demo_site_policy
from infra.demo.training import demo_plan
from node_agent.code_digest import code_digest, installed_code, source_files
from node_agent.config import DataConfig
from node_agent.governed import Situated, decide_governed
from node_agent.site_policy import STARTING_RULES, load_site_rules
from policies.consortium import ConsortiumPolicy
from policies.drafting import terms_value
from policies.in_force import InForce
from policies.plan_terms import Member
from protocols.errors import PlanRefusedError
from protocols.identifiers import Digest, FederationId, NodeId
from protocols.plan import Plan
from protocols.secagg.threshold import SecaggTerms
from tests.support.node import node_config, node_folder

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
SITES = ("ar-archivo", "br-saude", "cl-leyes", "pe-escuela")
BASE, CODE = Digest("1" * 64), Digest("2" * 64)


def the_policy(sites=SITES, **changes):
    values = {
        "federation": FederationId("demo"), "sites": sites, "base": BASE, "code": CODE,
        "admins": ("ana", "bruno", "carla"), "threshold": 2, "witnesses": len(sites), "now": NOW,
    }  # fmt: skip
    return demo_policy(**values | changes)


def the_plan(policy, mode="aggregate-only", sites=SITES, terms=None):
    value = demo_plan(
        sites=[NodeId(site) for site in sites], languages=["es", "pt"], rounds=2, mode=mode
    )
    value["federation"] = "demo"
    value["model"] = {**value["model"], "manifest": "0" * 64, "initial": BASE}
    value["terms"] = terms_value(
        policy, initial=BASE, written={**TERMS, **(terms or {})}, code=CODE
    )
    if value["mode"] != "open":
        sizes = SecaggTerms.for_roster(len(sites))
        value["secagg"] = {
            "threshold": sizes.threshold, "colluders": sizes.colluders,
            "min_surviving": sizes.min_surviving,
            "keys": {site: f"{number:064x}" for number, site in enumerate(sites)},
        }  # fmt: skip
    return Plan.from_value(value)


def answer(tmp_path, plan, policy, site="pe-escuela", now=NOW):
    folder = node_folder(tmp_path)
    paths = [str(folder.root / name) for name in ("train.jsonl", "valid.jsonl")]
    text = demo_site_policy(site, paths=paths, languages=["es"], salt=bytes(32))
    folder.policy.write_text(text, "utf-8")
    folder.rules.write_text(STARTING_RULES, "utf-8")
    config = node_config(
        institution=NodeId(site), data=DataConfig(train=(paths[0],), valid=(paths[1],))
    )
    members = {name: Member(country=country_of(name), status="active") for name in plan.roster}
    at = Situated(
        now=now, log_witnessed=True, witness_quorum=policy.log.witness.quorum,
        installed_code=CODE, eps_round_micro=1, eps_after_micro=1,
    )  # fmt: skip
    in_force = InForce(policy=policy, members=members)
    return decide_governed(plan, config, in_force, load_site_rules(folder), at)


@pytest.mark.parametrize("mode", ["open", "aggregate-only"])
@pytest.mark.parametrize("count", [3, 4])
def test_the_demonstration_runs_under_its_policy(tmp_path, mode, count):
    policy = the_policy(SITES[-count:])

    assert answer(tmp_path, the_plan(policy, mode, SITES[-count:]), policy)


@pytest.mark.parametrize("count", [1, 2])
def test_also_with_too_few_sites_for_a_secure_sum(tmp_path, count):
    policy = the_policy(SITES[-count:])

    assert answer(tmp_path, the_plan(policy, "open", SITES[-count:]), policy)


@pytest.mark.parametrize(
    ("rule", "terms"),
    [
        ("data.class", {"data": {**TERMS["data"], "classes": ["sensitive"]}}),
        ("join.code", {"code": {"image": "3" * 64, "entrypoint": "train"}}),
        ("code.installed", {"code": {"image": "3" * 64, "entrypoint": "train"}}),
        ("join.base", {"base": {"id": "other", "digest": BASE}}),
        ("terms.policy", {"policy": {"version": 2, "sha256": "0" * 64}}),
    ],
)
def test_what_it_was_not_made_for(tmp_path, rule, terms):
    policy = the_policy()

    assert rule in answer(tmp_path, the_plan(policy, terms=terms), policy).rules


def test_it_expires(tmp_path):
    policy = the_policy()
    late = answer(tmp_path, the_plan(policy), policy, now=NOW + timedelta(days=91))

    assert {"policy.expired", "join.code"} <= set(late.rules)


def test_terms_follow_from_a_policy_or_are_refused():
    policy = the_policy()

    assert terms_value(policy, initial=BASE, written=TERMS, code=None)["code"]["image"] == CODE
    with pytest.raises(PlanRefusedError, match="no base model with root"):
        terms_value(policy, initial=Digest("9" * 64), written=TERMS, code=None)
    nothing = policy.model_copy(update={"code": policy.code.model_copy(update={"allowed": ()})})
    with pytest.raises(PlanRefusedError, match="lists 0 programs"):
        terms_value(nothing, initial=BASE, written=TERMS, code=None)


def test_the_policy_is_a_document_like_any_other():
    policy = the_policy()

    assert ConsortiumPolicy.from_bytes(policy.to_bytes()) == policy
    assert country_of("pe-escuela") == "PE"
    assert country_of("archivo") == "XX"


# -- the digest of the program ---------------------------------------------------------------------


def test_the_digest_covers_every_source_file(tmp_path):
    root = Path(__file__).resolve().parents[2]
    names = {path.relative_to(root).as_posix() for path in source_files(root)}

    assert {"policies/cedar/consortium.cedar", "policies/cedar/minga.cedarschema",
            "node_agent/worker/local_step.py", "protocols/plan.py"} <= names  # fmt: skip
    assert not any(name.startswith(("tests/", "infra/", "coordinator/")) for name in names)
    assert installed_code() == installed_code()
    assert len(installed_code()) == 64


def test_one_changed_byte_is_another_program(tmp_path):
    for name in ("node_agent/a.py", "policies/b.cedar", "protocols/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "node_agent/__pycache__").mkdir()
    (tmp_path / "node_agent/__pycache__/a.py").write_text("not code")
    assert code_digest(tmp_path) == before

    (tmp_path / "policies/b.cedar").write_text("x = 2\n")
    changed = code_digest(tmp_path)
    (tmp_path / "policies/b.cedar").rename(tmp_path / "policies/d.cedar")
    assert len({before, changed, code_digest(tmp_path)}) == 3
