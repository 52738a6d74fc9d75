"""Runs and rounds as facts for people: assembled from the ledger, in one consistent read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

from coordinator.config import Prices
from coordinator.ledger import (
    CertificateRow,
    ConfirmationRow,
    HistoryRow,
    NodeRow,
    PhaseTimeRow,
    RoundRow,
    RunRow,
    TrafficRow,
    Tx,
)
from coordinator.ledger.rows import CostRow
from coordinator.rounds import why_now
from protocols.gen import accounting_pb2, admin_pb2, rounds_pb2
from protocols.identifiers import NodeId, RoundId, RunId
from protocols.rounds_codec import to_ms
from protocols.wire import phase_to_view, round_ref


def run_facts(run: RunRow) -> admin_pb2.RunFacts:
    """A run without its rounds and without its plan."""
    return admin_pb2.RunFacts(
        run=run.run,
        title=run.plan.title,
        status=run.status,
        plan_digest=run.plan_digest,
        submitted_at_ms=to_ms(run.submitted_at),
        rounds_planned=run.plan.total_rounds,
    )


def full_facts(
    tx: Tx, run_id: RunId, now: datetime, prices: Prices | None = None
) -> admin_pb2.RunFacts:
    """A run with its plan and everything about its rounds.

    Raises:
        NotFoundError: there is none.
    """
    run = tx.run(run_id)
    times: dict[RoundId, list[PhaseTimeRow]] = defaultdict(list)
    for time in tx.phase_times(run_id):
        times[time.round].append(time)
    moved: dict[RoundId, list[TrafficRow]] = defaultdict(list)
    for entry in tx.traffic(run_id):
        moved[entry.round].append(entry)
    spent: dict[RoundId, list[CostRow]] = defaultdict(list)
    for cost in tx.costs(run_id):
        spent[cost.round].append(cost)
    said: dict[RoundId, list[ConfirmationRow]] = defaultdict(list)
    for confirmation in tx.confirmations(run_id):
        said[confirmation.round].append(confirmation)
    facts = run_facts(run)
    facts.plan = run.plan_bytes
    if prices is not None:
        facts.prices.currency = prices.currency
        facts.prices.gpu_hour, facts.prices.kwh = prices.gpu_hour, prices.kwh
    facts.rounds.extend(
        round_facts(row, times[row.round], moved[row.round], said[row.round], now, spent[row.round])
        for row in tx.rounds(run_id)
    )
    return facts


def round_facts(
    row: RoundRow,
    times: Sequence[PhaseTimeRow],
    moved: Sequence[TrafficRow],
    said: Sequence[ConfirmationRow],
    now: datetime,
    spent: Sequence[CostRow] = (),
) -> admin_pb2.RoundFacts:
    """Everything about one round; who objects to its result stands in ``why`` as well."""
    traffic = {
        entry.node: admin_pb2.NodeTraffic(node=entry.node, bytes_up=entry.up, bytes_down=entry.down)
        for entry in moved
    }
    objecting: list[NodeId] = []
    for verdict in said:
        mine = traffic.setdefault(verdict.node, admin_pb2.NodeTraffic(node=verdict.node))
        if verdict.objection:
            objecting.append(verdict.node)
            mine.confirmed = f"objection: {verdict.objection}"
        else:
            mine.confirmed = verdict.model_root
    why = why_now(row, now)
    if objecting:
        why = f"{why}; {len(objecting)} of {len(said)} object: {', '.join(sorted(objecting))}"
    return admin_pb2.RoundFacts(
        round=round_ref(row.round),
        index=row.index,
        phase=phase_to_view(row.phase),
        why=why,
        model_root_in=row.start_root,
        times=[
            admin_pb2.PhaseTime(phase=time.phase, entered_at_ms=to_ms(time.entered_at))
            for time in times
        ],
        traffic=[traffic[node] for node in sorted(traffic)],
        metrics=row.metrics or {},
        next_snapshot=row.next_snapshot or b"",
        transcript=row.transcript or "",
        resources=[
            accounting_pb2.NodeResources(
                node=cost.node,
                used=accounting_pb2.Resources(
                    gpu_ms=cost.gpu_ms,
                    cpu_ms=cost.cpu_ms,
                    energy_mwh=cost.energy_mwh,
                    source=cost.source,
                ),
            )
            for cost in spent
        ],
    )


def node_facts(
    row: NodeRow,
    certificates: Sequence[CertificateRow],
    said: rounds_pb2.SyncRequest,
) -> admin_pb2.NodeFacts:
    """Everything about one node."""
    until = [
        to_ms(certificate.not_after)
        for certificate in certificates
        if certificate.subject_role == "node" and certificate.subject_name == row.node
    ]
    return admin_pb2.NodeFacts(
        node=row.node,
        status=row.status,
        enrolled_at_ms=to_ms(row.enrolled_at),
        certificate_until_ms=max(until, default=0),
        last_seen_ms=to_ms(row.seen_at) if row.seen_at else 0,
        state=row.state,
        agent_version=row.agent_version,
        progress=said.progress,
        capability=said.capability,
        signing_key=row.signing_key,
    )


def history_entry(row: HistoryRow) -> admin_pb2.HistoryEntry:
    """One change of state; an entry about the run itself has no phase, and round number 0."""
    return admin_pb2.HistoryEntry(
        id=row.id,
        at_ms=to_ms(row.at),
        round=rounds_pb2.RoundRef(run=row.run or "", number=row.number or 0),
        transaction=row.transaction,
        phase=row.phase,
        why=row.why,
        node=row.node or "",
    )
