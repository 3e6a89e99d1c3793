"""Ordered work in several processes: order kept, failures loud, nothing waits for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from megatron_let.data.workers import map_in_order
from megatron_let.errors import LetError


def slow_if_small(item: int) -> tuple[int, int]:
    time.sleep(0.05 if item % 5 == 0 else 0)
    return item, os.getpid()


def slow_at_zero(item: int) -> int:
    time.sleep(1 if item == 0 else 0)
    return item


def fail_at_three(item: int) -> int:
    if item == 3:
        raise KeyError("three")
    return item


def fail_with_a_message(item: int) -> int:
    raise LetError("for people")


def killed_at_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def leave_at_three(item: int) -> int:
    if item == 3:
        os._exit(7)
    return item


def large(item: int) -> bytes:
    return bytes([item]) * 3_000_000


def test_results_come_in_order_from_several_processes() -> None:
    results = list(map_in_order(slow_if_small, range(40), 2))
    assert [item for item, _ in results] == list(range(40))
    processes = {process for _, process in results}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_one_worker_is_this_process_and_takes_items_one_by_one() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(5):
            taken.append(item)
            yield item

    results = map_in_order(slow_if_small, items(), 1)
    assert next(iter(results)) == (0, os.getpid())
    assert taken == [0]


def test_messages_larger_than_a_pipe_do_not_lock_up() -> None:
    assert [result[0] for result in map_in_order(large, range(8), 2)] == list(range(8))


def test_reading_does_not_run_far_ahead_of_a_slow_item() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(200):
            taken.append(item)
            yield item

    results = map_in_order(slow_at_zero, items(), 2)
    assert next(iter(results)) == 0
    assert len(taken) <= 2 * 4 + 2
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_message_for_people_comes_through_as_it_is(num_workers: int) -> None:
    with pytest.raises(LetError, match=r"^for people$"):
        list(map_in_order(fail_with_a_message, range(5), num_workers))
    with pytest.raises(LetError, match=r"^a worker failed: KeyError: 'three' \(.*test_workers\.py:\d+\)$"):
        list(map_in_order(fail_at_three, range(5), num_workers))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_at_three, "a worker failed: KeyError: 'three'"),
        (killed_at_three, "by signal SIGKILL"),
        (leave_at_three, "with code 7"),
    ],
)
def test_a_failed_or_dead_worker_ends_the_run_at_once(function: object, message: str) -> None:
    with pytest.raises(LetError, match=message) as caught:
        list(map_in_order(function, range(1_000_000), 2))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_an_error_while_reading_comes_through_and_ends_the_workers() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("cannot read on")

    with pytest.raises(ValueError, match="cannot read on"):
        list(map_in_order(slow_if_small, items(), 2))
