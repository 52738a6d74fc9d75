"""A node's own yes or no under a policy: files at the site, all rules together, a person."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node_agent.cli.approving import approve_run, plan_lines, waiting
from node_agent.config import DataConfig
from node_agent.doctor import check_policy
from node_agent.governed import (
    Approval,
    Situated,
    approval_missing,
    decide_governed,
    decide_site_alone,
    read_approval,
    refusal_of,
    write_approval,
)
from node_agent.journal import Journal
from node_agent.site_policy import STARTING_RULES, load_site_rules, starting_policy
from node_agent.status import STATUS_SCHEMA
from policies.decision import Allowed
from policies.in_force import InForce, members_of
from policies.plan_terms import Member
from protocols.errors import ConfigurationError, NotFoundError, NotPermittedError
from protocols.governance.documents import Emergency, Members
from protocols.identifiers import NodeId, RunId
from tests.support.governed import COUNTRY, ME, NOW, SITE, change, governed_plan
from tests.support.node import node_config, node_folder
from tests.support.policies import example

LATE = datetime(2026, 12, 3, 2, 0, tzinfo=UTC)  # Wednesday, 23:00 in Santiago
MEMBERS = {name: Member(country=country, status="active") for name, country in COUNTRY.items()}
IN_FORCE = InForce(policy=example(), members=MEMBERS)
AT = Situated(now=LATE, log_witnessed=True, witness_quorum=7, auditors=1)


def toml(value):
    """A JSON value as TOML; JSON lists, strings and numbers are TOML as well."""

    def table(name, inner):
        rows = [f"{key} = {json.dumps(item)}" for key, item in inner.items()]
        return "\n".join([name, *rows])

    plain = {k: v for k, v in value.items() if not isinstance(v, dict) and not _tables(v)}
    parts = [table("", plain)]
    for key, inner in value.items():
        if isinstance(inner, dict):
            parts.append(table(f"[{key}]", inner))
        elif _tables(inner):
            parts += [table(f"[[{key}]]", item) for item in inner]
    return "\n".join(parts) + "\n"


def _tables(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def written(tmp_path, changes=None, rules=""):
    """A node's folder with its two policy files."""
    folder = node_folder(tmp_path)
    folder.policy.write_text(toml(change(SITE, changes or {})), "utf-8")
    folder.rules.write_text(rules, "utf-8")
    return folder


def config_of(folder):
    names = ("text/train", "text/valid")
    train, valid = (str(folder.root.resolve() / name) for name in names)
    data = DataConfig(train=(train,), valid=(valid,))
    return node_config(institution=NodeId(ME), data=data)


def ask(folder, plan=None, in_force=IN_FORCE, at=AT):
    return decide_governed(
        plan or governed_plan(), config_of(folder), in_force, load_site_rules(folder), at
    )


# -- all together ----------------------------------------------------------------------------------


def test_a_plan_under_the_policy_runs_at_a_site_that_wants_it(tmp_path):
    decision = ask(written(tmp_path))

    assert decision == Allowed(("fed.join",))


FORBID = 'forbid (principal, action == Minga::Action::"joinRound", resource is Minga::RoundPlan)'

WEEKDAY = f'@id("site.weekday") {FORBID} when {{ context.weekday < 6 }};'
OVERFLOW = f'@id("site.x") {FORBID} when {{ 4611686018427387904 * 4 > resource.gpuMinutes }};'


