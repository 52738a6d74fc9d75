"""How well a model predicts a site's held-out text: sums of nats and bytes per language.

Sums, never means: bits per byte over several sites is the ratio of two sums, and both are integers
in the secure sum. Long documents are cut into windows; each byte is predicted exactly once, the
end of the text is not scored. Windows are sorted by length, so little is spent on padding, and the
batches do not depend on anything but the documents: the same model gives the same figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from node_agent.resident import JobFailedError
from node_agent.worker.agreement import Gate
from node_agent.worker.data import IGNORE, HeldOut, Window, windows
from node_agent.worker.distributed import Ranks
from node_agent.worker.model import ResidentModel, on_device
from node_agent.worker.tokens import BYTES, PAD, Encoder

_BATCH_TOKENS: Final = 8192


def batches(found: Sequence[Window], *, budget: int = _BATCH_TOKENS) -> list[list[Window]]:
    """Windows of similar length together, longest first; at most ``budget`` padded tokens each."""
    ordered = sorted(found, key=lambda window: -window.inputs.size)  # stable: ties keep order
    made: list[list[Window]] = []
    for window in ordered:
        if made and (len(made[-1]) + 1) * made[-1][0].inputs.size <= budget:
            made[-1].append(window)
        else:
            made.append([window])
    return made


def evaluate(
    model: ResidentModel,
    documents: Sequence[HeldOut],
    *,
    sequence_length: int,
    ranks: Ranks,
    gate: Gate,
    encoder: Encoder = BYTES,
) -> list[dict[str, Any]]:
    """Score held-out documents with the model as it is.

    Args:
        model: loaded; its gradients are not touched.
        documents: the same on every rank.
        sequence_length: tokens the model sees at once.
        ranks: batches are dealt out in turn.
        gate: where the job may be cancelled, after each batch.
        encoder: how documents become tokens.

    Returns:
        One ``spool.Evaluation`` per language as a dict, in order of language; the same on every
        rank.

    Raises:
        JobFailedError: train.non_finite: the model's loss is NaN or infinite.
        JobCancelledError, JobInterruptedError.
    """
    cut = [
        window
        for document in documents
        for window in windows(document, sequence_length=sequence_length, encoder=encoder)
    ]
    languages = sorted({document.language for document in documents})
    nll = dict.fromkeys(languages, 0.0)
    todo = batches(cut)
    was_training = model.module.training
    model.module.eval()
    try:
        for first in range(0, len(todo), ranks.world):
            mine = first + ranks.rank
            batch = todo[mine] if mine < len(todo) else []  # others must not wait for our forward
            for window, value in zip(batch, _score(model, batch, ranks), strict=True):
                nll[window.language] += value
            gate.leave(gate.meet([]).decision)
    finally:
        model.module.train(was_training)
    totals = ranks.summed([nll[language] for language in languages])
    if not all(math.isfinite(total) for total in totals):
        raise JobFailedError("train.non_finite", "the starting model's loss is NaN or infinite")
    sizes, counts = Counter[str](), Counter[str]()
    for document in documents:
        sizes[document.language] += len(document.text)
        counts[document.language] += 1
    return [
        {
            "language": language,
            "nll_nats": total,
            "bytes": sizes[language],
            "documents": counts[language],
        }
        for language, total in zip(languages, totals, strict=True)
    ]


def _score(model: ResidentModel, batch: Sequence[Window], ranks: Ranks) -> list[float]:
    """Nats of each window; without windows a forward pass over padding, for the peers' sake."""
    rows = len(batch) or 1
    if not batch and not ranks.sharded:
        return []
    length = max((window.inputs.size for window in batch), default=1)
    inputs = np.full((rows, length), PAD, dtype=np.int64)
    labels = np.full((rows, length), IGNORE, dtype=np.int64)
    for row, window in enumerate(batch):
        inputs[row, : window.inputs.size] = window.inputs
        labels[row, : window.labels.size] = window.labels
    with torch.no_grad():
        scored = model.nll(on_device(inputs, ranks.device), on_device(labels, ranks.device))
    return scored.double().tolist()[: len(batch)]
