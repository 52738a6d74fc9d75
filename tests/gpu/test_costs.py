"""What steps cost on a CUDA device, beside a plain loop in the same run; and a private step there.

There is no target: the figures are printed, for docs/gpu.md. What must hold is that steps learn,
and that both loops do the same amount of work. Without a device the same code runs on the CPU with
a tiny model, so that it does not rot. Run with ``pytest -s tests/gpu``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from node_agent.resident import Clock, Duty, Stop, serve
from node_agent.spool import last_status
from node_agent.worker import private_step
from node_agent.worker.trainer import Options, Trainer
from protocols.plan_model import Lora
from tests.gpu.costs import TARGETS, Cost, alone, ours, plain
from tests.support.private_worker import counted_bytes, private_site, without_noise
from tests.support.training import INFO

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"
)
LORA = Lora(rank=16, alpha=32.0, targets=TARGETS, base_dtype="bfloat16", factors="fedit")
# The shape of TinyLlama-1.1B with a vocabulary of bytes: 0.97e9 parameters, all trained.
BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
# The shape of Llama-3.1-8B; its weights take 16 GB in bfloat16.
EIGHT_BILLION = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def compare(name: str, device: str, one: Cost, other: Cost) -> None:
    """Print both; what must hold of any device."""
    card = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    ratio = one.tokens_per_s / other.tokens_per_s
    print(f"\n{card}, {name}, torch {torch.__version__}")
    print(one.line("  ours", card))
    print(other.line("  plain loop", card))
    print(f"  ours / plain: {ratio:.2f} tokens per second")
    assert (one.parameters, one.trained) == (other.parameters, other.trained)
    assert one.last_loss < one.first_loss
    assert other.last_loss < other.first_loss


@needs_cuda
def test_all_weights_of_a_billion_parameters():
    sizes = {"lora": None, "device": "cuda", "batch": 8, "length": 2048, "steps": 10}
    compare("all weights, 8 x 2048", "cuda", ours(BILLION, **sizes), plain(BILLION, **sizes))


@needs_cuda
def test_adapters_on_eight_billion_parameters_in_bfloat16():
    room = torch.cuda.get_device_properties(0).total_memory
    if room < 40e9:
        pytest.skip(f"8e9 parameters with adapters want 40 GB, the device has {room / 1e9:.0f}")
    sizes = {"lora": LORA, "device": "cuda", "batch": 4, "length": 2048, "steps": 10}
    sizes |= {"checkpointing": True}
    compare(
        "LoRA r=16 on bfloat16, activations recomputed, 4 x 2048",
        "cuda",
        ours(EIGHT_BILLION, **sizes),
        plain(EIGHT_BILLION, **sizes),
    )


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_measurement_itself_works_without_a_device(lora):
    """The code above must not rot where nobody has a GPU."""
    config = TINY | ({} if lora is None else {"vocab_size": 300})
    sizes = {"lora": lora, "device": "cpu", "batch": 2, "length": 16, "steps": 4}
    sizes |= {"checkpointing": lora is not None}
    one, other = ours(config, **sizes), plain(config, **sizes)

    compare("the smallest", "cpu", one, other)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 64 * 96 * 3
    words = 259 if lora is None else 300
    whole = 2 * words * 64 + layer + 3 * 64
    if lora is None:
        assert one.parameters == one.trained == whole
    else:
        assert one.parameters - one.trained == whole
        assert one.trained == 16 * (2 * 128 + 2 * 96 + 3 * 160)  # rank times in and out
    per_token = one.flops / one.tokens_per_s
    wanted = 6 * one.trained + 4 * (whole if lora else 0) + 6 * 64 * 16
    assert per_token == pytest.approx(wanted, rel=1e-9)  # a quotient and a product of floats


# -- private steps -------------------------------------------------------------------------------


def private_update(root, device: str, monkeypatch) -> np.ndarray:
    """The update of private steps by predictable chance and without noise."""
    monkeypatch.setattr(private_step, "noised", without_noise)
    site = private_site(root, local_step={"momentum": 0.9})
    job = site.ask()
    options = Options(random_bytes=counted_bytes())
    trainer = Trainer(alone(device), options=options, clock=Clock(), spool=site.spool)
    stop = Stop(site.spool)
    duty = Duty(info=INFO, work=trainer.do, idle=lambda: stop.tell("done"), fatal=trainer.fatal)
    serve(site.spool, duty=duty, stop=stop, clock=Clock())
    last = last_status(site.spool, job.id)
    assert last.event == "done", last
    return site.delta(job).astype(np.float64)


def check_private(root, device: str, monkeypatch) -> None:
    """The clipped sums of a device point where the CPU's do."""
    wanted = private_update(root / "cpu", "cpu", monkeypatch)
    found = private_update(root / "device", device, monkeypatch)
    assert np.abs(wanted).max() > 1e-3
    cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert cosine > 0.999
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(wanted), rel=0.01)


@needs_cuda
def test_private_steps_on_the_device(tmp_path, monkeypatch):
    check_private(tmp_path, "cuda", monkeypatch)


def test_the_private_check_works_without_a_device(tmp_path, monkeypatch):
    check_private(tmp_path, "cpu", monkeypatch)
