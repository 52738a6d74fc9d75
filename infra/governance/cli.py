"""`minga governance check`: fails when charter, policy, thresholds, roster and rules differ."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    help="Compare the charter with what is signed.",
)

REFUSED = 3


@app.callback()
def group() -> None:
    """Compare the charter with what is signed."""


@app.command()
def check(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="The charter.")] = Path(
        "GOVERNANCE.md"
    ),
    repository: Annotated[
        Path | None,
        typer.Option(
            "--repo", metavar="DIR", help="A trust repository; else the files that TEXT names."
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="FILE", help="The root that you hold; else unanchored."),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the generated annexes anew first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Fail on any drift between text, policy, thresholds, roster, rules and cited tests."""
    from datetime import UTC, datetime

    from infra.governance.checking import check_text, write_annexes

    now = datetime.now(UTC)
    if write:
        write_annexes(text, now=now, repository=repository, root=root)
    seen = check_text(text, now=now, repository=repository, root=root)
    if as_json:
        facts = {
            "policy_version": seen.policy.policy_version,
            "policy": seen.policy.digest,
            "source": seen.source,
            "coverage": asdict(seen.coverage),
            "findings": [asdict(finding) for finding in seen.findings],
        }
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        for finding in seen.findings:
            typer.echo(f"{finding.where}: {finding.sentence} [{finding.code}]")
        typer.echo(f"policy {seen.policy.policy_version} of {seen.source}")
        typer.echo(str(seen.coverage))
        typer.echo("the charter agrees with what is signed" if not seen.findings else "it drifted")
    if seen.findings:
        raise typer.Exit(REFUSED)
