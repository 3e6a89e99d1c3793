"""The tokenizer that a manifest remembers, held against another: whether they differ, and in which words."""

from __future__ import annotations

from pathlib import Path

from megatron_let.data.encoding_fingerprint import encode_otherwise, without_mark
from megatron_let.data.fingerprint import fingerprint_of
from megatron_let.data.manifest import Manifest
from megatron_let.data.tokenizer_facts import TokenizerFacts, difference_in_words
from megatron_let.data.tokenizers import SENTENCEPIECE_TYPES, Tokenizer, build_tokenizer
from megatron_let.errors import ConfigError
from megatron_let.plain_json import shown

_SHOWN_DIGITS = 12
_LOADABLE = ("HuggingFaceTokenizer", *SENTENCEPIECE_TYPES)


def difference_from_manifest(tokenizer: Tokenizer, manifest: Manifest) -> str:
    """Return in words how the tokenizer differs from the one that made the data; empty if nothing says that it does."""
    facts = tokenizer.facts
    if facts is None or manifest.tokenizer_fingerprint is None:
        return ""
    is_other = manifest.tokenizer_fingerprint != facts.fingerprint
    mine, theirs = facts.fingerprint, manifest.tokenizer_fingerprint
    if not is_other:
        if not encode_otherwise(facts.encoding_fingerprint, manifest.encoding_fingerprint):
            return ""
        mine, theirs = str(facts.encoding_fingerprint), str(manifest.encoding_fingerprint)
    words = _only_eos(facts, manifest) if is_other else ""
    recorded = None if words else _recorded_facts(manifest)
    if recorded is not None:
        words = difference_in_words(facts, recorded)
    return (
        f"the data were made with {shown(manifest.tokenizer_name, 300)} ({_short(theirs)}), not with {tokenizer.name} "
        f"({_short(mine)}){words and f': {words} (the one given first)'}"
    )


def difference_of_manifests(left: Manifest, right: Manifest) -> str:
    """Return in words how the tokenizers of two data sets differ; empty if nothing says that they do."""
    pairs = {
        name: (getattr(left, name), getattr(right, name))
        for name in ("tokenizer_fingerprint", "vocab_size", "eod")
    }
    if encode_otherwise(left.encoding_fingerprint, right.encoding_fingerprint):
        pairs["encoding_fingerprint"] = (left.encoding_fingerprint, right.encoding_fingerprint)
    differing = [
        f"{name} {_short(mine)} and {_short(theirs)}"
        for name, (mine, theirs) in pairs.items()
        if mine != theirs
    ]
    if not differing:
        return ""
    mine, theirs = _recorded_facts(left), _recorded_facts(right)
    words = "" if mine is None or theirs is None else difference_in_words(mine, theirs)
    names = f"{shown(left.tokenizer_name, 300)} and {shown(right.tokenizer_name, 300)}"
    return f"{names}: {words or ', '.join(differing)}"


def _only_eos(facts: TokenizerFacts, manifest: Manifest) -> str:
    """Return the words for a tokenizer that would be the manifest's with its eos; empty if it would not."""
    for bos in (facts.special_ids.get("bos"), manifest.eod):
        if (
            fingerprint_of(facts.token_to_id, {"eos": manifest.eod, "bos": bos})
            == manifest.tokenizer_fingerprint
        ):
            return f"only eos differs: {facts.special_ids.get('eos')} and {manifest.eod}"
    return ""


def _recorded_facts(manifest: Manifest) -> TokenizerFacts | None:
    """Load the tokenizer that made the data, if it still lies where it lay and is the one that it was."""
    if manifest.tokenizer_type not in _LOADABLE or not Path(manifest.tokenizer_name).exists():
        return None
    try:
        facts = build_tokenizer(
            tokenizer_type=manifest.tokenizer_type, tokenizer_model=manifest.tokenizer_name
        ).facts
    except (ConfigError, OSError, ValueError):
        return None
    if facts is None or facts.fingerprint != manifest.tokenizer_fingerprint:
        return None
    return None if encode_otherwise(facts.encoding_fingerprint, manifest.encoding_fingerprint) else facts


def _short(value: object) -> str:
    """Return a value of a manifest as a message shows it: of a digest the beginning."""
    return shown(without_mark(value)[:_SHOWN_DIGITS] if isinstance(value, str) else value)
