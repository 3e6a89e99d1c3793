"""Subsets in a worker: counted by name, or a part for each."""

from __future__ import annotations

import json
from dataclasses import replace

from megatron_let.data.encoding import (
    encode_block,
)
from megatron_let.data.manifest import SubsetCount
from tests.data.encoded import RULES, CharacterEncoder, block_of, check_account, encode, ids_of

PILE = b"".join(
    json.dumps({"text": text, "meta": {"pile_set_name": name}}).encode() + b"\n"
    for text, name in [("a", "Wiki"), ("bc", "Git"), ("d", "Wiki"), (" ", "Git"), ("\u00e9", "Git")]
)
NAMELESS = b'{"text": "e"}\n{"text": "f", "meta": 5}\n{"text": "g", "meta": {"pile_set_name": ["Git"]}}\n'


def test_subsets_are_counted_by_name() -> None:
    part, skipped = encode(PILE + NAMELESS)
    assert part is not None
    assert part.subset is None
    assert ids_of(part) == [97, 0, 98, 99, 0, 100, 0, 233, 0, 101, 0, 102, 0, 103, 0]
    assert part.subset_counts == {
        "Wiki": SubsetCount(documents=2, tokens=4, bytes=2),
        "Git": SubsetCount(documents=2, tokens=5, bytes=4),
        "": SubsetCount(documents=3, tokens=6, bytes=3),
    }
    assert [item.record for item in skipped] == [4]


def test_split_by_subset_gives_each_subset_its_documents_in_their_order() -> None:
    rules = replace(RULES, split_by_subset=True)
    block = encode_block(block_of(PILE + NAMELESS), rules, CharacterEncoder())
    check_account(block, rules)
    assert {part.subset: ids_of(part) for part in block.parts} == {
        "Wiki": [97, 0, 100, 0],
        "Git": [98, 99, 0, 233, 0],
        "": [101, 0, 102, 0, 103, 0],
    }
    assert all(set(part.subset_counts) == {part.subset} for part in block.parts)
    assert [item.record for item in block.skipped["text"].first] == [4]


def test_the_path_to_the_subset_is_a_setting() -> None:
    content = b'{"text": "a", "source": "web"}\n{"text": "a", "source": "\\ud800"}\n'
    part, _ = encode(content, replace(RULES, subset_key="source"))
    assert part is not None
    assert set(part.subset_counts) == {"web", "?"}
