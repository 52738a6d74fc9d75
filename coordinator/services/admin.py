"""For people who run or watch the federation.

Every call may be repeated. What is refused is refused with a sentence that says what to change.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from typing import Final, TypeAlias

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from coordinator.blobs import Blobs
from coordinator.ca import CertificateAuthority
from coordinator.clock import Clock
from coordinator.config import Prices
from coordinator.ledger import HistoryRow, Ledger, RoundRow, Tx
from coordinator.ledger.privacy import SpendRow
from coordinator.log_hub import LogHub, describe_waiting
from coordinator.privacy import spend_facts
from coordinator.rounds import advance, why_now
from coordinator.services.caller import Callers
from coordinator.services.facts import full_facts, history_entry, node_facts, run_facts
from coordinator.services.progress import read_progress, read_reports
from coordinator.services.submission import (
    check_policy,
    check_request,
    check_roster,
    check_submission,
    check_terms,
    log_witnesses,
    read_request,
)
from coordinator.trust_repository import TrustRepository
from policies.planning import SiteBefore, SiteOutlook, site_outlook
from policies.privacy.budget import Spend
from policies.privacy.caps import Cap, cap_for
from policies.privacy.claim import Claim, claim_of
from protocols.enrolment import SECRET_BYTES, Invitation
from protocols.errors import MalformedMessageError, NotFoundError, RefusedError
from protocols.gen import admin_pb2, admin_pb2_grpc, rounds_pb2
from protocols.identifiers import NodeId, RunId, parse_node_id, parse_run_id
from protocols.plan import Plan
from protocols.rounds import StopRequested, waiting_for
from protocols.rounds_codec import to_ms
from protocols.tensors.snapshot import Snapshot
from protocols.tlog.fields import MAX_INT
from protocols.wire import phase_to_view, read_round, read_text

MAX_INVITATION_HOURS: Final = 72
_WATCH_S: Final = 30.0
_BATCH: Final = 500  # history entries read at once
Context: TypeAlias = grpc.aio.ServicerContext
Spends: TypeAlias = list[SpendRow]


class AdminService(admin_pb2_grpc.AdminServicer):
    """Answers operators."""

    def __init__(
        self,
        *,
        callers: Callers,
        ledger: Ledger,
        clock: Clock,
        blobs: Blobs,
        authority: CertificateAuthority,
        trust: TrustRepository | None = None,
        caps: Sequence[Cap] = (),
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        hub: LogHub | None = None,
        prices: Prices | None = None,
    ) -> None:
        self._prices = prices
        self._callers = callers
        self._ledger = ledger
        self._clock = clock
        self._blobs = blobs
        self._authority = authority
        self._caps = caps
        self._random_bytes = random_bytes
        self._trust = trust
        self._hub = hub

    # -- members -----------------------------------------------------------------------------

    async def Invite(
        self, request: admin_pb2.InviteRequest, context: Context
    ) -> admin_pb2.InviteResponse:
        """Make a one-time token for one institution. Only its hash is kept."""
        await self._callers.operator(context)
        institution = parse_node_id(request.institution)
        if not 1 <= request.valid_hours <= MAX_INVITATION_HOURS:
            raise MalformedMessageError(
                f"an invitation is valid for 1 to {MAX_INVITATION_HOURS} hours,"
                f" not {request.valid_hours}"
            )
        self._callers.member(institution)  # once founded, only a signed member is invited
        expires_at = self._clock.now() + timedelta(hours=request.valid_hours)
        first = self._trust.first_root() if self._trust is not None else None
        secret = self._random_bytes(SECRET_BYTES)
        token_hash = hashlib.sha256(secret).digest()
        await self._ledger.run(
            "invite", lambda tx: tx.add_token(token_hash, institution, expires_at)
        )
        invitation = Invitation(
            institution=institution,
            secret=secret,
            root_der=self._authority.certificate.public_bytes(Encoding.DER),
            trust_root=b"" if first is None else hashlib.sha256(first).digest(),
        )
        return admin_pb2.InviteResponse(token=invitation.to_text(), expires_at_ms=to_ms(expires_at))

    async def ListNodes(
        self, request: admin_pb2.ListNodesRequest, context: Context
    ) -> admin_pb2.ListNodesResponse:
        """Every enrolled node and what it says it is doing."""
        await self._callers.watcher(context)

        def look(tx: Tx) -> list[admin_pb2.NodeFacts]:
            certificates, said = tx.certificates(), read_reports(tx)
            nothing = rounds_pb2.SyncRequest()
            return [
                node_facts(row, certificates, said.get(row.node, nothing)) for row in tx.nodes()
            ]

        return admin_pb2.ListNodesResponse(nodes=await self._ledger.read("list_nodes", look))

    # -- runs --------------------------------------------------------------------------------

    async def SubmitRun(
        self, request: admin_pb2.SubmitRunRequest, context: Context
    ) -> admin_pb2.RunFacts:
        """Begin a run. The same plan and snapshot again give the same answer."""
        operator = await self._callers.operator(context)
        plan, snapshot = Plan.from_bytes(request.plan), Snapshot.from_bytes(request.snapshot)
        claim = await asyncio.to_thread(
            check_submission, plan, snapshot, self._blobs, self._authority.federation
        )
        await asyncio.to_thread(self._blobs.put_bytes, request.snapshot)  # for auditors
        signed = read_request(request.request, request.request_signature)
        now = self._clock.now()
        state = self._trust.state() if self._trust is not None else None
        if state is not None:
            rows = await self._ledger.read("nodes", Tx.nodes)
            check_terms(plan, request.plan, state, {row.node: row for row in rows}, now)
            policy = self._trust.policy() if self._trust is not None else None
            if policy is not None:
                named = await self._ledger.read("log_witnesses", log_witnesses)
                await asyncio.to_thread(check_policy, plan, state, policy, claim, named, now)
        return await self._ledger.run(
            "submit_run",
            lambda tx: submit(tx, plan, request.snapshot, operator.name, now, claim, signed),
        )

    async def ListRuns(
        self, request: admin_pb2.ListRunsRequest, context: Context
    ) -> admin_pb2.ListRunsResponse:
        """Every run, without its rounds."""
        await self._callers.watcher(context)
        runs = await self._ledger.read("list_runs", Tx.runs)
        return admin_pb2.ListRunsResponse(runs=[run_facts(run) for run in runs])

    async def ShowRun(
        self, request: admin_pb2.ShowRunRequest, context: Context
    ) -> admin_pb2.RunFacts:
        """Everything about a run."""
        await self._callers.watcher(context)
        run_id, now = parse_run_id(request.run), self._clock.now()

        def look(tx: Tx) -> tuple[admin_pb2.RunFacts, Plan, Claim | None, dict[NodeId, Spends]]:
            plan, claim = tx.run(run_id).plan, tx.claim(run_id)
            spends = (
                {node: tx.spends_of_data(node, claim.dataset) for node in plan.roster_ids}
                if claim is not None
                else {}
            )
            return full_facts(tx, run_id, now, self._prices), plan, claim, spends

        facts, plan, claim, spends = await self._ledger.read("show_run", look)
        if claim is not None:
            told = await asyncio.to_thread(spend_facts, plan, claim, spends, self._caps, now)
            facts.privacy.extend(told)
        return facts

    async def WatchRun(
        self, request: admin_pb2.WatchRunRequest, context: Context
    ) -> AsyncIterator[admin_pb2.HistoryEntry]:
        """The run's history after an entry, then what happens, until the run ends."""
        run_id, after = parse_run_id(request.run), request.after
        if after > MAX_INT:
            raise MalformedMessageError(f"there is no entry {after} of a history")
        while True:
            await self._callers.watcher(context)  # a stream may outlive the right to it
            rows, version, ended = await self._ledger.read(
                "watch_run", partial(look_on, run_id=run_id, after=after)
            )
            for row in rows:
                yield history_entry(row)
                after = row.id
            if not rows:
                if ended:
                    return
                await self._ledger.changed(version, _WATCH_S)

    async def Why(self, request: admin_pb2.WhyRequest, context: Context) -> admin_pb2.WhyResponse:
        """What a round waits for: the machine's own answer, nothing is changed by asking."""
        await self._callers.watcher(context)
        round_id, now = read_round(request.round), self._clock.now()

        def look(tx: Tx) -> tuple[RoundRow, list[rounds_pb2.Progress]]:
            row = tx.round(round_id)
            if row is None:
                tx.run(round_id.run)
                raise NotFoundError(f"run {round_id.run} has no round {round_id.number} yet")
            reports = read_progress(tx)
            mine = (report for node in sorted(reports) for report in reports[node])
            return row, [report for report in mine if read_round(report.round) == round_id]

        row, progress = await self._ledger.read("why", look)
        waits = describe_waiting(self._hub)
        why = why_now(row, now)
        return admin_pb2.WhyResponse(
            phase=phase_to_view(row.phase),
            why=f"{why}; {waits}" if waits and not row.final else why,
            waiting_for=waiting_for(row.phase),
            progress=progress,
        )

    async def StopRun(
        self, request: admin_pb2.StopRunRequest, context: Context
    ) -> admin_pb2.RunFacts:
        """Open no other round; a round in which nothing has left the sites ends at once."""
        operator = await self._callers.operator(context)
        run_id, now = parse_run_id(request.run), self._clock.now()
        reason = read_text(request.reason, what="a reason") or f"by operator {operator.name}"
        await self._ledger.run("stop_run", lambda tx: stop(tx, run_id, reason, now))
        return await self._ledger.read(
            "show_run", lambda tx: full_facts(tx, run_id, now, self._prices)
        )

    async def PlanRun(
        self, request: admin_pb2.PlanRunRequest, context: Context
    ) -> admin_pb2.PlanRunResponse:
        """What a plan would cost each institution, and who would refuse. Records nothing."""
        await self._callers.operator(context)
        plan, now = Plan.from_bytes(request.plan), self._clock.now()
        claim = await asyncio.to_thread(claim_of, plan, 0, request.coordinates)

        def look(tx: Tx) -> list[SiteBefore]:
            known = {row.node: row.status for row in tx.nodes()}
            return [
                SiteBefore(
                    node=node,
                    active=known.get(node) == "active",
                    spends=_spends(tx, node, claim),
                    cap=cap_for(self._caps, node, claim) if claim is not None else None,
                )
                for node in plan.roster_ids
            ]

        sites = await self._ledger.read("plan_run", look)
        found = await asyncio.to_thread(site_outlook, plan, claim, sites, now=now)
        return admin_pb2.PlanRunResponse(sites=[_outlook(site) for site in found])


