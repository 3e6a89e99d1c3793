"""Make the quickstart's corpus from the Python standard library's own source files; needs no network.

    python tools/build_stdlib_corpus.py --output-dir runs/quickstart/corpus

writes train.jsonl and valid.jsonl in the Pile's form, {"text": ..., "meta": {"pile_set_name": ...}}, where the
set is the file's top-level package ("modules" for a single file). A file's side of the split depends on its path
alone. Empty files, files that are not UTF-8 and exact copies are left out and counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.errors import EXIT_DONE, ConfigError, LetError

SPLITS = ("train", "valid")
_SKIPPED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "__pycache__"})


def source_files(root: Path) -> Iterator[Path]:
    """Yield the .py files below `root` by relative path, in an order that any machine gives."""
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        found += [Path(directory, name).relative_to(root) for name in names if name.endswith(".py")]
    yield from sorted(found, key=lambda path: path.as_posix())


def split_of(path: Path, validation_fraction: float) -> str:
    """Return "train" or "valid" for a relative path, from the hash of the path alone."""
    digest = hashlib.sha256(path.as_posix().encode("utf-8")).digest()
    return "valid" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"


def write_corpus(root: Path, outputs: Mapping[str, TextIO], validation_fraction: float) -> Counter[str]:
    """Write each usable file below `root` to its split's stream; return counts of files and bytes by outcome."""
    counts: Counter[str] = Counter()
    seen: set[bytes] = set()
    for path in source_files(root):
        content = (root / path).read_bytes()
        digest = hashlib.sha256(content).digest()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            counts["not UTF-8"] += 1
            continue
        if not text.strip():
            counts["empty"] += 1
            continue
        # Over both splits, so that no validation text is trained on.
        if digest in seen:
            counts["copies"] += 1
            continue
        seen.add(digest)
        split = split_of(path, validation_fraction)
        subset = path.parts[0] if len(path.parts) > 1 else "modules"
        outputs[split].write(json.dumps({"text": text, "meta": {"pile_set_name": subset}}) + "\n")
        counts[split] += 1
        counts[f"{split} bytes"] += len(content)
    return counts


def build(output_directory: Path, root: Path, validation_fraction: float) -> Counter[str]:
    """Write both files, whole or not at all; return write_corpus's counts.

    Raises:
        ConfigError: the directory has no source files, or one side of the split is empty.
    """
    if not root.is_dir():
        raise ConfigError(f"no directory {root}: give the source files' directory with --source-dir")
    output_directory.mkdir(parents=True, exist_ok=True)
    paths = {split: output_directory / f"{split}.jsonl" for split in SPLITS}
    partial = {split: path.with_name(path.name + ".partial") for split, path in paths.items()}
    with ExitStack() as stack:
        outputs = {
            split: stack.enter_context(path.open("w", encoding="utf-8")) for split, path in partial.items()
        }
        counts = write_corpus(root, outputs, validation_fraction)
    if not all(counts[split] for split in SPLITS):
        for path in partial.values():
            path.unlink()
        raise ConfigError(
            f"{root} gives {counts['train']} training and {counts['valid']} validation files: both are needed"
        )
    for split in SPLITS:
        partial[split].replace(paths[split])
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="where train.jsonl and valid.jsonl go")
    parser.add_argument("--source-dir", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument(
        "--validation-fraction", type=float, default=0.05, help="share of files (default 0.05)"
    )
    arguments = parser.parse_args(argv)
    try:
        counts = build(arguments.output_dir, arguments.source_dir, arguments.validation_fraction)
    except (LetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ConfigError.exit_code
    written = ", ".join(
        f"{split} {counts[split]:,} files {counts[f'{split} bytes'] / 1e6:.1f} MB" for split in SPLITS
    )
    skipped = ", ".join(f"{counts[reason]:,} {reason}" for reason in ("not UTF-8", "empty", "copies"))
    print(f"{arguments.output_dir}: {written}; left out: {skipped}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
