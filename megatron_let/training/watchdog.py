"""Who holds the run up: each rank notes where it stands, and one line names the rank that is behind.

The notes travel through the store at which the ranks met, from a thread of their own: collectives that hang do not
hinder them. A rank that has stopped altogether is known by its silence.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megatron_let.config.parallel import ParallelConfig
from megatron_let.errors import LetError
from megatron_let.log import FROM_EVERY_RANK, LOGGER

PHASES = ("start", "forward-backward", "optimizer", "log", "evaluation", "save", "end")
"""What an iteration consists of, in order; "data" lies within any of them."""

_BEATS_PER_LIMIT = 12
_MAX_BEAT_SECONDS = 5.0
_SILENT_BEATS = 4
_VERDICT = "verdict"
_WAITING = ("torch/distributed/", "megatron/core/distributed/", "megatron/core/pipeline_parallel/")
"""Where the Python code lies from which a rank waits for others."""


class StalledError(LetError):
    """The ranks' time limit struck; the line names the rank that the others waited for."""


class Heartbeat:
    """Where this rank stands: noted by the start and the training loop, read by the watchdog's thread."""

    def __init__(self) -> None:
        self.stage: int | None = None
        """Its pipeline stage, once it is known."""
        self.iteration = 0
        self.phase = PHASES[0]
        self.is_reading = False
        self.since = time.monotonic()
        self.finished = self.since
        self._seconds: deque[float] = deque(maxlen=20)

    def begin(self, iteration: int) -> None:
        """Note the start of an iteration."""
        if not self._seconds:
            self.finished = time.monotonic()  # what came before it was no iteration
        self.iteration = iteration
        self.enter("forward-backward")

    def enter(self, phase: str) -> None:
        """Note that a phase begins, one of `PHASES`."""
        self.phase = phase
        self.touch()

    def touch(self) -> None:
        """Note that something has moved."""
        self.since = time.monotonic()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Note that this rank waits for its data, inside whatever phase it is in."""
        self.is_reading = True
        self.touch()
        yield  # not taken back after an error: it is what the rank did last
        self.is_reading = False
        self.touch()

    def finish(self) -> None:
        """Note the end of an iteration, checkpoint and validation included."""
        now = time.monotonic()
        self._seconds.append(now - self.finished)
        self.finished = now
        self.enter("end")

    def usual_seconds(self) -> float:
        """Return the median time of an iteration, 0 before the first."""
        seconds = list(self._seconds)
        return statistics.median(seconds) if seconds else 0.0


@dataclass(frozen=True)
class Position:
    """What a rank publishes of itself."""

    beat: int  # counts up: a rank whose count stands still is silent
    stage: int | None
    iteration: int
    phase: str
    is_reading: bool
    seconds: float  # since it entered the phase
    place: str  # the Python function that its main thread is in
    is_waiting: bool  # for other ranks, as far as that place tells

    def order(self) -> tuple[int, int, bool, bool]:
        """Return the key by which the rank that is furthest behind comes first."""
        return self.iteration, PHASES.index(self.phase), not self.is_reading, self.is_waiting

    def named(self, rank: int) -> str:
        """Return the rank with its stage."""
        return f"rank {rank}" if self.stage is None else f"rank {rank} (stage {self.stage})"

    def is_starting(self) -> bool:
        """Return whether the first iteration has not begun."""
        return self.phase == PHASES[0]

    def text(self) -> str:
        """Return where the rank is, in words."""
        if self.is_starting():
            return "at the start"
        phase = f"data ({self.phase})" if self.is_reading else self.phase
        return f'at "{phase}" of iteration {self.iteration}'


def stall_line(positions: dict[int, Position | None], silent: dict[int, float], seconds: float) -> str:
    """Return the line that names the rank that is behind; None stands for a rank that has published nothing yet.

    `silent`: ranks whose notes have stopped coming, with the seconds since.
    """
    known = {rank: position for rank, position in positions.items() if position is not None}
    is_start = any(position.is_starting() for position in known.values())
    begin = f"no iteration has {'begun' if is_start else 'finished'} for {seconds:.0f} s: "
    missing = [rank for rank, position in positions.items() if position is None]
    if missing:
        return f"{begin}{_ranks(missing)} did not come to where the ranks meet"
    heard = {rank: position for rank, position in known.items() if rank not in silent}
    if silent:
        said = [
            f"{known[rank].named(rank)} has not been heard from for {quiet:.0f} s, last {known[rank].text()}"
            for rank, quiet in sorted(silent.items(), key=lambda item: known[item[0]].order())[:4]
        ]
        more = f" and {len(silent) - 4} more ranks" if len(silent) > 4 else ""
        return f"{begin}{', '.join(said)}{more}{_others(list(heard.values()))}"
    least = min(position.order() for position in heard.values())
    behind = [rank for rank, position in heard.items() if position.order() == least]
    slowest = max(behind, key=lambda rank: heard[rank].seconds)
    position = heard[slowest]
    stands = f"{position.text()} for {position.seconds:.0f} s, in {position.place}"
    if len(behind) == len(heard):
        everyone = f"all {len(heard)} ranks are" if len(heard) > 1 else "the rank is"
        return f"{begin}{everyone} {stands}"
    others = _others([other for rank, other in heard.items() if rank not in behind])
    who = f"{_ranks(behind)} are" if len(behind) > 1 else f"{position.named(slowest)} is"
    return f"{begin}{who} {stands}{others}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"


def _others(others: list[Position]) -> str:
    if not others:
        return ""
    texts = sorted({f"{other.text()}, in {other.place}" for other in others})
    return f"; the others wait {texts[0]}" + (", and elsewhere" if len(texts) > 1 else "")


class Watchdog:
    """Publishes this rank's position, and on a few ranks watches all of them."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        limit: float,
        ceiling: float,
    ) -> None:
        """Make the watchdog of this rank; `limit` and `ceiling` in seconds: see `_limit`."""
        self._heartbeat, self._store = heartbeat, store
        self._rank, self._world_size = rank, world_size
        self._least, self._ceiling = limit, ceiling
        self._beat_seconds = min(_MAX_BEAT_SECONDS, min(limit, ceiling) / _BEATS_PER_LIMIT)
        self._main = threading.main_thread().ident
        self._beat = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._reported: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        # Any of these may be the one that has stopped; the first that has not speaks.
        last = world_size - 1
        self._watchers = sorted({0, min(1, last), last // 2, last})

    def start(self) -> None:
        """Publish the first position and begin to watch."""
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        """End the watching."""
        self._stop.set()
        self._thread.join(timeout=10.0)

    def verdict(self) -> str | None:
        """Return the line about the stall that is going on, None when there is none or nobody can be asked."""
        try:
            return self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else None
        except RuntimeError:  # the meeting point is gone: the error at hand is said as it is
            return None

    def _limit(self) -> float:
        """Return the seconds without an iteration that are worth a line: five usual ones, in time before a time limit."""
        return min(max(self._least, 5 * self._heartbeat.usual_seconds()), self._ceiling)

    def _run(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            try:
                self._publish()
                if self._rank in self._watchers:
                    self._watch()
            except RuntimeError as error:
                # The meeting point is gone, with the launcher or the first node: there is nobody to watch.
                if self._standing() > self._limit():
                    LOGGER.warning(f"the ranks' store does not answer: {error}", extra=FROM_EVERY_RANK)
                return

    def _standing(self) -> float:
        """Return the seconds since anything was noted here."""
        return time.monotonic() - self._heartbeat.since

    def _publish(self) -> None:
        heartbeat = self._heartbeat
        self._beat += 1
        place, is_waiting = _place(sys._current_frames().get(self._main or 0))
        position = Position(
            beat=self._beat,
            stage=heartbeat.stage,
            iteration=heartbeat.iteration,
            phase=heartbeat.phase,
            is_reading=heartbeat.is_reading,
            seconds=self._standing(),
            place=place,
            is_waiting=is_waiting,
        )
        self._store.set(str(self._rank), json.dumps(asdict(position)))

    def _watch(self) -> None:
        standing, limit = self._standing(), self._limit()
        if standing < limit / 2:
            self._go_on()
            return
        positions = self._read()
        silent = self._silent(positions)
        speaker = next((rank for rank in self._watchers if rank not in silent), None)
        if standing < limit or speaker != self._rank:
            return
        line = stall_line(positions, silent, time.monotonic() - self._heartbeat.finished)
        self._store.set(_VERDICT, line)
        if self._reported is None or standing >= 2 * self._reported:
            self._reported = standing
            LOGGER.warning(line, extra=FROM_EVERY_RANK)

    def _go_on(self) -> None:
        self._seen.clear()
        if self._reported is not None:
            self._reported = None
            self._store.set(_VERDICT, "")
            LOGGER.warning("the ranks go on", extra=FROM_EVERY_RANK)

    def _read(self) -> dict[int, Position | None]:
        """Return the position of every rank that has one."""
        ranks = range(self._world_size)
        there = [rank for rank in ranks if self._store.check([str(rank)])]
        texts = self._store.multi_get([str(rank) for rank in there])
        known = {rank: Position(**json.loads(text)) for rank, text in zip(there, texts, strict=True)}
        return {rank: known.get(rank) for rank in ranks}

    def _silent(self, positions: dict[int, Position | None]) -> dict[int, float]:
        """Return the ranks whose count has stood still for some beats, with the seconds (by this rank's clock)."""
        now, silent = time.monotonic(), {}
        for rank, position in positions.items():
            if position is None:
                continue
            beat, since = self._seen.setdefault(rank, (position.beat, now))
            if beat != position.beat:
                self._seen[rank] = (position.beat, now)
            elif now - since > _SILENT_BEATS * self._beat_seconds:
                silent[rank] = now - since
        return silent


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Return where a thread is, in words, and whether that is a place where one waits for other ranks."""
    if frame is None:
        return "?", False
    path = frame.f_code.co_filename.replace("\\", "/")
    is_waiting = any(part in path for part in _WAITING)
    return f"{frame.f_code.co_name} ({Path(path).name}:{frame.f_lineno})", is_waiting


class Watch:
    """The watching of one run, from before its ranks meet to its end (`--watchdog-seconds`; 0: none)."""

    def __init__(self, config: ParallelConfig) -> None:
        self.heartbeat = Heartbeat()
        self._config = config
        self._watchdog: Watchdog | None = None

    @contextmanager
    def over(self, store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
        """Watch over the ranks that meet at a store inside the context; every rank enters it.

        Raises:
            StalledError: as `explained`.
        """
        if self._config.watchdog_seconds == 0:
            yield
            return
        self._watchdog = Watchdog(
            self.heartbeat,
            dist.PrefixStore("watchdog", store.clone()) if world_size > 1 else dist.HashStore(),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            limit=self._config.watchdog_seconds,
            ceiling=self._config.distributed_timeout_minutes * 60 / 2,
        )
        self._watchdog.start()
        try:
            with self.explained():
                yield
        finally:
            self._watchdog.stop()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Name the rank that is behind when a collective or a meeting inside the context runs into its time limit.

        Raises:
            StalledError: it did, and such a rank is known.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            is_late = "timed out" in text or "timeout" in text
            verdict = self._watchdog.verdict() if is_late and self._watchdog is not None else None
            if not verdict:
                raise
            raise StalledError(
                f"the ranks' time limit (--distributed-timeout-minutes) has struck; {verdict}"
            ) from error
