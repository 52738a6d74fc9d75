"""A site's text as fixed-length sequences of tokens. No torch. Files: text_files.py.

A document becomes tokens as its encoder says (tokens.py): ``BOS bytes EOS``, or what a base model's
tokenizer makes of it between a first and a last token. An epoch is all documents in an order
drawn from (seed, epoch), laid end to end and cut every ``sequence_length`` tokens, so each token
of the stream but the first is predicted exactly once per epoch. Sequence number p of the run is
sequence ``p % n`` of epoch ``p // n``: one integer is the exact position, and any rank can
compute any sequence without reading what comes before. Memory is a few numbers per document; the
text stays on disk.

Rows of Parquet are read a row group at a time. So an epoch takes row groups in a drawn order, some
of them together until they hold ``WINDOW`` bytes of text, and mixes the documents of such a window.
Lines of JSONL are mixed over the whole epoch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappush, heappushpop
from typing import Final

import numpy as np
from numpy.typing import NDArray

from node_agent.worker.text_files import DataError, Reread, documents, find_files
from node_agent.worker.tokens import BYTES, PAD, Encoder, Tokens

IGNORE: Final = -100  # label of a position that is not predicted
WINDOW: Final = 2**27  # bytes of text in row groups that are mixed with each other

_CACHE_BYTES: Final = 32 * 2**20  # of documents as tokens: one long document spans many sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Where each document is: arrays of shape [documents]."""

    files: tuple[str, ...]
    file: NDArray[np.int32]  # index into files
    offset: NDArray[np.int64]  # of the line, in bytes; of a row: its number in its row group
    length: NDArray[np.int64]  # of the line, in bytes; 0 of a row
    group: NDArray[np.int32]  # number of its row group among all files'; -1 of a line
    first: NDArray[np.int64]  # shape [files]: number of each file's first row group
    text: NDArray[np.int64]  # UTF-8 bytes of the text
    tokens: NDArray[np.int64]  # of the document, first and last ones included
    fingerprint: str  # of the texts in order, hexadecimal

    @property
    def documents(self) -> int:
        return int(self.text.size)


def index_corpus(paths: Sequence[str], encoder: Encoder = BYTES) -> Corpus:
    """Read and check every document once; remember where the documents are and how long.

    Args:
        paths: see ``find_files``.
        encoder: how documents become tokens.

    Raises:
        DataError: see ``find_files``; data.malformed names the first bad line or row; data.empty
            when nothing holds any text.
    """
    files = find_files(paths)
    rows = array("q")  # six numbers per document: tuples would take ten times the memory
    digest = hashlib.sha256()
    if encoder.name != BYTES.name:
        digest.update(encoder.name.encode())
    first, groups = [], 0
    for index, file in enumerate(files):
        first.append(groups)
        for found in documents(file):
            text = found.text
            length = len(text) + 2 if encoder is BYTES else encoder.encode(text).size
            group = -1 if found.group < 0 else first[-1] + found.group
            groups = max(groups, group + 1)
            rows.extend((index, found.at, found.size, len(text), length, group))
            digest.update(len(text).to_bytes(8, "little") + text)
    table = np.frombuffer(rows, dtype=np.int64).reshape(-1, 6)
    if int(table[:, 3].sum()) == 0:
        raise DataError("data.empty", f"no text in {', '.join(str(file) for file in files)}")
    return Corpus(
        files=tuple(str(file) for file in files),
        file=table[:, 0].astype(np.int32),
        offset=table[:, 1].copy(),
        length=table[:, 2].copy(),
        group=table[:, 5].astype(np.int32),
        first=np.array(first, dtype=np.int64),
        text=table[:, 3].copy(),
        tokens=table[:, 4].copy(),
        fingerprint=digest.hexdigest(),
    )


