"""Connections to SQLite and PostgreSQL, and what their errors mean.

SQLite: WAL, ``synchronous=FULL`` (a commit is on the disk before it is answered), foreign keys on,
``BEGIN IMMEDIATE`` for whoever writes, a bounded wait for locks. PostgreSQL: READ COMMITTED with
row locks taken before anything is decided, bounded waits, snapshots for reads of several tables.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Engine, event
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from protocols.errors import (
    ConfigurationError,
    CorruptStateError,
    FederationError,
    LedgerBusyError,
    StorageFullError,
    UnreachableError,
)

BUSY_MS: Final = 5_000  # how long SQLite waits for a lock
READERS: Final = 4  # threads that read SQLite; PostgreSQL has this many more for writes
LOCK_TIMEOUT_MS: Final = 10_000  # PostgreSQL
STATEMENT_TIMEOUT_MS: Final = 30_000  # PostgreSQL
# serialization_failure, deadlock_detected: nothing was written, the same again may succeed
RETRYABLE: Final = frozenset({"40001", "40P01"})


@dataclass(frozen=True, slots=True)
class Engines:
    """One engine for transactions that write, one for those that read."""

    write: Engine
    read: Engine
    file: Path | None  # of SQLite; None: PostgreSQL

    def dispose(self) -> None:
        """Close every connection."""
        self.write.dispose()
        self.read.dispose()


def connect(url: str) -> Engines:
    """Prepare engines for a ledger; nothing is opened yet.

    Args:
        url: ``sqlite:////absolute/path`` or ``postgresql+psycopg://…``.

    Raises:
        ConfigurationError: another kind of database, or no URL. Never repeats a password.
    """
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise ConfigurationError("ledger.url is not a database URL") from None
    match parsed.get_backend_name():
        case "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise ConfigurationError("ledger.url must name a file: sqlite:///ledger.sqlite")
            return _sqlite(Path(parsed.database))
        case "postgresql":
            return _postgresql(parsed.set(drivername="postgresql+psycopg"))
        case other:
            raise ConfigurationError(f"ledger.url: {other} is neither sqlite nor postgresql")


def _sqlite(file: Path) -> Engines:
    def engine(*, begin: str, size: int, query_only: bool) -> Engine:
        made = sa.create_engine(
            sa.URL.create("sqlite", database=str(file)),
            poolclass=sa.QueuePool,
            pool_size=size,
            max_overflow=0,
            pool_timeout=BUSY_MS / 1000,
            connect_args={"check_same_thread": False, "timeout": BUSY_MS / 1000},
        )

        def on_connect(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # we say BEGIN ourselves
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute(f"PRAGMA query_only={'ON' if query_only else 'OFF'}")
            cursor.close()

        def on_begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql(begin)

        event.listen(made, "connect", on_connect)
        event.listen(made, "begin", on_begin)
        return made

    return Engines(
        write=engine(begin="BEGIN IMMEDIATE", size=1, query_only=False),
        read=engine(begin="BEGIN", size=READERS, query_only=True),
        file=file,
    )


def _postgresql(url: sa.URL) -> Engines:
    settings = {
        "lock_timeout": LOCK_TIMEOUT_MS,
        "statement_timeout": STATEMENT_TIMEOUT_MS,
        # A process that stops in the middle of a transaction must not hold its rows for ever.
        "idle_in_transaction_session_timeout": STATEMENT_TIMEOUT_MS,
        "timezone": "UTC",
    }
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    write = sa.create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=2 * READERS,
        max_overflow=0,
        pool_timeout=BUSY_MS / 1000,
        pool_pre_ping=True,
        connect_args={"options": options, "connect_timeout": 5},
    )
    read = write.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return Engines(write=write, read=read, file=None)


def is_retryable(error: BaseException) -> bool:
    """Whether PostgreSQL asks to try the same transaction again."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in RETRYABLE


@contextmanager
def ledger_errors() -> Iterator[None]:
    """Turn what a database driver raises into what a caller can act on.

    Errors that mean a bug (a constraint that our own checks should have kept) pass through.
    """
    try:
        yield
    except FederationError:
        raise
    except PoolTimeoutError:
        raise LedgerBusyError("the ledger is busy") from None
    except DBAPIError as error:
        known = _meaning(error)
        if known is None:
            raise
        raise known from error


def _meaning(error: DBAPIError) -> FederationError | None:
    original = error.orig
    if isinstance(original, sqlite3.Error):
        return _sqlite_meaning(getattr(original, "sqlite_errorname", ""), str(original))
    state = getattr(original, "sqlstate", None) or ""
    if state in RETRYABLE or state in {"55P03", "57014", "53300"}:
        return LedgerBusyError("the ledger's database is busy")
    if state in {"53100", "53200"}:
        return StorageFullError("no room in the ledger's database", retry_after_s=10.0)
    if state in {"XX001", "XX002"}:
        return CorruptStateError("the ledger's database says that its own files are damaged")
    if error.connection_invalidated or not state or state[:2] in {"08", "57"}:
        return UnreachableError("the ledger's database does not answer")
    return None


def _sqlite_meaning(name: str, message: str) -> FederationError | None:
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return LedgerBusyError("another process is writing to the ledger")
    if name == "SQLITE_FULL" or "disk is full" in message:
        return StorageFullError("no room for the ledger", retry_after_s=10.0)
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return CorruptStateError("the ledger's file is damaged")
    if name.startswith("SQLITE_CANTOPEN"):
        return ConfigurationError("the ledger's file cannot be opened")
    return None
