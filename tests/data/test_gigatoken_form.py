"""Tokenizers of forms that gigatoken refuses: encoded by it all the same, with the tokenizer's ids."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.batch_encoders import BackendEncoder, EncodedTexts
from megatron_let.data.fast_encoder import GigatokenEncoder, choose_encoder
from megatron_let.data.gigatoken_form import gigatoken_form
from megatron_let.optional import has_gigatoken
from tests.data.conftest import SENTENCES

pytestmark = pytest.mark.skipif(not has_gigatoken(), reason="gigatoken is not installed")

# As in the vocabulary of SmolLM2: bytes of control characters, of planes without characters, and of no UTF-8 at all.
MISSING_BYTES = (0x04, 0x06, 0x1D, 0xC0, 0xF1, 0xFF)
PLAIN_TEXT = "the quick brown fox 12  345 \n 6"
# What the vocabulary lacks a byte of, alone and among others.
ASKED_OF_THE_TOKENIZER = ("\x04", "the\x06fox", "\U00050000", "12\x1d", "<|endoftext|>\x04")


class CountingEncoder(BackendEncoder):
    """A reference that remembers what it was asked."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        self.texts += texts
        return super().encode(texts)


@pytest.fixture(scope="module")
def smol() -> Any:
    """Return a `tokenizers.Tokenizer` built as SmolLM2's: numerals split off one by one, no token for some bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = set(pre_tokenizers.ByteLevel.alphabet()) - {_character_of(byte) for byte in MISSING_BYTES}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|2|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    texts = [*SENTENCES, "a   1 b    22", "   3"]
    tokenizer.train_from_iterator([text for text in texts for _ in range(5)], trainer=trainer)
    return tokenizer


@pytest.fixture(scope="module")
def fast(smol: Any) -> GigatokenEncoder:
    return GigatokenEncoder(BackendEncoder(smol))


def _character_of(byte: int) -> str:
    """Return the character that stands for a byte in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + [other for other in range(0x100) if other not in printable].index(byte))


def test_the_tokenizer_is_taken_and_asked_for_nothing_but_texts_with_a_missing_byte(smol: Any) -> None:
    reference = CountingEncoder(smol)
    encoder, note = choose_encoder(reference, [PLAIN_TEXT], "auto")
    assert isinstance(encoder, GigatokenEncoder)
    assert note.startswith("encoder: gigatoken, with the tokenizer's ids on all probes")
    reference.texts.clear()
    texts = [PLAIN_TEXT, *ASKED_OF_THE_TOKENIZER, "", PLAIN_TEXT, "\u00b2 \u00bd\u0661\u0662"]
    found = encoder.encode_unchecked(texts).to_lists()
    assert sorted(reference.texts) == sorted(ASKED_OF_THE_TOKENIZER)
    assert found == BackendEncoder(smol).encode(texts).to_lists()


def test_numerals_stand_alone_before_the_words(smol: Any, fast: GigatokenEncoder) -> None:
    """The spaces in front of a numeral are no part of its word, and all of them one token."""
    (ids,) = fast.encode_unchecked(["a   1"]).to_lists()
    assert [smol.id_to_token(token_id) for token_id in ids] == ["a", "\u0120\u0120\u0120", "1"]


def test_no_id_of_the_form_is_one_of_the_tokenizer(smol: Any) -> None:
    form = gigatoken_form(BackendEncoder(smol))
    assert form.first_stand_in == smol.get_vocab_size()
    assert form.stand_ins[: len(MISSING_BYTES)] == (None,) * len(MISSING_BYTES)
    assert all(ids is not None for ids in form.stand_ins[len(MISSING_BYTES) :])


@given(
    texts=st.lists(
        st.text(max_size=30)
        | st.text("ab  \n12\u00b2\u0663\u4e00\x04\x1d\U00050000<|endoftext>", max_size=30)
        | st.sampled_from(["<|2|>", "x<|2|>1", *ASKED_OF_THE_TOKENIZER]),
        max_size=5,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_ids_are_the_tokenizers(fast: GigatokenEncoder, texts: list[str]) -> None:
    assert fast.encode_unchecked(texts).to_lists() == fast.reference.encode(texts).to_lists()


@pytest.mark.parametrize("as_text", [False, True])
def test_special_tokens_with_a_numeral_are_found_first(smol: Any, as_text: bool) -> None:
    reference = pickle.loads(pickle.dumps(BackendEncoder(smol)))
    reference.backend.encode_special_tokens = as_text
    encoder, _ = choose_encoder(reference, [PLAIN_TEXT], "fast")
    texts = ["1<|2|>2", "<|2", "2|>"]
    assert encoder.encode(texts).to_lists() == reference.encode(texts).to_lists()
    assert (smol.token_to_id("<|2|>") in encoder.encode(texts).ids) is not as_text


def test_another_process_builds_the_same(fast: GigatokenEncoder) -> None:
    texts = [PLAIN_TEXT, *ASKED_OF_THE_TOKENIZER]
    there = pickle.loads(pickle.dumps(fast))
    assert there.encode(texts).to_lists() == fast.encode(texts).to_lists()
