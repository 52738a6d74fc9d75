"""What the questions are answered from: the tree, the leaves that hold, and documents beside them.

``gather`` checks in this order and stops reading leaves at the first that does not hold, because
every later one rests on it:

    1. the tree (``tree.check_tree``): checkpoint, quorum, tiles, root, archive;
    2. each leaf in turn (``replay.Replay.take``): canonical form, signature by a key in force at
       that index, its signer's chain, its kind and who may say it, and where in a round it may
       stand: one plan, ready set within the joins, survivors within the commits, thresholds;
    3. what its signer had seen of the log: the same tree;
    4. what a leaf alone cannot show: the plan it carries, who is enough, which model follows which.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from policies.audit.records import Fault, first_fault
from policies.audit.replay import Replay, Taken
from policies.audit.rounds import AttemptState, RoundState
from policies.audit.signed import SignedHistory
from policies.audit.tree import Tree
from policies.consortium import ConsortiumPolicy
from protocols.canonical import canonical_bytes, parse_canonical, sha256_hex
from protocols.errors import FederationError, MalformedMessageError
from protocols.identifiers import Digest, RoundId, RunId
from protocols.plan import Plan
from protocols.tlog.kinds import (
    Genesis,
    Predicate,
    RoundAggregate,
    RoundPlan,
    RoundStart,
    parse_round_subject,
)

Documents = Callable[[Digest], bytes | None]  # by SHA-256, or by the root of 4 MiB units


def no_documents(_: Digest) -> bytes | None:
    """Nothing beside the log is at hand."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A log as far as it holds."""

    tree: Tree
    taken: tuple[Taken, ...]  # leaves that hold, from 0
    replay: Replay  # after them
    rounds: Mapping[RoundId, RoundState]  # by run and number
    faults: tuple[Fault, ...]  # in the order of the checks
    anchored: bool  # the trust policy came from outside the log
    documents: Documents = field(repr=False)  # by SHA-256
    blobs: Documents = field(repr=False)  # by unit root
    plans: Mapping[Digest, Plan]  # by SHA-256 of the plan leaf's subject
    now: int  # Unix seconds
    signed: SignedHistory | None = None  # None: no first root is at hand

    @property
    def policy(self) -> ConsortiumPolicy | None:
        """The signed policy, the newest."""
        return self.signed.policy if self.signed else None

    def policy_at(self, index: int) -> ConsortiumPolicy | None:
        """The signed policy that was in force when leaf ``index`` came."""
        if self.signed is None:
            return None
        _, after = self.tree.written_between(index)
        claimed = self.taken[index].statement.time
        at = datetime.fromtimestamp(after, UTC) if after is not None else claimed
        return self.signed.policy_at(index, at)

    @property
    def first(self) -> Fault | None:
        """The first bad place."""
        return first_fault(self.faults)

    def plan_of(self, state: RoundState) -> Plan | None:
        """The plan itself, where it is at hand."""
        return self.plans.get(state.plan_sha256)

    def of(self, kind: type[Predicate]) -> Iterable[Taken]:
        """All leaves of one kind."""
        return (taken for taken in self.taken if isinstance(taken.said, kind))

    def by_hash(self) -> dict[Digest, Taken]:
        """Leaves by leaf hash."""
        return {taken.leaf.hash: taken for taken in self.taken}


def released(state: RoundState) -> AttemptState | None:
    """The attempt whose sum was opened."""
    return next((a for a in state.attempts if a.aggregate is not None), None)


def ended(state: RoundState) -> bool:
    """Whether nothing of the round may follow but verdicts."""
    return state.ended is not None or any(a.closed_at is not None for a in state.attempts)


