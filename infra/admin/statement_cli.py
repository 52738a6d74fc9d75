"""`minga admin statement`: what an admin or an institution says in the round log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Say something in the round log under an admin's or an institution's key.",
)


@app.command("sign")
def sign(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="Such as dataset.declared or ballot.")
    ],
    fields: Annotated[Path, typer.Option(metavar="FILE", help="Its fields, as a JSON object.")],
    key: Annotated[Path, typer.Option(metavar="KEY", help="Your key file (Ed25519).")],
    log: Annotated[
        Path, typer.Option(metavar="DIR", help="The log, as `minga audit mirror` copied it.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The leaf to write.")],
    trust_policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Which witnesses you go by; default: the log's own."),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Passphrase; else MINGA_ADMIN_PASSPHRASE, else a prompt."
        ),
    ] = None,
) -> None:
    """Sign a leaf offline, behind your last one in the mirrored log."""
    from infra.admin import acts
    from infra.admin.keys import load_private
    from infra.admin.statements import read_statement, replayed, sign_statement
    from protocols.canonical import parse_json
    from protocols.errors import MalformedMessageError

    value = parse_json(acts.read_bytes(fields), limit=65_536)
    if not isinstance(value, dict):
        raise MalformedMessageError(f"{fields} holds no JSON object")
    said, now = read_statement(kind, value), acts.utc_now()
    state, seen = replayed(log, policy=trust_policy or log / "trust-policy.txt", now=now)
    private = load_private(key, acts.ask_secret(passphrase_file))
    leaf = sign_statement(said, private, log=state, seen=seen, now=now)
    acts.write_new(out, leaf.entry)
    typer.echo(f"signed: {out}, leaf {leaf.statement.seq} of this key, {leaf.hash}")
    typer.echo("bring it to the coordinator with `minga admin statement publish`", err=True)


@app.command("publish")
def publish(
    leaf: Annotated[Path, typer.Argument(metavar="LEAF", help="As `sign` wrote it.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Folder of the federation.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Operator file.")
    ] = None,
) -> None:
    """Bring a signed leaf to the coordinator. Doing it again is harmless."""
    from infra.admin import acts

    acts.deliver(acts.read_bytes(leaf), folder=folder, config=config)
    typer.echo("it is in the log")
