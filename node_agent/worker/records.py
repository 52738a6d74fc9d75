"""A site's documents as records of a private step: fixed-length rows, never packed. No torch.

A document's tokens (tokens.py) are cut every ``sequence_length`` predicted ones; each piece, a row,
begins with the last token of the one before, so every token is predicted once. Rows of two
documents are never laid together: then removing one document changes its own record and no other.

    unit "document"   one record is one document: its first ``max_sequences`` rows. The loss of the
                      record is the mean over its rows of each row's mean loss per token.
    unit "sequence"   one record is one row. A long document is a *group* of records: the promise
                      is for each of them, not for the document.

What is beyond ``max_sequences`` is not used; how much that is, the worker says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from node_agent.worker.data import IGNORE, Corpus, TextReader
from node_agent.worker.tokens import BYTES, PAD, Encoder, Tokens


@dataclass(frozen=True, slots=True)
class Record:
    """What one record is trained on."""

    inputs: Tokens  # shape [rows, sequence_length]
    labels: Tokens  # likewise; IGNORE past the end
    tokens: int  # predicted


class Records:
    """The records of a site, by number."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        unit: Literal["document", "sequence"],
        max_sequences: int | None,
        sequence_length: int,
        encoder: Encoder = BYTES,
    ) -> None:
        self._reader = TextReader(corpus, encoder)
        self._length = sequence_length
        self._unit = unit
        rows: NDArray[np.int64] = -(-(corpus.tokens - 1) // sequence_length)  # the first is given
        self.all_rows = int(rows.sum())
        if max_sequences is not None:
            rows = np.minimum(rows, max_sequences)
        self._rows = rows  # of each document
        self._ends = np.cumsum(rows)
        self.used_rows = int(rows.sum())
        self.longest = int(rows.max()) if unit == "document" else 1  # rows of a record

    def __len__(self) -> int:
        """N, the number of records."""
        return int(self._rows.size) if self._unit == "document" else self.used_rows

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def rows(self, record: int) -> int:
        """How many rows a record has, without reading it."""
        return int(self._rows[record]) if self._unit == "document" else 1

    def read(self, record: int) -> Record:
        """Read one record.

        Raises:
            DataError: data.changed when a file is not what it was when it was indexed.
        """
        if self._unit == "document":
            document, first, count = record, 0, int(self._rows[record])
        else:
            document = int(np.searchsorted(self._ends, record, side="right"))
            first, count = record - int(self._ends[document] - self._rows[document]), 1
        return _cut(self._reader.tokens(document), first=first, rows=count, length=self._length)


def _cut(tokens: Tokens, *, first: int, rows: int, length: int) -> Record:
    inputs = np.full((rows, length), PAD, dtype=np.int64)
    labels = np.full((rows, length), IGNORE, dtype=np.int64)
    predicted = 0
    for row in range(rows):
        start = (first + row) * length
        piece = tokens[start : start + length + 1]
        inputs[row, : piece.size - 1] = piece[:-1]
        labels[row, : piece.size - 1] = piece[1:]
        predicted += piece.size - 1
    return Record(inputs=inputs, labels=labels, tokens=predicted)
