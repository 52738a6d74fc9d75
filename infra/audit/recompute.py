"""Making every model again, from the masked uploads on, with no code of the coordinator.

For each released round, in order:

    1. the transcript holds (``protocols.secagg.verify``) and is the one that the leaves name;
    2. each upload has the root that its ``update.commit`` signed;
    3. the uploads are added, the masks taken off with the seeds that the survivors revealed: the
       bytes are those of the published sum;
    4. the outer step, applied to the model that this audit made in the round before, gives the
       model root of the leaf.

Where uploads are gone (their retention ended) the published sum is taken for what it is, and the
round is unknown, not passed. Memory is O(chunk); nothing is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.audit.blobs import BlobFolder, upload_file
from policies.audit.evidence import Evidence, released
from policies.audit.questions_rounds import transcript_of
from policies.audit.records import Record, Result
from policies.audit.rounds import AttemptState, RoundState
from protocols.errors import DigestMismatchError, FederationError, IntegrityError, NotFoundError
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.outer_step import OuterResult, apply_outer_step, next_snapshot
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.secagg.verify import recompute_sum
from protocols.tensors.manifest import Manifest
from protocols.tensors.planar import PackedVector, Reader, accumulate
from protocols.tensors.scales import Scales
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import UnitHasher


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """What came of one round."""

    round: RoundId
    result: Result
    reason: str
    leaf: int  # of round.aggregate
    from_uploads: bool  # the sum was made again; else the published one was taken
    model_out: Digest | None
    metrics: Mapping[str, int]

    def record(self) -> Record:
        """As an answer to question 5."""
        return Record(
            id="5",
            round=str(self.round),
            result=self.result,
            leaves=(self.leaf,),
            reason=self.reason,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "round": str(self.round),
            "result": self.result.value,
            "reason": self.reason,
            "from_uploads": self.from_uploads,
            "model_out": self.model_out,
            "metrics": dict(self.metrics),
        }


class Recomputer:
    """Goes through the rounds of a log; a later round starts from what this made of the earlier."""

    def __init__(
        self, evidence: Evidence, blobs: BlobFolder, uploads: Path | None, *, threads: int = 2
    ) -> None:
        self._evidence = evidence
        self._blobs = blobs
        self._uploads = uploads
        self._threads = threads
        self._made: dict[Digest, Snapshot] = {}  # by model root: first models, and those made here
        self._published = blobs.snapshots()

    def rounds(self, only: int | None = None) -> Iterator[Recomputed]:
        """Every released round, or those of one number (then from the published model before)."""
        for round_, state in self._evidence.rounds.items():
            attempt = released(state)
            if attempt is None or (only is not None and round_.number != only):
                continue
            yield self._round(round_, state, attempt)

    def _round(self, round_: RoundId, state: RoundState, attempt: AttemptState) -> Recomputed:
        said, leaf = attempt.aggregate, attempt.aggregate_at
        if said is None or leaf is None:
            raise TypeError("a released attempt has an aggregate")
        from_uploads = False
        try:
            plan, start, chained = self._start(state)
            sum_, from_uploads, why = self._sum(round_, state, attempt, plan, start)
            result = self._outer_step(plan, state.plan.index, start, sum_, said.survivors)
            after = next_snapshot(start, result)
            self._check_published(after)
        except NotFoundError as error:
            return self._answer(round_, Result.UNKNOWN, leaf, f"not made again: {error}")
        except FederationError as error:
            return self._answer(round_, Result.FAIL, leaf, f"{error}")
        if after.model_root != said.model_out:
            reason = f"the sum leads to {after.model_root[:12]}…, not to {said.model_out[:12]}…"
            return self._answer(round_, Result.FAIL, leaf, reason)
        if said.norm_micro is not None and said.norm_micro != math.ceil(result.norm * 1e6):
            reason = f"the mean is {result.norm:.6g} long, the leaf says another length"
            return self._answer(round_, Result.FAIL, leaf, reason)
        self._made[after.model_root] = after
        if not from_uploads:
            return self._answer(
                round_,
                Result.UNKNOWN,
                leaf,
                f"the published sum leads to the model; {why}",
                model=after.model_root,
                metrics=result.metrics,
            )
        first = "the model made before" if chained else "the published model before"
        return self._answer(
            round_,
            Result.PASS,
            leaf,
            f"{said.survivors} uploads added, masks removed, {first} stepped to"
            f" {after.model_root[:12]}…",
            from_uploads=True,
            model=after.model_root,
            metrics=result.metrics,
        )

    def _answer(
        self,
        round_: RoundId,
        result: Result,
        leaf: int,
        reason: str,
        *,
        from_uploads: bool = False,
        model: Digest | None = None,
        metrics: Mapping[str, int] | None = None,
    ) -> Recomputed:
        return Recomputed(
            round=round_,
            result=result,
            reason=reason,
            leaf=leaf,
            from_uploads=from_uploads,
            model_out=model,
            metrics=dict(metrics or {}),
        )

    def _check_published(self, after: Snapshot) -> None:
        """What is handed out under the model's digests is that model.

        Raises:
            DigestMismatchError: a file is another one; one that is not here is no matter.
        """
        for digest in after.blobs():
            path = self._blobs.path(digest)
            if path.exists():
                self._blobs.check(path, digest)

    def _start(self, state: RoundState) -> tuple[Plan, Snapshot, bool]:
        """Plan and starting model; whether this audit knows that model without the coordinator."""
        plan = self._evidence.plan_of(state)
        if plan is None:
            raise NotFoundError("the plan is not at hand")
        root = Digest(state.plan.model_in)
        made = self._made.get(root)
        if made is not None:
            return plan, made, True
        published = self._published.get(root)
        if published is None:
            raise NotFoundError(f"the snapshot {root[:12]}… is not among the blobs")
        return plan, published, root == plan.model.initial

    def _manifest(self, plan: Plan) -> Manifest:
        return Manifest.from_bytes(self._blobs.document(Digest(plan.model.manifest)))

    def _sum(
        self,
        round_: RoundId,
        state: RoundState,
        attempt: AttemptState,
        plan: Plan,
        start: Snapshot,
    ) -> tuple[Path, bool, str]:
        """The published sum, made again where the uploads are here; why not, where they are not."""
        said = attempt.aggregate
        if said is None or start.manifest != plan.model.manifest:
            raise DigestMismatchError("the starting model is of another manifest than the plan's")
        digest = Digest(said.sum_blob)
        path = self._blobs.path(digest)
        layout = round_layout(plan, state.plan.index, self._manifest(plan))
        ring = round_ring(plan)
        with ExitStack() as stack:
            try:
                uploads = self._open_uploads(round_, attempt, stack)
            except NotFoundError as error:
                self._blobs.check(path, digest)
                return path, False, f"its uploads are gone: {error}"
            hasher = UnitHasher()
            if plan.secagg is None:
                readers = [uploads[node] for node in sorted(uploads)]
                chunks = accumulate(readers, layout, ring, threads=self._threads)
            else:
                verified, _, why = transcript_of(self._evidence, round_, state)
                if verified is None:
                    raise (NotFoundError if "not at hand" in why else IntegrityError)(why)
                chunks = recompute_sum(
                    verified, uploads, layout.coordinates, ring, threads=self._threads
                )
            for chunk in chunks:
                hasher.update(chunk)
        if hasher.digest() != digest:
            raise DigestMismatchError("the uploads do not add up to the published sum")
        self._blobs.check(path, digest)
        return path, True, ""

    def _open_uploads(
        self, round_: RoundId, attempt: AttemptState, stack: ExitStack
    ) -> dict[NodeId, Reader]:
        found: dict[NodeId, Reader] = {}
        for name in attempt.survivors or ():
            node, root = NodeId(name), Digest(attempt.commits[name].upload_root)
            path = self._blobs.path(root)
            if not path.exists() and self._uploads is not None:
                path = upload_file(self._uploads, round_, attempt.number, node)
            found[node] = self._blobs.open(path, root, stack)
        return found

    def _outer_step(
        self, plan: Plan, index: int, start: Snapshot, sum_: Path, survivors: int
    ) -> OuterResult:
        manifest, ring = self._manifest(plan), round_ring(plan)
        layout = round_layout(plan, index, manifest)
        blobs = self._blobs
        with ExitStack() as stack:
            source = stack.enter_context(sum_.open("rb", buffering=0))
            descriptor = source.fileno()
            return apply_outer_step(
                outer=plan.outer,
                scale_rule=plan.vector.scale,
                layout=layout,
                manifest=manifest,
                snapshot_counters=start.counters,
                theta=blobs.open(blobs.path(start.theta), start.theta, stack),
                buffers={
                    name: blobs.open(blobs.path(digest), digest, stack)
                    for name, digest in start.buffers.items()
                },
                scales=Scales.from_bytes(blobs.document(start.scales), manifest),
                sum_reader=PackedVector(
                    lambda offset, length: os.pread(descriptor, length, offset),
                    layout.coordinates,
                    ring,
                ),
                ring=ring,
                nodes=survivors,
                roster=len(plan.roster),
                writer=_nothing,
                noisy=plan.adds_noise,
                threads=self._threads,
            )


def _nothing(_name: str, _offset: int, _data: memoryview) -> None:
    """Only digests are wanted."""
