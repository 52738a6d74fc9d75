"""The outer optimizers of a plan: elementwise float32, in the order written, nothing else.

Two are ours; Flower's are in outer_flower.py and imported only when a plan names one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protocols.errors import PlanRefusedError
from protocols.plan import Outer
from protocols.tensors.sizes import BLOCK

Float32 = NDArray[np.float32]


class OuterOptimizer(Protocol):
    """Turns the mean update of some coordinates into their next weights; elementwise."""

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """State that is kept between rounds, each shaped like theta."""

    @property
    def tile(self) -> int:
        """How many coordinates it takes at once, at most."""

    def step(
        self,
        *,
        theta: Float32,
        mean: Float32,
        out: Float32,
        buffers: Mapping[str, Float32],
        steps: int,
        weight: float,
    ) -> None:
        """One step over m coordinates.

        Args:
            theta: shape [m], read only.
            mean: shape [m], the weighted mean update; may be destroyed.
            out: shape [m], receives the next weights.
            buffers: by name, shape [m], changed in place; all zeros before the first step.
            steps: outer steps before this one.
            weight: the sum of the weights.
        """


@dataclass(frozen=True, slots=True)
class Average:
    """theta + lr * mean: federated averaging where lr is 1."""

    lr: float
    buffer_names: tuple[str, ...] = ()
    tile: int = BLOCK

    def step(
        self,
        *,
        theta: Float32,
        mean: Float32,
        out: Float32,
        buffers: Mapping[str, Float32],
        steps: int,
        weight: float,
    ) -> None:
        """See OuterOptimizer."""
        del buffers, steps, weight
        np.multiply(mean, np.float32(self.lr), out=mean)
        np.add(theta, mean, out=out)


@dataclass(frozen=True, slots=True)
class Nesterov:
    """SGD with Nesterov momentum on g = -mean, as torch.optim.SGD(nesterov=True) defines it."""

    lr: float
    momentum: float
    buffer_names: tuple[str, ...] = ("momentum",)
    tile: int = BLOCK

    def step(
        self,
        *,
        theta: Float32,
        mean: Float32,
        out: Float32,
        buffers: Mapping[str, Float32],
        steps: int,
        weight: float,
    ) -> None:
        """See OuterOptimizer."""
        del steps, weight
        v, g = buffers["momentum"], mean
        np.negative(mean, out=g)
        np.multiply(v, np.float32(self.momentum), out=v)
        np.add(v, g, out=v)
        np.multiply(v, np.float32(self.momentum), out=out)
        np.add(g, out, out=out)
        np.multiply(out, np.float32(self.lr), out=out)
        np.subtract(theta, out, out=out)


def optimizer_for(outer: Outer) -> OuterOptimizer:
    """The optimizer that a plan names.

    Raises:
        PlanRefusedError: it is not known, or cannot work above a secure sum; with a rule id.
    """
    if outer.optimizer == "average":
        return Average(outer.lr)
    if outer.optimizer == "nesterov":
        return Nesterov(outer.lr, outer.momentum)
    kind, _, name = outer.optimizer.partition(":")
    if kind != "flower":
        raise PlanRefusedError(
            f"there is no outer optimizer {outer.optimizer}", rule="outer.optimizer.unknown"
        )
    from protocols.outer_flower import flower_optimizer  # noqa: PLC0415 - few plans need it

    return flower_optimizer(outer, name)
