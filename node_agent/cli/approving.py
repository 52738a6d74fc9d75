"""What `minga node approve` does, apart from reading its arguments.

It works on the node's folder, without the coordinator and beside a running agent: the plan is the
one in the journal, and the approval is a file that the agent looks for before it joins. An approval
is of one plan, by its digest; another plan of the same name needs another one.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from node_agent.config import NodeFolder, load_config
from node_agent.governed import Approval, approval_missing, read_approval, write_approval
from node_agent.journal import Journal
from node_agent.site_policy import load_site_rules
from node_agent.status import iso, read_status
from protocols.errors import NotFoundError, NotPermittedError
from protocols.identifiers import RunId, parse_run_id
from protocols.plan import Plan


def _plan(node: NodeFolder, run: RunId) -> Plan:
    journal = Journal(node.journal, now=lambda: datetime.now(UTC), read_only=True)
    try:
        record = journal.run(run)
    finally:
        journal.close()
    if record is None:
        raise NotFoundError(f"this node has read no plan of run {run} yet")
    return record.plan


def waiting(folder: Path) -> list[dict[str, Any]]:
    """Runs that the agent shows, and whether a person has still to approve them.

    Raises:
        ConfigurationError: the folder or its policy cannot be used.
    """
    node = NodeFolder(folder)
    load_config(node)
    site = load_site_rules(node)
    status = read_status(node.status) or {}
    found = []
    for shown in status.get("runs", ()):
        run = parse_run_id(shown["run"])
        if shown.get("status") != "active":
            continue
        try:
            plan = _plan(node, run)
        except NotFoundError:
            continue
        missing = approval_missing(plan, site, read_approval(node, run))
        state = "waits for an approval" if missing is not None else "needs none, or has it"
        found.append({"run": run, "plan": plan.digest, "state": state, "waits": bool(missing)})
    return found


def approve_run(folder: Path, run: str, *, by: str) -> dict[str, Any]:
    """Keep a person's approval of a run's plan.

    Raises:
        NotFoundError: the node knows no such plan.
        NotPermittedError: the site's policy names who may approve, and this is nobody of them.
        ConfigurationError: the folder or its policy cannot be used.
    """
    node = NodeFolder(folder)
    load_config(node)
    site = load_site_rules(node)
    plan = _plan(node, parse_run_id(run))
    who = by or getpass.getuser()
    approvers = site.policy.approvers
    if approvers and who not in approvers:
        raise NotPermittedError(
            f"{who} may not approve here; policy.toml names {', '.join(approvers)}"
        )
    approval = Approval(run=plan.run, plan=plan.digest, by=who, at=iso(datetime.now(UTC)))
    path = write_approval(node, approval)
    return {"run": plan.run, "plan": plan.digest, "by": who, "at": approval.at, "file": str(path)}


def plan_lines(folder: Path, run: str) -> Iterator[str]:
    """What a person should know of a plan before saying yes.

    Raises:
        NotFoundError: the node knows no such plan.
    """
    node = NodeFolder(folder)
    load_config(node)
    plan = _plan(node, parse_run_id(run))
    printable = "".join(c if c.isprintable() else "?" for c in plan.title)  # from elsewhere
    title = f", {printable}" if printable else ""
    yield f"run {plan.run}{title}: plan {plan.digest}"
    yield f"{plan.rounds} rounds in mode {plan.mode} with {', '.join(plan.roster)}"
    step = plan.local_step
    app = f" ({step.app})" if step.app else ""
    yield f"a local step is {step.kind}{app}, at most {step.max_steps or 'unlimited'} steps"
    terms = plan.terms
    if terms is None:
        yield "the plan names no policy, code, base model, data contract or limits"
        return
    yield f"policy {terms.policy.version} ({terms.policy.sha256[:12]}…)"
    yield f"code {terms.code.image[:12]}…, base model {terms.base.id} ({terms.base.digest[:12]}…)"
    data, limits = terms.data, terms.limits
    yield (
        f"data of class {', '.join(data.classes)}, licence {', '.join(data.licences)}, for"
        f" {data.use}; personal data: {data.personal}"
    )
    yield (
        f"at most {limits.gpu_minutes_node} GPU minutes, {limits.energy_wh_node} Wh and"
        f" {limits.bandwidth_bytes_node} bytes a round here"
    )
