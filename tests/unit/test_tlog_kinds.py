"""The fields of each kind of leaf: one model a kind, nothing unknown, nothing missing."""

from __future__ import annotations

import pytest

from protocols.errors import MalformedMessageError
from protocols.tlog.kinds import (
    MODELS,
    RoundPlan,
    RunRequest,
    parse_round_subject,
    predicate_of,
    read_predicate,
    round_subject,
)
from protocols.tlog.leaf import KINDS
from tests.support.leaves import D, World, key_hex


def test_every_kind_has_its_model_and_says_who_signs():
    assert MODELS.keys() == KINDS
    assert all(model.SIGNERS for model in MODELS.values())


def test_what_is_written_is_read_back():
    world = World().begin().round()
    kinds = [taken.said.KIND for taken in _taken(world)]
    assert {"log.genesis", "enrol.request", "cert.issued", "round.closed"} <= set(kinds)
    for taken in _taken(world):
        assert read_predicate(taken.said.KIND, taken.statement.fields) == taken.said
        assert predicate_of(taken.statement) == taken.said


def _taken(world):
    from policies.audit.replay import Replay

    state = Replay()
    return [state.take(entry) for entry in world.entries]


PLAN = World().plan().to_fields()
JOIN = World().join("ar-univ-1").to_fields()


@pytest.mark.parametrize(
    ("why", "kind", "fields"),
    [
        ("unknown kind", "round.party", {}),
        ("unknown field", "round.join", {**JOIN, "note": "x"}),
        ("missing field", "round.join", {k: v for k, v in JOIN.items() if k != "node"}),
        ("a float", "round.plan", {**PLAN, "index": 1.5}),
        ("a number as text", "round.plan", {**PLAN, "index": "1"}),
        ("true for 1", "round.plan", {**PLAN, "index": True}),
        ("not a digest", "round.join", {**JOIN, "model_in": "A" * 64}),
        ("not a node", "round.join", {**JOIN, "node": "Big One"}),
        ("no rule", "round.decline", {**JOIN, "rules": []}),
        ("prose for a rule", "round.decline", {**JOIN, "rules": ["we would rather not"]}),
        ("secagg in mode open", "round.plan", {**PLAN, "mode": "open"}),
        ("request without its hash", "round.plan", {**PLAN, "request_sha256": None}),
        ("another request's hash", "round.plan", {**PLAN, "request_sha256": D["a"]}),
        (
            "nodes out of order",
            "round.start",
            {"attempt": 1, "ready": ["b", "a"], "ctx_deal": None},
        ),
        ("attempt 0", "round.start", {"attempt": 0, "ready": ["a"], "ctx_deal": None}),
        ("a private key as a vkey", "log.closed", {"next_vkey": "PRIVATE+KEY+x", "reason": "end"}),
    ],
)
def test_refused(why, kind, fields):
    with pytest.raises(MalformedMessageError):
        read_predicate(kind, fields)


def test_subjects_of_rounds():
    federation, round_ = parse_round_subject("fed/andes/r1/round/42")
    assert round_subject(federation, round_) == "fed/andes/r1/round/42"
    for text in ("fed/andes/r1/round/042", "fed/andes/r1/42", "fed/andes/r1/round/42/x"):
        with pytest.raises(MalformedMessageError):
            parse_round_subject(text)


def test_a_plan_leaf_must_be_about_its_own_plan_and_round():
    world = World()
    fields = RoundPlan(**PLAN_ARGS(world)).to_fields()
    good = world.statement("x", "round.plan", fields, **world.subject())
    predicate_of(good)
    for about in (world.subject(1), {**world.subject(), "digest": D["a"]}):
        with pytest.raises(MalformedMessageError):
            predicate_of(world.statement("x", "round.plan", fields, **about))


def PLAN_ARGS(world):
    return dict(world.plan().__iter__())


def test_a_run_request_has_one_spelling():
    body = World().request().body.encode()
    assert RunRequest.from_bytes(body).to_bytes() == body
    for other in (body + b"\n", body.replace(b":", b": ", 1), b"{}"):
        with pytest.raises(MalformedMessageError):
            RunRequest.from_bytes(other)


def test_keys_are_public_ones():
    assert len(key_hex("coordinator")) == 64
