"""What a Flower app is told and what its numbers mean, as plain values. No flwr here."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from node_agent.job_files import least
from node_agent.resident import JobFailedError
from node_agent.spool import Evaluation, Job
from protocols.errors import ConfigurationError
from protocols.plan import Plan

_LOSSES: Final = ("train_loss", "train-loss", "loss")  # what Flower's examples call it
_MAX_COUNT: Final = 2**53 - 1
_PAIR: Final = re.compile(r"""([^\s=]+)=('[^']*'|"[^"]*"|[^\s'"]+)(?=\s|$)""")

Scalar = bool | int | float | str


def parse_node_config(text: str) -> dict[str, Scalar]:
    """Read ``key=value key=value``; values are TOML, as for Flower's ``--node-config``.

    Raises:
        ConfigurationError: names what cannot be read.
    """
    rest = _PAIR.sub("", text).strip()
    if rest:
        raise ConfigurationError(f"node config: {rest:.80} is not KEY=VALUE with a TOML value")
    found: dict[str, Scalar] = {}
    for key, value in _PAIR.findall(text):
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = None
        if not isinstance(parsed, bool | int | float | str):
            raise ConfigurationError(f"node config: the value of {key} is not a TOML scalar")
        found[key] = parsed
    return found


def round_config(job: Job, plan: Plan) -> dict[str, Scalar]:
    """What Flower's strategies would put into ``config``, and the plan's own terms.

    ``server-round`` counts from 1, as in Flower. Absent limits are left out; ``app_config`` comes
    last and may replace anything.
    """
    step = plan.local_step
    values: dict[str, Scalar] = {
        "server-round": job.index + 1,
        "lr": step.lr,
        "batch-size": step.batch_size,
        "sequence-length": step.sequence_length,
        "proximal-mu": step.proximal_mu,
        "seed": job.seed,
    }
    limits = {
        "max-steps": least(job.max_steps, step.max_steps),
        "max-tokens": least(job.max_tokens, step.max_tokens),
        "max-seconds": least(job.max_seconds, step.max_seconds),
    }
    values |= {name: limit for name, limit in limits.items() if limit is not None}
    return {**values, **step.app_config}


def site_config(job: Job, own: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """``node_config`` of the Context: where the site's text is, and what the site adds."""
    return {
        "train-paths": os.pathsep.join(job.data.train),
        "valid-paths": os.pathsep.join(job.data.valid),
        **own,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a reply's metrics say of the training."""

    examples: int = 0
    tokens: int = 0
    steps: int = 0
    loss_nats: float = 0.0  # summed over tokens


def read_counts(metrics: Mapping[str, Any]) -> Counts:
    """``num-examples`` is required, as by Flower's strategies.

    ``num-tokens`` (default: the examples) is what the plan's weight cap counts, ``num-steps``
    defaults to 1, and a mean loss under one of the usual names becomes a sum over tokens.

    Raises:
        JobFailedError: flower.reply: missing, negative or not finite; train.non_finite: the loss.
    """
    examples = _count(metrics, "num-examples")
    tokens = _count(metrics, "num-tokens", default=examples)
    loss = next((metrics[name] for name in _LOSSES if name in metrics), 0.0)
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        raise JobFailedError("train.non_finite", "the app's loss is not a finite number")
    return Counts(
        examples=examples,
        tokens=tokens,
        steps=_count(metrics, "num-steps", default=1),
        loss_nats=float(loss) * tokens,
    )


def _count(metrics: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    value = metrics.get(name, default)
    if value is None:
        raise JobFailedError("flower.reply", f"the app's metrics lack {name}")
    if isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= _MAX_COUNT:
        return round(value)
    raise JobFailedError("flower.reply", f"the app's {name} is {value!r:.40}, not a count")


def read_evaluation(metrics: Mapping[str, Any]) -> tuple[Evaluation, ...]:
    """Held-out sums per language: ``nll-nats/es``, ``bytes/es`` and ``documents/es``.

    Other metrics cannot be added up over sites and stay here.

    Raises:
        JobFailedError: flower.reply: a sum is missing, negative or not finite.
    """
    rows = []
    for name in sorted(metrics):
        prefix, _, language = name.partition("/")
        if prefix != "nll-nats":
            continue
        nll = metrics[name]
        if not isinstance(nll, int | float) or not math.isfinite(nll) or nll < 0 or not language:
            raise JobFailedError("flower.reply", f"the app's {name} is not a sum of nats")
        rows.append(
            Evaluation(
                language=language,
                nll_nats=float(nll),
                bytes=_count(metrics, f"bytes/{language}"),
                documents=_count(metrics, f"documents/{language}"),
            )
        )
    return tuple(rows)
