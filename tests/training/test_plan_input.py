"""What a plan says of data and tokenizer, which may be elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_let.planning.table import plan_lines
from megatron_let.testing.training import write_token_files
from tests.training.bad_input import write_word_tokenizer
from tests.training.planned import MOCK, plan_of, problems_of


def test_data_are_counted(token_files: Path, tmp_path: Path) -> None:
    flags = {"--data-path": token_files, "--split": "1,1,0", "--eval-iters": 1, "--train-iters": 200}
    plan = plan_of(flags)
    assert plan.data.needed == {"training": 200 * 8 * 32, "validation": 8 * 32, "test": 8 * 32}
    total = (token_files.with_suffix(".bin")).stat().st_size // 2
    present = plan.data.present
    assert present["training"] is not None
    assert present["validation"] is not None
    assert present["training"] + present["validation"] == total
    epochs = f"{200 * 8 * 32 / present['training']:.2f} epochs"
    assert any(epochs in line for line in plan_lines(plan))
    assert not any("is read" in line for line in plan.warnings)
    often = plan_of({**flags, "--train-iters": 2_000_000})
    (warning,) = (line for line in often.warnings if "is read" in line)
    assert f"is read {2_000_000 * 8 * 32 / present['training']:,.0f} times" in warning
    missing = plan_of({**flags, "--data-path": tmp_path / "elsewhere"})
    assert missing.data.present["training"] is None
    assert any("elsewhere" in line for line in missing.warnings)


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        (
            ["3", "large", "1", "small"],
            1280 / 4 / 60,
        ),  # the small one is read more often though it weighs less
        (["20", "large", "1", "small"], 1280 * 20 / 21 / 600),
        (["large", "small"], 1280 / 660),
    ],
)
def test_epochs_are_those_of_the_data_set_that_is_read_most_often(
    words: list[str], epochs: float, tmp_path: Path
) -> None:
    write_token_files(tmp_path / "large", [[1] * 5 + [60]] * 100)
    write_token_files(tmp_path / "small", [[1] * 5 + [60]] * 10)
    paths = [str(tmp_path / word) if word.isalpha() else word for word in words]
    for flags in ({"--data-path": paths, "--split": "1,0,0"}, {"--train-data-path": paths}):
        plan = plan_of(flags)
        assert plan.data.needed["training"] == 1280
        assert plan.data.present["training"] == 660
        assert plan.data.epochs["training"] == pytest.approx(epochs)
        assert any(f", {epochs:.2f} epochs of the data set" in line for line in plan_lines(plan))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("HuggingFaceTokenizer", {"--tokenizer-model": "nowhere"}),
        ("HuggingFaceTokenizer", {"--tokenizer-model": ""}),  # a directory without a tokenizer's files
        ("SentencePieceTokenizer", {"--tokenizer-model": "nowhere.model"}),
        ("GPT2BPETokenizer", {"--vocab-file": "vocab.json", "--merge-file": "merges.txt"}),
    ],
)
def test_a_tokenizer_may_be_elsewhere(kind: str, names: dict[str, str], tmp_path: Path) -> None:
    files = {flag: tmp_path / name for flag, name in names.items()}
    plan = plan_of({**MOCK, "--tokenizer-type": kind, **files, "--vocab-size": 100})
    assert plan.padded_vocab_size == 120
    assert any(line.startswith("planned with --vocab-size 100 and no tokenizer") for line in plan.warnings)


def test_a_tokenizer_that_is_here_has_the_last_word(tmp_path: Path) -> None:
    flags = {**MOCK, "--tokenizer-type": "HuggingFaceTokenizer", "--vocab-size": 100}
    write_word_tokenizer(tmp_path, ["a", "b", "end"])
    (line,) = problems_of({**flags, "--tokenizer-model": tmp_path})
    assert line.startswith("--vocab-size 100: tokenizer")
    (tmp_path / "tokenizer.json").write_text("{")
    (line,) = problems_of({**flags, "--tokenizer-model": tmp_path})
    assert "cannot load the tokenizer" in line