@pytest.mark.parametrize(
    ("rule", "site", "cedar", "plan", "at"),
    [
        ("site.hours", {}, "", {}, {"now": LATE + timedelta(hours=12)}),
        ("site.hours", {"time_zone": "Asia/Tokyo"}, "", {}, {}),
        ("site.own", {}, f'@id("site.own") {FORBID};', {}, {}),
        ("site.weekday", {}, WEEKDAY, {}, {}),
        ("cedar.condition_error", {}, OVERFLOW, {}, {}),
        ("fed.join.fresh", {}, "", {}, {"log_witnessed": False}),
        ("log.witnesses", {}, "", {}, {"witness_quorum": 3}),
        ("fed.join.terms", {}, "", {"local_step.max_steps": 501}, {}),
        ("rounds.steps", {}, "", {"local_step.max_steps": 501}, {}),
        ("data.licence", {"datasets.0.licence": "CC-BY-NC-4.0"}, "", {}, {}),
        ("site.datasets", {"datasets.0.paths": ["text/train"]}, "", {}, {}),
        ("terms.missing", {}, "", {"terms": None}, {}),
        ("rounds.concurrent", {}, "", {}, {"other_runs": 2}),
        ("policy.expired", {}, "", {}, {"now": LATE + timedelta(days=98)}),
    ],
)  # fmt: skip
def test_every_part_can_say_no(tmp_path, rule, site, cedar, plan, at):
    decision = ask(written(tmp_path, site, cedar), governed_plan(plan), at=replace(AT, **at))

    assert rule in decision.rules
    refusal = refusal_of(decision)
    assert refusal.rule == decision.rules[0]
    assert all(other in refusal.reason for other in decision.rules[1:])


def test_a_stranger_and_a_suspended_member_do_not_join(tmp_path):
    folder = written(tmp_path)
    suspended = {**MEMBERS, ME: Member(country="CL", status="suspended")}

    assert "fed.member.active" in ask(folder, in_force=replace(IN_FORCE, members=suspended)).rules
    assert "fed.member.active" in ask(folder, in_force=replace(IN_FORCE, members={})).rules


def test_an_emergency_denies_code_and_members(tmp_path):
    image = governed_plan().terms.code.image
    denied = replace(IN_FORCE, denied_code=frozenset({image}))

    assert ask(written(tmp_path), in_force=denied).rules == ("trust.emergency",)
    members = Members.from_value(
        {"schema": "minga.members/1", "federation": "demo", "institutions": [
            {"id": ME, "country": "CL", "status": "active", "roles": ["member"],
             "keys": ["d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"],
             "nodes": ["1"], "witnesses": [], "since": "2026-01-01T00:00:00Z"}]}
    )  # fmt: skip
    deny = {"institutions": [ME], "runs": [], "plans": [], "code": [], "certificates": [],
            "all_rounds": False}  # fmt: skip
    notice = Emergency.from_value(
        {"schema": "minga.emergency/1", "federation": "demo", "code": "key.lost",
         "issued_at": "2026-12-02T00:00:00Z", "until": "2026-12-04T00:00:00Z", "deny": deny}
    )  # fmt: skip
    assert members_of(members, {}, NOW)[ME].status == "active"
    assert members_of(members, {"emergency/x.json": notice}, NOW)[ME].status == "suspended"


def test_what_a_round_costs_is_asked_once_it_can_be_known(tmp_path):
    private = governed_plan(
        {"mode": "record-local", "privacy": {
            "unit": "document", "max_sequences": 4, "clip_norm": 0.5, "noise_multiplier": 1.0,
            "sampling_rate": 0.01, "expected_batch": 10.0, "steps": 100, "delta": "1e-9"}}
    )  # fmt: skip
    folder = written(tmp_path)

    assert ask(folder, private, at=replace(AT, cost_pending=True))
    unknown = ask(folder, private)
    assert {"privacy.round", "site.epsilon", "privacy.budget"} <= set(unknown.rules)
    cheap = replace(AT, eps_round_micro=100_000, eps_after_micro=100_000)
    assert ask(folder, private, at=cheap)
    spent = replace(cheap, eps_after_micro=8_000_001)
    assert ask(folder, private, at=spent).rules == ("fed.epsilon.budget",)


def test_a_site_alone_still_has_its_hours(tmp_path):
    site = load_site_rules(written(tmp_path, {"deny.institutions": ["pa-univ-1"]}))

    assert decide_site_alone(governed_plan(), site, LATE).rules == ("site.with",)
    noon = decide_site_alone(governed_plan(), site, LATE + timedelta(hours=12))
    assert noon.rules == ("site.hours", "site.with")
    assert "site.mode" in decide_site_alone(
        governed_plan({"mode": "open", "secagg": None}), site, LATE
    ).rules  # fmt: skip


