"""Who may give a model out, and after what: a real coordinator with a log and a release board."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from infra.admin.proposals import propose_documents, propose_emergency, propose_founding
from policies.deciding import check_successor
from policies.effect import POLICY_DOCUMENT
from policies.releases import release_path
from protocols.governance import roles
from protocols.governance.documents import Denials
from protocols.governance.errors import TrustRefusedError
from protocols.tlog.kinds import ReleaseApproved
from tests.attacks.test_unheard_and_unlogged import said
from tests.support.door import served
from tests.support.saying import say
from tests.support.trust import World, card
from tests.unit.test_releases import GOOD, MODEL

BOARD = [card("ana", "ar-univ-1", "AR"), card("gil", "mx-1", "MX"), card("hans", "pe-1", "PE")]
KEYS = {item.holder.person: item.public for item in BOARD}
PATH = release_path(MODEL)


@contextmanager
def founded(folder: Any, board=BOARD):
    with served(folder, governed=True, log=True) as door:
        world = World()
        world.found_at(door, board=board)
        yield door, world


def rule(call) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return dict(caught.value.trailing_metadata() or ())["minga-rule"]


def evaluated(door, name: str, **changes: int) -> None:
    gates = [
        {"gate": gate, "value_micro": changes.get(gate.replace(".", "_"), value), "passed": True}
        for gate, value in GOOD.items()
    ]
    fields = {"model": MODEL, "evaluator": name, "gates": gates, "report_sha256": "a" * 64}
    say(door, f"institution {name}", "eval.report", fields)


def release(door, world, people, path=PATH):
    request = propose_documents(world.base(), roles.RELEASE, "release", put={path: b"{}"})
    return world.enact_at(door, request, people, KEYS)


def test_a_model_is_released_after_its_gates_and_by_the_board(tmp_path):
    with founded(tmp_path) as (door, world):
        assert rule(lambda: release(door, world, ["ana", "gil"])) == "trust.release"
        evaluated(door, "site-a")
        evaluated(door, "site-b", gate_safety=20_001)
        assert rule(lambda: release(door, world, ["ana", "gil"])) == "trust.release"
        evaluated(door, "site-c")
        assert rule(lambda: release(door, world, ["ana"])) == "trust.quorum"
        assert (
            rule(lambda: release(door, world, ["ana", "gil"], "release/model.json"))
            == "trust.release"
        )
        assert release(door, world, ["ana", "gil"])

        (approved,) = said(door, ReleaseApproved)
        assert (approved.model, len(approved.reports), len(approved.approvals)) == (MODEL, 2, 2)


def test_a_board_of_admins_alone_is_none(tmp_path):
    admins = World().cards
    with served(tmp_path, governed=True, log=True) as door:
        world = World()
        with pytest.raises((grpc.RpcError, TrustRefusedError)):
            world.found_at(
                door, board=[admins[0], admins[1], card("carla-2", "cl-univ-1", "CL")][:2]
            )
        world = World()
        world.found_at(door)
        evaluated(door, "site-a")
        evaluated(door, "site-b")
        assert rule(lambda: release(door, world, ["ana", "bruno"])) == "trust.board"


@pytest.mark.parametrize("n", [2, 4])
def test_a_board_is_as_large_as_the_policy_says(tmp_path, n):
    more = [*BOARD, card("ines", "py-1", "PY")]
    world = World()
    request = propose_founding(world.founding(board=more[:n]), now=world.now)
    files = world.publish(world.signed(request, ["ana", "bruno", "carla"]))
    with pytest.raises(TrustRefusedError) as caught:
        check_successor(None, world.verify(files))
    assert caught.value.rule in ("trust.board", "trust.shape")


def test_fewer_admins_than_the_policy_asks_for_are_no_emergency():
    """TUF counts two; this federation wants three."""
    world = World()
    world.found(
        policy={
            POLICY_DOCUMENT: world.policy(governance__emergency={"threshold": 3, "ttl_hours": 24})
        }
    )
    deny = Denials(institutions=(), runs=(), plans=(), code=(), certificates=(), all_rounds=True)

    def by(people, hours):
        request = propose_emergency(world.base(), "stop", deny=deny, code="leak", hours=hours)
        after = world.verify(world.publish(world.signed(request, people)))
        check_successor(world.state, after)

    by(["ana", "bruno", "carla"], 24)
    for people, hours in ((["ana", "bruno"], 24), (["ana", "bruno", "carla"], 25)):
        with pytest.raises(TrustRefusedError) as caught:
            by(people, hours)
        assert caught.value.rule == "trust.emergency"
