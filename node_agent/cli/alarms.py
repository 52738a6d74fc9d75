"""What `minga node alarm` does: shows what the log was caught at, and records a person's finding.

Clearing needs a code and a name. It goes into the round log as an ``incident`` of this node, with
the digest of the evidence: nobody can clear an alarm quietly. The evidence itself stays here.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from node_agent.config import NodeFolder, load_config
from node_agent.keys import KeyStore
from node_agent.log import LogPaths, incident_leaf, now_unix
from node_agent.log_store import LogStore
from node_agent.log_verifier import LogVerifier, read_policy
from node_agent.status import iso
from protocols.canonical import sha256_hex
from protocols.errors import ConfigurationError, MalformedMessageError, NotFoundError
from protocols.identifiers import parse_node_id
from protocols.tlog.note import VerifierKey

_CODE = re.compile(r"[a-z][a-z0-9.-]{0,63}")


def _store(folder: Path) -> tuple[LogPaths, LogStore]:
    load_config(NodeFolder(folder))
    paths = LogPaths(folder)
    if not paths.store.exists():
        raise NotFoundError(f"{folder} keeps no round log")
    return paths, LogStore(paths.store)


def alarm_facts(folder: Path) -> list[dict[str, Any]]:
    """Every alarm of a node, the first one first.

    Raises:
        NotFoundError, ConfigurationError: no node, or no log.
    """
    _, store = _store(folder)
    try:
        return [
            {
                "id": alarm.id,
                "at": iso(datetime.fromtimestamp(alarm.at, UTC)),
                "rule": alarm.rule,
                "why": alarm.why,
                "evidence_sha256": sha256_hex(alarm.evidence),
                "cleared_at": (
                    iso(datetime.fromtimestamp(alarm.cleared_at, UTC))
                    if alarm.cleared_at is not None
                    else None
                ),
                "code": alarm.code,
                "by": alarm.by,
            }
            for alarm in store.alarms()
        ]
    finally:
        store.close()


def clear_alarms(folder: Path, *, code: str, by: str) -> list[dict[str, Any]]:
    """Record what was found out about every open alarm; the node goes on from here.

    The leaf is signed before the alarm is cleared, and handed over with the next thing that the
    node says: a crash in between leaves the alarm standing.

    Args:
        folder: the node's.
        code: the outcome, e.g. ``restored-backup``; no prose, it becomes public.
        by: a handle, never a person's name.

    Raises:
        NotFoundError: no alarm is open.
        MalformedMessageError: no code, or no handle.
    """
    if not _CODE.fullmatch(code):
        raise MalformedMessageError(
            "--clear takes a code of small letters, digits, dots and dashes"
        )
    who = parse_node_id(by)
    node = NodeFolder(folder)
    config = load_config(node)
    paths, store = _store(folder)
    try:
        opened = [alarm for alarm in store.alarms() if alarm.cleared_at is None]
        if not opened:
            raise NotFoundError("no alarm is open")
        try:
            vkey = VerifierKey.parse(paths.vkey.read_text("utf-8").strip())
        except OSError as error:
            raise ConfigurationError(f"{paths.vkey}: {error.strerror}") from None
        pinned = read_policy(paths.policy)
        seen = LogVerifier(store, vkey, now=now_unix, pinned=pinned).seen
        for alarm in opened:
            incident_leaf(
                store,
                key=KeyStore(node.keys).signing_key(),
                node=config.institution,
                alarm=alarm.id,
                code=code,
                evidence=sha256_hex(alarm.evidence),
                seen=seen,
            )
        store.clear_alarms([alarm.id for alarm in opened], code=code, by=who, at=now_unix())
    finally:
        store.close()
    return alarm_facts(folder)
