"""The rule engine behind its door: 24 known answers, and every trap turned into a no.

``data/cedar_cases.json`` holds a schema, two files and 24 requests whose answers were taken from
the engine itself; ``effective`` is what Minga must answer. The same requests, with the policy's
numbers as context, must get the same answers from the rules that are shipped.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cedar import consortium_text, schema_text
from policies.cedar.engine import RuleSet, _out_of_bounds, interpret, read_rules
from policies.decision import Allowed, Refused
from protocols.errors import MalformedMessageError

ORACLE = json.loads((Path(__file__).parent / "data" / "cedar_cases.json").read_text("utf-8"))
CASES = ORACLE["cases"]
NAMES = [case["name"] for case in CASES]
THE_RULES = RuleSet.load(
    schema=ORACLE["schema"], consortium=ORACLE["consortium"], site=ORACLE["site"]
)
SHIPPED = RuleSet.load(schema=schema_text(), consortium=consortium_text(), site=ORACLE["site"])
HUGE = 4611686018427387904


def request_of(case, *, shipped=False):
    """The baseline with a case's changes: (request, entities)."""
    request = deepcopy(ORACLE["baseline_request"])
    entities = {item["uid"]["id"]: item for item in deepcopy(ORACLE["baseline_entities"])}
    patch = case["patch"]
    entities["mx-univ-1"]["attrs"] |= patch.get("institution", {})
    entities["r42"]["attrs"] |= patch.get("plan", {})
    entities["mx-univ-1/d1"]["attrs"] |= patch.get("dataset", {})
    request["context"] |= patch.get("context", {})
    for name in patch.get("drop_context", ()):
        del request["context"][name]
    if "person" in patch:
        roles = [{"__entity": {"type": "Minga::Role", "id": r}} for r in patch["person"]["roles"]]
        inst = {"type": "Minga::Institution", "id": "mx-univ-1"}
        entities["k1"] = {
            "uid": {"type": "Minga::Person", "id": "k1"},
            "attrs": {"roles": roles, "assurance": patch["person"]["assurance"],
                      "institution": {"__entity": inst}},
            "parents": [inst],
        }  # fmt: skip
        request = {
            "principal": 'Minga::Person::"k1"',
            "action": f'Minga::Action::"{patch["action"]}"',
            "resource": 'Minga::Federation::"demo"',
            "context": {},
        }
    if shipped:
        more = {"run": "r42", "mode": "record-local", "rosterSize": 9, "localSteps": 100,
                "energyWh": 100, "use": "research"}  # fmt: skip
        entities["r42"]["attrs"] = more | entities["r42"]["attrs"]
        data = {"datasetClass": "sensitive", "jurisdiction": "MX", "legalBasis": "consent",
                "indigenous": False}  # fmt: skip
        entities["mx-univ-1/d1"]["attrs"] = data | entities["mx-univ-1/d1"]["attrs"]
        if "person" not in patch:
            limits = {"minParticipants": 5, "secaggRequired": True, "secaggNumerator": 2,
                      "secaggDenominator": 3, "epsRoundMaxMicro": 500000}  # fmt: skip
            request["context"] |= {
                "limits": limits, "weekday": 1, "termsMet": True, "overridden": [],
            }  # fmt: skip
    return request, list(entities.values())


