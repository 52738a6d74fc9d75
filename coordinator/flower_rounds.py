"""One strategy round as one run of the federation: plain values, no flwr here.

A strategy makes the next model by itself, so its rounds cannot be the rounds of one plan, whose
outer optimizer makes the next model. Each is a run of its own:

    run       <name>-<n>, n the strategy's round; after a failure <name>-<n>-try2 and so on
    start     the strategy's arrays
    step      the site's Flower ClientApp, told the strategy's config
    outer     "average", lr 1: the released model IS the weighted mean of the sites' models

The same round asked for again is the same run: a coordinator that has its result gives it, one
that is at work on it goes on. So whoever asks may be killed at any time, and nobody trains twice.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from protocols.errors import (
    IntegrityError,
    MalformedMessageError,
    ManifestMismatchError,
    NonFiniteUpdateError,
    NotFoundError,
    NotReadyError,
    PlanRefusedError,
    RefusedError,
)
from protocols.identifiers import RunId, parse_run_id
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.sizes import WEIGHT_ONE

Scalar = bool | int | float | str
Arrays = Mapping[str, NDArray[Any]]
Answer = TypeVar("Answer")

SERIES: Final = "minga-series"  # in app_config: the runs that are one run to the app
SERVER_ROUND: Final = "server-round"
_MAX_NAME: Final = 32  # characters: run ids have 48
_MAX_TRIES: Final = 100
_POLL_S: Final = 0.25
_PATIENCE_S: Final = 120.0  # without any answer of the coordinator


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTerms:
    """What the plans of all rounds say, besides the strategy's arrays and config.

    Args:
        name: of the whole; run ids begin with it. At most 32 characters.
        app: the ClientApp, ``package.module:attribute``; sites allow it by this name.
        roster: nodes, all of which are asked in every round.
        min_participants: fewer, and a round is aborted; None: all of the roster.
        mode: of the sum; None: "aggregate-only" for three nodes and more, else "open".
        weight_cap: a site's weight is its ``num-examples`` up to this number; a power of two up to
            65,536 makes the weights exact. None: every site weighs the same.
        app_config: told to the app in every round; the strategy's config comes after it.
        languages: evaluate each round's starting model on the sites' text of these languages.
        plan: further fields of the plan: ``title``, ``vector``, ``deadlines``, ``local_step``.
    """

    name: str
    app: str
    roster: tuple[str, ...]
    min_participants: int | None = None
    mode: str | None = None
    weight_cap: int | None = None
    app_config: Mapping[str, Scalar] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parse_run_id(self.name)
        if len(self.name) > _MAX_NAME:
            raise MalformedMessageError(
                f"the name {self.name} has more than {_MAX_NAME} characters"
            )
        if not self.roster or len(set(self.roster)) != len(self.roster):
            raise MalformedMessageError("the roster must name nodes, each once")
        own = {
            "run",
            "roster",
            "mode",
            "min_participants",
            "rounds",
            "model",
            "outer",
            "evaluation",
        }
        if taken := sorted(own & set(self.plan)):
            raise MalformedMessageError(f"plan: {taken[0]} follows from the strategy's rounds")

    @property
    def nodes(self) -> tuple[str, ...]:
        """The roster, ascending by Flower's number of a node."""
        return tuple(sorted(self.roster, key=node_number))


