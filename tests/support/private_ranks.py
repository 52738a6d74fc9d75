"""``torchrun ... -m tests.support.private_ranks DIR``: what two ranks make of private steps.

Does the jobs that wait in the sites under DIR (without noise, by predictable chance), then measures
how far a record moves the sum, with our loop and with two ways that look right and are not. Rank 0
writes DIR/figures.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from node_agent.resident import Clock, Duty, Stop, end_at_once, serve
from node_agent.spool import Spool
from node_agent.worker import distributed, private_step
from node_agent.worker.data import IGNORE
from node_agent.worker.distributed import Ranks
from node_agent.worker.model import ResidentModel
from node_agent.worker.per_record import ClippedSum
from node_agent.worker.records import Record
from node_agent.worker.structure import manifest_of, meta_model
from node_agent.worker.tokens import PAD
from node_agent.worker.trainer import Options, Trainer
from tests.support.clipping import largest_move, random_config, random_records
from tests.support.private_worker import counted_bytes, without_noise
from tests.support.training import INFO

NORM = 0.02
SELECTED = ("lm_head.weight", "model.layers.0.mlp.up_proj.weight")


def do_jobs(root: Path, ranks: Ranks) -> None:
    """Both ranks' part of the jobs in the spool."""
    private_step.noised = without_noise
    spool = Spool(root / "spool")
    options = Options(random_bytes=counted_bytes())
    trainer = Trainer(ranks, options=options, clock=Clock(), spool=spool)
    if not ranks.first:
        trainer.follow()
        return
    stop = Stop(spool)
    duty = Duty(info=INFO, work=trainer.do, idle=lambda: stop.tell("done"), fatal=lambda _: True)
    serve(spool, duty=duty, stop=stop, clock=Clock())
    trainer.dismiss()


# -- sums over two ranks: every rank calls them with all records ---------------------------------


def our_sum(model: ResidentModel, ranks: Ranks, norm: float) -> Callable[..., np.ndarray]:
    """Frozen base sharded, trained tensors whole, clip here, one all-reduce."""
    sums = ClippedSum(model, way="loop", clip_norm=norm, rows=2)

    def total(records: Sequence[Record]) -> np.ndarray:
        mine = [list(records[first :: ranks.world]) for first in range(ranks.world)]
        passes = max(sums.passes([len(r.inputs) for r in part]) for part in mine)
        sums.fill(mine[ranks.rank], passes=passes)
        dist.all_reduce(sums.total_D)
        return sums.total_D.numpy().copy()

    return total


def _loss(model: ResidentModel, record: Record | None, length: int) -> torch.Tensor:
    if record is None:
        inputs = torch.full((1, length), PAD)
        return model.nll(inputs, torch.full((1, length), IGNORE)).sum()
    labels = torch.from_numpy(record.labels)
    nll = model.nll(torch.from_numpy(record.inputs), labels)
    return (nll / (labels != IGNORE).sum(dim=1)).mean()


