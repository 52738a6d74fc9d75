"""Everything that members must agree on is in the context digests, and nothing runs together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.canonical import hash_fields
from protocols.identifiers import FederationId, RoundId
from protocols.secagg.context import Roster, ctx_of, survivors_digest
from protocols.secagg.threshold import SecaggTerms
from tests.support.secagg import MODEL, PLAN, SEEN, make_attempt, make_roster, node_name

BODIES = [b"ready of a", b"ready of b", b"ready of c"]
BASE = make_attempt(4)


def other_roster() -> Roster:
    """The same names; the last member has another key."""
    members = make_roster(5).members
    return Roster((*members[:3], replace(members[4], node=node_name(4))))


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": FederationId("andes-2")},
        {"round": RoundId.parse("run-2/4")},
        {"round": RoundId.parse("run-1/5")},
        {"number": 2},
        {"model_root": SEEN},
        {"plan_digest": SEEN},
        {"model_root": PLAN, "plan_digest": MODEL},
        {"roster": other_roster()},
        {"roster": make_roster(5), "terms": SecaggTerms.for_roster(5)},
        # the same characters, split otherwise
        {"federation": FederationId("ande"), "round": RoundId.parse("srun-1/4")},
    ],
    ids="+".join,
)
def test_ctx_deal_binds_every_field(changes):
    assert replace(BASE, **changes).ctx_deal(BODIES) != BASE.ctx_deal(BODIES)


@pytest.mark.parametrize(
    "bodies",
    [BODIES[:2], BODIES[::-1], [*BODIES, b""], [b"ready of aready of b", b"", BODIES[2]], []],
    ids=["one fewer", "another order", "one more", "run together", "none"],
)
def test_ctx_deal_binds_the_ready_set(bodies):
    assert BASE.ctx_deal(bodies) != BASE.ctx_deal(BODIES)


def test_ctx_deal_is_the_specified_hash():
    """Section 3 of the specification, written out once more."""
    want = hash_fields(
        "minga/ctx-deal/v1",
        b"andes",
        b"run-1",
        (4).to_bytes(8, "big"),
        (1).to_bytes(8, "big"),
        bytes.fromhex(BASE.roster.root),
        bytes.fromhex(MODEL),
        bytes.fromhex(PLAN),
        hash_fields("minga/ready-set/v1", *BODIES),
    )
    assert BASE.ctx_deal(BODIES) == want.hex()


@pytest.mark.parametrize(
    ("ctx_deal", "deals", "checkpoint"),
    [
        (SEEN, BODIES, b"checkpoint"),
        (MODEL, BODIES[:2], b"checkpoint"),
        (MODEL, BODIES[::-1], b"checkpoint"),
        (MODEL, BODIES, b"checkpoinT"),
        (MODEL, [*BODIES, b"checkpoint"], b""),
    ],
)
def test_ctx_binds_deals_and_checkpoint(ctx_deal, deals, checkpoint):
    assert ctx_of(ctx_deal, deals, checkpoint) != ctx_of(MODEL, BODIES, b"checkpoint")


@pytest.mark.parametrize(
    ("ctx", "headers"), [(SEEN, BODIES), (MODEL, BODIES[:2]), (MODEL, BODIES[::-1])]
)
def test_the_survivor_digest_binds_ctx_and_headers(ctx, headers):
    assert survivors_digest(ctx, headers) != survivors_digest(MODEL, BODIES)


def test_the_digests_of_one_list_are_of_different_kinds():
    """Same fields, different contexts: a digest of one kind is never valid as another."""
    assert len({survivors_digest(MODEL, BODIES), ctx_of(MODEL, BODIES, b"")}) == 2


def test_the_roster_root_binds_order_names_and_keys():
    base = make_roster(4)
    members = base.members
    renamed = Roster((*members[:3], replace(members[3], node=node_name(5))))
    swapped = Roster(
        (
            replace(members[0], key=members[1].key),
            replace(members[1], key=members[0].key),
            *members[2:],
        )
    )
    roots = {r.root for r in (base, renamed, swapped, other_roster(), make_roster(3))}
    assert len(roots) == 5
    assert [base.index(node) for node in base.nodes] == [1, 2, 3, 4]
