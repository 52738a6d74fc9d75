"""Decisions, and the consortium policy: read strictly, said in words, changed by enough."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest

from policies.changes import Kind, check_successor, describe_change, render_policy
from policies.consortium import ConsortiumPolicy, never_overridable, within
from policies.decision import Allowed, Refused, Why, all_of, from_whys, refused
from policies.policy_words import WORDS, leaves, spoken
from protocols.canonical import canonical_bytes
from protocols.errors import MalformedMessageError
from tests.support.policies import EXAMPLE, changed_value, example, policy

NO = refused("a.b", "because")
YES = Allowed(("fed.join",))


# -- decisions -------------------------------------------------------------------------------------


def test_all_of_nothing_is_refused():
    assert all_of([]).rules == ("decision.nothing_checked",)


def test_all_of_needs_every_yes_and_names_every_no():
    assert all_of([YES, Allowed()]) == YES
    assert all_of([YES, NO, refused("c.d", "too"), NO]).rules == ("a.b", "c.d")
    assert not all_of([NO])
    assert from_whys([]) == Allowed()
    assert from_whys([Why("x.y", "z")]) == refused("x.y", "z")


@pytest.mark.parametrize(("rule", "reason"), [("", "x"), ("A.b", "x"), ("a..b", "x"), ("a.b", " ")])
def test_a_refusal_has_a_rule_and_a_reason(rule, reason):
    with pytest.raises(ValueError):
        Why(rule, reason)


def test_a_refusal_of_nothing_cannot_be_made():
    with pytest.raises(ValueError, match="names its rule"):
        Refused(())


# -- the document ----------------------------------------------------------------------------------


def test_the_example_is_canonical_and_its_digest_is_the_hash_of_the_file():
    data = EXAMPLE.read_bytes()

    assert example().to_bytes() == data
    assert example().digest == hashlib.sha256(data).hexdigest()


def required_paths():
    """Every object key of the document, at every depth."""

    def walk(value, path):
        for key, inner in value.items():
            where = f"{path}.{key}" if path else key
            yield where
            if isinstance(inner, dict) and key != "per_language_min_micro":
                yield from walk(inner, where)

    return list(walk(example().to_value(), ""))


@pytest.mark.parametrize("path", required_paths())
def test_a_missing_section_or_field_is_an_error_and_never_no_limit(path):
    with pytest.raises(MalformedMessageError, match="policy: "):
        policy({path: "-"})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"extra": 1}, "extra"),
        ({"secagg.requires": True}, "secagg.requires"),
        ({"participation.min_participants": 8.0}, None),  # canonical JSON writes it as 8
        ({"participation.min_participants": 8.5}, "min_participants"),
        ({"participation.min_participants": "8"}, "min_participants"),
        ({"participation.min_participants": True}, "min_participants"),
        ({"participation.min_participants": -1}, "min_participants"),
        ({"resources.energy_wh_round": 2**40 + 1}, "energy_wh_round"),
        ({"privacy.eps_round_max_micro": 2**53 - 1}, "eps_round_max_micro"),
        ({"privacy.delta_max": 1e-8}, "delta_max"),
        ({"privacy.delta_max": "1"}, "delta_max"),
        ({"privacy.on_exhausted": "allow"}, "on_exhausted"),
        ({"privacy.modes": []}, "modes"),
        ({"privacy.modes": ["secret"]}, "modes"),
        ({"valid_from": "2026-13-01T00:00:00Z"}, "valid_from"),
        ({"valid_from": "2026-12-01"}, "valid_from"),
        ({"expires": "2026-11-01T00:00:00Z"}, "expires is not after"),
        ({"rounds.hours_utc": []}, "hours_utc"),
        ({"rounds.hours_utc": [["20:00", "25:00"]]}, "hours_utc"),
        ({"governance.admins.threshold": 4}, "no majority"),
        ({"governance.admins.n": 2}, "admins.n"),
        ({"governance.admins.max_keys_per_institution": 2}, "max_keys_per_institution"),
        ({"governance.decisions.amendment": 4}, "decisions.amendment=4"),
        ({"governance.decisions.expel": 10}, "decisions.expel=10"),
        ({"governance.override.never": ["residency", "secagg.required"]}, "privacy.budget"),
        ({"governance.override.threshold": 2}, "override.threshold"),
        ({"governance.emergency.threshold": 1}, "emergency.threshold"),
        ({"log.witness.quorum": 4}, "quorum is no majority"),
        ({"secagg.threshold": [1, 2]}, "above one half"),
        ({"secagg.min_surviving": 9}, "min_surviving"),
        ({"data.licences_denied": ["MIT"]}, "MIT is allowed and denied"),
        ({"code.allowed.0.image": "sha256:AB"}, "image"),
        ({"jurisdictions.blocked": ["Chile"]}, "blocked"),
        ({"schema": "minga.policy/2"}, "schema"),
    ],
)
def test_what_is_not_a_policy(changes, names):
    if names is None:
        assert policy(changes) == example()
        return
    with pytest.raises(MalformedMessageError) as caught:
        policy(changes)
    assert names in str(caught.value)


def test_entries_are_named_once():
    for path in ("models.bases", "code.allowed", "gates", "privacy.budgets.overrides"):
        value = example().to_value()
        at = value
        for name in path.split("."):
            at = at[name]
        at.append(at[0])
        with pytest.raises(MalformedMessageError, match=r"twice"):
            ConsortiumPolicy.from_value(value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data + b"\n",
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: data.replace(b'"policy_version":7', b'"policy_version":7,"policy_version":7'),
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"[]",
        lambda data: b"null",
    ],
)
def test_bytes_with_a_second_spelling_are_refused(spoil):
    with pytest.raises(MalformedMessageError):
        ConsortiumPolicy.from_bytes(spoil(EXAMPLE.read_bytes()))


def test_a_policy_counts_between_its_dates():
    at = datetime(2026, 11, 1, tzinfo=UTC)

    assert example().in_force(at)
    assert example().in_force(at - timedelta(seconds=1)).rules == ("policy.not_yet",)
    assert example().in_force(datetime(2027, 3, 1, tzinfo=UTC)).rules == ("policy.expired",)


@pytest.mark.parametrize(
    ("minute", "start", "end", "is_in"),
    [
        (0, "00:00", "24:00", True),
        (1439, "00:00", "24:00", True),
        (419, "20:00", "07:00", True),
        (420, "20:00", "07:00", False),
        (1199, "20:00", "07:00", False),
        (1200, "20:00", "07:00", True),
        (0, "20:00", "24:00", False),
        (600, "10:00", "10:00", False),
    ],
)
def test_hours(minute, start, end, is_in):
    assert within(minute, start, end) is is_in


def test_the_most_specific_budget_counts():
    one = {"institution": "pe-univ-1", "dataset_class": "sensitive", "eps_total_micro": 1}
    entry = {**one, "period": "P1Y"}
    before = example().to_value()["privacy"]["budgets"]["overrides"]
    budgets = policy({"privacy.budgets.overrides": [*before, entry]}).privacy.budgets

    assert budgets.epsilon_micro("pe-univ-1", "sensitive") == 1
    assert budgets.epsilon_micro("cl-univ-1", "sensitive") == 2_000_000
    assert budgets.epsilon_micro("cl-univ-1", "public") == 8_000_000


def test_licences_are_allowed_by_name():
    data = example().data

    assert data.takes_licence("CC-BY-4.0")
    assert not data.takes_licence("CC-BY-NC-4.0")
    assert not data.takes_licence("Apache-2.0")


# -- in words --------------------------------------------------------------------------------------


def test_every_value_has_words_and_every_word_a_value():
    assert {path for path, _ in leaves(example().to_value())} == set(WORDS)


def test_the_page_for_people_holds_every_value():
    page = render_policy(example())

    for path, value in leaves(example().to_value()):
        if path not in ("schema", "policy_version"):
            assert spoken(value, WORDS[path].unit) in page, path


@pytest.mark.parametrize(
    ("changes", "sentence", "kind", "signatures"),
    [
        ({}, None, None, 5),
        ({"expires": "2027-04-01T00:00:00Z"}, ("Day on which the policy expires: from"
         " 2027-03-01T00:00:00Z to 2027-04-01T00:00:00Z."), Kind.ROUTINE, 5),
        ({"participation.min_participants": 7}, ("Nodes in a round, at least: from 8 nodes to"
         " 7 nodes (looser)."), Kind.POLICY, 5),
        ({"participation.min_participants": 9}, ("Nodes in a round, at least: from 8 nodes to"
         " 9 nodes (stricter)."), Kind.POLICY, 5),
        ({"privacy.modes": ["record-local"]}, ("Privacy modes that are allowed: removes open,"
         " aggregate-only, record-distributed, institution (stricter)."), Kind.POLICY, 5),
        ({"privacy.eps_round_max_micro": 600_000}, ("Epsilon of one round, at most: from 0.5 to 0.6"
         " (looser)."), Kind.BUDGET_INCREASE, 6),
        ({"privacy.eps_round_max_micro": 400_000}, ("Epsilon of one round, at most: from 0.5 to 0.4"
         " (stricter)."), Kind.POLICY, 5),
        ({"privacy.delta_max": "1e-7"}, "Delta, at most: from 1e-8 to 1e-7.",
         Kind.BUDGET_INCREASE, 6),
        ({"privacy.delta_max": "0.000000001"}, "Delta, at most: from 1e-8 to 0.000000001.",
         Kind.POLICY, 5),
        ({"code.allowed": []}, "An approved code is removed: ", Kind.CODE, 5),
        ({"governance.override.ttl_hours": 48}, ("Duration of an override: from 24 hours to"
         " 48 hours (looser)."), Kind.AMENDMENT, 7),
        ({"governance.override.never": ["privacy.budget", "residency", "rounds.hours",
         "secagg.required"]}, "Rules that nobody may override: adds rounds.hours (stricter).",
         Kind.AMENDMENT, 7),
        ({"federation": "other"}, "Name of the federation: from demo to other.",
         Kind.UNCLASSIFIED, 7),
        ({"rounds.hours_utc": [["20:00", "06:00"]]}, ("Hours (UTC) in which rounds begin: from"
         " 00:00-24:00 to 20:00-06:00."), Kind.POLICY, 5),
    ],
)  # fmt: skip
def test_a_change_is_a_sentence_a_kind_and_a_number(changes, sentence, kind, signatures):
    change = describe_change(example(), policy(changes))

    assert change.signatures == signatures
    if sentence is None:
        assert change.edits == ()
        return
    (edit,) = change.edits
    assert edit.sentence.startswith(sentence)
    assert edit.kind is kind


def test_a_document_cannot_lower_the_bar_for_itself():
    """The majority is that of the policy in force, and the strictest change counts."""
    easy = {"governance.decisions.amendment": 5, "participation.min_participants": 3,
            "secagg.min_surviving": 3}  # fmt: skip
    change = describe_change(example(), policy(easy))

    assert change.signatures == 7
    assert change.notice_days == 14


def test_a_larger_budget_asks_whom_it_concerns():
    entry = {
        "institution": "pe-univ-1",
        "dataset_class": "x",
        "eps_total_micro": 9,
        "period": "P1Y",
    }
    old = policy({"privacy.budgets.overrides": [entry]})
    new = policy({"privacy.budgets.overrides": [{**entry, "eps_total_micro": 10}]})

    assert describe_change(old, new).consents == ("pe-univ-1",)
    assert describe_change(example(), old).consents == ("*", "pe-univ-1")
    assert describe_change(old, policy({"privacy.budgets.overrides": []})).consents == (
        "pe-univ-1",
    )


def test_the_first_policy_says_so():
    first = describe_change(None, example())

    assert first.signatures == 5
    assert first.sentences == ("This is the first policy of federation demo.",)


def test_a_path_that_nobody_classified_needs_the_most():
    """Every path has a kind by now; a new section without one falls to the strictest."""
    from policies.changes import _kind

    kinds = {path: _kind(path, 0, 0) for path in WORDS if not path.startswith("privacy.")}

    assert [path for path, kind in kinds.items() if kind is Kind.UNCLASSIFIED] == [
        "schema",
        "federation",
    ]
    assert _kind("brand.new", 1, 2) is Kind.UNCLASSIFIED


def test_what_may_follow_a_policy():
    good = policy({"policy_version": 8})

    assert check_successor(example(), good)
    assert check_successor(example(), example()).rules == ("policy.version",)
    assert check_successor(example(), policy({"policy_version": 9})).rules == ("policy.version",)
    other = policy({"policy_version": 8, "federation": "other"})
    assert check_successor(example(), other).rules == ("policy.federation",)
    early = policy({"policy_version": 8, "valid_from": "2026-10-01T00:00:00Z"})
    assert check_successor(example(), early).rules == ("policy.version",)


def test_the_three_that_nobody_may_override_are_in_every_policy():
    assert never_overridable(example()) >= {"privacy.budget", "residency", "secagg.required"}


def test_canonical_bytes_are_those_of_the_value():
    assert canonical_bytes(changed_value({})) == EXAMPLE.read_bytes()
