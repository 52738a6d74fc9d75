"""Which way records are clipped, and one row for every configuration that is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node_agent.resident import JobFailedError
from node_agent.worker.private_path import Setting, Structure, rows_at_once, way_for

MODEL = Structure(
    trainable=35_000,
    modules=frozenset({"Linear", "Embedding", "LlamaRMSNorm"}),
    mixing=(),
    dropout=0.0,
    trainable_buffers=(),
    tied=False,
    checkpointing="off",
)
ALONE = Setting(
    ranks=1,
    loss="record-mean",
    sharded_trainables=False,
    half_precision=False,
    longest_record=4,
)
HUGE = 10**9


@pytest.mark.parametrize(
    ("model", "setting", "way"),
    [
        ({}, {}, "hooks"),
        ({"tied": True}, {}, "hooks"),
        ({"checkpointing": "reentrant"}, {}, "hooks"),
        ({"checkpointing": "non-reentrant"}, {}, "loop"),
        ({}, {"ranks": 2}, "loop"),
        ({"trainable": HUGE}, {}, "loop"),
        ({"trainable": HUGE}, {"longest_record": 1}, "ghost"),
        ({"trainable": HUGE, "tied": True}, {"longest_record": 1}, "loop"),
        ({"trainable": HUGE}, {"longest_record": 1, "half_precision": True}, "loop"),
        ({}, {"wanted": "loop"}, "loop"),
        ({}, {"wanted": "ghost", "longest_record": 1}, "ghost"),
        ({"tied": True, "checkpointing": "non-reentrant"}, {"ranks": 8, "wanted": "loop"}, "loop"),
    ],
)
def test_the_quickest_right_way_is_taken(model, setting, way):
    assert way_for(replace(MODEL, **model), replace(ALONE, **setting)) == way


@pytest.mark.parametrize(
    ("model", "setting", "code", "words"),
    [
        ({"checkpointing": "non-reentrant"}, {"wanted": "hooks"}, "path", "miss gradients"),
        ({"checkpointing": "non-reentrant"}, {"wanted": "ghost"}, "path", "miss gradients"),
        ({"tied": True}, {"wanted": "ghost", "longest_record": 1}, "path", "two places"),
        ({}, {"wanted": "ghost"}, "path", "several rows"),
        ({}, {"wanted": "ghost", "half_precision": True, "longest_record": 1}, "path", "bfloat16"),
        ({}, {"wanted": "hooks", "ranks": 2}, "path", "silently"),
        ({}, {"wanted": "ghost", "ranks": 2, "longest_record": 1}, "path", "silently"),
        ({"trainable": HUGE}, {"wanted": "hooks"}, "path", "do not fit"),
        ({}, {"loss": "token-mean"}, "token_mean", "5.6 clip norms"),
        ({}, {"sharded_trainables": True}, "clip_after_scatter", "whole on every rank"),
        ({"dropout": 0.1}, {}, "dropout", "never shown"),
        ({"mixing": ("BatchNorm1d",)}, {}, "batch_statistics", "BatchNorm1d"),
        ({"trainable_buffers": ("Odd",)}, {}, "batch_statistics", "Odd"),
        ({"routed": True}, {}, "routing", "experts"),
        ({"modules": frozenset({"Linear", "LSTM"})}, {}, "module", "LSTM"),
        ({"trainable": 0}, {}, "nothing", "nothing to clip"),
    ],
)
def test_refused(model, setting, code, words):
    with pytest.raises(JobFailedError, match=words) as refused:
        way_for(replace(MODEL, **model), replace(ALONE, **setting))
    assert refused.value.code == f"private.{code}"
    assert "\n" not in str(refused.value)


def test_rows_are_bounded_by_memory_and_by_the_site():
    assert rows_at_once("hooks", MODEL, ALONE) == 32
    assert rows_at_once("hooks", replace(MODEL, trainable=10**7), ALONE) == 13
    assert rows_at_once("hooks", replace(MODEL, trainable=10**8), ALONE) == 4  # one whole record
    assert rows_at_once("loop", MODEL, ALONE, micro_batch=2) == 2
    assert rows_at_once("ghost", replace(MODEL, trainable=HUGE), ALONE) == 32
