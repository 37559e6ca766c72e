"""Work ahead of who needs it, in threads: order and values are those of working in place, whatever the number of threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, Queue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """function(item) of each item in order, `workers` at once; at most twice as many wait. 0: in place."""
    if not workers:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    try:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Ahead(Generic[T]):
    """The items of a generator, made by a thread of its own, at most `depth` before they are asked for.

    What the generator raises is raised by `next`. `close` ends the thread and the generator.
    """

    def __init__(self, items: Generator[T, None, None], depth: int) -> None:
        self._ready: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        # A daemon: a read that hangs in the network must not keep the process.
        self._thread = threading.Thread(target=self._work, args=(items,), name="loader", daemon=True)
        self._thread.start()

    def _work(self, items: Generator[T, None, None]) -> None:
        try:
            for item in items:
                self._ready.put((item, None))
                if self._closed.is_set():
                    return
            raise StopIteration
        except BaseException as error:
            self._ready.put((None, error))
        finally:
            items.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._error is None:
            item, self._error = self._ready.get()
            if self._error is None:
                return item  # type: ignore[return-value]
        raise self._error

    def close(self, patience: float = 5.0) -> None:
        """Ask the thread to end, and wait for it for at most `patience` seconds."""
        self._closed.set()
        waited: Any = 0.0
        while self._thread.is_alive() and waited < patience:
            try:
                self._ready.get_nowait()  # a thread that waits for room sees the end
            except Empty:
                self._thread.join(0.01)
                waited += 0.01
