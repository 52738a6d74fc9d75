"""A small federation for tests of ledger, services and drivers: plan, snapshot, enrolled nodes."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from coordinator.ledger import Tx, model_root_of
from protocols.canonical import canonical_bytes
from protocols.cohort import Terms, terms_of
from protocols.identifiers import NodeId, RoundId, RunId
from protocols.plan import Plan
from protocols.rounds import Open, open_round

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
NODES = tuple(NodeId(name) for name in ("antofagasta", "bogota", "cusco", "durazno"))
RUN = RunId("andes-1")
ROUND = RoundId(RUN, 0)


def digest(text: str) -> str:
    """Some digest, the same for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()


def snapshot_bytes(name: str = "initial", number: int = 0) -> bytes:
    """A snapshot document; its blobs exist nowhere."""
    return canonical_bytes(
        {
            "schema": "minga.snapshot/1",
            "round": number,
            "manifest": digest("manifest"),
            "theta": digest(f"theta {name}"),
            "buffers": {},
            "scales": digest("scales"),
            "counters": {"steps": number},
        }
    )


def make_plan(
    run: str = RUN,
    *,
    roster: tuple[str, ...] = NODES,
    min_participants: int = 2,
    rounds: int = 2,
    **fields: Any,
) -> Plan:
    """A plan in mode open for a vector model."""
    value: dict[str, Any] = {
        "federation": "demo",
        "run": run,
        "roster": sorted(roster),
        "min_participants": min_participants,
        "rounds": rounds,
        "model": {
            "family": "vector",
            "manifest": digest("manifest"),
            "initial": model_root_of(snapshot_bytes()),
        },
        "local_step": {"kind": "synthetic", "synthetic": {"delta": 0.001}},
        "deadlines": {
            "join": 60, "train": 600, "deal": 60, "upload": 600, "commit": 60, "reveal": 60,
        },
    }  # fmt: skip
    return Plan.from_value({**value, **fields})


def enrol(tx: Tx, nodes: tuple[str, ...] = NODES) -> None:
    """Enrol nodes with signing keys that are only names."""
    for node in nodes:
        key = hashlib.sha256(node.encode()).digest()
        tx.add_node(NodeId(node), key, START)


def first_phase(plan: Plan) -> Open:
    """The phase in which a round of ``plan`` opens."""
    return open_round(terms_of(plan), now=START, join_s=plan.deadlines.join)


def begin(tx: Tx, plan: Plan | None = None) -> Plan:
    """Enrol the roster, submit the plan, open round 0."""
    plan = plan or make_plan()
    enrol(tx, plan.roster)
    tx.add_run(plan, snapshot_bytes(), START)
    tx.open_round(
        RoundId(plan.run_id, 0),
        index=0,
        phase=first_phase(plan),
        start_snapshot=snapshot_bytes(),
        why="the first round",
        now=START,
    )
    return plan


def terms(plan: Plan | None = None) -> Terms:
    """The course of a round under a plan."""
    return terms_of(plan or make_plan())
