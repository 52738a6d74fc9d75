"""What a local step uses: seconds of GPUs and CPUs, and energy where the driver counts it.

A GPU second is a second in which a rank holds a device for a job, busy or not: that is what a
cluster charges for. Energy is the driver's own counter (NVML, since Volta) of the devices that the
ranks hold; where there is none the site's agent estimates it from a wattage, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch

from node_agent.spool import Spent
from node_agent.worker.distributed import Ranks

Counter = Callable[[], float | None]  # joules since some moment; None: it cannot be read


def energy_counter(device: torch.device) -> Counter | None:
    """A reader of the device's energy counter; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # noqa: BLE001 - no driver, no library, a slice of a GPU: one meaning
        return None

    def joules() -> float | None:
        with suppress(pynvml.NVMLError):
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
        return None

    return joules


class Meter:
    """Counts from now on, on this rank."""

    def __init__(
        self,
        ranks: Ranks,
        counter: Counter | None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self._ranks, self._counter = ranks, counter
        self._monotonic, self._cpu = monotonic, cpu
        self._began, self._cpu_began = monotonic(), cpu()
        self._joules = counter() if counter is not None else None

    def read(self) -> Spent:
        """What all ranks used so far. Every rank calls this; all get the same answer."""
        held = self._monotonic() - self._began if self._ranks.device.type == "cuda" else 0.0
        now = self._counter() if self._counter is not None else None
        counted = now is not None and self._joules is not None and now >= self._joules
        joules = now - self._joules if counted else 0.0  # type: ignore[operator]
        gpu, cpu, energy, ranks = self._ranks.summed(
            [held, self._cpu() - self._cpu_began, joules, float(counted)]
        )
        whole = int(ranks) == self._ranks.world  # a part of the devices is no measurement
        return Spent(gpu_seconds=gpu, cpu_seconds=cpu, energy_joules=energy if whole else None)
