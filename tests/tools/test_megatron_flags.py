"""`preprocess_data.py` with the command line of Megatron-LM's tool (core 0.16.1): every flag is known here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from preprocess_data import main, parse_arguments

from megatron_let.data.foreign_flags import REFUSED
from megatron_let.errors import ConfigError

# All that its parser adds, each with a value that it takes.
MEGATRONS = {
    "--input": "a.jsonl",
    "--json-keys": "text",
    "--split-sentences": "",
    "--keep-newlines": "",
    "--append-eod": "",
    "--lang": "german",
    "--output-prefix": "out",
    "--workers": "2",
    "--partitions": "4",
    "--log-interval": "10",
    "--keep-sequential-samples": "",
    "--vocab-size": "9",
    "--padded-vocab-size": "128",
    "--vocab-file": "vocab.json",
    "--merge-file": "merges.txt",
    "--vocab-extra-ids": "100",
    "--tokenizer-type": "NullTokenizer",
    "--tokenizer-model": "tokenizer",
    "--tokenizer-metadata": "metadata.json",
    "--tokenizer-special-tokens": "<s> </s>",
    "--legacy-tokenizer": "",
    "--tiktoken-pattern": "v2",
    "--tiktoken-num-special-tokens": "1000",
    "--tiktoken-special-tokens": "<s> </s>",
    "--tokenizer-sentencepiece-legacy": "",
    "--tokenizer-hf-use-fast": "",
    "--tokenizer-hf-include-special-tokens": "",
    "--trust-remote-code": "",
}
# Of earlier and later releases.
OTHERS = {
    "--dataset-impl": "mmap",
    "--tokenizer-hf-no-use-fast": "",
    "--tokenizer-hf-no-include-special-tokens": "",
}
NEEDED = {"--input": "a", "--output-prefix": "out", "--tokenizer-type": "NullTokenizer", "--vocab-size": "9"}
NO_REASONS = ("unrecognized", "invalid choice", "expected", "required")


def words_of(flags: dict[str, str]) -> list[str]:
    return [word for flag, value in flags.items() for word in (flag, *value.split())]


@pytest.mark.parametrize("flag", [*MEGATRONS, *OTHERS])
def test_every_flag_is_accepted_or_refused_with_a_reason(flag: str) -> None:
    words = words_of({**NEEDED, flag: {**MEGATRONS, **OTHERS}[flag]})
    if flag not in {name for name, _, _ in REFUSED}:
        parse_arguments(words)
        return
    with pytest.raises(ConfigError, match=f"^{flag}: ") as refusal:
        parse_arguments(words)
    message = str(refusal.value)
    assert "\n" not in message
    assert not any(word in message for word in NO_REASONS)


def test_what_is_refused_is_a_flag_of_megatrons_and_listed() -> None:
    listed = Path(__file__).parents[2] / "docs" / "decisions" / "0006-differences-from-megatron-lm.md"
    text = listed.read_text()
    for flag, _, _ in REFUSED:
        assert flag in MEGATRONS
        assert f"`{flag}`" in text


def test_flags_without_effect_leave_the_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1 2"}\n{"text": "3"}\n')
    without_effect = (
        *("--keep-newlines", "--lang", "--partitions", "--keep-sequential-samples"),
        *("--padded-vocab-size", "--vocab-extra-ids", "--tokenizer-hf-use-fast"),
    )
    digests = []
    for name, flags in (("one", {}), ("two", {flag: MEGATRONS[flag] for flag in without_effect} | OTHERS)):
        own = {"--input": f"{tmp_path / 'a.jsonl'}", "--output-prefix": f"{tmp_path / name}"}
        assert main(words_of({**NEEDED, **own, **flags})) == 0, capsys.readouterr().err
        pair = [tmp_path / f"{name}_text_document.{suffix}" for suffix in ("bin", "idx")]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in pair])
    assert digests[0] == digests[1]
