"""From a document back to its file and line: after runs, splits, merges, and of no other files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_let.data.document_map import map_path, open_map
from megatron_let.data.indexed import read_document
from megatron_let.data.manifest import read_manifest
from megatron_let.data.merge import merge
from megatron_let.errors import ConfigError
from tests.data.runs import WriteJsonl, one, run
from tests.data.stopped_runs import TOKENIZER, lines
from tests.tools.test_data_tools import run as run_tool


def check_places(prefix: str) -> int:
    """Read every document of uncompressed JSON lines where the map says, and compare; return how many there are."""
    manifest = read_manifest(prefix)
    assert manifest is not None
    rows = open_map(prefix, manifest.documents)
    for index, (source, record, byte) in enumerate(rows.tolist()):
        content = Path(manifest.sources[source].path).read_bytes()
        line = content[byte:].split(b"\n", 1)[0]
        assert line == content.split(b"\n")[record - 1]
        ids = [*map(int, json.loads(line)[manifest.json_key].split(" ")), TOKENIZER.eod]
        assert read_document(prefix, index).tolist() == ids
    return len(rows)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_is_found_in_its_file(write_jsonl: WriteJsonl, tmp_path: Path, workers: int) -> None:
    paths = [write_jsonl(lines(count), f"{count}.jsonl") for count in (150, 90, 40)]
    settings = {"map_documents": True, "block_bytes": 3000, "workers": workers}
    one(tmp_path / "out", paths, TOKENIZER, **settings)
    assert check_places(f"{tmp_path}/out_text_document") > 250
    if workers == 1:
        made = run(
            tmp_path / "split",
            paths,
            TOKENIZER,
            **settings,
            split_by_subset=True,
            json_keys=("text", "title"),
        )
        assert sum(map(check_places, made)) > 500


def test_merging_joins_the_maps(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    first, second = write_jsonl(lines(60)), write_jsonl(lines(30), "b.jsonl")
    made = run(tmp_path / "split", [first, second], TOKENIZER, map_documents=True, split_by_subset=True)
    third = write_jsonl(lines(20), "c.jsonl")
    one(tmp_path / "more", [third, first], TOKENIZER, map_documents=True)
    merge([*made, f"{tmp_path}/more_text_document"], f"{tmp_path}/all", print)
    assert check_places(f"{tmp_path}/all") > 160
    map_path(f"{tmp_path}/more_text_document").unlink()
    said: list[str] = []
    merge([*made, f"{tmp_path}/more_text_document"], f"{tmp_path}/all", said.append)
    assert said[-1] == f"no document map is written: {tmp_path}/more_text_document has none"
    assert not map_path(f"{tmp_path}/all").exists()


def test_a_map_of_other_files_does_not_stay_or_is_refused(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    path, prefix = write_jsonl(lines(20)), f"{tmp_path}/out_text_document"
    documents = one(tmp_path / "out", [path], TOKENIZER, map_documents=True).documents
    np.save(map_path(prefix), np.zeros((documents - 1, 3), dtype=np.int64))
    with pytest.raises(ConfigError, match=r"map\.npy belongs to other files"):
        open_map(prefix, documents)
    map_path(prefix).write_bytes(b"no array")
    with pytest.raises(ConfigError, match="cannot read the document map"):
        open_map(prefix, documents)
    one(tmp_path / "out", [path], TOKENIZER)
    assert open_map(prefix, documents) is None


def test_a_document_is_shown_with_its_place(
    write_jsonl: WriteJsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl([{"text": "1"}, b"{broken", {"text": "2 3"}])
    one(tmp_path / "out", [path], TOKENIZER, map_documents=True)
    assert run_tool("inspect_data", f"{tmp_path}/out_text_document", "--document", 1) == 0
    assert f"from {path}, record 3 (byte 22)\n" in capsys.readouterr().out
