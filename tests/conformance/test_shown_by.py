"""Governance, identity and policy: each attack that was promised a refusal, and the tests of it.

The table is read, not believed: a test that it names must exist, and whoever renames one sees this
file fail. They are refusals by the real services: gRPC over mutual TLS, tuf's own client, real
processes.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOOR = "tests/contract/test_door.py"
COORDINATOR = "tests/attacks/test_governed_coordinator.py"
NODES = "tests/attacks/test_governed_nodes.py"
SIGNED = "tests/attacks/test_wrongly_signed.py"
PEOPLE = "tests/attacks/test_people.py"
PROCESSES = "tests/faults/test_governed_federation.py"
BOTH = (
    f"{SIGNED}::test_the_coordinator_does_not_publish_it",
    f"{SIGNED}::test_a_node_does_not_take_it_from_a_coordinator_that_serves_it",
)
TRUST = "tests/property/test_trust_parsers.py"
SITE = f"{PROCESSES}::test_a_site_file_that_permits_errs_or_is_wrong_means_no"

SHOWN_BY: dict[str, tuple[str, ...]] = {
    "plan under quorum": (
        f"{COORDINATOR}::test_a_plan_under_quorum_is_not_published",
        f"{COORDINATOR}::test_an_unsigned_plan_is_not_run",
        f"{NODES}::test_only_signed_plans_are_joined",
    ),
    "same key under two ids": BOTH,
    "two keys of one institution": BOTH,
    "rolled-back policy": (f"{NODES}::test_a_rolled_back_policy",),
    "frozen timestamp": (f"{NODES}::test_a_frozen_timestamp",),
    "expired role": (f"{NODES}::test_an_expired_membership",),
    "coordinator forging metadata": (
        f"{NODES}::test_metadata_that_the_coordinator_signed_itself",
        f"{NODES}::test_a_root_of_another_federation",
    ),
    "emergency role trying to allow": BOTH,
    "override of a never-overridable rule": BOTH,
    "site file that tries to permit": (SITE,),
    "Cedar condition that errors": (SITE,),
    "unknown attribute": (SITE,),
    "suspended member on an old connection": (
        f"{COORDINATOR}::test_a_suspended_member_is_refused_on_a_connection_opened_before",
        f"{COORDINATOR}::test_a_long_stream_ends_when_its_member_is_expelled",
    ),
    "expired certificate": (f"{DOOR}::test_an_expired_certificate_does_not_even_connect",),
    "foreign certificate": (f"{DOOR}::test_a_strangers_certificate_does_not_even_connect",),
    "server-only certificate": (f"{COORDINATOR}::test_a_server_only_certificate_is_no_client",),
    "CSR with two SANs": (f"{COORDINATOR}::test_a_request_for_two_names_or_a_strangers",),
    "CSR with a stranger's SPIFFE id": (
        f"{COORDINATOR}::test_a_request_for_two_names_or_a_strangers",
    ),
    "reused token": (
        f"{DOOR}::test_a_token_works_once",
        f"{COORDINATOR}::test_a_used_token_is_refused",
    ),
    "admin who is also auditor": (
        *BOTH,
        f"{SIGNED}::test_an_admin_does_not_sign_a_list_that_mixes_duties",
    ),
    "rotation of all admin keys in mid-run": (
        f"{PROCESSES}::test_all_admin_keys_rotate_in_mid_run_and_no_round_stops",
    ),
    "every parser of documents from outside": (
        "tests/property/test_parsers_from_outside.py::test_every_parser_has_a_row_or_a_reason",
        "tests/property/test_parsers_from_outside.py::test_it_is_read_or_refused",
        f"{TRUST}::test_a_repository_with_one_change_is_refused_or_the_same",
    ),
}


@cache
def defined_in(path: str) -> frozenset[str]:
    file = ROOT / path
    if not file.exists():
        return frozenset()
    tree = ast.parse(file.read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def missing(test: str) -> bool:
    path, _, name = test.partition("::")
    return not name.startswith("test_") or name not in defined_in(path)


@pytest.mark.parametrize("attack", sorted(SHOWN_BY))
def test_the_attack_has_its_refusal(attack):
    assert SHOWN_BY[attack]
    gone = [test for test in SHOWN_BY[attack] if missing(test)]
    assert not gone


def test_a_test_that_does_not_exist_is_missed():
    assert missing(f"{DOOR}::test_nobody_wrote_this")
    assert missing("tests/nowhere.py::test_a")
