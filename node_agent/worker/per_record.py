"""The sum of clipped gradients, one gradient for each record: what a private step is made of.

    S(D) = sum over the records x of the sample of clip(g_x),   ||clip(g_x)||_2 <= C

so that S with and without any one record differ by at most C, whatever the others are. The loss of
a record is its own mean, of nothing that other records could change. Norms and sums are in
float64, and a record is clipped to C * (1 - 2**-20); what rounding can add beyond is part of the
sensitivity (``policies.privacy.terms``) and measured in tests/numerics/test_private_clipping.py.

A record whose gradient is NaN or infinite adds nothing. To stop for it would tell of it.

Three ways to the same sum: ``private_path``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from node_agent.worker.data import IGNORE
from node_agent.worker.model import ResidentModel, on_device
from node_agent.worker.private_path import MIXING, Structure, Way
from node_agent.worker.records import Record
from node_agent.worker.tokens import PAD

GUARD: Final = 1.0 - 2.0**-20  # of the clip norm


@dataclass(slots=True)
class Tally:
    """What happened to the records of a sample. Private: never leaves the site."""

    records: int = 0
    clipped: int = 0  # longer than the clip norm
    not_finite: int = 0


def structure_of(model: ResidentModel) -> Structure:
    """What ``private_path`` asks about a model."""
    module: nn.Module = model.module
    holders, mixing, buffers, seen, tied = set(), [], [], set(), False
    dropout = float(getattr(module.config, "attention_dropout", 0.0) or 0.0)
    for part in module.modules():
        name = type(part).__name__
        own = list(part.parameters(recurse=False))
        if any(word in name for word in MIXING):
            mixing.append(name)
        if isinstance(part, nn.modules.dropout._DropoutNd):
            dropout = max(dropout, part.p)
        trained = any(parameter.requires_grad for parameter in own)
        if trained:
            holders.add(name.removeprefix("FSDP"))  # what fully_shard makes of a class
        if trained and any(True for _ in part.buffers(recurse=False)):
            buffers.append(name)
        for parameter in own:
            tied = tied or (id(parameter) in seen and parameter.requires_grad)
            seen.add(id(parameter))
    return Structure(
        trainable=sum(part.whole.numel() for part in model.trainable),
        modules=frozenset(holders),
        mixing=tuple(sorted(set(mixing))),
        dropout=dropout,
        trainable_buffers=tuple(sorted(set(buffers))),
        tied=tied,
        checkpointing="non-reentrant" if model.checkpointing else "off",
        routed=bool(getattr(module.config, "num_local_experts", 0)),
    )


class ClippedSum:
    """Adds up clipped gradients of a sample, by one of the three ways."""

    def __init__(self, model: ResidentModel, *, way: Way, clip_norm: float, rows: int) -> None:
        """Attach to the model; ``close`` detaches.

        Args:
            model: with its trained tensors whole.
            way: of ``private_path``.
            clip_norm: C, L2 over all trained tensors.
            rows: how many go through the model together.
        """
        self._model = model
        self._limit = clip_norm * GUARD
        self._rows = rows
        self.way = way
        self._parameters = [part.whole for part in model.trainable]
        sizes = [parameter.numel() for parameter in self._parameters]
        # float64, shape [d], manifest order: one buffer, so ranks add up with one all-reduce.
        self.total_D = torch.zeros(sum(sizes), dtype=torch.float64, device=model.ranks.device)
        self._views = self.total_D.split(sizes)
        self._hooks: Any = _hooks_for(way, model.module)

    def close(self) -> None:
        """Take all hooks off the model and drop what they kept."""
        if self._hooks is not None:
            self._hooks.cleanup()
            self._hooks = None
            for module in self._model.module.modules():
                for name in ("activations", "max_batch_len"):
                    with suppress(AttributeError):
                        delattr(module, name)
        self._model.forget_gradients()

    def parts(self) -> Iterator[Tensor]:
        """The sum, tensor by tensor in manifest order; float64, flat."""
        yield from self._views

    def passes(self, rows: Sequence[int]) -> int:
        """How often the loop goes through the model for records of so many rows."""
        return sum(-(-count // self._rows) for count in rows)

    def fill(self, records: Sequence[Record], *, passes: int = 0) -> Tally:
        """Set the sum to that of these records; of none it is zero.

        Args:
            records: this rank's part of the sample.
            passes: of the loop, forward passes that every rank makes, so that ranks with fewer
                records take part in the collectives of a sharded base.
        """
        self.total_D.zero_()
        tally = Tally(records=len(records))
        if self.way == "loop":
            self._loop(records, passes, tally)
        else:
            add = self._add_hooks if self.way == "hooks" else self._add_ghost
            for together in _together(records, self._rows):
                add(together, tally)
        self._model.forget_gradients()
        return tally

    # -- the three ways --------------------------------------------------------------------------

    def _losses(self, inputs: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Tensor:
        """Mean loss per predicted token of each row, float32 [rows]; a row of padding has 0."""
        device = self._model.ranks.device
        labels_BL = on_device(labels, device)
        nll_B = self._model.nll(on_device(inputs, device), labels_BL)
        return nll_B / (labels_BL != IGNORE).sum(dim=1).clamp(min=1)

    def _factors(self, squares_R: Tensor, tally: Tally) -> Tensor:
        """What each record's gradient is multiplied with: float64 [R], 0 where it is not finite."""
        norms = squares_R.sqrt()
        finite = norms.isfinite()
        tally.clipped += int((norms > self._limit).sum().item())
        tally.not_finite += int((~finite).sum().item())
        factors = (self._limit / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
        return torch.where(finite, factors, torch.zeros_like(factors))

    def _loop(self, records: Sequence[Record], passes: int, tally: Tally) -> None:
        done = 0
        for record in records:
            count = record.inputs.shape[0]
            for start in range(0, count, self._rows):
                rows = slice(start, start + self._rows)
                loss = self._losses(record.inputs[rows], record.labels[rows]).sum() / count
                torch.autograd.backward(loss)
                done += 1
            squares = torch.stack([_squares(p.grad) for p in self._parameters]).sum()
            factor = self._factors(squares.view(1), tally)[0]
            for view, parameter in zip(self._views, self._parameters, strict=True):
                if parameter.grad is not None and factor > 0:
                    view.add_(parameter.grad.flatten().double() * factor)
            self._model.forget_gradients()
        length = records[0].inputs.shape[1] if records else 8
        for _ in range(passes - done):  # somebody else's record: take part, add nothing
            padding = np.full((1, length), PAD, dtype=np.int64)
            nothing = np.full((1, length), IGNORE, dtype=np.int64)
            torch.autograd.backward(self._losses(padding, nothing).sum())
            self._model.forget_gradients()

    def _row_losses(self, together: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Weighted losses of all rows, [rows], and the record that each belongs to."""
        losses = self._losses(
            np.concatenate([record.inputs for record in together]),
            np.concatenate([record.labels for record in together]),
        )
        counts = torch.tensor([record.inputs.shape[0] for record in together])
        owner = torch.arange(len(together)).repeat_interleave(counts).to(losses.device)
        return losses / counts.to(losses.device)[owner], owner

    def _add_hooks(self, together: Sequence[Record], tally: Tally) -> None:
        losses, owner = self._row_losses(together)
        self._backward(losses.sum())
        kept = []
        squares = torch.zeros(len(together), dtype=torch.float64, device=losses.device)
        for parameter in self._parameters:
            sample = _grad_sample(parameter).flatten(1)  # [rows, size]
            kept.append(sample)
            if len(together) == owner.numel():
                whole = sample.double()
            else:
                whole = torch.zeros(
                    len(together), sample.shape[1], dtype=torch.float64, device=losses.device
                ).index_add_(0, owner, sample.double())
            squares += whole.square().sum(dim=1)
        factors = self._factors(squares, tally)[owner]
        fine = factors > 0
        for view, sample in zip(self._views, kept, strict=True):
            view.add_(factors[fine] @ sample[fine].double())
        self._hooks.set_grad_sample_to_none()
        self._model.forget_gradients()

    @staticmethod
    def _backward(loss: Tensor, *, retain_graph: bool = False) -> None:
        with warnings.catch_warnings():  # true of an embedding, and what Opacus counts on
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(loss, retain_graph=retain_graph)

    def _add_ghost(self, together: Sequence[Record], tally: Tally) -> None:
        losses, _ = self._row_losses(together)
        self._backward(losses.sum(), retain_graph=True)
        norms: list[Any] = [getattr(p, "_norm_sample", None) for p in self._parameters]
        squares = torch.stack([norm.double().square() for norm in norms]).sum(0)
        self._model.forget_gradients()
        factors = self._factors(squares, tally)
        self._hooks.disable_hooks()
        try:
            if bool((factors > 0).all()):
                self._backward((losses * factors.to(losses.dtype)).sum())
                self._collect()
            else:  # zero times infinity is NaN: go through the sound ones alone
                for record, factor in zip(together, factors, strict=True):
                    if factor > 0:
                        again = self._row_losses([record])[0].sum()
                        self._backward(again * factor.to(again.dtype))
                        self._collect()
        finally:
            self._hooks.enable_hooks()

    def _collect(self) -> None:
        for view, parameter in zip(self._views, self._parameters, strict=True):
            if parameter.grad is not None:
                view.add_(parameter.grad.flatten().double())
        self._model.forget_gradients()


def _squares(gradient: Tensor | None) -> Tensor:
    """The squared L2 norm, in float64."""
    if gradient is None:
        return torch.zeros((), dtype=torch.float64)
    return gradient.double().square().sum()


def _grad_sample(parameter: nn.Parameter) -> Tensor:
    """Opacus' gradients per row of one tensor; a list when it is used in two places."""
    sample: Any = parameter.grad_sample  # type: ignore[attr-defined]
    return torch.stack(sample).sum(dim=0) if isinstance(sample, list) else sample


def _together(records: Sequence[Record], rows: int) -> Iterator[list[Record]]:
    """Records in order, as many at once as fit into ``rows``; a longer one goes alone."""
    batch: list[Record] = []
    size = 0
    for record in records:
        count = record.inputs.shape[0]
        if batch and size + count > rows:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += count
    if batch:
        yield batch


def _hooks_for(way: Way, module: nn.Module) -> Any:
    """Opacus attached to the module, without wrapping it."""
    if way == "loop":
        return None
    from opacus.grad_sample import grad_sample_module as plain  # seconds to import
    from opacus.grad_sample import grad_sample_module_fast_gradient_clipping as fast

    if way == "hooks":
        return plain.GradSampleHooks(module, batch_first=True, loss_reduction="sum", strict=True)
    return fast.GradSampleHooksFastGradientClipping(
        module, batch_first=True, loss_reduction="sum", strict=True, use_ghost_clipping=True
    )