def gather(
    tree: Tree,
    entries: Iterable[bytes],
    *,
    documents: Documents,
    blobs: Documents,
    anchored: bool,
    now: int,
    replay: Replay | None = None,
    signed: SignedHistory | None = None,
) -> Evidence:
    """Check the tree's leaves, as far as they hold.

    Args:
        tree: of the same entries.
        documents, blobs: what lies beside the log; each is hashed again here.
        anchored: the trust policy came from outside the log.
        now: Unix seconds.
        replay: a fresh one, if it is not the ordinary.
        signed: verifies what the admins published, and brings members' keys into force.
    """
    replay = replay or Replay()
    taken: list[Taken] = []
    faults = list(tree.faults)
    plans: dict[Digest, Plan] = {}
    lineage, gossip = _Lineage(), _Gossip(tree)
    for index, entry in enumerate(entries):
        try:
            leaf = replay.take(entry)
        except FederationError as error:
            faults.append(Fault.at(_check_of(error), index, f"{error} [{error.code}]"))
            break
        if signed is not None:
            faults += signed.take(leaf, replay)
        faults += gossip.take(leaf)
        faults += _time(tree, leaf)
        if isinstance(leaf.said, Genesis) and signed is not None:
            faults += _same_root(leaf.said, signed.root)
        if isinstance(leaf.said, RoundPlan):
            faults += _read_plan(leaf, documents, plans)
        faults += lineage.take(leaf, replay, plans)
        taken.append(leaf)
    if signed is not None:
        faults += signed.settle(replay)
    return Evidence(
        tree=tree,
        taken=tuple(taken),
        replay=replay,
        rounds=dict(sorted(replay.rounds.items())),
        faults=tuple(faults),
        anchored=anchored,
        documents=documents,
        blobs=blobs,
        plans=plans,
        now=now,
        signed=signed,
    )


def _same_root(said: Genesis, root: bytes) -> Iterable[Fault]:
    """The log began under the first root that the auditor goes by."""
    if said.tuf_root_sha256 is not None and said.tuf_root_sha256 != sha256_hex(root):
        yield Fault.at("policy", 0, "the log rests on another first root than the one given")


_CHECKS = {
    "malformed": "entry",
    "bad_signature": "signature",
    "leaf_chain": "chain",
    "leaf_refused": "order",
}


def _check_of(error: FederationError) -> str:
    return _CHECKS.get(error.code, error.code)


@dataclass(slots=True)
class _Gossip:
    """What signers had seen of the log, leaf by leaf."""

    tree: Tree
    agreed: set[int] = field(default_factory=set)  # sizes at which somebody saw this very log
    told: set[int] = field(default_factory=set)  # sizes of which a difference was reported

    def take(self, taken: Taken) -> Iterable[Fault]:
        """The head that a signer had accepted is one of this log, and older than the leaf."""
        seen = taken.statement.seen
        if seen.size > taken.index:
            yield Fault.at("seen", taken.index, f"its signer had seen {seen.size} leaves before it")
        elif hmac.compare_digest(self.tree.root(seen.size), seen.root):
            self.agreed.add(seen.size)
        elif seen.size not in self.told:
            self.told.add(seen.size)
            good = self.agreed | {head.size for head in self.tree.heads}
            yield Fault(
                check="seen",
                first=max((size for size in good if size < seen.size), default=0),
                stop=seen.size,
                reason=f"{taken.holder.name} had seen another log of {seen.size} leaves"
                f" when it signed leaf {taken.index}",
            )


_AHEAD_S = 300  # how far a signer's clock may be ahead of the witnesses'


def _time(tree: Tree, taken: Taken) -> Iterable[Fault]:
    """Nobody signs later than the witnesses saw it. Earlier is ordinary: a leaf may wait."""
    _, after = tree.written_between(taken.index)
    claimed = int(taken.statement.time.timestamp())
    if after is not None and claimed > after + _AHEAD_S:
        reason = f"it claims to be {claimed - after} s younger than a checkpoint that covers it"
        yield Fault.at("time", taken.index, reason)


