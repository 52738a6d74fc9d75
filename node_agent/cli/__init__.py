"""`minga node …`: join a federation, run the agent, see what it does, find out what is wrong.

A command reads its arguments, calls the library and prints. Facts go to standard output, advice to
standard error; nothing depends on colour. Libraries are imported inside the commands, so that
`--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Run the node of one institution.")

Folder = Annotated[
    Path,
    typer.Option(
        "--dir", metavar="DIR", help="The node's folder: config.toml, keys/, journal.sqlite."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]


@app.command()
def join(
    folder: Folder,
    coordinator: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the coordinator serves nodes.")
    ],
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MINGA_TOKEN",
            help="The invitation; '-' reads it from standard input, which other users cannot see.",
        ),
    ] = None,
    enrolment: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where invitations are taken; default: the coordinator's port plus one.",
        ),
    ] = None,
    data_train: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Training text: file, folder or glob; repeatable."),
    ] = None,
    data_valid: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Held-out text: file, folder or glob; repeatable."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Worker processes, one per GPU.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each worker process.")
    ] = None,
    epsilon: Annotated[
        float,
        typer.Option(min=0.001, help="Privacy that the training texts may lose, by document."),
    ] = 8.0,
    delta: Annotated[
        float, typer.Option(min=1e-30, max=0.1, help="At this delta; both stand in config.toml.")
    ] = 1e-6,
    held_out_public: Annotated[
        bool,
        typer.Option(
            "--held-out-public", help="The held-out text is public: scores need no noise."
        ),
    ] = False,
    country: Annotated[
        str, typer.Option(metavar="CC", help="Where the texts are, ISO 3166-1; for policy.toml.")
    ] = "XX",
    time_zone: Annotated[
        str, typer.Option(metavar="ZONE", help="Of the site's hours, as America/Lima.")
    ] = "UTC",
    institution_key: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY", help="The institution's key, to approve this node's keys here and now."
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With that key's passphrase; else MINGA_ADMIN_PASSPHRASE."
        ),
    ] = None,
    approval: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The institution's approval, made elsewhere."),
    ] = None,
    request_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Only write what the institution has to approve, and stop."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Use an invitation: make keys here, get a certificate, write config.toml and policy.toml.

    If the answer is lost, repeat the very same command.
    """
    from node_agent.cli.joining import JoinRequest, join_folder
    from node_agent.institution import approver

    facts = join_folder(
        JoinRequest(
            folder=folder,
            token=_token(token),
            coordinator=coordinator,
            enrolment=enrolment,
            train=tuple(data_train or ()),
            valid=tuple(data_valid or ()),
            ranks=ranks,
            device=device,
            threads=threads,
            epsilon=epsilon,
            delta=delta,
            held_out_public=held_out_public,
            country=country,
            time_zone=time_zone,
            approval=approval,
            approve=approver(institution_key, passphrase_file) if institution_key else None,
            request_out=request_out,
        )
    )
    if as_json:
        _print_json(facts)
    else:
        typer.echo(f"{facts['institution']} joined federation {facts['federation']}")
        typer.echo(f"certificate until {facts['certificate_until']}, keys in {facts['keys']}")
        typer.echo(
            f"declare the texts in {folder}/policy.toml: until then this site says no", err=True
        )
        typer.echo(f"start the agent with `minga node run --dir {folder}`", err=True)


def _token(given: str | None) -> str:
    if given is None:
        raise typer.BadParameter("give --token, or set MINGA_TOKEN", param_hint="--token")
    if given == "-":
        return sys.stdin.readline()
    return given


