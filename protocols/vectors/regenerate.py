"""Write the golden vectors, or check that the tree holds what the code makes.

    python -m protocols.vectors.regenerate            write every *.json beside this file
    python -m protocols.vectors.regenerate --check    exit 1 and name the files that differ

Vectors are made by modules of this package called ``make_*``. Each has ``FILES``: a dict from a
file name to a function without arguments that returns a JSON value. Values are deterministic:
no clock, no randomness, no machine. To add vectors, add a module; nothing is registered elsewhere.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def makers() -> dict[str, Callable[[], Any]]:
    """Every vector file and the function that makes its value."""
    found: dict[str, Callable[[], Any]] = {}
    for module in sorted(pkgutil.iter_modules([str(HERE)]), key=lambda module: module.name):
        if not module.name.startswith("make_"):
            continue
        files = importlib.import_module(f"protocols.vectors.{module.name}").FILES
        for name, make in files.items():
            if name in found:
                raise ValueError(f"{module.name} makes {name}, and so does another module")
            found[name] = make
    return found


def text_of(value: object) -> str:
    """The text of a vector file: one line for each member, two levels deep."""
    return json.dumps(value, indent=1, ensure_ascii=True) + "\n"


def stale(names: Sequence[str] = ()) -> list[str]:
    """Files that differ from what the code makes; of those named, or of all."""
    wrong = []
    for name, make in makers().items():
        if names and name not in names:
            continue
        path = HERE / name
        if not path.exists() or path.read_text("ascii") != text_of(make()):
            wrong.append(name)
    return wrong


def main(arguments: Sequence[str]) -> int:
    """The command line; see the module's docstring."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m protocols.vectors.regenerate [--check]\n")
        return 2
    wrong = stale()
    for name in wrong:
        if not arguments:
            (HERE / name).write_text(text_of(makers()[name]()), "ascii")
        sys.stdout.write(f"{name} {'differs' if arguments else 'written'}\n")
    return 1 if arguments and wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
