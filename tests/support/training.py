"""The torch worker inside the test's own process, and an independent training loop beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from node_agent.resident import Clock, Duty, Stop, serve
from node_agent.spool import WorkerInfo
from node_agent.worker.distributed import Ranks
from node_agent.worker.init_model import write_model
from node_agent.worker.trainer import Options, Trainer
from protocols.tensors.manifest import Manifest
from tests.support.worker import TINY, Site, make_plan

ALONE = Ranks(0, 1, torch.device("cpu"), "none")
INFO = WorkerInfo(pid=1, ranks=1, backend="none", device="cpu", torch="x", started_at=1.0)


def make_site(root: Path, *, documents: int = 40, **plan: Any) -> Site:
    """A site with the tiny model."""
    manifest, _ = write_model(root / "model", config=TINY, seed=7)
    theta = np.fromfile(root / "model" / "theta.f32", dtype="<f4")
    made = make_plan(manifest, **plan)
    return Site.make(root / "site", theta=theta, manifest=manifest, plan=made, documents=documents)


class Worker:
    """One process's worker; a new one is what a restart leaves: nothing but the disk."""

    def __init__(self, site: Site, *, clock: Clock | None = None, **options: Any) -> None:
        self.site = site
        self.clock = clock or Clock()
        self.trainer = Trainer(
            ALONE, options=Options(**options), clock=self.clock, spool=site.spool
        )

    def answer(self, *, stop: Stop | None = None) -> str:
        """Answer every waiting job, then leave."""
        stop = stop or Stop(self.site.spool)
        duty = Duty(
            info=INFO,
            work=self.trainer.do,
            idle=lambda: stop.tell("nothing to do"),
            fatal=self.trainer.fatal,
        )
        clock = Clock(now=self.clock.now, monotonic=self.clock.monotonic, sleep=lambda _: None)
        return serve(self.site.spool, duty=duty, stop=stop, clock=clock)


class StopAfter(Stop):
    """Tells the worker to leave once it was asked ``times`` times: the same step every run."""

    def __init__(self, site: Site, times: int) -> None:
        super().__init__(site.spool)
        self._left = times
        self.fired = False

    def reason(self) -> str:
        self._left -= 1
        self.fired = self.fired or self._left < 0
        return "SIGTERM" if self._left < 0 else super().reason()


def reference_model(theta: np.ndarray, manifest: Manifest) -> LlamaForCausalLM:
    """The model built the ordinary way, float32, eager attention: another path to the numbers."""
    config = LlamaConfig(
        **TINY,
        vocab_size=259,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        tie_word_embeddings=False,
        attn_implementation="eager",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for (name, parameter), spec, segment in zip(
            model.named_parameters(), manifest.tensors, manifest.segments, strict=True
        ):
            assert (name, tuple(parameter.shape)) == (spec.name, spec.shape)
            piece = np.array(theta[segment.start : segment.stop]).reshape(spec.shape)
            parameter.copy_(torch.from_numpy(piece))
    return model


def flat(model: LlamaForCausalLM) -> np.ndarray:
    """All parameters as theta."""
    return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])


def reference_nll(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Nats of ``tokens[1:]`` given what stands before: one sequence, no padding, by hand."""
    logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].double()
    chosen = logits.log_softmax(dim=-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    return -chosen.sum()


def train_reference(
    model: LlamaForCausalLM,
    batches: list[list[list[int]]],
    *,
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    lr_at: Callable[[int], float],
    clip: float | None = None,
    mu: float = 0.0,
) -> float:
    """Train one sequence at a time; returns the summed loss in nats."""
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    optimizer = make(parameters)
    total = 0.0
    for number, batch in enumerate(batches):
        count = sum(len(tokens) - 1 for tokens in batch)
        loss = sum(reference_nll(model, tokens) for tokens in batch)
        objective = loss / count
        if mu:
            for p, s in zip(parameters, start, strict=True):
                objective = objective + mu / 2 * ((p - s) ** 2).double().sum()
        optimizer.zero_grad()
        objective.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(number)
        optimizer.step()
        total += loss.item()
    return total