# -- the files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["policy.toml", "policy.cedar"])
def test_a_missing_file_means_no(tmp_path, name):
    folder = written(tmp_path)
    (folder.root / name).unlink()

    with pytest.raises(ConfigurationError, match=f"{name} is missing"):
        load_site_rules(folder)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("policy.toml", "", "schema"),
        ("policy.toml", "schema = ", "policy.toml"),
        ("policy.toml", "a = " + "[" * 100_000, "policy.toml"),
        ("policy.toml", "x = 2026-01-01", "neither text, number nor list"),
        ("policy.toml", "x = nan", "neither text, number nor list"),
        ("policy.toml", "#" * (2**20 + 1), "larger than"),
        ("policy.cedar", f'@id("site.a") permit{FORBID[6:]};', "a site can only forbid"),
        ("policy.cedar", "forbid", "policy.cedar"),
        ("policy.cedar", "(" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_file_means_no(tmp_path, name, text, says):
    folder = written(tmp_path)
    (folder.root / name).write_text(text, "utf-8")

    with pytest.raises(ConfigurationError) as caught:
        load_site_rules(folder)
    assert says in str(caught.value)


def test_a_time_zone_that_nobody_knows_means_no(tmp_path):
    with pytest.raises(ConfigurationError, match="knows no time zone"):
        load_site_rules(written(tmp_path, {"time_zone": "America/Macondo"}))


def test_the_files_are_read_again_only_when_they_changed(tmp_path):
    folder = written(tmp_path)
    first = load_site_rules(folder)

    assert load_site_rules(folder, first) is first
    folder.rules.write_text(f'@id("site.own") {FORBID};', "utf-8")
    second = load_site_rules(folder, first)
    assert "site.own" in second.rules.rules
    assert second.digest != first.digest


def test_the_digest_does_not_depend_on_where_the_folder_is(tmp_path):
    one, other = tmp_path / "a", tmp_path / "b"

    assert load_site_rules(written(one)).digest == load_site_rules(written(other)).digest


@pytest.mark.parametrize(
    ("utc", "is_open"),
    [
        # Chile: UTC-4 in winter, UTC-3 in summer; hours 20:00 to 07:00, Monday to Friday.
        (datetime(2026, 7, 1, 23, 59, tzinfo=UTC), False),  # 19:59
        (datetime(2026, 7, 2, 0, 0, tzinfo=UTC), True),  # Wednesday, 20:00
        (datetime(2026, 12, 2, 22, 59, tzinfo=UTC), False),  # 19:59
        (datetime(2026, 12, 2, 23, 0, tzinfo=UTC), True),  # Wednesday, 20:00
        (datetime(2026, 12, 5, 9, 59, tzinfo=UTC), True),  # Saturday, 06:59: began on Friday
        (datetime(2026, 12, 5, 23, 30, tzinfo=UTC), False),  # Saturday, 20:30
        (datetime(2026, 12, 7, 9, 0, tzinfo=UTC), False),  # Monday, 06:00: would be Sunday's
        # The clocks go back on 5 April 2026 at 24:00: 23:30 comes twice, and is inside both times.
        (datetime(2026, 4, 4, 2, 30, tzinfo=UTC), True),  # Friday, 23:30
        (datetime(2026, 4, 4, 3, 30, tzinfo=UTC), True),  # Saturday, 00:30
    ],
)
def test_hours_follow_the_sites_clock_and_its_summer_time(tmp_path, utc, is_open):
    site = load_site_rules(written(tmp_path))

    assert site.policy.open_at(site.local(utc)) is is_open


def test_what_join_writes_is_complete_and_declares_nothing(tmp_path):
    """It can be read, and no plan runs before a person has said what the texts are."""
    folder = node_folder(tmp_path)
    text = starting_policy(
        paths=["text/train", "text/valid"], jurisdiction="CL", time_zone="America/Santiago",
        salt=os.urandom(32), residency="in-institution",
    )  # fmt: skip
    folder.policy.write_text(text, "utf-8")
    folder.rules.write_text(STARTING_RULES, "utf-8")
    decision = ask(folder)

    assert {"data.licence", "data.use", "data.personal", "data.declaration"} <= set(decision.rules)
    findings = list(check_policy(folder, config_of(folder), LATE, governed=True))
    assert [item.level for item in findings] == ["ok", "refused"]
    assert len(load_site_rules(folder).rules.rules) == len(
        load_site_rules(written(tmp_path)).rules.rules
    )


def test_what_join_writes_without_texts_can_be_read(tmp_path):
    folder = node_folder(tmp_path)
    text = starting_policy(
        paths=[], jurisdiction="XX", time_zone="UTC", salt=os.urandom(32), residency="anywhere"
    )
    folder.policy.write_text(text, "utf-8")
    folder.rules.write_text(STARTING_RULES, "utf-8")

    assert load_site_rules(folder).policy.datasets == ()


def test_the_doctor_says_what_to_mend(tmp_path):
    def levels(changes, rules="", at=LATE, governed=True):
        folder = written(tmp_path, changes, rules)
        return [
            item.level for item in check_policy(folder, config_of(folder), at, governed=governed)
        ]

    assert levels({}) == ["ok"]
    assert levels({}, "nonsense") == ["refused"]
    assert levels({"datasets.0.paths": ["x"]}) == ["ok", "refused"]
    assert levels({"datasets.0.paths": ["x"]}, governed=False) == ["ok", "warning"]
    assert levels({}, at=LATE + timedelta(hours=12)) == ["ok", "warning"]


# -- approval --------------------------------------------------------------------------------------

RUN = RunId("andes-7")


def test_a_person_approves_one_plan(tmp_path):
    folder = written(tmp_path, {"requires_approval": True, "approvers": ["ana"]})
    site, plan = load_site_rules(folder), governed_plan()

    def missing(plan):
        return approval_missing(plan, site, read_approval(folder, RUN))

    assert missing(plan).rule == "site.approval"
    assert "minga node approve andes-7" in missing(plan).reason
    write_approval(folder, Approval(run=RUN, plan=plan.digest, by="ana", at="now"))
    assert missing(plan) is None
    assert "earlier plan" in missing(governed_plan({"rounds": 4})).reason
    write_approval(folder, Approval(run=RUN, plan=plan.digest, by="eve", at="now"))
    assert "eve may not approve" in missing(plan).reason
    assert approval_missing(plan, load_site_rules(written(tmp_path)), None) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b'{"run":"other","plan":"x","by":"x","at":"x"}', b"\xff", b"{" * 5000],
)
def test_an_approval_that_cannot_be_read_is_none(tmp_path, data):
    folder = written(tmp_path)
    folder.approvals.mkdir()
    (folder.approvals / f"{RUN}.json").write_bytes(data)

    assert read_approval(folder, RUN) is None


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=80))
def test_any_bytes_are_an_approval_or_none(tmp_path_factory, data):
    folder = node_folder(tmp_path_factory.mktemp("approval"))
    folder.approvals.mkdir()
    (folder.approvals / f"{RUN}.json").write_bytes(data)

    assert read_approval(folder, RUN) is None


def test_the_command_approves_what_the_journal_knows(tmp_path):
    folder = written(tmp_path, {"requires_approval": True, "approvers": ["ana"]})
    from tests.unit.test_node_site import rendered

    folder.config.write_text(rendered(), "utf-8")
    plan = governed_plan()
    with pytest.raises(NotFoundError):
        approve_run(folder.root, RUN, by="ana")
    journal = Journal(folder.journal, now=lambda: LATE)
    journal.add_run(plan)
    journal.close()
    shown = {"schema": STATUS_SCHEMA, "runs": [{"run": RUN, "status": "active"}]}
    folder.status.write_text(json.dumps(shown), "utf-8")

    with pytest.raises(NotPermittedError, match="eve may not approve"):
        approve_run(folder.root, RUN, by="eve")
    assert [row["waits"] for row in waiting(folder.root)] == [True]
    assert approve_run(folder.root, RUN, by="ana")["plan"] == plan.digest
    assert [row["waits"] for row in waiting(folder.root)] == [False]
    lines = list(plan_lines(folder.root, RUN))
    assert any("CC-BY-4.0, CC0-1.0, for research" in line for line in lines)
    assert any(plan.digest in line for line in lines)
