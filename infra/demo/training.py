"""What the demonstration trains: a small byte-level Llama, and the terms of its run.

Sized for two processor cores and under four minutes: 0.66 million parameters see 128 bytes at a
time, and every site does forty AdamW steps a round. The outer step is the plain mean with
equal weights, so that a reader can redo it by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from protocols.identifiers import NodeId
from protocols.secagg.threshold import SecaggTerms

RUN: Final = "demo-1"
ROUNDS: Final = 6  # training rounds, unless asked for others
MOST_NORM: Final = 100.0  # L2, of an update: far above what forty steps make of this model
_SEQUENCE: Final = 128  # tokens: bytes of text

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


def demo_plan(
    *, sites: Sequence[NodeId], languages: Sequence[str], rounds: int, mode: str
) -> dict[str, Any]:
    """The plan as its author writes it; digests follow from the initial model.

    Args:
        sites: of the roster.
        languages: held-out languages over all sites.
        rounds: training rounds; one evaluation of the final model follows.
        mode: of the sum.
    """
    roster = sorted(sites)
    least = 1 if mode == "open" else SecaggTerms.for_roster(len(roster)).least_survivors
    return {
        "run": RUN,
        "title": "Demonstration: one small model, text that stays at the sites",
        "mode": mode,
        "roster": roster,
        # One site may be away for a while; the round goes on without it after the deadline. A
        # masked sum needs its threshold.
        "min_participants": max(1, len(roster) - 1, least),
        "rounds": rounds,
        "model": MODEL,
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
