"""The fast encoder on tokenizers of models that people use: skipped where their packages are not installed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_let.data.batch_encoders import BackendEncoder, BatchEncoder, SentencePieceEncoder
from megatron_let.data.fast_encoder import choose_encoder
from megatron_let.optional import has_gigatoken
from tests.data.real_tokenizers import file_of_package, smollm2_backend

# Program text: words, numerals, indents, some characters beyond ASCII; its end lacks a token in SmolLM2's vocabulary.
TEXTS = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))] + ["a \u00b2 12\x04"]


def _smollm2() -> BatchEncoder:
    return BackendEncoder(smollm2_backend())


def _mistral_7b() -> BatchEncoder:
    return SentencePieceEncoder(file_of_package("mistral_common", "data/tokenizer.model.v1").read_bytes())


@pytest.mark.skipif(not has_gigatoken(), reason="gigatoken is not installed")
@pytest.mark.parametrize(("build", "least"), [(_smollm2, 5.0), (_mistral_7b, 1.5)])
def test_it_is_fast_and_its_ids_are_the_tokenizers(build: object, least: float) -> None:
    assert callable(build)
    reference = build()
    encoder, note = choose_encoder(reference, TEXTS[:1], "auto")
    assert note.startswith("encoder: gigatoken"), note
    assert encoder.encode(TEXTS).to_lists() == reference.encode(TEXTS).to_lists()
    began = time.process_time()
    reference.encode(TEXTS)
    halfway = time.process_time()
    encoder.encode(TEXTS)
    # Of 36 to 75 times and 5 to 6 times when nothing else runs; processor time, so a busy machine changes little.
    assert halfway - began > least * (time.process_time() - halfway)
