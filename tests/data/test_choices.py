"""What a run is asked to leave out, and the list of what it left out: the same in one go, in pieces and by workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_let.data.preprocess import preprocess
from megatron_let.errors import ConfigError
from tests.data.runs import WriteJsonl, documents, good, one, run
from tests.data.stopped_runs import TOKENIZER, Stopped, digests, lines, settings_for, stop_after, whole_run

CHOICES: dict[str, Any] = {
    "list_skipped": True,
    "map_documents": True,
    "excluded_subsets": ("GitHub",),
    "limit": 1_900,
}


def listed(prefix: Path, key: str = "text") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{prefix}_{key}_skipped.jsonl").read_text().splitlines()]


class TestListing:
    def test_every_skipped_record_is_listed_with_its_place(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        rows: list[Any] = [
            {"text": "1"},
            b"{broken",
            b"",
            b"",
            b"",
            {"text": None},
            {"text": "x"},
            {"text": "2"},
        ]
        first, second = write_jsonl(rows), write_jsonl(lines(600), "b.jsonl")
        manifest = one(tmp_path / "out", [first, second], list_skipped=True, block_bytes=300)
        found = listed(tmp_path / "out")
        assert found[:4] == [
            {"file": first, "record": 2, "byte": 14, "reason": "invalid_json"},
            {"file": first, "record": 3, "byte": 22, "reason": "blank_line", "count": 3},
            {"file": first, "record": 6, "byte": 25, "reason": "null_text"},
            {"file": first, "record": 7, "byte": 40, "reason": "not_encodable"},
        ]
        content = Path(second).read_bytes()
        for item in found[4:]:
            before = content[: item["byte"]]
            assert (item["file"], item["record"]) == (second, before.count(b"\n") + 1)
            assert before[-1:] in (b"", b"\n")
        for reason, count in manifest.skipped.items():
            assert sum(item.get("count", 1) for item in found if item["reason"] == reason) == count
        assert Path(f"{tmp_path}/out_text_skipped.jsonl").name not in str(manifest.sources)

    def test_there_is_one_for_each_key_and_an_empty_one_where_nothing_is_skipped(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([{"text": "1", "title": "2"}, {"text": "3", "title": "4"}, {"text": "5"}])
        run(tmp_path / "out", [path], json_keys=("text", "title"), list_skipped=True)
        assert listed(tmp_path / "out") == []
        assert [item["reason"] for item in listed(tmp_path / "out", "title")] == ["missing_key"]


class TestSubsets:
    def test_records_of_an_excluded_subset_are_counted_and_no_errors(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        rows = [{"text": "1", "meta": {"pile_set_name": name}} for name in ("A", "B", "C", "B")] * 50
        path = write_jsonl([*rows, {"text": "7"}])
        manifest = one(
            tmp_path / "out", [path], excluded_subsets=("A", "B"), on_error="stop", max_error_fraction=0.0
        )
        assert manifest.skipped == {"excluded_subset": 150}
        assert {name: count.documents for name, count in manifest.subsets.items()} == {"C": 50, "": 1}

    def test_a_name_that_no_record_has_is_told(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        said: list[str] = []
        settings = settings_for(tmp_path / "out", [write_jsonl(good(2))], excluded_subsets=("wiki",))
        preprocess(settings, TOKENIZER, said.append)
        assert any(line.startswith("--exclude-subset: no record is of wiki") for line in said)


class TestLimit:
    @pytest.mark.parametrize("limit", [1, 2, 7, 10, 11, 13])
    def test_the_first_records_are_those_of_a_file_that_ends_there(
        self, write_jsonl: WriteJsonl, tmp_path: Path, limit: int
    ) -> None:
        rows: list[Any] = [*good(4), b"{broken", b"", *good(4)]
        paths = [write_jsonl(rows), write_jsonl([{"text": "9"}, {"text": "8"}, {"text": "7"}], "b.jsonl")]
        for block_bytes, workers in ((20, 1), (1_000_000, 1), (40, 2) if limit == 7 else (40, 1)):
            prefix = tmp_path / f"out_{block_bytes}"
            manifest = one(prefix, paths, limit=limit, block_bytes=block_bytes, workers=workers)
            texts = [
                row["text"]
                for row in [*rows, *({"text": str(n)} for n in (9, 8, 7))][:limit]
                if isinstance(row, dict)
            ]
            assert manifest.records == limit
            assert documents(prefix, manifest.documents) == [[int(text), 1000] for text in texts]
            assert len(manifest.sources) == (1 if limit <= 10 else 2)
            assert (manifest.sources[0].sha256 == "") is (limit < 10)

    def test_it_is_told_and_one_beyond_the_end_changes_nothing(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        said: list[str] = []
        paths = [write_jsonl(good(5)), write_jsonl(good(6), "b.jsonl")]
        preprocess(settings_for(tmp_path / "out", paths, limit=7), TOKENIZER, said.append)
        assert said[-1] == "--limit: 7 records are read, 1 of 2 files to the end"
        whole = one(tmp_path / "whole", paths)
        assert one(tmp_path / "more", paths, limit=100).bin_sha256 == whole.bin_sha256
        with pytest.raises(ConfigError, match="--limit 0 must be at least 1 record"):
            one(tmp_path / "none", paths, limit=0)


def test_a_run_with_all_of_it_is_the_same_from_every_chunk_on(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_run(tmp_path / "whole" / "out", inputs, **CHOICES)
    assert {"out_text_skipped.jsonl", "out_text_document.map.npy"} <= expected.keys()
    (tmp_path / "stopped").mkdir()
    settings = settings_for(tmp_path / "stopped" / "out", inputs, **CHOICES)
    num_stops = 0
    while True:
        undo = stop_after(5, monkeypatch)
        try:
            preprocess(settings, TOKENIZER, lambda line: None)
            break
        except Stopped:
            num_stops += 1
        finally:
            undo()
    assert num_stops > 10
    assert digests(tmp_path / "stopped") == expected


def test_a_stopped_run_goes_on_with_the_same_choices_only(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = stop_after(3, monkeypatch)
    with pytest.raises(Stopped):
        preprocess(settings_for(tmp_path / "out", inputs, **CHOICES), TOKENIZER, lambda line: None)
    undo()
    for name, flag in (
        ("limit", "--limit"),
        ("map_documents", "--document-map"),
        ("list_skipped", "--skipped-file"),
        ("excluded_subsets", "--exclude-subset"),
    ):
        changes = {**CHOICES, name: () if name == "excluded_subsets" else None}
        with pytest.raises(ConfigError, match=rf"with other arguments \({flag} was "):
            preprocess(settings_for(tmp_path / "out", inputs, **changes), TOKENIZER, lambda line: None)
