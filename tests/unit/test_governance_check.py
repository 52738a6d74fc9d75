"""The charter agrees with what is signed, and every kind of drift is found."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.governance.checking import check_text
from infra.governance.cli import app
from policies.consortium import ConsortiumPolicy
from policies.governance import (
    CHAPTERS,
    at_pointer,
    check_charter,
    coverage,
    end_values,
    parse_charter,
    roster_text,
    thresholds_text,
    with_annexes,
)
from policies.overrides import Override
from policies.rules import ALL
from protocols.canonical import canonical_bytes
from protocols.governance.documents import Admins, Members
from tests.support.governed import change
from tests.support.policies import changed_value, example

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "GOVERNANCE.md").read_text("utf-8")
NOW = datetime(2026, 11, 28, tzinfo=UTC)
MEMBERS = Members.from_bytes((ROOT / "policies/example/members.json").read_bytes())
ADMINS = Admins.from_bytes((ROOT / "policies/example/admins.json").read_bytes())


def test_the_charter_agrees_with_what_is_signed():
    seen = check_text(ROOT / "GOVERNANCE.md", now=NOW)

    assert [f"{f.where}: {f.sentence}" for f in seen.findings] == []
    assert tuple(seen.charter.chapters) == CHAPTERS
    assert seen.coverage.machine * 4 >= seen.coverage.clauses * 3  # it is a charter with teeth
    assert seen.coverage.clauses >= 45


def test_the_command_says_so():
    done = CliRunner().invoke(app, ["check", str(ROOT / "GOVERNANCE.md")])

    assert done.exit_code == 0, done.output
    assert "clauses" in done.output
    assert "are enforced by machines" in done.output
    assert "agrees with what is signed" in done.output


# -- every kind of drift ---------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """A copy of text and documents, beside links to what the text cites."""
    for name in ("policies", "protocols", "coordinator", "node_agent", "tests", "infra"):
        if name != "policies":
            (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "policies").mkdir()
    for path in (ROOT / "policies").iterdir():
        if path.name != "example":
            (tmp_path / "policies" / path.name).symlink_to(path)
    (tmp_path / "policies/example").mkdir()
    for path in (ROOT / "policies/example").glob("*.json"):
        (tmp_path / "policies/example" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "GOVERNANCE.md").write_text(TEXT, "utf-8")
    return tmp_path


def codes(place, now=NOW):
    return {finding.code for finding in check_text(place / "GOVERNANCE.md", now=now).findings}


def replace_text(old, new, count=1):
    def edit(place):
        path = place / "GOVERNANCE.md"
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new, count), "utf-8")

    return edit


def replace_policy(changes):
    def edit(place):
        value = changed_value(changes)
        data = ConsortiumPolicy.from_value(value).to_bytes()
        (place / "policies/example/consortium.json").write_bytes(data)

    return edit


def replace_document(name, kind, changes):
    def edit(place):
        path = place / "policies/example" / name
        value = kind.from_bytes(path.read_bytes()).model_dump(mode="json", by_alias=True)
        path.write_bytes(canonical_bytes(change(value, changes)))

    return edit


ENFORCED = re.search(r"^> enforced-by: .*$", TEXT, flags=re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("code", "edit"),
    [
        ("clause.unenforced", replace_text(ENFORCED, "")),
        ("clause.means", replace_text("human (assembly minutes)", "hope (assembly minutes)")),
        ("clause.cedar", replace_text("cedar:fed.residency", "cedar:fed.nowhere")),
        ("cedar.unexplained", replace_text("cedar:fed.residency; ", "")),
        ("clause.rule", replace_text("rule:data.licence", "rule:data.nothing")),
        ("clause.test", replace_text("::test_the_24_known_answers", "::test_nothing")),
        ("clause.test", replace_text("test:tests/unit/", "test:tests/nowhere/")),
        ("clause.code", replace_text("code:protocols/errors.py", "code:protocols/mistakes.py")),
        ("clause.code", replace_text("code:protocols/errors.py", "code:../../etc/passwd")),
        ("policy.pointer", replace_text("policy:/secagg/required=", "policy:/secagg/needed=")),
        ("policy.value", replace_text("/secagg/required=true", "/secagg/required=false")),
        ("policy.value", replace_text("/secagg/min_surviving=6}}", "/secagg/min_surviving=5}}")),
        ("policy.value", replace_text("policy:/secagg/required=true", "policy:/secagg/required")),
        ("policy.unexplained", replace_text("policy:/jurisdictions/blocked=[]; ", "")),
        ("policy.unexplained", replace_text("policy:/gates; ", "")),
        ("policy.value", replace_policy({"participation.min_participants": 7})),
        ("front.version", replace_policy({"policy_version": 8})),
        ("front.version", replace_text("policy_version: 7", "policy_version: 6")),
        ("form.front", replace_text("minga-governance: 1", "minga-governance: 2")),
        ("form.chapters", replace_text("## 13. Incidents", "## 13. Accidents")),
        ("form.chapters", replace_text("## 13. Incidents", "## 12. Incidents")),
        ("form.clause", replace_text("{#GOV-INC-01}", "{#GOV-INC-02}")),
        ("form.clause", replace_text(
            "INC-01 Telling {#GOV-INC-01}", "PUR-01 Telling {#GOV-PUR-01}")),
        ("annex.roster", replace_text("sv-hpc-1", "sv-hpc-2")),
        ("annex.roster", replace_document(
            "members.json", Members, {"institutions.0.status": "left"})),
        ("annex.thresholds", replace_text("| 6 of 9 admins |", "| 5 of 9 admins |")),
        ("annex.thresholds", replace_policy({"governance.decisions.expel": 7})),
        ("people.threshold", replace_document("admins.json", Admins, {"threshold": 6})),
        ("people.threshold", replace_document("admins.json", Admins, {"min_countries": 3})),
        ("people.duties", replace_document(
            "admins.json", Admins, {"people.9.roles": ["admin", "auditor"]})),
        ("people.duties", replace_document(
            "admins.json", Admins, {"people.1.keyid": ADMINS.people[0].keyid})),
        ("people.duties", replace_document(
            "admins.json", Admins, {"people.1.institution": ADMINS.people[0].institution})),
        ("people.member", replace_document(
            "members.json", Members, {"institutions.0.status": "expelled"})),
        ("people.approvers", replace_policy({"code.allowed.0.approved_by": ["eve", "mallory"]})),
    ],
)  # fmt: skip
def test_a_drift_is_found(place, code, edit):
    assert codes(place) == set()
    edit(place)

    assert code in codes(place)


def test_a_term_that_ended_is_found(place):
    assert "people.term" in codes(place, now=NOW + timedelta(days=800))


def signed(**changes):
    seen = check_text(ROOT / "GOVERNANCE.md", now=NOW)
    from policies.governance import Signed

    values = {
        "policy": example(), "members": MEMBERS, "admins": ADMINS, "rules": ALL, "now": NOW,
        "cedar": frozenset(m.what for c in seen.charter.clauses for m in c.means
                           if m.kind == "cedar"),
        "exists": lambda path, name: True,
    }  # fmt: skip
    return Signed(**values | changes)


def found(**changes):
    return {item.code for item in check_charter(parse_charter(TEXT), signed(**changes))}


def test_drifts_of_a_repository_are_found():
    soon, later = NOW + timedelta(days=13), NOW + timedelta(days=15)

    assert found(threshold=5, keys=9, expires={"root": later, "timestamp": soon}) == set()
    assert found(expires={"root": soon}) == {"repository.expires"}
    assert found(threshold=4, keys=9) == {"repository.threshold"}
    assert found(text_digest="1" * 64, own_digest="2" * 64) == {"repository.text"}
    never = Override.from_bytes(
        canonical_bytes(
            {"schema": "minga.override/1", "federation": "demo", "plan": "0" * 64,
             "rule": "residency", "code": "x", "granted_at": "2026-11-28T00:00:00Z",
             "expires": "2026-11-28T12:00:00Z"}
        )
    )  # fmt: skip
    assert found(overrides=[never]) == {"override.never"}


@pytest.mark.parametrize("language", ["es", "pt"])
def test_the_translations_are_whole_and_quote_alike(language):
    """The two that are shipped: every clause has words, and none of the English ones."""
    text = (ROOT / f"GOVERNANCE.{language}.md").read_text("utf-8")
    there, here = parse_charter(text), parse_charter(TEXT)
    assert [clause.id for clause in there.clauses] == [clause.id for clause in here.clauses]
    assert sorted(there.quotes) == sorted(here.quotes)
    assert len(there.chapters) == len(here.chapters)
    assert not set(there.chapters) & set(here.chapters)
    words = {clause.id: clause for clause in here.clauses}
    for clause in there.clauses:
        assert len(clause.text) > len(words[clause.id].text) / 2, clause.id
        assert clause.title not in (words[clause.id].title, "") or clause.id == "GOV-BOD-02"


def test_translations_have_the_same_clauses_and_values():
    charter = parse_charter(TEXT)
    same = parse_charter(TEXT)
    fewer = parse_charter(TEXT.replace("### GOV-INC-01 Telling", "### GOV-INC-09 Telling", 1)
                          .replace("{#GOV-INC-01}", "{#GOV-INC-09}", 1))  # fmt: skip
    other = parse_charter(TEXT.replace("{{policy:/governance/admins/n=9}}", "nine", 1))

    def found_in(translation):
        findings = check_charter(charter, signed(), {"GOVERNANCE.es.md": translation})
        return {item.code for item in findings}

    assert found_in(same) == set()
    assert found_in(fewer) == {"translation.clauses"}
    assert found_in(other) == {"translation.quotes"}


# -- parts -----------------------------------------------------------------------------------------


def test_coverage_counts_what_stands_there():
    text = """---
