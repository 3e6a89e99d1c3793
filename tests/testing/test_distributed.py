"""The test kit itself: results, failures, time limits, reuse, and that nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_let.testing.distributed import RankError, RankPool, RankTimeoutError
from megatron_let.testing.training import TINY_STUDENT, arguments, train
from tests.processes import HANG_SECONDS, is_running


def sum_of_ranks(scale: float) -> tuple[float, int, int]:
    """All-reduce `rank * scale`; return the sum, the worker's id and its number of threads."""
    import torch

    value = torch.tensor(float(os.environ["RANK"]) * scale)
    torch.distributed.all_reduce(value)
    return value.item(), os.getpid(), torch.get_num_threads()


def fail_on_rank(failing_rank: int) -> None:
    """Raise on one rank while the others wait for it in a collective."""
    import torch

    if torch.distributed.get_rank() == failing_rank:
        raise RuntimeError("the tap dripped")
    torch.distributed.barrier()


def fail_alone_and_leave_others_asleep() -> None:
    """Raise on rank 1 while rank 0 does something no closed connection can interrupt."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("the tap dripped")
    time.sleep(2 * HANG_SECONDS)


def die_on_rank(dying_rank: int) -> None:
    """End one rank without a word."""
    if int(os.environ["RANK"]) == dying_rank:
        os._exit(7)
    time.sleep(2 * HANG_SECONDS)


def hang_here() -> None:
    """Never return."""
    time.sleep(2 * HANG_SECONDS)


def return_a_function() -> object:
    """Return what cannot travel."""
    return lambda: None


def environment_of(names: tuple[str, ...]) -> dict[str, str | None]:
    """Return some environment variables, and leave one behind."""
    os.environ["LEFT_BEHIND"] = "yes"
    return {name: os.environ.get(name) for name in (*names, "LEFT_BEHIND_BEFORE")}


def left_behind() -> str | None:
    """Return the variable that `environment_of` set in an earlier case."""
    return os.environ.get("LEFT_BEHIND")


def is_initialized_and_world_from_environment() -> tuple[bool, int]:
    """Return whether a process group was there, then make one from torchrun's variables."""
    import torch

    was_there = torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo")
    return was_there, torch.distributed.get_world_size()


def return_a_tensor() -> object:
    """Return something that torch would share by descriptor if it could."""
    import torch

    return torch.arange(3) + torch.distributed.get_rank()


def start_a_child() -> int | None:
    """Start a program of multiprocessing's, as a checkpoint writer does."""
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    return child.exitcode


def warn_and_catch() -> str:
    """Warn, and return what became of it."""
    try:
        warnings.warn("the tap drips", UserWarning, stacklevel=1)
    except UserWarning as error:
        return str(error)
    return "only a warning"


def note_the_end() -> None:
    """Leave a trace in the environment-independent state of the worker."""
    Path(os.environ["NOTE_FILE"]).write_text("ended")


def test_each_rank_returns_its_result_and_the_workers_are_reused(pool: RankPool) -> None:
    four = pool.run(4, sum_of_ranks, 1.0)
    two = pool.run(2, sum_of_ranks, 10.0)
    assert [value for value, _, _ in four] == [6.0] * 4
    assert [value for value, _, _ in two] == [10.0] * 2
    assert [pid for _, pid, _ in two] == [pid for _, pid, _ in four][:2] == pool.pids()[:2]
    assert {threads for _, _, threads in four} == {1}


def test_torchruns_variables_are_set_for_a_case_and_taken_back_after(pool: RankPool) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    results = pool.run(2, environment_of, names)
    assert [result["RANK"] for result in results] == ["0", "1"]
    assert {result["WORLD_SIZE"] for result in results} == {"2"}
    assert {result["OMP_NUM_THREADS"] for result in results} == {"1"}
    assert pool.run(2, left_behind) == [None, None]


def test_a_case_may_make_its_own_process_group(pool: RankPool) -> None:
    results = pool.run(2, is_initialized_and_world_from_environment, init_process_group=False)
    assert results == [(False, 2)] * 2