@app.command()
def run(
    folder: Folder,
    verbose: Annotated[bool, typer.Option(help="Log every step.")] = False,
) -> None:
    """Run the agent until SIGTERM or Ctrl-C."""
    import asyncio
    import logging
    import os
    from random import SystemRandom

    from node_agent.agent import serve
    from node_agent.config import NodeFolder, load_config
    from node_agent.lock import FolderLock
    from node_agent.site import open_site

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    node = NodeFolder(folder)
    config = load_config(node)

    async def work() -> None:
        await serve(open_site(node, config, rng=SystemRandom()))

    with FolderLock(node, pid=os.getpid()):
        typer.echo(
            f"{config.institution} of {config.federation}: agent at work, process {os.getpid()};"
            f" `minga node status --dir {folder}` says what it does",
            err=True,
        )
        asyncio.run(work())


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Say what the node is doing and why; works without the coordinator."""
    from node_agent.cli.showing import node_facts, print_status

    facts = node_facts(folder)
    if as_json:
        _print_json(facts)
    else:
        print_status(facts)


@app.command()
def pause(folder: Folder, as_json: AsJson = False) -> None:
    """Decline new rounds; what was joined is finished."""
    _set_paused(folder, paused=True, as_json=as_json)


@app.command()
def resume(folder: Folder, as_json: AsJson = False) -> None:
    """Take part again; with Slurm, also after somebody cancelled the allocation."""
    _set_paused(folder, paused=False, as_json=as_json)


def _set_paused(folder: Path, *, paused: bool, as_json: bool) -> None:
    from node_agent.config import NodeFolder, load_config
    from node_agent.launchers.slurm_script import Marks

    node = NodeFolder(folder)
    config = load_config(node)
    if paused:
        node.paused.touch()
    else:
        node.paused.unlink(missing_ok=True)
        Marks(node.spool / "slurm").held.unlink(missing_ok=True)
    if as_json:
        _print_json({"institution": config.institution, "paused": paused})
    else:
        typer.echo(f"{config.institution} is {'paused' if paused else 'taking part'}")


@app.command()
def approve(
    folder: Folder,
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Left out: list what waits.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="NAME", help="Who approves.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Approve a plan, where the site's policy wants a person to; it is shown first."""
    from node_agent.cli.approving import approve_run, plan_lines, waiting

    if run is None:
        facts = waiting(folder)
        if as_json:
            _print_json(facts)
        elif not facts:
            typer.echo("nothing waits for an approval")
        else:
            for line in facts:
                typer.echo(f"{line['run']}  {line['state']}  plan {line['plan'][:12]}…")
        return
    if not as_json:
        for sentence in plan_lines(folder, run):
            typer.echo(sentence)
    if not yes and not typer.confirm("Approve this plan?", err=True):
        raise typer.Exit(3)
    facts_ = approve_run(folder, run, by=by)
    if as_json:
        _print_json(facts_)
    else:
        typer.echo(f"{facts_['by']} approved run {facts_['run']}: the node joins its next round")


@app.command()
def alarm(
    folder: Folder,
    clear: Annotated[
        str | None, typer.Option(metavar="CODE", help="What was found out; it becomes public.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="NAME", help="Who looked into it, a handle.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show what the round log was caught at; with --clear, record the finding and go on."""
    from node_agent.cli.alarms import alarm_facts, clear_alarms

    facts = alarm_facts(folder) if clear is None else clear_alarms(folder, code=clear, by=by)
    if as_json:
        _print_json(facts)
        return
    if not facts:
        typer.echo("no alarm")
    for line in facts:
        state = f"cleared as {line['code']} by {line['by']}" if line["code"] else "OPEN"
        typer.echo(f"{line['at']}  {line['rule']}  {state}: {line['why']}")


@app.command()
def doctor(
    folder: Folder,
    worker: Annotated[
        bool, typer.Option(help="Also start the training worker once (takes seconds).")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Look for what keeps the node from taking part, and say what mends it."""
    from node_agent.cli.showing import print_findings
    from node_agent.doctor import examine, exit_code

    findings = examine(folder, start_worker=worker)
    if as_json:
        _print_json([finding.facts() for finding in findings])
    else:
        print_findings(findings)
    raise typer.Exit(exit_code(findings))


@app.command()
def journal(
    folder: Folder,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Only this run.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many newest lines.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what this node decided, sent and was answered."""
    from node_agent.cli.showing import journal_facts, print_journal

    facts = journal_facts(folder, run=run, last=last)
    if as_json:
        for line in facts:
            typer.echo(json.dumps(line, ensure_ascii=False))
    else:
        print_journal(facts)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
