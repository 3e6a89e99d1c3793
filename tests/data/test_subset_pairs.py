"""Subsets of a run: counted in the manifest, or a pair for each with a blend of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.data.indexed import read_document
from megatron_let.data.manifest import SubsetCount, read_manifest
from megatron_let.data.preprocess import PreprocessSettings, preprocess
from megatron_let.errors import ConfigError
from tests.data.runs import NUMBERS, PROGRAM, WriteJsonl, good, one, run
from tests.processes import HANG_SECONDS


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
            timeout=HANG_SECONDS,
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
