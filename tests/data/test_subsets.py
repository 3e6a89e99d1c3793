"""Subsets: file names that no two share and none escapes with, and blends that training can read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.utils import get_blend_from_list

from megatron_let.data.subsets import blend_words, pair_name, parse_weights, subset_report
from megatron_let.errors import ConfigError
from tests.data.test_manifest import MANIFEST

THREE = {
    "data/a_text_document": replace(MANIFEST, subset="a", tokens=600),
    "data/b_text_document": replace(MANIFEST, subset="b b", tokens=300),
    "data/c_text_document": replace(MANIFEST, subset="c", tokens=100),
}


@pytest.mark.parametrize(
    ("subset", "name"),
    [
        ("Pile-CC", "Pile-CC"),
        ("Wikipedia (en)", "Wikipedia_en"),
        ("PubMed Central", "PubMed_Central"),
        ("../../etc/passwd", "etc_passwd"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("日本", "unnamed"),
        ("x" * 300, "x" * 80),
    ],
)
def test_names_of_subsets_become_names_of_files(subset: str, name: str) -> None:
    assert pair_name(subset, "text", []) == f"_{name}_text_document"


@given(
    st.lists(
        st.tuples(st.text(max_size=100), st.sampled_from(["text", "x_text", "Text"])),
        unique=True,
        max_size=20,
    )
)
def test_no_two_pairs_share_a_file_and_none_leaves_the_directory(pairs: list[tuple[str, str]]) -> None:
    taken: list[str] = []
    for subset, key in pairs:
        name = pair_name(subset, key, taken)
        assert Path(name).name == name
        assert name.isascii()
        taken.append(name)
    assert len({name.lower() for name in taken}) == len(pairs)


def test_a_subset_and_a_key_that_make_one_name_get_two_files() -> None:
    first = pair_name("a_x", "text", [])
    assert first == "_a_x_text_document"
    assert pair_name("a", "x_text", [first]) not in ("", first)
    assert pair_name("A_X", "text", [first]).lower() != first.lower()


def test_the_natural_blend_weighs_by_tokens_and_megatron_reads_it() -> None:
    words = blend_words(THREE, {})
    assert " ".join(words) == "0.6 data/a_text_document 0.3 data/b_text_document 0.1 data/c_text_document"
    prefixes, weights = get_blend_from_list(words)
    assert prefixes == list(THREE)
    assert weights == [0.6, 0.3, 0.1]


def test_given_weights_replace_the_natural_ones_and_leave_the_others_out() -> None:
    weights = parse_weights(["b b=2", "c=0.5"])
    assert " ".join(blend_words(THREE, weights)) == "2 data/b_text_document 0.5 data/c_text_document"


def test_a_weight_for_a_subset_that_is_not_there_is_refused_with_the_names_of_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"names 'd', and there is no such subset \(there are a, b b, c\)"):
        blend_words(THREE, {"a": 1.0, "d": 1.0})


@pytest.mark.parametrize("words", [["a"], ["a=x"], ["a=0"], ["a=-1"], ["a=inf"], ["a=nan"], ["a=1", "a=2"]])
def test_a_weight_that_is_none_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"--subset-weights {words[-1]}"):
        parse_weights(words)


def test_a_name_may_hold_an_equals_sign() -> None:
    assert parse_weights(["a=b=0.5"]) == {"a=b": 0.5}


def test_the_report_tells_all() -> None:
    report = subset_report({"records": 9, "documents": 9}, THREE, blend_words(THREE, {}))
    assert report["records"] == 9
    assert report["subsets"]["b b"] == {
        "prefix": "data/b_text_document",
        "documents": MANIFEST.documents,
        "tokens": 300,
        "bytes": MANIFEST.bytes,
    }
    assert report["data_path"] == blend_words(THREE, {})