class TextReader:
    """Reads documents of a corpus as tokens; keeps the latest ones."""

    def __init__(self, corpus: Corpus, encoder: Encoder) -> None:
        self._corpus = corpus
        self._encoder = encoder
        self._held: OrderedDict[int, NDArray[np.int32]] = OrderedDict()
        self._bytes = 0  # of what is held
        self._files = Reread(corpus.files)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def tokens(self, document: int) -> Tokens:
        """One document, from its first token to its last.

        Raises:
            DataError: data.changed when a file is not what it was when it was indexed.
        """
        if document in self._held:
            self._held.move_to_end(document)
            return self._held[document].astype(np.int64)
        corpus = self._corpus
        file, group = int(corpus.file[document]), int(corpus.group[document])
        tokens = None
        text = self._files.text(
            file,
            at=int(corpus.offset[document]),
            size=int(corpus.length[document]),
            group=group if group < 0 else group - int(corpus.first[file]),
        )
        if text is not None and len(text) == int(corpus.text[document]):
            tokens = self._encoder.encode(text)
        if tokens is None or tokens.size != int(corpus.tokens[document]):
            raise DataError("data.changed", f"{corpus.files[file]} changed while it was in use")
        self._held[document] = tokens.astype(np.int32)
        self._bytes += 4 * tokens.size
        while self._bytes > _CACHE_BYTES and len(self._held) > 1:
            self._bytes -= 4 * self._held.popitem(last=False)[1].size
        return tokens


# -- training sequences --------------------------------------------------------------------------


