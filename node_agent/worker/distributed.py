"""The ranks of one worker: how they start, agree and end.

Rank 0 alone looks at the spool and the clock; what it decides it tells the others over a gloo
group that carries only control messages. Bulk tensors go over the default group: NCCL where CUDA
is, else gloo. A single process started without torchrun has no group at all and behaves alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from protocols.errors import ConfigurationError

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the processes of its worker."""

    rank: int
    world: int
    device: torch.device
    backend: str  # "gloo", "cpu:gloo,cuda:nccl" or "none"
    control: Any = None  # gloo process group for decisions; None for a single process

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether the model is spread over ranks."""
        return self.world > 1

    def told(self, value: Any = None) -> Any:
        """What rank 0 says: every rank calls this and all get rank 0's ``value``."""
        if not self.sharded:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control, device=torch.device("cpu"))
        return box[0]

    def summed(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks, in float64."""
        if not self.sharded:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, group=self.control)
        return box.tolist()

    def from_all(self, value: Any) -> list[Any]:
        """The value of each rank, on every rank."""
        if not self.sharded:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value, group=self.control)
        return box

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.summed([0.0])

    def describe(self) -> str:
        """The device, in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return "cpu"


def start(choice: DeviceChoice, *, environment: Mapping[str, str], timeout_s: float) -> Ranks:
    """Join the other ranks, as torchrun's environment names them.

    Args:
        choice: "auto" takes CUDA where there is one.
        environment: RANK, WORLD_SIZE, LOCAL_RANK as torchrun sets them; without RANK the process
            is alone.
        timeout_s: of each collective. Rank 0 sends something at least once a second while idle,
            so this bounds one step, one evaluation batch or the writing of one update.

    Raises:
        ConfigurationError: CUDA was asked for and there is none, or fewer devices than ranks.
    """
    local = int(environment.get("LOCAL_RANK", "0"))
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ConfigurationError("the worker was told to use CUDA, and torch finds no CUDA device")
    if choice == "cpu" or not available:
        device = torch.device("cpu")
    else:
        if local >= torch.cuda.device_count():
            raise ConfigurationError(
                f"rank {local} has no CUDA device: there are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)  # before the group: NCCL binds to the current device
    if "RANK" not in environment:
        return Ranks(0, 1, device, "none")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend, timeout=timeout, device_id=device if device.type == "cuda" else None
    )
    world = dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=timeout)
    # The first collective makes the connections: "ready" must mean that they work.
    probe = torch.ones(1, device=device)
    dist.all_reduce(probe)
    if int(probe.item()) != world:
        raise ConfigurationError(f"the first sum over {world} ranks gave {probe.item()}")
    return Ranks(dist.get_rank(), world, device, backend, control)


def peer_lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, and nothing about this one.

    NCCL's errors have a class; gloo's are known by the name of its transport.
    """
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def leave() -> None:
    """End the group, if there is one; peers that are gone already are no reason to fail."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def launched_by_torchrun(environment: Mapping[str, str] | None = None) -> bool:
    """Whether our parent process is torchrun and not whoever started it."""
    return "TORCHELASTIC_RUN_ID" in (os.environ if environment is None else environment)
