"""From a finished local step to a signed vector in the spool, ready to be sent.

    worker's delta.f32 + result.json   (or a constant, for plan kind "synthetic")
      -> norm in float64 -> clip -> weight -> scale, round by chance, pack     protocols.tensors
         [+ a share of the noise, made for what was clipped]                   protocols.noise
      -> spool/uploads/<run>.<round>.<attempt>.bin    temporary name, fsync, rename
      -> UploadHeader over size and root, signed by this node's key            protocols.upload

The dither is another one in every attempt and used once: what was rounded for one attempt is never
sent in another. A masked vector is fixed once its header is in the node's secure state; if a crash
came before the journal knew, its record is made from the file again, never from the update. Memory
is O(chunk) for each thread, whatever the model's size.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from node_agent.records import UploadRecord
from node_agent.resources import Claim, coordinates
from node_agent.spool import Result, publish
from policies.privacy.terms import NoiseTerms, noise_terms
from protocols.errors import (
    CorruptStateError,
    DigestMismatchError,
    ManifestMismatchError,
    PlanRefusedError,
    StorageFullError,
    WorkerError,
)
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.noise.noise_table import NoiseShare, NoiseTable
from protocols.noise.rounding import encode_bounded
from protocols.plan import Plan
from protocols.plan_privacy import RECORD_MODES
from protocols.round_vector import by_stratum, metric_names, round_layout, round_ring
from protocols.tensors.behind import Behind
from protocols.tensors.encode import (
    check_finite,
    clip_factor,
    encode_vector,
    weight_units,
)
from protocols.tensors.layout import VectorLayout
from protocols.tensors.manifest import Manifest
from protocols.tensors.metrics import METRIC_BOUND
from protocols.tensors.planar import LaneAdder
from protocols.tensors.scales import Scales
from protocols.tensors.sizes import UNIT, WEIGHT_ONE
from protocols.tensors.units import UnitHasher
from protocols.upload import UploadHeader, sign_header

Delta = NDArray[np.float32]
_READ: Final = 4 * 2**20  # bytes at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWork:
    """What the local step produced, whoever carried it out."""

    delta: Delta = field(repr=False)  # float32, shape [selected coordinates], may be a mapped file
    tokens: int
    records: int
    steps: int
    loss_nats: float  # summed over tokens
    seconds: float
    resources: Claim | None = None  # what it cost; None: not said
    # by language: nll in nats, bytes and documents
    evaluation: dict[str, tuple[float, int, int]] = field(default_factory=dict)


def work_of_result(
    result: Result, delta_path: Path, *, resources: Claim | None = None
) -> LocalWork:
    """The worker's result, its delta mapped instead of read.

    The bytes were checked against the result when the node said that it is ready.
    """
    count = result.delta_coordinates
    if delta_path.stat().st_size != 4 * count:
        raise ManifestMismatchError(f"{delta_path.name} does not have {count} coordinates")
    delta: Delta = (
        np.memmap(delta_path, dtype="<f4", mode="r", shape=(count,))
        if count
        else np.empty(0, np.float32)
    )
    return LocalWork(
        delta=delta,
        tokens=result.tokens,
        records=result.records,
        steps=result.steps,
        loss_nats=result.loss_nats,
        seconds=result.seconds,
        resources=resources,
        evaluation={
            line.language: (line.nll_nats, line.bytes, line.documents) for line in result.evaluation
        },
    )


def check_pinned(delta_path: Path, pinned: Digest | None) -> None:
    """Whether an update is still the one that the node said it is ready with.

    Raises:
        DigestMismatchError: it is another one. Encoded under masks that were used for the first,
            the two would tell their difference.
    """
    hasher = UnitHasher()
    with delta_path.open("rb") as file:
        while piece := file.read(_READ):
            hasher.update(piece)
    if hasher.digest() != pinned:
        raise DigestMismatchError(
            f"{delta_path} is not the update that this node said it is ready with"
        )


def check_private_work(plan: Plan, index: int, result: Result) -> None:
    """Whether the worker says that it did the private steps that are charged.

    Raises:
        WorkerError: it did others, or an old worker does not know of privacy.
    """
    if plan.mode not in RECORD_MODES or plan.privacy is None or not plan.trains_in(index):
        return
    report = result.private
    added = "added" if plan.mode == "record-local" else "later"
    if report is None or report.noise != added or result.steps != plan.privacy.steps:
        raise WorkerError(
            f"the worker did not do the {plan.privacy.steps} private steps of the plan; nothing of"
            " this round is sent"
        )


def synthetic_work(constant: float, layout: VectorLayout) -> LocalWork:
    """The local step of plan kind "synthetic": every coordinate of the delta is ``constant``.

    The array has stride 0: one number stands for all, nothing is materialised.
    """
    delta = np.broadcast_to(np.float32(constant), (layout.model_coordinates,))
    return LocalWork(
        delta=delta, tokens=0, records=0, steps=0, loss_nats=0.0, seconds=0.0, evaluation={}
    )


def metrics_of(
    work: LocalWork, *, weight: int, plan: Plan, index: int, node: NodeId
) -> dict[str, int]:
    """The metrics of a round's vector: whole numbers, capped below 2**48.

    A negative loss counts as zero: metrics are not negative. ``clamped`` is filled in by the
    encoder.

    Under a private mode every metric of the training is a constant of the plan, because no noise
    covers it; scores are of held-out text that the plan calls public (spec/privacy.md, section 5).
    """

    def capped(value: float) -> int:
        return int(min(max(0, round(value)), METRIC_BOUND - 1))

    values = {
        "weight": weight,
        "nodes": 1,
        "tokens": capped(work.tokens),
        "records": capped(work.records),
        "steps": capped(work.steps),
        "loss_micronats": capped(1e6 * work.loss_nats),
        "train_ms": capped(1e3 * work.seconds),
        "clamped": 0,
    }
    if plan.privacy is not None:
        steps = (plan.privacy.steps or 0) if plan.trains_in(index) else 0
        values = dict.fromkeys(values, 0) | {"weight": WEIGHT_ONE, "nodes": 1, "steps": steps}
    names = metric_names(plan, index)
    if plan.vector.resources:
        values |= coordinates(work.resources)
    scores = by_stratum(plan, node, work.evaluation)
    for name in names:
        kind, slash, stratum = name.partition("/")
        if not slash:
            continue
        nll, size, documents = scores.get(stratum, (0.0, 0, 0))
        values[name] = capped(
            {"nll_millinats": 1e3 * nll, "bytes": size, "documents": documents}[kind]
        )
    return values


def update_norm(delta: Delta, layout: VectorLayout) -> float:
    """The L2 norm of an update, in float64; a constant needs one multiplication.

    Raises:
        NonFiniteUpdateError, ManifestMismatchError: as ``check_finite``.
    """
    if delta.size and delta.strides == (0,) and delta.shape == (layout.model_coordinates,):
        value = float(delta[0])
        if math.isfinite(value):
            return abs(value) * math.sqrt(delta.size)
    return check_finite(delta, layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a vector is bound to."""

    plan: Plan
    node: NodeId
    round: RoundId
    index: int  # which of the plan's rounds
    attempt: int
    model_root: Digest  # what the local step started from