def clip_after_scatter(
    model: ResidentModel, ranks: Ranks, norm: float
) -> Callable[..., np.ndarray]:
    """**Wrong**: everything sharded; by the time a rank can clip, its record is mixed with others.

    The usual loop of FSDP with gradient clipping, one record a rank.
    """

    def total(records: Sequence[Record]) -> np.ndarray:
        whole = np.zeros(sum(p.numel() for p in model.module.parameters()))
        length = records[0].inputs.shape[1] if records else 8
        for at in range(0, len(records), ranks.world):
            mine = records[at + ranks.rank] if at + ranks.rank < len(records) else None
            _loss(model, mine, length).backward()
            gradient = np.concatenate(
                [
                    (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
                    .double()
                    .flatten()
                    .numpy()
                    * ranks.world  # FSDP2 takes the mean
                    for p in model.module.parameters()
                ]
            )
            whole += gradient * min(1.0, norm / np.linalg.norm(gradient))
            for parameter in model.module.parameters():
                parameter.grad = None
        return whole

    return total


def ghost_fsdp(model: ResidentModel, ranks: Ranks, norm: float) -> Callable[..., np.ndarray]:
    """**Wrong**: Opacus' ghost clipping on FSDP2, each rank with its own part of the data.

    ``PrivacyEngine`` divides the expected batch by the number of ranks, because it takes every rank
    to hold the whole data set. Where each holds a part, that part is divided again. What the step
    is made of is given in units of the sum: times the true expected batch.
    """
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping_fsdp import (
        GradSampleHooksFastGradientClippingFSDP,
    )

    hooks = GradSampleHooksFastGradientClippingFSDP(
        model.module, batch_first=True, loss_reduction="sum", max_grad_norm=norm, strict=False
    )

    def total(records: Sequence[Record]) -> np.ndarray:
        length = records[0].inputs.shape[1] if records else 8
        mine = records[ranks.rank :: ranks.world]
        count = -(-len(records) // ranks.world)
        inputs = np.full((max(1, count), length), PAD)
        labels = np.full((max(1, count), length), IGNORE)
        for row, record in enumerate(mine):
            inputs[row], labels[row] = record.inputs[0], record.labels[0]
        known = torch.from_numpy(labels)
        losses = model.nll(torch.from_numpy(inputs), known)
        losses = losses / (known != IGNORE).sum(dim=1).clamp(min=1)
        losses.sum().backward(retain_graph=True)
        factors = hooks.get_clipping_coef()
        for parameter in model.module.parameters():
            parameter.grad = None
        hooks.disable_hooks()
        (losses * factors).sum().backward()
        hooks.enable_hooks()
        summed = np.concatenate(
            [
                p.grad.full_tensor().double().flatten().numpy()
                for p in model.module.parameters()
                if p.requires_grad
            ]
        )
        for parameter in model.module.parameters():
            parameter.grad = None
        true_batch = float(max(1, len(records)))
        expected = true_batch / ranks.world  # of this rank's part of the data ...
        expected /= ranks.world  # ... and what PrivacyEngine makes of it
        return summed / expected * true_batch

    return total


def measure(root: Path, ranks: Ranks) -> dict[str, float]:
    """How far one of nine records moves each sum, over the clip norm."""
    rng = np.random.default_rng(11)
    config = random_config(rng)
    folder = root / f"rank{ranks.rank}"
    folder.mkdir()
    records = random_records(rng, folder, lengths=[9, 2, 15, 1, 12, 3, 14, 1, 13], cap=1, length=16)
    manifest = manifest_of(meta_model(config))
    theta = (rng.normal(size=manifest.coordinates) * 0.3).astype("<f4")
    # Opacus' ghost clipping wants every module with parameters as an FSDP group of its own, and
    # cannot do norms of this model there.
    matrices = tuple(spec.name for spec in manifest.tensors if len(spec.shape) > 1)
    found: dict[str, float] = {}
    for name, select, replicated, shard, make in (
        ("ours", SELECTED, True, ResidentModel._shard, our_sum),
        ("clip after scatter", "all", False, ResidentModel._shard, clip_after_scatter),
        ("ghost", matrices, False, _shard_each, ghost_fsdp),
    ):
        with mock.patch.object(ResidentModel, "_shard", shard):
            model = ResidentModel(config, select=select, ranks=ranks, replicated=replicated)
        model.load(theta)
        model.module.train()
        found[name] = largest_move(make(model, ranks, NORM), records) / NORM
        found[f"{name} sharded"] = float(model.has_shards)
    return found


def _shard_each(self: ResidentModel) -> None:
    for module in self.module.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            fully_shard(module)
    fully_shard(self.module)


def main() -> int:
    """One rank."""
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    ranks = distributed.start("cpu", environment=os.environ, timeout_s=120)
    for spool in sorted(root.glob("**/spool")):
        do_jobs(spool.parent, ranks)
    figures = measure(root, ranks)
    if ranks.first:
        (root / "figures.json").write_text(json.dumps(figures))
    distributed.leave()
    return 0


if __name__ == "__main__":
    end_at_once(main)
