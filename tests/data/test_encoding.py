"""Blocks to tokens: what becomes a document, what is skipped and why; nothing is ever unaccounted for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data import records
from megatron_let.data.batch_encoders import BackendEncoder, BatchEncoder, EncodedTexts
from megatron_let.data.blocks import RecordKind
from megatron_let.data.encoding import (
    EncodingRules,
    Skipped,
    SkippedCounts,
    encode_block,
)
from megatron_let.data.long_texts import encode_texts
from megatron_let.data.tokenizers import NullTokenizer
from tests.data.encoded import RULES, CharacterEncoder, block_of, check_account, encode, ids_of

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
    part, skipped = encode(GOOD + line + b"\n" + GOOD)
    assert skipped == (Skipped(record=2, byte=len(GOOD), reason=reason),)
    assert ids_of(part) == [97, 98, 0] * 2


def test_skipped_records_are_counted_and_the_first_of_them_kept_errors_before_harmless_ones() -> None:
    lines = [
        b"",
        b"",
        b'{"text": ""}',
        b"x",
        b'{"text": "a"}',
        b" ",
        b'{"text": "!"}',
        b'{"a": 1}',
        b"{",
        b"",
    ]
    skipped = encode_block(block_of(b"\n".join(lines) + b"\n", record=5), RULES, CharacterEncoder()).skipped
    assert skipped["text"].by_reason == {
        **{records.BLANK_LINE: 4, records.EMPTY_TEXT: 1, records.INVALID_JSON: 2},
        **{records.NOT_ENCODABLE: 1, records.MISSING_KEY: 1},
    }
    first = [(item.record, item.byte) for item in skipped["text"].first]
    places = [0, 1, 2, 15, 17, 31, 33, 47, 56, 58]
    assert first == [(5 + line, places[line]) for line in (3, 6, 7, 8, 0, 1, 2, 5, 9)]


def test_at_most_ten_skipped_records_travel_whatever_their_number() -> None:
    errors = encode_block(block_of(b"\n" * 500 + b"x\n{}\n" * 300), RULES, CharacterEncoder()).skipped["text"]
    assert errors.by_reason == {
        records.BLANK_LINE: 500,
        records.INVALID_JSON: 300,
        records.MISSING_KEY: 300,
    }
    assert [(item.record, item.byte) for item in errors.first] == [
        (501 + index, 500 + index // 2 * 5 + index % 2 * 2) for index in range(10)
    ]
    mixed = encode_block(block_of(b"x\n" + b"\n" * 500), RULES, CharacterEncoder()).skipped["text"]
    assert [item.record for item in mixed.first] == list(range(1, 11))


def test_a_block_is_emptied_once_its_texts_are_copied() -> None:
    block = block_of(GOOD)
    encoded = encode_block(block, RULES, CharacterEncoder())
    assert block.content == b""
    assert encoded.num_bytes == len(GOOD)


def test_lines_without_documents_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a parser raises, which takes long")

    monkeypatch.setattr(records.orjson, "loads", refuse)
    monkeypatch.setattr(records.json, "loads", refuse)
    content = b"\n" * 1_000_000 + b" \n\t\r\nx\n" * 10
    block = encode_block(block_of(content), RULES, CharacterEncoder())
    assert block.num_records == 1_000_030
    assert block.skipped["text"].by_reason == {records.BLANK_LINE: 1_000_020, records.INVALID_JSON: 10}
    assert len(pickle.dumps(block)) < 2000


@pytest.mark.parametrize("cut", [b'{"text": "ab', b'{"text": "\xe6\x97', b'{"te'])
def test_a_cut_last_line_is_told_apart_and_a_whole_one_without_newline_is_kept(cut: bytes) -> None:
    assert encode(GOOD + cut)[1] == (Skipped(2, len(GOOD), records.TRUNCATED_LAST_LINE),)
    assert encode(GOOD + GOOD.rstrip(b"\n"))[1] == ()


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
    part, skipped = encode(line + b"\n")
    assert skipped == ()
    assert ids_of(part) == [*ids, 0]


def test_a_byte_order_mark_belongs_on_the_first_line_only() -> None:
    skipped = encode(GOOD + b"\xef\xbb\xbf" + GOOD)[1]
    assert [item.reason for item in skipped] == [records.INVALID_JSON]
    later = encode_block(block_of(b"\xef\xbb\xbf" + GOOD, record=3, byte=10), RULES, CharacterEncoder())
    assert later.skipped["text"].first == (Skipped(3, 10, records.INVALID_JSON),)


def test_a_list_of_texts_is_one_document_of_several_sequences() -> None:
    part, _ = encode(b'{"text": ["ab", "", " ", "c"]}\n{"text": "d"}\n')
    assert part is not None
    assert ids_of(part) == [97, 98, 99, 0, 100, 0]
    assert np.frombuffer(part.lengths, np.int32).tolist() == [2, 2, 2]
    assert np.frombuffer(part.sequence_counts, np.int32).tolist() == [2, 1]
    assert part.text_bytes == 5


def test_eod_ends_the_last_sequence_that_has_tokens() -> None:
    part, _ = encode(b'{"text": ["ab", "c", " "]}\n{"text": [" "]}\n{"text": ["", "d"]}\n')
    assert part is not None
    assert ids_of(part) == [97, 98, 99, 0, 100, 0]
    assert np.frombuffer(part.lengths, np.int32).tolist() == [2, 2, 2]
    assert np.frombuffer(part.sequence_counts, np.int32).tolist() == [2, 1]


def test_without_append_eod_only_the_texts_ids_are_written() -> None:
    assert ids_of(encode(GOOD, replace(RULES, append_eod=False))[0]) == [97, 98]


@pytest.mark.parametrize("append_eod", [True, False])
def test_an_eod_that_a_text_spells_is_counted_apart_from_the_appended_one(append_eod: bool) -> None:
    part, _ = encode(b'{"text": "a\\u0000b\\u0000"}\n' + GOOD, replace(RULES, append_eod=append_eod))
    assert part is not None
    assert part.eod_in_text == 2


def test_each_key_has_its_own_account() -> None:
    rules = replace(RULES, json_keys=("text", "other"))
    content = b'{"text": "a"}\n{"text": null, "other": "b"}\n'
    block = encode_block(block_of(content), rules, CharacterEncoder())
    check_account(block, rules)
    assert [(part.key, ids_of(part)) for part in block.parts] == [("text", [97, 0]), ("other", [98, 0])]
    assert [item.reason for item in block.skipped["text"].first] == [records.NULL_TEXT]
    assert [item.reason for item in block.skipped["other"].first] == [records.MISSING_KEY]


@pytest.mark.parametrize("append_eod", [True, False])
def test_an_id_too_large_for_the_type_is_never_wrapped(append_eod: bool) -> None:
    tokenizer = NullTokenizer(70000)
    rules = replace(RULES, append_eod=append_eod)
    with pytest.raises(OverflowError):
        encode(b'{"text": "5 70000"}\n', rules, tokenizer.batch_encoder())
    with pytest.raises(OverflowError):
        encode(b'{"text": "5"}\n', replace(RULES, eod=tokenizer.eod), tokenizer.batch_encoder())
    part, skipped = encode(
        b'{"text": "69999 5"}\n{"text": "70001"}\n',
        replace(RULES, dtype="int32", eod=tokenizer.eod),
        tokenizer.batch_encoder(),
    )
    assert part is not None
    assert np.frombuffer(part.tokens, np.int32).tolist() == [69999, 5, 70000]
    assert part.max_token_id == 70000
    assert [item.reason for item in skipped] == [records.NOT_ENCODABLE]


def test_a_text_too_long_to_be_encoded_is_skipped_by_that_name_and_the_others_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def encode_short(encoder: BatchEncoder, texts: Sequence[str]) -> EncodedTexts:
        return encode_texts(encoder, texts, 1)

    monkeypatch.setattr(CharacterEncoder, "max_whole_bytes", 4)
    monkeypatch.setattr("megatron_let.data.encoding.encode_texts", encode_short)
    content = b'{"text": "ab"}\n{"text": "abcdefg"}\n{"text": "!"}\n{"text": "c"}\n'
    part, skipped = encode(content)
    assert ids_of(part) == [97, 98, 0, 99, 0]
    assert [(item.record, item.reason) for item in skipped] == [
        (2, records.TOO_LONG_TO_ENCODE),
        (3, records.NOT_ENCODABLE),
    ]


class NegativeEncoder(BatchEncoder):
    """Gives an id that no embedding has."""

    is_local = False

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        return EncodedTexts(np.full(len(texts), -1), np.ones(len(texts), dtype=np.int64))


def test_a_negative_id_is_never_wrapped() -> None:
    with pytest.raises(OverflowError):
        encode(GOOD, encoder=NegativeEncoder())


PILE = b"".join(
    json.dumps({"text": text, "meta": {"pile_set_name": name}}).encode() + b"\n"
    for text, name in [("a", "Wiki"), ("bc", "Git"), ("d", "Wiki"), (" ", "Git"), ("\u00e9", "Git")]
)
NAMELESS = b'{"text": "e"}\n{"text": "f", "meta": 5}\n{"text": "g", "meta": {"pile_set_name": ["Git"]}}\n'


def test_a_record_that_was_too_long_and_an_empty_end_are_accounted_for() -> None:
    too_long = replace(block_of(b"", record=7, byte=900), too_long=True)
    encoded = encode_block(too_long, RULES, CharacterEncoder())
    assert (encoded.num_records, encoded.parts) == (1, ())
    too_long_once = SkippedCounts({records.TOO_LONG: 1}, (Skipped(7, 900, records.TOO_LONG),))
    assert encoded.skipped == {"text": too_long_once}
    end = encode_block(block_of(b"", record=7, byte=900), RULES, CharacterEncoder())
    assert (end.num_records, end.parts, end.is_last) == (0, (), True)
    assert end.skipped == {"text": SkippedCounts({}, ())}


def test_plain_text_is_under_the_first_key_and_missing_under_the_others() -> None:
    rules = replace(RULES, json_keys=("text", "other"))
    lines = encode_block(block_of(b"ab\n\ncd", RecordKind.TEXT_LINES), rules, CharacterEncoder())
    whole = encode_block(block_of(b"ab\n\ncd", RecordKind.TEXT_FILE), rules, CharacterEncoder())
    for block in (lines, whole):
        check_account(block, rules)
    assert [ids_of(part) for part in lines.parts] == [[97, 98, 0, 99, 100, 0]]
    assert [item.reason for item in lines.skipped["text"].first] == [records.BLANK_LINE]
    assert [item.reason for item in lines.skipped["other"].first] == [
        records.MISSING_KEY,
        records.MISSING_KEY,
        records.BLANK_LINE,
    ]
    assert [ids_of(part) for part in whole.parts] == [[97, 98, 10, 10, 99, 100, 0]]


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
    part, _ = encode(content, rules, BackendEncoder(backend))
    assert part is not None
    ends = np.cumsum(np.frombuffer(part.lengths, np.int32)).tolist()
    ids = ids_of(part)
    decoded = [
        backend.decode(ids[start:end], skip_special_tokens=False)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    assert decoded == texts
    assert part.text_bytes == sum(len(text.encode()) for text in texts)
