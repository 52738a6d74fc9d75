"""Connects a Flower Grid to a coordinator, with an operator's certificate.

with open_grid(name="credit", app="bank.client:app", folder=Path("fed")) as grid:
    run_strategy(FedAvg(fraction_evaluate=0.0), grid, arrays, rounds=10)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infra.runs.client import AdminClient
from infra.runs.facts import RunReport
from infra.runs.operator import find_operator
from infra.runs.plan_file import complete_plan, federation_of, read_initial_model
from infra.runs.submission import submit
from protocols.identifiers import FederationId, RunId
from protocols.tensors.snapshot import Snapshot

if TYPE_CHECKING:
    from coordinator.flower import MingaGrid
    from coordinator.flower_rounds import Outcome

_LEFT = ("decline", "leave")  # transactions in a run's history
_OBJECTION = "objection"  # how a node's verdict begins that computed another model


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorFederation:
    """``coordinator.flower_rounds.Federation`` over the Admin and Bulk services."""

    client: AdminClient
    federation: FederationId

    def begin(self, fields: Mapping[str, Any], model: Path) -> None:
        """Submit a run; see the protocol."""
        initial = read_initial_model(model)
        keys = self.client.signing_keys()
        submit(self.client, complete_plan(dict(fields), initial, self.federation, keys), initial)

    def look(self, run: RunId) -> Outcome:
        """How a run stands; see the protocol."""
        from coordinator.flower_rounds import Outcome

        report = self.client.show(run)
        done = report.released[-1] if report.released else None
        return Outcome(
            # A stopped run may yet finish a round in which something has left the sites.
            status=report.status if report.ended else "active",
            why=self._why(report),
            released=done is not None,
            metrics=done.metrics if done is not None else {},
            snapshot=done.next_snapshot if done is not None else None,
            objections=tuple(
                f"{entry.node}: {entry.confirmed}"
                for entry in (done.traffic if done is not None else ())
                if entry.confirmed.startswith(_OBJECTION)
            ),
        )

    def _why(self, report: RunReport) -> str:
        """Why the last round is where it is; of a run without a model, who left it last and why."""
        if not report.rounds:
            return "no round was opened"
        why = report.rounds[-1].why
        if not report.ended or report.released:
            return why
        left = [
            str(entry.why)
            for entry in self.client.watch(RunId(report.run))
            if entry.transaction in _LEFT
        ]
        return f"{why}; {left[-1]}" if left else why

    def theta(self, snapshot: bytes) -> NDArray[np.float32]:
        """The weights of a snapshot; see the protocol."""
        with TemporaryDirectory(prefix="minga-flower-") as folder:
            path = Path(folder) / "theta.f32"
            self.client.fetch(Snapshot.from_bytes(snapshot).theta, path)
            return np.fromfile(path, "<f4")


@contextmanager
def open_grid(
    *,
    name: str,
    app: str,
    roster: Sequence[str] = (),
    folder: Path | None = None,
    config: Path | None = None,
    **terms: Any,
) -> Iterator[MingaGrid]:
    """A Grid of a federation, for as long as the block lasts.

    Args:
        name: of the whole; run ids begin with it.
        app: the ClientApp, ``package.module:attribute``.
        roster: nodes; empty: all that are enrolled now. Name them where a run may be resumed.
        folder: of the federation (holds coordinator/); else the variable MINGA_DIR.
        config: an operator's file, for use on another machine.
        **terms: further fields of ``coordinator.flower_rounds.RoundTerms``.

    Raises:
        ConfigurationError: nothing says where the coordinator is.
        NotReadyError: it does not answer.
    """
    from coordinator.flower import MingaGrid, RoundTerms

    operator = find_operator(folder=folder, config=config, environment=os.environ)
    with AdminClient(operator) as client:
        nodes = tuple(roster) or tuple(sorted(client.signing_keys()))
        federation = OperatorFederation(
            client=client, federation=federation_of(operator.certificate)
        )
        yield MingaGrid(federation, RoundTerms(name=name, app=app, roster=nodes, **terms))
