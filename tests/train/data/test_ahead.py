"""Working ahead changes nothing but time: order, values, errors; it is bounded, and it ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator

import pytest

from galore_torch.train.data.prefetch import Ahead, ordered_map
from galore_torch.train.errors import UserError


def settled(condition: object) -> bool:
    """Whether `condition()` becomes true while threads work; it has ten seconds."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.001)
    return bool(condition())  # type: ignore[operator]


@pytest.mark.parametrize("workers", [0, 1, 2, 7])
def test_results_come_in_order_though_they_are_made_out_of_order(workers: int) -> None:
    def slow_where_even(item: int) -> int:
        time.sleep(0.002 * (item % 2 == 0))
        return item * item

    assert list(ordered_map(slow_where_even, range(50), workers)) == [item * item for item in range(50)]


@pytest.mark.parametrize("workers", [1, 3])
def test_map_reads_no_further_ahead_than_it_says(workers: int) -> None:
    items = itertools.count()
    results = ordered_map(str, items, workers)
    assert next(results) == "0"
    assert next(items) == 2 * workers + 1
    results.close()


def test_error_of_the_map_is_raised_in_its_place_and_ends_the_threads() -> None:
    before = threading.active_count()
    results = ordered_map(lambda item: 1 // (3 - item), itertools.count(), 2)
    assert list(itertools.islice(results, 3)) == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before


def endless(ended: list[bool], made: list[int]) -> Generator[int, None, None]:
    try:
        for item in itertools.count():
            made.append(item)
            yield item
    finally:
        ended.append(True)


def test_ahead_is_bounded_and_close_ends_thread_and_generator() -> None:
    ended: list[bool] = []
    made: list[int] = []
    ahead = Ahead(endless(ended, made), depth=3)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert settled(lambda: len(made) == 9), "3 in the queue, one in the thread's hands"
    time.sleep(0.05)
    assert len(made) == 9
    ahead.close()
    assert ended == [True]
    assert not ahead._thread.is_alive()


def test_error_in_the_thread_is_raised_where_the_item_is_asked_for() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise UserError("file x line 2 is not JSON")

    ahead = Ahead(failing(), depth=4)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(UserError, match="line 2 is not JSON"):
            next(ahead)
    ahead.close()


def test_close_does_not_wait_for_ever_for_a_read_that_hangs() -> None:
    release = threading.Event()

    def hanging() -> Generator[int, None, None]:
        yield 1
        release.wait(60)

    ahead = Ahead(hanging(), depth=1)
    assert next(ahead) == 1
    ahead.close(patience=0.05)
    assert ahead._thread.is_alive()
    release.set()
    ahead._thread.join(10)


def test_an_end_is_an_end() -> None:
    ahead = Ahead((item for item in range(3)), depth=2)
    assert list(ahead) == [0, 1, 2]
    ahead.close()
