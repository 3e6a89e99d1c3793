"""Spoilt pairs of token files, through all that reads them, megatron-core's part of it included."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.config.derive import resolve
from megatron_let.data.identity import data_identity
from megatron_let.data.index_tables import open_tables
from megatron_let.data.indexed import HEADER, check_indexed, count_tokens, max_token_id, read_document
from megatron_let.data.merge import merge
from megatron_let.data.verify import Expected, verify
from megatron_let.errors import ConfigError
from megatron_let.mcore.datasets import SampleCounts, build_datasets_alone
from megatron_let.testing.training import TINY_STUDENT, arguments, write_token_files
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.data_checks import data_warnings
from megatron_let.training.data_needs import build_run_tokenizer
from megatron_let.training.split_checks import usable_counts_alone
from tests.fuzz.kit import EDITS, NUMBERS, Edits, fuzz, said, spoil

DOCUMENTS = [[1, 2, 3, 60], [4, 60], [5, 6, 7, 8, 9, 60]] * 6
COUNTS = SampleCounts(train=8, valid=1, test=0)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of a whole pair."""
    prefix = tmp_path_factory.mktemp("honest") / "tokens"
    write_token_files(prefix, DOCUMENTS)
    return prefix


@pytest.fixture(scope="module")
def copy(honest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of a pair that is written anew for each example."""
    prefix = tmp_path_factory.mktemp("copy") / "tokens"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{honest}{suffix}", f"{prefix}{suffix}")
    return prefix


def read_all(prefix: str) -> None:
    """Read a pair in every way but a run's."""
    summary = check_indexed(prefix)
    count_tokens(prefix, 0.0, 0.5)
    data_identity(prefix)
    max_token_id(prefix)
    for document in (0, summary.documents - 1):
        read_document(prefix, document)
    for _ in open_tables(prefix).document_ends():
        pass


def use(prefix: Path) -> int:
    """Go through a pair as a run does, up to its samples; return how many of them could be read."""
    cache = prefix.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    changes = {"--data-path": prefix, "--split": "8,2,0", "--data-cache-path": cache, "--seq-length": 8}
    config = resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)
    tokenizer = build_run_tokenizer(config)
    data_warnings(config, tokenizer, needs_teacher=False)
    counts = usable_counts_alone(config, COUNTS)
    train: Any = build_datasets_alone(config, tokenizer, counts).train
    for number in range(len(train)):
        assert train[number]["tokens"].max() <= 60
    return len(train)


def use_in_every_way(prefix: Path) -> str | None:
    """Read, merge, verify and train on a pair; return the line with which a run refused it."""
    said(lambda: read_all(str(prefix)), prefix)
    said(lambda: merge([str(prefix)], f"{prefix}-merged", lambda line: None), prefix)
    for check in verify(str(prefix), Expected(), lambda line: None):
        assert len(check.line()) < 1000
    return said(lambda: use(prefix), prefix)


@fuzz(150)
@given(edits=EDITS, of_bin=st.booleans())
def test_a_spoilt_pair_is_read_or_refused(edits: Edits, of_bin: bool, honest: Path, copy: Path) -> None:
    for suffix in (".idx", ".bin"):
        data = Path(f"{honest}{suffix}").read_bytes()
        Path(f"{copy}{suffix}").write_bytes(spoil(data, edits) if (suffix == ".bin") == of_bin else data)
    use_in_every_way(copy)


def set_number(data: bytes, where: str, at: int, value: int) -> bytes:
    """Return an index with one number of its header or tables replaced."""
    sequences = len(DOCUMENTS)
    layout, begin, count = {
        "version": ("<Q", 9, 1),
        "type": ("<B", 17, 1),
        "sequences": ("<Q", 18, 1),
        "bounds": ("<Q", 26, 1),
        "length": ("<i", HEADER.size, sequences),
        "pointer": ("<q", HEADER.size + 4 * sequences, sequences),
        "bound": ("<q", HEADER.size + 12 * sequences, sequences + 1),
    }[where]
    size = struct.calcsize(layout)
    changed = bytearray(data)
    raw = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    begin += size * (at % count)
    changed[begin : begin + size] = raw
    return bytes(changed)


@fuzz(100)
@given(
    numbers=st.lists(
        st.tuples(
            st.sampled_from(["version", "type", "sequences", "bounds", "length", "pointer", "bound"]),
            st.integers(0, 18),
            st.one_of(st.sampled_from(NUMBERS), st.integers(-40, 200)),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_an_index_with_other_numbers_is_used_or_refused(
    numbers: list[tuple[str, int, int]], honest: Path, copy: Path
) -> None:
    data = Path(f"{honest}.idx").read_bytes()
    for number in numbers:
        data = set_number(data, *number)
    Path(f"{copy}.idx").write_bytes(data)
    shutil.copy(f"{honest}.bin", f"{copy}.bin")
    said(lambda: read_all(str(copy)), copy)
    said(lambda: use(copy), copy)


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("length", -4, "sequence 3 has -4 tokens"),
        ("length", 1 << 30, "sequence 4 begins at byte 32"),
        ("pointer", -8, "sequence 3 begins at byte -8"),
        ("pointer", 1 << 60, "sequence 3 begins at byte 1152921504606846976"),
        ("bound", -1, "document 2 begins at sequence 2 and ends at -1"),
    ],
)
def test_a_run_looks_at_every_entry_of_an_index(
    where: str, value: int, expected: str, honest: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "tokens"
    shutil.copy(f"{honest}.bin", f"{copy}.bin")
    Path(f"{copy}.idx").write_bytes(set_number(Path(f"{honest}.idx").read_bytes(), where, 3, value))
    check_indexed(str(copy))  # whose look at the ends alone finds nothing
    message = said(lambda: use(copy), copy)
    assert message is not None
    assert expected in message


def test_the_honest_pair_is_used(honest: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{honest}{suffix}", tmp_path / f"tokens{suffix}")
    assert use(tmp_path / "tokens") >= COUNTS.train
    assert np.array_equal(read_document(str(honest), 1), [4, 60])


def test_a_header_alone_takes_no_memory(tmp_path: Path) -> None:
    prefix = tmp_path / "tokens"
    Path(f"{prefix}.bin").write_bytes(b"ab")
    for sequences, bounds in (((1 << 64) - 1, 2), (1 << 40, (1 << 64) - 1), (0, 1 << 61)):
        Path(f"{prefix}.idx").write_bytes(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, sequences, bounds))
        with pytest.raises(ConfigError, match="is cut off: 34 bytes"):
            check_indexed(str(prefix))
