"""The checks of each message list, each once: nodes, coordinator and auditors call the same.

Each function takes what came and the facts established before, verifies signatures, and gives the
next facts: ``Started`` (U1 and ctx_deal), ``Agreed`` (the DEALs and ctx), ``Listed`` (U3 and its
digest). A later fact cannot be had without the earlier ones. Numbers in errors are the clauses of
protocols/spec/masked-update.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from protocols.canonical import hash_fields
from protocols.errors import EquivocationError
from protocols.identifiers import Digest, NodeId
from protocols.secagg.context import Attempt, ctx_of, survivors_digest, u16
from protocols.secagg.errors import BadShareError, CheckFailedError
from protocols.secagg.messages import (
    Abort,
    AbortCertificate,
    Body,
    Commit,
    CommitCertificate,
    Deal,
    DealBundle,
    DealOk,
    Go,
    Ready,
    Reveal,
    Signed,
    Start,
    Survivors,
    Upload,
)
from protocols.secagg.packets import Kind, check_opening
from protocols.tlog.merkle import leaf_hash, tree_root

B = TypeVar("B", bound=Body)


@dataclass(frozen=True, kw_only=True)
class Started:
    """U1 is fixed and everybody in it goes by the same plan, model and roster."""

    attempt: Attempt
    readys: dict[NodeId, Ready]  # in roster order
    ctx_deal: Digest

    @functools.cached_property
    def indices(self) -> dict[NodeId, int]:
        """Roster index of each member of U1, ascending."""
        return {node: self.attempt.roster.index(node) for node in self.readys}

    @functools.cached_property
    def places(self) -> dict[NodeId, int]:
        """Place of each member within U1, from 0: where its leaves stand in a DEAL's trees."""
        return {node: place for place, node in enumerate(self.readys)}


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The DEALs of all of U1 and the checkpoint are known; so is ctx."""

    started: Started
    deals: dict[NodeId, Deal]  # in roster order
    ctx: Digest

    @property
    def rks(self) -> dict[int, bytes]:
        """RK public of each member of U1 by roster index."""
        return {self.started.indices[node]: deal.rk for node, deal in self.deals.items()}


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A survivor list that may be committed to."""

    agreed: Agreed
    headers: dict[NodeId, Upload]  # in roster order
    digest: Digest  # H(U3)

    @property
    def lost(self) -> tuple[NodeId, ...]:
        """Members of U1 whose vector is not in the sum."""
        return tuple(node for node in self.agreed.deals if node not in self.headers)

    def kind_for(self, node: NodeId) -> Kind:
        """The one kind of share that may be revealed of ``node``."""
        return Kind.SEED if node in self.headers else Kind.KEY


def _fail(message: str, clause: str, culprit: NodeId | None = None) -> CheckFailedError:
    return CheckFailedError(message, clause=clause, culprit=culprit)


def check_body(signed: Signed[B], attempt: Attempt) -> B:
    """A body signed by a member of the roster, for this very attempt.

    Raises:
        NotListedError: the sender is not on the roster.
        BadSignatureError: it did not sign this.
        CheckFailedError: it speaks of another federation, round or attempt (2.3).
    """
    body = signed.check(attempt.roster)
    want = (attempt.federation, attempt.round, attempt.number)
    if (body.federation, body.round, body.attempt) != want:
        raise _fail(
            f"{body.node} speaks of {body.federation}, round {body.round}, attempt {body.attempt};"
            f" this is {attempt.federation}, {attempt}",
            "2.3",
        )
    return body


def check_ready(signed: Signed[Ready], attempt: Attempt) -> Ready:
    """A READY of somebody who goes by the same plan, model and roster.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: see ``check_body``; or it names other
            terms (3.2).
    """
    ready = check_body(signed, attempt)
    for what, theirs, ours in (
        ("roster", ready.roster_root, attempt.roster.root),
        ("model", ready.model_root, attempt.model_root),
        ("plan", ready.plan_digest, attempt.plan_digest),
    ):
        if theirs != ours:
            raise _fail(
                f"{ready.node} goes by {what} {theirs:.12}..., not {ours:.12}...",
                "3.2",
                ready.node,
            )
    return ready


