"""The digest of the program that trains here: what a plan names, and what a site compares with.

It covers every source file of the packages that a node runs, the rules in Cedar and their schema
included, by path and content. A changed line is another program: it has another digest, and no plan
for the old one runs on it. What is not covered: the interpreter, the libraries (their versions are
pinned by constraints.txt) and the machine.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from protocols.canonical import hash_hex
from protocols.identifiers import Digest

PACKAGES: Final = ("node_agent", "policies", "protocols")
_SUFFIXES: Final = (".py", ".cedar", ".cedarschema")


def source_files(root: Path) -> list[Path]:
    """The files that the digest covers, by path."""
    return sorted(
        path
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.suffix in _SUFFIXES and path.is_file() and "__pycache__" not in path.parts
    )


def code_digest(root: Path) -> Digest:
    """The digest of the packages under a folder.

    ``hash("minga/code/v1", path, content, path, content, …)``, paths relative and with ``/``.
    """
    fields: list[bytes] = []
    for path in source_files(root):
        fields += [path.relative_to(root).as_posix().encode(), path.read_bytes()]
    return hash_hex("minga/code/v1", *fields)


@cache
def installed_code() -> Digest:
    """The digest of the program that is running, as it was when it was asked for first."""
    return code_digest(Path(__file__).resolve().parents[1])
