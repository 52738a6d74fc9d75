"""Identifiers, canonical bytes, errors, plans: what enters is read once and strictly."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import errors
from protocols.canonical import canonical_bytes, hash_fields, parse_canonical, parse_json
from protocols.errors import (
    EXIT_STATUS,
    FederationError,
    IntegrityError,
    MalformedMessageError,
    NotReadyError,
    OffsetError,
    PlanRefusedError,
    RefusedError,
    error_details,
    error_from_code,
    exit_status,
    grpc_status_name,
)
from protocols.identifiers import RoundId, parse_digest, parse_node_id
from protocols.plan import Plan
from protocols.tlog.merkle import leaf_hash, node_hash, tree_root
from tests.support.plans import plan_value

# -- identifiers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "-a", "a-", "A", "ñ", "a_b", "a/b", "..", "a b", "a" * 49, "a\n", None, 7, b"a"],
)
def test_a_name_that_is_none_is_refused(text):
    with pytest.raises(MalformedMessageError):
        parse_node_id(text)


@pytest.mark.parametrize("text", ["a", "ar-univ-1", "0", "a" * 48])
def test_a_name_is_read_as_it_is(text):
    assert parse_node_id(text) == text


@pytest.mark.parametrize(
    "text", ["a", "a/", "/1", "a/01", "a/-1", "a/1/2", "a/1000000", "a/١", "a/1 ", "a/+1"]
)
def test_a_round_that_is_none_is_refused(text):
    with pytest.raises(MalformedMessageError):
        RoundId.parse(text)


@given(st.integers(0, 999_999))
def test_a_round_reads_what_it_prints(number):
    assert str(RoundId.parse(f"andes-7/{number}")) == f"andes-7/{number}"


@pytest.mark.parametrize("text", ["0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 63 + "\n"])
def test_a_digest_that_is_none_is_refused(text):
    with pytest.raises(MalformedMessageError):
        parse_digest(text)


# -- canonical bytes ---------------------------------------------------------------------------


def test_canonical_json_matches_the_example_of_rfc_8785():
    value = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": '€$\u000f\nA\'B"\\\\"/',
        "literals": [None, True, False],
    }
    expected = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert canonical_bytes(value) == expected.encode()


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":1}',  # a key twice
        b'{"b":1,"a":1}',  # not sorted
        b'{"a": 1}',  # a space
        b'{"a":1.0}',  # not the shortest number
        b"[NaN]",
        b"[Infinity]",
        b"\xff",
        b"",
        b"[" * 100_000,
        b'"\\ud800"',  # a lone surrogate
        b"9007199254740993",  # beyond 2**53: another number to other readers
    ],
)
def test_bytes_that_are_not_canonical_are_refused(data):
    with pytest.raises(MalformedMessageError):
        parse_canonical(data)


def test_a_document_beyond_the_limit_is_not_even_parsed():
    with pytest.raises(MalformedMessageError, match="at most 10"):
        parse_json(b'"aaaaaaaaaaaa"', limit=10)


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_different_fields_never_share_a_hash(left, right):
    same = hash_fields("t", *left) == hash_fields("t", *right)
    assert same == (left == right)


def test_the_framing_is_what_keeps_fields_apart():
    """Plain concatenation, the mistake this guards against, does collide."""
    assert hashlib.sha256(b"ab" + b"c").digest() == hashlib.sha256(b"a" + b"bc").digest()
    assert hash_fields("t", b"ab", b"c") != hash_fields("t", b"a", b"bc")
    assert hash_fields("t", b"a") != hash_fields("u", b"a")


def test_hash_fields_golden():
    framed = b"\x00\x00\x00\x07minga/x" + (2).to_bytes(8, "big") + b"hi"
    assert hash_fields("minga/x", b"hi") == hashlib.sha256(framed).digest()


# -- Merkle tree -------------------------------------------------------------------------------

# RFC 6962 test inputs of the reference implementation (certificate-transparency, merkletree tests)
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("size", range(9))
def test_the_tree_has_the_roots_of_the_reference(size):
    assert tree_root([leaf_hash(leaf) for leaf in LEAVES[:size]]).hex() == ROOTS[size]


def recursive_root(leaves):
    """RFC 6962 section 2.1 as it is written there."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return node_hash(recursive_root(leaves[:k]), recursive_root(leaves[k:]))


@given(st.integers(0, 70))
def test_the_tree_equals_its_definition(size):
    leaves = [leaf_hash(bytes([i])) for i in range(size)]
    assert tree_root(leaves) == recursive_root(leaves)


# -- errors ------------------------------------------------------------------------------------


def every_error():
    waiting, found = [FederationError], []
    while waiting:
        cls = waiting.pop()
        found.append(cls)
        waiting.extend(c for c in cls.__subclasses__() if c.__module__ == errors.__name__)
    return sorted(found, key=lambda cls: cls.__name__)


def example(cls):
    if issubclass(cls, PlanRefusedError):
        return cls("no", rule="site.hours")
    if issubclass(cls, OffsetError):
        return cls("no", expected=77)
    return cls("no")


