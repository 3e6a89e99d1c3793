"""One short value for "the same ids for the same text", beside the vocabulary's own fingerprint.

Fewer merges, another split into words or a normalizer leave a vocabulary as it is and change the ids of almost every text.
So texts are encoded and their ids hashed: fixed ones, and every token of the vocabulary on a line of its own, which a merge
that is missing breaks up. The texts follow from the vocabulary alone, so that one tokenizer in two forms (a SentencePiece
model, its Hugging Face directory) has one value. Special tokens are left out: whether they are looked for in a text is the
user's choice (`--encode-special-tokens`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from megatron_let.data.batch_encoders import BatchEncoder

# Stands in front of the value. To be raised whenever the texts below change: values with other marks are not compared.
_MARK = "1:"
_TOKENS_PER_TEXT = 64
_TEXTS = (
    " ",
    "a",
    " a ",
    "The quick brown fox can't jump, they'RE told; it's 3.14159 or 1,000,000 x 12345678901.",
    "a  b   c    d" + " " * 33 + "e\tf\t\tg \t h\n\ni \n  j\r\n\n   k",
    "a  1   22\t3\n  456 x7   8y  -9 {  10}\n\n    11",
    "def f(x):\n    if x != 0:\n        return {'b': x**-1}  # (a) [b]\n\n\nclass CamelCase_snake: ...\n",
    "caf\u00e9 cafe\u0301 \u212b \ufb01 \uff21\uff11 \u00bd \u2460 \u0130 \u1e9e no\u00a0break thin\u2009 wide\u3000 zero\u200bwidth",
    "\u65e5\u672c\u8a9e\u3002\u4e2d\u6587 \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \U0001f916\U0001f3fd",
    "\u2581 \u2581\u2581 a\u2581b \u0120word \x00\x01\x1b\x7f \u201cq\u201d \u2014 \u2026",
    "antidisestablishmentarianism" * 20 + "!?" * 30,
)


def encoding_fingerprint_of(encoder: BatchEncoder, token_to_id: Mapping[str, int]) -> str | None:
    """Return a value that two tokenizers of one vocabulary have in common when they encode alike.

    None for one that cannot encode every text: without a token for unknown words libraries raise what they like.
    """
    try:
        encoded = encoder.encode(encoding_texts(token_to_id))
    except Exception:
        return None
    digest = hashlib.sha256(encoded.lengths.astype("<i8").tobytes())
    digest.update(encoded.ids.astype("<i8").tobytes())
    return f"{_MARK}{digest.hexdigest()}"


def encode_otherwise(mine: str | None, theirs: str | None) -> bool:
    """Return whether two values are known and say that the same text gets other ids."""
    if mine is None or theirs is None:
        return False
    return mine.partition(":")[0] == theirs.partition(":")[0] and mine != theirs


def without_mark(value: str) -> str:
    """Return the digits of a value, for a message."""
    return value.rpartition(":")[2]


def encoding_texts(token_to_id: Mapping[str, int]) -> list[str]:
    """Return what is encoded: the fixed texts, then the tokens in the order of their ids."""
    tokens = sorted(token_to_id, key=lambda token: (token_to_id[token], token))
    is_byte_level = sum(token.startswith("\u0120") for token in tokens) > sum(
        "\u2581" in token for token in tokens
    )
    byte_of = _byte_of_character() if is_byte_level else {}
    words = [_text_of(token, byte_of) for token in tokens if not _looks_special(token)]
    words = [word for word in words if word]
    rows = [
        "\n".join(words[start : start + _TOKENS_PER_TEXT]) for start in range(0, len(words), _TOKENS_PER_TEXT)
    ]
    return [*_TEXTS, *rows]


def _looks_special(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in (("<", ">"), ("[", "]"))


def _text_of(token: str, byte_of: Mapping[str, int]) -> str:
    if byte_of:
        return bytes(byte_of[character] for character in token if character in byte_of).decode(
            "utf-8", "ignore"
        )
    return token.replace("\u2581", " ").encode("utf-8", "ignore").decode("utf-8")


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
