"""The progress line: right numbers, and no more often than asked."""

from __future__ import annotations

from megatron_let.data.progress import ProgressMeter, format_seconds


def test_lines_come_at_the_asked_interval_with_rates_and_time_left() -> None:
    now = [100.0]
    lines: list[str] = []
    meter = ProgressMeter(total_bytes=4_000_000, log_interval=10, write=lines.append, clock=lambda: now[0])
    for step in range(1, 5):
        now[0] += 10
        meter.add(documents=5, tokens=1000, content_bytes=2_000_000, read_bytes=500_000 * step)
    assert len(lines) == 2
    assert lines[0] == (
        "processed 10 records, 25.0 % of 4.0 MB | 0.20 MB/s, 0 records/s, 100 tokens/s | elapsed 0:00:20, ETA 0:01:00"
    )


def test_what_an_earlier_run_did_is_counted_and_makes_nothing_faster() -> None:
    now = [100.0]
    meter = ProgressMeter(4_000_000, 1, print, lambda: now[0], read_before=3_000_000, documents_before=3_000)
    now[0] += 10
    meter.add(documents=500, tokens=1000, content_bytes=2_000_000, read_bytes=3_500_000)
    assert meter.line() == (
        "processed 3,500 records, 87.5 % of 4.0 MB | 0.20 MB/s, 50 records/s, 100 tokens/s | elapsed 0:00:10, ETA 0:00:10"
    )


def test_a_fast_run_does_not_flood_the_log() -> None:
    now = [0.0]
    lines: list[str] = []
    meter = ProgressMeter(total_bytes=100, log_interval=1, write=lines.append, clock=lambda: now[0])
    for _ in range(1000):
        now[0] += 0.01
        meter.add(documents=1, tokens=1, content_bytes=1, read_bytes=1)
    assert 8 <= len(lines) <= 10


def test_seconds_are_shown_as_hours_minutes_seconds() -> None:
    assert [format_seconds(value) for value in (0, 59.6, 3661, 360000)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "100:00:00",
    ]
