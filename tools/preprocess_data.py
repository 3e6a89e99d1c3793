"""Turn raw text into Megatron's indexed token files, with a manifest that training checks.

    python tools/preprocess_data.py --input 'pile/*.jsonl.zst' --output-prefix data/pile \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizers/smollm --append-eod --workers 8

writes data/pile_text_document.{bin,idx,manifest.json}; give training `--data-path data/pile_text_document`.
The flags are those of Megatron-LM's tools/preprocess_data.py and so are the bytes; the few of its flags that would
change them are refused. A record that cannot be used is
skipped, counted by reason and named in the manifest. Nothing is written over unless all went well, and a run that was
killed goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.batch_encoders import BatchEncoder, SentencePieceEncoder
from megatron_let.data.document_end import choose_eod
from megatron_let.data.fast_encoder import ENCODERS
from megatron_let.data.foreign_flags import add_foreign_flags
from megatron_let.data.input_rules import INPUT_FORMATS, TEXT_DOCUMENTS
from megatron_let.data.preprocess import PreprocessSettings, describe, preprocess
from megatron_let.data.program import Interrupted, ProgramParser, command_line, run_program, say, utf8_name
from megatron_let.data.records import TOO_LONG_TO_ENCODE
from megatron_let.data.sharding import parse_shard
from megatron_let.data.subsets import parse_weights
from megatron_let.data.tokenizer_flags import add_tokenizer_places, refuse_without_effect
from megatron_let.data.tokenizers import TOKENIZER_TYPES, build_tokenizer
from megatron_let.errors import ConfigError
from megatron_let.regular_files import read_text


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed flags. Raises ConfigError for a wrong one."""
    parser = ProgramParser(__doc__)
    _add_data_flags(parser.add_argument_group("data"))
    _add_record_flags(parser.add_argument_group("records that cannot be used"))
    _add_subset_flags(parser.add_argument_group("subsets"))
    _add_tokenizer_flags(parser.add_argument_group("tokenizer"))
    _add_runtime_flags(parser.add_argument_group("runtime"))
    add_foreign_flags(parser)
    return parser.parse_args(argv)


def _add_data_flags(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, globs or directories of JSON lines, parquet or plain text, as they are or in gzip or zstd; "
        "- is standard input",
    )
    data.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="one pair of files each"
    )
    data.add_argument(
        "--output-prefix", required=True, type=utf8_name, help="PREFIX_KEY_document.{bin,idx,manifest.json}"
    )
    data.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's eod")
    data.add_argument(
        "--document-map",
        action="store_true",
        help="keep the file, record and byte of each document in PREFIX_KEY_document.map.npy",
    )
    data.add_argument(
        "--limit", type=int, metavar="N", help="read the first N records alone (lines, rows, text files)"
    )
    data.add_argument(
        "--input-format",
        choices=INPUT_FORMATS,
        default="auto",
        help="auto: parquet by its first bytes, text by the ending .txt, else JSON lines",
    )
    data.add_argument(
        "--text-documents",
        choices=TEXT_DOCUMENTS,
        help="what is one document of plain text (default: the file)",
    )


def _add_record_flags(records: argparse._ArgumentGroup) -> None:
    records.add_argument(
        "--on-error",
        choices=["skip", "stop"],
        default="skip",
        help="skip and count (default), or stop at the first",
    )
    records.add_argument(
        "--max-error-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help="stop when more are unusable (default 0.001); of fewer than 10,000 records as many may be as of 10,000, but "
        "not most of all; blank lines and empty texts do not count",
    )
    records.add_argument(
        "--max-document-bytes",
        type=int,
        default=128 << 20,
        metavar="BYTES",
        help="longest record, as it stands in the file (default 128 MiB); a longer one is skipped and counted. Long "
        "texts are encoded in pieces; where the tokenizer cannot be shown to cut, one of more than "
        f"{BatchEncoder.max_whole_bytes >> 20} MiB ({SentencePieceEncoder.max_whole_bytes >> 20} MiB with SentencePiece) is "
        f"skipped too (reason {TOO_LONG_TO_ENCODE})",
    )
    records.add_argument(
        "--skipped-file",
        action="store_true",
        help="list every skipped record by file, number, byte and reason in PREFIX_KEY_skipped.jsonl",
    )
    records.add_argument(
        "--invalid-utf8",
        choices=["skip", "replace"],
        default="skip",
        help="skip the record (default), or put U+FFFD for what is not UTF-8",
    )