def epoch_order(documents: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of documents in one epoch: int64 [documents], a permutation.

    Sorts by raw PCG64 output, which numpy keeps stable between versions (NEP 19) unlike
    ``Generator.permutation``; a stored position thus means the same after an upgrade.
    """
    return np.argsort(_words(documents, seed=seed, epoch=epoch), kind="stable")


def _words(count: int, *, seed: int, epoch: int) -> NDArray[np.uint64]:
    return np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)


def windowed_order(
    group_D: NDArray[np.int32],
    text_D: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    window: int = WINDOW,
) -> NDArray[np.int64]:
    """The order of documents in one epoch where row groups are read whole: a permutation.

    Args:
        group_D: int32 [documents], the row group of each; -1 of those that can be read alone,
            which go to any window.
        text_D: int64 [documents], bytes.
        seed, epoch: as in ``epoch_order``.
        window: bytes of text in row groups that are mixed; one of them at least.
    """
    documents, groups = group_D.size, int(group_D.max()) + 1
    words = _words(2 * documents + groups, seed=seed, epoch=epoch)
    mixed, strays, places = np.split(words, (documents, 2 * documents))
    held = group_D >= 0
    size_G = np.bincount(group_D[held], weights=text_D[held], minlength=groups).astype(np.int64)
    drawn = np.argsort(places, kind="stable")
    window_G = np.empty(groups, dtype=np.int64)
    number, filled = 0, 0
    for group in drawn.tolist():
        if filled and filled + int(size_G[group]) > window:
            number, filled = number + 1, 0
        window_G[group] = number
        filled += int(size_G[group])
    window_D = (strays % np.uint64(number + 1)).astype(np.int64)
    window_D[held] = window_G[group_D[held]]
    return np.lexsort((mixed, window_D))


@dataclass(frozen=True, slots=True)
class _Epoch:
    order: NDArray[np.int64]
    start: NDArray[np.int64]  # first token of each document in the stream


class PackedText:
    """The endless row of training sequences of one site."""

    def __init__(
        self, corpus: Corpus, *, sequence_length: int, seed: int, encoder: Encoder = BYTES
    ) -> None:
        self._corpus = corpus
        self._length = sequence_length
        self._seed = seed
        self._stream = int(corpus.tokens.sum())  # tokens per epoch
        self.per_epoch = -(-(self._stream - 1) // sequence_length)  # sequences
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._reader = TextReader(corpus, encoder)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def predicted(self, position: int) -> int:
        """How many tokens sequence ``position`` predicts, without reading it."""
        at = position % self.per_epoch * self._length
        return min(self._length, self._stream - 1 - at)

    def sequence(self, position: int) -> tuple[Tokens, Tokens]:
        """Inputs and labels of one sequence.

        Args:
            position: number of the sequence in the run, from 0.

        Returns:
            int64 [sequence_length] each; ``label[i]`` is the token after ``input[i]``. Past the
            end of the epoch inputs are PAD and labels IGNORE.

        Raises:
            DataError: data.changed when a file is not what it was when it was indexed.
        """
        epoch, index = divmod(position, self.per_epoch)
        start = index * self._length
        tokens = self._tokens(self._epoch(epoch), start, start + self._length + 1)
        inputs = np.full(self._length, PAD, dtype=np.int64)
        labels = np.full(self._length, IGNORE, dtype=np.int64)
        count = tokens.size - 1
        inputs[:count] = tokens[:-1]
        labels[:count] = tokens[1:]
        return inputs, labels

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            order = self._order(number)
            sizes = self._corpus.tokens[order]
            self._epochs[number] = _Epoch(order, np.cumsum(sizes) - sizes)
            while len(self._epochs) > 2:  # a batch touches two epochs at most, at their border
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        corpus = self._corpus
        if (corpus.group < 0).all():
            return epoch_order(corpus.documents, seed=self._seed, epoch=epoch)
        return windowed_order(corpus.group, corpus.text, seed=self._seed, epoch=epoch)

    def _tokens(self, epoch: _Epoch, start: int, stop: int) -> Tokens:
        """Tokens ``start`` to ``stop`` of the stream, cut at its end."""
        stop = min(stop, self._stream)
        tokens = np.empty(stop - start, dtype=np.int64)
        row = int(np.searchsorted(epoch.start, start, side="right")) - 1
        at = start
        while at < stop:
            document = int(epoch.order[row])
            first = int(epoch.start[row])
            held = self._reader.tokens(document)
            until = min(first + held.size, stop)
            tokens[at - start : until - start] = held[at - first : until - first]
            at, row = until, row + 1
        return tokens


# -- held-out documents --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One held-out document."""

    language: str
    text: bytes  # UTF-8


def held_out(paths: Sequence[str], *, limit: int | None) -> tuple[HeldOut, ...]:
    """The documents to evaluate: the ``limit`` with the smallest SHA-256 of language and text.

    A choice by hash does not depend on the order of lines or files and is not all of one language
    where a file is sorted; the same documents are taken every round.

    Raises:
        DataError: see ``index_corpus``.
    """
    files = find_files(paths)
    smallest: list[tuple[int, int, HeldOut]] = []  # a heap whose top is the largest hash
    count = 0
    for file in files:
        for found in documents(file):
            text, language = found.text, found.language
            if not text:
                continue
            key = hashlib.sha256(language.encode() + b"\0" + text).digest()
            item = (-int.from_bytes(key, "big"), count, HeldOut(language=language, text=text))
            count += 1
            if limit is None or len(smallest) < limit:
                heappush(smallest, item)
            else:
                heappushpop(smallest, item)
    if not smallest:
        raise DataError("data.empty", f"no text in {', '.join(str(file) for file in files)}")
    return tuple(item[2] for item in sorted(smallest, key=lambda item: (-item[0], item[1])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A piece of a held-out document that fits the model."""

    language: str
    inputs: Tokens  # shape [length]
    labels: Tokens  # shape [length]; each token of the text is a label in exactly one window


def windows(
    document: HeldOut, *, sequence_length: int, encoder: Encoder = BYTES
) -> Iterator[Window]:
    """Cut a document so that every byte is predicted once; the end of the text is not scored."""
    tokens = encoder.scored(document.text)
    for start in range(0, tokens.size - 1, sequence_length):
        stop = min(start + sequence_length, tokens.size - 1)
        yield Window(
            language=document.language,
            inputs=tokens[start:stop],
            labels=tokens[start + 1 : stop + 1],
        )
