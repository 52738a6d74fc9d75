"""What a site can train: memory of its devices, and the tier that follows from it.

    T0  full weights of 70B: at least 1,200 GB of GPU memory (16 bytes a parameter, and room)
    T1  an adapter on 70B: at least 190 GB
    T2  an adapter on 8B: one GPU of at least 22 GB
    T3  tiny models on the CPU, evaluation

A run has one trainable vector, so a site joins the runs that fit and declines the others by the
rule ``site.memory``; different models are never averaged. Found by asking the machine; under Slurm,
where the devices are elsewhere, and wherever the answer is wrong, told by ``[capability]`` in
config.toml. The figures are decimal gigabytes, as devices are sold.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from node_agent.rules import Refusal
from protocols.plan import Plan

Tier = Literal["T0", "T1", "T2", "T3"]
GB: Final = 10**9
_TIERS: Final[tuple[tuple[Tier, float], ...]] = (("T0", 1200.0), ("T1", 190.0), ("T2", 22.0))
_STATES: Final = {"adamw": 16, "sgd": 12}  # float32 weight, gradient, moments: bytes a parameter
_FROZEN: Final = 4  # float32
_MAX_LINE: Final = 100  # characters


class CapabilityConfig(BaseModel):
    """What the site says of its devices; left out: found on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: int | None = Field(default=None, ge=0, le=100_000)
    gpu_memory_gb: float | None = Field(default=None, gt=0, le=10_000)  # of one
    memory_gb: float | None = Field(default=None, gt=0, le=10**6)  # main memory of one node


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One site's devices."""

    gpus: int
    gpu_memory_gb: float  # of one; 0 where it is not known or there are none
    memory_gb: float  # main memory of one node; 0: not known
    nodes: int = 1

    @property
    def tier(self) -> Tier:
        """The highest tier that the memory of all GPUs reaches."""
        total = self.gpus * self.gpu_memory_gb
        return next((tier for tier, least in _TIERS if total >= least), "T3")

    @property
    def trains_in_gb(self) -> float:
        """Memory that a model and its states may fill; 0: not known."""
        if self.gpus:
            return self.gpus * self.gpu_memory_gb
        return self.nodes * self.memory_gb

    def __str__(self) -> str:
        """One line for people, for the status and for heartbeats."""
        gpus = f"{self.gpus} GPU{'s' if self.gpus != 1 else ''}"
        if self.gpus and self.gpu_memory_gb:
            gpus += f" of {self.gpu_memory_gb:.0f} GB"
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        memory = f", {self.memory_gb:.0f} GB of memory" if self.memory_gb else ""
        return f"{self.tier}: {gpus if self.gpus else 'no GPU'}{nodes}{memory}"[:_MAX_LINE]


def capability(
    told: CapabilityConfig,
    *,
    uses_gpus: bool,
    elsewhere: tuple[int, int] | None,
    gpus_here: Callable[[], list[float]],
    memory_here: Callable[[], float],
) -> Capability:
    """What the site can train.

    Args:
        told: by config.toml; stands before what is found.
        uses_gpus: whether the worker may take GPUs at all.
        elsewhere: under Slurm: nodes, and GPUs of each; the machine here says nothing then.
        gpus_here: GB of each GPU of this machine.
        memory_here: GB of main memory of this machine.
    """
    nodes, count, each, memory = 1, 0, 0.0, 0.0
    if elsewhere is not None:
        nodes, count = elsewhere[0], elsewhere[0] * elsewhere[1]
    else:
        memory = memory_here()
        if uses_gpus and told.gpus is None and (found := gpus_here()):
            count, each = len(found), min(found)
    return Capability(
        gpus=count if told.gpus is None else told.gpus,
        gpu_memory_gb=each if told.gpu_memory_gb is None else told.gpu_memory_gb,
        memory_gb=memory if told.memory_gb is None else told.memory_gb,
        nodes=nodes,
    )


def memory_needed(plan: Plan, *, trained: int, parameters: int, base_bytes: int = 0) -> float:
    """GB that weights, gradients and moments fill at least; activations come on top.

    Args:
        plan: of the run.
        trained: parameters that are trained.
        parameters: all of the exchanged model.
        base_bytes: under an adapter: of the base model's files, which stay as they are.
    """
    states = _STATES[plan.local_step.optimizer]
    base = base_bytes if plan.model.lora is not None else 0
    return (trained * states + (parameters - trained) * _FROZEN + base) / GB


def check_memory(
    plan: Plan, site: Capability, *, trained: int, parameters: int, base_bytes: int = 0
) -> Refusal | None:
    """Whether the run fits into the site's memory; what is not known is not refused."""
    if plan.local_step.kind != "builtin" or not site.trains_in_gb:
        return None
    needed = memory_needed(plan, trained=trained, parameters=parameters, base_bytes=base_bytes)
    if needed <= site.trains_in_gb:
        return None
    return Refusal(
        "site.memory",
        f"training needs at least {needed:.1f} GB for weights and states, the site has"
        f" {site.trains_in_gb:.1f} GB ({site}); config.toml [capability] corrects a wrong figure",
    )


def base_size(folder: str | None) -> int:
    """Bytes of a base model's weights on disk."""
    if folder is None:
        return 0
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


# -- looking at this machine -----------------------------------------------------------------------


def memory_of_machine() -> float:
    """GB of main memory; 0: it cannot be told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    except (ValueError, OSError):
        return 0.0


def gpus_of_machine() -> list[float]:
    """GB of each GPU, by nvidia-smi; the agent imports no torch. Blocking, a second or less."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return read_gpus(done.stdout.decode("ascii", "replace"))


def read_gpus(text: str) -> list[float]:
    """GB of each GPU from nvidia-smi's MiB, one a line; lines that are no number are left out."""
    words = [line.strip() for line in text.splitlines()]
    return [int(word) * 2**20 / GB for word in words if word.isascii() and word.isdigit()]
