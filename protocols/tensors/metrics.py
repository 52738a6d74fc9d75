"""Metrics travel as coordinates of the same vector: no site's loss is ever seen alone.

A metric is a whole number from 0 to 2**48 - 1. It becomes six limbs of 8 bits, little end first,
one coordinate each. The sum of a limb over 64 nodes is at most 64 * 255 = 16,320, which fits every
ring; the sums of the limbs, weighed by 256**k, are the sum of the metric. Limbs carry no scale,
no clipping and no noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocols.errors import MalformedMessageError, WrappedSumError
from protocols.tensors.sizes import LIMBS, MAX_NODES

BASE_METRICS: Final = (
    "weight",  # weight units, 65,536 for a weight of 1.0
    "nodes",  # 1 from every node
    "tokens",
    "records",
    "steps",
    "loss_micronats",  # training loss summed over tokens, 1e-6 nat
    "train_ms",
    "clamped",  # model coordinates that hit the clamp limit
)
PER_LANGUAGE: Final = ("nll_millinats", "bytes", "documents")  # the round's starting model
RESOURCE_METRICS: Final = (  # where the plan sums what local steps cost
    "gpu_ms",  # devices held
    "cpu_ms",
    "energy_mwh",  # milliwatt hours, measured or estimated by the sites
    "reporting",  # 1 from every node that fills these in
)
METRIC_BOUND: Final = 2 ** (8 * LIMBS)


def metric_names(languages: Sequence[str], *, resources: bool = False) -> tuple[str, ...]:
    """Names of a round's metrics, in the order in which they stand in the vector."""
    by_language = tuple(f"{name}/{language}" for language in languages for name in PER_LANGUAGE)
    return BASE_METRICS + by_language + (RESOURCE_METRICS if resources else ())


def encode_metrics(values: Mapping[str, int], names: Sequence[str]) -> NDArray[np.int32]:
    """Limbs of the named metrics, int32, shape [6 * len(names)].

    Raises:
        MalformedMessageError: a metric is missing, unknown, not a whole number, or out of range.
    """
    if set(values) != set(names):
        odd = min(set(values) ^ set(names))
        raise MalformedMessageError(f"metric {odd!r:.80} is missing or not in the plan")
    for name in names:
        value = values[name]
        if type(value) is not int or not 0 <= value < METRIC_BOUND:
            raise MalformedMessageError(
                f"metric {name} must be a whole number from 0 to 2**48 - 1, got {value!r:.40}"
            )
    data = b"".join(values[name].to_bytes(LIMBS, "little") for name in names)
    return np.frombuffer(data, np.uint8).astype(np.int32)


def decode_metrics(
    sums: Sequence[int] | NDArray[np.int32], names: Sequence[str], *, nodes: int = MAX_NODES
) -> dict[str, int]:
    """Sums of the named metrics from centred sums of their limbs, shape [6 * len(names)].

    Raises:
        WrappedSumError: a limb's sum is not what ``nodes`` nodes can send.
    """
    limbs = [int(limb) for limb in sums]
    if len(limbs) != LIMBS * len(names):
        raise ValueError(f"{len(names)} metrics have {LIMBS * len(names)} limbs, not {len(limbs)}")
    decoded = {}
    for index, name in enumerate(names):
        part = limbs[index * LIMBS : (index + 1) * LIMBS]
        if not all(0 <= limb <= 255 * nodes for limb in part):
            raise WrappedSumError(
                f"the sum of metric {name} is not one that {nodes} nodes can send"
            )
        decoded[name] = sum(limb << (8 * k) for k, limb in enumerate(part))
    return decoded
