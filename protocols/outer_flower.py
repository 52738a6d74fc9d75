"""Flower's server optimizers above a secure sum.

A Flower strategy gets ONE synthetic reply: the weighted mean of the sites' models, with the total
weight as ``num-examples``. For strategies that are functions of the weighted mean this is what they
would have computed from the individual replies, up to float rounding. Strategies that need to see
single updates cannot run here and are refused by name, as is everything unknown.

The allowed ones are elementwise, so they are fed slice by slice and memory does not grow with the
model. Only Flower's public API is used: ``aggregate_train`` and the attributes that hold a
strategy's state. Flower's defaults are written out below, so that a plan means the same under every
version of it. ``FedAdam`` corrects its bias with float powers from the platform's library: nodes
that compare models under it must run the same platform.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocols.errors import ConfigurationError, IntegrityError, PlanRefusedError
from protocols.plan import Outer
from protocols.tensors.sizes import UNIT

_ADAPTIVE: Final = {"eta": 1e-1, "eta_l": 1e-1, "tau": 1e-3}
_ALLOWED: Final[dict[str, dict[str, float]]] = {
    "FedAvg": {},
    "FedProx": {},  # its proximal term is the local step's: plan.local_step.proximal_mu
    "FedAvgM": {"server_learning_rate": 1.0, "server_momentum": 0.0},
    "FedAdagrad": _ADAPTIVE,
    "FedAdam": {**_ADAPTIVE, "beta_1": 0.9, "beta_2": 0.99},
    "FedYogi": {"eta": 1e-2, "eta_l": 0.0316, "tau": 1e-3, "beta_1": 0.9, "beta_2": 0.99},
}
_INDIVIDUAL: Final = frozenset({  # they rank, drop or weigh single updates, losses or trees
    "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg", "FedXgbBagging",
    "FedXgbCyclic",
})  # fmt: skip
_SAME: Final = {"FedProx": "FedAvg"}  # aggregates alike, and warns that proximal_mu is 0
_KEY: Final = "slice"


def flower_optimizer(outer: Outer, name: str) -> FlowerOptimizer:
    """The optimizer ``flower:name`` of a plan; does not import Flower.

    Raises:
        PlanRefusedError: ``outer.flower.individual_updates``, ``outer.flower.privacy``,
            ``outer.flower.unknown`` or ``outer.flower.options``.
    """
    if name in _INDIVIDUAL or name.startswith("FedXgb"):
        raise PlanRefusedError(
            f"Flower's {name} needs to see single updates; above a secure sum there is only their"
            " mean",
            rule="outer.flower.individual_updates",
        )
    if name.startswith("DifferentialPrivacy"):
        raise PlanRefusedError(
            f"Flower's {name} would clip or noise the mean instead of the updates; privacy is set"
            " by the plan's mode",
            rule="outer.flower.privacy",
        )
    if name not in _ALLOWED:
        raise PlanRefusedError(
            f"Flower's {name} is not one of {', '.join(sorted(_ALLOWED))}",
            rule="outer.flower.unknown",
        )
    if outer.lr != 1.0 or outer.momentum != 0.0:
        raise PlanRefusedError(
            "lr and momentum of a flower optimizer are given in outer.options, by Flower's names",
            rule="outer.flower.options",
        )
    options = dict(_ALLOWED[name])
    for key, value in outer.options.items():
        if key not in options or not _in_range(key, value):
            raise PlanRefusedError(
                f"option {key}={value:g} is not one that Flower's {name} takes here",
                rule="outer.flower.options",
            )
        options[key] = float(value)
    return FlowerOptimizer(name, options)


def _in_range(key: str, value: float) -> bool:
    if key in {"beta_1", "beta_2", "server_momentum"}:
        return 0.0 <= value < 1.0
    return 0.0 < value < 1e12


class _Quiet(logging.Filter):
    """Drops what Flower says while this module calls it: one line for every slice."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        del record
        return not getattr(self.calls, "ours", False)


_quiet = _Quiet()


def _flower() -> Any:
    # Flower reports to its makers unless told otherwise before the first import.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        import flwr.app  # noqa: PLC0415 - 2 s, and only some plans need it
        import flwr.serverapp  # noqa: PLC0415
    except ImportError:
        raise ConfigurationError(
            "this plan's outer optimizer is Flower's; install minga[node] or minga[coordinator]"
        ) from None
    logging.getLogger("flwr").addFilter(_quiet)  # a filter is added only once
    return flwr


class _Reply:
    """What a strategy reads of a reply; a real ``Message`` needs a process-wide identity."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def has_error(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class FlowerOptimizer:
    """One of Flower's strategies, with its options; see the module's docstring."""

    name: str
    options: Mapping[str, float]
    tile: int = UNIT // 4

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """Flower's own names of its state."""
        if self.name == "FedAvgM" and self.options["server_momentum"] > 0.0:
            return ("momentum_vector",)
        return ("m_t", "v_t") if "eta" in self.options else ()

    def step(
        self,
        *,
        theta: NDArray[np.float32],
        mean: NDArray[np.float32],
        out: NDArray[np.float32],
        buffers: Mapping[str, NDArray[np.float32]],
        steps: int,
        weight: float,
    ) -> None:
        """See OuterOptimizer. Flower counts rounds from 1.

        Raises:
            IntegrityError: the strategy gave no model.
        """
        flwr = _flower()
        record = flwr.app.ArrayRecord
        kind = getattr(flwr.serverapp.strategy, _SAME.get(self.name, self.name))
        strategy = kind(**self.options)
        if self.name == "FedAvgM":
            strategy.current_arrays = record({_KEY: flwr.app.Array(theta)})
            if buffers:
                strategy.momentum_vector = [buffers["momentum_vector"]]
        elif buffers:
            strategy.current_arrays = {_KEY: theta}
            strategy.m_t = {_KEY: buffers["m_t"]}
            strategy.v_t = {_KEY: buffers["v_t"]}
        np.add(theta, mean, out=mean)
        reply = _Reply(
            flwr.app.RecordDict(
                {
                    "arrays": record({_KEY: flwr.app.Array(mean)}),
                    "metrics": flwr.app.MetricRecord({"num-examples": weight}),
                }
            )
        )
        _quiet.calls.ours = True
        try:
            arrays, _ = strategy.aggregate_train(steps + 1, [reply])
        finally:
            _quiet.calls.ours = False
        if arrays is None:  # a strategy that gives nothing must not look like a model at rest
            raise IntegrityError(f"Flower's {self.name} gave no model")
        np.copyto(out, arrays[_KEY].numpy(), casting="same_kind")
        for name, buffer in buffers.items():
            state = getattr(strategy, name)
            np.copyto(buffer, state[0 if name == "momentum_vector" else _KEY], casting="same_kind")
