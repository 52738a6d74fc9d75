"""The base of a ledger transaction: statements, and history written last.

History entries are kept until the end of the transaction and then written under the lock of the
one row of ``ledger_version``. So the ids stand in order of commit and without gaps: who has read
entry n has read all before it, and never misses one that another process commits later with a
smaller id. Taking that lock last, everywhere, means that it cannot be part of a deadlock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite

from coordinator.ledger import schema
from protocols.identifiers import NodeId, RoundId, RunId
from protocols.rounds_codec import to_ms

_BUMP = (
    sa.update(schema.ledger_version)
    .where(schema.ledger_version.c.one == 1)
    .values(value=schema.ledger_version.c.value + sa.bindparam("by"))
    .returning(schema.ledger_version.c.value)
)
_ADD_HISTORY = sa.insert(schema.history)
_ADD_TIMES = sa.insert(schema.phase_times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of history that the transaction will write."""

    at: datetime
    run: RunId | None
    round: RoundId | None
    transaction: str
    phase: str
    why: str
    node: NodeId | None
    entered: bool  # the round entered this phase: also a row of phase_times


class Statements:
    """One open transaction on one connection. Made by ``Ledger``; never kept."""

    def __init__(self, connection: Connection, name: str, now: datetime) -> None:
        self.name = name  # of the transaction, for history
        self.now = now  # UTC, when it began
        self._c = connection
        self._noted: list[Entry] = []

    def note(
        self,
        why: str,
        *,
        now: datetime | None = None,
        run: RunId | None = None,
        round_: RoundId | None = None,
        phase: str = "",
        node: NodeId | None = None,
        transaction: str | None = None,
        entered: bool = False,
    ) -> None:
        """Add a line to history, as part of this transaction.

        Args:
            why: one line for a person.
            now: UTC; when the transaction began, if not given.
            run, round_: what it is about; a round names its run.
            phase: the phase after the change, or "".
            node: who caused it.
            transaction: a name other than this transaction's.
            entered: whether the round entered ``phase`` just now.
        """
        self._noted.append(
            Entry(
                at=now or self.now,
                run=round_.run if round_ else run,
                round=round_,
                transaction=transaction or self.name,
                phase=phase,
                why=why,
                node=node,
                entered=entered,
            )
        )

    @property
    def _has_news(self) -> bool:
        return bool(self._noted)

    def write_history(self) -> int | None:
        """Write what was noted; the last thing before the commit. Returns the last id, if any."""
        entries, self._noted = self._noted, []
        if not entries:
            return None
        last: int = self._c.execute(_BUMP, {"by": len(entries)}).scalar_one()
        numbered = list(enumerate(entries, start=last - len(entries) + 1))
        self._c.execute(
            _ADD_HISTORY,
            [
                {
                    "id": number,
                    "at": to_ms(entry.at),
                    "run_id": entry.run,
                    "number": entry.round.number if entry.round else None,
                    "transaction": entry.transaction,
                    "phase": entry.phase,
                    "why": entry.why,
                    "node_id": entry.node,
                }
                for number, entry in numbered
            ],
        )
        times = [
            {
                "run_id": entry.round.run,
                "number": entry.round.number,
                "history_id": number,
                "phase": entry.phase,
                "entered_at": to_ms(entry.at),
            }
            for number, entry in numbered
            if entry.entered and entry.round
        ]
        if times:
            self._c.execute(_ADD_TIMES, times)
        return last

    # -- statements --------------------------------------------------------------------------

    def _insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """An insert that knows ON CONFLICT."""
        if self._c.dialect.name == "postgresql":
            return postgresql.insert(table)
        return sqlite.insert(table)

    def _insert_once(self, table: Table, **values: Any) -> bool:
        """Add a row unless it is there. Returns whether it was added.

        By RETURNING: for an insert, a driver's count of rows is not reliable.
        """
        key = next(iter(table.primary_key))
        statement = self._insert(table).values(**values).on_conflict_do_nothing().returning(key)
        return self._c.execute(statement).one_or_none() is not None

    def _one(self, statement: sa.Executable, **values: Any) -> Any | None:
        return self._c.execute(statement, values).one_or_none()

    def _all(self, statement: sa.Executable, **values: Any) -> Any:
        return self._c.execute(statement, values).all()

    def _write(self, statement: sa.Executable, **values: Any) -> int:
        """Rows that were written."""
        return self._c.execute(statement, values).rowcount
