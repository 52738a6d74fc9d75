"""The inner optimizer of a site: AdamW or SGD with warm-up, clipping and a proximal term.

It works on what this rank holds of each tensor, so the same code serves one process and many. Its
moments are derived from the site's text: they stay at the site, in memory and on disk, and are
keyed by tensor name, so that a round that trains other tensors leaves them untouched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from node_agent.resident import JobFailedError
from node_agent.worker.distributed import Ranks
from node_agent.worker.model import ResidentModel
from protocols.plan import LocalStep

Moments = dict[str, dict[str, Tensor]]


class InnerOptimizer:
    """One site's optimizer over the trainable tensors of a resident model.

    Weight decay acts on matrices only: shrinking a norm's gain regularises nothing.
    """

    def __init__(self, model: ResidentModel, step: LocalStep, ranks: Ranks) -> None:
        self._model = model
        self._step = step
        self._ranks = ranks
        self._start: list[Tensor] = []  # theta_t, for the proximal term
        self.updates = 0  # since the moments were fresh: warm-up and bias correction count from it
        leaves = model.leaves()
        groups: list[dict[str, Any]] = [
            {"params": [leaf for leaf in leaves if leaf.ndim >= 2]},
            {"params": [leaf for leaf in leaves if leaf.ndim < 2], "weight_decay": 0.0},
        ]
        self._inner: torch.optim.Optimizer
        if step.optimizer == "adamw":
            self._inner = torch.optim.AdamW(
                groups, lr=step.lr, betas=step.betas, weight_decay=step.weight_decay, fused=True
            )
        else:
            self._inner = torch.optim.SGD(
                groups,
                lr=step.lr,
                momentum=step.momentum,
                weight_decay=step.weight_decay,
                fused=True,
            )

    def anchor(self) -> None:
        """Remember the current weights as theta_t of the proximal term, if the plan has one."""
        if self._step.proximal_mu:
            self._start = [leaf.detach().clone() for leaf in self._model.leaves()]

    def apply(self) -> None:
        """One update from the gradients in the model; drops them.

        Raises:
            JobFailedError: train.non_finite: the gradient's norm, on every rank alike.
        """
        leaves = self._model.leaves()
        if self._start:
            with torch.no_grad():
                for leaf, start in zip(leaves, self._start, strict=True):
                    if leaf.grad is not None:
                        leaf.grad.add_(leaf - start, alpha=self._step.proximal_mu)
        if self._step.grad_clip is not None:
            self._clip(leaves, self._step.grad_clip)
        warm = min(1.0, (self.updates + 1) / max(1, self._step.warmup_steps))
        for group in self._inner.param_groups:
            group["lr"] = self._step.lr * warm
        self._inner.step()
        self.updates += 1
        self._model.forget_gradients()

    def _clip(self, leaves: list[nn.Parameter], limit: float) -> None:
        """Scale the gradient to L2 norm ``limit``, over all tensors and ranks."""
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        mine = float(get_total_norm(gradients))
        norm = math.sqrt(self._ranks.summed([mine * mine])[0])
        if not math.isfinite(norm):
            raise JobFailedError("train.non_finite", "the gradient holds NaN or infinity")
        whole = torch.tensor(norm, device=gradients[0].device)
        clip_grads_with_norm_(leaves, limit, whole)

    # -- what is kept between rounds -------------------------------------------------------------

    def moments(self) -> Moments:
        """This rank's moments by tensor name; the very tensors, not copies."""
        return {
            part.name: {
                key: value for key, value in kept.items() if isinstance(value, torch.Tensor)
            }
            for part in self._model.trainable
            if (kept := self._inner.state.get(part.leaf))
        }

    def resume(self, moments: Mapping[str, Mapping[str, Tensor]], *, updates: int) -> bool:
        """Go on from earlier moments.

        Returns:
            False, with nothing taken over, if they do not fit: other shapes or another optimizer.
        """
        wanted = {"step", "exp_avg", "exp_avg_sq"}
        if self._step.optimizer == "sgd":
            wanted = {"momentum_buffer"} if self._step.momentum else set()
        taken: list[tuple[nn.Parameter, dict[str, Any]]] = []
        for part in self._model.trainable:
            kept = moments.get(part.name)
            if kept is None:
                continue
            shapes = {tensor.shape for key, tensor in kept.items() if key != "step"}
            if set(kept) != wanted or shapes - {part.leaf.shape}:
                return False
            moved = {key: value.to(part.leaf.device) for key, value in kept.items()}
            taken.append((part.leaf, moved))
        for leaf, state in taken:
            self._inner.state[leaf] = state
        self.updates = updates
        return True
