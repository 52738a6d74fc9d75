"""The texts of a benchmark: a part of what a folder of sites holds, the same at every call.

A folder of sites has one folder each with ``train.jsonl`` (and ``valid.jsonl``; without it a tenth
of the texts is held out, by hash). From each site as many bytes are taken, chosen by hash, so that
equal steps and equal weights mean the same thing in all rows that are compared. What is reported
and what rates were chosen by are different held-out texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from node_agent.spool import DataPaths

UNION = "all-sites"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One line."""

    text: str
    lang: str

    @property
    def key(self) -> bytes:
        """What chooses: it depends on nothing but the text."""
        return hashlib.sha256(f"{self.lang}\0{self.text}".encode()).digest()

    @property
    def size(self) -> int:
        """UTF-8 bytes."""
        return len(self.text.encode())


def read(path: Path) -> list[Document]:
    """The documents of a JSONL file, in order of their hash, each once."""
    found: dict[bytes, Document] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            value = json.loads(line)
            made = Document(text=value["text"], lang=value.get("lang", "und"))
            if made.text:
                found.setdefault(made.key, made)
    return [found[key] for key in sorted(found)]


def cut(documents: Iterable[Document], limit: int) -> list[Document]:
    """The first documents, up to ``limit`` bytes of text together; at least one."""
    chosen: list[Document] = []
    size = 0
    for document in documents:
        if chosen and size + document.size > limit:
            continue
        chosen.append(document)
        size += document.size
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTexts:
    """What one site trains on and is scored on."""

    name: str
    train: Sequence[Document]
    tuning: Sequence[Document]
    report: Sequence[Document]


def find_sites(root: Path) -> list[str]:
    """Names of the sites in a folder."""
    return sorted(path.parent.name for path in root.glob("*/train.jsonl"))


def read_site(root: Path, name: str, *, train: int, valid: int) -> SiteTexts:
    """A site's share: ``train`` bytes to train on, ``valid`` bytes for each of the two scores."""
    texts = read(root / name / "train.jsonl")
    held = root / name / "valid.jsonl"
    scored = read(held) if held.is_file() else texts[: max(2, len(texts) // 10)]
    known = {document.key for document in scored}
    texts = [document for document in texts if document.key not in known]
    return SiteTexts(
        name=name,
        train=cut(texts, train),
        tuning=cut(scored[0::2], valid),
        report=cut(scored[1::2], valid),
    )


def write(path: Path, documents: Sequence[Document]) -> str:
    """A JSONL file that a worker reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": d.text, "lang": d.lang}, ensure_ascii=False) for d in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def lay_out(root: Path, sites: Sequence[SiteTexts], *, tuning: bool) -> dict[str, DataPaths]:
    """Write the files of all sites, and of one that holds everything.

    Returns:
        The paths by site; ``UNION`` names all of them together.
    """
    made: dict[str, DataPaths] = {}
    for site in sites:
        held = site.tuning if tuning else site.report
        made[site.name] = DataPaths(
            train=(write(root / site.name / "train.jsonl", site.train),),
            valid=(write(root / site.name / "valid.jsonl", held),),
        )
    made[UNION] = DataPaths(
        train=tuple(path for name in made for path in made[name].train),
        valid=tuple(path for name in made for path in made[name].valid),
    )
    return made


def share_out(sites: Sequence[SiteTexts]) -> tuple[list[SiteTexts], SiteTexts]:
    """Take a third of every site's texts as the public part, where no other folder is."""
    kept, public = [], []
    for site in sites:
        public += site.train[0::3]
        rest = [d for number, d in enumerate(site.train) if number % 3]
        kept.append(SiteTexts(name=site.name, train=rest, tuning=site.tuning, report=site.report))
    first = sites[0]
    return kept, SiteTexts(name="public", train=public, tuning=first.tuning, report=first.report)
