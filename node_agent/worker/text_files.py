"""Documents in files: lines of JSONL and rows of Parquet, read in order and read again. No torch.

A JSONL line is one JSON object with the string ``text``; ``lang`` names its language for
evaluation; other keys are ignored, blank lines hold no document. A Parquet file has a column of
strings ``text`` and may have one ``lang``; other columns are not read. What cannot be read fails
the job and is named by file and line or row: leaving it out silently would train on other data
than the site agreed to.

Text stays on disk. A line is read again by its offset. A row is read again with its whole row
group, the smallest piece that Parquet can unpack, so row groups are held for a while and may not
be larger than ``MAX_GROUP`` bytes of text.
"""

from __future__ import annotations

import glob
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from node_agent.resident import JobFailedError

JSONL: Final = ".jsonl"
PARQUET: Final = ".parquet"
MAX_GROUP: Final = 2**30  # bytes of text in a row group
_HELD_GROUPS: Final = 2**29  # bytes of row groups that stay unpacked
_ROWS: Final = 1024  # of Parquet read at once
_OPEN_FILES: Final = 64
_UNKNOWN: Final = "und"  # ISO 639: undetermined
_MAX_LANGUAGE: Final = 64  # characters


class DataError(JobFailedError):
    """The site's data cannot be used: ``data.missing``, ``.empty``, ``.malformed``, ``.changed``"""


def find_files(paths: Sequence[str]) -> tuple[Path, ...]:
    """The files that paths, folders and globs name; sorted, each once.

    Of a folder: everything below it that ends in ``.jsonl`` or ``.parquet``.

    Raises:
        DataError: data.missing for a path or glob with nothing there, data.empty for a folder
            without such a file, or when no path is given at all.
    """
    if not paths:
        raise DataError("data.empty", "no data is configured")
    found: dict[Path, Path] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            files = sorted(
                file
                for file in path.rglob("*")
                if file.suffix in (JSONL, PARQUET) and file.is_file()
            )
            if not files:
                raise DataError(
                    "data.empty", f"the folder {path} holds no *.jsonl and no *.parquet file"
                )
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


@dataclass(frozen=True, slots=True)
class Document:
    """One document as it was found."""

    at: int  # byte offset of its line, or its row in its row group
    size: int  # bytes of its line; 0 of a row
    group: int  # row group; -1 of a line
    text: bytes  # UTF-8
    language: str


def documents(file: Path) -> Iterator[Document]:
    """All documents of a file, in order; a piece of it is in memory at a time.

    Raises:
        DataError: data.missing, or data.malformed naming the line or row; the sentence never
            quotes the text itself.
    """
    if file.suffix == PARQUET:
        yield from _rows(file)
        return
    for number, offset, line in _lines(file):
        text, language = _parse(line, f"{file}:{number}")
        yield Document(offset, len(line), -1, text, language)


# -- JSONL ---------------------------------------------------------------------------------------


def _parse(line: bytes, where: str) -> tuple[bytes, str]:
    """Text (UTF-8) and language of one line."""
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


# -- Parquet -------------------------------------------------------------------------------------


def _open_parquet(file: Path) -> tuple[Any, list[str]]:
    """The file and the columns to read.

    Raises:
        DataError: data.missing; data.malformed: no Parquet, or without a column of strings
            ``text``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb"):  # what the operating system refuses is told apart from a bad file
            pass
    except OSError as error:
        raise DataError("data.missing", f"cannot read {file}: {error.strerror}") from None
    try:
        opened = pq.ParquetFile(file)
        schema = opened.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            "data.malformed", f"{file} is not a Parquet file: {_short(error)}"
        ) from None
    for column in ("text", "lang"):
        count = schema.names.count(column)
        if count == 0 and column == "lang":
            continue
        kind = schema.field(column).type if count == 1 else None
        if kind is not None and pa.types.is_dictionary(kind):
            kind = kind.value_type
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            opened.close()
            raise DataError("data.malformed", f'{file} has no column of strings "{column}"')
    return opened, [name for name in ("text", "lang") if name in schema.names]


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _rows(file: Path) -> Iterator[Document]:
    import pyarrow as pa

    opened, columns = _open_parquet(file)
    row = 0  # in the file
    try:
        for group in range(opened.num_row_groups):
            at = size = 0
            batches = opened.iter_batches(
                batch_size=_ROWS, row_groups=[group], columns=columns, use_threads=False
            )
            for batch in batches:
                texts = _raw(batch.column("text"))
                names = _raw(batch.column("lang")) if "lang" in columns else [None] * len(texts)
                for text, name in zip(texts, names, strict=True):
                    row += 1
                    language = _check_row(text, name, f"{file}: row {row}")
                    yield Document(at, 0, group, text, language)
                    at, size = at + 1, size + len(text)
            if size > MAX_GROUP:
                raise DataError(
                    "data.malformed",
                    f"{file}: row group {group} holds {size / 2**30:.1f} GiB of text; write the"
                    " file with smaller row groups (row_group_size of pyarrow and pandas)",
                )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError("data.malformed", f"{file}: after row {row}: {_short(error)}") from None
    finally:
        opened.close()


def _raw(column: Any) -> list[Any]:
    """The strings of a column as bytes, None where there is none."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
    values: list[Any] = column.cast(kind).to_pylist()
    return values


def _check_row(text: Any, name: Any, where: str) -> str:
    """The row's language."""
    if text is None:
        raise DataError("data.malformed", f'{where} has no "text"')
    try:
        text.decode()
        language = _UNKNOWN if name is None else name.decode()
    except UnicodeDecodeError:
        raise DataError("data.malformed", f"{where} is not UTF-8") from None
    if not _is_language(language):
        raise DataError(
            "data.malformed",
            f'{where} has a "lang" that is not a string of 1 to {_MAX_LANGUAGE} characters',
        )
    return language


# -- reading again -------------------------------------------------------------------------------


class Reread:
    """Reads documents again by where they are; keeps a few files open and row groups unpacked."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._open: OrderedDict[int, int] = OrderedDict()  # file index -> descriptor
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()  # -> Arrow array
        self._bytes = 0  # of the row groups

    def close(self) -> None:
        """Close the files and let the row groups go."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._groups.clear()
        self._bytes = 0

    def text(self, file: int, *, at: int, size: int, group: int) -> bytes | None:
        """The text of a document; None if it is not there any more."""
        try:
            if group < 0:
                return _parse(os.pread(self._descriptor(file), size, at), self._files[file])[0]
            column = self._group(file, group)
            if at >= len(column):
                return None
            value = column[at].as_buffer()
            return None if value is None else value.to_pybytes()
        except (OSError, DataError):
            return None

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            self._open[file] = os.open(self._files[file], os.O_RDONLY)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return self._open[file]

    def _group(self, file: int, group: int) -> Any:
        import pyarrow as pa

        key = (file, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        opened, _ = _open_parquet(Path(self._files[file]))
        try:
            if group >= opened.num_row_groups:
                raise DataError("data.changed", f"{self._files[file]} changed")
            table = opened.read_row_group(group, columns=["text"], use_threads=False)
            column = table.column("text").combine_chunks()
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = column.cast(pa.large_binary())
        except (pa.ArrowException, ValueError) as error:
            raise DataError("data.changed", _short(error)) from None
        finally:
            opened.close()
        self._groups[key] = column
        self._bytes += column.nbytes
        while self._bytes > _HELD_GROUPS and len(self._groups) > 1:
            self._bytes -= self._groups.popitem(last=False)[1].nbytes
        return column
