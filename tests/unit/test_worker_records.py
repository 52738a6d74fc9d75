"""Documents as records of a private step, and which of them take part."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction

import numpy as np
import pytest

from node_agent.worker.data import IGNORE, DataError, index_corpus
from node_agent.worker.poisson import poisson_sample, threshold
from node_agent.worker.records import Records
from node_agent.worker.tokens import BOS, EOS, PAD

LENGTH = 8
TEXTS = ["", "a", "1234567", "12345678", "ñandú y choclo", "x" * 40]


def corpus(tmp_path, texts=TEXTS):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return index_corpus((str(path),))


def seed(*name) -> bytes:
    return hashlib.sha256(repr(name).encode()).digest()


def tokens(record) -> list[int]:
    """The predicted tokens of all rows, in order."""
    return [int(token) for row in record.labels for token in row if token != IGNORE]


# -- documents -----------------------------------------------------------------------------------


def test_every_byte_is_predicted_once_in_its_own_record(tmp_path):
    records = Records(corpus(tmp_path), unit="document", max_sequences=99, sequence_length=LENGTH)

    assert len(records) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        record = records.read(number)
        assert tokens(record) == [*text.encode(), EOS]
        assert record.inputs.shape == record.labels.shape == (records.rows(number), LENGTH)
        assert record.tokens == len(text.encode()) + 1
        assert record.inputs[0, 0] == BOS
        flat = [int(t) for row in record.inputs for t in row if t != PAD]
        assert flat == [BOS, *text.encode()]  # each row begins with what the last one ended with


def test_a_long_document_is_cut_and_the_rest_is_said(tmp_path):
    records = Records(corpus(tmp_path), unit="document", max_sequences=2, sequence_length=LENGTH)

    assert [records.rows(n) for n in range(len(TEXTS))] == [1, 1, 1, 2, 2, 2]
    assert tokens(records.read(5)) == [ord("x")] * 16
    assert records.longest == 2
    assert records.all_rows - records.used_rows == 1 + 4  # of 18 and of 41 tokens


def test_a_sequence_is_a_record_and_no_two_documents_share_one(tmp_path):
    made = corpus(tmp_path)
    records = Records(made, unit="sequence", max_sequences=None, sequence_length=LENGTH)

    assert len(records) == records.used_rows == records.all_rows == 1 + 1 + 1 + 2 + 3 + 6
    assert records.longest == 1
    whole = [tokens(records.read(n)) for n in range(len(records))]
    assert [t for row in whole for t in row] == [t for text in TEXTS for t in (*text.encode(), EOS)]
    assert whole[3] == [*b"12345678"]
    assert whole[4] == [EOS]


def test_removing_a_document_changes_no_other_record(tmp_path):
    """Packed end to end, all that follow would move."""
    whole = Records(corpus(tmp_path), unit="document", max_sequences=3, sequence_length=LENGTH)
    before = [whole.read(n).inputs.tolist() for n in range(len(whole))]
    fewer = corpus(tmp_path, TEXTS[:2] + TEXTS[3:])
    rest = Records(fewer, unit="document", max_sequences=3, sequence_length=LENGTH)

    assert [rest.read(n).inputs.tolist() for n in range(len(rest))] == before[:2] + before[3:]


def test_a_file_that_changed_is_said(tmp_path):
    records = Records(corpus(tmp_path), unit="document", max_sequences=3, sequence_length=LENGTH)
    corpus(tmp_path, ["other"])
    with pytest.raises(DataError):
        records.read(4)
    records.close()


# -- samples -------------------------------------------------------------------------------------


def test_the_rate_is_rounded_down():
    assert threshold(Fraction(1, 2)) == 2**63
    assert threshold(Fraction(1)) == 2**64
    assert threshold(Fraction(1, 3)) == 2**64 // 3
    for bad in (Fraction(0), Fraction(-1, 2), Fraction(2), Fraction(1, 2**65)):
        with pytest.raises(ValueError, match="rate"):
            threshold(bad)


def test_a_sample_is_pinned():
    """Little-endian words of the key stream, one a record: another reading is another sample."""
    from protocols.noise.streams import key_stream

    words = np.frombuffer(key_stream(seed("pin"), 0).update(bytes(8 * 50)), dtype="<u8")
    wanted = [n for n in range(50) if int(words[n]) < 2**64 // 5]

    assert poisson_sample(50, Fraction(1, 5), seed("pin")).tolist() == wanted
    assert len(wanted) > 3


def test_everybody_or_nobody():
    assert poisson_sample(5, Fraction(1), seed(1)).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(0, Fraction(1, 2), seed(1)).tolist() == []
    assert poisson_sample(5, Fraction(1, 2**40), seed(1)).size == 0


def test_records_take_part_by_themselves_with_their_rate():
    """Counts of each record and of each pair, over 4,000 steps; 6 deviations."""
    rate, steps, records = Fraction(1, 8), 4000, 30
    taken = np.zeros((steps, records))
    for step in range(steps):
        taken[step, poisson_sample(records, rate, seed("steps", step))] = 1
    q = float(rate)

    def fits(found: np.ndarray, chance: float) -> bool:
        spread = (steps * chance * (1 - chance)) ** 0.5
        return bool((abs(found - steps * chance) < 6 * spread).all())

    assert fits(taken.sum(axis=0), q)
    for factor in (2 / 3, 3 / 2):
        assert not fits(taken.sum(axis=0), q * factor)

    def pairs(found: np.ndarray) -> np.ndarray:
        return (found.T @ found)[np.triu_indices(records, 1)]

    assert fits(pairs(taken), q * q)
    twins = taken.copy()
    twins[:, 1::2] = twins[:, ::2]  # one draw for two records
    assert not fits(pairs(twins), q * q)
    # The size of a sample varies; a batch of fixed size, the usual mistake, does not.
    assert abs(taken.sum(axis=1).var() / (records * q * (1 - q)) - 1) < 0.2
