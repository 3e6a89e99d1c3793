"""One short value for "the same vocabulary": what data, student and teacher must agree on.

Hashed: the full token-to-id map and the special ids that can separate documents (eos, bos). Left out on purpose:
pad, unk, sep, cls and mask. They never reach pretraining data of a byte-level or byte-fallback tokenizer, and
loaders invent them from the model type beside the tokenizer, so that two copies of one vocabulary would differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from megatron_let.data.hf_directory import (
    end_of_document_id_of,
    has_tokenizer_files,
    load_auto_tokenizer,
    token_to_id_of,
)
from megatron_let.errors import ConfigError

_FORMAT = "megatron_let tokenizer 1"


def fingerprint_of(token_to_id: Mapping[str, int], special_ids: Mapping[str, int | None]) -> str:
    """Return the SHA-256 hex digest of a vocabulary; the order of the mappings does not matter.

    A special id of None counts as absent.
    """
    tokens = sorted((token_id, token) for token, token_id in token_to_id.items())
    specials = sorted((name, token_id) for name, token_id in special_ids.items() if token_id is not None)
    # ASCII JSON: unambiguous for any string, lone surrogates included.
    return hashlib.sha256(json.dumps([_FORMAT, tokens, specials]).encode("ascii")).hexdigest()


def document_special_ids(*, eos: int | None, bos: int | None) -> dict[str, int | None]:
    """Return the special ids that enter a fingerprint.

    A tokenizer without bos starts a document with its eos, as GPT-2 does; writing that out makes a GPT-2
    vocabulary the same whether its loader knows about bos or not.
    """
    return {"eos": eos, "bos": eos if bos is None else bos}


def fingerprint_of_hf_tokenizer(tokenizer: object) -> str:
    """Return the fingerprint of a loaded transformers tokenizer."""
    eos = end_of_document_id_of(tokenizer)
    bos = getattr(tokenizer, "bos_token_id", None)
    return fingerprint_of(token_to_id_of(tokenizer), document_special_ids(eos=eos, bos=bos))


def fingerprint_of_directory(path: str | Path) -> str | None:
    """Return the fingerprint of the tokenizer in a Hugging Face directory, None when it holds no tokenizer.

    Raises:
        ConfigError: there are tokenizer files but they cannot be loaded.
    """
    if not has_tokenizer_files(path):
        return None
    return fingerprint_of_hf_tokenizer(load_auto_tokenizer(str(path)))


def require_same_tokenizer(
    *, data: str, data_fingerprint: str | None, teacher: str, teacher_fingerprint: str | None
) -> bool:
    """Return True when data and teacher are known to share a tokenizer, False when one of them is unknown.

    `data` and `teacher` are the names that the message shows: a path and the tokenizer's name.

    Raises:
        ConfigError: both are known and differ.
    """
    if data_fingerprint is None or teacher_fingerprint is None:
        return False
    if data_fingerprint == teacher_fingerprint:
        return True
    raise ConfigError(
        f"the student's data and the teacher use different tokenizers: {data} has {data_fingerprint[:12]}, "
        f"{teacher} has {teacher_fingerprint[:12]}; preprocess the data with the teacher's tokenizer"
    )


def describe_difference(left: Mapping[str, int], right: Mapping[str, int]) -> str:
    """Return how two token-to-id maps differ, in one phrase, or an empty string when they are equal."""
    if left == right:
        return ""
    moved = [token for token in left.keys() & right.keys() if left[token] != right[token]]
    parts = []
    if moved:
        first = min(moved, key=lambda token: (left[token], token))
        parts.append(f"other ids: {len(moved)} (first {first!r}: {left[first]} and {right[first]})")
    for name, only in (("first", left.keys() - right.keys()), ("second", right.keys() - left.keys())):
        if only:
            parts.append(f"only in the {name}: {len(only)} (such as {min(only)!r})")
    return "; ".join(parts)
