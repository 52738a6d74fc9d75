"""`minga coordinator`: make a federation's coordinator, serve it, invite institutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Set up and run the coordinator.")

Folder = Annotated[Path, typer.Option("--dir", envvar="MINGA_DIR", help="The federation's folder.")]


@app.command()
def init(
    folder: Folder,
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "demo",
    address: Annotated[
        str, typer.Option(help="HOST:PORT for nodes, with mutual TLS.")
    ] = "127.0.0.1:8443",
    enrolment: Annotated[
        str, typer.Option(help="HOST:PORT for invitations, with the server's TLS.")
    ] = "127.0.0.1:8444",
    public: Annotated[
        str | None, typer.Option(help="HOST:PORT that nodes are told; default: --address.")
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="A further name or IP of this machine; repeatable.")
    ] = None,
    ledger: Annotated[
        str, typer.Option(help="SQLAlchemy URL; PostgreSQL for more than one coordinator.")
    ] = "sqlite:///ledger.sqlite",
    operator: Annotated[
        str, typer.Option(help="Name in the first operator certificate.")
    ] = "cenia",
    log: Annotated[
        bool, typer.Option("--log/--no-log", help="Keep a round log that witnesses cosign.")
    ] = True,
    http: Annotated[
        str | None, typer.Option(help="HOST:PORT that serves log and trust repository to readers.")
    ] = None,
    witness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VKEY=URL",
            help="A witness over HTTP (`minga audit witness`) that must cosign beside the nodes;"
            " repeatable.",
        ),
    ] = None,
    governed: Annotated[
        bool,
        typer.Option(
            "--governed/--ungoverned",
            help="Whether nothing runs before admins have signed a root; ungoverned is for tests.",
        ),
    ] = True,
) -> None:
    """Make the certificate authority, the coordinator's and an operator's certificate."""
    from coordinator.log_parts import parse_witness
    from coordinator.setup import initialise
    from protocols.errors import ConfigurationError

    if witness and not log:
        raise ConfigurationError("--witness is for a federation that keeps a log")
    made = initialise(
        folder=folder,
        federation=federation,
        address=address,
        enrolment=enrolment,
        public=public or address,
        hosts=tuple(host or ()),
        ledger=ledger,
        operator=operator,
        governed=governed,
        log=log,
        http=http,
        witnesses=tuple(parse_witness(text) for text in witness or ()),
    )
    typer.echo(f"made {made}")
    if governed:
        typer.echo(
            f"its admins found the federation now: give them {made / 'founding.json'} "
            "(`minga admin key found`)",
            err=True,
        )
    else:
        typer.echo("UNGOVERNED: whoever runs this machine decides alone what runs", err=True)
    typer.echo("the keys stay in its keys/ folder; serve with `minga coordinator serve`", err=True)


@app.command()
def serve(
    folder: Folder,
    verbose: Annotated[bool, typer.Option(help="Log every refused call.")] = False,
) -> None:
    """Serve the federation until SIGTERM."""
    import asyncio
    import logging

    from coordinator.app import serve as serve_forever
    from coordinator.config import load_config

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("coordinator").setLevel(logging.INFO)
    asyncio.run(serve_forever(load_config(folder / "coordinator" / "config.toml")))


@app.command()
def invite(
    institution: Annotated[str, typer.Argument(help="Its id, e.g. ar-univ-1.")],
    folder: Folder,
    hours: Annotated[int, typer.Option(min=1, max=72, help="How long it may be used.")] = 72,
    as_json: Annotated[bool, typer.Option("--json", help="Facts as JSON.")] = False,
) -> None:
    """Make an invitation that an institution can use once, while the coordinator serves."""
    from coordinator.operator_client import operator_stub
    from protocols.gen import admin_pb2

    with operator_stub(folder) as stub:
        answer = stub.Invite(
            admin_pb2.InviteRequest(institution=institution, valid_hours=hours), timeout=10
        )
    if as_json:
        facts = {
            "institution": institution,
            "token": answer.token,
            "expires_at_ms": answer.expires_at_ms,
        }
        typer.echo(json.dumps(facts))
    else:
        typer.echo(answer.token)
