"""Long texts: the pieces' ids put together are the ids of the whole, for every kind of tokenizer."""

from __future__ import annotations

import pickle
import random
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_let.data.batch_encoders import (
    BackendEncoder,
    BatchEncoder,
    EncodedTexts,
    NullEncoder,
    SentencePieceEncoder,
    join_encoded,
)
from megatron_let.data.long_texts import TextTooLong, encode_texts, pieces_of
from megatron_let.data.sentencepiece_model import is_unigram
from tests.data.conftest import SENTENCES

CORPUS = [
    *SENTENCES,
    "a a a a a",
    "in the end, of the day: 12 345 cafe\u0301  two  spaces",
    "\u65e5\u672c\n\u8a9e",
] * 8
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bpe(pre_tokenizer: Any, normalizer: Any = None, **settings: Any) -> BatchEncoder:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **settings))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    # Added tokens that hold the very places where a text might be cut, and one that takes white space with it.
    tokenizer.add_tokens(["fox jumps over", "box\nwith", AddedToken("lazy", rstrip=True, lstrip=True)])
    return BackendEncoder(tokenizer)


def byte_level(**settings: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})


def digits_apart() -> BatchEncoder:
    return bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]))


def llama3() -> BatchEncoder:
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    return bpe(pre_tokenizers.Sequence([split, byte_level(use_regex=False)]), ignore_merges=True)


def llama2() -> BatchEncoder:
    """As LLaMA-2's tokenizer.json: no words at all, so that tokens of many words are learnt."""
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    return BackendEncoder(tokenizer)


def unigram() -> BatchEncoder:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    return BackendEncoder(tokenizer)


def word_piece() -> BatchEncoder:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    return BackendEncoder(tokenizer)


BACKENDS: dict[str, Callable[[], BatchEncoder]] = {
    "byte_level": partial(bpe, byte_level()),
    "byte_level_prefix_space": partial(bpe, byte_level(add_prefix_space=True)),
    "digits_apart": digits_apart,
    "llama3": llama3,
    "llama2": llama2,
    "metaspace_first": partial(bpe, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace_always": partial(bpe, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace_never": partial(bpe, pre_tokenizers.Metaspace(prepend_scheme="never")),
    "nfkc": partial(bpe, byte_level(), normalizers.NFKC()),
    "nfd_strip": partial(
        bpe, byte_level(), normalizers.Sequence([normalizers.NFD(), normalizers.Strip(left=True, right=True)])
    ),
    "word_piece": word_piece,
}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_dummy_prefix": {"add_dummy_prefix": False},
    "llama": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "split_digits": True},
    "neither": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "across_words": {"split_by_whitespace": False, "remove_extra_whitespaces": False},
    "user_defined": {"user_defined_symbols": ["fox jumps", "\n", "  "]},
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BatchEncoder]:
    directory = tmp_path_factory.mktemp("models")
    made = {name: make() for name, make in BACKENDS.items()}
    for name, options in SENTENCEPIECE.items():
        made[f"sentencepiece_{name}"] = train_sentencepiece(directory / name, model_type="bpe", **options)
    return made


def train_sentencepiece(path: Path, **options: Any) -> SentencePieceEncoder:
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(path),
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return SentencePieceEncoder(path.with_suffix(".model").read_bytes())


def same_ids(encoder: BatchEncoder, text: str, piece_characters: int) -> int:
    """Check that the pieces' ids are the whole's and return how many pieces there are."""
    pieces = list(pieces_of(encoder, text, piece_characters))
    whole = encoder.encode([text]).ids.tolist()
    assert [token_id for piece in pieces for token_id in encoder.encode([piece]).ids.tolist()] == whole
    assert encode_texts(encoder, [text], piece_characters).ids.tolist() == whole
    return len(pieces)


NAMES = (*BACKENDS, *(f"sentencepiece_{name}" for name in SENTENCEPIECE))


@pytest.mark.parametrize("name", NAMES)
def test_prose_is_cut_into_pieces_near_the_wanted_size(encoders: dict[str, BatchEncoder], name: str) -> None:
    text = " ".join([*SENTENCES, "in the end, it was the day of the fox"] * 20)
    assert same_ids(encoders[name], text, 200) > len(text) / 500


SNIPPETS = (
    *("the", "a", "fox", "fox jumps over", "box\nwith", "lazy", "of", "in the end", "12", "345", "cafe"),
    *(" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2581", ". ", ", ", "'s "),
    *("\u65e5\u672c\u8a9e", "\u0301", "\u00e9", "\ufb01", "\U0001f916", "\u200d", "_", "-", "<|endoftext|>"),
    *("a a a a a a a a a", "<unk>", "x" * 30, "\u05e9", "\uff21", "Stra\u00dfe", "\u03a3\u03c2"),
)
nasty_texts = st.lists(st.sampled_from(SNIPPETS), min_size=20, max_size=120).map("".join)


