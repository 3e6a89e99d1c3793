"""Subsets of a data set, such as the Pile's 22 sources: file names, and the blend that training reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron_let.data.manifest import Manifest
from megatron_let.errors import ConfigError

MAX_SUBSETS = 256
_UNNAMED = "unnamed"
_LONGEST_NAME = 80


def pair_name(subset: str, key: str, taken: Collection[str]) -> str:
    """Return what follows the output prefix in the name of a subset's pair: _SUBSET_KEY_document.

    Of the subset's name letters, digits, `.`, `_` and `-` stay, other runs become `_`; a record without one is in the
    subset "". A name that is `taken` already gets a digest behind the subset. File systems may not tell upper from
    lower case, so names that differ only there count as the same.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", subset).strip("._")[:_LONGEST_NAME] or _UNNAMED
    found = f"_{name}_{key}_document"
    if found.lower() in {other.lower() for other in taken}:
        digest = hashlib.sha256(f"{key} {subset}".encode("utf-8", "surrogatepass")).hexdigest()[:8]
        found = f"_{name}-{digest}_{key}_document"
    return found


def parse_weights(words: Sequence[str]) -> dict[str, float]:
    """Return the weights in NAME=WEIGHT words.

    Raises:
        ConfigError: another form, a name twice, or a weight that is not a positive number.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = 0.0
        if not equals or name in weights or not 0 < weight < float("inf"):
            raise ConfigError(
                f"--subset-weights {word}: give NAME=WEIGHT with a positive weight, each name once"
            )
        weights[name] = weight
    return weights


def blend_words(manifests: Mapping[str, Manifest], weights: Mapping[str, float]) -> list[str]:
    """Return WEIGHT PREFIX WEIGHT PREFIX ... as `--data-path` takes it.

    Without `weights` a subset weighs as much as its share of the tokens, which reads every subset equally often;
    with them a subset that they do not name is left out.

    Raises:
        ConfigError: `weights` name a subset that is not there.
    """
    names = {str(manifest.subset) for manifest in manifests.values()}
    if unknown := sorted(weights.keys() - names):
        raise ConfigError(
            f"--subset-weights names {unknown[0]!r}, and there is no such subset (there are {', '.join(sorted(names))}): "
            "the same command with other weights ends at once, nothing is encoded again"
        )
    total = sum(manifest.tokens for manifest in manifests.values())
    words: list[str] = []
    for prefix, manifest in manifests.items():
        weight = weights.get(str(manifest.subset)) if weights else manifest.tokens / total
        if weight is not None:
            words += [f"{weight:.6g}", prefix]
    return words


def subset_report(
    account: Mapping[str, Any], manifests: Mapping[str, Manifest], words: Sequence[str]
) -> dict[str, Any]:
    """Return the account of a run by subset: every record, what each subset holds, and the blend."""
    subsets = {
        str(manifest.subset): {
            "prefix": prefix,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "bytes": manifest.bytes,
        }
        for prefix, manifest in manifests.items()
    }
    return {**account, "subsets": subsets, "data_path": list(words)}
