"""The ledger: transactions in worker threads, and news of what was committed.

``run`` gives a function an open transaction; when the function returns, its history is written and
all of it is committed, or nothing is. Whoever waits in ``changed`` is woken by a commit of this
process at once; commits of other processes are seen by one shared look at the version, a few times
a second, however many wait.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from sqlalchemy import Connection

from coordinator.clock import Clock
from coordinator.ledger import migrate
from coordinator.ledger.engine import READERS, Engines, connect, is_retryable, ledger_errors
from coordinator.ledger.sequencer import Sequencer
from coordinator.ledger.tx import Tx
from protocols.errors import FederationError, LedgerBusyError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

POLL_S: Final = 0.2  # how often other processes' commits are looked for
RETRIES: Final = 6  # of a transaction that PostgreSQL asks to repeat
SLOW_S: Final = 1.0  # a transaction that takes longer is mentioned in the diagnostics


class Ledger:
    """One ledger, as one process sees it.

    Args:
        url: ``sqlite:////absolute/path`` or ``postgresql+psycopg://…``.
        clock: for transactions whose caller gives no time.
        sequencer: orders the round log; None: this federation keeps none.
    """

    def __init__(self, url: str, *, clock: Clock, sequencer: Sequencer | None = None) -> None:
        self._clock = clock
        self._sequencer = sequencer
        self._engines: Engines = connect(url)
        # SQLite has one writer: a queue in front of it instead of threads that wait for its lock.
        writers = 1 if self._engines.file else READERS
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="ledger-write")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="ledger-read")
        self._lock_file: int | None = None
        self._closing = threading.Event()
        self._poller: threading.Thread | None = None
        self._guard = threading.Lock()  # of the two below
        self._version = 0
        self._waiting: set[asyncio.Future[None]] = set()

    # -- opening and closing -----------------------------------------------------------------

    async def open(self) -> Self:
        """Take the file, bring the tables up to date, begin to listen.

        Raises:
            LedgerBusyError: another process holds this SQLite file.
            UnreachableError: PostgreSQL does not answer.
            ConfigurationError: the ledger was written by another version, or cannot be opened.
        """
        try:
            await asyncio.to_thread(self._open)
        except BaseException:
            await self.close()
            raise
        return self

    def _open(self) -> None:
        if self._engines.file is not None:
            self._lock_file = _take_file(self._engines.file)
        with ledger_errors(), self._engines.write.begin() as connection:
            migrate.upgrade(connection)
            if self._engines.file is not None:
                # We hold the file, so whoever held a lease is gone: nobody need wait for it.
                Tx(connection, "open", self._clock.now()).void_leases()
        self._version = self._read("open", Tx.version)
        if self._engines.file is None:
            self._poller = threading.Thread(target=self._poll, name="ledger-poll", daemon=True)
            self._poller.start()

    async def close(self) -> None:
        """Finish what runs, then let go of the database. Later calls are not ready."""
        self._closing.set()
        self._advance(self._version, closing=True)
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writers.shutdown()
        self._readers.shutdown()
        if self._poller is not None:
            self._poller.join()
            self._poller = None
        self._engines.dispose()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def logs(self) -> bool:
        """Whether this federation keeps a round log."""
        return self._sequencer is not None

    # -- transactions ------------------------------------------------------------------------

    async def run(self, name: str, work: Callable[[Tx], Result]) -> Result:
        """Run one transaction.

        It is finished even if the caller stops waiting. On PostgreSQL ``work`` may be called again
        after a conflict, so it must not do anything but use its transaction.

        Args:
            name: for history and diagnostics, e.g. ``join``.
            work: called in a worker thread with the open transaction.

        Raises:
            LedgerBusyError, StorageFullError, UnreachableError: nothing was acknowledged.
            Whatever ``work`` raises; then nothing was written.
        """
        return await self._submit(self._writers, self._write, name, work)

    async def read(self, name: str, work: Callable[[Tx], Result]) -> Result:
        """Look at one consistent state; ``work`` must not write."""
        return await self._submit(self._readers, self._read, name, work)

    async def _submit(
        self,
        threads: ThreadPoolExecutor,
        call: Callable[[str, Callable[[Tx], Result]], Result],
        name: str,
        work: Callable[[Tx], Result],
    ) -> Result:
        if self._closing.is_set():
            raise LedgerBusyError("the coordinator is stopping")
        return await asyncio.get_running_loop().run_in_executor(threads, call, name, work)

    def _write(self, name: str, work: Callable[[Tx], Result]) -> Result:
        began = time.monotonic()
        for tries_left in reversed(range(RETRIES)):
            try:
                with ledger_errors(), self._engines.write.begin() as connection:
                    tx = self._tx(connection, name)
                    result = work(tx)
                    version = tx.write_history()
                break
            except FederationError as error:
                if not tries_left or not is_retryable(error.__cause__ or error):
                    raise
                time.sleep(0.002 * 2 ** (RETRIES - tries_left))
        if version is not None:
            self._advance(version)
        took = time.monotonic() - began
        if took > SLOW_S:
            logger.warning("transaction %s took %.1f s", name, took)
        return result

    def _read(self, name: str, work: Callable[[Tx], Result]) -> Result:
        with ledger_errors(), self._engines.read.begin() as connection:
            return work(self._tx(connection, name))

    def _tx(self, connection: Connection, name: str) -> Tx:
        tx = Tx(connection, name, self._clock.now())
        tx.sequencer = self._sequencer
        return tx

    # -- news --------------------------------------------------------------------------------

    def version(self) -> int:
        """The last entry of history that this process knows of."""
        return self._version

    async def changed(self, after: int, timeout: float) -> int:  # noqa: ASYNC109 - a long poll
        """Wait until history goes beyond entry ``after``.

        Args:
            after: the last entry the caller knows.
            timeout: seconds; then the answer may be ``after`` or less.

        Returns:
            The last entry now.

        Raises:
            LedgerBusyError: the ledger is closed. Who waits while it closes is let go.
        """
        if self._closing.is_set():
            raise LedgerBusyError("the coordinator is stopping")
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            with self._guard:
                if self._version > after or self._closing.is_set():
                    break
                self._waiting.add(future)
            try:
                async with asyncio.timeout(left):
                    await future
            except TimeoutError:
                break
            finally:
                with self._guard:
                    self._waiting.discard(future)
        return self._version

    def _advance(self, version: int, *, closing: bool = False) -> None:
        """Called from any thread when history grew."""
        with self._guard:
            if version <= self._version and not closing:
                return
            self._version = version
            waiting, self._waiting = self._waiting, set()
        for future in waiting:
            with suppress(RuntimeError):  # the loop of who waited is closed
                future.get_loop().call_soon_threadsafe(_wake, future)

    def _poll(self) -> None:
        """See what other processes committed."""
        reachable = True
        while not self._closing.wait(POLL_S):
            try:
                self._advance(self._read("poll", Tx.version))
            except FederationError as error:
                if reachable:
                    logger.warning("%s", error)
                reachable = False
            else:
                reachable = True


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _take_file(file: Path) -> int:
    """Hold the lock file beside a SQLite ledger as long as this process lives.

    Raises:
        LedgerBusyError: another process holds it.
    """
    lock = file.with_name(file.name + ".lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise LedgerBusyError(
            f"another coordinator holds {file.name}; two need PostgreSQL", retry_after_s=5.0
        ) from None
    return handle
