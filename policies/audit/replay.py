"""Reading a log from its first leaf: who could sign what at each index, and what it adds up to.

``Replay.take`` takes one entry after another, in order. It checks, in this order,

1. the entry is a leaf (``leaf.open_leaf``), signed by a key that is in force at this index,
2. it extends its signer's chain,
3. its fields are those of its kind (``kinds``), and its signer has a role that may say them,
4. it may stand here (``rounds.after`` for a round; certificates need a request),

and changes nothing unless all hold. The keys come from the log itself: the coordinator's, the
operators' and the auditors' from ``log.genesis``; a node's from its ``enrol.request`` once the
authority's ``cert.issued`` says whose key it is. Admins' and institutions' keys come with the
``tuf.published`` leaf of a timestamp (``speakers``): in force from the next leaf on, until another
such leaf leaves them out. That they are those of the signed documents is what an auditor checks.

The caller compares ``root`` with a checkpoint; without that, what was read is hearsay.
Normative text: protocols/spec/log.md, section 12.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from policies.audit import approvals, rounds
from policies.audit.rounds import LeafRefusedError, RoundState
from policies.bodies import HEARING, heard_by
from policies.releases import Reported
from protocols.canonical import parse_canonical
from protocols.crypto.identity import parse_spiffe_uri
from protocols.crypto.signatures import BadSignatureError, Context, verify
from protocols.errors import FederationError, MalformedMessageError
from protocols.identifiers import Digest, FederationId, RoundId
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.frontier import Frontier
from protocols.tlog.kinds import (
    Ballot,
    CertIssued,
    EnrolRequest,
    EvalReport,
    Genesis,
    Incident,
    LogClosed,
    MemberStatement,
    Predicate,
    Role,
    RoundPlan,
    RoundStart,
    RunRequest,
    Speakers,
    TufPublished,
    is_about_round,
    parse_round_subject,
    predicate_of,
)
from protocols.tlog.leaf import (
    MAX_LEAF,
    ChainHead,
    KeyId,
    Leaf,
    Statement,
    extend_chain,
    key_id_of,
    open_leaf,
)
from protocols.tlog.note import VerifierKey
from protocols.tlog.text import decode_base64
from protocols.tlog.trust_policy import TrustPolicy, least_quorum

__all__ = ["Holder", "LeafRefusedError", "Replay", "Taken", "witness_policy"]

OWN_NAME: Final = ("node", "institution", "evaluator")  # fields that must name the signer


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Whose key it is, and what for."""

    role: Role
    name: str
    public_key: bytes  # 32 bytes, Ed25519
    since: int  # index from which it counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A leaf that was checked."""

    index: int
    leaf: Leaf
    said: Predicate
    holder: Holder

    @property
    def statement(self) -> Statement:
        """What was signed."""
        return self.leaf.statement


@dataclass(frozen=True, slots=True, kw_only=True)
class _Requested:
    index: int
    said: EnrolRequest
    certified: Digest | None = None  # spki of the certificate that answered it


class _PublicKeys(Mapping[KeyId, bytes]):
    """The keys of some holders, without a copy for each leaf."""

    def __init__(self, holders: Mapping[KeyId, Holder]) -> None:
        self._holders = holders

    def __getitem__(self, key: KeyId) -> bytes:
        return self._holders[key].public_key

    def __iter__(self) -> Iterator[KeyId]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


