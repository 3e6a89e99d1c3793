"""The .bin/.idx pair: bytes as megatron.core writes them, and every damage named before training."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_let.data import growing_file
from megatron_let.data.indexed import check_indexed, dtype_for_vocabulary, max_token_id, read_document
from megatron_let.data.indexed_writer import write_pair
from megatron_let.errors import ConfigError
from tests.data.foreign import Documents, edit_index, write_with_core

DOCUMENTS: Documents = [[[1, 2, 3]], [[4], [5, 6]], [[7]]]


def write_with_ours(prefix: Path, documents: Documents, dtype: str, per_call: int = 2) -> None:
    write_pair(str(prefix), dtype, parts_of(documents, dtype, per_call))


def parts_of(documents: Documents, dtype: str, per_call: int) -> Iterator[tuple[bytes, bytes, bytes]]:
    for start in range(0, len(documents), per_call):
        some = documents[start : start + per_call]
        sequences = [sequence for document in some for sequence in document]
        yield (
            np.array([token_id for sequence in sequences for token_id in sequence], dtype=dtype).tobytes(),
            np.array([len(sequence) for sequence in sequences], dtype=np.int32).tobytes(),
            np.array([len(document) for document in some], dtype=np.int32).tobytes(),
        )


def files_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Return the prefix of a whole pair of three documents, four sequences and seven tokens."""
    write_with_ours(tmp_path / "pair", DOCUMENTS, "uint16")
    return tmp_path / "pair"


@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=5), max_size=3), min_size=1, max_size=6
    ),
    dtype=st.sampled_from(["uint16", "int32"]),
    per_call=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_the_bytes_are_those_of_megatron_core(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, dtype: str, per_call: int
) -> None:
    directory = tmp_path_factory.mktemp("pair")
    write_with_core(directory / "core", documents, dtype)
    write_with_ours(directory / "ours", documents, dtype, per_call)
    assert files_of(directory / "ours") == files_of(directory / "core")


def test_pointers_are_right_across_the_chunks_they_are_made_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing_file, "_CHUNK_BYTES", 12)
    documents = [[[number] * (number % 4 + 1)] for number in range(11)]
    write_with_core(tmp_path / "core", documents, "int32")
    write_with_ours(tmp_path / "ours", documents, "int32")
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "core")


@pytest.mark.parametrize("vocab_size", [2, 65499, 65500, 65536, 200000])
def test_the_id_type_follows_megatrons_rule(vocab_size: int) -> None:
    assert dtype_for_vocabulary(vocab_size) == DType.optimal_dtype(vocab_size).__name__


def test_a_whole_pair_is_summed_up_and_read_as_megatron_core_reads_it(pair: Path) -> None:
    summary = check_indexed(str(pair))
    assert (summary.documents, summary.sequences, summary.tokens, summary.dtype) == (3, 4, 7, "uint16")
    assert max_token_id(str(pair)) == 7
    dataset = IndexedDataset(str(pair))
    assert [list(dataset[index]) for index in range(len(dataset))] == [[1, 2, 3], [4], [5, 6], [7]]
    assert [read_document(str(pair), index).tolist() for index in range(3)] == [[1, 2, 3], [4, 5, 6], [7]]


def test_a_pair_with_an_empty_document_as_megatron_writes_it_is_whole(tmp_path: Path) -> None:
    write_with_core(tmp_path / "core", [[[1, 2]], [], [[3]]], "int32")
    assert check_indexed(str(tmp_path / "core")).documents == 3
    assert read_document(str(tmp_path / "core"), 1).tolist() == []
    assert read_document(str(tmp_path / "core"), 2).tolist() == [3]


def test_the_largest_id_is_found_in_any_block_and_a_negative_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_let.data.indexed._SCAN_BYTES", 8)
    write_with_ours(tmp_path / "high", [[[3, 70000, 5, 6, 7]]], "int32")
    assert max_token_id(str(tmp_path / "high")) == 70000
    write_with_ours(tmp_path / "negative", [[[3, 5, -6]]], "int32")
    with pytest.raises(ConfigError, match="negative token id -6"):
        max_token_id(str(tmp_path / "negative"))


