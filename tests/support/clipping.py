"""How far one record moves a sum, for small random models and records; and sums that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from node_agent.worker.data import IGNORE, index_corpus
from node_agent.worker.distributed import Ranks
from node_agent.worker.model import ResidentModel
from node_agent.worker.per_record import ClippedSum
from node_agent.worker.records import Record, Records

Sum = Callable[[Sequence[Record]], np.ndarray]


def random_config(rng: np.random.Generator) -> dict[str, int]:
    """A Llama of a few thousand parameters besides its two tables of tokens."""
    heads = int(rng.choice([1, 2, 4]))
    return {
        "hidden_size": heads * int(rng.choice([4, 8])),
        "intermediate_size": int(rng.integers(4, 24)),
        "num_hidden_layers": int(rng.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([h for h in (1, 2, 4) if heads % h == 0])),
        "max_position_embeddings": 64,
    }


def random_model(rng: np.random.Generator, ranks: Ranks, **options: Any) -> ResidentModel:
    """A model with weights of a random scale, in training mode."""
    options = {"select": "all", "replicated": True} | options
    model = ResidentModel(random_config(rng), ranks=ranks, **options)
    scale = float(10 ** rng.uniform(-2, 0))
    model.load((rng.normal(size=model.manifest.coordinates) * scale).astype("<f4"))
    model.module.train()
    return model


def random_records(
    rng: np.random.Generator,
    folder: Path,
    *,
    lengths: Sequence[int],
    cap: int,
    length: int,
    alphabet: int | None = None,
) -> list[Record]:
    """One record for each number of letters."""
    path = folder / "records.jsonl"
    lines = []
    for count in lengths:
        letters = rng.integers(97, 97 + (alphabet or int(rng.integers(1, 26))), size=count)
        lines.append(json.dumps({"text": bytes(letters.tolist()).decode()}) + "\n")
    path.write_text("".join(lines))
    records = Records(
        index_corpus((str(path),)), unit="document", max_sequences=cap, sequence_length=length
    )
    return [records.read(number) for number in range(len(records))]


def largest_move(total: Sum, records: Sequence[Record]) -> float:
    """The largest ``||S(D) - S(D minus x)||_2`` over the records x."""
    whole = total(records)
    others = [total([*records[:n], *records[n + 1 :]]) for n in range(len(records))]
    return max(float(np.linalg.norm(whole - other)) for other in others)


@dataclass
class OurSum:
    """``ClippedSum`` as a function."""

    sums: ClippedSum

    def __call__(self, records: Sequence[Record]) -> np.ndarray:
        self.sums.fill(records)
        return self.sums.total_D.numpy().copy()


def flat_gradient(model: ResidentModel) -> np.ndarray:
    """What the last backward left, as one float64 vector; the model forgets it."""
    gradient = np.concatenate(
        [p.grad.double().flatten().numpy() for p in model.module.parameters()]
    )
    model.forget_gradients()
    return gradient


def unclipped(model: ResidentModel, record: Record) -> np.ndarray:
    """One record's own gradient."""
    inputs, labels = torch.from_numpy(record.inputs), torch.from_numpy(record.labels)
    means = model.nll(inputs, labels) / (labels != IGNORE).sum(dim=1)
    means.mean().backward()
    return flat_gradient(model)


def token_mean_sum(model: ResidentModel, norm: float) -> Sum:
    """**Wrong**: Opacus' hooks under the loss that Hugging Face models compute by themselves.

    The mean is over the tokens of the whole padded batch, so a record weighs more or less with the
    lengths of the others.
    """
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    def total(records: Sequence[Record]) -> np.ndarray:
        hooks = GradSampleHooks(model.module, batch_first=True, loss_reduction="mean")
        try:
            inputs = torch.from_numpy(np.concatenate([r.inputs for r in records]))
            labels = np.concatenate([r.labels for r in records])
            # The model shifts labels itself: give each token its own place.
            shifted = np.full_like(labels, IGNORE)
            shifted[:, 1:] = labels[:, :-1]
            loss = model.module(input_ids=inputs, labels=torch.from_numpy(shifted)).loss
            loss.backward()
            rows = torch.cat(
                [p.grad_sample.flatten(1).double() for p in model.module.parameters()], dim=1
            ).numpy()
        finally:
            hooks.cleanup()
            model.forget_gradients()
        norms = np.linalg.norm(rows, axis=1)
        return (rows * np.minimum(1.0, norm / np.maximum(norms, 1e-30))[:, None]).sum(axis=0)

    return total
