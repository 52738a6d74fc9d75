"""Private jobs for the worker, and DP-SGD written out plainly beside them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from node_agent.worker.data import IGNORE, index_corpus
from node_agent.worker.poisson import poisson_sample
from node_agent.worker.records import Record, Records
from tests.support.private_plans import SECAGG
from tests.support.training import flat, make_site, reference_model, reference_nll
from tests.support.worker import Site

PRIVACY = {
    "unit": "document",
    "max_sequences": 3,
    "clip_norm": 0.5,
    "noise_multiplier": 1.0,
    "sampling_rate": 0.3,
    "expected_batch": 6.0,
    "steps": 5,
    "delta": "1e-5",
}
SHARED = {"steps": 1, "colluders": 1}
SHARED_STEP = {"lr": 1.0, "max_steps": 1, "keep_optimizer": False}


def private_site(root: Path, *, mode: str = "record-local", documents: int = 20, **plan: Any):
    """A site whose plan protects records; ``privacy`` and ``local_step`` may be given as dicts."""
    shared = mode == "record-distributed"
    privacy = PRIVACY | (SHARED if shared else {}) | plan.pop("privacy", {})
    step = {"max_steps": privacy["steps"], "lr": 0.5}
    step |= (SHARED_STEP if shared else {}) | plan.pop("local_step", {})
    return make_site(
        root,
        documents=documents,
        mode=mode,
        roster=["a", "b", "c"],
        min_participants=3,
        secagg=SECAGG,
        evaluation={"languages": []},
        vector={"scale": {"mode": "fixed", "exponent": 16}} if shared else {},
        privacy={name: value for name, value in privacy.items() if value is not None},
        local_step=step,
        **plan,
    )


def counted_bytes(name: str = "test") -> Callable[[int], bytes]:
    """Bytes that anybody can predict, in place of the operating system's."""
    counter = itertools.count()
    return lambda size: hashlib.shake_256(f"{name} {next(counter)}".encode()).digest(size)


def without_noise(parts: Iterable[np.ndarray], *, divisor: float, **_: Any):
    """In place of ``private_noise.noised``: the mean itself."""
    for part in parts:
        yield (part / divisor).astype(np.float32)


def records_of(site: Site) -> Records:
    """The site's records, as its plan cuts them."""
    privacy = site.plan.privacy
    return Records(
        index_corpus(site.data.train),
        unit=privacy.unit,
        max_sequences=privacy.max_sequences,
        sequence_length=site.plan.local_step.sequence_length,
    )


def tokens_of(record: Record) -> list[list[int]]:
    """Each row of a record as its tokens, without padding."""
    rows = []
    for inputs, labels in zip(record.inputs, record.labels, strict=True):
        known = labels != IGNORE
        rows.append([*inputs[known].tolist(), int(labels[known][-1])])
    return rows


def plain_gradient(model: Any, record: Record) -> np.ndarray:
    """One record's gradient in float64, of what is trained: one backward, no padding."""
    model.zero_grad()
    rows = tokens_of(record)
    loss = sum(reference_nll(model, tokens) / (len(tokens) - 1) for tokens in rows) / len(rows)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return np.concatenate([p.grad.double().numpy().reshape(-1) for p in trained])


def clip(gradient: np.ndarray, norm: float) -> np.ndarray:
    """Scaled down to L2 norm ``norm`` where it is longer."""
    return gradient * min(1.0, norm / np.linalg.norm(gradient))


def plain_sum(model: Any, records: Sequence[Record], norm: float) -> np.ndarray:
    """S(D)."""
    total = np.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad))
    for record in records:
        total += clip(plain_gradient(model, record), norm)
    return total


def samples_of(site: Site, random_bytes: Callable[[int], bytes], *, noise: bool = True):
    """The samples that a worker with this source of chance draws."""
    privacy, count = site.plan.privacy, len(records_of(site))
    for _ in range(privacy.steps):
        yield poisson_sample(count, Fraction(privacy.sampling_rate), random_bytes(32))
        if noise:
            random_bytes(32), random_bytes(32)


def plain_dpsgd(site: Site, random_bytes: Callable[[int], bytes]) -> np.ndarray:
    """DP-SGD without its noise, one record at a time: ``local - start``."""
    plan, records = site.plan, records_of(site)
    model = reference_model(site.theta, site.manifest)
    parameters = list(model.parameters())
    step = plan.local_step
    if step.optimizer == "adamw":
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": step.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=step.lr, betas=step.betas)
    else:
        optimizer = torch.optim.SGD(parameters, lr=step.lr, momentum=step.momentum)
    for sample in samples_of(site, random_bytes):
        total = plain_sum(model, [records.read(n) for n in sample], plan.privacy.clip_norm)
        at = 0
        for parameter in parameters:
            piece = total[at : at + parameter.numel()] / plan.privacy.expected_batch
            parameter.grad = torch.from_numpy(piece.reshape(parameter.shape).astype(np.float32))
            at += parameter.numel()
        optimizer.step()
    return flat(model) - site.theta
