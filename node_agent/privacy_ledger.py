"""What this site's data have spent, by this site's own account: the node believes no other.

    spends    one row for each private round this node joined: what it costs, and what became of it

        (none) --reserve--> reserved --+--> released    the sum that holds this node's update opens
                                       +--> burned      something may have been opened
                                       '--> void        no byte was ever sent

A round is reserved, durably, before the node joins it. Everything but ``void`` counts as spent, so
a crash between reserving and recording, a coordinator that lies and one that lost its own ledger
change nothing: what is not surely unspent is charged. What a row says of the past never changes,
only its status does, once.

A data set has one budget, whoever asks: the one that ``config.toml`` gives to the node's data, for
one unit of privacy. Runs share it. Decisions are ``policies.privacy.budget``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from node_agent.rules import Refusal
from policies.privacy.budget import (
    Affordable,
    Allowance,
    Spend,
    SpendStatus,
    afford_allowance,
)
from policies.privacy.claim import Claim
from protocols.canonical import canonical_bytes, parse_canonical
from protocols.errors import (
    CorruptStateError,
    EquivocationError,
    FederationError,
    LedgerBusyError,
    NotFoundError,
    StorageFullError,
)
from protocols.identifiers import RoundId, RunId

SCHEMA: Final = "1"
_metadata = sa.MetaData()
_meta = sa.Table(
    "meta",
    _metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
_spends = sa.Table(
    "spends",
    _metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("dataset", sa.Text, nullable=False),
    sa.Column("claim", sa.LargeBinary, nullable=False),  # canonical JSON: policies.privacy.claim
    sa.Column("status", sa.Text, nullable=False),  # policies.privacy.budget.SpendStatus
    sa.Column("reserved_at", sa.Integer, nullable=False),  # Unix ms
    sa.Column("started_at", sa.Integer),  # Unix ms, of the local steps; NULL: not begun
    sa.Column("settled_at", sa.Integer),  # Unix ms; NULL: reserved
    sa.Column("why", sa.Text, nullable=False),  # of the status, one sentence
)
_FINAL: Final = frozenset({SpendStatus.RELEASED, SpendStatus.BURNED, SpendStatus.VOID})


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendRecord:
    """One row."""

    round: RoundId
    dataset: str
    claim: Claim
    status: SpendStatus
    reserved_at: datetime  # UTC
    started: bool  # its local steps may have begun
    why: str

    @property
    def spend(self) -> Spend:
        """For the decision."""
        return Spend(
            key=str(self.round),
            charge=self.claim.charge(),
            status=self.status,
            reserved_at=self.reserved_at,
        )


class PrivacyLedger:
    """The node's own ledger. Any thread may call; each method is one transaction."""

    def __init__(self, path: Path, *, now: Callable[[], datetime], read_only: bool = False) -> None:
        """Open the ledger; make it where there is none.

        Raises:
            NotFoundError: opened for reading, and there is none.
            CorruptStateError: the file is not a ledger of this version.
        """
        if read_only and not path.exists():
            raise NotFoundError(f"{path} is missing: this node has spent nothing yet")
        self._path = path
        self._now = now
        self._one_at_a_time = threading.Lock()
        self._engine = sa.create_engine(
            f"sqlite:///{path}", connect_args={"timeout": 10, "check_same_thread": False}
        )
        sa.event.listen(self._engine, "connect", _pragmas)
        with self._errors():
            if not read_only:
                _metadata.create_all(self._engine)
                path.chmod(0o600)
            with self._engine.begin() as connection:
                found = connection.scalar(sa.select(_meta.c.value).where(_meta.c.key == "schema"))
                if found is None and not read_only:
                    connection.execute(_meta.insert().values(key="schema", value=SCHEMA))
                    found = SCHEMA
        if found != SCHEMA:
            self.close()
            raise CorruptStateError(f"{path} is not a privacy ledger of version {SCHEMA}")

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    # -- deciding --------------------------------------------------------------------------------

    def reserve(
        self,
        round_: RoundId,
        claim: Claim,
        allowance: Allowance,
        *,
        rounds: int = 1,
        joined: Iterable[RoundId] = (),
    ) -> Refusal | None:
        """Reserve the cost of a round, if it can be afforded; None: it is reserved.

        Asking again about a reserved round gives the same yes. A round that was settled is not
        reserved again.

        Args:
            round_: about to be joined.
            claim: what it costs.
            allowance: the site's, for this data set.
            rounds: how many the run still plans, this one included.
            joined: private rounds that the node's journal says it joined: each must be here.

        Raises:
            EquivocationError: the round was reserved at another cost.
            CorruptStateError: a row cannot be read.
        """
        with self._write() as connection:
            rows = self._read(connection, None)
            known = {row.round: row for row in rows}
            lost = [str(other) for other in joined if other != round_ and other not in known]
            if lost:
                return Refusal(
                    "privacy.ledger_lost",
                    f"the journal knows of round {lost[0]}, the privacy ledger does not: it was"
                    " lost or put back, and what is spent is unknown",
                )
            before = known.get(round_)
            if before is not None:
                if before.claim != claim or before.dataset != allowance.dataset:
                    raise EquivocationError(f"round {round_} was reserved at another cost before")
                if before.status is SpendStatus.RESERVED:
                    return None
                return Refusal(
                    "privacy.settled", f"round {round_} is {before.status} in the privacy ledger"
                )
            answer = self._affords(rows, claim, allowance, rounds=rounds)
            if not answer.yes:
                return Refusal(answer.rule, f"data set {allowance.dataset}: {answer.why}")
            connection.execute(
                _spends.insert().values(
                    run=round_.run,
                    number=round_.number,
                    dataset=allowance.dataset,
                    claim=canonical_bytes(claim.to_value()),
                    status=SpendStatus.RESERVED.value,
                    reserved_at=int(self._now().timestamp() * 1000),
                    why=answer.why,
                )
            )
        return None

    def affords(self, claim: Claim, allowance: Allowance, *, rounds: int = 1) -> Affordable:
        """Whether a round could be reserved now; changes nothing."""
        with self._errors(), self._engine.connect() as connection:
            rows = self._read(connection, allowance.dataset)
        return self._affords(rows, claim, allowance, rounds=rounds)

    def _affords(
        self, rows: Iterable[SpendRecord], claim: Claim, allowance: Allowance, *, rounds: int
    ) -> Affordable:
        spends = [row.spend for row in rows if row.dataset == allowance.dataset]
        return afford_allowance(
            allowance, spends, claim.charge(), now=self._now(), rounds=max(1, rounds)
        )

    # -- recording -------------------------------------------------------------------------------

    def start(self, round_: RoundId) -> None:
        """The local steps of a reserved round are about to begin; the first time stays."""
        now = int(self._now().timestamp() * 1000)
        with self._write() as connection:
            connection.execute(
                _spends.update()
                .where(
                    _spends.c.run == round_.run,
                    _spends.c.number == round_.number,
                    _spends.c.started_at.is_(None),
                )
                .values(started_at=now)
            )

    def settle(self, round_: RoundId, status: SpendStatus, why: str) -> bool:
        """Say what became of a reserved round. The first word stands.

        Returns:
            Whether this was it.

        Raises:
            EquivocationError: a spent round is to be taken back, or one that was refunded spent.
        """
        if status not in _FINAL:
            raise ValueError(f"a round is not settled as {status}")
        with self._write() as connection:
            where = (_spends.c.run == round_.run, _spends.c.number == round_.number)
            row = connection.execute(sa.select(_spends).where(*where)).first()
            if row is None:
                return False  # a round that costs nothing
            before = SpendStatus(row.status)
            if before is not SpendStatus.RESERVED:
                spent = (SpendStatus.RELEASED, SpendStatus.BURNED)
                if before is status or (before in spent and status in spent):
                    return False
                raise EquivocationError(f"round {round_} is {before} in the privacy ledger already")
            now = int(self._now().timestamp() * 1000)
            values = {"status": status.value, "settled_at": now, "why": why}
            connection.execute(_spends.update().where(*where).values(**values))
            return True

    # -- telling ---------------------------------------------------------------------------------

    def records(self, dataset: str | None = None) -> tuple[SpendRecord, ...]:
        """All spends, or those of a data set, in order of reservation."""
        with self._errors(), self._engine.connect() as connection:
            return self._read(connection, dataset)

    def record(self, round_: RoundId) -> SpendRecord | None:
        """What the ledger knows of a round."""
        query = sa.select(_spends).where(
            _spends.c.run == round_.run, _spends.c.number == round_.number
        )
        with self._errors(), self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else _record(row)

    def open_rounds(self, run: RunId) -> tuple[RoundId, ...]:
        """Rounds of a run that are reserved and not settled; looked at in every turn."""
        query = sa.select(_spends.c.number).where(
            _spends.c.run == run, _spends.c.status == SpendStatus.RESERVED.value
        )
        with self._errors(), self._engine.connect() as connection:
            return tuple(RoundId(run, n) for n in sorted(connection.scalars(query)))

    # -- inside ----------------------------------------------------------------------------------

    def _read(self, connection: sa.Connection, dataset: str | None) -> tuple[SpendRecord, ...]:
        query = sa.select(_spends).order_by(_spends.c.reserved_at, _spends.c.run, _spends.c.number)
        if dataset is not None:
            query = query.where(_spends.c.dataset == dataset)
        return tuple(_record(row) for row in connection.execute(query))

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._one_at_a_time, self._errors(), self._engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # another process may hold the file
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The database's errors as ours."""
        try:
            yield
        except FederationError:
            raise
        except sa.exc.OperationalError as error:
            text = str(error.orig)
            if "full" in text:
                raise StorageFullError(f"no room for the privacy ledger {self._path}") from None
            if "locked" in text or "busy" in text:
                raise LedgerBusyError(f"another process holds {self._path}") from None
            raise CorruptStateError(f"the privacy ledger {self._path}: {text:.200}") from None
        except sa.exc.DatabaseError as error:
            raise CorruptStateError(
                f"the privacy ledger {self._path}: {error.orig!s:.200}"
            ) from None


def _record(row: Any) -> SpendRecord:
    try:
        claim = Claim.from_value(parse_canonical(bytes(row.claim)))
        status = SpendStatus(row.status)
    except (FederationError, TypeError, ValueError):
        raise CorruptStateError(
            f"the privacy ledger's row of round {row.run}/{row.number} cannot be read"
        ) from None
    return SpendRecord(
        round=RoundId(RunId(row.run), row.number),
        dataset=row.dataset,
        claim=claim,
        status=status,
        reserved_at=datetime.fromtimestamp(row.reserved_at / 1000, UTC),
        started=row.started_at is not None,
        why=row.why,
    )


def _pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say so
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a commit is on the disk before we go on
    cursor.close()
