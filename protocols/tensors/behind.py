"""Work that follows behind other work, in a thread of its own, as often as it finds time.

Made for syncing a file while it is still being written, so that little is left to do at its end.
What the work is, is an argument: nothing here touches a disk.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock


class Behind:
    """Repeats ``work`` in a thread, at most one call at a time.

    Args:
        work: covers everything that was there when it began.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._last: Future[None] | None = None
        self._failed: BaseException | None = None
        self._guard = Lock()

    def more(self) -> None:
        """There is more to do. Does not wait; may be called from several threads."""
        with self._guard:
            if self._last is None or self._last.done():
                self._collect()
                self._last = self._pool.submit(self._work)

    def finish(self) -> None:
        """Do the work once more and return when everything is covered.

        Raises:
            Exception: the first that any call raised. Linux tells each failed write-back once per
                descriptor, so a last sync that succeeds proves nothing about the ones before it.
        """
        with self._guard:
            self._collect()
            if self._failed is not None:
                raise self._failed
            self._work()

    def close(self) -> None:
        """Wait for what is under way; there is no more to come."""
        self._pool.shutdown()

    def _collect(self) -> None:
        if self._last is not None:
            self._failed = self._failed or self._last.exception()
            self._last = None
