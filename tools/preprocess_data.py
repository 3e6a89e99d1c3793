"""Turn JSON lines into Megatron's indexed token files, with a manifest that training checks.

    python tools/preprocess_data.py --input pile-00.jsonl pile-01.jsonl.zst --output-prefix data/pile \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizers/smollm --append-eod --workers 8

writes data/pile_text_document.{bin,idx,manifest.json}; give training `--data-path data/pile_text_document`.
The flags are those of Megatron-LM's tools/preprocess_data.py and so are the bytes. A record that cannot be used
is skipped, counted by reason and named in the manifest. Nothing is written over unless all went well.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.preprocess import PreprocessSettings, describe, output_prefix_of, preprocess
from megatron_let.data.tokenizers import TOKENIZER_TYPES, build_tokenizer
from megatron_let.errors import EXIT_DONE, ConfigError, LetError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the flags)")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed flags. Raises ConfigError for a wrong one."""
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON lines: plain, gzip or zstd"
    )
    data.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="one pair of files each"
    )
    data.add_argument("--output-prefix", required=True, help="PREFIX_KEY_document.{bin,idx,manifest.json}")
    data.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's eod")
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    tokens.add_argument("--tokenizer-model", help="Hugging Face directory, or SentencePiece .model file")
    tokens.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    tokens.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    tokens.add_argument("--vocab-size", type=int, help="ids before eod of NullTokenizer")
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--workers", type=int, default=1, help="processes that encode (default 1)")
    runtime.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines")
    ignored = parser.add_argument_group("accepted for Megatron-LM's scripts, without effect here")
    ignored.add_argument("--partitions", type=int, default=1, help="documents keep their order without it")
    ignored.add_argument("--keep-sequential-samples", action="store_true", help="always so")
    ignored.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="the only form")
    ignored.add_argument("--tokenizer-hf-use-fast", action="store_true", help="used wherever there is one")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Preprocess as the flags say."""
    settings = PreprocessSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        log_interval=arguments.log_interval,
    )
    tokenizer = build_tokenizer(
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
        vocab_size=arguments.vocab_size,
    )
    manifests = preprocess(settings, tokenizer, lambda line: print(line, file=sys.stderr, flush=True))
    for key, manifest in manifests.items():
        print(describe(manifest, output_prefix_of(settings, key)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    # One thread a worker: --workers is the number of cores used, and the encoder's own threads would add to it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        run(parse_arguments(argv))
    except LetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written over", file=sys.stderr)
        return 128 + signal.SIGINT
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
