"""One short value for "the same vocabulary": what data, student and teacher must agree on.

Hashed: the full token-to-id map and the special ids that can separate documents (eos, bos). Left out on purpose:
pad, unk, sep, cls and mask. They never reach pretraining data of a byte-level or byte-fallback tokenizer, and
loaders invent them from the model type beside the tokenizer, so that two copies of one vocabulary would differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

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