class Replay:
    """The state of a log after ``size`` leaves. ``copy`` it to try leaves out."""

    def __init__(self) -> None:
        self.frontier = Frontier()
        self.genesis: Genesis | None = None
        self.closed: LogClosed | None = None
        self.holders: dict[KeyId, Holder] = {}
        self.chains: dict[KeyId, ChainHead] = {}
        self.requests: dict[Digest, _Requested] = {}  # by leaf hash
        self.witnesses: dict[str, VerifierKey] = {}  # of nodes, by node
        self.rounds: dict[RoundId, RoundState] = {}
        # Digests of trust metadata by role and version: more than one is two stories.
        self.published: dict[tuple[str, int], frozenset[Digest]] = {}
        self.published_at: dict[tuple[str, int], datetime] = {}  # the first leaf's own time, UTC
        self.clock: datetime | None = None  # the latest time of a leaf of the coordinator, UTC
        self.reports: tuple[Reported, ...] = ()  # evaluations of models
        self.said: dict[str, datetime] = {}  # members that spoke on their hearing, UTC
        self.called: dict[str, datetime] = {}  # members that an admin called to be heard, UTC
        self.trees: dict[tuple[RoundId, int], tuple[int, bytes]] = {}  # at each round.start
        self.speakers: Speakers | None = None  # as named last; None: never

    def copy(self) -> Replay:
        """Another one that starts from the same state."""
        twin = Replay()
        twin.frontier, twin.genesis, twin.closed = self.frontier, self.genesis, self.closed
        twin.holders, twin.chains = dict(self.holders), dict(self.chains)
        twin.requests, twin.witnesses = dict(self.requests), dict(self.witnesses)
        twin.rounds, twin.trees = dict(self.rounds), dict(self.trees)
        twin.published, twin.speakers = dict(self.published), self.speakers
        twin.published_at = dict(self.published_at)
        twin.clock, twin.reports = self.clock, self.reports
        twin.said, twin.called = dict(self.said), dict(self.called)
        return twin

    @property
    def size(self) -> int:
        """Leaves taken."""
        return self.frontier.size

    @property
    def root(self) -> bytes:
        """Root over them, 32 bytes."""
        return self.frontier.root

    @property
    def federation(self) -> FederationId | None:
        """Whose log it is."""
        return FederationId(self.genesis.federation) if self.genesis else None

    def keys(self) -> dict[KeyId, bytes]:
        """The keys in force for the next leaf."""
        return {key: holder.public_key for key, holder in self.holders.items()}

    def admit(self, role: Role, name: str, public_key: bytes) -> None:
        """Bring a key into force from the next leaf on: for a signed membership.

        Raises:
            MalformedMessageError: no key, or one that stands for somebody else.
        """
        key = key_id_of(public_key)
        known = self.holders.get(key)
        if known is not None and (known.role, known.name) != (role, name):
            raise MalformedMessageError(f"the key of {role} {name} is that of {known.name}")
        if known is None:
            self.holders[key] = Holder(role=role, name=name, public_key=public_key, since=self.size)

    def retire(self, role: Role, name: str, *, keep: KeyId | None = None) -> None:
        """Take somebody's keys out of force from the next leaf on; all but ``keep``."""
        gone = [k for k, h in self.holders.items() if (h.role, h.name) == (role, name)]
        for key in gone:
            if key != keep:
                del self.holders[key]
        if role is Role.NODE and keep is None:
            self.witnesses.pop(name, None)

    def take(self, entry: bytes) -> Taken:
        """Take the next leaf.

        Raises:
            MalformedMessageError, BadSignatureError, BrokenChainError: steps 1 and 2.
            LeafRefusedError: steps 3 and 4. Nothing was changed.
        """
        index = self.size
        if self.closed is not None:
            raise LeafRefusedError("log.closed", f"leaf {index} after the log was closed")
        leaf, holder = self._open(entry)
        chain = extend_chain(self.chains.get(leaf.signer), leaf)
        if chain == self.chains.get(leaf.signer):
            raise LeafRefusedError("log.repeated", f"leaf {index} stands in the log before")
        said = predicate_of(leaf.statement)
        if holder.role not in said.SIGNERS:
            raise LeafRefusedError(
                "log.signer", f"{said.KIND} is not for a {holder.role} ({holder.name}) to sign"
            )
        self._own_name(said, holder)
        if isinstance(said, Ballot) and holder.role is Role.COORDINATOR and said.approval is None:
            raise LeafRefusedError("log.signer", "the coordinator has no vote of its own")
        taken = Taken(index=index, leaf=leaf, said=said, holder=holder)
        self._apply(taken)
        if holder.role is Role.COORDINATOR:
            self.clock = max(self.clock or leaf.statement.time, leaf.statement.time)
        self.chains[leaf.signer] = chain
        self.frontier = self.frontier.extend([bytes.fromhex(leaf.hash)])
        if isinstance(said, RoundStart):
            _, round_ = parse_round_subject(leaf.statement.subject)
            self.trees[round_, said.attempt] = (self.size, self.root)
        return taken

    def bound_checkpoint(self, round_: RoundId, attempt: int) -> bytes | None:
        """What a secure sum binds: the text of the tree that ends with the attempt's round.start.

        Everybody who read the log up to there has the same bytes, whichever checkpoint showed it.
        None: the attempt has not begun.
        """
        tree = self.trees.get((round_, attempt))
        if tree is None or self.genesis is None:
            return None
        size, root = tree
        return Checkpoint(origin=self.genesis.origin, size=size, root=root).to_text().encode()

    # -- step 1 --------------------------------------------------------------------------------

    def _open(self, entry: bytes) -> tuple[Leaf, Holder]:
        """The leaf and whose key signed it.

        Two kinds bring their own key: the first leaf of a log, whose place under the anchored
        log key vouches for it, and a node's first request, which proves possession only.
        """
        if self.size == 0:
            said = _said(entry)
            if not isinstance(said, Genesis):
                raise LeafRefusedError("log.genesis", "the first leaf is not log.genesis")
            key = bytes.fromhex(said.coordinator_key)
            holder = Holder(role=Role.COORDINATOR, name="coordinator", public_key=key, since=0)
            return open_leaf(entry, {key_id_of(key): key}), holder
        try:
            leaf = open_leaf(entry, _PublicKeys(self.holders))
            return leaf, self.holders[leaf.signer]
        except BadSignatureError:
            said = _said(entry)
            if not isinstance(said, EnrolRequest) or said.institution != said.node:
                raise
            key = bytes.fromhex(said.signing_key)
            if key_id_of(key) in self.holders:
                raise
            holder = Holder(role=Role.NODE, name=said.node, public_key=key, since=self.size)
            return open_leaf(entry, {key_id_of(key): key}), holder

    def _own_name(self, said: Predicate, holder: Holder) -> None:
        if holder.role not in (Role.NODE, Role.INSTITUTION):
            return
        for name in OWN_NAME:
            value = getattr(said, name, holder.name)
            if value != holder.name:
                raise LeafRefusedError("log.name", f"{holder.name} speaks as {value}")

    # -- step 4 --------------------------------------------------------------------------------

    def _apply(self, taken: Taken) -> None:
        said = taken.said
        if is_about_round(said.KIND):
            self._round(taken)
        elif isinstance(said, Genesis):
            self._begin(said, taken)
        elif isinstance(said, EnrolRequest):
            self.requests[taken.leaf.hash] = _Requested(index=taken.index, said=said)
        elif isinstance(said, CertIssued):
            self._certify(said)
        elif isinstance(said, TufPublished):
            name = (said.role, said.version)
            self.published[name] = self.published.get(name, frozenset()) | {Digest(said.sha256)}
            self.published_at.setdefault(name, taken.statement.time)
            if said.speakers is not None:
                self._hear(said.speakers)
        elif isinstance(said, LogClosed):
            self.closed = said
        else:
            self._hearing(taken)
            if isinstance(said, EvalReport):
                by = f"{taken.holder.role.value}/{taken.holder.name}"
                if taken.holder.role in (Role.NODE, Role.INSTITUTION):
                    by = taken.holder.name  # a member is one evaluator, whichever key it uses
                self.reports += (Reported(leaf=taken.leaf.hash, by=by, said=said),)

    def _hearing(self, taken: Taken) -> None:
        """What speaks of a hearing; the first counts: ``policies.bodies`` decides what follows."""
        said, at, by = taken.said, taken.statement.time, taken.holder.role
        if self.clock is not None:
            at = max(at, self.clock)  # whoever dates a leaf back gains nothing
        if isinstance(said, MemberStatement) and said.topic == HEARING and by is Role.INSTITUTION:
            self.said.setdefault(said.institution, at)
        if isinstance(said, Incident) and said.klass == HEARING and by is Role.ADMIN:
            self.called.setdefault(said.code, at)

    def heard(self, name: str, at: datetime) -> bool:
        """Whether the log shows that a member was heard by this time (UTC)."""
        return heard_by(self.said, self.called, name, at)

    def _begin(self, said: Genesis, taken: Taken) -> None:
        if taken.index != 0:
            raise LeafRefusedError("log.genesis", f"a second log.genesis at leaf {taken.index}")
        log = VerifierKey.parse(said.log_vkey)
        if log.name != said.origin:
            raise LeafRefusedError("log.genesis", "the log's key is not named like its origin")
        self.genesis = said
        self.holders[taken.leaf.signer] = taken.holder
        for name, key in said.operator_keys.items():
            self.admit(Role.OPERATOR, name, bytes.fromhex(key))

    def _hear(self, speakers: Speakers) -> None:
        """Bring these keys into force for admins and institutions, and all others out of it.

        A key that the log knows as somebody else's stays that one's.
        """
        self.speakers = speakers
        named = ((Role.ADMIN, speakers.admin), (Role.INSTITUTION, speakers.institution))
        wanted = {
            key_id_of(raw): Holder(role=role, name=name, public_key=raw, since=self.size)
            for role, names in named
            for name, keys in names.items()
            for raw in map(bytes.fromhex, keys)
        }
        for key, holder in list(self.holders.items()):
            if holder.role not in (Role.ADMIN, Role.INSTITUTION):
                wanted.pop(key, None)
                continue
            new = wanted.get(key)
            if new is None:
                del self.holders[key]
            elif (new.role, new.name) == (holder.role, holder.name):
                del wanted[key]
        self.holders.update(wanted)

    def _certify(self, said: CertIssued) -> None:
        if self.genesis is None:
            raise LeafRefusedError("log.genesis", "a certificate before log.genesis")
        try:
            whom = parse_spiffe_uri(said.uri, FederationId(self.genesis.federation))
        except MalformedMessageError as error:
            raise LeafRefusedError("log.certificate", str(error)) from None
        if said.request is None:
            if whom.role == "node":
                raise LeafRefusedError("log.certificate", f"{whom} was certified unasked")
            return
        asked = self.requests.get(Digest(said.request))
        if asked is None:
            raise LeafRefusedError("log.certificate", f"{whom}: the request is not in the log")
        if (whom.role, whom.name) != ("node", asked.said.node) or (
            said.spki_sha256 != asked.said.spki_sha256
        ):
            raise LeafRefusedError(
                "log.certificate", f"{whom}: the certificate is not what was requested"
            )
        self._check_new_key(asked.said)
        self._check_approval(asked.said)
        self.requests[Digest(said.request)] = replace(asked, certified=Digest(said.spki_sha256))
        public = bytes.fromhex(asked.said.signing_key)
        self.retire(Role.NODE, asked.said.node, keep=key_id_of(public))
        self.admit(Role.NODE, asked.said.node, public)
        if asked.said.witness_vkey is not None:
            self.witnesses[asked.said.node] = VerifierKey.parse(asked.said.witness_vkey)
        else:
            self.witnesses.pop(asked.said.node, None)

    def _check_new_key(self, said: EnrolRequest) -> None:
        known = self.holders.get(key_id_of(bytes.fromhex(said.signing_key)))
        if known is not None and (known.role, known.name) != (Role.NODE, said.node):
            raise LeafRefusedError("log.certificate", f"{said.node} enrols the key of {known.name}")
        if said.witness_vkey is None or self.genesis is None:
            return
        raw = VerifierKey.parse(said.witness_vkey).public_key
        others = [key for node, key in self.witnesses.items() if node != said.node]
        others += [VerifierKey.parse(vkey) for vkey in self.genesis.witnesses]
        others.append(VerifierKey.parse(self.genesis.log_vkey))
        if raw in {key.public_key for key in others}:
            raise LeafRefusedError(
                "log.witness", f"{said.node} enrols a witness key that is somebody else's"
            )

    def _check_approval(self, said: EnrolRequest) -> None:
        """The institution vouches for the keys, once the log knows the institution's own.

        A renewal is asked for with a signing key that is in force already.
        """
        named = self.speakers.institution.get(said.node) if self.speakers else None
        if not named or self.genesis is None:
            return
        known = self.holders.get(key_id_of(bytes.fromhex(said.signing_key)))
        if said.approval is None and known is not None:
            return
        keys = [bytes.fromhex(key) for key in named]
        why = approvals.refusal(said, FederationId(self.genesis.federation), keys)
        if why is not None:
            raise LeafRefusedError("log.approval", f"{said.node} was certified, but {why}")

    def _round(self, taken: Taken) -> None:
        statement, said = taken.statement, taken.said
        federation, round_ = parse_round_subject(statement.subject)
        if federation != self.federation:
            raise LeafRefusedError("log.federation", f"a leaf about federation {federation}")
        state = self.rounds.get(round_)
        place = f"leaf {taken.index}, {said.KIND} of round {round_}"
        if state is None:
            if not isinstance(said, RoundPlan):
                raise LeafRefusedError("log.phase", f"{place}: the round has no plan leaf")
            self._check_request(said, statement.digest)
            last = RoundId(round_.run, max(0, round_.number - 1))
            self.rounds[round_] = rounds.opened(
                said,
                index=taken.index,
                leaf=taken.leaf.hash,
                digest=statement.digest,
                before=self.rounds.get(last),
            )
            return
        if statement.digest != state.plan_sha256:
            rule = "log.second_plan" if isinstance(said, RoundPlan) else "log.plan"
            raise LeafRefusedError(rule, f"{place}: it names another plan")
        try:
            self.rounds[round_] = rounds.after(state, said, index=taken.index, leaf=taken.leaf.hash)
        except LeafRefusedError as error:
            raise LeafRefusedError(error.rule, f"{place}: {error.why}") from None

    def _check_request(self, said: RoundPlan, plan: Digest) -> None:
        """An operator asked for this run: its signature is in the plan leaf."""
        if self.genesis is None or not self.genesis.operator_keys:
            return
        if said.request is None:
            raise LeafRefusedError("log.request", f"run {said.run}: no operator's request")
        body = said.request.body.encode()
        key = bytes.fromhex(said.request.key)
        holder = self.holders.get(key_id_of(key))
        if holder is None or holder.role is not Role.OPERATOR:
            raise LeafRefusedError("log.request", f"run {said.run}: not an operator's key")
        try:
            signature = decode_base64(said.request.signature, "the signature")
            verify(key, Context.RUN_REQUEST, body, signature)
            asked = RunRequest.from_bytes(body)
        except FederationError as error:
            raise LeafRefusedError("log.request", f"run {said.run}: {error}") from None
        if (asked.federation, asked.run, asked.plan_sha256) != (
            self.genesis.federation,
            said.run,
            plan,
        ):
            raise LeafRefusedError("log.request", f"run {said.run}: the request is for another")


