"""What a site can train: tiers, what fits, and who said so."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from node_agent.capability import (
    Capability,
    CapabilityConfig,
    capability,
    check_memory,
    memory_needed,
    read_gpus,
)
from protocols.errors import MalformedMessageError
from tests.support.node import the_plan

BUILTIN = {"kind": "builtin", "max_steps": 3}
LLAMA_8B, LLAMA_70B = 8_030_261_248, 70_553_706_496


def site(gpus: int, each: float, *, memory: float = 64.0, nodes: int = 1) -> Capability:
    return Capability(gpus=gpus, gpu_memory_gb=each, memory_gb=memory, nodes=nodes)


@pytest.mark.parametrize(
    ("found", "tier"),
    [
        (site(0, 0.0), "T3"),
        (site(1, 16.0), "T3"),
        (site(1, 24.0), "T2"),
        (site(4, 48.0), "T1"),
        (site(3, 80.0), "T1"),
        (site(2, 141.0), "T1"),
        (site(8, 141.0), "T1"),
        (site(16, 80.0), "T0"),
        (site(96, 141.0, nodes=12), "T0"),
    ],
)
def test_tiers(found, tier):
    assert found.tier == tier
    assert str(found).startswith(f"{tier}: ")
    assert len(str(found)) <= 100


def test_words():
    assert str(site(96, 141.0, memory=0.0, nodes=12)) == "T0: 96 GPUs of 141 GB on 12 nodes"
    assert str(site(0, 0.0)) == "T3: no GPU, 64 GB of memory"


def find(told: dict, *, uses_gpus=True, elsewhere=None) -> Capability:
    return capability(
        CapabilityConfig(**told),
        uses_gpus=uses_gpus,
        elsewhere=elsewhere,
        gpus_here=lambda: [24.0, 48.0],
        memory_here=lambda: 64.0,
    )


def test_what_is_told_stands_before_what_is_found():
    assert find({}) == site(2, 24.0)  # the smallest: ranks are equal
    assert find({}, uses_gpus=False) == site(0, 0.0)
    assert find({"gpus": 1, "gpu_memory_gb": 80}) == site(1, 80.0)
    assert find({"memory_gb": 8}) == site(2, 24.0, memory=8.0)
    # A login node says nothing about the compute nodes.
    assert find({}, elsewhere=(12, 8)) == site(96, 0.0, memory=0.0, nodes=12)
    assert find({"gpu_memory_gb": 141}, elsewhere=(12, 8)).tier == "T0"
    with pytest.raises(ValidationError):
        CapabilityConfig(gpu_memory_gb=0)


def test_what_nvidia_smi_prints():
    assert read_gpus("81559\n81559\n") == pytest.approx([85.5, 85.5], abs=0.1)
    assert read_gpus("No devices were found\n[N/A]\n") == []


def test_memory_of_a_run():
    plan = the_plan(local_step=BUILTIN)
    assert memory_needed(plan, trained=LLAMA_70B, parameters=LLAMA_70B) == pytest.approx(
        1129, abs=1
    )
    adapter = memory_needed(plan, trained=41_943_040, parameters=LLAMA_8B)
    assert adapter == pytest.approx(32.6, abs=0.1)  # float32 base: what the worker holds today


@pytest.mark.parametrize(
    ("found", "parameters", "says"),
    [
        (site(1, 24.0), 10**9, None),
        (site(1, 24.0), LLAMA_8B, "at least 128.5 GB"),
        (site(0, 0.0, memory=8.0), 10**9, "the site has 8.0 GB"),
        (site(0, 0.0, memory=0.0), LLAMA_70B, None),  # not known: not refused
        (site(96, 0.0, memory=0.0, nodes=12), LLAMA_70B, None),
        (site(96, 141.0, nodes=12), LLAMA_70B, None),
    ],
)
def test_a_site_declines_what_does_not_fit(found, parameters, says):
    plan = the_plan(local_step=BUILTIN)
    refusal = check_memory(plan, found, trained=parameters, parameters=parameters)

    if says is None:
        assert refusal is None
    else:
        assert refusal.rule == "site.memory"
        assert says in refusal.reason
        assert "[capability]" in refusal.reason
    assert check_memory(the_plan(), found, trained=parameters, parameters=parameters) is None


def test_a_plan_may_ask_for_a_least_number_of_steps():
    assert the_plan(local_step=BUILTIN | {"min_steps": 3}).local_step.min_steps == 3
    assert the_plan(local_step=BUILTIN).local_step.min_steps == 1
    with pytest.raises(MalformedMessageError, match="min_steps is more than max_steps"):
        the_plan(local_step=BUILTIN | {"min_steps": 4})
