"""A tokenizer's definition brought to the form that gigatoken reads, where its own form is one that gigatoken refuses.

Two things stand in the way of byte-level tokenizers such as those of SmolLM2 and StarCoder2, and are put otherwise:

* A vocabulary without a token for some byte. Each such byte gets an id behind the vocabulary. No merge has a part in it,
  so it comes out wherever the byte goes in: a text with such an id is encoded by the tokenizer itself.
* Numerals split off one by one before the words (`Digits`). An added token is split off before the words too: each
  numeral becomes one, under its own id, or one behind the vocabulary that stands for its several ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_let.data.batch_encoders import BackendEncoder, BatchEncoder, SentencePieceEncoder

# Unicode has numerals in the planes 0 and 1 alone; those of the others are ideographs.
_PLACES_OF_NUMERALS = (range(0xD800), range(0xE000, 0x20000))
_PLAIN_ADDED_TOKEN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}


@dataclass(frozen=True)
class GigatokenForm:
    """What gigatoken is built from, and what the ids mean that the tokenizer does not have."""

    definition: str
    """A tokenizer.json."""
    first_stand_in: int
    """Ids from here on are not the tokenizer's."""
    stand_ins: tuple[tuple[int, ...] | None, ...] = ()
    """The ids that each of them stands for; None where the tokenizer itself has to be asked."""


def gigatoken_form(reference: BatchEncoder) -> GigatokenForm:
    """Return the form of a tokenizer. Raises ValueError for one of a kind that gigatoken does not know."""
    if isinstance(reference, SentencePieceEncoder):
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        content = json.loads(sentencepiece_to_tokenizer_json(reference.model))
        takes_special_tokens_as_text = True  # SentencePiece never reads <s> or </s> from a text
    elif isinstance(reference, BackendEncoder):
        content = json.loads(reference.backend.to_str())
        takes_special_tokens_as_text = bool(reference.backend.encode_special_tokens)
    else:
        raise ValueError("it is neither a tokenizers backend nor a SentencePiece model")
    vocabulary = content["model"].get("vocab")
    added_tokens: list[dict[str, Any]] = content["added_tokens"]
    if takes_special_tokens_as_text:
        content["added_tokens"] = [token for token in added_tokens if not token["special"]]
    if not isinstance(vocabulary, dict) or not _is_byte_level(content):
        return GigatokenForm(json.dumps(content), 1 << 32)
    first = max([*vocabulary.values(), *(token["id"] for token in added_tokens)], default=-1) + 1
    stand_ins: list[tuple[int, ...] | None] = [*_complete_bytes(vocabulary, first)]
    stand_ins += _put_numerals_as_tokens(content, reference, first + len(stand_ins))
    return GigatokenForm(json.dumps(content), first, tuple(stand_ins))


def _is_byte_level(content: dict[str, Any]) -> bool:
    splits = content["pre_tokenizer"] or {}
    last = splits.get("pretokenizers", [splits])[-1:]
    return bool(last) and last[0].get("type") == "ByteLevel" and not content["model"].get("byte_fallback")


def _complete_bytes(vocabulary: dict[str, int], first: int) -> list[None]:
    """Give each byte without a token one, ids from `first` on; return that none stands for known ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    missing = sorted(set(ByteLevel.alphabet()) - vocabulary.keys())
    vocabulary.update({character: first + index for index, character in enumerate(missing)})
    return [None] * len(missing)


def _put_numerals_as_tokens(
    content: dict[str, Any], reference: BatchEncoder, first: int
) -> list[tuple[int, ...]]:
    """Replace `Digits` by added tokens; return what their new ids, from `first` on, stand for.

    A normalizer could make numerals that the text does not hold, and a space put in front would be put in front of
    each: such a tokenizer is left as it is.
    """
    splits = content["pre_tokenizer"].get("pretokenizers", [])
    is_first_of_two = [part["type"] for part in splits] == ["Digits", "ByteLevel"]
    if not is_first_of_two or not splits[0]["individual_digits"] or splits[1]["add_prefix_space"]:
        return []
    if content["normalizer"] is not None:
        return []
    content["pre_tokenizer"] = splits[1]
    taken = {token["content"] for token in content["added_tokens"]}
    numerals = [character for character in _numerals() if character not in taken]
    stand_ins: list[tuple[int, ...]] = []
    for character, ids in zip(numerals, reference.encode(numerals).to_lists(), strict=True):
        token_id = ids[0] if len(ids) == 1 else first + len(stand_ins)
        if len(ids) != 1:
            stand_ins.append(tuple(ids))
        content["added_tokens"].append({"id": token_id, "content": character, **_PLAIN_ADDED_TOKEN})
    return stand_ins


def _numerals() -> list[str]:
    """Return the characters that `Digits` splits off, as the library itself knows them."""
    from tokenizers.pre_tokenizers import Digits

    splits = Digits(individual_digits=True)
    everything = "".join(map(chr, (code for codes in _PLACES_OF_NUMERALS for code in codes)))
    alone = [piece for piece, _ in splits.pre_tokenize_str(everything) if len(piece) == 1]
    # Also alone stand single characters between two numerals: among letters they do not.
    pieces = splits.pre_tokenize_str("a" + "a".join(alone) + "a")
    return [piece for piece, _ in pieces if len(piece) == 1 and piece != "a"]