def message_for(prefix: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_indexed(str(prefix))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_named(pair: Path) -> None:
    assert "no absent.idx and no absent.bin" in message_for(pair.parent / "absent")
    assert "without .bin" in message_for(f"{pair}.bin")
    Path(f"{pair}.bin").rename(pair.parent / "away")
    assert "no pair.bin" in message_for(pair)
    (pair.parent / "away").rename(f"{pair}.bin")
    Path(f"{pair}.idx").unlink()
    assert "no pair.idx" in message_for(pair)


def test_every_cut_of_the_index_is_found(pair: Path) -> None:
    path = Path(f"{pair}.idx")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert "cut off" in message_for(pair) or size < 9
    path.write_bytes(whole + b"\0")
    assert "damaged" in message_for(pair)


def test_every_cut_of_the_data_is_found(pair: Path) -> None:
    path = Path(f"{pair}.bin")
    whole = path.read_bytes()
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        assert "cut off" in message_for(pair)
    path.write_bytes(b"")
    assert "empty" in message_for(pair)
    path.write_bytes(whole + b"\0\0")
    assert "of another run" in message_for(pair)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, "<B", 0, "not a Megatron index"),
        (0, "<8s", b"TNTIDX\x00\x00", "old TNTIDX format"),
        (9, "<Q", 2, "index version 2"),
        (17, "<B", 6, "id type code 6"),
        (17, "<B", 99, "id type code 99"),
        (17, "<B", 4, "describes"),
        (18, "<Q", 2**64 - 1, "cut off"),
        (26, "<Q", 2**63, "cut off"),
        (34 + 12 * 4, "<q", 1, "do not cover"),
        (34 + 12 * 4 + 8 * 3, "<q", 3, "do not cover"),
        (34 + 4 * 3, "<i", -5, "one of them"),
        (34 + 4 * 3, "<i", 2**31 - 1, "cut off"),
        (34 + 4 * 4 + 8 * 3, "<q", 2**62, "cut off"),
    ],
)
def test_each_damage_of_the_index_is_named(
    pair: Path, offset: int, layout: str, value: Any, message: str
) -> None:
    edit_index(pair, offset, layout, value)
    assert message in message_for(pair)


def test_a_header_that_claims_billions_of_sequences_allocates_nothing(pair: Path) -> None:
    edit_index(pair, 18, "<Q", 2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message_for(pair)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; 2^40 lengths are 4 TiB


def test_an_empty_data_set_and_a_multimodal_one_are_refused(tmp_path: Path) -> None:
    write_with_core(tmp_path / "none", [], "uint16")
    assert "empty" in message_for(tmp_path / "none")
    write_with_core(tmp_path / "hollow", [[]], "uint16")
    assert "empty" in message_for(tmp_path / "hollow")
    write_with_core(tmp_path / "modes", DOCUMENTS, "uint16", multimodal=True)
    assert "multimodal" in message_for(tmp_path / "modes")


def test_a_document_that_is_not_there_and_a_damaged_pointer_are_errors(pair: Path) -> None:
    with pytest.raises(ConfigError, match="documents 0 to 2, not 3"):
        read_document(str(pair), 3)
    with pytest.raises(ConfigError, match="documents 0 to 2, not -1"):
        read_document(str(pair), -1)
    edit_index(pair, 34 + 4 * 4 + 8 * 1, "<q", 10**9)
    with pytest.raises(ConfigError, match="document 1 spans bytes"):
        read_document(str(pair), 1)
    edit_index(pair, 34 + 4 * 4 + 8 * 1, "<q", 7)
    with pytest.raises(ConfigError, match="document 1 spans bytes 7 to 12"):
        read_document(str(pair), 1)
    for bound in (10**18, -1):
        edit_index(pair, 34 + 12 * 4 + 8 * 1, "<q", bound)
        with pytest.raises(ConfigError, match="document 1 goes from sequence"):
            read_document(str(pair), 1)


def test_a_file_of_half_an_id_is_no_whole_pair(pair: Path) -> None:
    edit_index(pair, 34 + 4 * 4 + 8 * 3, "<q", 13)
    with Path(f"{pair}.bin").open("ab") as stream:
        stream.write(b"\0")
    assert "of another run" in message_for(pair)


def test_a_failed_write_leaves_the_old_pair_and_no_litter(pair: Path) -> None:
    before = files_of(pair)

    def parts() -> Iterator[tuple[bytes, bytes, bytes]]:
        yield from parts_of(DOCUMENTS, "uint16", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pair(str(pair), "uint16", parts())
    assert files_of(pair) == before
    assert sorted(path.name for path in pair.parent.iterdir()) == ["pair.bin", "pair.idx"]


def test_replacing_a_pair_never_leaves_an_old_index_beside_new_tokens(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, bool, bool]] = []

    def recorded(name: str, original: Any) -> Any:
        def step(path: Path, *arguments: Any, **options: Any) -> Any:
            result = original(path, *arguments, **options)
            if path.parent == pair.parent:
                index, data = Path(f"{pair}.idx"), Path(f"{pair}.bin")
                is_new_data = data.read_bytes() == b"\x09\x00"
                is_old_index = index.exists() and index.read_bytes() == old_index
                steps.append((name, is_new_data, is_old_index))
            return result

        return step

    old_index = Path(f"{pair}.idx").read_bytes()
    monkeypatch.setattr(Path, "replace", recorded("replace", Path.replace))
    monkeypatch.setattr(Path, "unlink", recorded("unlink", Path.unlink))
    write_with_ours(pair, [[[9]]], "uint16")
    assert len(steps) >= 4
    assert not any(is_new and is_old for _, is_new, is_old in steps)
    assert check_indexed(str(pair)).tokens == 1