minga-governance: 1
policy_version: 1
---
## 1. Purpose
### GOV-AAA-01 One {#GOV-AAA-01}
> enforced-by: test:a::b; nothing yet (more)
### GOV-AAA-02 Two {#GOV-AAA-02}
> enforced-by: human (us)
### GOV-AAA-03 Three {#GOV-AAA-03}
> enforced-by: policy:/x=1; nothing yet (all of it)
"""
    counted = coverage(parse_charter(text))

    assert (counted.clauses, counted.machine, counted.human_only, counted.nothing_yet) == (
        3,
        1,
        1,
        2,
    )
    assert str(counted).startswith("1 of 3 clauses (33 %)")


def test_pointers():
    value = {"a": [{"b/c": 1}], "d": [1, 2], "e": {}}

    assert at_pointer(value, "/a/0/b~1c") == 1
    assert list(end_values(value)) == ["/a/0/b/c", "/d", "/e"]
    for pointer in ("/x", "/a/1", "/a/b", "/a/0/b~1c/d"):
        with pytest.raises(LookupError):
            at_pointer(value, pointer)


def test_the_annexes_are_written_anew():
    stale = TEXT.replace("sv-hpc-1", "sv-hpc-9").replace("6 of 9 admins", "5 of 9 admins")

    assert with_annexes(stale, MEMBERS, example()) == TEXT
    assert "33 active" not in roster_text(MEMBERS)[:40]
    assert "33 active members in 15 countries" in roster_text(MEMBERS)
    assert "| expel a member, after it was heard | 6 of 9 admins |" in thresholds_text(example())


def test_every_rule_in_the_list_is_applied_and_every_rule_applied_is_in_the_list():
    """The list that the charter may cite is the code's own."""
    sources = [
        ROOT / "policies" / name
        for name in (
            "plan_terms.py",
            "site_check.py",
            "site.py",
            "overrides.py",
            "changes.py",
            "consortium.py",
            "agreement.py",
            "bodies.py",
            "deciding.py",
            "releases.py",
        )
    ]
    sources += [ROOT / "node_agent" / name for name in ("governed.py", "governance.py")]
    text = "\n".join(path.read_text("utf-8") for path in sources)
    quoted = set(re.findall(r'"((?:[a-z]+)\.[a-z_]+|residency)"', text))
    said = set(re.findall(r'(?:Why|refused|Refusal)\(\s*"([a-z_.]+)"', text))

    assert quoted >= ALL, ALL - quoted
    assert said - ALL <= {"trust.emergency", "trust.bootstrap", "policy.unreadable"}
    assert len(said & ALL) > 40  # else nothing was looked at
