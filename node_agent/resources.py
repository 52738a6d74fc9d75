"""What a local step cost, as this site claims it: pure functions from the worker's figures.

    worker: GPU and CPU seconds, joules where the driver counts them
      -> journal (detail of the outcome)
      -> named: to the coordinator, with the confirmation, and in the log's update.commit
      -> summed: coordinates of the round's vector, where the plan has them

Whole milliseconds and milliwatt hours. An estimate is never called a measurement: where the driver
counted only a part, the estimate stands for all. ``[resources]`` in config.toml:

    report = "named"     # "summed": only inside the sum; "nothing"
    private = false      # also in plans with differential privacy: times depend on the records
    gpu_watts = 700      # for the estimate, where NVML does not count; left out: no energy
    cpu_watts = 5        # of one busy core
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from node_agent.spool import Spent
from protocols.gen import accounting_pb2
from protocols.plan import Plan
from protocols.plan_terms import Limits
from protocols.tensors.metrics import METRIC_BOUND, RESOURCE_METRICS
from protocols.tlog.kinds import ResourcesUsed

Source = Literal["measured", "estimated", "none"]


class ResourcesConfig(BaseModel):
    """What the site says of its costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    report: Literal["named", "summed", "nothing"] = "named"
    private: bool = False
    gpu_watts: float | None = Field(default=None, ge=0, le=100_000)
    cpu_watts: float | None = Field(default=None, ge=0, le=10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One round's figures."""

    gpu_ms: int
    cpu_ms: int
    energy_mwh: int  # of the GPUs when measured; of GPUs and CPUs when estimated
    source: Source  # of the energy

    def to_facts(self) -> dict[str, object]:
        """For the journal."""
        return {
            "gpu_ms": self.gpu_ms,
            "cpu_ms": self.cpu_ms,
            "energy_mwh": self.energy_mwh,
            "source": self.source,
        }


def claim_of(spent: Spent | None, config: ResourcesConfig, plan: Plan) -> Claim | None:
    """Figures of a local step; None: the site says none, or the worker did not count.

    How long a private step takes depends on which records were drawn, and no noise covers that: in
    a plan with differential privacy nothing is said unless the site wants it.

    ==============================  =============================================
    Case                            Energy
    ==============================  =============================================
    the driver counted              measured
    else a wattage is configured    estimated: seconds times watts
    else                            0, source "none"
    ==============================  =============================================
    """
    if spent is None or config.report == "nothing":
        return None
    if plan.privacy is not None and not config.private:
        return None
    return used_here(spent, config)


def used_here(spent: Spent, config: ResourcesConfig) -> Claim:
    """What a local step used, for the site's own caps; nobody else is told of it by this."""
    if spent.energy_joules is not None and spent.gpu_seconds > 0:
        source: Source = "measured"
        joules = spent.energy_joules
    else:
        watts = [(config.gpu_watts, spent.gpu_seconds), (config.cpu_watts, spent.cpu_seconds)]
        known = [watt * seconds for watt, seconds in watts if watt is not None and seconds > 0]
        source, joules = ("estimated", sum(known)) if known else ("none", 0.0)
    return Claim(
        gpu_ms=_whole(1e3 * spent.gpu_seconds),
        cpu_ms=_whole(1e3 * spent.cpu_seconds),
        energy_mwh=_whole(joules / 3.6),
        source=source,
    )


def _whole(value: float) -> int:
    return int(min(max(0, round(value)), METRIC_BOUND - 1))


def read_claim(detail: Mapping[str, Any], name: str = "resources") -> Claim | None:
    """The claim in the journal's detail of an outcome; None: there is none.

    The journal is this node's own: what does not fit is of another version, and left out.

    Args:
        name: ``resources``: what is said to others; ``used``: what the site's caps count.
    """
    facts = detail.get(name)
    if not isinstance(facts, dict):
        return None
    try:
        gpu, cpu, energy = (int(facts[name]) for name in ("gpu_ms", "cpu_ms", "energy_mwh"))
        source = facts["source"]
    except (KeyError, TypeError, ValueError):
        return None
    if source not in ("measured", "estimated", "none"):
        return None
    return Claim(gpu_ms=gpu, cpu_ms=cpu, energy_mwh=energy, source=source)


def counted(limits: Limits, used: Claim | None) -> Limits:
    """What a round counts against the site's day: what it used, once that is known.

    Until then, and for energy that nobody measured or estimated, what its plan may use at most.
    """
    if used is None:
        return limits
    known: dict[str, int] = {"gpu_minutes_node": -(-used.gpu_ms // 60_000)}
    if used.source != "none":
        known["energy_wh_node"] = -(-used.energy_mwh // 1000)
    return limits.model_copy(update=known)


def coordinates(claim: Claim | None) -> dict[str, int]:
    """The resource metrics of a vector; zeros, and no vote in ``reporting``, where none is said."""
    if claim is None:
        return dict.fromkeys(RESOURCE_METRICS, 0)
    return {
        "gpu_ms": claim.gpu_ms,
        "cpu_ms": claim.cpu_ms,
        "energy_mwh": claim.energy_mwh,
        "reporting": 1,
    }


def as_message(claim: Claim) -> accounting_pb2.Resources:
    """For the coordinator."""
    return accounting_pb2.Resources(
        gpu_ms=claim.gpu_ms,
        cpu_ms=claim.cpu_ms,
        energy_mwh=claim.energy_mwh,
        source=claim.source,
    )


def as_leaf(claim: Claim | None, config: ResourcesConfig, *, size: int) -> ResourcesUsed:
    """For the log's ``update.commit``; whole seconds and watt hours, rounded up.

    Args:
        claim: of the round.
        config: what the site says at all.
        size: bytes of the vector.
    """
    if claim is None or config.report != "named":
        return ResourcesUsed(bytes=size)
    return ResourcesUsed(
        gpu_seconds=-(-claim.gpu_ms // 1000),
        energy_wh=-(-claim.energy_mwh // 1000),
        bytes=size,
        source=claim.source,
    )