@given(text=nasty_texts, size=st.integers(5, 60), name=st.sampled_from(NAMES))
@settings(max_examples=150, deadline=None)
def test_any_text_in_pieces_of_any_size_has_the_ids_of_the_whole(
    encoders: dict[str, BatchEncoder], text: str, size: int, name: str
) -> None:
    same_ids(encoders[name], text, size)


@pytest.mark.parametrize("name", NAMES)
def test_added_tokens_and_rhythms_are_not_cut_through(encoders: dict[str, BatchEncoder], name: str) -> None:
    for text in ("fox jumps over " * 200, "a " * 2000, "box\nwith\n" * 300, "lazy  \n lazy " * 100):
        same_ids(encoders[name], text, 50)


def test_tokens_that_repeat_in_a_rhythm_are_not_cut_where_one_window_alone_would_allow_it() -> None:
    vocabulary = {"\u2581": 0, "a": 1, "\u2581a": 2, "\u2581a\u2581a": 3}
    merges = [("\u2581", "a"), ("\u2581a", "\u2581a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    # After 5,001 characters there is an odd number of words; a window of 2,000 characters has an even one.
    same_ids(BackendEncoder(tokenizer), "a" + " a" * 8000, 5000)


def quotations() -> tuple[BatchEncoder, str]:
    """Return a tokenizer that takes whole quotations, and a text whose quotes no window of it can pair."""
    choose = random.Random(4)
    words = [choose.choice(("the", "fox", "of", "box", "lazy")) for _ in range(8000)]
    for place in range(0, len(words), 997):
        words[place] = '"' + words[place]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex('"[^"]*"'), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    corpus = ['"the"', '"fox"', '"of"', '"box"', '"lazy"', "the lazy fox of box"] * 3
    tokenizer.train_from_iterator(corpus, trainer=trainer)
    return BackendEncoder(tokenizer), " ".join(words)


def test_where_a_pattern_reaches_without_bound_the_text_is_encoded_whole_or_refused() -> None:
    encoder, text = quotations()
    whole = encoder.encode([text]).ids.tolist()
    in_pieces = join_encoded([encoder.encode([piece]) for piece in pieces_of(encoder, text, 5000)])
    assert in_pieces.ids.tolist() != whole, "else it shows nothing"
    assert encode_texts(encoder, [text], 5000).ids.tolist() == whole
    encoder.max_whole_bytes = len(text) - 1
    with pytest.raises(TextTooLong, match="depend on where it is cut"):
        encode_texts(encoder, [text], 5000)


def test_text_without_spaces_is_cut_at_line_ends(encoders: dict[str, BatchEncoder]) -> None:
    text = "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\n" * 300
    assert same_ids(encoders["byte_level"], text, 100) > 10


def test_text_without_white_space_and_marks_is_cut_between_characters(
    encoders: dict[str, BatchEncoder],
) -> None:
    hexadecimal = random.Random(1).randbytes(20_000).hex()
    for text in (hexadecimal, "\u65e5\u672c\u8a9e\u306e" * 5000, "\U0001f916\U0001f600" * 10_000):
        for name in ("byte_level", "llama3", "sentencepiece_neither"):
            assert same_ids(encoders[name], text, 3000) > 4


def test_a_stretch_without_a_safe_cut_is_one_piece_and_the_rest_is_cut_again(
    encoders: dict[str, BatchEncoder],
) -> None:
    blob = " " * 5000
    words = "the quick brown fox " * 50
    pieces = list(pieces_of(encoders["byte_level"], f"{words}{blob} {words}", 100))
    assert len(pieces) > 8
    assert max(map(len, pieces)) < len(blob) + 300
    assert list(pieces_of(encoders["byte_level"], blob, 100)) == [blob]


def test_what_would_be_too_much_to_encode_whole_is_refused(encoders: dict[str, BatchEncoder]) -> None:
    blob = " " * 5000
    words = "the quick brown fox " * 50
    encoder = RecordingEncoder(encoders["byte_level"])
    encoder.max_whole_bytes = 600
    for text in (blob, words + blob, f"{words}{blob} {words}", " " * 601, "\u3000" * 201):
        with pytest.raises(TextTooLong, match="no safe cut in 600 bytes"):
            encode_texts(encoder, [text], 100)
    for text in (words + blob[:400] + words, " " * 600, "\u3000" * 200):  # three bytes a character
        assert encode_texts(encoder, [text], 99).to_lists() == encoder.encode([text]).to_lists()
    numbers = WholeNumbers(10)
    numbers.max_whole_bytes = 6
    with pytest.raises(TextTooLong, match="no safe cut in 6 bytes"):
        encode_texts(numbers, ["1 2 3 4"], 1)
    numbers.max_whole_bytes = 7
    assert encode_texts(numbers, ["1 2 3 4"], 1).ids.tolist() == [1, 2, 3, 4]


def test_a_unigram_sentencepiece_model_is_encoded_whole(tmp_path: Path) -> None:
    encoder = train_sentencepiece(tmp_path / "unigram", model_type="unigram")
    assert is_unigram(encoder.model)
    assert not encoder.is_local
    calls = RecordingEncoder(encoder)
    encode_texts(calls, ["the quick fox " * 100], 50)
    assert calls.sizes == [1400]
    assert not is_unigram(train_sentencepiece(tmp_path / "bpe", model_type="bpe").model)


def test_a_unigram_model_of_hugging_face_is_encoded_whole(encoders: dict[str, BatchEncoder]) -> None:
    encoder = unigram()
    calls = RecordingEncoder(pickle.loads(pickle.dumps(encoder)))
    assert not encoder.is_local
    assert not calls.is_local
    encode_texts(calls, ["the quick fox " * 100], 50)
    assert calls.sizes == [1400]
    assert all(encoders[name].is_local for name in BACKENDS)


@pytest.mark.parametrize("model", [b"\x80", b"\x0b", b"\x12\x80"])
def test_bytes_that_are_no_sentencepiece_model_are_refused(model: bytes) -> None:
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        is_unigram(model)


class WholeNumbers(NullEncoder):
    """Claims to need all of a text."""

    is_local = False


class RecordingEncoder(BatchEncoder):
    """Remembers how much text it was given at once."""

    def __init__(self, encoder: BatchEncoder) -> None:
        self.encoder = encoder
        self.is_local = encoder.is_local
        self.separator = encoder.separator
        self.sizes: list[int] = []

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        self.sizes.append(sum(map(len, texts)))
        return self.encoder.encode(texts)


def test_many_texts_are_encoded_a_bounded_amount_at_a_time(encoders: dict[str, BatchEncoder]) -> None:
    short = ["the quick fox", "", "a"] * 50
    texts = [*short, "the lazy dog " * 100, "", "the quick " * 15, *short]
    encoder = RecordingEncoder(encoders["byte_level"])
    encoded = encode_texts(encoder, texts, piece_characters=100)
    expected = encoders["byte_level"].encode(texts)
    assert encoded.ids.tolist() == expected.ids.tolist()
    assert encoded.lengths.tolist() == expected.lengths.tolist()
    contexts = 2 * 2 * (2000 + 1499 + 997)  # of the trials of a cut
    assert max(encoder.sizes) <= contexts
    assert sum(size <= 200 for size in encoder.sizes) > 20
    assert encode_texts(encoder, []).to_lists() == []


def test_a_million_short_texts_take_little_memory_and_few_at_a_time() -> None:
    encoder = RecordingEncoder(NullEncoder(10))
    texts = ["1", "2 3"] * 200_000
    tracemalloc.start()
    try:
        encoded = encode_texts(encoder, texts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert encoded.ids.tolist() == [1, 2, 3] * 200_000
    assert encoded.lengths.tolist() == [1, 2] * 200_000
    assert max(encoder.sizes) <= 4 << 14
    # Ids and lengths take 10 bytes a text, their copies as much again; an array for each text took 300.
    assert peak < 40 * len(texts)


def test_ids_above_16_bits_survive_the_pieces() -> None:
    class Wide(RecordingEncoder):
        def encode(self, texts: Sequence[str]) -> EncodedTexts:
            encoded = self.encoder.encode(texts)
            return EncodedTexts(encoded.ids + np.uint32(65_450), encoded.lengths)

    encoder = Wide(bpe(byte_level()))
    text = "the quick brown fox " * 40 + "<|endoftext|> " * 40
    pieces = [encoder.encode([piece]) for piece in pieces_of(encoder, text, 30)]
    assert len(pieces) > 5
    assert encode_texts(encoder, [text], 30).ids.tolist() == join_encoded(pieces).ids.tolist()
    assert max(join_encoded(pieces).ids) > 65_535


def test_an_encoder_that_looks_at_all_of_a_text_gets_it_whole() -> None:
    assert encode_texts(WholeNumbers(10), ["1 2 3 4"], 1).ids.tolist() == [1, 2, 3, 4]


@given(numbers=st.lists(st.integers(0, 99_999), min_size=1, max_size=60), size=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_numbers_between_spaces_are_cut_at_spaces(numbers: list[int], size: int) -> None:
    encoder = RecordingEncoder(NullEncoder(100_000))
    text = " ".join(map(str, numbers))
    encoder.max_whole_bytes = 2 * size + 7
    assert encode_texts(encoder, [text], size).ids.tolist() == numbers
    assert max(encoder.sizes) <= 2 * size + 7
    for wrong in (f"{text} ", f" {text}", f"{text}  {text}"):
        with pytest.raises(ValueError, match="invalid literal"):
            encode_texts(encoder, [wrong], size)
