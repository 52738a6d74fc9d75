"""Work on numbered pieces in several threads, with the results in order.

numpy, hashlib and OpenSSL release the interpreter lock, so threads over pieces scale. A piece
depends on nothing but its number, so the answer is the same for any number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")
Scratch = TypeVar("Scratch")


def ordered_map(
    work: Callable[[int, Scratch], Result],
    count: int,
    make_scratch: Callable[[], Scratch],
    *,
    threads: int = 1,
) -> Iterator[Result]:
    """``work(0, s), work(1, s), ...`` in order.

    Args:
        work: called with a number and a scratch object that no other call uses at that time.
        count: numbers from 0 to count - 1.
        make_scratch: called once for each thread.
        threads: at most so many calls run at once; at most ``threads + 1`` results wait, so memory
            does not grow with ``count``.
    """
    if threads <= 1 or count <= 1:
        scratch = make_scratch()
        for index in range(count):
            yield work(index, scratch)
        return

    free: SimpleQueue[Scratch] = SimpleQueue()
    for _ in range(min(threads, count)):
        free.put(make_scratch())

    def call(index: int) -> Result:
        mine = free.get()
        try:
            return work(index, mine)
        finally:
            free.put(mine)

    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(min(threads, count)) as pool:
        try:
            for index in range(count):
                waiting.append(pool.submit(call, index))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # an error, or a consumer that stopped early
                future.cancel()