def _spends(tx: Tx, node: NodeId, claim: Claim | None) -> tuple[Spend, ...]:
    if claim is None:
        return ()
    return tuple(row.spend for row in tx.spends_of_data(node, claim.dataset))


def _outlook(site: SiteOutlook) -> admin_pb2.SiteOutlook:
    return admin_pb2.SiteOutlook(**asdict(site))


def submit(
    tx: Tx,
    plan: Plan,
    snapshot: bytes,
    operator: str,
    now: datetime,
    claim: Claim | None = None,
    signed: tuple[bytes, bytes] | None = None,
) -> admin_pb2.RunFacts:
    """Record a run that was checked.

    Args:
        signed: the operator's request and signature; needed where there is a round log.

    Raises:
        ExistsError: another plan or snapshot has this name.
        PlanRefusedError: a node of the roster is not an active member.
    """
    if tx.find_run(plan.run_id) is None:
        check_roster(plan, {row.node: row for row in tx.nodes()})
    request = check_request(tx, plan, signed, operator)
    row = tx.add_run(plan, snapshot, now, by=operator, request=request)
    if claim is not None:
        tx.add_claim(plan.run_id, claim)
    return run_facts(row)


def stop(tx: Tx, run_id: RunId, reason: str, now: datetime) -> None:
    """Stop a run and, where that is still harmless, its round. Again is no error.

    Raises:
        NotFoundError: there is no such run.
        RefusedError: it ended by itself.
    """
    run = tx.lock_run(run_id)
    if run.status in ("done", "failed"):
        raise RefusedError(f"run {run_id} is {run.status}: there is nothing to stop")
    if run.status == "active":
        tx.set_run_status(run_id, "stopped", reason, now)
        for row in tx.newest_rounds(run_id):
            if not row.final:
                advance(tx, row.round, StopRequested(reason), now, transaction="stop_run")


def look_on(tx: Tx, run_id: RunId, after: int) -> tuple[list[HistoryRow], int, bool]:
    """The next entries of a run's history, the ledger's version, and whether the run is over.

    Raises:
        NotFoundError: there is no such run.
    """
    run, newest = tx.run(run_id), tx.newest_rounds(run_id)
    ended = run.status != "active" and all(row.final for row in newest)
    return tx.history(after, run_id, _BATCH), tx.version(), ended
