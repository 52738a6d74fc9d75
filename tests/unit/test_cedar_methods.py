"""Who may call which method of the coordinator: the whole table, and what nobody thought of."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from coordinator.services.bulk import raw_handlers
from policies.cedar import consortium_text, schema_text
from policies.cedar.engine import RuleSet
from policies.cedar.methods import ACTIONS, OPEN, action_of, decide_call

RULES = RuleSet.load(schema=schema_text(), consortium=consortium_text())
PROTO = Path(__file__).resolve().parents[2] / "protocols" / "proto"
# role: the actions that it has
MAY = {
    "node": {"takePart", "renewCertificate", "readBlobs", "readTrust"},
    "operator": {
        "watchRuns",
        "manageRuns",
        "manageMembers",
        "readBlobs",
        "putBlobs",
        "readTrust",
        "publishTrust",
    },
    "partner": {"watchRuns", "readBlobs", "readTrust"},
    "auditor": {"watchRuns", "readBlobs", "readTrust"},
    "admin": {"watchRuns", "readBlobs", "readTrust", "publishTrust"},
    "witness": {"readTrust"},
    "release-board": {"readTrust"},
}


def call(method, role, **changes):
    return decide_call(
        RULES, method, **{"role": role, "name": "usach", "federation": "demo", **changes}
    )


def methods_of_the_services():
    found = set()
    for path in PROTO.glob("*.proto"):
        service = ""
        for line in path.read_text("utf-8").splitlines():
            if match := re.match(r"service (\w+)", line):
                service = match[1]
            elif match := re.match(r"\s+rpc (\w+)\(", line):
                found.add(f"{service}/{match[1]}")
    return found | {
        f"Bulk/{name.rpartition('/')[2]}" for name in raw_handlers(MagicMock())._method_handlers
    }


def test_every_method_has_an_action_and_every_action_a_method():
    assert set(ACTIONS) == methods_of_the_services()


@pytest.mark.parametrize("role", MAY)
@pytest.mark.parametrize("method", sorted(m for m, action in ACTIONS.items() if action != OPEN))
def test_who_may_call_what(method, role):
    decision = call(f"/minga.v1.{method}", role)

    assert bool(decision) == (ACTIONS[method] in MAY[role])
    assert decision or decision.rules == ("fed.no_permit",)


def test_what_nobody_thought_of_is_closed():
    for method in ("/minga.v1.Admin/Erase", "/minga.v1.Enrolment/Join", "/grpc.health/Check", ""):
        assert call(method, "operator").rules == ("fed.unknown_method",)
    assert action_of("/minga.v1.Enrolment/Join") == OPEN
    assert call("/minga.v1.Admin/StopRun", "root").rules == ("fed.unknown_role",)


def test_a_member_that_is_not_active_may_do_nothing():
    for status in ("suspended", "expelled", "left", "unknown", ""):
        assert call("/minga.v1.Rounds/Sync", "node", status=status).rules == ("fed.member.active",)


@pytest.mark.parametrize(
    ("role", "others", "rule"),
    [
        ("auditor", ["operator"], "fed.separation.auditor"),
        ("operator", ["auditor"], "fed.separation.auditor"),
        ("admin", ["auditor"], "fed.separation.auditor"),
        ("operator", ["admin"], "fed.separation.operator"),
    ],
)
def test_duties_are_separate(role, others, rule):
    """Also for what either role may do alone."""
    assert rule in call("/minga.v1.Admin/ListRuns", role, roles=others).rules
    assert call("/minga.v1.Admin/ListRuns", role)


def test_a_name_is_data_and_never_part_of_a_rule():
    """Names are narrow; even one that is not cannot speak Cedar."""
    said = call("/minga.v1.Admin/StopRun", "partner", name='x"] }; permit (principal, action, "')

    assert not said
