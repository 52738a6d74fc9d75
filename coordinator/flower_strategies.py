"""Unmodified Flower strategies above a secure sum: which ones, their state, their rounds.

A strategy gets ONE reply for all nodes: the weighted mean of the sites' models. Those that are
functions of that mean compute what they would from single replies, up to float rounding; those
that rank, drop or clip single replies would go wrong without a word, and are refused by name.

The round loop is ours because ``Strategy.start`` has no start round, no checkpoint and no stop,
and takes a round without a model for a model at rest.
"""

from __future__ import annotations

import os

# Before any import of flwr: it phones home by default.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import strategy as strategies

from coordinator.flower_rounds import Scalar
from coordinator.flower_state import StrategyState, load, save
from protocols.errors import ExistsError, IntegrityError, NotReadyError, PlanRefusedError
from protocols.outer_flower import flower_optimizer
from protocols.plan import Outer

if TYPE_CHECKING:
    from coordinator.flower import MingaGrid

logger = logging.getLogger(__name__)

_ADAPTIVE: Final = ("current_arrays", "m_t", "v_t")
_STATE: Final[dict[str, tuple[str, ...]]] = {  # what a strategy remembers between rounds
    "FedAvg": (),
    "FedProx": (),
    "FedAvgM": ("current_arrays", "momentum_vector"),
    "FedAdagrad": _ADAPTIVE,
    "FedAdam": _ADAPTIVE,
    "FedYogi": _ADAPTIVE,
}
_KEYS: Final = {  # where the ClientApp finds and puts things
    "arrayrecord_key": "arrays",
    "configrecord_key": "config",
    "weighted_by_key": "num-examples",
}


# -- which strategies ----------------------------------------------------------------------------


def check_strategy(strategy: Any, *, nodes: int) -> str:
    """The name of a strategy that works above a sum of ``nodes`` nodes.

    Raises:
        PlanRefusedError: ``outer.flower.individual_updates``, ``outer.flower.privacy`` or
            ``outer.flower.unknown``, as in a plan; ``flower.changed``, ``flower.cohort``,
            ``flower.evaluate`` or ``flower.keys``.
    """
    name = type(strategy).__name__
    flower_optimizer(Outer(), name)  # the plan's own list: one list for both
    if type(strategy) is not getattr(strategies, name, None):
        raise PlanRefusedError(
            f"{name} is not Flower's own: what a changed strategy reads of a reply is not known",
            rule="flower.changed",
        )
    for key, wanted in _KEYS.items():
        if getattr(strategy, key) != wanted:
            raise PlanRefusedError(f"{name}: {key} must be {wanted!r}", rule="flower.keys")
    if strategy.fraction_train != 1.0:
        raise PlanRefusedError(
            f"{name}: fraction_train must be 1.0; who takes part is for the federation to say",
            rule="flower.cohort",
        )
    for key in ("min_train_nodes", "min_available_nodes"):
        if getattr(strategy, key) > nodes:
            raise PlanRefusedError(
                f"{name}: {key} is {getattr(strategy, key)}, the roster has {nodes} nodes",
                rule="flower.cohort",
            )
    if strategy.fraction_evaluate != 0.0:
        raise PlanRefusedError(
            f"{name}: fraction_evaluate must be 0.0; sites evaluate a round's starting model in"
            " the round itself, where the terms name languages",
            rule="flower.evaluate",
        )
    return name


def settings(strategy: Any) -> dict[str, Scalar]:
    """A strategy's numbers and texts: what must not change between two parts of a run."""
    return {
        key: value
        for key, value in sorted(vars(strategy).items())
        if isinstance(value, bool | int | float | str)
    }


# -- its state -----------------------------------------------------------------------------------


def attributes_of(strategy: Any, name: str) -> dict[str, Any]:
    """What a strategy remembers, as plain arrays."""
    found: dict[str, Any] = {}
    for attribute in _STATE[name]:
        value = getattr(strategy, attribute)
        if value is None:
            continue
        if isinstance(value, ArrayRecord):
            value = {key: array.numpy() for key, array in value.items()}
        found[attribute] = value if isinstance(value, list) else dict(value)
    return found


def restore(strategy: Any, name: str, attributes: Mapping[str, Any]) -> None:
    """The reverse of ``attributes_of``, on a fresh strategy."""
    for attribute, value in attributes.items():
        if name == "FedAvgM" and attribute == "current_arrays":
            setattr(strategy, attribute, record_of(value))
        else:
            setattr(strategy, attribute, value)


def record_of(arrays: Mapping[str, Any]) -> Any:
    """numpy arrays as a Flower record, in their order."""
    record = ArrayRecord()
    for key, array in arrays.items():
        record[key] = Array(array)
    return record


