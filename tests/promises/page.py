"""From docs/promises.toml and the figures that runs have written to docs/promises.md.

Words and tests are written by people, figures are not: they come from bench/*.json and
docs/faults.json, and one that nobody has measured is shown as that. A test that is named and does
not exist is an error.
"""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from tests.bench import page as bench

ROOT: Final = Path(__file__).parents[2]
SOURCE: Final = ROOT / "docs" / "promises.toml"
PAGE: Final = ROOT / "docs" / "promises.md"
FAULTS: Final = ROOT / "docs" / "faults.json"
OPEN: Final = "not measured yet"
KINDS: Final = ("ratio", "memory", "rate", "row", "faults")
FIGURE: Final = "  - figure: "  # how the line of a figure begins

_HEAD = """\
# What Minga promises and how it is tested

<!-- Written by `make docs` from docs/promises.toml, bench/*.json and docs/faults.json; do not edit. -->

Each promise is followed by the tests that fail when it is broken, and by what was measured, if it is
a promise about numbers. `.venv/bin/python -m pytest TEST` runs one of them. A figure that misses its
target says so. Figures are of one small shared machine: [BENCHMARKS.md](../BENCHMARKS.md) says of
which commit each is, and how to repeat it. What no test can show (that nobody from outside has
reviewed any of it, that nothing has run on a real GPU cluster) is in the README's status.
"""  # noqa: E501 - one line of the page


def read() -> list[dict[str, Any]]:
    """The groups of promises."""
    groups: list[dict[str, Any]] = tomllib.loads(SOURCE.read_text("utf-8"))["group"]
    return groups


# -- tests ---------------------------------------------------------------------------------------


@cache
def tests_of(path: Path) -> frozenset[str]:
    """Names of the tests in a file, methods of classes as Class::test."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}::{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test_"))


def exists(test: str) -> bool:
    """Whether there is such a test, or such a file of tests."""
    file, _, name = test.partition("::")
    path = ROOT / file
    if not path.is_file() or not path.name.startswith("test_"):
        return False
    return bool(tests_of(path)) if not name else name in tests_of(path)


def all_tests(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every test that a promise names."""
    for group in groups:
        for promise in group["promise"]:
            yield from promise["tests"]


# -- figures -------------------------------------------------------------------------------------


def figure(of: Mapping[str, str]) -> list[str]:
    """What was measured, in words; empty: nobody has yet.

    Raises:
        ValueError: no such kind of figure.
    """
    ((kind, what),) = of.items()
    match kind:
        case "ratio":
            return _ratio(what)
        case "memory":
            return _memory(what)
        case "rate":
            return _rate(what)
        case "row":
            return _row(what)
        case "faults":
            return _faults()
        case _:
            raise ValueError(f"a figure is {' | '.join(KINDS)}, not {kind}")


def _reached(met: bool | None) -> str:
    return "" if met is None else ": reached" if met else ": **missed**"


def _results() -> dict[str, Any]:
    return bench.load() or {"ratios": [], "memory": [], "rates": []}


def _ratio(what: str) -> list[str]:
    work, _, other = what.partition(" / ")
    found = []
    for ratio in _results()["ratios"]:
        named = ratio["what"].startswith(work) and ratio["ours_over"].startswith(other)
        if named and ratio["measure"] != "server_peak_rss_mb":
            limit = f", {ratio['target']}{_reached(ratio['met'])}" if ratio["target"] else ""
            found.append(
                f"{ratio['what']}: {ratio['ratio']:.2f} of {ratio['ours_over']} (of the best"
                f" {ratio['ratio_of_the_best']:.2f}){limit}"
            )
    return found


def _memory(what: str) -> list[str]:
    return [
        f"{check['text']}: {check['mb']:.0f} MB, at most {check['at_most_mb']:.0f} MB"
        f"{_reached(check['met'])}"
        for check in _results()["memory"]
        if check["text"].startswith(what)
    ]


def _rate(what: str) -> list[str]:
    return [
        f"{rate['text']}: {rate['leaves_per_s']:,} leaves/s, at least {rate['at_least']:,.0f}"
        f"{_reached(rate['met'])}"
        for rate in _results()["rates"]
        if rate["text"].startswith(what)
    ]


def _row(what: str) -> list[str]:
    file, _, start = what.partition(" / ")
    path = bench.BENCH / f"{file}.json"
    if not path.exists():
        return []
    lines = json.loads(path.read_text("utf-8")).get("rows", [])
    return [_line(line) for line in lines if line["what"].startswith(start)]


def _line(line: Mapping[str, Any]) -> str:
    beside = f", beside {line['other']} of {line['beside']}" if line.get("other") else ""
    target = f", {line['target']}{_reached(line.get('met'))}" if line.get("target") else ""
    note = f" ({line['note']})" if line.get("note") else ""
    return f"{line['what']}: {line['ours']}{beside}{target}{note}"


def _faults() -> list[str]:
    if not FAULTS.exists():
        return []
    facts = json.loads(FAULTS.read_text("utf-8"))
    rows = [
        dict(zip(facts["columns"], row, strict=True))
        for case in facts["cases"].values()
        for row in case["rows"]
    ]
    same = sum(row["outcome"] == "same" for row in rows)
    times = [row["went_on_s"] for row in rows if row["went_on_s"] is not None]
    longest = f"; the longest until work went on: {max(times):.1f} s" if times else ""
    said = (
        f"[{len(rows)} faults](faults.md) in real processes; after {same} of them the run ended"
        f" with the digests of the undisturbed one{longest}"
    )
    return [said]


# -- the page ------------------------------------------------------------------------------------


def render() -> str:
    """The page.

    Raises:
        ValueError: a test that is named does not exist, or a figure is of no kind.
    """
    groups = read()
    gone = [test for test in all_tests(groups) if not exists(test)]
    if gone:
        raise ValueError(f"no such test: {gone[0]}")
    lines = [_HEAD]
    for group in groups:
        lines += [f"## {group['title']}", ""]
        for promise in group["promise"]:
            lines += [f"- **{promise['says']}** ({promise['from']})"]
            lines += [f"  - `{test}`" for test in promise["tests"]]
            for of in promise.get("figures", ()):
                lines += [f"{FIGURE}{text}" for text in figure(of) or [f"{_name(of)}: {OPEN}"]]
        lines.append("")
    return "\n".join(lines)


def _name(of: Mapping[str, str]) -> str:
    ((kind, what),) = of.items()
    return "the matrix of faults" if kind == "faults" else what.strip(" /")


def without_figures(page: str) -> str:
    """The page as far as people wrote it: figures change with every measurement."""
    return "\n".join(line for line in page.splitlines() if not line.startswith(FIGURE))