def _add_subset_flags(subsets: argparse._ArgumentGroup) -> None:
    subsets.add_argument(
        "--split-by-subset",
        action="store_true",
        help="a pair for each subset, PREFIX_SUBSET_KEY_document, and the blend of them in PREFIX_KEY_blend.txt",
    )
    subsets.add_argument(
        "--subset-key",
        default="meta.pile_set_name",
        metavar="PATH",
        help="where a record names its subset, keys joined by dots (default meta.pile_set_name)",
    )
    subsets.add_argument(
        "--exclude-subset",
        nargs="+",
        default=[],
        metavar="NAME",
        help="skip and count the records of these subsets",
    )
    subsets.add_argument(
        "--subset-weights",
        nargs="+",
        default=[],
        metavar="NAME=WEIGHT",
        help="weights of the blend (default: each subset's share of the tokens); what is not named is left out",
    )


def _add_tokenizer_flags(tokens: argparse._ArgumentGroup) -> None:
    tokens.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    add_tokenizer_places(tokens)
    tokens.add_argument(
        "--eod-token", metavar="TOKEN", help="the token that ends documents (default: the tokenizer's eos)"
    )
    tokens.add_argument(
        "--encode-special-tokens",
        action="store_true",
        help="special tokens written out in a text are text (default: they become the token, as in Megatron-LM)",
    )
    tokens.add_argument(
        "--encoder",
        choices=ENCODERS,
        default="auto",
        help="auto: gigatoken where it is installed and gives the tokenizer's very ids, else the tokenizer's own "
        "library; plain: that library; fast: gigatoken or an error",
    )


def _add_runtime_flags(runtime: argparse._ArgumentGroup) -> None:
    runtime.add_argument("--workers", type=int, default=1, help="processes that encode (default 1)")
    runtime.add_argument(
        "--shard",
        metavar="I/N",
        help="take part I (from 0) of N of the files, and write PREFIX-0000I-of-0000N_KEY_document; tools/merge_data.py joins "
        "the parts to the bytes of one run",
    )
    runtime.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines")
    runtime.add_argument(
        "--commit-interval",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="time between two points from which a killed run can go on (default 10)",
    )
    runtime.add_argument(
        "--restart", action="store_true", help="begin anew where a stopped run could be gone on with"
    )


def seconds(word: str) -> float:
    """Return a time, as an argparse type: not `nan`, which no time ever reaches. Raises its error."""
    value = float(word)  # a ValueError is argparse's to word
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{word}: give a number of seconds from 0 on")
    return value


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Preprocess as the flags say and yield the lines to print. Raises LetError."""
    refuse_without_effect(arguments, arguments.tokenizer_type)
    if arguments.text_documents is not None and arguments.input_format in ("jsonl", "parquet"):
        raise ConfigError(
            f"--text-documents has no effect with --input-format {arguments.input_format}: leave it out, or give text"
        )
    shard = parse_shard(arguments.shard) if arguments.shard is not None else None
    settings = PreprocessSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix + (shard.suffix if shard else ""),
        shard=shard,
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        input_format=arguments.input_format,
        text_documents=arguments.text_documents or "file",
        subset_key=arguments.subset_key,
        split_by_subset=arguments.split_by_subset,
        subset_weights=parse_weights(arguments.subset_weights),
        excluded_subsets=tuple(sorted(set(arguments.exclude_subset))),
        limit=arguments.limit,
        map_documents=arguments.document_map,
        list_skipped=arguments.skipped_file,
        max_document_bytes=arguments.max_document_bytes,
        invalid_utf8=arguments.invalid_utf8,
        on_error=arguments.on_error,
        max_error_fraction=arguments.max_error_fraction,
        encoder=arguments.encoder,
        restart=arguments.restart,
        workers=arguments.workers,
        log_interval=arguments.log_interval,
        commit_seconds=arguments.commit_interval,
        command=command_line(),
    )
    tokenizer = build_tokenizer(
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
        vocab_size=arguments.vocab_size,
        encode_special_tokens=arguments.encode_special_tokens,
        without_torch=True,
        needs_eod=False,
    )
    choose_eod(tokenizer, arguments.eod_token, append_eod=arguments.append_eod)
    try:
        manifests = preprocess(settings, tokenizer, say)
    except KeyboardInterrupt:
        raise Interrupted(_interrupted(settings.output_prefix)) from None
    for prefix, manifest in manifests.items():
        yield describe(manifest, prefix)
    if settings.split_by_subset:
        for key in settings.json_keys:
            blend = Path(f"{settings.output_prefix}_{key}_blend.txt")
            yield f"--data-path {read_text(blend).strip()}"


def _interrupted(output_prefix: str) -> str:
    if Path(f"{output_prefix}.partial", "journal.json").exists():
        return "interrupted; the same command goes on where this one stopped"
    return "interrupted; the same command begins anew"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    # One thread a worker: --workers is the number of cores used, and the encoder's own threads would add to it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return run_program(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
