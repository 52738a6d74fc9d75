"""A site's text: JSONL files in, fixed-length sequences of tokens out. No torch.

Each line is one JSON object with the string ``text``; ``lang`` names its language for evaluation;
other keys are ignored, blank lines hold no document. A line that cannot be read fails the job and
is named by file and line: leaving it out silently would train on other data than the site agreed
to.

A document becomes tokens as its encoder says (tokens.py): ``BOS bytes EOS``, or what a base model's
tokenizer makes of it between a first and a last token. An epoch is all documents in an order
drawn from (seed, epoch), laid end to end and cut every ``sequence_length`` tokens, so each token
of the stream but the first is predicted exactly once per epoch. Sequence number p of the run is
sequence ``p % n`` of epoch ``p // n``: one integer is the exact position, and any rank can
compute any sequence without reading what comes before. Memory is a few numbers per document; the
text stays on disk.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappush, heappushpop
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from node_agent.resident import JobFailedError
from node_agent.worker.tokens import BYTES, PAD, Encoder, Tokens

IGNORE: Final = -100  # label of a position that is not predicted

_CACHE_BYTES: Final = 32 * 2**20  # of documents as tokens: one long document spans many sequences
_OPEN_FILES: Final = 64
_UNKNOWN: Final = "und"  # ISO 639: undetermined
_MAX_LANGUAGE: Final = 64  # characters


class DataError(JobFailedError):
    """The site's data cannot be used: ``data.missing``, ``.empty``, ``.malformed``, ``.changed``"""


# -- finding and reading -------------------------------------------------------------------------