def upload_name(round_: RoundId, attempt: int) -> str:
    """File name of a vector in spool/uploads."""
    return f"{round_.run}.{round_.number}.{attempt}.bin"


def make_contribution(
    work: LocalWork,
    *,
    terms: Terms,
    manifest: Manifest,
    scales: Scales,
    seed: bytes,
    noise_seed: bytes | None = None,
    masks: LaneAdder | None = None,
    signing_key: Ed25519PrivateKey,
    uploads: Path,
    threads: int = 1,
) -> UploadRecord:
    """Encode, spool and sign. The file is durable under its name before this returns.

    Args:
        work: of the local step.
        terms: what the vector is bound to.
        manifest: of the model.
        scales: of the round's starting model.
        seed: 32 secret bytes for the dither, of this attempt and used for nothing else.
        noise_seed: 32 secret bytes for this node's share of the noise, likewise; needed in the
            modes whose noise is added here.
        masks: of a secure sum, added in the ring before packing; None in mode open.
        signing_key: of this node.
        uploads: the folder of vectors on their way out.
        threads: chunks encoded at once.

    Raises:
        NonFiniteUpdateError: NaN or infinity; names the tensor. Nothing was kept.
        ManifestMismatchError: the update has not the round's coordinates.
        StorageFullError: no room in the spool.
        PlanRefusedError: the plan's noise cannot be made for a model of this size.
    """
    plan, round_ = terms.plan, terms.round
    layout = round_layout(plan, terms.index, manifest)
    encode = _encoder(work, terms, layout, scales, seed=seed, noise_seed=noise_seed, masks=masks)
    name = upload_name(round_, terms.attempt)
    final, temporary = uploads / name, uploads / f".{name}.tmp"
    hasher = UnitHasher()
    try:
        with temporary.open("wb", buffering=0) as file, ExitStack() as stack:
            behind = Behind(lambda: os.fdatasync(file.fileno()))
            stack.callback(behind.close)

            def keep(chunk: bytes) -> None:
                view, units = memoryview(chunk), hasher.size // UNIT
                while view:
                    view = view[file.write(view) :]
                hasher.update(chunk)
                if hasher.size // UNIT > units:
                    behind.more()

            encode(keep, threads)
            behind.finish()
        publish(temporary, final)
    except OSError as error:
        raise StorageFullError(f"{final}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return _record(terms, layout.coordinates, hasher, signing_key)


Sink = Callable[[bytes], None]


def _encoder(
    work: LocalWork,
    terms: Terms,
    layout: VectorLayout,
    scales: Scales,
    *,
    seed: bytes,
    noise_seed: bytes | None,
    masks: LaneAdder | None,
) -> Callable[[Sink, int], object]:
    """How the plan's mode turns an update into packed integers: ``encode(sink, threads)``."""
    plan, ring = terms.plan, round_ring(terms.plan)
    weight = weight_units(work.tokens, plan.vector.weight_cap_tokens)
    noise = _noise_of(plan, terms.index, layout)
    common: dict[str, Any] = {
        "metrics": metrics_of(work, weight=weight, plan=plan, index=terms.index, node=terms.node),
        "ring": ring,
        "weight_units": weight,
    }
    # A finite norm is also what shows that every coordinate is finite.
    norm = update_norm(work.delta, layout)
    if noise is None:
        factor = clip_factor(norm, plan.vector.clip_norm)
        limit = ring.clamp_limit(len(plan.roster))
        return lambda sink, threads: encode_vector(
            work.delta,
            layout,
            scales,
            clip_factor=factor,
            seed=seed,
            limit=limit,
            sink=sink,
            mask_adder=masks,
            threads=threads,
            **common,
        )
    if noise_seed is None or masks is None or plan.privacy is None:
        raise ValueError("a vector with noise needs a seed for it, and masks")
    if (scales.exponents != noise.exponent).any():
        raise PlanRefusedError(
            "the model's scales are not the plan's: the noise is made for those of the plan",
            rule="privacy.scales",
        )
    share = NoiseShare(_table(noise.share_variance), noise_seed)
    limit = noise.limit or ring.clamp_limit(len(plan.roster))
    if plan.mode == "institution":
        clipped = clip_factor(norm, plan.privacy.clip_norm)
        return lambda sink, threads: encode_bounded(
            work.delta,
            layout,
            scales,
            root=seed,
            max_squares=noise.sensitivity.l2_squared,
            clip_factor=clipped,
            limit=limit,
            sink=sink,
            noise=share,
            mask_adder=masks,
            threads=threads,
            **common,
        )
    return lambda sink, threads: encode_vector(
        work.delta,
        layout,
        scales,
        clip_factor=1.0,  # each record's gradient was clipped; the sum may be as long as it is
        seed=seed,
        limit=limit,
        sink=sink,
        noise=share,
        mask_adder=masks,
        count_clamped=False,
        threads=threads,
        **common,
    )


def _noise_of(plan: Plan, index: int, layout: VectorLayout) -> NoiseTerms | None:
    """The noise that a site adds to its integers in this round; None: none here."""
    if not plan.adds_noise or not plan.trains_in(index):
        return None
    return noise_terms(plan, layout.model_coordinates)


@functools.lru_cache(maxsize=2)  # public, up to 22 MiB each
def _table(variance: Fraction) -> NoiseTable:
    return NoiseTable.build(variance)


def record_of_fixed(
    *,
    terms: Terms,
    manifest: Manifest,
    root: Digest,
    signing_key: Ed25519PrivateKey,
    uploads: Path,
) -> UploadRecord:
    """The record of a masked vector that was spooled and fixed before a crash.

    Args:
        terms, manifest, signing_key, uploads: as ``make_contribution``.
        root: of the vector that is fixed.

    Raises:
        CorruptStateError: the file is gone, or holds other bytes. Nothing may be sent then: a
            second vector under the same masks would tell its difference to the first.
    """
    layout = round_layout(terms.plan, terms.index, manifest)
    hasher, name = UnitHasher(), upload_name(terms.round, terms.attempt)
    try:
        with (uploads / name).open("rb") as file:
            while piece := file.read(_READ):
                hasher.update(piece)
    except OSError as error:
        raise CorruptStateError(f"the masked vector {name} is gone: {error.strerror}") from None
    if hasher.digest() != root:
        raise CorruptStateError(f"the masked vector {name} is not the one that was fixed")
    return _record(terms, layout.coordinates, hasher, signing_key)


def _record(
    terms: Terms, coordinates: int, hasher: UnitHasher, signing_key: Ed25519PrivateKey
) -> UploadRecord:
    plan = terms.plan
    header = UploadHeader(
        federation=plan.federation_id,
        run=plan.run_id,
        round=terms.round.number,
        attempt=terms.attempt,
        node=terms.node,
        plan=plan.digest,
        model=terms.model_root,
        coordinates=coordinates,
        ring=round_ring(plan).bits,
        size=hasher.size,
        root=hasher.digest(),
    )
    return UploadRecord(
        round=terms.round,
        attempt=terms.attempt,
        header=header.to_bytes(),
        signature=sign_header(signing_key, header),
        unit_hashes=hasher.hashes(),
        file=upload_name(terms.round, terms.attempt),
        receipt=None,
    )
