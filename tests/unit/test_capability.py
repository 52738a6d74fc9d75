"""What a site can train: tiers, what fits, and who said so."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from node_agent.capability import (
    GB,
    Capability,
    CapabilityConfig,
    base_size,
    capability,
    check_memory,
    memory_needed,
    read_gpus,
)
from protocols.errors import MalformedMessageError
from protocols.plan_model import Lora
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
    half = memory_needed(plan, trained=LLAMA_8B // 2, parameters=LLAMA_8B)
    assert half == pytest.approx(8.03 * 10, abs=0.1)


def test_under_an_adapter_the_base_counts_as_it_lies_on_disk(tmp_path):
    lora = Lora(factors="ffa", targets=("q_proj",), rank=16, alpha=32)
    plan = the_plan(local_step=BUILTIN)
    model = plan.model.model_copy(update={"lora": lora})
    plan = plan.model_copy(update={"model": model})
    (tmp_path / "a.safetensors").write_bytes(bytes(3000))
    (tmp_path / "README.md").write_bytes(bytes(999))

    assert base_size(str(tmp_path)) == 3000
    assert base_size(None) == 0
    needed = memory_needed(plan, trained=41_943_040, parameters=41_943_040, base_bytes=16 * GB)
    assert needed == pytest.approx(16.67, abs=0.01)  # an 8B model in bfloat16: one GPU of 24 GB
    assert check_memory(plan, site(1, 24.0), trained=1, parameters=1, base_bytes=16 * GB) is None
    assert check_memory(plan, site(1, 15.9), trained=1, parameters=1, base_bytes=16 * GB)


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
