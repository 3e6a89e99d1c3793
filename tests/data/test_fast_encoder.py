"""The fast encoder: taken where its ids are the tokenizer's, refused or stopped with a reason where they are not."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data import fast_encoder
from megatron_let.data.batch_encoders import (
    BackendEncoder,
    BatchEncoder,
    EncodedTexts,
    NullEncoder,
    SentencePieceEncoder,
)
from megatron_let.data.fast_encoder import GigatokenEncoder, choose_encoder
from megatron_let.data.gigatoken_form import GigatokenForm
from megatron_let.data.probes import probe_texts
from megatron_let.errors import ConfigError, LetError
from megatron_let.optional import has_gigatoken
from tests.data.conftest import SENTENCES
from tests.processes import HANG_SECONDS

needs_gigatoken = pytest.mark.skipif(not has_gigatoken(), reason="gigatoken is not installed")
TEXTS = [*SENTENCES, "", "a\x00b <|endoftext|> end", "x" * 20_000]


class WordEncoder(BackendEncoder):
    """A reference whose imitation below can be made to differ: one id a word, its length."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        self.texts += texts
        ids = [[len(word) for word in text.split()] for text in texts]
        flat = np.array([token_id for item in ids for token_id in item], dtype=np.uint32)
        return EncodedTexts(flat, np.array([len(item) for item in ids], dtype=np.int64))


class Imitation:
    """What stands for gigatoken's tokenizer: a WordEncoder that counts the word "wrong" as 0 and panics on demand."""

    def encode_batch(self, texts: list[str], *, parallel: bool) -> Any:
        assert not parallel
        if "panic" in texts:
            raise PanicException("index out of bounds")
        encoded = WordEncoder().encode([text.replace("wrong", "") for text in texts])
        offsets = np.concatenate([[0], np.cumsum(encoded.lengths)])
        layout = SimpleNamespace(
            offsets=SimpleNamespace(data=offsets), content=SimpleNamespace(data=encoded.ids)
        )
        return SimpleNamespace(layout=layout)


class PanicException(BaseException):
    """As pyo3's, which is no Exception."""


@pytest.fixture
def imitation(monkeypatch: pytest.MonkeyPatch) -> list[GigatokenEncoder]:
    """Put Imitation in gigatoken's place; return the encoders that (re)started one."""
    started: list[GigatokenEncoder] = []

    def start(encoder: GigatokenEncoder) -> None:
        started.append(encoder)
        encoder._tokenizer = Imitation()
        encoder._characters_since_start = encoder._characters_since_look = 0
        encoder._bytes_at_start = fast_encoder._resident_bytes()

    monkeypatch.setattr(fast_encoder, "has_gigatoken", lambda: True)
    monkeypatch.setattr(fast_encoder, "gigatoken_form", lambda reference: GigatokenForm("", 1 << 32))
    monkeypatch.setattr(fast_encoder, "probe_texts", lambda reference: ["probe"])
    monkeypatch.setattr(GigatokenEncoder, "_start", start)
    return started


def test_plain_is_the_tokenizer_itself(backend: Any) -> None:
    reference = BackendEncoder(backend)
    assert choose_encoder(reference, TEXTS, "plain") == (reference, "encoder: plain")


def test_without_gigatoken_auto_is_plain_and_fast_an_error(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_encoder, "has_gigatoken", lambda: False)
    reference = BackendEncoder(backend)
    assert choose_encoder(reference, TEXTS, "auto") == (
        reference,
        "encoder: plain, since gigatoken is not installed",
    )
    with pytest.raises(ConfigError, match=r"--encoder fast cannot be had: gigatoken is not installed"):
        choose_encoder(reference, TEXTS, "fast")
    with pytest.raises(ConfigError, match=r"--encoder quick is not one of auto, plain, fast"):
        choose_encoder(reference, TEXTS, "quick")


@pytest.mark.parametrize("choice", ["auto", "fast"])
def test_the_same_ids_on_probes_and_sample_make_it_the_encoder(
    imitation: list[GigatokenEncoder], choice: str
) -> None:
    encoder, note = choose_encoder(WordEncoder(), ["the fox", "a"], choice)
    assert imitation == [encoder]
    assert note == "encoder: gigatoken, with the tokenizer's ids on all probes and 8 characters of the input"


