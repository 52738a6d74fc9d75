"""What this node decided, sent and was answered: the memory that makes every message repeatable.

    runs      the plan as it was read; why this node stopped taking part, if it did
    rounds    join or decline; then ready or leave
    uploads   header, signature and unit hashes of each attempt; the receipt
    stages    how far this node came in the secure sum of a run: no secret is in it
    confirms  the model computed from a released sum, and whether that was delivered
    entries   the same as a list of sentences in time, for people: `minga node journal`

A statement is written here, durably (SQLite, WAL, synchronous=FULL), BEFORE it is sent. After a
crash the agent therefore says the same again, byte for byte, or says nothing: it cannot
contradict itself, because a second, different statement is refused here first.

Times are Unix milliseconds of this machine's clock; NULL means that it has not happened.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from node_agent.records import ConfirmRecord, Entry, RoundRecord, RunRecord, UploadRecord
from node_agent.rules import Refusal
from node_agent.secure_state import RANK, SecureKnown
from protocols.errors import (
    ConflictingUploadError,
    CorruptStateError,
    EquivocationError,
    FederationError,
    LedgerBusyError,
    NotFoundError,
    StorageFullError,
)
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.plan import Plan

T = TypeVar("T")
SCHEMA: Final = "2"
__all__ = [
    "SCHEMA",
    "ConfirmRecord",
    "Entry",
    "Journal",
    "RoundRecord",
    "RunRecord",
    "UploadRecord",
]
_metadata = sa.MetaData()

_meta = sa.Table(
    "meta",
    _metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
_runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("plan_digest", sa.Text, nullable=False),
    sa.Column("plan", sa.LargeBinary, nullable=False),  # canonical JSON
    sa.Column("stopped_code", sa.Text),  # NULL: takes part
    sa.Column("stopped_reason", sa.Text),
)
_rounds = sa.Table(
    "rounds",
    _metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("index", sa.Integer, nullable=False),  # which of the plan's rounds
    sa.Column("start_root", sa.Text, nullable=False),  # model_root it starts from
    sa.Column("joined", sa.Boolean, nullable=False),  # false: declined
    sa.Column("rule", sa.Text),  # of a decline
    sa.Column("reason", sa.Text),
    sa.Column("decided_at", sa.Integer, nullable=False),
    sa.Column("outcome", sa.Text),  # "ready" | "leave"; NULL: still training
    sa.Column("code", sa.Text),  # of a leave
    sa.Column("outcome_reason", sa.Text),
    sa.Column("outcome_at", sa.Integer),
    sa.Column("update_root", sa.Text),  # of the update that "ready" stands for; NULL: none on disk
)
_uploads = sa.Table(
    "uploads",
    _metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("header", sa.LargeBinary, nullable=False),  # canonical JSON
    sa.Column("signature", sa.LargeBinary, nullable=False),
    sa.Column("unit_hashes", sa.LargeBinary, nullable=False),  # 32 bytes each
    sa.Column("file", sa.Text, nullable=False),  # name inside spool/uploads
    sa.Column("made_at", sa.Integer, nullable=False),
    sa.Column("receipt", sa.LargeBinary),  # 32 bytes
    sa.Column("receipt_at", sa.Integer),
)
_stages = sa.Table(
    "stages",
    _metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("stage", sa.Text, nullable=False),  # node_agent.secure_state.STAGES
    sa.Column("reached_at", sa.Integer, nullable=False),
)
_confirms = sa.Table(
    "confirms",
    _metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("sum", sa.Text, nullable=False),
    sa.Column("published", sa.Text, nullable=False),  # model_root
    sa.Column("computed", sa.Text),  # model_root; NULL: none could be computed
    sa.Column("objection", sa.Text, nullable=False),  # empty: none
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("made_at", sa.Integer, nullable=False),
    sa.Column("answered_at", sa.Integer),
)
_pins = sa.Table(
    "pins",
    _metadata,
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, nullable=False),  # hex: the signing key this node saw first
    sa.Column("seen_at", sa.Integer, nullable=False),
)
_entries = sa.Table(
    "entries",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Integer, nullable=False),
    sa.Column("run", sa.Text, nullable=False),  # empty: about the node
    sa.Column("number", sa.Integer),  # NULL: about the run
    sa.Column("what", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),  # JSON object
    sqlite_autoincrement=True,
)


def _of_round(table: sa.Table) -> tuple[sa.ColumnElement[bool], ...]:
    return (table.c.run == sa.bindparam("of_run"), table.c.number == sa.bindparam("of_number"))


_RUN = sa.select(_runs).where(_runs.c.run == sa.bindparam("of_run"))
_ROUND = sa.select(_rounds).where(*_of_round(_rounds))
_CONFIRM = sa.select(_confirms).where(*_of_round(_confirms))
_UPLOAD = sa.select(_uploads).where(
    *_of_round(_uploads), _uploads.c.attempt == sa.bindparam("of_attempt")
)
_UNSENT = (
    sa.select(_confirms.c.number)
    .where(_confirms.c.run == sa.bindparam("of_run"), _confirms.c.answered_at.is_(None))
    .order_by(_confirms.c.number)
)
_STAGE = (
    sa.select(_stages)
    .where(_stages.c.run == sa.bindparam("of_run"))
    .order_by(_stages.c.number.desc(), _stages.c.attempt.desc())
    .limit(1)
)


class Journal:
    """The node's journal. Its methods may be called from any thread; each is one transaction.

    What was read is remembered until the next write: the agent holds the folder's lock, so nobody
    else writes here, and it looks at the same few rows at every turn.
    """

    def __init__(self, path: Path, *, now: Callable[[], datetime], read_only: bool = False) -> None:
        """Open the journal; make it where there is none.

        Raises:
            NotFoundError: opened for reading, and there is none.
            CorruptStateError: the file is not a journal of this version.
        """
        if read_only and not path.exists():
            raise NotFoundError(f"{path} is missing: no agent has worked here yet")
        self._path = path
        self._now = now
        self._one_at_a_time = threading.Lock()
        self._guard = threading.Lock()
        self._memory: dict[Hashable, Any] | None = None if read_only else {}
        self._writes = 0
        self._plans: dict[Digest, Plan] = {}  # a plan never changes: parsed once
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
            raise CorruptStateError(f"{path} is not a journal of version {SCHEMA}")

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    # -- runs ------------------------------------------------------------------------------------

    def run(self, run: RunId, known: RunRecord | None = None) -> RunRecord | None:
        """What is known of a run; None before its plan was read.

        Args:
            run: its name.
            known: an earlier answer, whose plan is not parsed again: a plan never changes.
        """
        row = self._one(_RUN, of_run=run)
        if row is None:
            return None
        digest = Digest(row.plan_digest)
        stopped = Refusal(row.stopped_code, row.stopped_reason) if row.stopped_code else None
        plan = known.plan if known and known.plan_digest == digest else self._plans.get(digest)
        if plan is None:
            plan = self._plans[digest] = Plan.from_bytes(row.plan)
        return RunRecord(plan=plan, plan_digest=digest, stopped=stopped)

    def add_run(self, plan: Plan) -> None:
        """Keep the plan as it was read.

        Raises:
            EquivocationError: the run had another plan before.
        """
        values = {"plan_digest": plan.digest, "plan": plan.to_bytes()}
        with self._write() as connection:
            row = connection.execute(sa.select(_runs).where(_runs.c.run == plan.run)).first()
            if row is not None and row.plan_digest != plan.digest:
                raise EquivocationError(f"run {plan.run} had another plan before")
            if row is None:
                connection.execute(_runs.insert().values(run=plan.run, **values))
                self._note(connection, plan.run, None, "plan", {"plan": plan.digest})

    def stop_run(self, run: RunId, why: Refusal) -> None:
        """Take no further part in a run. The first reason stays."""
        with self._write() as connection:
            self._stop_run(connection, run, why)

    def _stop_run(self, connection: sa.Connection, run: RunId, why: Refusal) -> None:
        done = connection.execute(
            _runs.update()
            .where(_runs.c.run == run, _runs.c.stopped_code.is_(None))
            .values(stopped_code=why.rule, stopped_reason=why.reason)
        )
        if done.rowcount:
            detail = {"code": why.rule, "reason": why.reason}
            self._note(connection, run, None, "stopped", detail)

    # -- rounds ----------------------------------------------------------------------------------

    def round(self, round_: RoundId) -> RoundRecord | None:
        """What this node said about a round."""
        row = self._one(_ROUND, of_run=round_.run, of_number=round_.number)
        if row is None:
            return None
        return RoundRecord(
            round=round_,
            index=row.index,
            start_root=Digest(row.start_root),
            joined=row.joined,
            refusal=None if row.joined else Refusal(row.rule, row.reason),
            outcome=row.outcome,
            left=Refusal(row.code, row.outcome_reason) if row.outcome == "leave" else None,
            update=Digest(row.update_root) if row.update_root else None,
        )

    def open_rounds(self, run: RunId) -> tuple[int, ...]:
        """Numbers of the rounds this node joined, ascending."""
        query = sa.select(_rounds.c.number).where(_rounds.c.run == run, _rounds.c.joined)
        with self._errors(), self._engine.connect() as connection:
            return tuple(connection.scalars(query.order_by(_rounds.c.number)))

    def all_joined(self) -> tuple[tuple[RoundId, int], ...]:
        """Every round of every run that this node joined, and which of the plan's rounds it was."""
        position = _rounds.c.index.label("position")
        query = sa.select(_rounds.c.run, _rounds.c.number, position).where(_rounds.c.joined)
        with self._errors(), self._engine.connect() as connection:
            rows = connection.execute(query.order_by(_rounds.c.run, _rounds.c.number)).all()
        return tuple((RoundId(RunId(row.run), row.number), row.position) for row in rows)

    def made_vector(self, round_: RoundId) -> bool:
        """Whether a vector was made in any attempt: something of it may have left."""
        return self._one(sa.select(_uploads.c.attempt).where(*_is(_uploads, round_))) is not None

    def joins(self, since: datetime) -> tuple[tuple[RunId, int, datetime], ...]:
        """Rounds that were joined from a time on (UTC): run, number, when; oldest first."""
        query = (
            sa.select(_rounds.c.run, _rounds.c.number, _rounds.c.decided_at)
            .where(_rounds.c.joined, _rounds.c.decided_at >= int(since.timestamp() * 1000))
            .order_by(_rounds.c.decided_at)
        )
        with self._errors(), self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return tuple(
            (RunId(row.run), row.number, datetime.fromtimestamp(row.decided_at / 1000, UTC))
            for row in rows
        )

    def add_decision(
        self, round_: RoundId, *, index: int, start_root: Digest, refusal: Refusal | None
    ) -> RoundRecord:
        """Join a round, or decline it; the first decision stands, and is returned.

        Raises:
            EquivocationError: the round was joined from another model before.
        """
        with self._write() as connection:
            row = connection.execute(sa.select(_rounds).where(*_is(_rounds, round_))).first()
            if row is None:
                connection.execute(
                    _rounds.insert().values(
                        run=round_.run,
                        number=round_.number,
                        index=index,
                        start_root=start_root,
                        joined=refusal is None,
                        rule=refusal.rule if refusal else None,
                        reason=refusal.reason if refusal else None,
                        decided_at=self._now_ms(),
                    )
                )
                detail = (
                    {"rule": refusal.rule, "reason": refusal.reason}
                    if refusal
                    else {"model": start_root, "index": index}
                )
                what = "decline" if refusal else "join"
                self._note(connection, round_.run, round_.number, what, detail)
            elif row.joined and refusal is None and row.start_root != start_root:
                raise EquivocationError(f"round {round_} was joined from another model before")
        found = self.round(round_)
        if found is None:
            raise CorruptStateError(f"the journal lost round {round_}")
        return found

    def add_outcome(
        self,
        round_: RoundId,
        *,
        left: Refusal | None,
        detail: dict[str, Any],
        update: Digest | None = None,
    ) -> None:
        """Ready, or left with a code; the first outcome stands.

        Args:
            round_: that was joined.
            left: code and reason; None: ready.
            detail: for people.
            update: root of the update on the disk, which no other may take the place of.

        Raises:
            NotFoundError: the round was not joined.
            EquivocationError: the other outcome stands already.
        """
        outcome = "leave" if left else "ready"
        with self._write() as connection:
            row = connection.execute(sa.select(_rounds).where(*_is(_rounds, round_))).first()
            if row is None or not row.joined:
                raise NotFoundError(f"round {round_} was not joined")
            if row.outcome not in (None, outcome):
                raise EquivocationError(f"round {round_} was answered with {row.outcome} before")
            if row.outcome is None:
                connection.execute(
                    _rounds.update()
                    .where(*_is(_rounds, round_))
                    .values(
                        outcome=outcome,
                        code=left.rule if left else None,
                        outcome_reason=left.reason if left else None,
                        outcome_at=self._now_ms(),
                        update_root=update,
                    )
                )
                more = {"code": left.rule, "reason": left.reason} if left else {}
                self._note(connection, round_.run, round_.number, outcome, {**detail, **more})

    # -- uploads ---------------------------------------------------------------------------------

    def upload(self, round_: RoundId, attempt: int) -> UploadRecord | None:
        """The vector of one attempt."""
        row = self._one(_UPLOAD, of_run=round_.run, of_number=round_.number, of_attempt=attempt)
        if row is None:
            return None
        hashes = row.unit_hashes
        return UploadRecord(
            round=round_,
            attempt=attempt,
            header=row.header,
            signature=row.signature,
            unit_hashes=tuple(hashes[at : at + 32] for at in range(0, len(hashes), 32)),
            file=row.file,
            receipt=row.receipt,
        )

    def upload_files(self, run: RunId) -> dict[str, RoundId]:
        """The files in spool/uploads that the journal names for a run, and their rounds."""
        query = sa.select(_uploads.c.file, _uploads.c.run, _uploads.c.number)
        query = query.where(_uploads.c.run == run)
        with self._errors(), self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return {row.file: RoundId(RunId(row.run), row.number) for row in rows}

    def add_upload(self, record: UploadRecord, detail: dict[str, Any]) -> None:
        """Keep what will be sent.

        Raises:
            ConflictingUploadError: another header was signed for this attempt.
        """
        round_ = record.round
        where = (*_is(_uploads, round_), _uploads.c.attempt == record.attempt)
        with self._write() as connection:
            row = connection.execute(sa.select(_uploads).where(*where)).first()
            if row is not None:
                if row.header != record.header:
                    raise ConflictingUploadError(
                        f"round {round_}, attempt {record.attempt}: another vector was signed"
                        " before"
                    )
                return
            connection.execute(
                _uploads.insert().values(
                    run=round_.run,
                    number=round_.number,
                    attempt=record.attempt,
                    header=record.header,
                    signature=record.signature,
                    unit_hashes=b"".join(record.unit_hashes),
                    file=record.file,
                    made_at=self._now_ms(),
                )
            )
            self._note(connection, round_.run, round_.number, "upload", detail)

    def add_receipt(self, round_: RoundId, attempt: int, receipt: bytes) -> None:
        """Keep the coordinator's receipt."""
        where = (*_is(_uploads, round_), _uploads.c.attempt == attempt)
        with self._write() as connection:
            done = connection.execute(
                _uploads.update()
                .where(*where, _uploads.c.receipt.is_(None))
                .values(receipt=receipt, receipt_at=self._now_ms())
            )
            if done.rowcount:
                detail = {"attempt": attempt, "receipt": receipt.hex()}
                self._note(connection, round_.run, round_.number, "receipt", detail)

    # -- secure sums -----------------------------------------------------------------------------

    def stage(self, run: RunId) -> SecureKnown | None:
        """The furthest this node came in the secure sums of a run."""
        row = self._one(_STAGE, of_run=run)
        if row is None:
            return None
        round_ = RoundId(RunId(row.run), row.number)
        return SecureKnown(round=round_, attempt=row.attempt, stage=row.stage)

    def add_stage(self, reached: SecureKnown) -> None:
        """Keep that a stage was reached; an earlier one than is known changes nothing."""
        round_, attempt = reached.round, reached.attempt
        where = (*_is(_stages, round_), _stages.c.attempt == attempt)
        with self._write() as connection:
            row = connection.execute(sa.select(_stages.c.stage).where(*where)).first()
            if row is not None and RANK[row.stage] >= RANK[reached.stage]:
                return
            values = {"stage": reached.stage, "reached_at": self._now_ms()}
            if row is None:
                values |= {"run": round_.run, "number": round_.number, "attempt": attempt}
                connection.execute(_stages.insert().values(**values))
            else:
                connection.execute(_stages.update().where(*where).values(**values))
            detail = {"attempt": attempt, "stage": reached.stage}
            self._note(connection, round_.run, round_.number, "secure sum", detail)

    # -- confirms --------------------------------------------------------------------------------

    def unsent_confirms(self, run: RunId) -> tuple[RoundId, ...]:
        """Rounds whose computed model was not acknowledged by the coordinator yet, in order."""

        def read() -> tuple[RoundId, ...]:
            with self._errors(), self._engine.connect() as connection:
                numbers = connection.scalars(_UNSENT, {"of_run": run})
                return tuple(RoundId(run, number) for number in numbers)

        return self._remembered(("unsent", run), read)

    def confirm(self, round_: RoundId) -> ConfirmRecord | None:
        """What this node computed from a round's sum."""
        row = self._one(_CONFIRM, of_run=round_.run, of_number=round_.number)
        if row is None:
            return None
        return ConfirmRecord(
            round=round_,
            sum=Digest(row.sum),
            published=Digest(row.published),
            computed=Digest(row.computed) if row.computed else None,
            objection=row.objection,
            detail=row.detail,
            answered=row.answered_at is not None,
        )

    def add_confirm(self, record: ConfirmRecord, stop: Refusal | None = None) -> None:
        """Keep the outcome of the outer step; the first one stands.

        Args:
            stop: why no further part is taken in the run, from the same instant: an objection of
                a run that has stopped is still said, and a run that is objected to has stopped.

        Raises:
            EquivocationError: the round was released with another sum or model before.
        """
        round_ = record.round
        values = {
            "sum": record.sum,
            "published": record.published,
            "computed": record.computed,
            "objection": record.objection,
            "detail": record.detail,
        }
        with self._write() as connection:
            row = connection.execute(sa.select(_confirms).where(*_is(_confirms, round_))).first()
            if row is not None:
                if (row.sum, row.published) != (record.sum, record.published):
                    raise EquivocationError(f"round {round_} was released differently before")
                return
            connection.execute(
                _confirms.insert().values(
                    run=round_.run, number=round_.number, made_at=self._now_ms(), **values
                )
            )
            what = "objection" if record.objection else "confirm"
            self._note(connection, round_.run, round_.number, what, values)
            if stop is not None:
                self._stop_run(connection, round_.run, stop)

    def last_confirmed(self) -> tuple[RoundId, ...]:
        """The last round of each run whose model was confirmed, or objected to."""
        newest = sa.func.max(_confirms.c.number)
        query = sa.select(_confirms.c.run, newest).group_by(_confirms.c.run)
        query = query.where(_confirms.c.answered_at.is_not(None))
        with self._errors(), self._engine.connect() as connection:
            return tuple(RoundId(RunId(run), number) for run, number in connection.execute(query))

    def confirm_answered(self, round_: RoundId) -> None:
        """The coordinator has it."""
        with self._write() as connection:
            connection.execute(
                _confirms.update()
                .where(*_is(_confirms, round_), _confirms.c.answered_at.is_(None))
                .values(answered_at=self._now_ms())
            )

    # -- keys of other members -------------------------------------------------------------------

    def pinned_keys(self) -> dict[NodeId, str]:
        """Hex signing keys of members, as they were seen first."""
        with self._errors(), self._engine.connect() as connection:
            rows = connection.execute(sa.select(_pins.c.node, _pins.c.key)).all()
        return {NodeId(row.node): row.key for row in rows}

    def pin_keys(self, keys: Mapping[str, str]) -> None:
        """Remember keys of members not seen before; a key that is pinned never changes here.

        Raises:
            EquivocationError: a member has another key than the one that is pinned.
        """
        fresh, at = [], self._now_ms()
        with self._write() as connection:
            known = {row.node: row.key for row in connection.execute(sa.select(_pins)).all()}
            for node, key in sorted(keys.items()):
                if known.get(node, key) != key:
                    raise EquivocationError(f"{node} had another signing key before")
                if node not in known:
                    connection.execute(_pins.insert().values(node=node, key=key, seen_at=at))
                    fresh.append(node)
            if fresh:
                self._note(connection, "", None, "keys pinned", {"nodes": fresh})

    # -- entries ---------------------------------------------------------------------------------

    def note(self, what: str, detail: dict[str, Any], *, round_: RoundId | None = None) -> None:
        """Write a line for people."""
        with self._write() as connection:
            run, number = (round_.run, round_.number) if round_ else ("", None)
            self._note(connection, run, number, what, detail)

    def entries(
        self, *, after: int = 0, run: RunId | None = None, last: int | None = None
    ) -> tuple[Entry, ...]:
        """Lines with an id above ``after``, oldest first; with ``last``, only so many newest."""
        query = sa.select(_entries).where(_entries.c.id > after)
        if run is not None:
            query = query.where(_entries.c.run == run)
        query = query.order_by(_entries.c.id.desc() if last else _entries.c.id)
        with self._errors(), self._engine.connect() as connection:
            rows = connection.execute(query.limit(last) if last else query).all()
        found = tuple(
            Entry(
                id=row.id,
                at=datetime.fromtimestamp(row.at / 1000, UTC),
                run=row.run,
                number=row.number,
                what=row.what,
                detail=json.loads(row.detail),
            )
            for row in rows
        )
        return found[::-1] if last else found

    def said_ready_with(self, round_: RoundId) -> dict[str, Any]:
        """Detail of the line that says this node is ready for a round; empty: there is none."""
        query = sa.select(_entries.c.detail).where(
            _entries.c.run == round_.run,
            _entries.c.number == round_.number,
            _entries.c.what == "ready",
        )
        with self._errors(), self._engine.connect() as connection:
            row = connection.execute(query.limit(1)).first()
        found = json.loads(row.detail) if row is not None else {}
        return found if isinstance(found, dict) else {}

    # -- inside ----------------------------------------------------------------------------------

    def _now_ms(self) -> int:
        return int(self._now().timestamp() * 1000)

    def _note(
        self,
        connection: sa.Connection,
        run: str,
        number: int | None,
        what: str,
        detail: dict[str, Any],
    ) -> None:
        connection.execute(
            _entries.insert().values(
                at=self._now_ms(),
                run=run,
                number=number,
                what=what,
                detail=json.dumps(detail, sort_keys=True, ensure_ascii=False),
            )
        )

    def _one(self, query: sa.Select[Any], **values: Any) -> Any:
        """The first row of one of the queries above."""

        def read() -> Any:
            with self._errors(), self._engine.connect() as connection:
                return connection.execute(query, values).first()

        return self._remembered((query, *values.values()), read)

    def _remembered(self, key: Hashable, read: Callable[[], T]) -> T:
        """What ``read`` gives, from memory if nothing was written since it was asked last."""
        with self._guard:
            if self._memory is not None and key in self._memory:
                found: T = self._memory[key]
                return found
            writes = self._writes
        value = read()
        with self._guard:
            if self._memory is not None and writes == self._writes:
                self._memory[key] = value
        return value

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._one_at_a_time, self._errors():
            try:
                with self._engine.begin() as connection:
                    yield connection
            finally:  # committed or not: what was read meanwhile may be old
                with self._guard:
                    self._writes += 1
                    if self._memory is not None:
                        self._memory.clear()

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
                raise StorageFullError(f"no room for the journal {self._path}") from None
            if "locked" in text or "busy" in text:
                raise LedgerBusyError(f"another process holds {self._path}") from None
            raise CorruptStateError(f"the journal {self._path}: {text:.200}") from None
        except sa.exc.DatabaseError as error:
            raise CorruptStateError(f"the journal {self._path}: {error.orig!s:.200}") from None


def _is(table: sa.Table, round_: RoundId) -> tuple[sa.ColumnElement[bool], ...]:
    return (table.c.run == round_.run, table.c.number == round_.number)


def _pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a commit is on the disk before we send
    cursor.close()
