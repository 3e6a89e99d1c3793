"""JSON lines to indexed token files: read, encode in workers, write in order, account for every record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from megatron_let import __version__
from megatron_let.data.batch_encoders import BatchEncoder
from megatron_let.data.encoding import EncodedBlock, EncodedKey, EncodingRules, encode_block
from megatron_let.data.indexed import dtype_for_vocabulary
from megatron_let.data.indexed_writer import IndexedWriter
from megatron_let.data.manifest import Manifest, SourceFile, write_manifest
from megatron_let.data.progress import ProgressMeter
from megatron_let.data.sources import LineBlock, find_sources, read_blocks
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.data.workers import map_in_order
from megatron_let.errors import ConfigError, LetError

_MAX_EXAMPLES = 10


@dataclass(frozen=True)
class PreprocessSettings:
    """What to read, what to take from it and where to put it."""

    inputs: tuple[str, ...]
    output_prefix: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    log_interval: int = 1000


@dataclass(frozen=True)
class _BlockEncoder:
    """encode_block with all but the block given: what a worker process receives once."""

    rules: EncodingRules
    encoder: BatchEncoder

    def __call__(self, block: LineBlock) -> EncodedBlock:
        return encode_block(block, self.rules, self.encoder)


@dataclass
class _KeyOutput:
    """The pair being written for one key, and its account so far."""

    writer: IndexedWriter
    max_token_id: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, path: str, encoded: EncodedKey) -> None:
        self.writer.add_documents(encoded.tokens, encoded.lengths, encoded.sequence_counts)
        self.max_token_id = max(self.max_token_id, encoded.max_token_id)
        self.text_bytes += encoded.text_bytes
        self.skipped.update(encoded.skipped_by_reason())
        room = _MAX_EXAMPLES - len(self.examples)
        self.examples += [f"{path}:{item.line}: {item.reason}" for item in encoded.skipped[:room]]


def output_prefix_of(settings: PreprocessSettings, key: str) -> str:
    """Return the data path of one key's pair, as Megatron-LM names it."""
    return f"{settings.output_prefix}_{key}_document"


def preprocess(
    settings: PreprocessSettings, tokenizer: Tokenizer, write_line: Callable[[str], None]
) -> dict[str, Manifest]:
    """Write one pair of files and its manifest for each JSON key; return the manifests by key.

    The bytes do not depend on the number of workers. `write_line` receives progress lines.

    Raises:
        ConfigError: an impossible setting, an unreadable input, an unwritable output, a key without any document.
        LetError: a worker died, or the disk is full.
    In every such case the files that were there before are left as they were.
    """
    _check_settings(settings)
    sources = find_sources(settings.inputs)
    rules = EncodingRules(
        json_keys=settings.json_keys,
        dtype=dtype_for_vocabulary(tokenizer.vocab_size),
        append_eod=settings.append_eod,
        eod=tokenizer.eod,
    )
    meter = ProgressMeter(sum(source.size for source in sources), settings.log_interval, write_line)
    try:
        with ExitStack() as stack:
            outputs = {key: _open_output(settings, key, rules.dtype, stack) for key in settings.json_keys}
            encode = _BlockEncoder(rules, tokenizer.batch_encoder())
            for block in map_in_order(encode, _all_blocks(sources), settings.workers):
                _take(block, outputs, meter)
            write_line(meter.line())
            return _finish(outputs, rules, tokenizer, sources)
    except OSError as error:
        raise LetError(
            f"cannot write {settings.output_prefix}: {error.strerror}; nothing was written over"
        ) from error


def _check_settings(settings: PreprocessSettings) -> None:
    keys = settings.json_keys
    if not keys or len(set(keys)) != len(keys):
        raise ConfigError(f"--json-keys {' '.join(keys)}: each key once, and at least one")
    if settings.workers < 1 or settings.log_interval < 1:
        raise ConfigError(
            f"--workers {settings.workers} and --log-interval {settings.log_interval} must be at least 1"
        )


def _open_output(settings: PreprocessSettings, key: str, dtype: str, stack: ExitStack) -> _KeyOutput:
    prefix = output_prefix_of(settings, key)
    try:
        return _KeyOutput(stack.enter_context(IndexedWriter(prefix, dtype)))
    except OSError as error:
        raise ConfigError(f"cannot write {prefix}.bin: {error.strerror}") from error


def _all_blocks(sources: Sequence[SourceFile]) -> Iterator[LineBlock]:
    """Yield the blocks of all files, with positions counted over all of them."""
    before = 0
    for source in sources:
        for block in read_blocks(source.path):
            yield replace(block, position=before + block.position)
        before += source.size


def _take(block: EncodedBlock, outputs: Mapping[str, _KeyOutput], meter: ProgressMeter) -> None:
    for key, encoded in block.keys.items():
        outputs[key].add(block.path, encoded)
    meter.add(
        documents=block.num_lines,
        tokens=sum(encoded.num_tokens for encoded in block.keys.values()),
        content_bytes=block.num_bytes,
        read_bytes=block.position,
    )


def _finish(
    outputs: Mapping[str, _KeyOutput],
    rules: EncodingRules,
    tokenizer: Tokenizer,
    sources: tuple[SourceFile, ...],
) -> dict[str, Manifest]:
    """Put all pairs under their names, or none when one of them would be empty."""
    for key, output in outputs.items():
        if output.writer.tokens == 0:
            raise ConfigError(
                f'no document has text under the key "{key}" ({_account(output.skipped)}; first: '
                f"{output.examples[0]}): check --json-keys and --input"
            )
    manifests = {key: _manifest_of(output, key, rules, tokenizer, sources) for key, output in outputs.items()}
    for key, output in outputs.items():
        output.writer.finish()
        write_manifest(output.writer.prefix, manifests[key])
    return manifests


def _account(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


def describe(manifest: Manifest, prefix: str) -> str:
    """Return what was written and skipped, in one line."""
    num_skipped = sum(manifest.skipped.values())
    line = f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype})"
    if not num_skipped:
        return f"{line}, nothing skipped"
    return f"{line}, {num_skipped:,} records skipped: {_account(manifest.skipped)}"


def _manifest_of(
    output: _KeyOutput,
    key: str,
    rules: EncodingRules,
    tokenizer: Tokenizer,
    sources: tuple[SourceFile, ...],
) -> Manifest:
    return Manifest(
        tokenizer_type=tokenizer.tokenizer_type,
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=rules.append_eod,
        json_key=key,
        dtype=rules.dtype,
        max_token_id=output.max_token_id,
        documents=output.writer.documents,
        sequences=output.writer.sequences,
        tokens=output.writer.tokens,
        bytes=output.text_bytes,
        sources=sources,
        skipped=dict(sorted(output.skipped.items())),
        skipped_examples=tuple(output.examples),
        tool_version=__version__,
    )
