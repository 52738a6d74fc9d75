"""The `minga` command: one group per role, each imported only when it is called.

`minga --help` and `minga --version` import neither grpc nor torch nor a database, so they answer
at once and work in the smallest install. Errors of the federation end the process with one
sentence, a code and an exit status by family (0 done, 1 bug, 2 usage, 3 refused, 4 not ready,
5 integrity failure); a traceback appears for bugs only and never prints local variables, which
may be keys or shares.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import click
import typer
import typer.core
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from protocols.errors import ConfigurationError, FederationError, exit_status

# Help and usage errors are plain text: the same on a terminal, in a pipe and in a mail.
typer.core.HAS_RICH = False

OUR_PACKAGES: Final = ("protocols", "policies", "coordinator", "node_agent", "infra")
INTERRUPTED: Final = 130  # exit status after Ctrl-C, as shells count it: 128 + SIGINT


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyGroup:
    """A command group that is imported when it is called."""

    module: str  # holds `app: typer.Typer`
    help: str  # one line, shown without importing the module
    extra: str  # the optional dependencies it needs, as in `pip install minga[EXTRA]`


GROUPS: Final[Mapping[str, LazyGroup]] = {
    "demo": LazyGroup(
        module="infra.demo.cli",
        help="Run a whole federation on this machine.",
        extra="coordinator,node",
    ),
    "coordinator": LazyGroup(
        module="coordinator.cli", help="Set up and run the coordinator.", extra="coordinator"
    ),
    "node": LazyGroup(
        module="node_agent.cli", help="Run the node of one institution.", extra="node"
    ),
    "admin": LazyGroup(
        module="infra.admin.cli",
        help="Propose, sign and publish keys, policy, members and plans.",
        extra="coordinator",
    ),
    "run": LazyGroup(
        module="infra.runs.cli", help="Submit, follow and stop training runs.", extra="coordinator"
    ),
    "audit": LazyGroup(
        module="infra.audit.cli", help="Copy, verify and report the round log.", extra="privacy"
    ),
    "governance": LazyGroup(
        module="infra.governance.cli",
        help="Compare the charter with what is signed.",
        extra="coordinator",
    ),
}


def load_group(name: str) -> click.Command:
    """Import the group ``name`` and make it a click command.

    Raises:
        ConfigurationError: an optional dependency of the group is not installed.
    """
    group = GROUPS[name]
    try:
        module = importlib.import_module(group.module)
    except ModuleNotFoundError as error:
        raise _lacking(name, error) from None
    command = get_command(module.app)
    command.name = name
    command.help = command.help or group.help
    return command


def _lacking(name: str, error: ModuleNotFoundError) -> ModuleNotFoundError | ConfigurationError:
    """What to install for the group ``name``; the error itself where one of our modules is missing.

    That one is a bug, and says more with its traceback.
    """
    missing = (error.name or "").partition(".")[0]
    if missing in {*OUR_PACKAGES, ""}:
        return error
    return ConfigurationError(
        f"`minga {name}` needs the package {missing!r}, which is not installed: "
        f"pip install 'minga[{GROUPS[name].extra}]'"
    )


class LazyGroups(TyperGroup):
    """The root: lists its groups from ``GROUPS``, imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a newcomer meets them."""
        return list(GROUPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A stand-in that carries the help line only; ``resolve_command`` imports the real one."""
        group = GROUPS.get(cmd_name)
        if group is None:
            return None
        return TyperCommand(name=cmd_name, help=group.help)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; commands import what they need when they are called."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise _lacking(str(ctx.invoked_subcommand), error) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The group that ``args`` call, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is None or command is None:
            return name, command, rest
        return name, load_group(name), rest


app = typer.Typer(
    name="minga",
    cls=LazyGroups,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    help="Minga: federated training across institutions that can check instead of trust.",
    epilog="Exit status: 0 done, 1 bug, 2 usage, 3 refused, 4 not ready, 5 integrity failure.",
)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import version

    typer.echo(f"minga {version('minga')}")
    raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Minga: federated training across institutions that can check instead of trust."""


def root_command() -> click.Command:
    """The whole command tree as click sees it, for tests and for `main`."""
    return get_command(app)


def main(arguments: list[str] | None = None, **options: Any) -> None:
    """Run `minga`; the process ends with the status of the error's family."""
    try:
        app(args=arguments, prog_name="minga", **options)
    except FederationError as error:
        print(error.diagnostics(), file=sys.stderr)
        raise SystemExit(exit_status(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
