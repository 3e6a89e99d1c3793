"""Documents in = written + skipped by reason, whatever comes in; when too much is skipped the run stops."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_let.data.indexed import check_indexed
from megatron_let.data.preprocess import describe
from megatron_let.data.tokenizers import Tokenizer, build_tokenizer
from megatron_let.errors import ConfigError
from tests.data.runs import WriteJsonl, documents, good, one, run


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    """Return the tiny tokenizer."""
    return build_tokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_directory))


class TestPolicy:
    def test_the_first_unusable_record_stops_where_asked(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([{"text": "1"}, b"", {"text": ""}, {"text": None}, {"text": "2"}])
        with pytest.raises(ConfigError, match=r"input\.jsonl:4 \(byte \d+\): null_text; --on-error skip"):
            run(tmp_path / "out", [path], on_error="stop")
        assert [item.name for item in tmp_path.iterdir()] == ["input.jsonl"]

    def test_what_holds_nothing_does_not_stop_anything(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        path = write_jsonl([{"text": "1"}, b"", {"text": ""}] * 5000)
        manifest = one(tmp_path / "out", [path], on_error="stop", max_error_fraction=0.0)
        assert manifest.skipped == {"blank_line": 5000, "empty_text": 5000}

    @pytest.mark.parametrize(("num_bad", "stops"), [(10, False), (11, True)])
    def test_a_share_above_the_limit_stops_the_run(
        self, write_jsonl: WriteJsonl, tmp_path: Path, num_bad: int, stops: bool
    ) -> None:
        path = write_jsonl([*good(10_000 - num_bad), *[b"{broken"] * num_bad])
        if not stops:
            assert one(tmp_path / "out", [path], max_error_fraction=0.001).skipped == {
                "invalid_json": num_bad
            }
            return
        with pytest.raises(
            ConfigError, match=r"11 of 10,000 records are unusable .*--max-error-fraction 0.001"
        ):
            run(tmp_path / "out", [path], max_error_fraction=0.001)
        assert [item.name for item in tmp_path.iterdir()] == ["input.jsonl"]

    @pytest.mark.parametrize(
        ("num_good", "num_bad", "limit"),
        [(500, 10, None), (500, 11, "0.001"), (1, 9_990, "0.001"), (5, 5, None), (4, 5, "more than half")],
    )
    def test_of_fewer_records_as_many_may_be_unusable_but_not_most(
        self, write_jsonl: WriteJsonl, tmp_path: Path, num_good: int, num_bad: int, limit: str | None
    ) -> None:
        path = write_jsonl([*good(num_good), *[{"content": "1"}] * num_bad])
        if limit is None:
            assert one(tmp_path / "out", [path], max_error_fraction=0.001).skipped == {"missing_key": num_bad}
            return
        message = rf"^{num_bad:,} of {num_good + num_bad:,} records are unusable .*missing_key.*{limit}"
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "out", [path], max_error_fraction=0.001)
        assert one(tmp_path / "out", [path], max_error_fraction=1.0).documents == num_good

    def test_a_run_that_stopped_goes_on_with_a_higher_limit(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([*good(9_900), *[b"{broken"] * 200, *good(100)])
        with pytest.raises(ConfigError, match="unusable"):
            run(tmp_path / "out", [path], max_error_fraction=0.001, block_bytes=5000, commit_seconds=0.0)
        assert (tmp_path / "out.partial" / "journal.json").exists()
        manifest = one(tmp_path / "out", [path], max_error_fraction=0.1, block_bytes=5000)
        assert (manifest.documents, manifest.skipped) == (10_000, {"invalid_json": 200})


class TestAccount:
    def test_sums_and_largest_ids_are_those_of_all_blocks(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([{"text": "999"}, *good(500), {"text": "3"}])
        manifest = one(tmp_path / "out", [path], block_bytes=100, append_eod=False)
        assert manifest.max_token_id == 999
        assert manifest.bytes == 3 + sum(len(record["text"]) for record in good(500)) + 1
        assert manifest.tokens == 502

    def test_errors_are_named_before_what_holds_nothing(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([{"text": "1"}, *[b""] * 30, b"{broken", *[b""] * 30, {"text": None}])
        for block_bytes in (10, 10_000):
            manifest = one(tmp_path / f"out_{block_bytes}", [path], block_bytes=block_bytes)
            examples = [example.rpartition(":")[2].strip() for example in manifest.skipped_examples]
            assert examples == ["invalid_json", "null_text", *["blank_line"] * 8]

    @pytest.mark.parametrize(
        ("prefix", "changes", "message"),
        [
            ("x" * 240, {}, "longer than a file's name"),
            ("taken", {}, r"taken_text_document\.bin is a directory"),
            ("out", {"json_keys": ("a/b",)}, "cannot be part of a file's name"),
        ],
    )
    def test_a_name_that_cannot_be_is_refused_before_any_work(
        self, write_jsonl: WriteJsonl, tmp_path: Path, prefix: str, changes: dict[str, Any], message: str
    ) -> None:
        (tmp_path / "taken_text_document.bin").mkdir()
        path = write_jsonl([b"{broken"])
        for split in (False, True) if prefix.startswith("x") else (False,):
            with pytest.raises(
                ConfigError, match=message if not split else "longer than a file's name|no document"
            ):
                run(tmp_path / prefix, [path], split_by_subset=split, **changes)

    def test_what_was_not_read_and_how_it_was_made_stands_in_the_manifest(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        (tmp_path / "in").mkdir()
        write_jsonl(good(3), "in/a.jsonl")
        for name in ("wiki_subsets.json", "mix_blend.txt", ".hidden.jsonl", "c.csv"):
            write_jsonl(good(1), f"in/{name}")
        manifest = one(
            tmp_path / "out", [str(tmp_path / "in")], command="preprocess --input in", encoder="plain"
        )
        assert manifest.unread == {"hidden": 1, "other_kind": 1, "output_of_preprocessing": 2}
        assert f"{tmp_path}/in/.hidden.jsonl: hidden" in manifest.unread_examples
        assert describe(manifest, "out") == (
            "out: 3 documents, 6 tokens (uint16), nothing skipped; 4 files not read: 1 hidden, 1 other_kind, "
            "2 output_of_preprocessing"
        )
        assert (manifest.made["command"], manifest.made["encoder"]) == ("preprocess --input in", "plain")
        assert datetime.fromisoformat(manifest.made["time"]) <= datetime.now(timezone.utc)
        assert {"megatron_let", "tokenizers", "numpy"} <= manifest.made.keys()


class TestLength:
    def test_a_record_above_the_limit_is_counted_and_the_rest_kept(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([{"text": "1"}, {"text": "7 " * 5000 + "7"}, {"text": "2"}])
        for workers in (1, 2):
            prefix = tmp_path / f"out_{workers}"
            manifest = one(prefix, [path], max_document_bytes=5000, block_bytes=700, workers=workers)
            assert manifest.skipped == {"too_long": 1}
            assert manifest.skipped_examples[0].startswith(f"{path}:2 (byte 14): too_long")
            assert documents(prefix, 2) == [[1, 1000], [2, 1000]]

    def test_a_record_at_the_limit_is_kept(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        record = {"text": "7 " * 500 + "7"}
        path = write_jsonl([record])
        length = len(json.dumps(record))
        assert one(tmp_path / "out", [path], max_document_bytes=length).documents == 1
        with pytest.raises(ConfigError, match="1 too_long"):
            run(tmp_path / "none", [path], max_document_bytes=length - 1)


class TestFormats:
    def test_every_form_of_one_text_gives_the_same_pair(
        self, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        plain = Path(write_jsonl(good(300)))
        forms = {"plain": str(plain)}
        for name, content in (
            ("a.gz", gzip.compress(plain.read_bytes())),
            ("b.zst", zstandard.compress(plain.read_bytes())),
            ("misnamed.jsonl", zstandard.compress(plain.read_bytes())),
        ):
            (tmp_path / name).write_bytes(content)
            forms[name] = str(tmp_path / name)
        parquet.write_table(pyarrow.Table.from_pylist(good(300)), tmp_path / "c.parquet", row_group_size=70)
        forms["parquet"] = str(tmp_path / "c.parquet")
        (tmp_path / "lines.txt").write_text("\n".join(record["text"] for record in good(300)) + "\n")
        forms["lines"] = str(tmp_path / "lines.txt")
        expected = one(tmp_path / "expected", [str(plain)])
        for name, path in forms.items():
            manifest = one(tmp_path / f"out_{name}", [path], text_documents="line")
            assert (manifest.bin_sha256, manifest.idx_sha256) == (expected.bin_sha256, expected.idx_sha256), (
                name
            )
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(plain.read_bytes()))))
        manifest = one(tmp_path / "out_stdin", ["-"])
        assert (manifest.bin_sha256, manifest.idx_sha256) == (expected.bin_sha256, expected.idx_sha256)
        assert manifest.sources[0].size == plain.stat().st_size
        assert manifest.sources[0].sha256 == expected.sources[0].sha256

    def test_a_text_file_is_one_document(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        for name, text in (("b.txt", "the fox\n\njumps"), ("a.txt", "日本")):
            (tmp_path / name).write_text(text, encoding="utf-8")
        manifest = one(tmp_path / "out", [str(tmp_path)], tokenizer)
        assert manifest.documents == 2
        ids = [[*tokenizer.tokenize(text), tokenizer.eod] for text in ("日本", "the fox\n\njumps")]
        assert documents(tmp_path / "out", 2) == ids

    def test_sources_carry_the_checksums_of_the_files(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        paths = [write_jsonl(good(20), name) for name in ("a.jsonl", "b.jsonl")]
        with pytest.raises(ConfigError, match="have the same content"):
            run(tmp_path / "out", paths)
        paths[1] = write_jsonl(good(19), "b.jsonl")
        manifest = one(tmp_path / "out", paths)
        import hashlib

        assert [source.sha256 for source in manifest.sources] == [
            hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths
        ]


class TestSpecialTokens:
    def test_an_end_written_out_in_a_text_is_counted(
        self, tokenizer: Tokenizer, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([{"text": "a<|endoftext|>b<|endoftext|>"}, {"text": "fox"}])
        manifest = one(tmp_path / "out", [path], tokenizer)
        assert manifest.eod_in_text == 2
        assert documents(tmp_path / "out", 1)[0].count(tokenizer.eod) == 3

    def test_it_is_text_where_asked(
        self, tokenizer_directory: Path, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        escaping = build_tokenizer(
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer_directory),
            encode_special_tokens=True,
        )
        path = write_jsonl([{"text": "a<|endoftext|>b"}])
        manifest = one(tmp_path / "out", [path], escaping)
        assert manifest.eod_in_text == 0
        assert documents(tmp_path / "out", 1)[0].count(escaping.eod) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
nasty_lines = st.one_of(
    st.binary(max_size=40).map(lambda line: line.replace(b"\n", b" ")),
    st.dictionaries(st.sampled_from(["text", "meta", "x"]), json_values, max_size=3).map(
        lambda record: json.dumps(record).encode("utf-8", "surrogatepass")
    ),
    st.text(max_size=30).map(
        lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace")
    ),
)


@given(
    lines=st.lists(nasty_lines, min_size=1, max_size=30), ends=st.booleans(), block_bytes=st.integers(1, 200)
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_line_is_accounted_for_and_every_text_read_back(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    ends: bool,
    block_bytes: int,
) -> None:
    """Against a reading of the same file with the standard library alone."""
    directory = tmp_path_factory.mktemp("lines")
    content = b"\n".join([b'{"text": "the fox"}', *lines]) + (b"\n" if ends else b"")
    (directory / "input.jsonl").write_bytes(content)
    manifest = one(directory / "out", [str(directory / "input.jsonl")], tokenizer, block_bytes=block_bytes)
    texts: list[list[str]] = []
    pieces = content.split(b"\n")
    for line in pieces[:-1] if pieces[-1] == b"" else pieces:
        try:
            value = json.loads(line.decode("utf-8"))["text"]
            value = value if isinstance(value, list) else [value]
            if any(value) and all(
                isinstance(text, str) and text.encode("utf-8") is not None for text in value
            ):
                texts.append(value)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    expected = [[token_id for text in value for token_id in tokenizer.tokenize(text)] for value in texts]
    expected = [[*ids, tokenizer.eod] for ids in expected if ids]
    assert manifest.records == len(pieces) - (pieces[-1] == b"")
    assert manifest.documents == len(expected)
    assert documents(directory / "out", len(expected)) == expected
    assert check_indexed(f"{directory / 'out'}_text_document").documents == len(expected)
    assert Counter(manifest.skipped).total() == manifest.records - len(expected)