def ids(decision):
    return list(decision.rules)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_24_known_answers(case):
    """What Minga answers; the ids are those of the files, not positions."""
    decision = THE_RULES.decide(*request_of(case))

    if not case["schema_given"]:
        return  # the next test: our door has no way to leave the schema out
    assert bool(decision) == (case["effective"] == "allow")
    if not case["errors"] and case["reasons"]:
        assert ids(decision) == case["reasons"]
    elif case["decision"] == "NoDecision":
        assert ids(decision) == ["cedar.not_evaluated"]
    elif case["errors"]:
        assert ids(decision) == ["cedar.out_of_bounds"]
    else:
        assert ids(decision) == ["fed.no_permit"]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_what_the_engine_itself_answers_and_how_it_is_read(case):
    """The engine's own answers, traps included: an Allow with an error is read as a no."""
    request, entities = request_of(case)
    keyed = THE_RULES._policies
    schema = ORACLE["schema"] if case["schema_given"] else None
    answer = cedarpy.is_authorized(request, keyed, entities, schema)

    assert answer.decision.value == case["decision"]
    assert len(answer.diagnostics.errors) == case["errors"]
    if case["decision"] != "NoDecision":
        assert sorted(answer.diagnostics.reasons) == case["reasons"]
    read = interpret(answer, THE_RULES.rules)
    assert bool(read) == (case["effective"] == "allow")


def test_the_traps_are_among_the_cases():
    """Else the rows above would show nothing: Allow with errors, with and without a schema."""
    traps = [case for case in CASES if case["decision"] == "Allow" and case["errors"]]

    assert {case["schema_given"] for case in traps} == {True, False}
    assert all(case["effective"] == "deny" for case in traps)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_shipped_rules_answer_alike(case):
    decision = SHIPPED.decide(*request_of(case, shipped=True))

    assert bool(decision) == (case["effective"] == "allow" and case["schema_given"])
    if case["schema_given"] and not case["errors"] and case["reasons"]:
        assert ids(decision) == case["reasons"]


def test_without_ids_the_reason_would_be_a_position():
    noon = next(case for case in CASES if case["name"] == "noon")
    text = ORACLE["consortium"] + ORACLE["site"]
    answer = cedarpy.is_authorized(*_request(noon), ORACLE["schema"])

    assert list(answer.diagnostics.reasons) == ORACLE["facts"]["reason_without_renaming_for_noon"]
    assert text.count("@id") == len(THE_RULES.rules)


def _request(case):
    request, entities = request_of(case)
    return request, ORACLE["consortium"] + ORACLE["site"], entities


def test_a_file_of_forbids_alone_permits_nothing():
    """Why both files are one set."""
    baseline = request_of(CASES[0])
    alone = cedarpy.is_authorized(baseline[0], ORACLE["site"], baseline[1], ORACLE["schema"])

    assert interpret(alone, {}).rules == ("fed.no_permit",)
    with pytest.raises(MalformedMessageError, match="nothing is permitted"):
        RuleSet.load(schema=schema_text(), consortium="")


FORBID = "forbid (principal, action, resource)"


@pytest.mark.parametrize(
    ("site", "says"),
    [
        (f'@id("site.a") permit{FORBID[6:]};', "a site can only forbid"),
        (f"{FORBID};", "no @id"),
        (f'@id("fed.a") {FORBID};', "the id of a rule here is site."),
        (f'@id("sitea") {FORBID};', "the id of a rule here is site."),
        (f'@id("site.") {FORBID};', "the id of a rule here is site."),
        (f'@id("site.A b") {FORBID};', "the id of a rule here is site."),
        (f'@id("site.a") {FORBID}; @id("site.a") {FORBID};', "two rules have the id site.a"),
        (f'@id("site.a") @id("site.b") {FORBID};', "duplicate annotation"),
        (f'@id("site.a") @hint("x") {FORBID};', "unknown annotation @hint"),
        (f'@id("site.a") @why("two\\nlines") {FORBID};', "@why is one line"),
        (f'@id("site.a") {FORBID} when {{ context.nope > 3 }};', "does not fit the schema"),
        (f'@id("site.a") {FORBID} when {{ principal.nope }};', "does not fit the schema"),
        ('@id("site.a") forbid (principal == ?principal, action, resource);', "templates"),
        ('@id("site.a") forbid (principal, action == Minga::Action::"fly", resource);', "fly"),
        ("this is not Cedar", "unexpected token"),
        (f'@id("site.a") {FORBID} when {{ {"(" * 5000}true{")" * 5000} }};', "nested too deeply"),
        (f'@id("site.a") {FORBID} when {{ {"if true then true else " * 500}true }};', "nested"),
        ("//" + "x" * 2**18, "larger than"),
    ],
)
def test_a_site_file_that_is_not_taken(site, says):
    with pytest.raises(MalformedMessageError, match="the site's rules") as caught:
        RuleSet.load(schema=schema_text(), consortium=consortium_text(), site=site)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_brackets_in_strings_and_comments_do_not_count_as_depth():
    many = "(" * 99
    text = f'// {many}\n@id("site.a") {FORBID} when {{ "{many}" == "" }};'

    assert len(read_rules(text, prefix="site.", schema=schema_text(), what="f")) == 1


