"""What two tokenizers are compared by, and in which words they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from megatron_let.data.batch_encoders import BatchEncoder
from megatron_let.data.directory_encoder import directory_encoder
from megatron_let.data.encoding_fingerprint import encoding_fingerprint_of, encoding_texts
from megatron_let.data.fingerprint import describe_difference, document_special_ids, fingerprint_of
from megatron_let.data.hf_directory import (
    end_of_document_id_of,
    has_tokenizer_files,
    load_auto_tokenizer,
    token_to_id_of,
)

_SHOWN_CHARACTERS = 40
_SHOWN_IDS = 6


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer as far as ids go."""

    token_to_id: Mapping[str, int]
    special_ids: Mapping[str, int | None]
    """eos and bos, see `document_special_ids`."""
    encoder: BatchEncoder

    @cached_property
    def fingerprint(self) -> str:
        """Return the vocabulary's value, see `fingerprint.py`."""
        return fingerprint_of(self.token_to_id, self.special_ids)

    @cached_property
    def encoding_fingerprint(self) -> str | None:
        """Return the encoding's value, see `encoding_fingerprint.py`; a second of work for a large vocabulary."""
        return encoding_fingerprint_of(self.encoder, self.token_to_id)


def facts_of_hf_tokenizer(tokenizer: object, encoder: BatchEncoder) -> TokenizerFacts:
    """Return the facts of a loaded transformers tokenizer, whose texts `encoder` encodes."""
    eos = end_of_document_id_of(tokenizer)
    specials = document_special_ids(eos=eos, bos=getattr(tokenizer, "bos_token_id", None))
    return TokenizerFacts(token_to_id_of(tokenizer), specials, encoder)


def facts_of_directory(path: str | Path) -> TokenizerFacts | None:
    """Return the facts of the tokenizer in a Hugging Face directory, None when it holds no tokenizer.

    Raises:
        ConfigError: there are tokenizer files but they cannot be loaded.
    """
    if not has_tokenizer_files(path):
        return None
    tokenizer = load_auto_tokenizer(str(path))
    return facts_of_hf_tokenizer(tokenizer, directory_encoder(tokenizer, str(path)))


def difference_in_words(left: TokenizerFacts, right: TokenizerFacts) -> str:
    """Return in one phrase how two tokenizers differ: tokens, then special ids, then ids of a text; empty if they do not."""
    return (
        describe_difference(left.token_to_id, right.token_to_id)
        or special_ids_in_words(left.special_ids, right.special_ids)
        or _encoding_in_words(left, right)
    )


def special_ids_in_words(left: Mapping[str, int | None], right: Mapping[str, int | None]) -> str:
    """Return which special ids differ, those of the left first. A bos that is only the eos again is not named."""
    names = [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
    if names == ["bos", "eos"] and left["bos"] == left["eos"] and right["bos"] == right["eos"]:
        names = ["eos"]
    if not names:
        return ""
    verb = "differ" if len(names) > 1 else "differs"
    pairs = ", ".join(f"{left.get(name)} and {right.get(name)}" for name in names)
    return f"only {' and '.join(names)} {verb}: {pairs}"


def _encoding_in_words(left: TokenizerFacts, right: TokenizerFacts) -> str:
    for text, own, other in _differing(left, right, encoding_texts(left.token_to_id)):
        # A line of it alone says more, if it differs alone.
        text, own, other = next(_differing(left, right, text.split("\n")), (text, own, other))
        place = next(index for index, pair in enumerate(zip_longest(own, other)) if len(set(pair)) > 1)
        end = place + _SHOWN_IDS
        return (
            f"one vocabulary, other ids for a text: {text[:_SHOWN_CHARACTERS]!a} gives from token {place} on "
            f"{own[place:end]} and {other[place:end]}"
        )
    return ""


def _differing(
    left: TokenizerFacts, right: TokenizerFacts, texts: list[str]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield each text to which the two give other ids, with both."""
    mine, theirs = (facts.encoder.encode(texts).to_lists() for facts in (left, right))
    for text, own, other in zip(texts, mine, theirs, strict=True):
        if own != other:
            yield text, own, other
