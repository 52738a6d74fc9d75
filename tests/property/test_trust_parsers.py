"""Every parser of governance documents from outside: whatever comes, it is read or refused.

Refused means one of our errors with a sentence; anything else would be a way to stop a node or a
coordinator. Mutations start from real files, so that the deep checks are reached.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.admin.keys import Card
from infra.admin.proposals import propose_policy
from policies.effect import POLICY_DOCUMENT
from policies.trust import compare_documents
from protocols.enrolment import Invitation
from protocols.errors import FederationError
from protocols.governance.approval import Approval, Statement
from protocols.governance.documents import Admins, Emergency, Members
from protocols.governance.keys import parse_key
from protocols.governance.repository import MemoryFiles, verify_repository
from protocols.governance.requests import Signatures, SigningRequest, open_request
from tests.support.trust import NOW, World, card, institution

WORLD = World()
WORLD.found()
REQUEST = propose_policy(WORLD.base(), {POLICY_DOCUMENT: WORLD.policy(policy_version=8)})
METADATA = sorted(
    name for name in WORLD.files if name.startswith("metadata/") and "1.timestamp" not in name
)

WORDS = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


def spots(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [way] if way else []
    if isinstance(value, dict):
        for key in value:
            found += spots(value[key], (*way, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            found += spots(value[index], (*way, index))
    return found


def put(value: Any, way: tuple[Any, ...], new: Any) -> None:
    for step in way[:-1]:
        value = value[step]
    value[way[-1]] = new


@st.composite
def mutated(draw: Any, text: str) -> bytes:
    """Real bytes with one value replaced, or one byte changed."""
    if draw(st.booleans()):
        data = bytearray(text.encode())
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    value = json.loads(text)
    put(value, draw(st.sampled_from(spots(value))), draw(JSON))
    return json.dumps(value).encode()


SEEDS: dict[str, tuple[Any, str]] = {
    "members": (Members.from_bytes, WORLD.members().to_bytes().decode()),
    "admins": (Admins.from_bytes, WORLD.state.admins.to_bytes().decode()),
    "card": (
        lambda data: Card.from_bytes(data).public,
        card("ana", "ar-1", "AR").to_bytes().decode(),
    ),
    "request": (SigningRequest.read, REQUEST.to_bytes().decode()),
}  # fmt: skip
OTHERS = [Members, Admins, Emergency, Card, Approval, Statement, Signatures, SigningRequest]


def read(parse: Any, data: bytes) -> None:
    with suppress(FederationError):
        parse(data)


@pytest.mark.parametrize("name", sorted(SEEDS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_documents_are_read_or_refused(name, data):
    parse, text = SEEDS[name]
    read(parse, data.draw(mutated(text)))


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_is_read_or_refused(kind, data):
    read(kind.from_bytes, data)


@settings(max_examples=60, deadline=None)
@given(value=JSON)
def test_keys_are_read_or_refused(value):
    read(parse_key, value)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80) | st.binary(max_size=60).map(lambda data: f"minga1.a.{data!r}"))
def test_invitations_are_read_or_refused(text):
    read(Invitation.parse, text)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_repository_with_one_change_is_refused_or_the_same(data):
    """No single change of any metadata file puts something else in force."""
    name = data.draw(st.sampled_from(METADATA))
    changed = data.draw(mutated(WORLD.files[name].decode()))
    files = {**WORLD.files, name: changed}
    try:
        state = verify_repository(
            MemoryFiles(files), trusted_root=files["metadata/1.root.json"], now=NOW
        )
    except FederationError:
        return
    assert state.documents == WORLD.state.documents  # another spelling of the same
    assert state.charter.holders == WORLD.state.charter.holders


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_request_with_one_change_is_opened_or_refused(data):
    changed = data.draw(mutated(REQUEST.to_bytes().decode()))
    with suppress(FederationError):
        open_request(SigningRequest.read(changed), trusted_root=None, now=NOW)


def test_the_oracle_convicts():
    """A parser that lets another error out would be seen above."""
    with pytest.raises(ValueError, match="boom"):
        read(lambda _: (_ for _ in ()).throw(ValueError("boom")), b"")
    assert compare_documents({}, {}, {}, {}) == []
    assert institution("a", "AR").status == "active"
