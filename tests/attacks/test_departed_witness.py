"""A member that the admins stop takes part in nothing, but its witness goes on cosigning: else the
log of those who remain would stop with it."""

from __future__ import annotations

import queue
import time
from datetime import UTC, datetime

import grpc
import pytest

from infra.admin.proposals import propose_emergency, propose_members, with_status
from protocols.gen import log_pb2, log_pb2_grpc
from protocols.governance.documents import Denials
from protocols.tlog.cosignature import cosign
from protocols.tlog.witness import Request
from tests.contract.test_door import ping
from tests.support.door import served
from tests.support.leaves import witness_signer
from tests.support.saying import hearing_of
from tests.support.trust import World

SITE = "a"


def refused_rule(call) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return dict(caught.value.trailing_metadata() or ())["minga-rule"]


def cosigned(door, node) -> bool:
    """Whether the newest head takes a cosignature of the site over its own connection."""
    hub, signer = door.parts.log.hub, witness_signer(SITE)
    hub.keys[SITE] = signer.verifier  # as its enrolment in the log has it
    said: queue.Queue = queue.Queue()
    said.put(log_pb2.WitnessAnswer())
    stub = log_pb2_grpc.WitnessStub(node.channel)
    call = stub.NextCheckpoint(iter(said.get, None), timeout=20)
    request = Request.parse(next(call).body)
    now = int(datetime.now(UTC).timestamp())
    line = cosign(request.note.text, signer=signer, time=now).to_text()
    said.put(log_pb2.WitnessAnswer(status=200, body=line.encode()))
    for _ in range(500):
        if SITE in hub.signed.lines:
            break
        time.sleep(0.02)
    call.cancel()
    said.put(None)
    return SITE in hub.signed.lines


@pytest.mark.parametrize("status", ["suspended", "expelled", "left"])
def test_a_departed_member_cosigns_and_does_nothing_else(tmp_path, status):
    with served(tmp_path, governed=True, log=True) as door:
        world = World(institutions=(("a", "AR"), ("b", "BR"), ("c", "CL")))
        world.found_at(door)
        node = door.enrol(SITE)
        assert ping(node).now_ms > 0
        hearing_of(door, SITE)
        members = with_status(world.state.members, SITE, status)
        request = propose_members(world.base(), members, status)
        world.enact_at(door, request, ["ana", "bruno", "carla"])

        assert refused_rule(lambda: ping(node)) == "trust.member"
        page = next(log_pb2_grpc.LogStub(node.channel).Follow(log_pb2.FollowRequest(), timeout=20))
        assert page.entries
        assert cosigned(door, node)


def test_a_certificate_that_an_emergency_denies_cosigns_nothing(tmp_path):
    with served(tmp_path, governed=True, log=True) as door:
        world = World(institutions=(("a", "AR"), ("b", "BR"), ("c", "CL")))
        world.found_at(door)
        node = door.enrol(SITE)
        (key,) = door.ledger(
            lambda tx: [row.spki_sha256 for row in tx.certificates() if row.subject_name == SITE]
        )
        deny = Denials(
            institutions=(), runs=(), plans=(), code=(), certificates=(key,), all_rounds=False
        )
        request = propose_emergency(world.base(), "deny-a", deny=deny, code="leak")
        world.enact_at(door, request, ["ana", "bruno"])
        assert refused_rule(lambda: cosigned(door, node)) == "trust.emergency"
