"""What a round exchanges: which tensors, which metrics, in which layout. Public, by the plan.

Node, coordinator and auditor derive the same layout from the plan, the round's index in it and the
manifest; nothing about it travels.
"""

from __future__ import annotations

from typing import Final

from protocols.errors import ManifestMismatchError
from protocols.plan import Plan
from protocols.tensors.layout import VectorLayout
from protocols.tensors.manifest import Manifest
from protocols.tensors.ring import Ring

# Metrics of every vector, in this order. All are whole numbers below 2**48 at a site.
COMMON_METRICS: Final = (
    "weight",  # weight units, 65,536 for a weight of 1.0
    "nodes",  # 1 from every node
    "tokens",  # trained on, in this round
    "records",  # documents or sequences trained on
    "steps",  # inner optimizer steps
    "loss_micronats",  # training loss summed over tokens, 1e-6 nat
    "train_ms",  # wall time of the local step, milliseconds
    "clamped",  # model coordinates that hit the clamp limit
)
# For each language of the plan, of the round's starting model on held-out documents:
EVALUATION_METRICS: Final = ("nll_millinats", "bytes", "documents")


def metric_names(plan: Plan, index: int) -> tuple[str, ...]:
    """Names of the metrics in the vector of the plan's round ``index``, in order."""
    languages = plan.evaluation.languages if plan.evaluates_in(index) else ()
    return COMMON_METRICS + tuple(
        f"{metric}/{language}" for language in languages for metric in EVALUATION_METRICS
    )


def round_ring(plan: Plan) -> Ring:
    """The ring the plan's vectors live in."""
    return Ring(plan.vector.ring_bits)


def round_layout(plan: Plan, index: int, manifest: Manifest) -> VectorLayout:
    """Layout of the vector of the plan's round ``index``.

    Raises:
        ManifestMismatchError: the manifest is not the plan's, or lacks a tensor the plan names.
    """
    if manifest.digest != plan.model.manifest:
        raise ManifestMismatchError(
            f"the manifest {manifest.digest[:12]}… is not the plan's {plan.model.manifest[:12]}…"
        )
    return VectorLayout.of(manifest, plan.selection_in(index), metric_names(plan, index))
