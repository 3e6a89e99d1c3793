"""JSON lines to pairs: the bytes, their independence of workers, the account, and what a failure leaves behind."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_let.data.batch_encoders import BatchEncoder, EncodedTexts
from megatron_let.data.indexed import check_indexed, read_document
from megatron_let.data.manifest import Manifest, read_manifest, require_manifest_of
from megatron_let.data.preprocess import PreprocessSettings, describe, preprocess
from megatron_let.data.tokenizers import NullTokenizer, Tokenizer, build_tokenizer
from megatron_let.errors import ConfigError, LetError

WriteJsonl = Callable[..., str]

BAD_LINES = (
    b"",
    b"{broken",
    b'{"text": null}',
    b'{"txt": "wrong key"}',
    b'{"text": 17}',
    b'{"text": "\xff\xfe"}',
    b'{"text": ""}',
    b'{"text": "\\udc00"}',
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    """Return the tiny tokenizer."""
    return build_tokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_directory))


def run(tokenizer: Tokenizer, prefix: Path, inputs: Sequence[str], **settings: Any) -> dict[str, Manifest]:
    """Preprocess and return the manifests by JSON key."""
    manifests = run_by_prefix(tokenizer, prefix, inputs, **settings)
    return {manifest.json_key: manifest for manifest in manifests.values()}


def run_by_prefix(
    tokenizer: Tokenizer, prefix: Path, inputs: Sequence[str], **settings: Any
) -> dict[str, Manifest]:
    chosen = {"append_eod": True, **settings}
    return preprocess(PreprocessSettings(tuple(inputs), str(prefix), **chosen), tokenizer, lambda line: None)


def expected_pair(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[bytes, bytes]:
    """Return what the format asks for, one sequence a document: a second writer, straight from the layout."""
    documents = [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts]
    lengths = [len(document) for document in documents]
    pointers = [2 * sum(lengths[:index]) for index in range(len(lengths))]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    ids = [token_id for document in documents for token_id in document]
    return struct.pack(f"<{len(ids)}H", *ids), index


def pair(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def many_texts(count: int) -> list[str]:
    words = ["the", "quick", "fox", "日本", "🤖", "\n", "def", "\0", "x" * 50]
    choose = random.Random(7)
    return [" ".join(choose.choices(words, k=choose.randint(1, 40))) for _ in range(count)]


def test_clean_input_gives_the_bytes_of_the_format(
    tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    texts = many_texts(50)
    path = write_jsonl([{"text": text, "meta": {"pile_set_name": "Tests"}} for text in texts])
    manifest = run(tokenizer, tmp_path / "out", [path])["text"]
    assert pair(tmp_path / "out_text_document") == expected_pair(tokenizer, texts)
    assert (manifest.documents, manifest.skipped) == (50, {})
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "input.jsonl",
        "out_text_document.bin",
        "out_text_document.idx",
        "out_text_document.manifest.json",
    ]


def test_dirty_input_gives_the_same_bytes_for_any_number_of_workers_and_files(
    tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    texts = many_texts(120)
    lines: list[Any] = [{"text": text} for text in texts]
    for position, bad in enumerate(BAD_LINES * 3):
        lines.insert(position * 5, bad)
    whole = write_jsonl(lines, "whole.jsonl")
    halves = [write_jsonl(lines[:70], "first.jsonl"), write_jsonl(lines[70:], "second.jsonl")]
    expected = expected_pair(tokenizer, texts)
    for name, inputs, workers in (("one", [whole], 1), ("two", [whole], 2), ("files", halves, 2)):
        settings = {"workers": workers, "block_bytes": 2000, "max_error_fraction": 0.2}
        manifest = run(tokenizer, tmp_path / name, inputs, **settings)["text"]
        assert pair(tmp_path / f"{name}_text_document") == expected
        assert manifest.documents + sum(manifest.skipped.values()) == len(lines)
        assert set(manifest.skipped.values()) == {3}
        assert len(manifest.skipped) == len(BAD_LINES)


def test_the_manifest_tells_what_was_made_from_what(
    tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    path = write_jsonl([{"text": "the fox"}, b"{broken", {"text": "ünï"}])
    prefix = str(tmp_path / "out_text_document")
    returned = run(tokenizer, tmp_path / "out", [path])["text"]
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert manifest == returned
    require_manifest_of(manifest, check_indexed(prefix))
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert (manifest.eod, manifest.vocab_size, manifest.dtype) == (
        tokenizer.eod,
        tokenizer.vocab_size,
        "uint16",
    )
    assert manifest.bytes == len("the fox") + len("ünï".encode())
    ids = tokenizer.tokenize("the fox") + tokenizer.tokenize("ünï")
    assert (manifest.tokens, manifest.max_token_id) == (len(ids) + 2, max(ids))
    assert [(source.path, source.size) for source in manifest.sources] == [(path, Path(path).stat().st_size)]
    assert manifest.skipped == {"invalid_json": 1}
    assert manifest.skipped_examples == (f"{path}:2 (byte 20): invalid_json",)
    assert "1 records skipped: 1 invalid_json" in describe(manifest, prefix)


def test_a_large_vocabulary_is_written_in_four_bytes(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    for vocab_size, dtype in ((65498, "uint16"), (65499, "int32")):
        manifest = run(NullTokenizer(vocab_size), tmp_path / dtype, [write_jsonl([{"text": "5 7"}])])["text"]
        assert manifest.dtype == dtype
        assert check_indexed(str(tmp_path / f"{dtype}_text_document")).dtype == dtype
    run(NullTokenizer(70000), tmp_path / "large", [write_jsonl([{"text": "5 65499 7"}])])
    assert read_document(str(tmp_path / "large_text_document"), 0).tolist() == [5, 65499, 7, 70000]


def test_two_keys_give_two_pairs(tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    path = write_jsonl([{"text": "a", "title": "the fox"}, {"text": "b"}])
    manifests = run(tokenizer, tmp_path / "out", [path], json_keys=("text", "title"))
    assert pair(tmp_path / "out_text_document") == expected_pair(tokenizer, ["a", "b"])
    assert pair(tmp_path / "out_title_document") == expected_pair(tokenizer, ["the fox"])
    assert manifests["title"].skipped == {"missing_key": 1}


@pytest.mark.parametrize("kind", ["wrong_key", "nothing_usable"])
def test_input_without_a_single_document_is_an_error_and_leaves_the_old_pair(
    tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path, kind: str
) -> None:
    run(tokenizer, tmp_path / "out", [write_jsonl([{"text": "old"}])])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lines: list[Any] = [{"content": "a"}] * 3 if kind == "wrong_key" else list(BAD_LINES)
    with pytest.raises(ConfigError, match='no document has text under the key "text"') as caught:
        run(tokenizer, tmp_path / "out", [write_jsonl(lines, "bad.jsonl")])
    first = (
        "bad.jsonl:1 (byte 0): missing_key" if kind == "wrong_key" else "bad.jsonl:2 (byte 1): invalid_json"
    )
    assert first in str(caught.value)
    (tmp_path / "bad.jsonl").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_impossible_settings_are_named(tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    path = write_jsonl([{"text": "a"}])
    for settings, message in (
        ({"workers": 0}, "--workers 0"),
        ({"log_interval": 0}, "--log-interval 0"),
        ({"json_keys": ("text", "text")}, "each key once"),
        ({"json_keys": ()}, "at least one"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tokenizer, tmp_path / "out", [path], **settings)
    with pytest.raises(ConfigError, match="absent does not exist"):
        run(tokenizer, tmp_path / "out", [str(tmp_path / "absent")])
    assert [item.name for item in tmp_path.iterdir()] == ["input.jsonl"]


class KilledEncoder(BatchEncoder):
    """Dies as a process that ran out of memory does."""

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class KilledTokenizer(NullTokenizer):
    """A tokenizer whose worker dies."""

    def batch_encoder(self) -> BatchEncoder:
        return KilledEncoder()


def test_a_killed_worker_ends_the_run_and_leaves_the_old_pair(
    write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    path = write_jsonl([{"text": "1 2"}])
    run(NullTokenizer(10), tmp_path / "out", [path])
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    with pytest.raises(LetError, match="SIGKILL"):
        run(KilledTokenizer(10), tmp_path / "out", [path], workers=2)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_a_cut_compressed_input_leaves_nothing_half_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in many_texts(3000)))
    (tmp_path / "input.gz").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="cut off or damaged"):
        run(tokenizer, tmp_path / "out", [str(tmp_path / "input.gz")])
    assert [item.name for item in tmp_path.iterdir()] == ["input.gz"]


def test_a_full_disk_and_an_unwritable_place_are_one_line(
    tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl([{"text": "a"}])
    with pytest.raises(ConfigError, match=r"cannot write .*: Not a directory"):
        run(tokenizer, Path(path) / "out", [path])

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_let.data.indexed_writer.IndexedWriter.add_documents", full)
    with pytest.raises(LetError, match=r"cannot write .*: No space left on device"):
        run(tokenizer, tmp_path / "out", [path])
    assert [item.name for item in tmp_path.iterdir()] == ["input.jsonl"]


def test_progress_lines_name_share_rate_and_time_left(
    tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    paths = (write_jsonl([{"text": "a"}] * 10, "first"), write_jsonl([{"text": "b"}] * 5, "second"))
    lines: list[str] = []
    preprocess(PreprocessSettings(paths, str(tmp_path / "out")), tokenizer, lines.append)
    assert len(lines) == 2  # which encoder, and the last state
    for part in ("15 records", "100.0 %", "MB/s", "tokens/s", "ETA 0:00:00"):
        assert part in lines[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_megatron_core_trains_on_the_result(
    tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    texts = many_texts(30)
    run(tokenizer, tmp_path / "out", [write_jsonl([{"text": text} for text in texts])])
    prefix = str(tmp_path / "out_text_document")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(tmp_path / "cache"),
        mid_level_dataset_surplus=0.005,
    )
    indexed = IndexedDataset(prefix)
    dataset = GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), 10, Split.train, config)
    sample = dataset[0]["tokens"].tolist()
    stream = [token_id for text in texts for token_id in [*tokenizer.tokenize(text), tokenizer.eod]]
    assert set(sample) <= set(stream)
    assert tokenizer.fingerprint in dataset.unique_description


def test_a_folder_named_like_the_working_directory_keeps_what_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "pile.partial"
    folder.mkdir()
    (folder / "00.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "1"}\n')
    for given, message in (
        (folder, "lies in .*pile.partial"),
        (tmp_path / "other.jsonl", "is not of this program"),
    ):
        with pytest.raises(ConfigError, match=message):
            preprocess(
                PreprocessSettings((str(given),), str(tmp_path / "pile")), NullTokenizer(9), lambda line: None
            )
    assert [path.name for path in folder.iterdir()] == ["00.jsonl"]