def check_start(start: Start, attempt: Attempt) -> Started:
    """U1: enough valid READYs with distinct keys.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 3.2, 3.4, 3.5.
    """
    least = attempt.terms.least_survivors
    if len(start.readys) < least:
        raise _fail(f"START lists {len(start.readys)} nodes, at least {least} are needed", "3.4")
    readys = {signed.body.node: check_ready(signed, attempt) for signed in start.readys}
    _check_distinct([(node, ready.ek) for node, ready in readys.items()], "EK", "3.5")
    return Started(attempt=attempt, readys=readys, ctx_deal=start.ctx_deal(attempt))


def _check_distinct(keys: Sequence[tuple[NodeId, bytes]], what: str, clause: str) -> None:
    seen: dict[bytes, NodeId] = {}
    for node, key in keys:
        if key in seen:
            raise _fail(f"{seen[key]} and {node} use the same {what}", clause)
        seen[key] = node


def check_deal(signed: Signed[Deal], started: Started) -> Deal:
    """A DEAL of a member of U1, bound to this START.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 4.1.
    """
    deal = check_body(signed, started.attempt)
    if deal.node not in started.readys:
        raise _fail(f"{deal.node} is not in U1 and dealt all the same", "4.1", deal.node)
    if deal.ctx_deal != started.ctx_deal:
        raise _fail(
            f"{deal.node} dealt on another context: it was shown another START", "4.1", deal.node
        )
    return deal


def check_deals(deals: Sequence[Signed[Deal]], started: Started, checkpoint: bytes) -> Agreed:
    """The DEALs of exactly U1, with distinct keys.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 4.1, 4.3, 4.4.
    """
    found = {signed.body.node: check_deal(signed, started) for signed in deals}
    if list(found) != list(started.readys) or len(found) != len(deals):
        missing = sorted(started.readys.keys() - found.keys())
        raise _fail(f"the DEALs are not those of U1; missing {missing}", "4.4")
    eks = [(node, ready.ek) for node, ready in started.readys.items()]
    _check_distinct([*eks, *((node, deal.rk) for node, deal in found.items())], "RK or EK", "4.3")
    ctx = ctx_of(started.ctx_deal, [deal.to_bytes() for deal in found.values()], checkpoint)
    return Agreed(started=started, deals=found, ctx=ctx)


def packet_leaf(dealer: int, to: int, sealed: bytes) -> bytes:
    """Leaf hash of one packet under ``packets_root``."""
    return leaf_hash(hash_fields("minga/packet-leaf/v1", u16(dealer), u16(to), sealed))


def packet_leaves(dealer: NodeId, sealed: dict[NodeId, bytes], started: Started) -> list[bytes]:
    """Leaves of ``packets_root``: one for each member of U1 in order, empty for the dealer."""
    own = started.indices[dealer]
    return [packet_leaf(own, to, sealed.get(node, b"")) for node, to in started.indices.items()]


def check_bundle(bundle: DealBundle, started: Started) -> Deal:
    """A DEAL with exactly the packets it is signed for.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 4.1, 4.2.
    """
    deal = check_deal(bundle.deal, started)
    sealed = {packet.to: packet.sealed for packet in bundle.packets}
    if sealed.keys() != started.readys.keys() - {deal.node}:
        raise _fail(f"{deal.node} must deal one packet to each other member of U1", "4.2")
    root = tree_root(packet_leaves(deal.node, sealed, started)).hex()
    if root != deal.packets_root:
        raise _fail(f"the packets of {deal.node} are not the ones it signed", "4.2")
    return deal


def check_deal_ok(signed: Signed[DealOk], agreed: Agreed) -> DealOk:
    """A DEAL_OK of a member of U1 on this ctx.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 4.8.
    """
    ok = check_body(signed, agreed.started.attempt)
    if ok.node not in agreed.deals:
        raise _fail(f"{ok.node} is not in U1", "4.8", ok.node)
    if ok.ctx != agreed.ctx:
        raise _fail(f"{ok.node} was shown other DEALs or another checkpoint", "4.8")
    return ok


def check_go(go: Go, agreed: Agreed) -> None:
    """Every member of U1 is on this ctx.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 4.8.
    """
    found = {check_deal_ok(signed, agreed).node for signed in go.deal_oks}
    if found != agreed.deals.keys():
        missing = sorted(agreed.deals.keys() - found)
        raise _fail(f"GO lacks the DEAL_OK of {missing}", "4.8")


def check_header(signed: Signed[Upload], agreed: Agreed) -> Upload:
    """An upload header of a member of U1 on this ctx.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 6.1.
    """
    header = check_body(signed, agreed.started.attempt)
    if header.node not in agreed.deals:
        raise _fail(f"{header.node} is not in U1 and uploaded all the same", "6.1", header.node)
    if header.ctx != agreed.ctx:
        raise _fail(f"the upload of {header.node} is masked for another context", "6.1")
    return header


