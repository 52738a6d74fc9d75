"""A plan against the consortium's policy: one row for each rule; overrides stay in bounds."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cedar import consortium_text, schema_text
from policies.cedar.engine import RuleSet
from policies.cedar.join import JoinFacts, decide_join
from policies.consortium import ConsortiumPolicy
from policies.overrides import Override, check_override, overridden_rules
from policies.plan_terms import Facts, Member, check_dataset, check_terms
from policies.site import narrow, site_policy_digest
from policies.site_check import check_site_policy
from protocols.canonical import canonical_bytes
from protocols.errors import MalformedMessageError
from protocols.plan import Plan
from tests.support.governed import (
    COUNTRY,
    ME,
    NOW,
    SITE,
    change,
    facts,
    governed_plan,
    plan_value,
    site,
    site_state,
)
from tests.support.policies import changed_value, example

POLICY = example()


def under(policy_changes, plan_changes=None):
    """A changed policy, and the plan written for it."""
    policy = ConsortiumPolicy.from_value(changed_value(policy_changes))
    return governed_plan(plan_changes, policy), policy


def test_the_plan_keeps_to_the_policy():
    assert check_terms(governed_plan(), POLICY, facts())


SECAGG = plan_value()["secagg"]
PRIVATE = {
    "mode": "record-local",
    "privacy": {"unit": "document", "max_sequences": 4, "clip_norm": 0.5, "noise_multiplier": 1.0,
                "sampling_rate": 0.01, "expected_batch": 10.0, "steps": 100, "delta": "1e-9"},
}  # fmt: skip
THREE = dict(list(COUNTRY.items())[:3])


@pytest.mark.parametrize(
    ("rule", "plan_changes", "policy_changes", "fact_changes"),
    [
        ("terms.missing", {"terms": None}, {}, {}),
        ("terms.policy", {"terms.policy.version": 6}, {}, {}),
        ("terms.policy", {"terms.policy.sha256": "0" * 64}, {}, {}),
        ("policy.not_yet", {}, {}, {"now": NOW - timedelta(days=60)}),
        ("policy.expired", {}, {}, {"now": NOW + timedelta(days=100)}),
        ("participation.minimum", {"min_participants": 8},
         {"participation.min_participants": 9}, {}),
        ("participation.countries", {}, {"participation.min_countries": 13}, {}),
        ("participation.status", {}, {}, {"members": {}}),
        ("participation.status", {}, {}, {"members": {
            n: Member(country=c, status="suspended" if n == "bo-univ-1" else "active")
            for n, c in COUNTRY.items()}}),
        ("participation.weight", {"vector.weight_cap_tokens": 1000}, {}, {}),
        ("participation.weight", {}, {"participation.max_weight_share_permille": 111}, {}),
        ("participation.dropout", {}, {"participation.dropout_permille": 200}, {}),
        ("rounds.duration", {"deadlines.train": 86_400}, {}, {}),
        ("rounds.steps", {"local_step.max_steps": 501}, {}, {}),
        ("rounds.steps", {"local_step": {"kind": "builtin", "max_seconds": 5}}, {}, {}),
        ("rounds.hours", {}, {"rounds.hours_utc": [["10:00", "12:00"]]}, {}),
        ("rounds.concurrent", {}, {}, {"other_runs": 2}),
        ("rounds.interval", {}, {}, {"last_round_at": NOW - timedelta(minutes=59)}),
        ("secagg.required", {"mode": "open", "secagg": None}, {}, {}),
        ("secagg.threshold", {}, {"secagg.threshold": [3, 4]}, {}),
        ("secagg.survivors", {},
         {"secagg.min_surviving": 9, "participation.min_participants": 9}, {}),
        ("secagg.protocol", {}, {"secagg.protocol": ["other/1"]}, {}),
        ("privacy.mode", {}, {"privacy.modes": ["record-local"]}, {}),
        ("privacy.unit", PRIVATE, {"privacy.unit": ["institution"]}, {"eps_round_micro": 1}),
        ("privacy.delta", PRIVATE, {"privacy.delta_max": "1e-10"}, {"eps_round_micro": 1}),
        ("privacy.round", PRIVATE, {}, {}),
        ("privacy.round", PRIVATE, {}, {"eps_round_micro": 500_001}),
        ("privacy.accountant", PRIVATE,
         {"privacy.accountant.name": "other"}, {"eps_round_micro": 1}),
        ("privacy.accountant", PRIVATE,
         {"privacy.accountant.version": "0.5.0"}, {"eps_round_micro": 1}),
        ("privacy.accountant", PRIVATE, {}, {"eps_round_micro": 1, "accountant": None}),
        ("log.auditor", {}, {}, {"auditors": 0}),
        ("log.auditor", {}, {}, {"auditors": None}),
        ("log.fresh", {}, {"log.witness.max_cosignature_age_hours": 23}, {}),
        ("log.fresh", {}, {"log.max_checkpoint_interval_s": 59}, {}),
        ("updates.clip", {"vector.clip_norm": None}, {}, {}),
        ("updates.clip", {"vector.clip_norm": 1.5}, {}, {}),
        ("updates.bits", {"vector.ring_bits": 16}, {"updates.bits": [20]}, {}),
        ("updates.parts", {"trainable": "all"}, {}, {}),
        ("updates.parts", {"trainable": ["lora_a.weight", "head"]}, {}, {}),
        ("join.base", {"terms.base.id": "other"}, {}, {}),
        ("join.base", {"terms.base.digest": "0" * 64}, {}, {}),
        ("join.base", {"model.initial": "0" * 64}, {}, {}),
        ("join.code", {"terms.code.image": "0" * 64}, {}, {}),
        ("join.code", {"terms.code.entrypoint": "shell"}, {}, {}),
        ("join.code", {}, {"code.allowed.0.expires": "2026-12-01T00:00:00Z"}, {}),
        ("join.code", {}, {"code.allowed.0.approved_by": ["one"]}, {}),
        ("data.licence", {"terms.data.licences": ["CC-BY-NC-4.0"]}, {}, {}),
        ("data.licence", {"terms.data.licences": []}, {}, {}),
        ("data.use", {"terms.data.use": "advertising"}, {}, {}),
        ("data.personal", {"terms.data.personal": "any"}, {}, {}),
        ("data.class", {"terms.data.classes": []}, {}, {}),
        ("residency", {"mode": "open", "secagg": None}, {}, {}),
        ("jurisdictions.blocked", {}, {"jurisdictions.blocked": ["GT"]}, {}),
        ("resources.gpu", {"terms.limits.gpu_minutes": 2_880_001}, {}, {}),
        ("resources.gpu", {"terms.limits.gpu_minutes_node": 10_001}, {}, {}),
        ("resources.energy", {"terms.limits.energy_wh": 40_000_001}, {}, {}),
        ("resources.energy", {"terms.limits.energy_wh_node": 100_001}, {}, {}),
        ("resources.cost", {"terms.limits.cost_usd_cents": 500_001}, {}, {}),
        ("resources.bandwidth", {"terms.limits.bandwidth_bytes_node": 2**40}, {}, {}),
        ("log.witnesses", {}, {}, {"witness_quorum": 6}),
        ("log.witnesses", {}, {}, {"witness_quorum": None}),
    ],
)  # fmt: skip
def test_each_rule_says_no_and_says_why(rule, plan_changes, policy_changes, fact_changes):
    plan, policy = under(policy_changes, plan_changes)
    decision = check_terms(plan, policy, facts(**fact_changes))

    assert not decision
    assert rule in decision.rules
    assert all(why.reason and "\n" not in why.reason for why in decision.whys)


def test_a_private_plan_within_its_bounds_is_taken():
    plan, policy = under({"privacy.modes": ["record-local"]}, PRIVATE)

    assert check_terms(plan, policy, facts(eps_round_micro=500_000))


def test_public_data_may_go_without_masks_where_the_policy_says_so():
    plan, policy = under(
        {"participation.dropout_permille": 1000},
        {"mode": "open", "secagg": None, "terms.data.classes": ["public"]},
    )

    assert check_terms(plan, policy, facts())


# -- one data set ----------------------------------------------------------------------------------

PERSONAL = {"datasets.0.personal_data": "pseudonymised", "datasets.0.dpia": True}


@pytest.mark.parametrize(
    ("rule", "site_changes", "plan_changes", "policy_changes"),
    [
        (None, {}, {}, {}),
        (None, {**PERSONAL}, {}, {}),
        ("terms.missing", {}, {"terms": None}, {}),
        ("data.class", {"datasets.0.class": "secret"}, {}, {}),
        ("data.licence", {"datasets.0.licence": "CC-BY-NC-4.0"}, {}, {}),
        ("data.licence", {"datasets.0.licence": "MIT"}, {}, {}),
        ("data.use", {"datasets.0.use": ["teaching"]}, {}, {}),
        ("data.personal",
         {"datasets.0.personal_data": "identified", "datasets.0.dpia": True}, {}, {}),
        ("data.personal", PERSONAL, {"terms.data.personal": "none"}, {}),
        ("data.dpia", {"datasets.0.personal_data": "pseudonymised"}, {}, {}),
        ("data.declaration", {"datasets.0.declarations": ["datasheet"]}, {}, {}),
        ("data.indigenous", {"datasets.0.indigenous": True}, {}, {}),
        ("data.indigenous", {"datasets.0.indigenous": True,
                             "datasets.0.fpic_record": f"sha256:{'0' * 64}"}, {}, {}),
        ("jurisdictions.blocked", {}, {}, {"jurisdictions.blocked": ["CL"]}),
        ("jurisdictions.transfer", {**PERSONAL, "datasets.0.jurisdiction": "BR"}, {}, {}),
        ("residency", {"datasets.0.class": "sensitive"}, {"mode": "open", "secagg": None}, {}),
    ],
)  # fmt: skip
def test_what_one_collection_may_be_used_for(rule, site_changes, plan_changes, policy_changes):
    plan, policy = under(policy_changes, plan_changes)
    decision = check_dataset(plan, policy, site(site_changes).datasets[0], facts())

    assert bool(decision) == (rule is None)
    assert rule is None or rule in decision.rules


# -- overrides -------------------------------------------------------------------------------------


def override(**changes):
    value = {
        "schema": "minga.override/1", "federation": "demo", "plan": governed_plan().digest,
        "rule": "rounds.hours", "code": "eclipse", "granted_at": "2026-12-02T00:00:00Z",
        "expires": "2026-12-03T00:00:00Z",
    }  # fmt: skip
    return Override.from_bytes(canonical_bytes(value | changes))


FIVE = frozenset({"ar-hpc-1", "bo-univ-1", "br-univ-1", "cl-univ-1", "co-univ-1"})


def test_an_override_lets_one_plan_past_one_rule():
    shut, policy = under({"rounds.hours_utc": [["10:00", "12:00"]]})
    granted = override(plan=shut.digest)
    plan_of_others = governed_plan({"run": "other"}, policy)

    def check(plan):
        rules = overridden_rules([(granted, FIVE)], policy, plan=plan.digest, now=NOW)
        return check_terms(plan, policy, facts(overridden=rules))

    assert check_terms(shut, policy, facts()).rules == ("rounds.hours",)
    assert check(shut)
    assert check(plan_of_others).rules == ("rounds.hours",)


@pytest.mark.parametrize(
    ("rule", "changes", "signers"),
    [
        ("override.never", {"rule": "secagg.required"}, FIVE),
        ("override.never", {"rule": "privacy.budget"}, FIVE),
        ("override.never", {"rule": "residency"}, FIVE),
        ("override.site", {"rule": "site.hours"}, FIVE),
        ("override.site", {"rule": "site"}, FIVE),
        ("override.rule", {"rule": "policy.expired"}, FIVE),
        ("override.rule", {"rule": "terms.missing"}, FIVE),
        ("override.rule", {"rule": "fed.member.active"}, FIVE),
        ("override.federation", {"federation": "other"}, FIVE),
        ("override.quorum", {}, frozenset(list(FIVE)[:4])),
        ("override.quorum", {}, frozenset()),
        ("override.ttl", {"expires": "2026-12-03T00:00:01Z"}, FIVE),
        ("override.expired", {"expires": "2026-12-02T02:00:00Z"}, FIVE),
        ("override.not_yet", {"granted_at": "2026-12-02T04:00:00Z"}, FIVE),
    ],
)
def test_an_override_that_does_not_count(rule, changes, signers):
    decision = check_override(override(**changes), POLICY, signers=signers, now=NOW)

    assert rule in decision.rules


def test_such_an_override_changes_nothing_whoever_signs_it():
    """Even where somebody puts the rule among the facts, the never-overridable stay."""
    plan = governed_plan({"mode": "open", "secagg": None})
    forced = facts(overridden=frozenset({"secagg.required", "residency", "participation.dropout"}))
    never = override(rule="secagg.required", plan=plan.digest)

    assert overridden_rules([(never, FIVE)], POLICY, plan=plan.digest, now=NOW) == frozenset()
    assert set(check_terms(plan, POLICY, forced).rules) == {"secagg.required", "residency"}


def test_an_override_has_an_end():
    with pytest.raises(MalformedMessageError, match="expires is not after"):
        override(expires="2026-12-02T00:00:00Z")


# -- the site --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "site_changes", "plan_changes", "state"),
    [
        (None, {}, {}, {}),
        ("site.hours", {"hours.0.to": "23:00"}, {}, {}),
        ("site.hours", {"hours.0.days": ["sat"]}, {}, {}),
        ("site.mode", {"deny.modes": ["aggregate-only"]}, {}, {}),
        ("site.base", {"deny.bases": ["base-1"]}, {}, {}),
        ("site.code", {"deny.code": [POLICY.code.allowed[0].image]}, {}, {}),
        ("site.with", {"deny.institutions": ["pa-univ-1"]}, {}, {}),
        ("site.gpu", {"limits.gpu_minutes_round": 999}, {}, {}),
        ("site.energy", {"limits.energy_wh_round": 9_999}, {}, {}),
        ("site.bandwidth", {"limits.bandwidth_bytes_round": 1}, {}, {}),
        ("site.gpu_day", {}, {}, {"joined_today": (governed_plan().terms.limits,) * 2}),
        ("site.energy_day", {"limits.energy_wh_day": 9_999}, {}, {}),
        ("site.epsilon", {}, PRIVATE, {}),
        ("site.datasets", {"datasets": []}, {}, {}),
        ("site.datasets", {}, {}, {"paths": ("text/train", "mail")}),
        ("terms.missing", {}, {"terms": None}, {}),
    ],
)
def test_what_the_site_says(rule, site_changes, plan_changes, state):
    plan = governed_plan(plan_changes)
    decision = check_site_policy(
        plan, site(site_changes), POLICY, facts(eps_round_micro=250_001), site_state(**state)
    )

    assert bool(decision) == (rule is None)
    assert rule is None or decision.rules == (rule,)


def test_the_effective_limit_is_the_least():
    assert narrow(10) == 10
    assert narrow(10, "consortium", 12) == 10
    assert narrow(10, 3, 7, "consortium") == 3


def required(value, path=""):
    for key, inner in value.items():
        where = f"{path}.{key}" if path else key
        yield where
        if isinstance(inner, dict):
            yield from required(inner, where)
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            yield from required(inner[0], f"{where}.0")


@pytest.mark.parametrize("path", list(required(SITE)))
def test_a_site_policy_with_a_missing_key_is_broken(path):
    with pytest.raises(MalformedMessageError, match=r"policy\.toml"):
        site({path: "-"})


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"limits.gpu_minutes_round": "unlimited"},
        {"limits.gpu_minutes_round": -1},
        {"limits.gpu_minutes_round": 1.5},
        {"time_zone": "../../etc/passwd"},
        {"hours": []},
        {"salt": ""},
        {"salt": "abc"},
        {"datasets": SITE["datasets"] * 2},
        {"datasets.0.jurisdiction": "Chile"},
        {"requires_approval": "no"},
        {"deny.modes": ["everything"]},
    ],
)
def test_a_broken_site_policy(changes):
    with pytest.raises(MalformedMessageError):
        site(changes)


def test_the_digest_of_a_site_policy_tells_nothing_and_binds_everything():
    digest = site_policy_digest(site(), "")

    assert digest == site_policy_digest(site(), "")
    others = [
        site_policy_digest(site({"salt": "11" * 32}), ""),
        site_policy_digest(site({"limits.gpu_minutes_day": 1}), ""),
        site_policy_digest(site(), " "),
    ]
    assert len({digest, *others}) == 4


def test_a_declaration_is_croissant():
    made = site().datasets[0].croissant(ME)

    assert made["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert made["license"] == "https://spdx.org/licenses/CC0-1.0.html"
    assert "distribution" not in made
    assert "text/train" not in str(made)
    own = site({"datasets.0.licence": "LicenseRef-Permission"}).datasets[0].croissant(ME)
    assert own["license"] == "LicenseRef-Permission"


# -- all together ----------------------------------------------------------------------------------

RULES = RuleSet.load(schema=schema_text(), consortium=consortium_text(), site="")


def join(**changes):
    values = {"institution": ME, "spiffe": f"spiffe://minga.example/inst/{ME}/node/1",
              "local": site_state().local, "eps_after_micro": 0, "policy_fresh": True,
              "log_witnessed": True, "terms_met": True}  # fmt: skip
    return JoinFacts(**values | changes)


def ask(plan_changes=None, site_changes=None, fact_changes=None, **join_changes):
    return decide_join(
        RULES, governed_plan(plan_changes), POLICY, site(site_changes).datasets[0],
        facts(**(fact_changes or {})), join(**join_changes),
    )  # fmt: skip


def test_the_rules_ask_what_the_documents_say():
    assert ask()
    assert ask(terms_met=False).rules == ("fed.join.terms",)
    assert ask(log_witnessed=False).rules == ("fed.join.fresh",)
    assert ask(policy_fresh=False).rules == ("fed.join.fresh",)
    assert ask(institution="stranger").rules == ("fed.member.active",)
    assert ask({"terms.base.digest": "0" * 64}).rules == ("fed.join.base",)
    assert ask({"terms.code.image": "0" * 64}).rules == ("fed.join.code",)
    assert ask(eps_after_micro=8_000_001).rules == ("fed.epsilon.budget",)
    assert ask(eps_after_micro=2**41).rules == ("cedar.out_of_bounds",)
    assert ask({"terms": None}).rules == ("terms.missing",)
    assert ask(PRIVATE).rules == ("privacy.round",)


def test_the_budget_is_the_least_of_consortium_and_site():
    assert ask(site_changes={"datasets.0.eps_total_micro": 5}, eps_after_micro=5)
    tight = ask(site_changes={"datasets.0.eps_total_micro": 5}, eps_after_micro=6)
    assert tight.rules == ("fed.epsilon.budget",)
    sensitive = ask(site_changes={"datasets.0.class": "sensitive"}, eps_after_micro=2_000_001)
    assert sensitive.rules == ("fed.epsilon.budget",)


def test_only_overridable_rules_look_at_overrides():
    everything = {"overridden": frozenset({"join.base", "join.code", "privacy.budget", "residency",
                                           "secagg.required", "fed.epsilon.budget"})}  # fmt: skip

    assert ask({"terms.base.digest": "0" * 64, "terms.code.image": "0" * 64},
               fact_changes=everything)  # fmt: skip
    assert ask(fact_changes=everything, eps_after_micro=9_000_000).rules == ("fed.epsilon.budget",)


tightenings = st.sampled_from(
    [
        {"hours.0.to": "21:00"}, {"deny.modes": ["aggregate-only"]}, {"deny.bases": ["base-1"]},
        {"limits.gpu_minutes_round": 0}, {"limits.energy_wh_day": 0}, {"datasets": []},
        {"deny.institutions": ["pa-univ-1"]}, {},
    ]
)  # fmt: skip
breaches = st.sampled_from(
    [
        {}, {"terms.base.id": "x"}, {"local_step.max_steps": 600}, {"min_participants": 8},
        {"vector.clip_norm": 2.0}, {"terms": None},
    ]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(tightening=tightenings, breach=breaches)
def test_tightening_a_site_never_turns_a_no_into_a_yes(tightening, breach):
    plan, state = governed_plan(breach), site_state()

    def answer(policy):
        said = check_site_policy(plan, policy, POLICY, facts(), state)
        return set(() if said else said.rules)

    assert answer(site()) <= answer(site(tightening))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
paths = st.sampled_from(list(required(plan_value()["terms"])))


@settings(max_examples=80, deadline=None)
@given(path=paths, value=json_values)
def test_any_terms_are_read_or_refused_with_a_sentence(path, value):
    """What comes from outside is a plan that can be judged, or one sentence; nothing else."""
    try:
        plan = Plan.from_value(change(plan_value(), {f"terms.{path}": value}))
    except MalformedMessageError:
        return
    assert isinstance(bool(check_terms(plan, POLICY, facts())), bool)


site_paths = st.sampled_from(list(required(SITE)))


@settings(max_examples=80, deadline=None)
@given(path=site_paths, value=json_values)
def test_any_site_policy_is_read_or_refused_with_a_sentence(path, value):
    try:
        policy = site({path: value})
    except MalformedMessageError:
        return
    assert isinstance(
        bool(check_site_policy(governed_plan(), policy, POLICY, facts(), site_state())), bool
    )


policy_paths = st.sampled_from(list(required(POLICY.to_value())))


@settings(max_examples=80, deadline=None)
@given(path=policy_paths, value=json_values)
def test_any_consortium_policy_is_read_or_refused_with_a_sentence(path, value):
    try:
        policy = ConsortiumPolicy.from_value(changed_value({path: value}))
    except MalformedMessageError:
        return
    assert ConsortiumPolicy.from_bytes(policy.to_bytes()) == policy
    assert isinstance(bool(check_terms(governed_plan(), policy, facts())), bool)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_override_or_one_sentence(data):
    try:
        Override.from_bytes(data)
    except MalformedMessageError:
        return
    raise AssertionError("random bytes are no override")


def test_facts_are_values():
    assert replace(facts(), other_runs=1) != facts()
    assert isinstance(facts(), Facts)
