"""Apply a function to a stream in several processes, results in the stream's order, and never hang.

`multiprocessing.Pool` waits for ever when a worker is killed, since the lost item never returns. Here the parent
talks to each worker over a pipe of its own: a dead worker closes its pipe, which ends the run with an error, and
a dead parent closes all pipes, which ends the workers.
"""

from __future__ import annotations

import fcntl
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from megatron_let.errors import LetError

Item = TypeVar("Item")
Result = TypeVar("Result")

# How far the reading may run ahead of a slow item, in items per worker and in size altogether: bounds what is held.
_LEAD_PER_WORKER = 4
_LEAD_SIZE = 1 << 28
# A block fits: the sender need not wait for the receiver to have time. What Linux lets any program have.
_PIPE_BYTES = 1 << 20


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    *,
    size_of: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order; with one worker in this very process.

    `function` must be picklable. Workers are started afresh (not forked), so threads here do no harm. Items of large
    `size_of` (bytes) are handed out one after another rather than all at once.

    Raises:
        LetError: a worker died or the function failed; the message says which.
    """
    if num_workers == 1:
        for item in items:
            try:
                result = function(item)
            except Exception as error:
                raise LetError(_failed(error)) from error
            yield result
        return
    team = _Team[Item, Result](function, num_workers, size_of)
    try:
        yield from team.run(items)
    finally:
        team.stop()


@dataclass(frozen=True)
class _Worker:
    """One process, and our ends of its two pipes."""

    process: BaseProcess
    items: Connection
    answers: Connection


class _Team(Generic[Item, Result]):
    """The worker processes of one call and what each is busy with."""

    def __init__(
        self, function: Callable[[Item], Result], num_workers: int, size_of: Callable[[Item], int]
    ) -> None:
        context = get_context("spawn")
        self._size_of = size_of
        self._workers = [_start(context, function) for _ in range(num_workers)]
        self._idle = list(self._workers)
        self._busy: dict[Connection, tuple[_Worker, int]] = {}
        """By the pipe that the answer comes through: who works, on which item."""

    def run(self, items: Iterable[Item]) -> Iterator[Result]:
        """Hand out the items and yield the results in order."""
        stream = enumerate(items)
        results: dict[int, Result] = {}
        sizes: dict[int, int] = {}  # of the items whose results are not yielded yet
        next_result, is_exhausted = 0, False
        while True:
            while self._idle and not is_exhausted and self._has_room(sizes):
                entry = next(stream, None)
                if entry is None:
                    is_exhausted = True
                    break
                sizes[entry[0]] = self._size_of(entry[1])
                self._send(*entry)
            if is_exhausted and not sizes:
                return
            results.update(self._receive())
            while next_result in results:
                yield results.pop(next_result)
                del sizes[next_result]
                next_result += 1

    def stop(self) -> None:
        """End every worker, working or not."""
        for worker in self._workers:
            worker.items.close()
            worker.answers.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def _has_room(self, sizes: Mapping[int, int]) -> bool:
        return len(sizes) < _LEAD_PER_WORKER * len(self._workers) and sum(sizes.values()) < _LEAD_SIZE

    def _send(self, index: int, item: Item) -> None:
        worker = self._idle.pop()
        self._busy[worker.answers] = worker, index
        try:
            worker.items.send(item)
        except (BrokenPipeError, ConnectionResetError):
            raise _death_of(worker.process) from None

    def _receive(self) -> dict[int, Result]:
        """Wait until at least one busy worker answers and return the answers by item number."""
        answers: dict[int, Result] = {}
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            worker, index = self._busy[connection]
            try:
                failure, answer = connection.recv()
            except (EOFError, ConnectionResetError):
                raise _death_of(worker.process) from None
            if failure:
                raise LetError(failure)
            answers[index] = answer
            del self._busy[connection]
            self._idle.append(worker)
        return answers


def _start(context: SpawnContext, function: Callable[[Any], Any]) -> _Worker:
    """Start a process that answers items. Two one-way pipes: unlike sockets, they can be made large."""
    their_items, our_items = context.Pipe(duplex=False)
    our_answers, their_answers = context.Pipe(duplex=False)
    for end in (our_items, their_answers):
        with suppress(OSError, AttributeError):  # the system's limit is lower, or it is not Linux
            fcntl.fcntl(end.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    process = context.Process(target=_work, args=(their_items, their_answers, function), daemon=True)
    process.start()
    their_items.close()  # so that the worker's death shows as the end of our sides
    their_answers.close()
    return _Worker(process, our_items, our_answers)


def _death_of(process: BaseProcess) -> LetError:
    process.join(timeout=5)
    code = process.exitcode
    cause = (
        f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with code {code}"
    )
    return LetError(
        f"a worker process ended {cause} (the system does this when memory runs out); nothing was written over, and "
        "the same command goes on where this one stopped, with fewer --workers if memory is short"
    )


def _failed(error: Exception) -> str:
    if isinstance(error, LetError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"a worker failed: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"


def _work(items: Connection, answers: Connection, function: Callable[[Any], Any]) -> None:
    """Answer items until the pipe closes: (failure, result), where failure is empty when all went well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run, once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: --workers is the number of cores
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            item = items.recv()
            try:
                answer = ("", function(item))
            except Exception as error:
                answer = (_failed(error), None)
            del item  # the answer is copied on its way: a huge item must not be held beside both
            answers.send(answer)
