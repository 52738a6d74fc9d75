"""What `minga node status`, `journal` and `doctor` print. Text from elsewhere is never markup."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from node_agent.config import NodeFolder, load_config
from node_agent.doctor import Finding
from node_agent.journal import Journal
from node_agent.lock import lock_holder
from node_agent.spent import privacy_facts, privacy_lines
from node_agent.status import iso, read_status
from node_agent.trust_facts import governance_line, log_line
from protocols.errors import NotFoundError
from protocols.identifiers import parse_run_id

_LAST = 5  # journal lines under the status


def _line(*parts: str | tuple[str, str]) -> None:
    Console(highlight=False).print(Text.assemble(*parts), soft_wrap=True)


def _entries(node: NodeFolder, *, run: str | None, last: int | None) -> list[dict[str, Any]]:
    try:
        journal = Journal(node.journal, now=lambda: datetime.now(UTC), read_only=True)
    except NotFoundError:
        return []
    try:
        found = journal.entries(run=parse_run_id(run) if run else None, last=last)
    finally:
        journal.close()
    return [
        {
            "id": entry.id,
            "at": iso(entry.at),
            "run": entry.run,
            "round": entry.number,
            "what": entry.what,
            **entry.detail,
        }
        for entry in found
    ]


def node_facts(folder: Path) -> dict[str, Any]:
    """What is known of a node without asking anybody."""
    node = NodeFolder(folder)
    config = load_config(node)
    holder = lock_holder(node)
    return {
        "institution": config.institution,
        "federation": config.federation,
        "coordinator": config.coordinator,
        "agent_pid": holder,
        "paused": node.paused.exists(),
        "agent": read_status(node.status),
        "governance": governance_line(node, config, datetime.now(UTC))[1],
        "log": log_line(node, config)[1],
        "privacy": privacy_facts(node, config, datetime.now(UTC)),
        "journal": _entries(node, run=None, last=_LAST),
    }


def print_status(facts: dict[str, Any]) -> None:
    """For people."""
    agent, pid = facts["agent"], facts["agent_pid"]
    life = f"agent running (process {pid})" if pid is not None else "no agent is running"
    paused = ", paused" if facts["paused"] else ""
    _line((facts["institution"], "bold"), f" of {facts['federation']}: {life}{paused}")
    if agent is not None and pid is None:
        _line(f"what follows is what the last one said, at {agent['at']}")
    elif agent is not None:
        link = "connected to" if agent["connected"] else "not connected to"
        _line(f"{link} {facts['coordinator']}, as of {agent['at']}")
        if agent["trouble"]:
            _line(f"  {agent['trouble']}")
        for kind, state in sorted(agent["workers"].items()):
            if state != "asleep":
                _line(f"worker ({kind}): {state}")
    if agent is not None:
        if agent.get("capability"):
            _line(f"can train {agent['capability']}")
        _line(f"certificate until {agent['certificate_until']}")
        for run in agent["runs"]:
            at = f"{run['round']} {run['phase']}" if run["round"] else run["status"]
            _line((run["run"], "bold"), f" {at}: {run['why'] or run['status']}")
            if run.get("privacy"):
                _line(f"  {run['privacy']}")
            if run.get("declined"):
                _line(f"  declined: {run['declined']}")
            if run["stopped"]:
                _line(f"  takes no further part: {run['stopped']}")
    _line(f"governance: {facts['governance']}")
    _line(f"round log: {facts['log']}")
    for text in privacy_lines(facts["privacy"]):
        _line(text)
    if facts["journal"]:
        _line("last entries of the journal:")
        print_journal(facts["journal"])


def journal_facts(folder: Path, *, run: str | None, last: int | None) -> list[dict[str, Any]]:
    """Lines of the journal, oldest first.

    Raises:
        ConfigurationError: this is no node's folder.
    """
    node = NodeFolder(folder)
    load_config(node)
    return _entries(node, run=run, last=last)


def print_journal(facts: Sequence[dict[str, Any]]) -> None:
    """One line for each entry."""
    for entry in facts:
        number = "" if entry["round"] is None else f"/{entry['round']}"
        where = f"{entry['run']}{number}" if entry["run"] else "-"
        rest = {k: v for k, v in entry.items() if k not in ("id", "at", "run", "round", "what")}
        detail = "  ".join(f"{key}={_brief(value)}" for key, value in rest.items())
        _line(f"{entry['at']}  {where:<20} ", (entry["what"], "bold"), f"  {detail}")


def _brief(value: object) -> str:
    text = str(value)
    digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return f"{text[:12]}…" if digest else text


def print_findings(findings: Sequence[Finding]) -> None:
    """One line for each finding, with its mend."""
    for finding in findings:
        mark = {"ok": "ok  ", "warning": "warn", "refused": "BAD ", "not_ready": "BAD "}
        _line(f"{mark[finding.level]}  ", (finding.what, "bold"), f": {finding.sentence}")
        if finding.mend:
            _line(f"      mend: {finding.mend}")
