"""What a plan must fulfil before a run begins: checked where the operator can still change it.

A plan that cannot work (a tensor nobody has, an optimiser nobody knows, a blob that is not here)
would otherwise fail after the sites have trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from coordinator.blobs import Blobs
from coordinator.ledger import NodeRow, Tx
from policies.audit.replay import witness_policy
from policies.consortium import ConsortiumPolicy
from policies.decision import Refused
from policies.in_force import check_signed_terms, in_force_from_state
from policies.privacy.claim import Claim, claim_of
from policies.privacy.micro import cost_of_one
from policies.privacy.terms import noise_terms
from protocols.canonical import canonical_bytes, sha256_hex
from protocols.crypto.signatures import BadSignatureError, Context, verify
from protocols.errors import MalformedMessageError, NotFoundError, PlanRefusedError
from protocols.governance.approval import check_approval
from protocols.governance.documents import member_refusal, run_refusal
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import TrustState, sha256_of
from protocols.identifiers import Digest, FederationId, NodeId
from protocols.outer_optimizers import optimizer_for
from protocols.plan import Plan
from protocols.round_vector import round_layout, sizes_of_rounds
from protocols.tensors.manifest import Manifest
from protocols.tensors.scales import Scales
from protocols.tensors.snapshot import Snapshot
from protocols.tlog.kinds import RunRequest, SignedRequest
from protocols.tlog.note import VerifierKey
from protocols.tlog.text import encode_base64
from protocols.wire import read_bytes

_MAX_MANIFEST: Final = 64 * 2**20  # bytes


def check_submission(
    plan: Plan, snapshot: Snapshot, blobs: Blobs, federation: FederationId
) -> Claim | None:
    """Compare a plan with the federation, its starting snapshot and the blobs that are here.

    Reads files: call it in a thread.

    Returns:
        What a training round costs each institution; None: the plan is not private.

    Raises:
        PlanRefusedError: the sentence names the rule.
        NotFoundError: a blob was not put.
        ManifestMismatchError: the plan names a tensor that the model does not have.
    """
    if plan.federation != federation:
        raise PlanRefusedError(
            f"the plan is for federation {plan.federation}, this is {federation}",
            rule="plan.federation",
        )
    if snapshot.model_root != plan.model.initial:
        raise PlanRefusedError(
            f"the plan starts from model {plan.model.initial[:12]}…, the snapshot is"
            f" {snapshot.model_root[:12]}…",
            rule="model.initial",
        )
    if snapshot.manifest != plan.model.manifest or snapshot.round != 0:
        raise PlanRefusedError(
            "the snapshot is not of the plan's parameter set, or not of round 0",
            rule="model.initial",
        )
    optimizer_for(plan.outer)
    manifest = _check_blobs(plan, snapshot, blobs)
    return claim_of(plan, 0, sizes_of_rounds(plan, manifest)[-1])  # the dearest of its rounds


def _check_blobs(plan: Plan, snapshot: Snapshot, blobs: Blobs) -> Manifest:
    names = {
        "manifest": snapshot.manifest,
        "theta": snapshot.theta,
        **snapshot.buffers,
        "scales": snapshot.scales,
    }
    for name, digest in names.items():
        if not blobs.has(digest):
            raise NotFoundError(f"blob {digest[:12]}… ({name}) is not here: put it first")
    manifest = Manifest.from_bytes(blobs.read_all(snapshot.manifest, limit=_MAX_MANIFEST))
    for index in {0, plan.total_rounds - 1}:
        round_layout(plan, index, manifest)
    for name, digest in {"theta": snapshot.theta, **snapshot.buffers}.items():
        size, need = blobs.open(digest).size, 4 * manifest.coordinates
        if size != need:
            raise PlanRefusedError(
                f"{name} has {size} bytes; {manifest.coordinates} coordinates have {need}",
                rule="model.initial",
            )
    reader = blobs.open(Digest(snapshot.scales))
    scales = Scales.from_bytes(reader.read(0, reader.size), manifest)
    for coordinates in sizes_of_rounds(plan, manifest) if plan.privacy is not None else ():
        noise = noise_terms(plan, coordinates)
        if plan.adds_noise and (scales.exponents != noise.exponent).any():
            raise PlanRefusedError(
                "the snapshot's scales are not the plan's: noise is made for those of the plan",
                rule="privacy.scales",
            )
    return manifest


def check_roster(plan: Plan, known: Mapping[NodeId, NodeRow]) -> None:
    """Every node of the roster is enrolled and active.

    Raises:
        PlanRefusedError: the sentence names those who are not.
    """
    missing = [
        node for node in plan.roster_ids if node not in known or known[node].status != "active"
    ]
    if missing:
        raise PlanRefusedError(
            f"not an active member of this federation: {', '.join(missing)}", rule="plan.roster"
        )


def check_terms(
    plan: Plan,
    data: bytes,
    state: TrustState,
    known: Mapping[NodeId, NodeRow],
    now: datetime,
) -> None:
    """The plan is among the signed terms, its members are members, its keys are theirs.

    Args:
        plan: as it was read.
        data: its canonical bytes, which the admins signed.
        state: what is in force.
        known: enrolled nodes.
        now: UTC.

    Raises:
        TrustRefusedError: trust.plan, trust.member, trust.emergency or trust.key.
    """
    refusal = state.plan_signed(plan.run_id, sha256_of(data)) or run_refusal(
        state.emergencies, plan.run_id, plan.digest, now
    )
    for node in plan.roster_ids:
        refusal = refusal or member_refusal(state.members, state.emergencies, node, now)
    if refusal is not None:
        raise refusal
    for node in plan.roster_ids if plan.secagg is not None else ():
        row = known.get(node)
        if row is None or row.approval is None:
            raise TrustRefusedError(
                f"{node} has no approval of its institution: it joins again", rule="trust.key"
            )
        try:
            said = check_approval(
                row.approval,
                federation=state.federation,
                institution=node,
                keys=state.members.keys_of(node),
            )
        except MalformedMessageError as error:
            raise TrustRefusedError(f"{node}: {error}", rule="trust.key") from None
        if plan.secagg is not None and plan.secagg.keys[node] != said.signing_key:
            raise TrustRefusedError(
                f"the plan names another signing key for {node} than its institution approved",
                rule="trust.key",
            )


def check_policy(
    plan: Plan,
    state: TrustState,
    policy: ConsortiumPolicy,
    claim: Claim | None,
    witnesses: tuple[int, int] | None,
    now: datetime,
) -> None:
    """The plan keeps to the policy in force: the check that every node makes, before any is asked.

    Computes epsilon: call it in a thread.

    Args:
        claim: of the dearest round; None: the plan is not private.
        witnesses: as ``log_witnesses``; None: there is no log, and nothing is asked of it.

    Raises:
        PlanRefusedError: the first rule that says no, with the ids of the others.
    """
    cost = None
    if plan.privacy is not None and claim is not None:
        cost = cost_of_one(claim, delta=float(plan.privacy.delta_exact))
    rule = policy.log.witness
    quorum, auditors = witnesses or (rule.quorum, int(rule.auditor_required))
    decision = check_signed_terms(
        plan,
        in_force_from_state(state, policy, now),
        now=now,
        eps_round_micro=cost,
        witness_quorum=quorum,
        auditors=auditors,
    )
    if isinstance(decision, Refused):
        others = f"; also by {', '.join(decision.rules[1:])}" if decision.rules[1:] else ""
        raise PlanRefusedError(f"{decision.first.reason}{others}", rule=decision.first.rule)


def log_witnesses(tx: Tx) -> tuple[int, int] | None:
    """How many must cosign before a node believes the log, and how many of them are no members.

    None: there is no log.
    """
    if not tx.logs:
        return None
    log = tx.log_state()
    if log.genesis is None:
        return None
    auditors = [VerifierKey.parse(vkey) for vkey in log.genesis.witnesses]
    policy = witness_policy(VerifierKey.parse(log.genesis.log_vkey), log.witnesses, auditors)
    return policy.least_cosigners(), len(auditors)


def read_request(body: bytes, signature: bytes) -> tuple[bytes, bytes] | None:
    """The operator's request as it came; None: none did.

    Raises:
        MalformedMessageError: it is no request.
    """
    if not body and not signature:
        return None
    RunRequest.from_bytes(body)
    return body, read_bytes(signature, what="a signature", size=64)


def check_request(
    tx: Tx, plan: Plan, signed: tuple[bytes, bytes] | None, operator: str
) -> bytes | None:
    """Check that the operator signed for this plan; what is kept of it, JSON.

    Raises:
        PlanRefusedError: the log names a key for this operator, and it did not sign this.
    """
    genesis = tx.log_state().genesis if tx.logs else None
    if genesis is None or not genesis.operator_keys:
        return None
    key = genesis.operator_keys.get(operator)
    if key is None:
        raise PlanRefusedError(f"the log names no key of operator {operator}", rule="log.request")
    if signed is None:
        raise PlanRefusedError("the operator must sign for the run", rule="log.request")
    body, signature = signed
    try:
        verify(bytes.fromhex(key), Context.RUN_REQUEST, body, signature)
    except BadSignatureError as error:
        raise PlanRefusedError(str(error), rule="log.request") from None
    asked = RunRequest.from_bytes(body)
    if (asked.federation, asked.run, asked.plan_sha256, asked.model_root) != (
        plan.federation,
        plan.run,
        sha256_hex(plan.to_bytes()),
        plan.model.initial,
    ):
        raise PlanRefusedError("the signed request is for another run", rule="log.request")
    kept = SignedRequest(body=body.decode(), key=key, signature=encode_base64(signature))
    return canonical_bytes(kept.model_dump(mode="json"))
