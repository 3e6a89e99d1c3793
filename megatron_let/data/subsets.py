"""Subsets of a data set, such as the Pile's 22 sources: file names, and the blend that training reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron_let.data.manifest import Manifest
from megatron_let.errors import ConfigError

UNNAMED = "unnamed"
MAX_SUBSETS = 256
_LONGEST_NAME = 80


def file_name_of(subset: str, taken: Collection[str]) -> str:
    """Return a file name for a subset: letters, digits, `.`, `_` and `-` stay, other runs become `_`.

    A name that is `taken` already, by a subset that differs only in what was replaced, gets a digest behind it. File
    systems may not tell upper from lower case, so names that differ only there count as the same.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", subset).strip("._")[:_LONGEST_NAME] or UNNAMED
    if name.lower() in {other.lower() for other in taken}:
        return f"{name}-{hashlib.sha256(subset.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return name


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


def blend_line(manifests: Mapping[str, Manifest], weights: Mapping[str, float]) -> str:
    """Return WEIGHT PREFIX WEIGHT PREFIX ... as `--data-path` takes it.

    Without `weights` a subset weighs as much as its share of the tokens, which reads every subset equally often;
    with them a subset that they do not name is left out.
    """
    total = sum(manifest.tokens for manifest in manifests.values())
    words: list[str] = []
    for prefix, manifest in manifests.items():
        weight = weights.get(manifest.subset or UNNAMED) if weights else manifest.tokens / total
        if weight is not None:
            words += [f"{weight:.6g}", prefix]
    return " ".join(words)


def subset_report(account: Mapping[str, Any], manifests: Mapping[str, Manifest], line: str) -> dict[str, Any]:
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
    return {**account, "subsets": subsets, "data_path": line.split()}
