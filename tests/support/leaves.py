"""A log written by a small world: a coordinator, an operator and nodes, all with fixed keys.

``World.say`` signs a leaf as whoever acts and appends it; ``World.round`` plays a whole round.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from policies.audit.replay import Replay
from protocols.canonical import canonical_bytes, sha256_hex
from protocols.crypto.signatures import Context, public_bytes, sign
from protocols.identifiers import Digest, FederationId, RoundId, RunId
from protocols.tlog import kinds
from protocols.tlog.leaf import (
    FIRST_PREV,
    ChainHead,
    Seen,
    Statement,
    extend_chain,
    sign_leaf,
)
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.tlog.note import KeyType, SignerKey
from protocols.tlog.text import encode_base64

FEDERATION = FederationId("andes")
ORIGIN = "log.minga.example/andes/2026"
TIME = datetime(2026, 12, 1, 2, tzinfo=UTC)
NODES = ("ar-univ-1", "br-univ-1", "cl-univ-1", "mx-univ-1")
PLAN: dict[str, Any] = {"run": "r1", "roster": list(NODES)}
D = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b", "c", "m0", "m1")}


def key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def key_hex(name: str) -> str:
    return public_bytes(key(name)).hex()


def log_signer(origin: str = ORIGIN) -> SignerKey:
    return SignerKey(name=origin, type=KeyType.ED25519, seed=hashlib.sha256(b"log").digest())


def witness_signer(node: str) -> SignerKey:
    seed = hashlib.sha256(b"witness " + node.encode()).digest()
    name = f"witness.{node}.andes.minga.example/w1"
    return SignerKey(name=name, type=KeyType.ED25519_COSIGNATURE, seed=seed)


@dataclass
class World:
    """What was said so far."""

    nodes: tuple[str, ...] = NODES
    secure: bool = True
    witnesses: bool = True
    entries: list[bytes] = field(default_factory=list)
    heads: dict[str, ChainHead] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)

    # -- one leaf ------------------------------------------------------------------------------

    def statement(
        self, who: str, kind: str, fields: dict[str, Any], *, subject: str, digest: str
    ) -> Statement:
        head = self.heads.get(who)
        return Statement(
            kind=kind,
            subject=subject,
            digest=Digest(digest),
            seq=head.seq + 1 if head else 1,
            prev=head.leaf if head else FIRST_PREV,
            seen=Seen(size=0, root=EMPTY_ROOT),
            time=TIME,
            fields=fields,
        )

    def say(self, who: str, said: kinds.Predicate, *, subject: str = "", digest: str = "") -> bytes:
        """Sign a leaf and append it, whatever it says."""
        statement = self.statement(
            who,
            said.KIND,
            said.to_fields(),
            subject=subject or f"log/{said.KIND}",
            digest=digest or D["a"],
        )
        leaf = sign_leaf(statement, key(who))
        self.heads[who] = extend_chain(self.heads.get(who), leaf)
        self.entries.append(leaf.entry)
        self.hashes.append(leaf.hash)
        return leaf.entry

    def replay(self) -> Replay:
        """Everything said so far, checked."""
        state = Replay()
        for entry in self.entries:
            state.take(entry)
        return state

    # -- beginnings ----------------------------------------------------------------------------

    def genesis(self, **changes: Any) -> None:
        said = {
            "federation": FEDERATION,
            "origin": ORIGIN,
            "log_vkey": log_signer().verifier.to_text(),
            "coordinator_key": key_hex("coordinator"),
            "operator_keys": {"cenia": key_hex("operator")},
            "ca_sha256": D["c"],
        }
        self.say("coordinator", kinds.Genesis(**{**said, **changes}))

    def enrol(self, node: str, *, certify: bool = True) -> None:
        request = kinds.EnrolRequest(
            institution=node,
            node=node,
            signing_key=key_hex(node),
            witness_vkey=witness_signer(node).verifier.to_text() if self.witnesses else None,
            csr_sha256=D["a"],
            spki_sha256=sha256_hex(node.encode()),
        )
        self.say(node, request)
        if certify:
            self.certify(node)

    def certify(self, node: str, **changes: Any) -> None:
        said = {
            "certificate_sha256": D["b"],
            "spki_sha256": sha256_hex(node.encode()),
            "uri": f"spiffe://{FEDERATION}.minga.example/inst/{node}/node/1",
            "not_after": "2027-01-01T00:00:00Z",
            "request": self.hashes[-1],
        }
        self.say("coordinator", kinds.CertIssued(**{**said, **changes}))

    def begin(self) -> World:
        self.genesis()
        for node in self.nodes:
            self.enrol(node)
        return self

    # -- a round -------------------------------------------------------------------------------

    @property
    def plan_sha256(self) -> str:
        return sha256_hex(canonical_bytes(PLAN))

    def request(self, signer: str = "operator", **changes: Any) -> kinds.SignedRequest:
        body = kinds.RunRequest(
            **{
                "federation": FEDERATION,
                "run": "r1",
                "plan_sha256": self.plan_sha256,
                "model_root": D["m0"],
                "time": "2026-12-01T02:00:00Z",
                **changes,
            }
        ).to_bytes()
        signature = sign(key(signer), Context.RUN_REQUEST, body)
        return kinds.SignedRequest(
            body=body.decode(), key=key_hex(signer), signature=encode_base64(signature)
        )

    def plan(self, number: int = 0, **changes: Any) -> kinds.RoundPlan:
        request = changes.pop("request", self.request())
        said: dict[str, Any] = {
            "run": "r1",
            "round": number,
            "index": number,
            "plan": PLAN,
            "plan_digest": D["a"],
            "roster_root": D["b"] if self.secure else None,
            "model_in": D["m0"],
            "secagg": kinds.SecaggUsed(t=3, m_min=2) if self.secure else None,
            "mode": "aggregate-only" if self.secure else "open",
            "request": request,
            "request_sha256": sha256_hex(request.body.encode()) if request else None,
        }
        return kinds.RoundPlan(**{**said, **changes})

    def join(self, node: str, **changes: Any) -> kinds.RoundJoin:
        said = {"node": node, "plan_sha256": self.plan_sha256, "model_in": D["m0"]}
        return kinds.RoundJoin(**{**said, **changes})

    def start(self, *ready: str, attempt: int = 1, **changes: Any) -> kinds.RoundStart:
        said = {
            "attempt": attempt,
            "ready": tuple(sorted(ready or self.nodes)),
            "ctx_deal": D["a"] if self.secure else None,
        }
        return kinds.RoundStart(**{**said, **changes})

    def commit(self, node: str, attempt: int = 1, **changes: Any) -> kinds.UpdateCommit:
        said = {
            "attempt": attempt,
            "node": node,
            "ctx": D["b"] if self.secure else None,
            "deals_sha256": D["c"] if self.secure else None,
            "upload_root": sha256_hex(node.encode()),
            "bytes": 1000,
        }
        return kinds.UpdateCommit(**{**said, **changes})

    def survivors(self, nodes: dict[str, int], attempt: int = 1, **changes: Any) -> Any:
        said = {
            "attempt": attempt,
            "ctx": D["b"] if self.secure else None,
            "survivors": tuple(
                kinds.Survivor(node=n, leaf=nodes[n], upload_root=sha256_hex(n.encode()))
                for n in sorted(nodes)
            ),
            "dropped": tuple(
                kinds.Dropped(node=n, phase="Uploading", code="late")
                for n in sorted(set(self.nodes) - set(nodes))
            ),
        }
        return kinds.RoundSurvivors(**{**said, **changes})

    def aggregate(self, listed: kinds.RoundSurvivors, **changes: Any) -> kinds.RoundAggregate:
        some = D["a"] if self.secure else None
        said = {
            "attempt": listed.attempt,
            "included": tuple(s.node for s in listed.survivors),
            "dropped": listed.dropped,
            "commit_certificate_sha256": some,
            "transcript_sha256": some,
            "transcript_blob": some,
            "sum_blob": D["c"],
            "survivors": len(listed.survivors),
            "t": 3 if self.secure else 1,
            "model_out": D["m1"],
        }
        return kinds.RoundAggregate(**{**said, **changes})

    def subject(self, number: int = 0) -> dict[str, str]:
        name = kinds.round_subject(FEDERATION, RoundId(RunId("r1"), number))
        return {"subject": name, "digest": self.plan_sha256}

    def round(self, number: int = 0, *, upto: str = "round.closed") -> World:
        """A whole round, in which the last node drops out; or the leaves up to a kind, with it."""
        about = self.subject(number)
        self.say("coordinator", self.plan(number), **about)
        if upto == "round.plan":
            return self
        for node in self.nodes:
            self.say(node, self.join(node), **about)
        if upto == "round.join":
            return self
        self.say("coordinator", self.start(), **about)
        if upto == "round.start":
            return self
        at, kept = {}, self.nodes[:-1]
        for node in kept:
            at[node] = len(self.entries)
            self.say(node, self.commit(node), **about)
        if upto == "update.commit":
            return self
        listed = self.survivors(at)
        self.say("coordinator", listed, **about)
        if upto == "round.survivors":
            return self
        self.say("coordinator", self.aggregate(listed), **about)
        if upto == "round.aggregate":
            return self
        for node in kept:
            confirm = kinds.RoundConfirm(
                attempt=1, node=node, model_out=D["m1"], commit=self.hashes[at[node]]
            )
            self.say(node, confirm, **about)
        if upto == "round.confirm":
            return self
        self.say(
            "coordinator",
            kinds.RoundClosed(attempt=1, confirmations=tuple(kept), objections=()),
            **about,
        )
        return self
