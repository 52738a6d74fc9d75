"""What the demonstration trains: a small byte-level Llama, and the terms of its run.

Sized for two processor cores and under four minutes: 0.66 million parameters see 128 bytes at a
time, and every site does forty AdamW steps a round. The outer step is the plain mean with
equal weights, so that a reader can redo it by hand.

In mode ``record-local`` the model is smaller, 27,000 parameters: noise grows with the number of
parameters, and fifty short documents a site cannot hide more of it. Each site does ten private
AdamW steps a round, each on about half of its documents. Six rounds cost epsilon 5.2 at delta
1e-3; the model learns less than without privacy, and the figures say how much less.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log10
from typing import Any, Final

from protocols.identifiers import NodeId
from protocols.plan_privacy import RECORD_MODES
from protocols.secagg.threshold import SecaggTerms

RUN: Final = "demo-1"
ROUNDS: Final = 6  # training rounds, unless asked for others
MOST_NORM: Final = 100.0  # L2, of an update: far above what forty steps make of this model
_SEQUENCE: Final = 128  # tokens: bytes of text

EPSILON: Final = 8.0  # that every site and the federation allow in the demonstration
_STEPS: Final = 10  # private steps a round
_NOISE: Final = 3.0  # z
_BATCH: Final = 26  # documents of a private step, or half of a site's where it has fewer than 52
_ROWS: Final = 4  # pieces of 128 bytes that one document may bring

MODEL: Final[dict[str, Any]] = {
    "family": "llama",
    "seed": 1,
    "config": {
        "vocab_size": 259,  # 256 bytes, begin, end, padding
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": _SEQUENCE,
        "tie_word_embeddings": False,
    },
}
_SMALL: Final = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def demo_model(mode: str) -> dict[str, Any]:
    """The model that a mode trains."""
    if mode not in RECORD_MODES:
        return MODEL
    return {**MODEL, "config": {**MODEL["config"], **_SMALL}}


def demo_delta(documents: int) -> str:
    """Delta of a demonstration: a tenth of one in the documents of a site, or less."""
    return f"1e-{max(3, ceil(log10(max(1, documents))) + 1)}"


def demo_privacy(documents: int) -> dict[str, Any]:
    """The privacy terms of mode ``record-local``.

    Args:
        documents: of a site, about. A plan's author writes down what is known publicly of the
            sites; the demonstration takes the mean of the texts it has just copied.
    """
    batch = min(_BATCH, max(1, documents // 2))
    return {
        "unit": "document",
        "max_sequences": _ROWS,
        "clip_norm": 1.0,
        "noise_multiplier": _NOISE,
        "sampling_rate": min(0.5, batch / max(1, documents)),
        "expected_batch": float(batch),
        "steps": _STEPS,
        "delta": demo_delta(documents),
        "held_out": "public",  # the corpus is; of other text the demonstration says so
    }


def demo_plan(
    *,
    sites: Sequence[NodeId],
    languages: Sequence[str],
    rounds: int,
    mode: str,
    documents: int = 50,
) -> dict[str, Any]:
    """The plan as its author writes it; digests follow from the initial model.

    Args:
        sites: of the roster.
        languages: held-out languages over all sites.
        rounds: training rounds; one evaluation of the final model follows.
        mode: of the sum.
        documents: of a site, about; for the privacy terms.
    """
    roster = sorted(sites)
    least = 1 if mode == "open" else SecaggTerms.for_roster(len(roster)).least_survivors
    plan: dict[str, Any] = {
        "run": RUN,
        "title": "Demonstration: one small model, text that stays at the sites",
        "mode": mode,
        "roster": roster,
        # One site may be away for a while; the round goes on without it after the deadline. A
        # masked sum needs its threshold.
        "min_participants": max(1, len(roster) - 1, least),
        "rounds": rounds,
        "model": demo_model(mode),
        "local_step": {
            "kind": "builtin",
            "optimizer": "adamw",
            "lr": 2e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.01,
            "warmup_steps": 10,
            "batch_size": 8,
            "sequence_length": _SEQUENCE,
            "grad_clip": 1.0,
            "max_steps": 40,
            "keep_optimizer": True,
        },
        "outer": {"optimizer": "average", "lr": 1.0},
        # A coordinate moves by at most about steps * lr in a round with these betas.
        "vector": {
            "ring_bits": 20,
            "scale": {"mode": "per-block", "first_bound": 0.1},
            "clip_norm": MOST_NORM,
        },
        "deadlines": {
            "join": 120,
            "train": 300,  # a busy machine takes its time to start torch at four sites
            "deal": 60,
            "upload": 60,
            "commit": 60,
            "reveal": 60,
        },
        "evaluation": {"languages": sorted(languages), "max_documents": 40, "final": True},
    }
    if mode in RECORD_MODES:
        plan["privacy"] = demo_privacy(documents)
        plan["local_step"] = {
            "kind": "builtin",
            "optimizer": "adamw",
            "lr": 1e-2,
            "betas": [0.9, 0.95],
            "sequence_length": _SEQUENCE,
            "max_steps": _STEPS,
            "keep_optimizer": True,
        }
    return plan
