"""Records: what becomes a document, what is skipped and why; nothing is ever unaccounted for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data import records
from megatron_let.data.batch_encoders import BackendEncoder, BatchEncoder
from megatron_let.data.encoding import EncodedKey, EncodingRules, encode_block
from megatron_let.data.sources import LineBlock
from megatron_let.data.tokenizers import NullTokenizer

RULES = EncodingRules(json_keys=("text",), dtype="uint16", append_eod=True, eod=0)


class CharacterEncoder(BatchEncoder):
    """One id a character; a text of spaces has none; a text with ! is refused."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any("!" in text for text in texts):
            raise ValueError("no !")
        return [[ord(character) for character in text.strip(" ")] for text in texts]


def encode(content: bytes, rules: EncodingRules = RULES, encoder: BatchEncoder | None = None) -> EncodedKey:
    """Encode a file of one block and check its account."""
    block = encode_block(LineBlock("input", 1, content, len(content)), rules, encoder or CharacterEncoder())
    encoded = block.keys[rules.json_keys[0]]
    num_documents = len(np.frombuffer(encoded.sequence_counts, np.int32))
    assert (
        block.num_lines
        == num_documents + len(encoded.skipped)
        == content.count(b"\n") + (content[-1:] != b"\n")
    )
    assert encoded.num_tokens == len(np.frombuffer(encoded.tokens, rules.dtype))
    return encoded


def ids_of(encoded: EncodedKey) -> list[int]:
    ids: list[int] = np.frombuffer(encoded.tokens, np.uint16).tolist()
    return ids


GOOD = b'{"text": "ab", "other": 1}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", records.BLANK_LINE),
        (b" \t\r", records.BLANK_LINE),
        (b'{"text": "a"', records.INVALID_JSON),
        (b'{"text": "a"} {"text": "b"}', records.INVALID_JSON),
        (b"not json", records.INVALID_JSON),
        (b'{"text": "raw \x00 byte"}', records.INVALID_JSON),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", records.INVALID_JSON),
        (b'{"text": ' + b"[" * 100_000, records.INVALID_JSON),
        (b'{"text": "\xff"}', records.INVALID_UTF8),
        (b'{"text": "\xed\xa0\x80"}', records.INVALID_UTF8),
        ('{"text": "a"}'.encode("utf-16"), records.INVALID_UTF8),
        (b'["text"]', records.NOT_AN_OBJECT),
        (b'"text"', records.NOT_AN_OBJECT),
        (b"17", records.NOT_AN_OBJECT),
        (b"null", records.NOT_AN_OBJECT),
        (b'{"txt": "a"}', records.MISSING_KEY),
        (b'{"text": null}', records.NULL_TEXT),
        (b'{"text": 17}', records.NOT_TEXT),
        (b'{"text": true}', records.NOT_TEXT),
        (b'{"text": {"text": "a"}}', records.NOT_TEXT),
        (b'{"text": ["a", null]}', records.NOT_TEXT),
        (b'{"text": ""}', records.EMPTY_TEXT),
        (b'{"text": []}', records.EMPTY_TEXT),
        (b'{"text": ["", ""]}', records.EMPTY_TEXT),
        (b'{"text": "\\ud800"}', records.LONE_SURROGATE),
        (b'{"text": "  "}', records.NO_TOKENS),
        (b'{"text": "a!"}', records.NOT_ENCODABLE),
    ],
)
def test_each_bad_record_is_skipped_for_its_reason_and_its_neighbours_are_kept(
    line: bytes, reason: str
) -> None:
    encoded = encode(GOOD + line + b"\n" + GOOD)
    assert [(item.line, item.reason) for item in encoded.skipped] == [(2, reason)]
    assert ids_of(encoded) == [97, 98, 0] * 2


@pytest.mark.parametrize("cut", [b'{"text": "ab', b'{"text": "\xe6\x97', b'{"te'])
def test_a_cut_last_line_is_told_apart_and_a_whole_one_without_newline_is_kept(cut: bytes) -> None:
    assert [item.reason for item in encode(GOOD + cut).skipped] == [records.TRUNCATED_LAST_LINE]
    assert encode(GOOD + GOOD.rstrip(b"\n")).skipped == ()


