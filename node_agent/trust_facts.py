"""What people are told of governance and log at a node: in force, until when, or switched off."""

from __future__ import annotations

from datetime import datetime

from node_agent.config import NodeConfig, NodeFolder
from node_agent.log import LogPaths
from node_agent.log_store import LogStore
from node_agent.trust import read_accepted
from protocols.errors import FederationError
from protocols.governance import roles

_SHOWN = (roles.POLICY, roles.MEMBERSHIP, roles.PLANS)


def governance_line(folder: NodeFolder, config: NodeConfig, now: datetime) -> tuple[str, str]:
    """A level (ok, warning, refused, not_ready) and one sentence."""
    if config.governance.require is False:
        return "warning", (
            "UNSAFE: [governance] require = false: this node takes part in plans that no admin "
            "signed"
        )
    if not folder.trust_root.exists():
        if config.governance.require:
            return "refused", f"{folder.trust_root} is missing: join again with a new invitation"
        return "warning", "UNSAFE: the invitation named no first root: nobody governs this node"
    try:
        state = read_accepted(folder.trust, folder.trust_root.read_bytes(), now)
    except FederationError as error:
        return "refused", f"what was in force is so no more: {error}"
    if state is None:
        return "not_ready", "nothing was verified yet: `minga node run` asks the coordinator"
    known = ", ".join(
        f"{role} {state.versions[role]} until {state.expires[role]:%F}" for role in _SHOWN
    )
    terms = state.charter.terms
    alarm = "".join(f"; EMERGENCY {name} until {n.until}" for name, n in state.emergencies.items())
    return "ok", f"{terms.threshold} of {terms.admins} admins decide; {known}{alarm}"


def log_line(folder: NodeFolder, config: NodeConfig) -> tuple[str, str]:
    """A level and one sentence on the round log."""
    if config.log.require is False:
        return "warning", "UNSAFE: [log] require = false: this node acts without a public log"
    paths = LogPaths(folder.root)
    if paths.vkey.exists():
        store = LogStore(paths.store)
        try:
            found = store.alarm()
        finally:
            store.close()
        if found is not None:
            return "refused", f"ALARM, takes part in nothing: {found[1]} (`minga node alarm`)"
        return "ok", "acts only on what the witnessed log shows"
    if config.log.require:
        return "refused", "the log's key is missing: join again"
    return "warning", "UNSAFE: this federation keeps no round log"
