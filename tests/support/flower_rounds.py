"""A federation without processes for tests of the Flower Grid, and what Flower itself would do.

Every site has its own way to change a model; ``FakeFederation`` answers a run with the weighted
mean of the sites' models, as a coordinator does. ``plain_rounds`` gives the same strategy the
single replies instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.flower_rounds import Outcome, node_number
from protocols.errors import ExistsError, NotFoundError, UnreachableError
from protocols.identifiers import RunId
from protocols.tensors.manifest import Manifest
from protocols.tensors.sizes import WEIGHT_ONE

Model = dict[str, np.ndarray]
Step = Callable[[Model, Mapping[str, Any]], Model]  # (model, config) -> the site's model


@dataclass
class FakeFederation:
    """Answers as the coordinator would; ``log`` says what was asked."""

    sites: Mapping[str, tuple[int, Step]]  # node: (examples, what it does)
    cap: int
    runs: dict[str, tuple[dict[str, Any], bytes, Model]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # runs that fail
    held_up: set[str] = field(default_factory=set)  # runs that never end
    away: int = 0  # how many of the next calls nobody answers
    objections: tuple[str, ...] = ()
    begun: list[str] = field(default_factory=list)  # every run that was begun, once

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise UnreachableError("no coordinator answers")

    def begin(self, fields: Mapping[str, Any], model: Path) -> None:
        self._answer()
        run = fields["run"]
        manifest = Manifest.from_bytes((model / "manifest.json").read_bytes())
        data = (model / "theta.f32").read_bytes()
        if run in self.runs:
            if self.runs[run][:2] != (dict(fields), data):
                raise ExistsError(f"another run is called {run}")
            return
        theta = np.frombuffer(data, "<f4")
        start = {
            spec.name: theta[segment.start : segment.stop].reshape(spec.shape)
            for spec, segment in zip(manifest.tensors, manifest.segments, strict=True)
        }
        self.runs[run] = (dict(fields), data, self._mean(start, fields["local_step"]["app_config"]))
        self.begun.append(run)

    def _mean(self, start: Model, config: Mapping[str, Any]) -> Model:
        total = sum(examples for examples, _ in self.sites.values())
        mean = {name: np.zeros(array.shape) for name, array in start.items()}
        for examples, step in self.sites.values():
            for name, array in step(start, config).items():
                mean[name] += examples / total * (array - start[name])
        return {name: (start[name] + mean[name]).astype(np.float32) for name in start}

    def look(self, run: RunId) -> Outcome:
        self._answer()
        if run not in self.runs:
            raise NotFoundError(f"there is no run {run}")
        if run in self.lost:
            return Outcome(status="failed", why="too few nodes joined", released=False)
        if run in self.held_up:
            return Outcome(status="active", why="1 of 3 ready", released=False)
        examples = sum(n for n, _ in self.sites.values())
        metrics = dict.fromkeys(("steps", "train_ms", "clamped"), 0) | {
            "weight": examples * WEIGHT_ONE // self.cap,
            "nodes": len(self.sites),
            "tokens": examples,
            "records": examples,
            "loss_micronats": 500_000 * examples,
        }
        return Outcome(
            status="done",
            why="",
            released=True,
            metrics=metrics,
            snapshot=run.encode(),
            objections=self.objections,
        )

    def theta(self, snapshot: bytes) -> np.ndarray:
        self._answer()
        return np.concatenate([a.reshape(-1) for a in self.runs[snapshot.decode()][2].values()])


def plain_rounds(
    strategy: Any, sites: Mapping[str, tuple[int, Step]], arrays: Model, rounds: int
) -> Model:
    """What the strategy makes of single replies: one ``Message`` for each site, by node id."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

    from coordinator.flower_private import identify

    identify(77)
    numbered = sorted((node_number(node), site) for node, site in sites.items())

    class Everybody:
        def get_node_ids(self):
            return [number for number, _ in numbered]

    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    for number in range(1, rounds + 1):
        asked = strategy.configure_train(number, record, ConfigRecord(), Everybody())
        asked = sorted(asked, key=lambda message: message.metadata.dst_node_id)
        replies = []
        for message, (_, (examples, step)) in zip(asked, numbered, strict=True):
            # as the site gets them: in float32
            start = {
                name: array.numpy().astype(np.float32)
                for name, array in message.content["arrays"].items()
            }
            made = step(start, dict(message.content["config"]))
            content = RecordDict(
                {
                    "arrays": ArrayRecord({name: Array(array) for name, array in made.items()}),
                    "metrics": MetricRecord({"num-examples": examples}),
                }
            )
            replies.append(Message(content, reply_to=message))
        record, _ = strategy.aggregate_train(number, replies)
    return {name: array.numpy() for name, array in record.items()}
