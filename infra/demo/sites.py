"""The sites of a demonstration and their text: who takes part, with which files.

A data folder holds one folder for each site, ``<site>/train.jsonl`` and ``<site>/valid.jsonl``:
one JSON object a line with the text under ``text`` and its language under ``lang``. What the site's
node gets is a copy in its own folder with exactly these two fields; lines without a text, which
other tools put there, are left out and counted. Nothing else ever reads the copies but the worker
of that site.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocols.errors import ConfigurationError, MalformedMessageError
from protocols.identifiers import NodeId, parse_node_id

UNDETERMINED: Final = "und"  # ISO 639: the language is not known
_LANGUAGE = re.compile(r"[a-z]{2,8}(-[a-z0-9]{1,8})*", re.ASCII)  # as in a plan
_FILES: Final = ("train.jsonl", "valid.jsonl")
CORPUS: Final = Path(__file__).parent / "corpus"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteData:
    """What one site brings."""

    site: NodeId
    folder: Path  # holds train.jsonl and valid.jsonl


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteText:
    """What was copied for one site."""

    site: NodeId
    documents: int  # in train.jsonl
    text_bytes: int  # UTF-8, in train.jsonl
    languages: frozenset[str]  # of the held-out documents
    left_out: int  # lines without a text, in both files


def find_sites(data: Path) -> tuple[SiteData, ...]:
    """All sites of a data folder, ascending.

    Raises:
        ConfigurationError: the folder is missing or holds no site.
    """
    if not data.is_dir():
        raise ConfigurationError(f"{data} is no folder; --data takes a folder of SITE/train.jsonl")
    found = []
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        if not any((folder / name).exists() for name in _FILES):
            continue
        for name in _FILES:
            if not (folder / name).is_file():
                raise ConfigurationError(f"{folder / name} is missing: a site has both files")
        try:
            found.append(SiteData(site=parse_node_id(folder.name), folder=folder))
        except MalformedMessageError as error:
            raise ConfigurationError(f"{folder}: {error}") from None
    if not found:
        raise ConfigurationError(f"{data} holds no SITE/train.jsonl and SITE/valid.jsonl")
    return tuple(found)


def choose_sites(found: Sequence[SiteData], wanted: str | None, *, most: int) -> list[SiteData]:
    """The sites that take part.

    Args:
        found: all sites of the data folder, ascending.
        wanted: a number (the first so many), names with commas between, or None for the default.
        most: the default number, where the folder holds more.

    Raises:
        ConfigurationError: a site is not there, or named twice; or the number is out of range.
    """
    if wanted is None:
        return list(found[:most])
    if wanted.isascii() and wanted.isdigit():
        if not 1 <= int(wanted) <= len(found):
            raise ConfigurationError(f"--sites {wanted}: the data folder holds {len(found)} sites")
        return list(found[: int(wanted)])
    by_name = {str(item.site): item for item in found}
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in by_name:
            raise ConfigurationError(f"--sites: there is no site {name!r}; {', '.join(by_name)}")
    if len(set(names)) != len(names):
        raise ConfigurationError("--sites names a site twice")
    return [by_name[name] for name in sorted(names)]


def language_of(value: object) -> str:
    """A language tag that a plan may name; what is none is undetermined."""
    tag = value.lower().replace("_", "-") if isinstance(value, str) else ""
    return tag if _LANGUAGE.fullmatch(tag) else UNDETERMINED


def _documents(path: Path) -> Iterator[tuple[str, str] | None]:
    """Text and language of each line; None for a line without a text.

    Raises:
        MalformedMessageError: a line is not JSON; the sentence names file and line, not the text.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise MalformedMessageError(f"{path}:{number}: the line is not JSON") from None
            text = value.get("text") if isinstance(value, dict) else None
            if isinstance(text, str) and text and _is_unicode(text):
                yield text, language_of(value.get("lang"))
            else:
                yield None


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def copy_text(source: SiteData, target: Path) -> SiteText:
    """Give a site its own copy of its text.

    Raises:
        ConfigurationError: no text in one of the files.
        MalformedMessageError: a line is not JSON.
    """
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    documents, sizes, left_out = dict.fromkeys(_FILES, 0), dict.fromkeys(_FILES, 0), 0
    languages = set()
    for name in _FILES:
        temporary = target / f".{name}.tmp"
        with temporary.open("w", encoding="utf-8") as out:
            for item in _documents(source.folder / name):
                if item is None:
                    left_out += 1
                    continue
                text, language = item
                documents[name] += 1
                sizes[name] += len(text.encode())
                if name == "valid.jsonl":
                    languages.add(language)
                out.write(json.dumps({"text": text, "lang": language}, ensure_ascii=False) + "\n")
        temporary.replace(target / name)
        if documents[name] == 0:
            raise ConfigurationError(f"{source.folder / name} holds no line with a text")
    return SiteText(
        site=source.site,
        documents=documents["train.jsonl"],
        text_bytes=sizes["train.jsonl"],
        languages=frozenset(languages),
        left_out=left_out,
    )
