"""A run stays as large as it is: over iterations, across S_stop and over saves in the background."""

from __future__ import annotations

from pathlib import Path

from long_run import Point, growth, long_run

MEGABYTE = 1 << 20


def test_memory_objects_files_and_threads_stay_what_they_are(tmp_path: Path) -> None:
    for points in long_run(tmp_path, 240, 12, every=8):
        assert points[-1].iteration == 240
        early, late = points[len(points) // 2], points[-1]  # LET is gone at the half
        assert late.resident_bytes - early.resident_bytes < 8 * MEGABYTE  # 70 kB an iteration
        assert late.objects - early.objects < 20 * 120  # 20 objects an iteration
        assert abs(late.open_files - early.open_files) <= 2
        assert late.threads - early.threads <= 1  # a checkpoint being written


def test_growth_is_the_slope_of_the_second_half() -> None:
    early = [Point(iteration, 10**9, 0, 0, 0) for iteration in range(0, 50, 10)]
    late = [Point(iteration, 10**6 + 100 * iteration, 0, 0, 0) for iteration in range(50, 100, 10)]
    assert abs(growth([*early, *late]) - 100) < 1e-6