def find_files(paths: Sequence[str]) -> tuple[Path, ...]:
    """The files that paths, folders (``*.jsonl`` below them) and globs name; sorted, each once.

    Raises:
        DataError: data.missing for a path or glob with nothing there, data.empty for a folder
            without ``*.jsonl``, or when no path is given at all.
    """
    if not paths:
        raise DataError("data.empty", "no data is configured")
    found: dict[Path, Path] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*.jsonl") if file.is_file())
            if not files:
                raise DataError("data.empty", f"the folder {path} holds no *.jsonl file")
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(text, recursive=True))  # noqa: PTH207
            files = [file for file in files if file.is_file()]
            if not files:
                raise DataError("data.missing", f"there is no data at {text}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return tuple(found[key] for key in sorted(found))


def _record(line: bytes, where: str) -> tuple[bytes, str]:
    """Text (UTF-8) and language of one line; the sentence never quotes the text itself."""
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"is not JSON ({error.msg} at column {error.colno})"
    except UnicodeDecodeError:
        reason = "is not UTF-8"
    except RecursionError:
        reason = "is nested too deeply"
    else:
        if not isinstance(value, dict):
            reason = "is not a JSON object"
        elif not isinstance(value.get("text"), str):
            reason = 'has no string "text"'
        elif not _is_language(value.get("lang", _UNKNOWN)):
            reason = f'has a "lang" that is not a string of 1 to {_MAX_LANGUAGE} characters'
        else:
            try:
                return value["text"].encode(), value.get("lang", _UNKNOWN)
            except UnicodeEncodeError:
                reason = 'holds half of a surrogate pair in its "text"'
    raise DataError("data.malformed", f"{where}: the line {reason}")


def _is_language(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= _MAX_LANGUAGE


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line number, byte offset and bytes of each line that is not blank."""
    offset = 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise DataError("data.missing", f"cannot read {file}: {error.strerror}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Where each document is: arrays of shape [documents]."""

    files: tuple[str, ...]
    file: NDArray[np.int32]  # index into files
    offset: NDArray[np.int64]  # of the line, in bytes
    length: NDArray[np.int64]  # of the line, in bytes
    text: NDArray[np.int64]  # UTF-8 bytes of the text
    tokens: NDArray[np.int64]  # of the document, first and last ones included
    fingerprint: str  # of the texts in order, hexadecimal

    @property
    def documents(self) -> int:
        return int(self.text.size)


def index_corpus(paths: Sequence[str], encoder: Encoder = BYTES) -> Corpus:
    """Read and check every line once; remember where the documents are and how long.

    Args:
        paths: see ``find_files``.
        encoder: how documents become tokens.

    Raises:
        DataError: see ``find_files``; data.malformed names the first bad line; data.empty when
            no line holds any text.
    """
    files = find_files(paths)
    rows = array("q")  # five numbers per document: tuples would take ten times the memory
    digest = hashlib.sha256()
    if encoder.name != BYTES.name:
        digest.update(encoder.name.encode())
    for index, file in enumerate(files):
        for number, offset, line in _lines(file):
            text, _ = _record(line, f"{file}:{number}")
            length = len(text) + 2 if encoder is BYTES else encoder.encode(text).size
            rows.extend((index, offset, len(line), len(text), length))
            digest.update(len(text).to_bytes(8, "little") + text)
    table = np.frombuffer(rows, dtype=np.int64).reshape(-1, 5)
    if int(table[:, 3].sum()) == 0:
        raise DataError("data.empty", f"no text in {', '.join(str(file) for file in files)}")
    return Corpus(
        files=tuple(str(file) for file in files),
        file=table[:, 0].astype(np.int32),
        offset=table[:, 1].copy(),
        length=table[:, 2].copy(),
        text=table[:, 3].copy(),
        tokens=table[:, 4].copy(),
        fingerprint=digest.hexdigest(),
    )


class TextReader:
    """Reads documents of a corpus as tokens; keeps the latest ones and a few open files."""

    def __init__(self, corpus: Corpus, encoder: Encoder) -> None:
        self._corpus = corpus
        self._encoder = encoder
        self._held: OrderedDict[int, NDArray[np.int32]] = OrderedDict()
        self._bytes = 0  # of what is held
        self._open: OrderedDict[int, int] = OrderedDict()  # file index -> descriptor

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def tokens(self, document: int) -> Tokens:
        """One document, from its first token to its last.

        Raises:
            DataError: data.changed when a file is not what it was when it was indexed.
        """
        if document in self._held:
            self._held.move_to_end(document)
            return self._held[document].astype(np.int64)
        corpus = self._corpus
        file = int(corpus.file[document])
        tokens = None
        try:
            line = os.pread(
                self._descriptor(file),
                int(corpus.length[document]),
                int(corpus.offset[document]),
            )
            text, _ = _record(line, corpus.files[file])
        except (OSError, DataError):
            text = None
        if text is not None and len(text) == int(corpus.text[document]):
            tokens = self._encoder.encode(text)
        if tokens is None or tokens.size != int(corpus.tokens[document]):
            raise DataError("data.changed", f"{corpus.files[file]} changed while it was in use")
        self._held[document] = tokens.astype(np.int32)
        self._bytes += 4 * tokens.size
        while self._bytes > _CACHE_BYTES and len(self._held) > 1:
            self._bytes -= 4 * self._held.popitem(last=False)[1].size
        return tokens

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            self._open[file] = os.open(self._corpus.files[file], os.O_RDONLY)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return self._open[file]


# -- training sequences --------------------------------------------------------------------------


def epoch_order(documents: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of documents in one epoch: int64 [documents], a permutation.

    Sorts by raw PCG64 output, which numpy keeps stable between versions (NEP 19) unlike
    ``Generator.permutation``; a stored position thus means the same after an upgrade.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(documents), kind="stable")


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
            order = epoch_order(self._corpus.documents, seed=self._seed, epoch=number)
            sizes = self._corpus.tokens[order]
            self._epochs[number] = _Epoch(order, np.cumsum(sizes) - sizes)
            while len(self._epochs) > 2:  # a batch touches two epochs at most, at their border
                self._epochs.popitem(last=False)
        return self._epochs[number]

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
        for number, _, line in _lines(file):
            text, language = _record(line, f"{file}:{number}")
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