def test_a_consortium_file_that_is_not_taken():
    with pytest.raises(MalformedMessageError, match=r"is fed\.…, not 'site.a'"):
        RuleSet.load(schema=schema_text(), consortium=f'@id("site.a") {FORBID};')
    with pytest.raises(MalformedMessageError, match="the schema"):
        RuleSet.load(schema="nonsense", consortium=consortium_text())
    same = f'@id("fed.join") {FORBID};'
    with pytest.raises(MalformedMessageError, match="two rules have the id fed"):
        RuleSet.load(schema=schema_text(), consortium=consortium_text() + same)


def test_every_rule_of_the_consortium_has_a_sentence():
    assert all(rule.why for name, rule in SHIPPED.rules.items() if name.startswith("fed."))


def test_a_refusal_carries_its_sentence():
    case = next(case for case in CASES if case["name"] == "institution suspended")

    assert str(SHIPPED.decide(*request_of(case, shipped=True))) == (
        "only active members take part [fed.member.active]"
    )


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"unknown": 1}, "cedar.not_evaluated"),
        ({"minuteLocal": "noon"}, "cedar.not_evaluated"),
        ({"minuteLocal": HUGE}, "cedar.out_of_bounds"),
        ({"minuteLocal": -1}, "cedar.out_of_bounds"),
        ({"minuteLocal": 1.0}, "cedar.out_of_bounds"),
        ({"termsMet": False}, "fed.join.terms"),
        ({"allowedBases": []}, "fed.join.base"),
    ],
)
def test_a_context_that_is_wrong(changes, rule):
    request, entities = request_of(CASES[0], shipped=True)
    request["context"] |= changes

    assert rule in SHIPPED.decide(request, entities).rules


def test_an_attribute_that_no_schema_knows_is_a_no():
    request, entities = request_of(CASES[0], shipped=True)
    next(e for e in entities if e["uid"]["id"] == "r42")["attrs"]["extra"] = 1

    assert SHIPPED.decide(request, entities).rules == ("cedar.not_evaluated",)


def test_a_condition_that_errors_is_a_no_and_not_a_skipped_rule():
    """Within all bounds a site's own arithmetic can still overflow: then the answer is no."""
    site = f'@id("site.sum") {FORBID} when {{ {HUGE} * 4 > 3 }};'
    rules = RuleSet.load(schema=schema_text(), consortium=consortium_text(), site=site)
    decision = rules.decide(*request_of(CASES[0], shipped=True))

    assert isinstance(decision, Refused)
    assert decision.rules == ("cedar.condition_error",)


@pytest.mark.parametrize(
    ("decision", "errors", "reasons", "rules"),
    [
        ("Allow", [], ["fed.join"], None),
        ("Allow", ["boom"], ["fed.join"], ("cedar.condition_error",)),
        ("Allow", [], [], ("cedar.condition_error",)),
        ("Deny", [], [], ("fed.no_permit",)),
        ("Deny", ["boom"], [], ("cedar.condition_error",)),
        ("Deny", ["boom"], ["fed.residency"], ("fed.residency", "cedar.condition_error")),
        ("NoDecision", [], [], ("cedar.not_evaluated",)),
        ("Perhaps", [], ["fed.join"], ("cedar.not_evaluated",)),
    ],
)
def test_how_an_answer_is_read(decision, errors, reasons, rules):
    answer = SimpleNamespace(
        decision=decision, diagnostics=SimpleNamespace(errors=errors, reasons=reasons)
    )
    read = interpret(answer, SHIPPED.rules)

    assert read == Allowed(("fed.join",)) if rules is None else read.rules == rules