def _read_plan(taken: Taken, documents: Documents, plans: dict[Digest, Plan]) -> Iterable[Fault]:
    """The plan that a leaf carries or names, and what the leaf repeats of it."""
    said = taken.said
    assert isinstance(said, RoundPlan)  # noqa: S101 - the caller looked
    digest = taken.statement.digest
    if digest not in plans:
        try:
            found = canonical_bytes(said.plan) if said.plan is not None else documents(digest)
            if found is None:
                return
            plan = Plan.from_value(parse_canonical(found))
            if plan.to_bytes() != found:
                # Another version of this program wrote it, with other fields: not at hand here.
                return
            plans[digest] = plan
        except MalformedMessageError as error:
            yield Fault.at("plan", taken.index, str(error))
            return
    plan = plans[digest]
    secagg = plan.secagg
    for what, mine, theirs in (
        ("run", plan.run, said.run),
        ("digest", plan.digest, said.plan_digest),
        ("mode", plan.mode, said.mode),
        ("threshold", secagg and secagg.threshold, said.secagg and said.secagg.t),
        ("least survivors", secagg and secagg.min_surviving, said.secagg and said.secagg.m_min),
    ):
        if mine != theirs:
            yield Fault.at("plan", taken.index, f"its {what} is {theirs}, the plan's {mine}")
    if said.index >= plan.total_rounds:
        yield Fault.at(
            "plan", taken.index, f"it opens round {said.index + 1} of {plan.total_rounds}"
        )


@dataclass(slots=True)
class _Run:
    round: RoundId
    index: int  # of the plan's rounds
    model: Digest  # that the round starts from
    out: Digest | None = None  # where it was released


@dataclass(slots=True)
class _Lineage:
    """Which model follows which, and how many are enough."""

    runs: dict[RunId, _Run] = field(default_factory=dict)

    def take(self, taken: Taken, replay: Replay, plans: Mapping[Digest, Plan]) -> Iterable[Fault]:
        said = taken.said
        if isinstance(said, RoundPlan):
            yield from self._opened(taken, said, replay, plans)
        elif isinstance(said, RoundStart):
            plan = plans.get(taken.statement.digest)
            least = _least_ready(plan) if plan else 0
            if len(said.ready) < least:
                reason = f"an attempt of {len(said.ready)} nodes, the plan asks for {least}"
                yield Fault.at("threshold", taken.index, reason)
        elif isinstance(said, RoundAggregate):
            _, round_ = parse_round_subject(taken.statement.subject)
            plan = plans.get(taken.statement.digest)
            least = _least_survivors(plan) if plan else 1
            if said.survivors < least:
                reason = f"a sum over {said.survivors} nodes, the plan asks for {least}"
                yield Fault.at("threshold", taken.index, reason)
            run = self.runs.get(round_.run)
            if run is not None and run.round == round_:
                run.out = Digest(said.model_out)

    def _opened(
        self, taken: Taken, said: RoundPlan, replay: Replay, plans: Mapping[Digest, Plan]
    ) -> Iterable[Fault]:
        _, round_ = parse_round_subject(taken.statement.subject)
        last = self.runs.get(round_.run)
        plan = plans.get(taken.statement.digest)
        if last is None:
            want, index, number = plan and plan.model.initial, 0, 0
        else:
            number = last.round.number + 1
            want = last.out or last.model
            index = last.index + (1 if last.out else 0)
            state = replay.rounds[last.round]
            if last.out is None and not ended(state) and not _given_up(state):
                yield Fault.at(
                    "order", taken.index, f"round {round_} opens while {last.round} is under way"
                )
            if state.plan_sha256 != taken.statement.digest:
                yield Fault.at("plan", taken.index, f"run {round_.run} goes on under another plan")
        if round_.number != number:
            yield Fault.at(
                "order", taken.index, f"round {round_} opens where round {number} is due"
            )
        if said.index != index:
            yield Fault.at(
                "lineage", taken.index, f"it is the plan's round {said.index}, {index} is due"
            )
        if want and said.model_in != want:
            reason = f"round {round_} starts from {said.model_in[:12]}…, due is {want[:12]}…"
            yield Fault.at("lineage", taken.index, reason)
        self.runs[round_.run] = _Run(round=round_, index=said.index, model=Digest(said.model_in))


def _given_up(state: RoundState) -> bool:
    """The last attempt was aborted; whether another follows was the coordinator's choice."""
    return state.attempt is not None and state.attempt.aborted is not None


def _least_ready(plan: Plan) -> int:
    return max(plan.min_participants, _least_survivors(plan))


def _least_survivors(plan: Plan) -> int:
    if plan.secagg is None:
        return 1
    return max(plan.secagg.threshold, plan.secagg.min_surviving)


def with_faults(evidence: Evidence, faults: Iterable[Fault]) -> Evidence:
    """The same with what was found later."""
    return replace(evidence, faults=(*evidence.faults, *faults))
