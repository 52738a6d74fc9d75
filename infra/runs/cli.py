"""`minga run`: submit a plan, follow its rounds, ask why, stop it.

A command parses, calls the coordinator, prints. Answers go to stdout, advice to stderr.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from protocols.errors import MalformedMessageError
from protocols.identifiers import RoundId, RunId, parse_run_id

if TYPE_CHECKING:
    from infra.runs.client import AdminClient
    from infra.runs.operator import Operator


class _Named(click.ParamType[Any]):
    """A name that is read at the door: what is wrong with it becomes a usage error."""

    def __init__(self, name: str, parse: Any) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except MalformedMessageError as error:
            self.fail(str(error), param, ctx)


FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="Folder of the federation (holds coordinator/); or the variable MINGA_DIR.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Operator file, for use on another machine."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
RunArgument = Annotated[
    str,
    typer.Argument(click_type=_Named("run", parse_run_id), metavar="RUN", help="Such as andes-7."),
]
RoundArgument = Annotated[
    RoundId,
    typer.Argument(
        click_type=_Named("round", RoundId.parse), metavar="RUN/ROUND", help="Such as andes-7/42."
    ),
]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    help="Submit, follow and stop training runs.",
)


def _operator(folder: Path | None, config: Path | None) -> Operator:
    from infra.runs.operator import find_operator

    return find_operator(folder=folder, config=config, environment=os.environ)


def _client(folder: Path | None, config: Path | None) -> AdminClient:
    from infra.runs.client import AdminClient

    return AdminClient(_operator(folder, config))


@app.command()
def submit(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan as .toml or .json.")],
    snapshot: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Model of round 0: manifest.json and theta.f32."),
    ],
    folder: FolderOption = None,
    config: ConfigOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Complete and check the plan; send nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the completed plan, for the admins to sign."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Submit a plan; its digest is printed. Submitting the same plan again is harmless."""
    from infra.runs.outlook import outlook_facts, outlook_view
    from infra.runs.plan_file import (
        complete_plan,
        federation_of,
        read_initial_model,
        read_plan_file,
    )
    from infra.runs.show import console, print_json
    from infra.runs.submission import submit as send

    written = read_plan_file(plan_file)
    model = read_initial_model(snapshot)
    operator = _operator(folder, config)
    federation = federation_of(operator.certificate)
    outlook: dict[str, Any] | None = None
    if dry_run and written.get("mode", "open") == "open":
        made = complete_plan(written, model, federation)
        outlook = outlook_facts(made.plan, model, None)
    else:
        from infra.runs.client import AdminClient

        with AdminClient(operator) as client:
            made = complete_plan(written, model, federation, client.signing_keys())
            if dry_run:
                outlook = outlook_facts(made.plan, model, client)
            else:
                send(client, made, model)
    if out is not None:
        out.write_bytes(made.plan.to_bytes())
    facts = {
        "run": made.plan.run,
        "plan_digest": made.plan.digest,
        "model_root": made.snapshot.model_root,
        "coordinates": model.manifest.coordinates,
        "rounds": made.plan.total_rounds,
        "submitted": not dry_run,
    }
    if json_:
        print_json(facts if outlook is None else facts | {"outlook": outlook})
        return
    did = "checked, not submitted" if dry_run else "submitted"
    typer.echo(f"{did}: run {made.plan.run}, {made.plan.total_rounds} rounds")
    typer.echo(f"plan  {made.plan.digest}")
    typer.echo(f"model {made.snapshot.model_root} ({model.manifest.coordinates} coordinates)")
    if outlook is not None:
        console().print(outlook_view(outlook))


@app.command()
def plan(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan as .toml or .json.")],
    snapshot: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Model of round 0: manifest.json and theta.f32."),
    ],
    folder: FolderOption = None,
    config: ConfigOption = None,
    json_: JsonOption = False,
) -> None:
    """Say what a plan would come to: privacy spent, noise, bytes, seconds, who would refuse."""
    from infra.runs.client import AdminClient
    from infra.runs.outlook import outlook_facts, outlook_view
    from infra.runs.plan_file import (
        complete_plan,
        federation_of,
        read_initial_model,
        read_plan_file,
    )
    from infra.runs.show import console, print_json

    written, model = read_plan_file(plan_file), read_initial_model(snapshot)
    operator = _operator(folder, config)
    federation = federation_of(operator.certificate)
    with AdminClient(operator) as client:
        made = complete_plan(written, model, federation, client.signing_keys())
        facts = outlook_facts(made.plan, model, client)
    if json_:
        print_json(facts)
    else:
        console().print(outlook_view(facts))


@app.command("list")
def list_runs(
    folder: FolderOption = None, config: ConfigOption = None, json_: JsonOption = False
) -> None:
    """List all runs."""
    from infra.runs.facts import run_to_json
    from infra.runs.show import console, print_json, runs_table

    with _client(folder, config) as client:
        runs = client.runs()
    if json_:
        print_json([run_to_json(run) for run in runs])
    else:
        console().print(runs_table(runs))


@app.command()
def show(
    run: RunArgument,
    folder: FolderOption = None,
    config: ConfigOption = None,
    json_: JsonOption = False,
) -> None:
    """Show a run: rounds, seconds per phase, bits per byte by language, traffic."""
    from infra.runs.facts import run_to_json
    from infra.runs.show import console, print_json, run_view

    with _client(folder, config) as client:
        report = client.show(RunId(run))
    if json_:
        print_json(run_to_json(report))
    else:
        console().print(run_view(report))


@app.command()
def watch(
    run: RunArgument,
    folder: FolderOption = None,
    config: ConfigOption = None,
    json_: JsonOption = False,
) -> None:
    """Follow a run until it ends: live on a terminal, plain lines elsewhere.

    With --json, one object per line for every entry of the run's history.
    """
    from infra.runs.show import console
    from infra.runs.watch import watch_history, watch_lines, watch_live

    out = console()
    with _client(folder, config) as client:
        if json_:
            watch_history(client, RunId(run))
            return
        follow = watch_live if out.is_terminal else watch_lines
        report = follow(client, RunId(run), out)
    typer.echo(f"{report.run} {report.status}")


@app.command()
def why(
    round_: RoundArgument,
    folder: FolderOption = None,
    config: ConfigOption = None,
    json_: JsonOption = False,
) -> None:
    """Say what a round is waiting for."""
    from infra.runs.show import console, print_json, why_line

    with _client(folder, config) as client:
        answer = client.why(round_)
    if json_:
        print_json(
            {
                "round": str(round_),
                "phase": answer.phase.name,
                "why": answer.why,
                "waiting_for": list(answer.waiting_for),
            }
        )
    else:
        console().print(why_line(str(round_), answer.phase.name, answer.why), soft_wrap=True)


@app.command()
def stop(
    run: RunArgument,
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="One sentence for the record, shown to all sites.")
    ],
    folder: FolderOption = None,
    config: ConfigOption = None,
    json_: JsonOption = False,
) -> None:
    """Stop a run: a round in which something may have left the sites is finished first."""
    from infra.runs.facts import run_to_json
    from infra.runs.show import print_json

    with _client(folder, config) as client:
        report = client.stop(RunId(run), reason)
    if json_:
        print_json(run_to_json(report))
    else:
        typer.echo(f"{report.run} {report.status}")