def _said(entry: bytes) -> Predicate | None:
    found = peek(entry)
    return None if found is None else found[1]


def peek(entry: bytes) -> tuple[Statement, Predicate] | None:
    """What an entry says, unverified; None: nothing that could be read.

    Only to find the key that it must be verified with, or to compare it before it is.
    """
    try:
        top = parse_canonical(entry, limit=MAX_LEAF)
        payload = decode_base64(top["payload"], "the payload")
        statement = Statement.parse(payload)
        return statement, predicate_of(statement)
    except (MalformedMessageError, KeyError, TypeError, AttributeError):
        return None


def witness_policy(
    log: VerifierKey,
    nodes: Mapping[str, VerifierKey],
    auditors: Iterable[VerifierKey] = (),
) -> TrustPolicy:
    """The trust policy that a membership makes: 1 + floor(2n/3) of its witnesses, and all auditors.

    Args:
        log: the log's key, anchored at enrolment.
        nodes: witness keys by node, as ``Replay.witnesses`` has them.
        auditors: further witnesses, each of which must cosign.
    """
    return TrustPolicy.parse(policy_text(log, nodes, auditors))


def policy_text(
    log: VerifierKey,
    nodes: Mapping[str, VerifierKey],
    auditors: Iterable[VerifierKey] = (),
) -> bytes:
    """The file ``trust-policy.txt`` of that policy."""
    lines = [f"log {log.to_text()}"]
    lines += [f"witness {node} {key.to_text()}" for node, key in sorted(nodes.items())]
    named = {f"auditor.{place}": key for place, key in enumerate(auditors, start=1)}
    lines += [f"witness {name} {key.to_text()}" for name, key in named.items()]
    groups = []
    if nodes:
        lines.append(f"group committee {least_quorum(len(nodes))} {' '.join(sorted(nodes))}")
        groups.append("committee")
    if named:
        lines.append(f"group auditors all {' '.join(named)}")
        groups.append("auditors")
    match groups:
        case []:
            lines.append("quorum none")
        case [only]:
            lines.append(f"quorum {only}")
        case _:
            lines += [f"group everybody all {' '.join(groups)}", "quorum everybody"]
    return ("\n".join(lines) + "\n").encode()