def test_tensors_come_back_and_workers_may_start_programs(pool: RankPool) -> None:
    assert [tensor.tolist() for tensor in pool.run(2, return_a_tensor)] == [[0, 1, 2], [1, 2, 3]]  # type: ignore[attr-defined]
    assert pool.run(1, start_a_child) == [0]


def test_warnings_are_errors_in_the_ranks_when_they_are_in_the_parent(pool: RankPool) -> None:
    assert pool.run(1, warn_and_catch) == ["the tap drips"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pool.run(1, warn_and_catch) == ["only a warning"]


def test_a_world_larger_than_the_pool_is_refused(pool: RankPool) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.4"):
        pool.run(5, hang_here)


@pytest.fixture(scope="module")
def fragile() -> Iterator[RankPool]:
    """Return a pool of two that each test below makes fail once, so that its workers start once a test."""
    with RankPool(2) as ranks:
        yield ranks


@pytest.mark.parametrize("case", [(fail_on_rank, 1), (fail_alone_and_leave_others_asleep,)])
def test_an_exception_on_one_rank_comes_back_first_and_nobody_hangs(fragile: RankPool, case: tuple) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="first failure first\n--- rank 1 of 2") as caught:
        fragile.run(2, *case)
    assert "the tap dripped" in str(caught.value)
    assert "Traceback" in str(caught.value)
    assert not isinstance(caught.value, RankTimeoutError)
    assert time.monotonic() - started < HANG_SECONDS  # what the others sleep for


def test_a_result_that_cannot_travel_is_a_failure(fragile: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?i)can't (get|pickle) local object"):
        fragile.run(1, return_a_function)


def test_a_dead_worker_is_a_failure_and_ends_the_pool(fragile: RankPool) -> None:
    first = [pid for _, pid, _ in fragile.run(2, sum_of_ranks, 1.0)]
    with pytest.raises(RankError, match="died with exit code 7"):
        fragile.run(2, die_on_rank, 1)
    assert fragile.pids() == []
    assert not any(is_running(pid) for pid in first)


def test_a_case_past_its_time_says_where_it_stood(fragile: RankPool) -> None:
    assert fragile.run(1, left_behind) == [None]  # starts afresh after the failure of the test before
    started = time.monotonic()
    with pytest.raises(RankTimeoutError, match=r"(?s)not done after 0.5 s.*hang_here"):
        fragile.run(1, hang_here, timeout=0.5)
    assert time.monotonic() - started < HANG_SECONDS
    assert fragile.pids() == []


def test_the_clean_up_runs_after_each_case(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with RankPool(1, environment={"NOTE_FILE": str(note)}, after_each=note_the_end) as pool:
        pool.run(1, left_behind)
        assert note.read_text() == "ended"


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, signal, sys
        from megatron_let.testing.distributed import RankPool
        from tests_of_the_kit import left_behind
        if __name__ == "__main__":
            pool = RankPool(1)
            pool.run(1, left_behind)
            print(*pool.pids(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """).replace("tests_of_the_kit", Path(__file__).stem)
    import_path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": import_path, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=environment,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    deadline = time.monotonic() + HANG_SECONDS
    while is_running(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(done.stdout))


def train_and_count_threads(argv: list[str]) -> int:
    """Train, and return the threads this worker had before."""
    before = len(os.listdir("/proc/self/task"))
    train(argv)
    return before


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by Linux's /proc")
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"--use-distributed-optimizer": None},
        {
            "--use-distributed-optimizer": None,
            "--overlap-grad-reduce": None,
            "--overlap-param-gather": None,
            "--bf16": None,
        },
        {"--use-distributed-optimizer": None, "--pipeline-model-parallel-size": 2, "--fp16": None},
    ],
    ids=lambda layout: " ".join(layout) or "plain",
)
def test_the_groups_of_earlier_cases_leave_no_threads(layout: dict[str, object], pool: RankPool) -> None:
    """Each gloo group has three; left behind, hundreds of them slow every later case down."""
    words = arguments(TINY_STUDENT, {"--mock-data": None, "--train-iters": 1, **layout})
    counts = [max(pool.run(2, train_and_count_threads, words)) for _ in range(4)]
    assert (
        counts[-1] < counts[1] + 3
    )  # two cases' groups would be twelve and more; a thread may be about to end