def node_number(node: str) -> int:
    """The positive 63-bit number by which Flower knows a node; stable."""
    return int.from_bytes(hashlib.sha256(node.encode()).digest()[:8], "big") >> 1 or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run of one round stands."""

    status: str  # "active", "done", "stopped", "failed"
    why: str  # of its last round
    released: bool
    metrics: Mapping[str, int] = field(default_factory=dict)  # sums over the survivors
    snapshot: bytes | None = None  # canonical document of the released model
    objections: tuple[str, ...] = ()  # of nodes that computed another model

    @property
    def lost(self) -> bool:
        """Whether the run ended without a model."""
        return not self.released and self.status in ("stopped", "failed")


class Federation(Protocol):
    """What a Grid needs: the public Admin and Bulk services, called as an operator."""

    def begin(self, fields: Mapping[str, Any], model: Path) -> None:
        """Submit a run; the same run again is no error.

        Args:
            fields: of the plan, without what follows from the model and the members' keys.
            model: folder with ``manifest.json`` and ``theta.f32``.

        Raises:
            RefusedError: ExistsError where another plan has the run's name.
            NotReadyError: the coordinator does not answer.
        """

    def look(self, run: RunId) -> Outcome:
        """How a run stands. Raises: NotFoundError, NotReadyError."""

    def theta(self, snapshot: bytes) -> NDArray[np.float32]:
        """The weights of a snapshot, float32, shape [D], checked against their digest."""


# -- what goes in --------------------------------------------------------------------------------


def manifest_of(arrays: Arrays) -> Manifest:
    """Names and shapes of a model, in its own order.

    Raises:
        PlanRefusedError: an array is not of floating point, so that it has no mean.
        MalformedMessageError: a name cannot be used.
    """
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise PlanRefusedError(
                f"array {name} is {array.dtype}: only floating-point arrays can be averaged; keep"
                " counters in the app's Context",
                rule="flower.arrays",
            )
    return Manifest(tuple(TensorSpec(name, array.shape) for name, array in arrays.items()))


def write_model(arrays: Arrays, folder: Path) -> Manifest:
    """Write arrays as a snapshot folder, in float32; returns their manifest.

    Raises:
        NonFiniteUpdateError: an array holds NaN, infinity, or what float32 cannot hold.
    """
    manifest = manifest_of(arrays)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    with (folder / "theta.f32").open("wb") as file:
        for name, array in arrays.items():
            with np.errstate(over="ignore"):
                values = np.ascontiguousarray(array, dtype="<f4")
            if not np.isfinite(values).all():
                raise NonFiniteUpdateError(f"array {name} of the strategy holds NaN or infinity")
            file.write(values.reshape(-1).data)
    return manifest


def plan_fields(terms: RoundTerms, run: RunId, config: Mapping[str, Scalar]) -> dict[str, Any]:
    """The plan of one round, as an operator would write it.

    Args:
        terms: of all rounds.
        run: of this one.
        config: the strategy's, with ``server-round``.
    """
    extra = dict(terms.plan)
    step = {
        **extra.pop("local_step", {}),
        "kind": "flower",
        "app": terms.app,
        "app_config": {**terms.app_config, **config, SERIES: terms.name},
    }
    nodes = len(terms.roster)
    return {
        "title": f"{terms.name}, round {config[SERVER_ROUND]} of a Flower strategy",
        **extra,
        "run": run,
        "mode": terms.mode or ("aggregate-only" if nodes >= 3 else "open"),
        "roster": sorted(terms.roster),
        "min_participants": terms.min_participants or nodes,
        "rounds": 1,
        "model": {"family": "vector"},
        "local_step": step,
        "outer": {"optimizer": "average", "lr": 1.0},
        "vector": {**extra.get("vector", {}), "weight_cap_tokens": terms.weight_cap},
        "evaluation": {"languages": sorted(terms.languages), "final": False},
    }


def run_name(terms: RoundTerms, number: int, attempt: int) -> RunId:
    """Of one try at one round; tries count from 1."""
    base = f"{terms.name}-{number}"
    return RunId(base if attempt == 1 else f"{base}-try{attempt}")


# -- what comes out ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """The synthetic reply of a round, as plain values."""

    arrays: dict[str, NDArray[np.float32]]  # weighted mean of the sites' models
    metrics: dict[str, int | float]


def mean_metrics(sums: Mapping[str, int], weight_cap: int | None) -> dict[str, int | float]:
    """Metrics of the one reply that stands for all.

    ``num-examples`` is the total weight, as the sites' own would add up: their examples up to the
    cap, or their number where all weigh the same. ``train_loss`` is the mean over all tokens; what
    begins with ``total-`` is a sum.
    """
    found: dict[str, int | float] = {
        "num-examples": sums["weight"] / WEIGHT_ONE * (weight_cap or 1),
        "total-nodes": sums["nodes"],
        "total-examples": sums["records"],
        "total-tokens": sums["tokens"],
        "total-steps": sums["steps"],
        "total-train-ms": sums["train_ms"],
        "total-clamped": sums["clamped"],
    }
    if sums["tokens"]:
        found["train_loss"] = sums["loss_micronats"] / 1e6 / sums["tokens"]
    for name, value in sums.items():
        kind, slash, language = name.partition("/")
        if slash and kind == "nll_millinats":
            found[f"nll-nats/{language}"] = value / 1e3
        elif slash:
            found[name] = value
    return found


def split(theta: NDArray[np.float32], manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """theta as arrays by name.

    Raises:
        ManifestMismatchError: theta has another size.
    """
    if theta.shape != (manifest.coordinates,):
        raise ManifestMismatchError(
            f"the released model has {theta.size} coordinates; the strategy sent"
            f" {manifest.coordinates}"
        )
    return {
        spec.name: theta[segment.start : segment.stop].reshape(spec.shape)
        for spec, segment in zip(manifest.tensors, manifest.segments, strict=True)
    }


# -- one round -----------------------------------------------------------------------------------


class RoundFailedError(NotReadyError):
    """The run of a round ended without a model; asked for again, it is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A round that was asked for."""

    run: RunId
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Rounds of one strategy in one federation."""

    federation: Federation
    terms: RoundTerms
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def begin(self, arrays: Arrays, config: Mapping[str, Scalar]) -> Begun:
        """Ask for a round; a run that failed before is followed by another try.

        Raises:
            RefusedError: the coordinator does not take the plan.
            NotReadyError: it was away for two minutes.
        """
        number = config.get(SERVER_ROUND)
        if type(number) is not int or number < 1:
            raise MalformedMessageError(f"the config must say {SERVER_ROUND}, a number from 1")
        run = self._patiently(lambda: self._run(number))
        with TemporaryDirectory(prefix="minga-flower-") as folder:
            manifest = write_model(arrays, Path(folder))
            fields = plan_fields(self.terms, run, config)
            self._patiently(lambda: self.federation.begin(fields, Path(folder)))
        return Begun(run=run, manifest=manifest)

    def _run(self, number: int) -> RunId:
        for attempt in range(1, _MAX_TRIES + 1):
            run = run_name(self.terms, number, attempt)
            try:
                if not self.federation.look(run).lost:
                    return run
            except NotFoundError:
                return run
        raise RefusedError(f"round {number} of {self.terms.name} failed {_MAX_TRIES} times")

    def result(self, begun: Begun) -> RoundResult | None:
        """What came out of a round; None while it goes on.

        Raises:
            RoundFailedError: it ended without a model.
            RefusedError: an operator stopped it.
            IntegrityError: a node computed another model.
            NotReadyError: the coordinator does not answer.
        """
        seen = self.federation.look(begun.run)
        if seen.objections:
            raise IntegrityError(f"run {begun.run}: {'; '.join(seen.objections)}")
        if seen.released and seen.snapshot is not None:
            theta = self.federation.theta(seen.snapshot)
            return RoundResult(
                arrays=split(theta, begun.manifest),
                metrics=mean_metrics(seen.metrics, self.terms.weight_cap),
            )
        if seen.status == "failed":
            raise RoundFailedError(f"run {begun.run} failed: {seen.why}")
        if seen.status == "stopped":
            raise RefusedError(f"run {begun.run} was stopped: {seen.why}")
        return None

    def wait(self, begun: Begun, timeout_s: float | None) -> RoundResult | None:
        """The result of a round; None if it is not there in time. It goes on all the same.

        Raises:
            RoundFailedError, RefusedError, IntegrityError: see ``result``.
            NotReadyError: the coordinator was away for two minutes.
        """
        until = None if timeout_s is None else self.monotonic() + timeout_s
        while (found := self._patiently(lambda: self.result(begun))) is None:
            if until is not None and self.monotonic() >= until:
                return None
            self.sleep(_POLL_S)
        return found

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Ask again while the coordinator is away, as while it is being restarted."""
        began = self.monotonic()
        while True:
            try:
                return ask()
            except RoundFailedError:
                raise
            except NotReadyError:
                if self.monotonic() - began >= _PATIENCE_S:
                    raise
                self.sleep(4 * _POLL_S)
