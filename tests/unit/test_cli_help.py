"""The help text of every command is pinned: what a person reads does not change by accident.

One file for each command in tests/unit/help. After a change that is meant, write them anew:

    python -m tests.unit.test_cli_help --write
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from infra.cli import GROUPS, load_group, root_command

PINNED = Path(__file__).parent / "help"
WIDTH = 80  # columns


def commands() -> Iterator[tuple[str, ...]]:
    """Names of all commands and groups, the root first."""
    yield ("minga",)
    for name in GROUPS:
        yield from _below(load_group(name), ("minga", name))


def _below(command: click.Command, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield names
    if isinstance(command, click.Group):
        for child in command.commands:
            yield from _below(command.commands[child], (*names, child))


def help_of(names: tuple[str, ...]) -> str:
    """What ``--help`` prints for a command."""
    command = root_command()
    context = click.Context(command, info_name=names[0], terminal_width=WIDTH)
    for depth, name in enumerate(names[1:]):
        command = load_group(name) if depth == 0 else command.commands[name]
        context = click.Context(command, info_name=name, parent=context, terminal_width=WIDTH)
    lines = command.get_help(context).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def file_of(names: tuple[str, ...]) -> Path:
    """Where a command's help is pinned."""
    return PINNED / f"{'-'.join(names)}.txt"


def test_every_help_text_is_pinned():
    found = {file_of(names).name: help_of(names) for names in commands()}
    pinned = {path.name: path.read_text("utf-8") for path in PINNED.glob("*.txt")}

    assert found == pinned, "if it is meant: python -m tests.unit.test_cli_help --write"


def test_every_command_says_what_it_does():
    for names in commands():
        lines = help_of(names).splitlines()
        assert lines[0].startswith(f"Usage: {' '.join(names)}")
        assert len(lines) > 2, names
        assert lines[2].strip(), names
        assert lines[2].strip().endswith((".", ":")) or lines[3].strip(), names


def test_commands_that_print_facts_have_json():
    """What a person reads in a table, a script reads as JSON."""
    facts = [("run", name) for name in ("submit", "list", "show", "watch", "why", "stop")] + [
        ("node", name) for name in ("join", "status", "doctor", "journal", "approve")
    ]
    for group, name in facts:
        assert "--json" in help_of(("minga", group, name)), (group, name)


def write() -> None:
    """Pin all texts as they are now."""
    PINNED.mkdir(exist_ok=True)
    for path in PINNED.glob("*.txt"):
        path.unlink()
    for names in commands():
        file_of(names).write_text(help_of(names), "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.unit.test_cli_help --write")
    write()