def test_bounds_reach_every_corner_of_a_request():
    assert _out_of_bounds({"a": [{"b": 2**40}]}) == ""
    assert _out_of_bounds({"a": [{"b": 2**40 + 1}]})
    assert _out_of_bounds({"a": [True, None, "x"]}) == ""
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    assert _out_of_bounds(deep) == "the request is nested too deeply"


# -- a site can only narrow ------------------------------------------------------------------------

conditions = st.sampled_from(
    ["true", "false", "context.minuteLocal > 700", "resource.epsRoundMicro < 1",
     "principal.institution.country == \"MX\"", "context.termsMet", "!context.policyFresh",
     f"{HUGE} * 4 > 3"]
)  # fmt: skip
clauses = st.tuples(st.sampled_from(["when", "unless"]), conditions)
requests = st.fixed_dictionaries(
    {"minuteLocal": st.integers(0, 1439), "epsAfterMicro": st.integers(0, 9_000_000),
     "policyFresh": st.booleans(), "termsMet": st.booleans()}
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(clauses=st.lists(clauses, max_size=4), context=requests)
def test_a_site_rule_never_turns_a_no_into_a_yes(clauses, context):
    site = "".join(
        f'@id("site.r{number}") {FORBID} {word} {{ {condition} }};\n'
        if "context" not in condition
        and "resource" not in condition
        and "principal" not in condition
        else f'@id("site.r{number}") forbid (principal, action == Minga::Action::"joinRound",'
        f" resource is Minga::RoundPlan) {word} {{ {condition} }};\n"
        for number, (word, condition) in enumerate(clauses)
    )
    plain = RuleSet.load(schema=schema_text(), consortium=consortium_text())
    joined = RuleSet.load(schema=schema_text(), consortium=consortium_text(), site=site)
    request, entities = request_of(CASES[0], shipped=True)
    request["context"] |= context

    before, after = plain.decide(request, entities), joined.decide(request, entities)
    assert before or not after
    if not before and "cedar.condition_error" not in after.rules:
        assert set(before.rules) <= set(after.rules)


def test_such_a_rule_can_turn_a_yes_into_a_no():
    """The property above is about something: a yes is reachable, and a site takes it back."""
    request, entities = request_of(CASES[0], shipped=True)
    plain = RuleSet.load(schema=schema_text(), consortium=consortium_text())
    joined = RuleSet.load(
        schema=schema_text(), consortium=consortium_text(), site=f'@id("site.no") {FORBID};'
    )

    assert plain.decide(request, entities)
    assert joined.decide(request, entities).rules == ("site.no",)


WORDS = [
    '@id("site.a")',
    "forbid",
    "permit",
    "(",
    ")",
    "principal",
    "action",
    "resource",
    ",",
    ";",
    "when",
    "unless",
    "{",
    "}",
    "true",
    "if",
    "then",
    "else",
    "==",
    "&&",
    "context",
    ".",
    "minuteLocal",
    "<",
    "1",
    '"',
    "//",
]


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=200),
        st.lists(
            st.sampled_from(WORDS),
            max_size=40,
        ).map(" ".join),
    )
)  # fmt: skip
def test_any_text_is_a_file_of_rules_or_one_sentence(text):
    rules = parsed(text)
    if isinstance(rules, str):
        assert "\n" not in rules
    else:
        assert all(rule.effect == "forbid" and rule.id.startswith("site.") for rule in rules)


def parsed(text):
    """The rules of a site's file, or the sentence that says what is wrong with it."""
    try:
        return read_rules(text, prefix="site.", schema=schema_text(), what="policy.cedar")
    except MalformedMessageError as error:
        return str(error)
