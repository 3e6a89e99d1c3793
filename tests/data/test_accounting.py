"""Documents in = written + skipped by reason, whatever comes in; when too much is skipped the run stops."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_let.data.indexed import check_indexed, read_document
from megatron_let.data.manifest import Manifest, SubsetCount, read_manifest
from megatron_let.data.preprocess import PreprocessSettings, preprocess
from megatron_let.data.tokenizers import NullTokenizer, Tokenizer, build_tokenizer
from megatron_let.errors import ConfigError

WriteJsonl = Callable[..., str]
NUMBERS = NullTokenizer(1000)
PROGRAM = Path(__file__).with_name("preprocess_program.py")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    """Return the tiny tokenizer."""
    return build_tokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_directory))


def run(
    prefix: Path, inputs: Sequence[str], tokenizer: Tokenizer = NUMBERS, **changes: Any
) -> dict[str, Manifest]:
    chosen: dict[str, Any] = {"append_eod": True, "max_error_fraction": 1.0, **changes}
    return preprocess(PreprocessSettings(tuple(inputs), str(prefix), **chosen), tokenizer, lambda line: None)


def one(prefix: Path, inputs: Sequence[str], tokenizer: Tokenizer = NUMBERS, **changes: Any) -> Manifest:
    (manifest,) = run(prefix, inputs, tokenizer, **changes).values()
    assert manifest.records == manifest.documents + sum(manifest.skipped.values())
    return manifest


def documents(prefix: Path, count: int) -> list[list[int]]:
    return [read_document(f"{prefix}_text_document", index).tolist() for index in range(count)]


def good(count: int) -> list[dict[str, str]]:
    return [{"text": str(number % 1000)} for number in range(count)]


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

    def test_fewer_records_are_not_judged(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        path = write_jsonl([*good(9_998), b"{broken"])
        assert one(tmp_path / "out", [path], max_error_fraction=0.0).records == 9_999

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


class TestSubsets:
    RECORDS = (
        {"text": "1 2 3", "meta": {"pile_set_name": "Pile-CC"}},
        {"text": "4", "meta": {"pile_set_name": "Wikipedia (en)"}},
        {"text": "5 6", "meta": {"pile_set_name": "Pile-CC"}},
        {"text": "7"},
        {"text": None, "meta": {"pile_set_name": "Pile-CC"}},
        {"text": "8", "meta": {"pile_set_name": 5}},
    )

    def test_they_are_counted_in_the_manifest(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        manifest = one(tmp_path / "out", [write_jsonl(self.RECORDS)])
        assert manifest.subsets == {
            "": SubsetCount(2, 4, 2),
            "Pile-CC": SubsetCount(2, 7, 8),
            "Wikipedia (en)": SubsetCount(1, 2, 1),
        }
        assert manifest == read_manifest(str(tmp_path / "out_text_document"))

    def test_each_gets_its_pair_and_the_blend_names_all(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl(self.RECORDS)
        for workers in (1, 2):
            directory = tmp_path / str(workers)
            manifests = run(directory / "out", [path], split_by_subset=True, workers=workers, block_bytes=50)
            names = {"Pile-CC": "Pile-CC", "Wikipedia (en)": "Wikipedia_en", "": "unnamed"}
            assert {manifest.subset: prefix for prefix, manifest in manifests.items()} == {
                subset: str(directory / f"out_{name}_text_document") for subset, name in names.items()
            }
            pile = str(directory / "out_Pile-CC_text_document")
            assert [read_document(pile, index).tolist() for index in (0, 1)] == [
                [1, 2, 3, 1000],
                [5, 6, 1000],
            ]
            assert all(manifest.records == manifest.documents for manifest in manifests.values())
            report = json.loads((directory / "out_text_subsets.json").read_text())
            assert report["records"] == 6 == report["documents"] + sum(report["skipped"].values())
            assert report["skipped"] == {"null_text": 1}
            assert {name: entry["tokens"] for name, entry in report["subsets"].items()} == {
                **{"Pile-CC": 7, "Wikipedia (en)": 2, "": 4}
            }
            words = (directory / "out_text_blend.txt").read_text().split()
            assert words == report["data_path"]
            assert dict(zip(words[1::2], map(float, words[::2]), strict=True)) == pytest.approx(
                {
                    prefix: manifest.tokens / 13  # natural: every token as often
                    for prefix, manifest in manifests.items()
                },
                rel=1e-5,  # six digits are written
            )

    def test_another_key_and_given_weights(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        path = write_jsonl([{"text": "1", "source": "a"}, {"text": "2", "source": "b"}])
        run(
            tmp_path / "out",
            [path],
            split_by_subset=True,
            subset_key="source",
            subset_weights={"b": 3.0},
        )
        blend = (tmp_path / "out_text_blend.txt").read_text()
        assert blend == f"3 {tmp_path / 'out_b_text_document'}\n"

    def test_a_key_that_names_every_record_is_refused_when_split_and_bounded_when_counted(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([{"text": "1", "id": f"document {number}"} for number in range(1200)])
        with pytest.raises(ConfigError, match="more than 256 subsets under id"):
            run(tmp_path / "out", [path], split_by_subset=True, subset_key="id")
        manifest = one(tmp_path / "out", [path], subset_key="id")
        assert len(manifest.subsets) == 1001
        assert manifest.subsets["(others)"].documents == 200

    def test_two_keys_and_subsets_whose_names_meet_get_a_pair_each(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        records = [{"text": "1", "x_text": "2", "s": "a_x"}, {"text": "3", "x_text": "4", "s": "a"}]
        manifests = run(
            tmp_path / "out",
            [write_jsonl(records)],
            split_by_subset=True,
            subset_key="s",
            json_keys=("text", "x_text"),
        )
        found = {
            (m.subset, m.json_key): read_document(prefix, 0).tolist()[0] for prefix, m in manifests.items()
        }
        assert found == {("a_x", "text"): 1, ("a_x", "x_text"): 2, ("a", "text"): 3, ("a", "x_text"): 4}

    def test_a_subset_called_unnamed_is_not_that_of_records_without_a_name(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl([{"text": "1", "s": "unnamed"}, {"text": "2"}])
        run(
            tmp_path / "out",
            [path],
            split_by_subset=True,
            subset_key="s",
            subset_weights={"": 2.0, "unnamed": 1.0},
        )
        report = json.loads((tmp_path / "out_text_subsets.json").read_text())
        assert {name: entry["documents"] for name, entry in report["subsets"].items()} == {
            "": 1,
            "unnamed": 1,
        }
        assert sorted(report["data_path"][::2]) == ["1", "2"]

    def test_a_misspelt_weight_ends_the_run_which_then_goes_on_with_the_right_one(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl(self.RECORDS)
        said: list[str] = []
        for weights in ({"Pile-C": 1.0}, {"Pile-CC": 1.0}):
            settings = PreprocessSettings(
                (path,), str(tmp_path / "out"), split_by_subset=True, subset_weights=weights
            )
            if "Pile-C" in weights:
                with pytest.raises(ConfigError, match=r"names 'Pile-C'.* nothing is encoded again"):
                    preprocess(settings, NUMBERS, said.append)
                said.clear()
            else:
                preprocess(settings, NUMBERS, said.append)
        assert said[0].startswith("going on after")
        assert (
            said[-1] == f"--subset-weights leaves {tmp_path / 'out_unnamed_text_document'} out of the blend"
        )
        assert (
            tmp_path / "out_text_blend.txt"
        ).read_text() == f"1 {tmp_path / 'out_Pile-CC_text_document'}\n"

    def test_a_pair_that_an_earlier_run_left_is_named(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        run(tmp_path / "out", [write_jsonl(self.RECORDS)], split_by_subset=True)
        said: list[str] = []
        path = write_jsonl(self.RECORDS[:2], "fewer.jsonl")
        preprocess(
            PreprocessSettings((path,), str(tmp_path / "out"), split_by_subset=True), NUMBERS, said.append
        )
        assert (
            said[-1] == f"{tmp_path / 'out_unnamed_text_document'} is of an earlier run, and not in the blend"
        )

    def test_a_prefix_that_a_blend_cannot_hold_is_refused(
        self, write_jsonl: WriteJsonl, tmp_path: Path
    ) -> None:
        path = write_jsonl(self.RECORDS)
        for name in ("o ut", "out\udcff"):
            with pytest.raises(ConfigError, match="--data-path could not take it"):
                run(tmp_path / name, [path], split_by_subset=True)

    def test_a_long_name_is_cut_when_it_is_counted(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        path = write_jsonl([{"text": "1", "s": "x" * 10_000}])
        assert one(tmp_path / "out", [path], subset_key="s").subsets == {"x" * 200: SubsetCount(1, 2, 1)}

    @pytest.mark.parametrize("hard", [False, True])
    def test_many_subsets_need_many_open_files(
        self, write_jsonl: WriteJsonl, tmp_path: Path, hard: bool
    ) -> None:
        """More than a shell usually allows; a program may raise that by itself, up to a limit that it may not."""
        path = write_jsonl([{"text": "1", "s": f"subset {number}"} for number in range(100)])
        settings = {
            "inputs": [path],
            "output_prefix": str(tmp_path / "out"),
            "split_by_subset": True,
            "subset_key": "s",
        }
        limit = f"ulimit -{'H' if hard else 'S'}n 200; exec " + '"$@"'
        command = [sys.executable, str(PROGRAM), json.dumps({"json_keys": ["text"], **settings})]
        result = subprocess.run(
            ["bash", "-c", f"ulimit -Sn 200; {limit}", "bash", *command],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if hard:
            assert result.returncode == 1
            assert result.stdout.splitlines()[-1].startswith(
                "error: a pair for each subset needs three open files"
            )
        else:
            assert result.returncode == 0, result.stdout
            assert len(list(tmp_path.glob("*.bin"))) == 100

    def test_weights_without_a_split_are_refused(self, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--subset-weights needs --split-by-subset"):
            run(tmp_path / "out", [write_jsonl(good(1))], subset_weights={"a": 1.0})


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
