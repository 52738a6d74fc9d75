"""A whole run in memory, with real masks, sums, models and leaves, written as a log on disk.

Everything that an auditor reads is made by the code that nodes and coordinator use, but the order
of events is played by hand, so that it is quick and each kind of leaf occurs: a round that loses a
node, one that is aborted with a certificate, one that is burned, an objection and its resolution.
The leaves are those of ``tests.support.leaves``, extended by real plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from policies.audit.replay import policy_text
from protocols.canonical import canonical_bytes, sha256_hex
from protocols.crypto.signatures import Context, public_bytes, sign
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.outer_step import apply_outer_step, next_snapshot
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.secagg.attempts import attempt_of, roster_of
from protocols.secagg.coordinator import make_abort_certificate
from protocols.secagg.verify import recompute_sum, verify_transcript
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.metrics import encode_metrics
from protocols.tensors.scales import Scales, initial_scales
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import blob_digest
from protocols.tlog import kinds
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import cosign
from protocols.tlog.leaf import FIRST_PREV, Seen, Statement, extend_chain, sign_leaf
from protocols.tlog.merkle import EMPTY_ROOT, leaf_hash
from protocols.tlog.note import Note
from protocols.tlog.proofs import root_of, stored
from protocols.tlog.text import encode_base64
from protocols.tlog.tiles import tiles_between, write_bundle, write_tile
from tests.support import secagg
from tests.support.leaves import key, key_hex, log_signer, witness_signer

NODES = ("inst-01", "inst-02", "inst-03", "inst-04")  # the names that tests.support.secagg gives
START = datetime.fromisoformat("2025-06-02T02:00:00+00:00")
COORDINATES = 300
MANIFEST = Manifest((TensorSpec("vector", (COORDINATES,)),))
ORIGIN = "log.minga.example/andes/2026"
FEDERATION = secagg.FEDERATION


def node_key(node: str) -> Any:
    """The identity key that signs messages of the secure sum, and leaves."""
    return secagg.identity(NODES.index(node) + 1)


@dataclass
class Run:
    """A log, its documents and its blobs, as they are on disk after ``write``."""

    mode: str = "aggregate-only"
    changes: dict[str, Any] = field(default_factory=dict)  # of the plan
    entries: list[bytes] = field(default_factory=list)
    heads: dict[str, Any] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    clock: datetime = START
    checkpoints: dict[int, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # by unit root
    documents: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    uploads: dict[str, bytes] = field(default_factory=dict)  # path below UPLOADS
    seen: Seen = field(default_factory=lambda: Seen(size=0, root=EMPTY_ROOT))

    def __post_init__(self) -> None:
        ring_bits = 20
        draft = self._plan_value("0" * 64)
        plan = Plan.from_value(draft)
        scales = initial_scales(MANIFEST, plan.vector.scale, round_ring(plan), len(NODES))
        theta = self.put(np.zeros(COORDINATES, "<f4").tobytes())
        self.put(MANIFEST.to_bytes())
        self.put(scales.to_bytes())
        self.snapshot = Snapshot.initial(MANIFEST, theta, scales)
        self.put(self.snapshot.to_bytes())
        self.plan = Plan.from_value(self._plan_value(self.snapshot.model_root))
        assert self.plan.vector.ring_bits == ring_bits
        self.index = 0
        self.number = 0

    def _plan_value(self, initial: str) -> dict[str, Any]:
        value: dict[str, Any] = {
            "federation": FEDERATION,
            "run": "r1",
            "mode": self.mode,
            "roster": list(NODES),
            "min_participants": 3,
            "rounds": 3,
            "evaluation": {"languages": ["es", "pt"]},
            "model": {"family": "vector", "manifest": MANIFEST.digest, "initial": initial},
            "local_step": {"kind": "synthetic", "synthetic": {"delta": 0.25}},
        }
        if self.mode != "open":
            value["secagg"] = {
                "threshold": 3,
                "colluders": 1,
                "min_surviving": 3,
                "keys": {n: public_bytes(node_key(n)).hex() for n in NODES},
            }
        return value | self.changes

    # -- leaves ----------------------------------------------------------------------------------

    def put(self, data: bytes) -> Digest:
        """Store a blob."""
        digest = blob_digest(data)
        self.blobs[digest] = data
        return digest

    def signer(self, who: str) -> Any:
        """Whose key."""
        return node_key(who) if who in NODES else key(who)

    def say(self, who: str, said: kinds.Predicate, *, subject: str = "", digest: str = "") -> str:
        """Sign a leaf and append it; its leaf hash."""
        head = self.heads.get(who)
        self.clock += timedelta(seconds=1)
        statement = Statement(
            kind=said.KIND,
            subject=subject or f"log/{said.KIND}",
            digest=Digest(digest or "a" * 64),
            seq=head.seq + 1 if head else 1,
            prev=head.leaf if head else FIRST_PREV,
            seen=self.seen,
            time=self.clock,
            fields=said.to_fields(),
        )
        leaf = sign_leaf(statement, self.signer(who))
        self.heads[who] = extend_chain(head, leaf)
        self.entries.append(leaf.entry)
        self.hashes.append(leaf.hash)
        return leaf.hash

    def about(self) -> dict[str, str]:
        """Subject and digest of leaves of the current round."""
        name = kinds.round_subject(FEDERATION, self.round_id)
        return {"subject": name, "digest": self.plan_sha256}

    @property
    def round_id(self) -> RoundId:
        """The current round."""
        return RoundId(self.plan.run_id, self.number)

    @property
    def plan_sha256(self) -> str:
        """Of the plan's canonical bytes."""
        return sha256_hex(self.plan.to_bytes())

    def checkpoint(self) -> None:
        """Sign the head; every witness cosigns; whoever signs next has seen it."""
        tree = stored([leaf_hash(entry) for entry in self.entries])
        head = Checkpoint(
            origin=ORIGIN, size=len(self.entries), root=root_of(tree, len(self.entries))
        )
        self.checkpoints[head.size] = self.signed(head)
        self.seen = Seen(size=head.size, root=head.root)

    def signed(self, head: Checkpoint, witnesses: tuple[str, ...] = NODES) -> bytes:
        """A head with the log's signature and those of witnesses."""
        note = sign_checkpoint(head, log_signer(ORIGIN))
        time = int(self.clock.timestamp()) + 1
        lines = tuple(cosign(note.text, signer=witness_signer(w), time=time) for w in witnesses)
        return Note(text=note.text, signatures=(*note.signatures, *lines)).to_bytes()

    def begin(self) -> Run:
        """Genesis, and everybody enrols."""
        self.say(
            "coordinator",
            kinds.Genesis(
                federation=FEDERATION,
                origin=ORIGIN,
                log_vkey=log_signer(ORIGIN).verifier.to_text(),
                coordinator_key=key_hex("coordinator"),
                operator_keys={"cenia": key_hex("operator")},
                ca_sha256="c" * 64,
            ),
        )
        for node in NODES:
            request = self.say(
                node,
                kinds.EnrolRequest(
                    institution=node,
                    node=node,
                    signing_key=public_bytes(node_key(node)).hex(),
                    witness_vkey=witness_signer(node).verifier.to_text(),
                    csr_sha256="a" * 64,
                    spki_sha256=sha256_hex(node.encode()),
                ),
            )
            self.say(
                "coordinator",
                kinds.CertIssued(
                    certificate_sha256="b" * 64,
                    spki_sha256=sha256_hex(node.encode()),
                    uri=f"spiffe://{FEDERATION}.minga.example/inst/{node}/node/1",
                    not_after="2026-06-01T00:00:00Z",
                    request=request,
                ),
            )
        self.checkpoint()
        return self

    # -- rounds ----------------------------------------------------------------------------------

    def open_round(self, decline: tuple[str, ...] = ()) -> None:
        """Plan, joins, declines."""
        plan = self.plan
        body = kinds.RunRequest(
            federation=FEDERATION,
            run=plan.run,
            plan_sha256=self.plan_sha256,
            model_root=plan.model.initial,
            time="2025-06-02T01:00:00Z",
        ).to_bytes()
        request = kinds.SignedRequest(
            body=body.decode(),
            key=key_hex("operator"),
            signature=encode_base64(sign(key("operator"), Context.RUN_REQUEST, body)),
        )
        secagg_ = plan.secagg
        said = kinds.RoundPlan(
            run=plan.run,
            round=self.number,
            index=self.index,
            plan=plan.model_dump(mode="json", by_alias=True),
            plan_digest=plan.digest,
            roster_root=roster_of(plan).root if secagg_ else None,
            model_in=self.snapshot.model_root,
            secagg=kinds.SecaggUsed(t=secagg_.threshold, m_min=secagg_.min_surviving)
            if secagg_
            else None,
            mode=plan.mode,
            request=request,
            request_sha256=sha256_hex(body),
        )
        assert canonical_bytes(said.plan) == plan.to_bytes()
        self.say("coordinator", said, **self.about())
        self.checkpoint()
        for node in NODES:
            if node in decline:
                rules = kinds.RoundDecline(
                    node=node, plan_sha256=self.plan_sha256, rules=("site.hours",)
                )
                self.say(node, rules, **self.about())
            else:
                join = kinds.RoundJoin(
                    node=node, plan_sha256=self.plan_sha256, model_in=self.snapshot.model_root
                )
                self.say(node, join, **self.about())
        self.joined = tuple(n for n in NODES if n not in decline)

    def vector(self, node: str, attempt: int) -> np.ndarray:
        """Integers that a node sends; small, different for each."""
        layout = round_layout(self.plan, self.index, MANIFEST)
        rng = np.random.default_rng([NODES.index(node), self.number, attempt])
        values = dict.fromkeys(layout.metrics, 0) | {"weight": 65536, "nodes": 1}
        scores = {"tokens": 5120, "steps": 40, "loss_micronats": 5120 * (4 - self.index) * 10**6}
        for language, nats in (("es", 5.0), ("pt", 5.3)):
            scores[f"bytes/{language}"] = 1000
            scores[f"nll_millinats/{language}"] = int(1e6 * nats / (1 + self.index))
        values |= {name: value for name, value in scores.items() if name in values}
        model = rng.integers(-500, 500, layout.model_coordinates, dtype=np.int32)
        return np.concatenate([model, encode_metrics(values, layout.metrics)])

    def claim(self) -> dict[str, Any] | None:
        """What an update claims to cost."""
        from policies.privacy.claim import claim_of

        layout = round_layout(self.plan, self.index, MANIFEST)
        found = claim_of(self.plan, self.index, layout.model_coordinates)
        return found.to_value() if found else None

    def start_attempt(self, number: int = 1, ready: tuple[str, ...] | None = None) -> secagg.World:
        """READY to GO, and the leaf that begins it."""
        ready = ready or self.joined
        attempt = attempt_of(self.plan, self.round_id, number, self.snapshot.model_root)
        world = secagg.World.make(
            len(NODES), attempt=attempt, vectors=lambda i: self.vector(NODES[i - 1], number)
        )
        world.ring = round_ring(self.plan)
        world.up_to_go([NodeId(n) for n in ready])
        said = kinds.RoundStart(attempt=number, ready=ready, ctx_deal=world.started.ctx_deal)
        self.say("coordinator", said, **self.about())
        self.checkpoint()
        self.attempt = number
        return world

    def upload(self, world: secagg.World, nodes: tuple[str, ...]) -> None:
        """Masked vectors and their commits."""
        self.commits: dict[str, int] = {}
        world.do_upload([NodeId(n) for n in nodes])
        for node in nodes:
            header = world.headers[NodeId(node)].body
            self.commits[node] = len(self.entries)
            said = kinds.UpdateCommit(
                attempt=self.attempt,
                node=node,
                ctx=header.ctx,
                deals_sha256="d" * 64,
                upload_root=header.upload_root,
                bytes=header.length,
                privacy=self.claim(),
                resources=kinds.ResourcesUsed(
                    gpu_seconds=0, energy_wh=3, bytes=header.length, source="estimated"
                ),
            )
            self.say(node, said, **self.about())
            name = f"{self.plan.run}/{self.number}.{self.attempt}.{node}.vector"
            self.uploads[name] = world.spools[NodeId(node)]

    def release(self, world: secagg.World, objection: str = "") -> None:
        """Survivors, sum, model, verdicts."""
        world.do_survivors()
        listed = kinds.RoundSurvivors(
            attempt=self.attempt,
            ctx=world.agreed.ctx,
            survivors=tuple(
                kinds.Survivor(
                    node=n,
                    leaf=self.commits[n],
                    upload_root=world.headers[NodeId(n)].body.upload_root,
                )
                for n in sorted(self.commits)
            ),
            dropped=tuple(
                kinds.Dropped(node=n, phase="Uploading", code="late")
                for n in self.joined
                if n not in self.commits
            ),
        )
        self.say("coordinator", listed, **self.about())
        self.checkpoint()
        world.do_commit()
        world.do_reveal()
        transcript = world.do_open()
        verified = verify_transcript(transcript, world.attempt)
        layout = round_layout(self.plan, self.index, MANIFEST)
        readers = {
            node: (lambda o, length, v=world.spools[node]: v[o : o + length])
            for node in verified.listed.headers
        }
        total = b"".join(recompute_sum(verified, readers, layout.coordinates, world.ring))
        after, norm = self._step(total, len(readers), layout)
        said = kinds.RoundAggregate(
            attempt=self.attempt,
            included=tuple(readers),
            dropped=listed.dropped,
            commit_certificate_sha256=sha256_hex(transcript.certificate.to_bytes()),
            transcript_sha256=sha256_hex(transcript.to_bytes()),
            transcript_blob=self.put(transcript.to_bytes()),
            sum_blob=self.put(total),
            survivors=len(readers),
            t=3,
            model_out=after.model_root,
            norm_micro=int(np.ceil(norm * 1e6)),
        )
        self.say("coordinator", said, **self.about())
        self.checkpoint()
        confirmed, objected = [], []
        for node in self.commits:
            if node == objection:
                verdict: Any = kinds.RoundObjection(
                    attempt=self.attempt, node=node, code="model.other", model_out=None
                )
                objected.append(node)
            else:
                verdict = kinds.RoundConfirm(
                    attempt=self.attempt,
                    node=node,
                    model_out=after.model_root,
                    commit=self.hashes[self.commits[node]],
                )
                confirmed.append(node)
            self.say(node, verdict, **self.about())
        closed = kinds.RoundClosed(
            attempt=self.attempt, confirmations=tuple(confirmed), objections=tuple(objected)
        )
        self.say("coordinator", closed, **self.about())
        self.checkpoint()
        self.snapshot, self.index, self.number = after, self.index + 1, self.number + 1

    def _step(self, total: bytes, nodes: int, layout: Any) -> tuple[Snapshot, float]:
        files: dict[str, bytearray] = {}

        def write(name: str, offset: int, data: memoryview) -> None:
            kept = files.setdefault(name, bytearray(4 * COORDINATES))
            kept[offset : offset + len(data)] = data

        start = self.snapshot
        result = apply_outer_step(
            outer=self.plan.outer,
            scale_rule=self.plan.vector.scale,
            layout=layout,
            manifest=MANIFEST,
            snapshot_counters=start.counters,
            theta=np.frombuffer(self.blobs[start.theta], np.float32),
            buffers={},
            scales=Scales.from_bytes(self.blobs[start.scales], MANIFEST),
            sum_reader=total,
            ring=round_ring(self.plan),
            nodes=nodes,
            roster=len(NODES),
            writer=write,
            noisy=self.plan.adds_noise,
        )
        for data in files.values():
            self.put(bytes(data))
        self.put(result.next_scales.to_bytes())
        after = next_snapshot(start, result)
        self.put(after.to_bytes())
        return after, result.norm

    def abort(self, world: secagg.World | None, *, outcome: str = "aborted") -> None:
        """The end of an attempt without a release; with a certificate where updates were sent."""
        certificate = None
        if world is not None and outcome == "aborted":
            world.do_abort([NodeId(n) for n in self.joined])
            made = make_abort_certificate(world.aborts, world.attempt)
            certificate = sha256_hex(made.to_bytes())
            self.documents[certificate] = made.to_bytes()
        said = kinds.RoundAborted(
            attempt=self.attempt if world is not None else 0,
            outcome=outcome,
            phase="Committing" if world is not None else "Open",
            code="deadline",
            actor="coordinator",
            certificate_sha256=certificate,
        )
        self.say("coordinator", said, **self.about())
        self.checkpoint()

    def whole(self) -> Run:
        """A run with something of everything; 3 rounds of the plan are released in 5 tries."""
        self.begin()
        self.open_round()  # 0: one node is lost
        world = self.start_attempt()
        self.upload(world, NODES[:3])
        self.release(world)
        self.say("coordinator", kinds.Heartbeat(interval_s=3600))
        self.open_round(decline=(NODES[3],))  # 1: aborted after uploads, then released
        world = self.start_attempt()
        self.upload(world, NODES[:3])
        self.abort(world)
        world = self.start_attempt(2)
        self.upload(world, NODES[:3])
        self.release(world, objection=NODES[1])
        self.say(
            "coordinator",
            kinds.ObjectionResolved(
                objection=self.hashes[-3], outcome="dismissed", code="clock.skew"
            ),
        )
        self.open_round()  # 2: burned
        world = self.start_attempt()
        self.upload(world, NODES)
        self.abort(world, outcome="burned")
        self.number += 1
        self.open_round(decline=NODES[1:])  # 3: too few
        self.abort(None)
        self.number += 1
        self.open_round()  # 4
        world = self.start_attempt()
        self.upload(world, NODES)
        self.release(world)
        return self

    # -- on disk ---------------------------------------------------------------------------------

    def policy(self) -> bytes:
        """The trust policy: all four nodes are witnesses, three must cosign."""
        witnesses = {n: witness_signer(n).verifier for n in NODES}
        return policy_text(log_signer(ORIGIN).verifier, witnesses)

    def write(self, folder: Path) -> Path:
        """Write the log into ``folder/log``, blobs and uploads beside it; the log's folder."""
        log = folder / "log"
        write_log(log, self.entries)
        (log / "checkpoint").write_bytes(self.checkpoints[len(self.entries)])
        (log / "checkpoints").mkdir(exist_ok=True)
        for size, data in self.checkpoints.items():
            (log / "checkpoints" / str(size)).write_bytes(data)
        (log / "trust-policy.txt").write_bytes(self.policy())
        (log / "log.vkey").write_text(log_signer(ORIGIN).verifier.to_text() + "\n")
        for digest, data in self.documents.items():
            _write(log / "blobs" / "sha256" / digest, data)
        for digest, data in self.blobs.items():
            _write(folder / "blobs" / digest[:2] / digest, data)
        for name, data in self.uploads.items():
            _write(folder / "uploads" / name, data)
        return log


def write_log(log: Path, entries: list[bytes]) -> None:
    """Bundles and tiles of these entries."""
    tree = stored([leaf_hash(entry) for entry in entries])
    for tile in tiles_between(0, len(entries)):
        if tile.level is None:
            data = write_bundle(entries[tile.n * 256 : tile.n * 256 + tile.width])
        else:
            data = write_tile(tree, tile)
        _write(log / tile.path, data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


__all__ = ["MANIFEST", "NODES", "ORIGIN", "Run", "replace", "write_log"]
