"""The benchmark of preprocessing: once at a tiny size with a stand-in for the peer; sides that disagree are an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import benchmark
import benchmark_data
import pytest
from benchmark_data import Side, measure_data, require_same_bytes, write_corpus

# In the place of Megatron-LM's tool: our own.
PEER = f"""
import sys
sys.path.insert(0, {str(benchmark_data.ROOT)!r})
from tools.preprocess_data import main
sys.exit(main())
"""


def test_every_side_is_measured_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_data, "VOCABULARY", 300)
    out = tmp_path / "data.json"
    command = ["data", "--megabytes", "1", "--workers", "1", "2", "--repeats", "1", "--json", str(out)]
    peer = tmp_path / "peer" / "tools" / "preprocess_data.py"
    peer.parent.mkdir(parents=True)
    peer.write_text(PEER)
    assert benchmark.main([*command, "--megatron-lm", str(tmp_path / "peer")]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [(row["side"], row["input"], row["workers"]) for row in rows] == [
        ("read and parse only", "corpus.jsonl", None),
        ("read and parse only", "corpus.jsonl.zst", None),
        ("tokenizer only, one thread", "corpus.jsonl", None),
        ("tokenizer only, ids not read", "corpus.jsonl", None),
        *(("ours, plain", "corpus.jsonl", workers) for workers in (1, 2)),
        *(("ours, fast", "corpus.jsonl", workers) for workers in (1, 2)),
        *(("ours, fast", "corpus.jsonl.zst", workers) for workers in (1, 2)),
        ("start-up: ten documents", "ten.jsonl", 1),
        ("Megatron-LM's tool", "corpus.jsonl", 1),
        ("Megatron-LM's start-up: ten documents", "ten.jsonl", 1),
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert row["peak MB a process"] > 5
        if row["input"] != "ten.jsonl":
            assert row["MB/s"] == pytest.approx(1.0 / row["seconds"], rel=0.2, abs=0.1)
    peers = {row["side"]: row for row in rows}
    assert peers["Megatron-LM's tool"]["over Megatron-LM"] == 1.0
    assert any("of the rate of tokenizer only, one thread" in note for note in result["notes"])


def test_a_side_that_writes_other_bytes_is_an_error(tmp_path: Path) -> None:
    sides: list[Side] = []
    for name, content in (("one", "a"), ("two", "b")):
        output = tmp_path / f"{name}_text_document"
        write = f"from pathlib import Path; Path('{output}.bin').write_text('{content}'); Path('{output}.idx').touch()"
        sides.append(Side(name, "corpus.jsonl", 1, (sys.executable, "-c", write), output))
        sides[-1].take_turn()
    with pytest.raises(RuntimeError, match="one and two wrote different pairs"):
        require_same_bytes(sides)
    sides[1].digest = sides[0].digest
    require_same_bytes(sides)
    sides[1].digest, sides[1].file = "", "ten.jsonl"  # of another input
    require_same_bytes(sides)


def test_a_side_that_fails_says_what_it_said(tmp_path: Path) -> None:
    side = Side("broken", "x", None, ("python3", "-c", "print('no such thing'); raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match="broken on x failed:\nno such thing"):
        side.take_turn()


def test_texts_that_give_out_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_data, "_texts", lambda: iter([("a", "x" * 500), ("b", "y" * 500)]))
    written, unique = write_corpus(tmp_path / "corpus.jsonl", 2000)
    lines = (tmp_path / "corpus.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["meta"]["pile_set_name"] for line in lines] == ["a", "b", "a", "b"]
    assert (written, unique) == (
        sum(len(line) + 1 for line in lines),
        sum(len(line) + 1 for line in lines[:2]),
    )


def test_one_kind_of_side_can_be_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_data, "VOCABULARY", 300)
    conditions, rows, notes = measure_data(
        tmp_path, megabytes=1, workers=[1], kinds=["fast"], repeats=1, megatron_lm=None
    )
    assert [row["side"] for row in rows] == ["ours, fast", "ours, fast", "start-up: ten documents"]
    assert "(1 MB of it unique)" in conditions
    assert len(notes) == 1