def test_every_code_is_its_own():
    codes = [cls.code for cls in every_error()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", every_error())
def test_an_error_survives_the_wire(cls):
    error = example(cls)
    back = error_from_code(error.code, str(error), error_details(error))
    if cls is FederationError:
        assert isinstance(back, FederationError)
    else:
        assert type(back) is cls
        assert error_details(back) == error_details(error)


@pytest.mark.parametrize(
    ("cls", "status", "grpc"),
    [
        (RefusedError, 3, "FAILED_PRECONDITION"),
        (MalformedMessageError, 3, "INVALID_ARGUMENT"),
        (NotReadyError, 4, "UNAVAILABLE"),
        (OffsetError, 4, "OUT_OF_RANGE"),
        (IntegrityError, 5, "DATA_LOSS"),
    ],
)
def test_a_family_decides_the_statuses(cls, status, grpc):
    assert (exit_status(example(cls)), grpc_status_name(example(cls))) == (status, grpc)
    assert set(EXIT_STATUS.values()) == {3, 4, 5}


def test_hostile_details_do_not_break_the_receiver():
    assert error_from_code("wrong_offset", "x", {"expected": "-1"}).expected == 0
    assert error_from_code("storage_full", "x", {"retry_after_s": "nan"}).retry_after_s <= 60
    assert error_from_code("storage_full", "x", {"retry_after_s": "1e99"}).retry_after_s == 60
    assert isinstance(error_from_code("from the future", "x", {}), RefusedError)


# -- plans -------------------------------------------------------------------------------------


def test_a_plan_reads_what_it_writes():
    plan = Plan.from_value(plan_value())
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert Plan.from_bytes(plan.to_bytes()).digest == plan.digest


def test_every_field_of_a_plan_is_in_its_digest():
    """Change each leaf of the document: the digest must change with it, or be refused."""
    plan = Plan.from_value(plan_value())
    document = json.loads(plan.to_bytes())
    changed = 0

    def leaves(value, path=()):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from leaves(item, (*path, key))
        else:
            yield path, value

    for path, value in list(leaves(document)):
        copy = json.loads(plan.to_bytes())
        spot = copy
        for key in path[:-1]:
            spot = spot[key]
        match value:
            case bool():
                spot[path[-1]] = not value
            case int() | float():
                spot[path[-1]] = value + 1
            case str() if len(value) == 64:
                spot[path[-1]] = "f" * 64
            case _:
                continue
        try:
            assert Plan.from_value(copy).digest != plan.digest, path
            changed += 1
        except MalformedMessageError:
            continue
    assert changed > 15


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"roster": ["b", "a"]}, "ascending"),
        ({"roster": ["a", "a"]}, "ascending"),
        ({"roster": []}, "roster"),
        ({"roster": ["../etc"]}, "roster"),
        ({"min_participants": 4}, "more than the roster"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": "3"}, "rounds"),
        ({"surprise": 1}, "surprise"),
        ({"mode": "aggregate-only"}, "secagg"),
        ({"schema": "minga.plan/2"}, "schema"),
        ({"vector": {"ring_bits": 18}}, "ring_bits"),
        ({"local_step": {"kind": "flower"}}, "app"),
        ({"local_step": {"kind": "builtin"}}, "max_steps"),
        ({"local_step": {"kind": "builtin", "max_steps": 1, "lr": float("nan")}}, "lr"),
        ({"outer": {"optimizer": "average", "momentum": 0.5}}, "momentum"),
        ({"evaluation": {"languages": ["pt", "es"]}}, "ascending"),
        ({"trainable": []}, "trainable"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_field(change, says):
    with pytest.raises(MalformedMessageError, match=says):
        Plan.from_value(plan_value() | change)


def test_a_secure_plan_must_withstand_its_colluders():
    secure = {"mode": "aggregate-only", "min_participants": 3}
    keys = {name: digit * 64 for name, digit in (("a", "1"), ("b", "2"), ("c", "3"))}
    good = {"threshold": 3, "colluders": 1, "min_surviving": 3, "keys": keys}
    assert Plan.from_value(plan_value() | secure | {"secagg": good}).secagg is not None
    with pytest.raises(MalformedMessageError, match="withstand"):
        Plan.from_value(plan_value() | secure | {"secagg": good | {"threshold": 2}})
    for few in (2, 4):  # hides nobody; more than the roster has
        with pytest.raises(MalformedMessageError, match=f"min_surviving={few} must be from"):
            Plan.from_value(plan_value() | secure | {"secagg": good | {"min_surviving": few}})
    for wrong in ({}, keys | {"z": "4" * 64}, keys | {"c": "1" * 64}, keys | {"c": "G" * 64}):
        with pytest.raises(MalformedMessageError, match="keys"):
            Plan.from_value(plan_value() | secure | {"secagg": good | {"keys": wrong}})


def test_the_last_round_only_evaluates():
    plan = Plan.from_value(plan_value() | {"rounds": 3, "evaluation": {"languages": ["es"]}})
    assert [plan.selection_in(i) for i in range(plan.total_rounds)] == ["all"] * 3 + ["none"]
    assert all(plan.evaluates_in(i) for i in range(4))