@pytest.mark.usefixtures("imitation")
def test_another_id_on_the_sample_is_told_with_its_text_and_place() -> None:
    reference = WordEncoder()
    encoder, note = choose_encoder(reference, ["the fox", "a wrong one"], "auto")
    assert encoder is reference
    assert note == (
        "encoder: plain, since gigatoken differs from the tokenizer: token 1 of 'a wrong one' is 3 instead of 5"
    )
    with pytest.raises(ConfigError, match=r"token 0 of 'wrong' is none instead of 5; use --encoder auto"):
        choose_encoder(reference, ["wrong"], "fast")


def test_a_panic_while_building_or_trying_is_a_reason_like_another(
    imitation: list[GigatokenEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = WordEncoder()
    assert choose_encoder(reference, ["panic"], "auto")[0] is reference

    def fail(encoder: GigatokenEncoder) -> None:
        raise PanicException("no such table\nand a page of advice")

    monkeypatch.setattr(GigatokenEncoder, "_start", fail)
    encoder, note = choose_encoder(reference, ["a"], "auto")
    assert encoder is reference
    assert note == "encoder: plain, since gigatoken does not take this tokenizer: no such table"


@pytest.mark.usefixtures("imitation")
def test_a_panic_on_a_later_text_is_an_error_with_a_way_out() -> None:
    with pytest.raises(
        LetError, match=r"gigatoken failed: index out of bounds; run again with --encoder plain"
    ):
        GigatokenEncoder(WordEncoder()).encode(["panic"])


@pytest.mark.usefixtures("imitation")
def test_a_difference_that_comes_later_ends_the_run() -> None:
    encoder = GigatokenEncoder(WordEncoder(), checked_share=1.0)
    encoder.encode(["good"])
    with pytest.raises(
        LetError, match=r"token 1 of 'so wrong' is none instead of 5; run again with --encoder plain"
    ):
        encoder.encode(["so wrong"])
    long = GigatokenEncoder(WordEncoder(), checked_share=1.0)
    with pytest.raises(LetError, match="instead of 5"):
        long.encode(["so wrong " * 10_000])


@pytest.mark.usefixtures("imitation")
@pytest.mark.parametrize("length", [100, 5_000, 200_000])
def test_about_the_given_share_is_encoded_again(length: int) -> None:
    reference = WordEncoder()
    encoder = GigatokenEncoder(reference, checked_share=0.01)
    batch = [f"{number} {'a ' * (length // 2)}" for number in range(20)]
    total = 0
    while total < 10_000_000:
        encoder.encode(batch)
        total += sum(map(len, batch))
    checked = sum(map(len, reference.texts))
    assert 0.009 * total < checked < 0.011 * total + max(map(len, batch))
    assert set(reference.texts) <= set(batch)
    if length == 5_000:
        assert len(set(reference.texts)) > 10  # not always the same place in a batch


@pytest.mark.usefixtures("imitation")
def test_the_very_ids_of_a_long_text_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongOnce(GigatokenEncoder):
        """Is wrong in its first call alone."""

        num_calls = 0

        def encode_unchecked(self, texts: Sequence[str]) -> EncodedTexts:
            encoded = super().encode_unchecked(texts)
            self.num_calls += 1
            return EncodedTexts(encoded.ids + (self.num_calls == 1), encoded.lengths)

    text = "word " * 100_000
    with pytest.raises(LetError, match=r"token 0 of 'word word .+ is 5 instead of 4"):
        WrongOnce(WordEncoder()).encode([text])
    monkeypatch.setattr(fast_encoder, "_CHECKED_WHOLE_CHARACTERS", len(text) - 1)
    reference = WordEncoder()
    GigatokenEncoder(reference).encode([text])
    assert [len(piece) for piece in reference.texts] == [1 << 14]


def test_it_starts_again_when_its_memory_has_grown(
    imitation: list[GigatokenEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = iter(range(0, 1 << 40, 150 << 20))
    monkeypatch.setattr(fast_encoder, "_resident_bytes", lambda: next(resident))
    encoder = GigatokenEncoder(WordEncoder())
    text = "word " + "o" * (1 << 22)
    ids = [encoder.encode([text]).ids.tolist() for _ in range(16)]
    assert all(item == [4, 1 << 22] for item in ids)
    assert 3 <= len(imitation) <= 6


def test_without_a_look_at_memory_it_starts_again_by_amount(
    imitation: list[GigatokenEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_encoder, "_STATM", "/no/such/file")
    monkeypatch.setattr(fast_encoder, "_BLIND_LIFE_CHARACTERS", 1 << 23)
    encoder = GigatokenEncoder(WordEncoder())
    for _ in range(8):
        encoder.encode(["wo " + "o" * (1 << 22)])
    assert len(imitation) == 5


@pytest.mark.usefixtures("imitation")
def test_a_long_text_is_cut_by_the_references_rules(sentencepiece_model: Path) -> None:
    """Else a text would be too long for the one encoder and not for the other."""
    for reference in (SentencePieceEncoder(sentencepiece_model.read_bytes()), NullEncoder(5)):
        encoder = GigatokenEncoder(reference)
        for name in ("is_local", "separator", "max_whole_bytes"):
            assert getattr(encoder, name) == getattr(reference, name)


@pytest.mark.usefixtures("imitation")
def test_nothing_to_encode_is_no_error() -> None:
    assert GigatokenEncoder(WordEncoder()).encode([]).to_lists() == []
    assert GigatokenEncoder(WordEncoder(), checked_share=1.0).encode(["", ""]).to_lists() == [[], []]


def test_probes_hold_the_special_tokens_and_the_vocabulary(backend: Any, sentencepiece_model: Path) -> None:
    probes = probe_texts(BackendEncoder(backend))
    assert {"<|endoftext|>", "a<|endoftext|>b", ""} <= set(probes)
    tokens = [backend.id_to_token(index) for index in range(1, backend.get_vocab_size())]
    words = [token for token in tokens if token.isascii() and len(token) > 2]
    assert words
    assert all(word in "".join(probes) for word in words)
    assert "</s>" in probe_texts(SentencePieceEncoder(sentencepiece_model.read_bytes()))
    assert len(probe_texts(NullEncoder(5))) > 30


@pytest.fixture(scope="module")
def fast(backend: Any) -> BatchEncoder:
    encoder, note = choose_encoder(BackendEncoder(backend), TEXTS, "fast")
    assert note.startswith("encoder: gigatoken")
    return encoder


@needs_gigatoken
@given(texts=st.lists(st.text(max_size=40) | st.text("ab \n'1<|endoftext>", max_size=40), max_size=4))
@settings(max_examples=200, deadline=None)
def test_gigatoken_gives_the_tokenizers_ids(backend: Any, fast: BatchEncoder, texts: list[str]) -> None:
    assert fast.encode(texts).to_lists() == BackendEncoder(backend).encode(texts).to_lists()


@needs_gigatoken
def test_special_tokens_can_be_text_for_gigatoken_too(backend: Any) -> None:
    reference = pickle.loads(pickle.dumps(BackendEncoder(backend)))
    reference.backend.encode_special_tokens = True
    encoder, _ = choose_encoder(reference, TEXTS, "fast")
    text = "a <|endoftext|> b"
    assert encoder.encode([text]).to_lists() == reference.encode([text]).to_lists()
    assert 0 not in encoder.encode([text]).ids


@needs_gigatoken
def test_sentencepiece_control_pieces_stay_text_for_gigatoken(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_prefix=str(tmp_path / "llama"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # gigatoken reads NFKC in its own way, which the probes find
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    reference = SentencePieceEncoder((tmp_path / "llama.model").read_bytes())
    texts = ["a <s> b</s>", *TEXTS]
    encoder, _ = choose_encoder(reference, texts, "fast")
    assert encoder.encode(texts).to_lists() == reference.encode(texts).to_lists()


@needs_gigatoken
def test_a_tokenizer_that_gigatoken_does_not_take_is_left_to_the_library(backend: Any) -> None:
    from tokenizers import pre_tokenizers

    reference = pickle.loads(pickle.dumps(BackendEncoder(backend)))
    reference.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    encoder, note = choose_encoder(reference, TEXTS, "auto")
    assert encoder is reference
    assert note.startswith("encoder: plain, since gigatoken d")
    assert "\n" not in note
    assert choose_encoder(NullEncoder(5), ["1 2"], "auto")[1].startswith(
        "encoder: plain, since gigatoken does"
    )


@needs_gigatoken
def test_a_worker_gets_it_without_torch_and_transformers(fast: BatchEncoder, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pickle"
    path.write_bytes(pickle.dumps(fast))
    script = (
        "import pickle, sys\n"
        f"encoder = pickle.load(open({str(path)!r}, 'rb'))\n"
        "print(encoder.encode(['the quick fox']).to_lists(), {'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    assert result.stdout.strip() == f"{fast.encode(['the quick fox']).to_lists()} set()"
