"""What steps cost on a device, ours and a plain loop of the same step; the same code runs on a CPU.

Random weights and random tokens: speed does not depend on them. Model FLOPs count what the
arithmetic needs, not what recomputing activations adds: per token 6 N for N trained weights, 4 N
for N frozen ones (no gradients of weights), and 6 L h s for causal attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from node_agent.resident import Clock
from node_agent.worker.agreement import Gate
from node_agent.worker.distributed import Ranks
from node_agent.worker.local_step import Limits, LocalStepRun
from node_agent.worker.model import ResidentModel
from node_agent.worker.optimizer import InnerOptimizer
from node_agent.worker.state import Progress
from node_agent.worker.structure import _ADAPTER, _inject
from protocols.plan import LocalStep
from protocols.plan_model import Lora

# Dense bfloat16 peak of the datasheets, FLOP/s.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
WARM_UP = 3  # steps: kernels are chosen and memory is taken
TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def alone(device: str) -> Ranks:
    """One process without a group."""
    return Ranks(0, 1, torch.device(device), "none")


def wait_for_device(device: str) -> None:
    """Until everything that was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What optimizer steps cost."""

    parameters: int  # of the whole model
    trained: int
    tokens_per_s: float
    flops: float  # model FLOP/s
    first_loss: float  # nats per token
    last_loss: float
    peak_bytes: int

    def share(self, device: str) -> str:
        """Of the device's peak, in words."""
        peak = next((value for key, value in PEAKS.items() if key in device), None)
        return f"{self.flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else "peak unknown"

    def line(self, what: str, device: str) -> str:
        """One row."""
        return (
            f"{what}: {self.parameters / 1e9:.2f}e9 parameters, {self.trained / 1e6:.1f}e6 trained,"
            f" {self.tokens_per_s:,.0f} tokens/s, {self.flops / 1e12:.1f} model TFLOP/s"
            f" ({self.share(device)}), {self.peak_bytes / 2**30:.1f} GiB at the peak"
        )