def plain(record: Any) -> dict[str, Any]:
    """A Flower record as numpy arrays, in its order."""
    return {key: array.numpy() for key, array in record.items()}


# -- its rounds ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyResult:
    """What came out of a strategy's rounds."""

    arrays: Any  # ArrayRecord, the last model
    round: int  # the last round that is done
    metrics: Mapping[int, Mapping[str, Any]]  # aggregated, by round
    resumed_after: int  # the round that was found done; 0: started afresh


def run_strategy(
    strategy: Any,
    grid: MingaGrid,
    arrays: Any,
    rounds: int,
    *,
    config: Mapping[str, Scalar] | None = None,
    state: Path | None = None,
    timeout_s: float | None = None,
    after_round: Callable[[int, Any, Mapping[str, Any]], None] | None = None,
) -> StrategyResult:
    """Run a Flower strategy until ``rounds`` rounds are done.

    Args:
        strategy: one of Flower's own, fresh, with ``fraction_evaluate=0.0``.
        grid: of the federation.
        arrays: ArrayRecord, the first model; not looked at when ``state`` has a later one.
        rounds: in all, also over several calls.
        config: for the ClientApp, beside what the strategy says; numbers and texts.
        state: file to go on from and to write after every round. None: nothing is kept.
        timeout_s: for one round.
        after_round: called with the round, the new arrays and metrics, such as to evaluate.

    Raises:
        PlanRefusedError: the strategy cannot work here; see ``check_strategy``.
        ExistsError: the state is of another strategy, of other settings or another name.
        NotReadyError: a round failed or was not done in time. Calling again goes on from there.
        IntegrityError: the strategy gave no model, or a node computed another one.
    """
    name = grid.admit(strategy)
    options = settings(strategy)
    held = load(state) if state is not None else None
    if held is not None:
        _check_same(held, grid.terms.name, name, options)
        restore(strategy, name, held.attributes)
        arrays = record_of(held.arrays)
    first = held.round if held is not None else 0
    metrics: dict[int, dict[str, Any]] = dict(held.metrics) if held is not None else {}
    for number in range(first + 1, rounds + 1):
        arrays, metrics[number] = _one_round(
            strategy, name, grid, arrays, number, config, timeout_s
        )
        if state is not None:
            made = StrategyState(
                name=grid.terms.name,
                strategy=name,
                options=options,
                round=number,
                arrays=plain(arrays),
                attributes=attributes_of(strategy, name),
                metrics=metrics,
            )
            save(state, made)
        if after_round is not None:
            after_round(number, arrays, metrics[number])
    return StrategyResult(
        arrays=arrays, round=max(first, rounds), metrics=metrics, resumed_after=first
    )


def _one_round(
    strategy: Any,
    name: str,
    grid: MingaGrid,
    arrays: Any,
    number: int,
    config: Mapping[str, Scalar] | None,
    timeout_s: float | None,
) -> tuple[Any, dict[str, Any]]:
    """Configure, send, receive, aggregate; true round numbers, since FedAdam computes with them."""
    messages = strategy.configure_train(number, arrays, ConfigRecord(dict(config or {})), grid)
    replies = list(grid.send_and_receive(messages=messages, timeout=timeout_s))
    if not replies:
        raise NotReadyError(
            f"round {number} of {grid.terms.name} was not done in {timeout_s:g} s; it goes on, and"
            " so does the strategy when it is started again"
        )
    replies.sort(key=lambda reply: int(reply.metadata.src_node_id))
    clamped = next(iter(replies[0].content.metric_records.values())).get("total-clamped", 0)
    if clamped:
        logger.warning(
            "round %d: %d coordinates were clamped; raise vector.scale.first_bound", number, clamped
        )
    made, metrics = strategy.aggregate_train(number, replies)
    if made is None:  # Flower would go on with the old model, without a word
        raise IntegrityError(f"{name} gave no model in round {number} of {grid.terms.name}")
    return made, dict(metrics if metrics is not None else MetricRecord())


def _check_same(held: StrategyState, of: str, name: str, options: Mapping[str, Any]) -> None:
    """Refuse to go on with what another strategy left."""
    if (held.name, held.strategy) != (of, name):
        raise ExistsError(
            f"the state is of {held.strategy} in {held.name}, not of {name} in {of}: name another"
            " file"
        )
    changed = {
        key for key in {*held.options, *options} if held.options.get(key) != options.get(key)
    }
    if changed:
        key = min(changed)
        raise ExistsError(
            f"the state was made with {key}={held.options.get(key)}, not {options.get(key)}: go on"
            " with the same settings, or name another file"
        )