@pytest.mark.parametrize(
    ("line", "ids"),
    [
        (b'\xef\xbb\xbf{"text": "a"}', [97]),  # byte order mark on the first line
        (b'{"text": "a"}\r', [97]),
        (b' {"text":"a"} ', [97]),
        (b'{"text": "a\\u0000b"}', [97, 0, 98]),
        (b'{"text": "\\r\\n\\u2028"}', [13, 10, 0x2028]),
        (b'{"text": "x", "text": "a"}', [97]),
        (b'{"text": "a", "score": NaN}', [97]),
        ('{"text": "é日"}'.encode(), [0xE9, 0x65E5]),
        (b'{"text": "\\ud83e\\udd16 "}'.replace(b"\\ud83e\\udd16 ", b"\\u00e9"), [0xE9]),
    ],
)
def test_unusual_but_valid_records_are_kept(line: bytes, ids: list[int]) -> None:
    encoded = encode(line + b"\n")
    assert encoded.skipped == ()
    assert ids_of(encoded) == [*ids, 0]


def test_a_byte_order_mark_belongs_on_the_first_line_only() -> None:
    assert [item.reason for item in encode(GOOD + b"\xef\xbb\xbf" + GOOD).skipped] == [records.INVALID_JSON]


def test_a_list_of_texts_is_one_document_of_several_sequences() -> None:
    encoded = encode(b'{"text": ["ab", "", " ", "c"]}\n{"text": "d"}\n')
    assert ids_of(encoded) == [97, 98, 99, 0, 100, 0]
    assert np.frombuffer(encoded.lengths, np.int32).tolist() == [2, 2, 2]
    assert np.frombuffer(encoded.sequence_counts, np.int32).tolist() == [2, 1]
    assert encoded.text_bytes == 5


def test_without_append_eod_only_the_texts_ids_are_written() -> None:
    rules = EncodingRules(json_keys=("text",), dtype="uint16", append_eod=False, eod=0)
    assert ids_of(encode(GOOD, rules)) == [97, 98]


def test_each_key_has_its_own_account() -> None:
    rules = EncodingRules(json_keys=("text", "other"), dtype="uint16", append_eod=True, eod=0)
    content = b'{"text": "a"}\n{"text": null, "other": "b"}\n'
    block = encode_block(LineBlock("input", 1, content, len(content)), rules, CharacterEncoder())
    assert ids_of(block.keys["text"]) == [97, 0]
    assert ids_of(block.keys["other"]) == [98, 0]
    assert [item.reason for item in block.keys["text"].skipped] == [records.NULL_TEXT]
    assert [item.reason for item in block.keys["other"].skipped] == [records.MISSING_KEY]


def test_an_id_too_large_for_the_type_is_never_wrapped() -> None:
    tokenizer = NullTokenizer(70000)
    with pytest.raises(OverflowError):
        encode(b'{"text": "70000"}\n', encoder=tokenizer.batch_encoder())
    rules = EncodingRules(json_keys=("text",), dtype="int32", append_eod=True, eod=tokenizer.eod)
    encoded = encode(b'{"text": "69999 5"}\n{"text": "70001"}\n', rules, tokenizer.batch_encoder())
    assert np.frombuffer(encoded.tokens, np.int32).tolist() == [69999, 5, 70000]
    assert encoded.max_token_id == 70000
    assert [item.reason for item in encoded.skipped] == [records.NOT_ENCODABLE]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec=None), max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=4,
)
any_line = st.one_of(
    st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")),
    st.fixed_dictionaries({"text": json_values}).map(lambda record: json.dumps(record).encode()),
    json_values.map(lambda value: json.dumps(value).encode()),
)


@given(lines=st.lists(any_line, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_whatever_the_lines_are_each_is_written_or_skipped(backend: Any, lines: list[bytes]) -> None:
    encode(b"\n".join(lines) + b"\n", encoder=BackendEncoder(backend))


@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), ascii_only=st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_text_is_kept_exactly(backend: Any, texts: list[str], ascii_only: bool) -> None:
    content = b"".join(json.dumps({"text": text}, ensure_ascii=ascii_only).encode() + b"\n" for text in texts)
    rules = EncodingRules(json_keys=("text",), dtype="uint16", append_eod=False, eod=0)
    encoded = encode(content, rules, BackendEncoder(backend))
    ends = np.cumsum(np.frombuffer(encoded.lengths, np.int32)).tolist()
    ids = ids_of(encoded)
    decoded = [
        backend.decode(ids[start:end], skip_special_tokens=False)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    assert decoded == texts
    assert encoded.text_bytes == sum(len(text.encode()) for text in texts)
