"""Train a byte-level BPE tokenizer on JSON lines and write it as a Hugging Face directory.

    python tools/train_tokenizer.py --input runs/quickstart/corpus/train.jsonl \\
        --vocab-size 8192 --output-dir runs/quickstart/tokenizer

The directory opens with transformers' AutoTokenizer and with `--tokenizer-type HuggingFaceTokenizer`. The same
input gives the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.input_rules import InputRules
from megatron_let.data.program import ProgramParser, run_program
from megatron_let.data.readers import read_blocks
from megatron_let.data.records import RejectedRecord, records_of, utf8_size
from megatron_let.data.sources import find_sources
from megatron_let.errors import ConfigError

_NUM_BYTES = 256


def read_texts(inputs: Sequence[str], json_key: str, skipped: Counter[str]) -> Iterator[str]:
    """Yield every usable text of the files; count the others in `skipped` by reason."""
    rules = InputRules(columns=(json_key,))
    for source in find_sources(inputs, rules):
        for block in read_blocks(source, rules):
            for record in records_of(block, text_key=json_key):
                try:
                    texts = record.take_texts(json_key)
                    utf8_size(texts)
                except RejectedRecord as rejected:
                    skipped[rejected.reason] += 1
                    continue
                yield from texts


def train(texts: Iterator[str], vocab_size: int, eod_token: str) -> Any:
    """Return a trained `tokenizers.Tokenizer` of at most `vocab_size` ids, eod first (id 0), then the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token],
        # Every byte gets an id, seen or not: any text can be encoded.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def save(tokenizer: Any, output_directory: Path, eod_token: str) -> None:
    """Write the two files that transformers reads; PreTrainedTokenizerFast is a name that every release knows."""
    output_directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod_token,
        "eos_token": eod_token,
        "clean_up_tokenization_spaces": False,
    }
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
    for name, content in contents.items():
        partial = output_directory / f"{name}.partial"
        partial.write_text(content + "\n", encoding="utf-8")
        partial.replace(output_directory / name)


def run(arguments: argparse.Namespace) -> str:
    """Train, save and return the line to print. Raises ConfigError for unusable flags or input."""
    if arguments.vocab_size <= _NUM_BYTES:
        raise ConfigError(
            f"--vocab-size {arguments.vocab_size} is too small: {_NUM_BYTES} bytes and eod need 257"
        )
    skipped: Counter[str] = Counter()
    texts = read_texts(arguments.input, arguments.json_key, skipped)
    first = next(texts, None)
    if first is None:
        raise ConfigError(f'no text under the key "{arguments.json_key}" in {" ".join(arguments.input)}')
    tokenizer = train(_chain(first, texts), arguments.vocab_size, arguments.eod_token)
    save(tokenizer, arguments.output_dir, arguments.eod_token)
    note = "".join(f", {count:,} records skipped: {reason}" for reason, count in sorted(skipped.items()))
    return f"{arguments.output_dir}: {tokenizer.get_vocab_size():,} tokens{note}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    parser = ProgramParser(__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON lines: plain, gzip or zstd"
    )
    parser.add_argument("--json-key", default="text", help="where the text is (default text)")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, eod included")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--eod-token", default="<|endoftext|>", help="ends a document; also the directory's bos"
    )
    return run_program(lambda: [run(parser.parse_args(argv))])


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


if __name__ == "__main__":
    sys.exit(main())
