"""What a round exchanges: which tensors, which metrics, in which layout. Public, by the plan.

Node, coordinator and auditor derive the same layout from the plan, the round's index in it and the
manifest; nothing about it travels.
"""

from __future__ import annotations

from collections.abc import Mapping

from protocols.errors import ManifestMismatchError
from protocols.identifiers import NodeId
from protocols.plan import Plan
from protocols.tensors import metrics
from protocols.tensors.layout import VectorLayout
from protocols.tensors.manifest import Manifest
from protocols.tensors.ring import Ring


def metric_names(plan: Plan, index: int) -> tuple[str, ...]:
    """Names of the metrics in the vector of the plan's round ``index``, in order."""
    names: tuple[str, ...] = ()
    if plan.evaluates_in(index):
        strata = plan.strata
        names = plan.evaluation.languages if strata is None else strata.names
    return metrics.metric_names(names, resources=plan.vector.resources)


def by_stratum(
    plan: Plan, node: NodeId, scores: Mapping[str, tuple[float, int, int]]
) -> dict[str, tuple[float, int, int]]:
    """A site's held-out scores as the strata of the plan count them.

    Args:
        plan: of the run.
        node: whose scores they are.
        scores: by language: nll in nats, bytes, documents.

    Returns:
        The same by stratum. Languages that the plan does not list for this site are left out:
        who gets to know of them was not looked at.
    """
    strata, declared = plan.strata, (plan.evaluation.sites or {}).get(node)
    if strata is None:
        return dict(scores)
    found: dict[str, tuple[float, int, int]] = {}
    for language in declared.languages if declared is not None else ():
        if language not in scores:
            continue
        nll, size, documents = scores[language]
        for name in strata.of(declared.country if declared is not None else "", language):
            before = found.get(name, (0.0, 0, 0))
            found[name] = (before[0] + nll, before[1] + size, before[2] + documents)
    return found


def round_ring(plan: Plan) -> Ring:
    """The ring the plan's vectors live in."""
    return Ring(plan.vector.ring_bits)


_PERIOD = 2  # rounds after which a plan's choice of tensors begins again


def sizes_of_rounds(plan: Plan, manifest: Manifest) -> tuple[int, ...]:
    """Model coordinates that training rounds exchange, ascending; one where all are alike.

    Raises:
        ManifestMismatchError: as ``round_layout``.
    """
    rounds = range(min(plan.rounds, _PERIOD))
    return tuple(sorted({round_layout(plan, i, manifest).model_coordinates for i in rounds}))


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
