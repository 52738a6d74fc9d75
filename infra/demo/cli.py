"""`minga demo`: one coordinator and several nodes on this machine, training on text that stays."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, add_completion=False)


class Mode(StrEnum):
    """Modes of the sum that a demonstration offers."""

    RECORD_LOCAL = "record-local"
    AGGREGATE_ONLY = "aggregate-only"
    OPEN = "open"


class Scenario(StrEnum):
    """Common acts of governance, each played in under a minute."""

    EXPEL = "expel"
    OVERRIDE_REFUSED = "override-refused"
    POLICY_CHANGE = "policy-change"


class NodePhase(StrEnum):
    """Phases in which a node can be killed."""

    TRAINING = "training"
    DEALING = "dealing"
    UPLOADING = "uploading"
    COMMITTING = "committing"
    REVEALING = "revealing"


class CoordinatorPhase(StrEnum):
    """Phases in which the coordinator can be killed."""

    OPEN = "open"
    TRAINING = "training"
    DEALING = "dealing"
    UPLOADING = "uploading"
    COMMITTING = "committing"
    REVEALING = "revealing"
    RELEASED = "released"


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Folder of the federation; must be new.")
    ] = Path("demo-run"),
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Text: SITE/train.jsonl and SITE/valid.jsonl, one object with `text` a line. "
            "Default: a small corpus that comes with Minga.",
        ),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(metavar="N|NAMES", help="How many sites, or which: a,b,c. Default: 4."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Rounds of training. Default: 6.")
    ] = None,
    privacy: Annotated[Mode, typer.Option(help="How updates are protected.")] = Mode.RECORD_LOCAL,
    nodes_two_ranks: Annotated[
        int, typer.Option(min=0, help="Sites that train with two processes.")
    ] = 1,
    kill_node: Annotated[
        NodePhase | None,
        typer.Option(help="SIGKILL one node in this phase; it comes back a second later."),
    ] = None,
    kill_coordinator: Annotated[
        CoordinatorPhase | None,
        typer.Option(help="SIGKILL the coordinator in this phase; it comes back likewise."),
    ] = None,
    scenario: Annotated[
        Scenario | None,
        typer.Option(help="Play an act of governance instead, with its explanation; no training."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in DIR.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="At the end leave everything running until Ctrl-C.")
    ] = False,
    port: Annotated[
        int,
        typer.Option(min=0, max=65534, help="Port for nodes, the next for invitations; 0: free."),
    ] = 0,
) -> None:
    """Run a whole federation on this machine: every part a real process.

    One coordinator and four nodes talk over mutual TLS; each node's worker trains a small language
    model on text that stays in the node's folder. Takes under four minutes on two cores. An
    existing folder is never overwritten.
    """
    from infra.demo.sites import CORPUS
    from infra.demo.story import Request, run_demo
    from infra.runs.show import console

    if scenario is not None:
        from infra.demo.scenarios import run_scenario

        run_scenario(scenario.value, folder, console())
        return
    run_demo(
        Request(
            folder=folder,
            data=data or CORPUS,
            sites=sites,
            rounds=rounds,
            mode=privacy.value,
            two_ranks=nodes_two_ranks,
            port=port,
            resume=resume,
            keep=keep,
            kill_node=kill_node.value if kill_node else None,
            kill_coordinator=kill_coordinator.value if kill_coordinator else None,
        ),
        console(),
    )
