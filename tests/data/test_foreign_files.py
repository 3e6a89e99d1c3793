"""Files that Megatron-LM and GPT-NeoX wrote are read as they are; what is no pair of token files is one error."""

from __future__ import annotations

import resource
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_let.data.index_tables import open_tables
from megatron_let.data.indexed import check_indexed, count_tokens, max_token_id, read_document
from megatron_let.data.statistics import length_statistics
from megatron_let.data.verify import Expected, verify
from megatron_let.errors import ConfigError
from tests.data.foreign import Documents, edit_index, write_as_neox, write_with_core

DOCUMENTS: Documents = [[], [[1, 2, 3]], [[4], [5, 6]], [], [], [[7, 8]], []]
WRITERS = {"megatron": write_with_core, "neox": write_as_neox}


def read_all(prefix: Path) -> list[list[int]]:
    count = check_indexed(str(prefix)).documents
    return [read_document(str(prefix), document).tolist() for document in range(count)]


def joined(documents: Documents) -> list[list[int]]:
    return [[token_id for sequence in document for token_id in sequence] for document in documents]


def problems(prefix: Path) -> list[str]:
    checks = list(verify(str(prefix), Expected(), lambda line: None))
    return [check.line() for check in checks if check.problem is not None]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_foreign_pair_is_read_document_by_document(tmp_path: Path, writer: str, dtype: str) -> None:
    WRITERS[writer](tmp_path / "pair", DOCUMENTS, dtype)
    assert read_all(tmp_path / "pair") == joined(DOCUMENTS)
    summary = check_indexed(str(tmp_path / "pair"))
    assert (summary.dtype, summary.documents, summary.sequences, summary.tokens) == (dtype, 7, 4, 8)
    assert max_token_id(str(tmp_path / "pair")) == 8
    assert count_tokens(str(tmp_path / "pair"), 0.0, 0.5) == 4
    assert problems(tmp_path / "pair") == []
    lengths = length_statistics(open_tables(str(tmp_path / "pair")))
    assert (lengths.documents, lengths.empty, lengths.maximum) == (7, 4, 3)


@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=3), min_size=1, max_size=6
    ),
    dtype=st.sampled_from(["uint8", "int16", "uint16", "int32", "int64"]),
)
@settings(max_examples=40, deadline=None)
def test_neox_and_megatron_write_what_we_and_megatron_read(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, dtype: str
) -> None:
    directory = tmp_path_factory.mktemp("pair")
    write_as_neox(directory / "neox", documents, dtype)
    write_with_core(directory / "core", documents, dtype)
    assert (directory / "neox.idx").read_bytes() == (directory / "core.idx").read_bytes()
    if not any(map(len, joined(documents))):
        assert "the data set is empty" in problems(directory / "neox")[0]
        return
    assert read_all(directory / "neox") == joined(documents)
    assert problems(directory / "neox") == []
    read = IndexedDataset(str(directory / "neox"))
    assert [list(read[index]) for index in range(len(read))] == [
        sequence for document in documents for sequence in document
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_neox_floats_are_no_tokens(tmp_path: Path, dtype: str) -> None:
    write_as_neox(tmp_path / "pair", [[[1, 2]]], dtype)
    with pytest.raises(ConfigError, match=r"has id type code [67], allowed are"):
        check_indexed(str(tmp_path / "pair"))


def test_the_old_format_of_neox_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes(bytes(8))
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\x00\x00" + struct.pack("<QQQ", 1, 4, 4) + bytes(64))
    with pytest.raises(ConfigError, match=r"old TNTIDX format .* preprocess the text again, or convert"):
        check_indexed(str(tmp_path / "old"))


def test_a_multimodal_pair_of_megatron_is_refused(tmp_path: Path) -> None:
    write_with_core(tmp_path / "modes", DOCUMENTS, "uint16", multimodal=True)
    assert "multimodal" in problems(tmp_path / "modes")[0]


def look_at_everything(prefix: str) -> None:
    """Do with a pair all that a program may do; ConfigError is the one way to fail."""
    list(verify(prefix, Expected(), lambda line: None))
    with suppress(ConfigError):
        summary = check_indexed(prefix)
        count_tokens(prefix, 0.2, 0.9)
        for document in range(min(summary.documents, 4)):
            with suppress(ConfigError):
                read_document(prefix, document)
        with suppress(ConfigError):
            max_token_id(prefix)
        length_statistics(open_tables(prefix))


COUNTS = st.one_of(st.integers(0, 4), st.integers(0, 2**64 - 1))
SMALL = st.sampled_from([0, 1, 2, 3, 4, 8, 2**31 - 1, 2**62, -1, -8])


@st.composite
def index_files(draw: st.DrawFn) -> bytes:
    """Return an index whose tables have the size that its header asks for, or any other bytes."""
    code, sequences, bounds = draw(st.integers(0, 9)), draw(COUNTS), draw(COUNTS)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, sequences, bounds)
    if sequences > 4 or bounds > 4:
        return header[: draw(st.integers(0, 34))] + draw(st.binary(max_size=120))
    lengths = [draw(SMALL) % 2**32 for _ in range(sequences)]
    places = [draw(SMALL) for _ in range(sequences + bounds)]
    return header + struct.pack(f"<{sequences}I{len(places)}q", *lengths, *places)


@given(index=index_files(), data=st.binary(max_size=16))
@settings(max_examples=400, deadline=None)
def test_no_bytes_crash_a_reader_or_make_it_allocate(
    tmp_path_factory: pytest.TempPathFactory, index: bytes, data: bytes
) -> None:
    prefix = tmp_path_factory.mktemp("random") / "pair"
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    look_at_everything(str(prefix))
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    )  # KiB; 2^40 lengths are 4 TiB


@given(
    offset=st.integers(34, 34 + 12 * 4 + 8 * 8 - 1),
    value=st.one_of(st.integers(0, 255), st.sampled_from([0, 127, 128, 255])),
    layout=st.sampled_from(["<B", "<q", "<i"]),
    large=st.sampled_from([-(2**31), -1, 0, 1, 3, 5, 2**31 - 1]),
)
@settings(max_examples=200, deadline=None)
def test_no_damage_of_the_tables_crashes_a_reader(
    tmp_path_factory: pytest.TempPathFactory, offset: int, value: int, layout: str, large: int
) -> None:
    prefix = tmp_path_factory.mktemp("damaged") / "pair"
    write_with_core(prefix, DOCUMENTS, "uint16")
    whole = Path(f"{prefix}.idx").read_bytes()
    edit_index(
        prefix, min(offset, len(whole) - struct.calcsize(layout)), layout, value if layout == "<B" else large
    )
    look_at_everything(str(prefix))