def check_survivors(survivors: Survivors, agreed: Agreed) -> Listed:
    """U3: valid headers of enough members of U1, all of one length.

    The noise clause of a private round needs no check of its own: noise is calibrated to
    ``min_surviving``, and no shorter list passes (6.3).

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 6.1, 6.3, 6.6.
    """
    terms = agreed.started.attempt.terms
    size = len(survivors.headers)
    if size < terms.least_survivors or size - terms.colluders < 2:
        raise _fail(
            f"the survivor list has {size} nodes, at least {terms.least_survivors} are needed",
            "6.3",
        )
    headers = {signed.body.node: check_header(signed, agreed) for signed in survivors.headers}
    if len({header.length for header in headers.values()}) != 1:
        raise _fail("the listed uploads are of different lengths", "6.6")
    digest = survivors_digest(agreed.ctx, [header.to_bytes() for header in headers.values()])
    return Listed(agreed=agreed, headers=headers, digest=digest)


def check_commit(signed: Signed[Commit], listed: Listed) -> Commit:
    """A COMMIT of a survivor to exactly this list.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 7.1.
        EquivocationError: it commits to another list of the same round.
    """
    agreed = listed.agreed
    commit = check_body(signed, agreed.started.attempt)
    if commit.node not in listed.headers:
        raise _fail(f"{commit.node} is no survivor and cannot commit", "7.1", commit.node)
    if (commit.ctx, commit.survivors) != (agreed.ctx, listed.digest):
        raise EquivocationError(f"{commit.node} committed to another survivor list")
    return commit


def check_commit_certificate(certificate: CommitCertificate, listed: Listed) -> None:
    """At least t survivors committed to exactly this list.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError, EquivocationError: 2.3, 7.1.
    """
    found = {check_commit(signed, listed).node for signed in certificate.commits}
    need = listed.agreed.started.attempt.terms.threshold
    if len(found) < need:
        raise _fail(f"{len(found)} survivors committed, {need} are needed", "7.1")


def check_abort(signed: Signed[Abort], attempt: Attempt) -> Abort:
    """An ABORT of this attempt by a member of the roster.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 9.6.
    """
    abort = check_body(signed, attempt)
    if abort.roster_root != attempt.roster.root:
        raise _fail(f"{abort.node} aborted under another roster", "9.6", abort.node)
    return abort


def check_abort_certificate(certificate: AbortCertificate, attempt: Attempt) -> None:
    """At least t members aborted: no sum of this attempt can ever be opened.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 9.6.
    """
    found = {check_abort(signed, attempt).node for signed in certificate.aborts}
    if len(found) < attempt.terms.threshold:
        raise _fail(f"{len(found)} members aborted, {attempt.terms.threshold} are needed", "9.6")


def check_reveal(signed: Signed[Reveal], listed: Listed) -> Reveal:
    """A survivor's shares: one for each member of U1, of the allowed kind, as they were dealt.

    Raises:
        NotListedError, BadSignatureError, CheckFailedError: 2.3, 7.2.
        BadShareError: a share is not the one its dealer committed to (8.1): the revealer's doing,
            for it confirmed with DEAL_OK that the right one had come.
    """
    agreed = listed.agreed
    started = agreed.started
    reveal = check_body(signed, started.attempt)
    who = reveal.node
    if who not in listed.headers:
        raise _fail(f"{who} is no survivor and may not reveal", "7.2", who)
    if (reveal.ctx, reveal.survivors) != (agreed.ctx, listed.digest):
        raise _fail(f"{who} reveals for another survivor list", "7.2", who)
    if [share.of for share in reveal.shares] != list(agreed.deals):
        raise _fail(f"{who} must reveal exactly one share for each member of U1", "7.2", who)
    for share in reveal.shares:
        want = listed.kind_for(share.of)
        if share.kind is not want:
            raise BadShareError(
                f"{who} reveals the {share.kind} share of {share.of}; only {want} may be revealed",
                clause="7.2",
                culprit=who,
            )
        check_opening(
            share.opening,
            started.ctx_deal,
            dealer=share.of,
            dealer_index=started.indices[share.of],
            to=started.indices[who],
            place=started.places[who],
            ready=len(started.readys),
            kind=share.kind,
            share_root=agreed.deals[share.of].share_root,
            culprit=who,
            clause="8.1",
        )
    return reveal
