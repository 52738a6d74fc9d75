"""One record moves a sum by at most C: measured, for each way; and arithmetic that breaks it.

The right sums are measured on random models, paddings and lengths; each wrong one is measured by
the same function, on records chosen so that it shows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from node_agent.worker.per_record import GUARD, ClippedSum, structure_of
from node_agent.worker.private_path import WAYS
from tests.support.clipping import (
    OurSum,
    largest_move,
    random_model,
    random_records,
    token_mean_sum,
    unclipped,
)
from tests.support.training import ALONE

torch.set_num_threads(1)

# Of the clip norm: float32 gradients and float64 sums; what is charged for has 2**-16.
FLOAT_ERROR = 1e-6


def records_for(rng, tmp_path, *, cap=None):
    length = int(rng.choice([8, 16, 24]))
    cap = int(rng.choice([1, 2, 4])) if cap is None else cap
    lengths = [0, *rng.integers(1, 3 * length, size=3).tolist()]
    return random_records(rng, tmp_path, lengths=lengths, cap=cap, length=length), length


@pytest.mark.parametrize("case", range(8))
def test_no_record_moves_the_sum_further_than_the_clip_norm(tmp_path, case):
    rng = np.random.default_rng(case)
    model = random_model(rng, ALONE)
    records, _ = records_for(rng, tmp_path, cap=1 if case % 2 else None)
    norms = [float(np.linalg.norm(unclipped(model, record))) for record in records]
    norm = float(np.quantile(norms, rng.uniform(0.1, 1.0)))  # some are longer, some are not
    exact = sum(
        unclipped(model, record) * min(1.0, norm * GUARD / length)
        for record, length in zip(records, norms, strict=True)
    )
    longest = max(record.inputs.shape[0] for record in records)
    for way in WAYS:
        if way == "ghost" and longest > 1:
            continue
        rows = int(rng.integers(longest, 9))
        sums = ClippedSum(model, way=way, clip_norm=norm, rows=rows)
        try:
            total = OurSum(sums)
            assert largest_move(total, records) <= norm * (1 + FLOAT_ERROR), way
            scale = max(norm, float(np.linalg.norm(exact)))
            assert np.linalg.norm(total(records) - exact) <= 1e-6 * scale, way
            assert not total([]).any()  # a step without records is one of zeros
            tally = sums.fill(records)
            assert tally.clipped == sum(length > norm * GUARD for length in norms)
        finally:
            sums.close()
    assert not any(hasattr(p, "grad_sample") for p in model.module.parameters())


def test_without_clipping_the_same_measure_convicts(tmp_path):
    rng = np.random.default_rng(0)
    model = random_model(rng, ALONE)
    records, _ = records_for(rng, tmp_path)

    def total(found):
        return sum((unclipped(model, record) for record in found), np.zeros(1))

    norm = 0.5 * max(float(np.linalg.norm(unclipped(model, record))) for record in records)
    assert largest_move(total, records) > 1.9 * norm


def test_a_document_clipped_row_by_row_is_convicted(tmp_path):
    """A document of k rows is one record: clipped for each row it would count k times."""
    rng = np.random.default_rng(5)
    model = random_model(rng, ALONE)
    (record,) = random_records(rng, tmp_path, lengths=[100], cap=4, length=8)
    rows = [type(record)(record.inputs[n : n + 1], record.labels[n : n + 1], 8) for n in range(4)]
    norm = 0.2 * min(float(np.linalg.norm(unclipped(model, row))) for row in rows)

    def by_row(found):
        total = np.zeros(model.manifest.coordinates)
        for _ in found:
            for row in rows:
                gradient = unclipped(model, row)
                total += gradient * min(1.0, norm / np.linalg.norm(gradient))
        return total

    for way in ("hooks", "loop"):
        sums = ClippedSum(model, way=way, clip_norm=norm, rows=4)
        assert largest_move(OurSum(sums), [record]) <= norm * (1 + FLOAT_ERROR)
        sums.close()
    assert largest_move(by_row, [record]) > 1.5 * norm


def test_a_mean_over_the_tokens_of_a_padded_batch_is_convicted(tmp_path):
    """Eleven short records and a long one: without the long one all others weigh much more."""
    rng = np.random.default_rng(3)
    model = random_model(rng, ALONE)
    records = random_records(rng, tmp_path, lengths=[1] * 11 + [60], cap=1, length=64, alphabet=1)
    norm = min(float(np.linalg.norm(unclipped(model, record))) for record in records)

    wrong = largest_move(token_mean_sum(model, norm), records)
    assert wrong > 4 * norm
    for way in WAYS:
        sums = ClippedSum(model, way=way, clip_norm=norm, rows=32)
        assert largest_move(OurSum(sums), records) <= norm * (1 + FLOAT_ERROR), way
        sums.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_record_without_a_finite_gradient_adds_nothing(tmp_path, way, poison):
    """One byte has a poisoned embedding; whoever uses it is left out, the others stay."""
    rng = np.random.default_rng(7)
    model = random_model(rng, ALONE)
    records = random_records(rng, tmp_path, lengths=[3, 9, 5], cap=1, length=16)
    odd = {int(t) for t in records[1].inputs[0]} - {
        int(t) for n in (0, 2) for t in records[n].inputs[0]
    }
    odd -= {256, 258}
    if not odd:
        pytest.fail("the records use the same letters: nothing was tested")
    sums = ClippedSum(model, way=way, clip_norm=0.1, rows=8)
    total = OurSum(sums)
    others = total([records[0], records[2]])
    with torch.no_grad():
        model.module.model.embed_tokens.weight[odd.pop()] = poison
    found = total(records)
    tally = sums.fill(records)
    sums.close()

    assert (tally.records, tally.not_finite) == (3, 1)
    np.testing.assert_allclose(found, others, atol=1e-7)


def test_what_a_model_is_like_is_seen():
    rng = np.random.default_rng(1)
    found = structure_of(random_model(rng, ALONE))
    assert found.modules == {"Linear", "Embedding", "LlamaRMSNorm"}
    assert not found.tied
    assert (found.dropout, found.checkpointing, found.mixing) == (0.0, "off", ())

    model = random_model(rng, ALONE, checkpointing=True)
    model.module.lm_head.weight = model.module.model.embed_tokens.weight
    model.module.config.attention_dropout = 0.25
    model.module.model.extra = torch.nn.BatchNorm1d(3)
    other = structure_of(model)
    assert (other.tied, other.dropout, other.checkpointing) == (True, 0.25, "non-reentrant")
    assert other.mixing == ("BatchNorm1d",)
    assert "BatchNorm1d" in other.modules


def test_the_bound_holds_where_matrix_work_is_in_bfloat16(tmp_path, monkeypatch):
    """As on a GPU. What is clipped is what is added up, however coarsely it was computed."""
    rng = np.random.default_rng(2)
    model = random_model(rng, ALONE)
    records = random_records(rng, tmp_path, lengths=[3, 9, 14, 5], cap=1, length=16)
    sums, norm = {}, 0.02
    half_work = torch.autocast("cpu", dtype=torch.bfloat16)
    for half in (False, True):
        if half:
            monkeypatch.setattr(model, "autocast", lambda: half_work)
        for way in ("hooks", "loop"):
            clipped = ClippedSum(model, way=way, clip_norm=norm, rows=8)
            assert largest_move(OurSum(clipped), records) <= norm * (1 + FLOAT_ERROR), way
            sums[half, way] = OurSum(clipped)(records)
            clipped.close()
    for way in ("hooks", "loop"):
        coarse = np.linalg.norm(sums[True, way] - sums[False, way])
        assert 1e-5 * norm < coarse < 0.5 * norm  # else it was not in bfloat16