class OneBatch:
    """The same random sequences again and again, as a row that never ends."""

    def __init__(self, *, batch: int, length: int, vocabulary: int) -> None:
        drawn = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1))
        self.tokens = drawn.astype(np.int64)
        self.per_epoch = batch

    def predicted(self, position: int) -> int:
        """All of them."""
        return self.tokens.shape[1] - 1

    def sequence(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels."""
        row = self.tokens[position % self.per_epoch]
        return row[:-1], row[1:]

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class RandomSource:
    """A Llama with adapters on a frozen bfloat16 base whose weights are drawn, not read."""

    items: tuple[tuple[str, Any], ...]
    lora: Lora

    @property
    def longest(self) -> int | None:
        """Not limited here."""
        return None

    def build(self) -> Any:
        """The structure without memory."""
        with torch.device("meta"):
            config = LlamaConfig(**dict(self.items), use_cache=False, attn_implementation="sdpa")
            module = LlamaForCausalLM(config).to(torch.bfloat16)
            _inject(module, self.lora)
        return module

    def travels(self, name: str) -> str | None:
        """The adapters."""
        return name.replace(f".{_ADAPTER}.", ".") if ".lora_" in name else None

    def stored(self, name: str) -> str:
        """Its own name."""
        return name

    def tensors(self, names: Mapping[str, tuple[int, int] | None]) -> Iterator[tuple[str, Tensor]]:
        """Drawn."""
        shapes = {name: p.shape for name, p in self.build().named_parameters()}
        for name in names:
            drawn = torch.empty(shapes[name], dtype=torch.bfloat16)
            yield name, drawn.fill_(1.0) if drawn.ndim < 2 else drawn.normal_(std=0.02)


def _flops(*, config: Mapping[str, Any], length: int, frozen: int, trained: int) -> float:
    """Model FLOPs of one token."""
    attention = 6 * config["num_hidden_layers"] * config["hidden_size"] * length
    return float(4 * frozen + 6 * trained + attention)


def _timed(steps: int, device: str, run: Callable[[int], None]) -> float:
    """Seconds of ``run(steps)`` after a warm-up."""
    run(WARM_UP)
    wait_for_device(device)
    began = time.perf_counter()
    run(steps)
    wait_for_device(device)
    return time.perf_counter() - began


def _draw(model: ResidentModel) -> None:
    """Weights of what travels; the second factor of adapters begins at zero, as peft's does."""
    with torch.no_grad():
        for part in model.trainable:
            if ".lora_B" in part.name:
                part.leaf.zero_()
            elif part.leaf.ndim < 2:
                part.leaf.fill_(1.0)
            else:
                part.leaf.normal_(std=0.02)


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _fresh(device: str) -> None:
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def ours(
    config: dict[str, Any],
    *,
    lora: Lora | None,
    device: str,
    batch: int,
    length: int,
    steps: int,
    checkpointing: bool = False,
) -> Cost:
    """The worker's own steps, from reading sequences to the optimizer.

    Args:
        config: of a Llama; with adapters it holds ``vocab_size``, else bytes are tokens.
        lora: adapters on a bfloat16 base; None trains all weights, kept in float32.
        device: "cpu" or "cuda".
        batch, length: sequences and tokens of a step.
        steps: that are timed.
        checkpointing: recompute activations.
    """
    _fresh(device)
    ranks = alone(device)
    source = config if lora is None else RandomSource(tuple(sorted(config.items())), lora)
    model = ResidentModel(source, select="all", ranks=ranks, checkpointing=checkpointing)
    _draw(model)
    step = LocalStep(
        optimizer="adamw", lr=3e-4, grad_clip=1.0, batch_size=batch, sequence_length=length,
        max_steps=1,
    )  # fmt: skip
    text = OneBatch(batch=batch, length=length, vocabulary=config.get("vocab_size", 256))
    run = LocalStepRun(
        model=model,
        optimizer=InnerOptimizer(model, step, ranks),
        text=text,
        step=step,
        limits=Limits(max_steps=0, max_tokens=None, max_seconds=None, deadline_unix=None),
        ranks=ranks,
        gate=Always(ranks, None),
        clock=Clock(),
        micro_batch=0,
        position=0,
        progress=Progress(),
    )
    losses: list[float] = []

    def go(count: int) -> None:
        before, done = run.progress.loss_nats, run.progress.steps
        run.limits = Limits(
            max_steps=done + count, max_tokens=None, max_seconds=None, deadline_unix=None
        )
        run.run()
        losses.append((run.progress.loss_nats - before) / (count * batch * length))

    seconds = _timed(steps, device, go)
    trained = sum(part.leaf.numel() for part in model.trainable)
    whole = sum(p.numel() for p in model.module.parameters())
    rate = steps * batch * length / seconds
    each = _flops(config=config, length=length, frozen=whole - trained, trained=trained)
    return Cost(
        parameters=whole,
        trained=trained,
        tokens_per_s=rate,
        flops=rate * each,
        first_loss=losses[0],
        last_loss=losses[-1],
        peak_bytes=_peak(device),
    )


class Always(Gate):
    """A gate of a job that nobody withdraws; it asks ``enough`` itself, as rank 0's does."""

    def meet(self, values: Any, *, enough: bool = False, **more: Any) -> Any:
        """See Gate."""
        from node_agent.worker.agreement import Decision, Meeting

        met = super().meet(values, **more)
        return Meeting(Decision.ENOUGH if enough else met.decision, met.sums)


def plain(
    config: dict[str, Any],
    *,
    lora: Lora | None,
    device: str,
    batch: int,
    length: int,
    steps: int,
    checkpointing: bool = False,
) -> Cost:
    """The same step as anybody would write it with transformers, peft and torch alone.

    Args: as ``ours``.
    """
    _fresh(device)
    sizes = {"vocab_size": 259} | config
    made = LlamaConfig(**sizes, use_cache=False, attn_implementation="sdpa")
    with torch.device(device):
        model: Any = LlamaForCausalLM(made)
    if lora is not None:
        model = get_peft_model(
            model.to(torch.bfloat16),
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                target_modules=list(lora.targets),
                lora_dropout=0.0,
                bias="none",
            ),
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora is not None:
            model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0, fused=True)
    text = OneBatch(batch=batch, length=length, vocabulary=config.get("vocab_size", 256))
    tokens = torch.from_numpy(text.tokens).to(device)
    losses: list[float] = []

    def go(count: int) -> None:
        total = 0.0
        for _ in range(count):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                logits = model(input_ids=tokens[:, :-1]).logits
            loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        losses.append(total / count)

    seconds = _timed(steps, device, go)
    count = sum(p.numel() for p in trained)
    whole = sum(p.numel() for p in model.parameters())
    rate = steps * batch * length / seconds
    each = _flops(config=config, length=length, frozen=whole - count, trained=count)
    return Cost(
        parameters=whole,
        trained=count,
        tokens_per_s=rate,
        flops=rate * each,
        first_loss=losses[0],
        last_loss=losses[-1],
        peak_bytes=_peak(device),
    )
