"""Following the run: the coordinator's history as it happens, its facts twice a second.

A thread reads the history stream and asks again when it breaks; everything that acts (looking at
the children, killing, drawing) happens in the caller's thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Self

from infra.runs.client import AdminClient
from infra.runs.facts import RunReport
from protocols.errors import NotReadyError
from protocols.gen import admin_pb2
from protocols.identifiers import RunId

LOOK_S: Final = 0.5
_AGAIN_S: Final = 0.2
_PATIENCE_S: Final = 60.0  # without any answer from the coordinator

Entry = admin_pb2.HistoryEntry


class History:
    """The history of a run, entry by entry, over lost connections."""

    def __init__(self, connect: Callable[[], AdminClient], run: RunId) -> None:
        self._connect = connect
        self._run = run
        self._entries: queue.Queue[Entry] = queue.Queue()
        self._over = threading.Event()
        self._client: AdminClient | None = None
        self._thread = threading.Thread(target=self._read, name="history", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._client is not None:
            self._client.close()
        self._thread.join(timeout=5)

    def next(self, *, timeout_s: float) -> Entry | None:
        """The next entry; None if there is none in time."""
        try:
            return self._entries.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _read(self) -> None:
        after = 0
        while not self._over.is_set():
            try:
                with self._connect() as self._client:
                    for entry in self._client.watch(self._run, after=after):
                        after = int(entry.id)
                        self._entries.put(entry)
            except (NotReadyError, ValueError):  # away, or closed by us
                self._over.wait(_AGAIN_S)
            else:
                return  # the run has ended


def follow(
    client: AdminClient,
    run: RunId,
    history: History,
    *,
    check: Callable[[], None],
    on_entry: Callable[[Entry], None],
    monotonic: Callable[[], float] = time.monotonic,
) -> Iterator[RunReport]:
    """Reports until the run has ended, at least every half second while somebody answers.

    Args:
        client: asked for the run's facts.
        run: what is followed.
        history: its entries are handed to ``on_entry`` at once.
        check: called at each look; raises when a child died.
        on_entry: may act; called from this thread.
        monotonic: seconds.

    Raises:
        NotReadyError: nobody answered for a minute.
    """
    answered = looked = monotonic()
    while True:
        entry = history.next(timeout_s=max(0.02, looked + LOOK_S - monotonic()))
        if entry is not None:
            on_entry(entry)
        if monotonic() - looked < LOOK_S:
            continue
        looked = monotonic()
        check()
        try:
            report = client.show(run)
        except NotReadyError:
            if monotonic() - answered > _PATIENCE_S:
                raise
            continue
        answered = monotonic()
        yield report
        if report.ended:
            return
