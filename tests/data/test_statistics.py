"""How long documents are: the numbers are those of a sorted list, whatever the size of the tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data import index_tables, statistics
from megatron_let.data.index_tables import open_tables
from megatron_let.data.statistics import length_statistics
from megatron_let.errors import ConfigError
from tests.data.foreign import edit_index, write_as_neox


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=40), chunk=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_numbers_are_those_of_a_sorted_list(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], chunk: int
) -> None:
    prefix = tmp_path_factory.mktemp("pair") / "pair"
    # Each document in two sequences; 17 is the length from which documents are kept instead of counted.
    write_as_neox(
        prefix, [[[1] * (length // 2), [1] * (length - length // 2)] for length in lengths], "uint8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_tables, "CHUNK", chunk)
        patch.setattr(statistics, "_COUNTED_LENGTHS", 17)
        found = length_statistics(open_tables(str(prefix)))
    ranked = sorted(lengths)

    def share(percent: int) -> int:
        return next(
            length
            for length in ranked
            if sum(other <= length for other in ranked) * 100 >= percent * len(ranked)
        )

    assert (found.documents, found.empty) == (len(lengths), lengths.count(0))
    assert (found.minimum, found.maximum) == (ranked[0], ranked[-1])
    assert (found.median, found.p90, found.p99) == (share(50), share(90), share(99))
    assert sum(count for _, _, count in found.histogram) == len(lengths)
    for low, high, count in found.histogram:
        assert count == sum(low <= length <= high for length in lengths)


def test_the_histogram_goes_by_powers_of_two_with_bars_to_the_highest(tmp_path: Path) -> None:
    write_as_neox(tmp_path / "pair", [[[1] * length] for length in (0, 2, 3, 3, 5, 9)], "uint16")
    numbers, *rows = length_statistics(open_tables(str(tmp_path / "pair"))).lines()
    assert numbers == "tokens a document: min 0, median 3, p90 9, p99 9, max 9; 1 documents are empty"
    assert [row.split("|")[0].strip() for row in rows] == ["0", "1", "2-3", "4-7", "8-15"]
    assert [row.count("#") for row in rows] == [14, 0, 40, 14, 14]
    assert rows[2].endswith(" 3 (50.0 %)")


def test_lengths_beyond_32_bits_are_counted(tmp_path: Path) -> None:
    prefix = tmp_path / "pair"
    write_as_neox(prefix, [[[1]], [[1], [1]]], "uint8")
    edit_index(prefix, 34 + 4 * 3 + 8 * 1, "<q", 3_000_000_000)
    edit_index(prefix, 34 + 4 * 3 + 8 * 2, "<q", 6_000_000_000)
    with Path(f"{prefix}.bin").open("r+b") as stream:
        stream.truncate(8_000_000_000)  # a hole: it takes no room on the disk
    found = length_statistics(open_tables(str(prefix)))
    assert (found.minimum, found.maximum) == (3_000_000_000, 5_000_000_000)


def test_damaged_tables_are_an_error(tmp_path: Path) -> None:
    prefix = tmp_path / "pair"
    write_as_neox(prefix, [[[1]], [[2]], [[3]]], "uint8")
    edit_index(prefix, 34 + 12 * 3 + 8, "<q", 10**9)
    with pytest.raises(ConfigError, match="name sequences out of range"):
        length_statistics(open_tables(str(prefix)))
    edit_index(prefix, 34 + 12 * 3 + 8, "<q", 2)
    edit_index(prefix, 34 + 12 * 3 + 16, "<q", 1)
    with pytest.raises(ConfigError, match="ends before its begin"):
        length_statistics(open_tables(str(prefix)))
