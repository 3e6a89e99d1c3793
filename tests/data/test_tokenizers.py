"""Tokenizers: ids, sizes, special ids and clear refusals."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_let.data import hf_directory
from megatron_let.data.tokenizers import NO_PAD, SENTENCEPIECE_TYPES, build_tokenizer
from megatron_let.errors import ConfigError
from tests.processes import HANG_SECONDS

TEXT = "the quick fox\n\tünïcode 日本語 🤖 \x00 <|endoftext|> end"


def huggingface(path: Path) -> Any:
    return build_tokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path))


def save_gpt2_files(backend: Any, directory: Path) -> tuple[str, str]:
    backend.model.save(str(directory))
    return str(directory / "vocab.json"), str(directory / "merges.txt")


def edited_directory(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a tokenizer directory with changes to its tokenizer.json (top level) or config (name prefixed config_)."""
    target.mkdir()
    content = json.loads((source / "tokenizer.json").read_text())
    config = json.loads((source / "tokenizer_config.json").read_text())
    for name, value in changes.items():
        if name.startswith("config_"):
            config[name.removeprefix("config_")] = value
        else:
            content[name] = value
    (target / "tokenizer.json").write_text(json.dumps(content))
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def test_importing_the_module_loads_no_tokenizer_library() -> None:
    script = (
        "import sys, megatron_let.data.tokenizers, megatron_let.data.encoding\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'sentencepiece') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    assert result.stdout.strip() == "[]"


def test_a_directory_gives_the_ids_of_transformers_without_special_tokens(tokenizer_directory: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(str(tokenizer_directory)).encode(TEXT, add_special_tokens=False)
    tokenizer = huggingface(tokenizer_directory)
    assert tokenizer.tokenize(TEXT) == expected
    assert tokenizer.detokenize(expected) == TEXT
    assert (tokenizer.eod, tokenizer.pad) == (0, NO_PAD)


def test_a_post_processor_that_adds_bos_adds_none_to_the_data(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    with_bos = huggingface(edited_directory(tokenizer_directory, tmp_path / "bos", post_processor=template))
    assert with_bos.tokenize("the fox") == huggingface(tokenizer_directory).tokenize("the fox")


def test_truncation_and_padding_stored_with_a_tokenizer_do_not_cut_documents(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path = edited_directory(tokenizer_directory, tmp_path / "cut", truncation=truncation, padding=padding)
    assert huggingface(path).tokenize(TEXT) == huggingface(tokenizer_directory).tokenize(TEXT)
    assert len(huggingface(path).tokenize("the")) < 8


def test_vocab_size_is_the_largest_id_plus_one_even_with_a_hole(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    content = json.loads((tokenizer_directory / "tokenizer.json").read_text())
    model = content["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    model["vocab"][last] += 1000
    holed = huggingface(edited_directory(tokenizer_directory, tmp_path / "hole", model=model))
    assert holed.vocab_size == model["vocab"][last] + 1


def test_added_tokens_count_in_vocab_size(tokenizer_directory: Path, tmp_path: Path) -> None:
    plain = huggingface(tokenizer_directory)
    content = json.loads((tokenizer_directory / "tokenizer.json").read_text())
    extra = {**content["added_tokens"][0], "id": plain.vocab_size, "content": "<|extra|>"}
    added = [*content["added_tokens"], extra]
    path = edited_directory(tokenizer_directory, tmp_path / "added", added_tokens=added)
    assert huggingface(path).vocab_size == plain.vocab_size + 1
    assert huggingface(path).tokenize("a<|extra|>")[-1] == plain.vocab_size


def test_a_pad_token_of_its_own_is_kept_and_one_equal_to_eod_is_not(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    own = edited_directory(tokenizer_directory, tmp_path / "own", config_pad_token="!")
    same = edited_directory(tokenizer_directory, tmp_path / "same", config_pad_token="<|endoftext|>")
    assert huggingface(own).pad == huggingface(own).tokenize("!")[0]
    assert huggingface(same).pad == NO_PAD


def test_gpt2_files_give_the_same_tokenizer_as_the_directory(
    backend: Any, tokenizer_directory: Path, tmp_path: Path
) -> None:
    vocab_file, merge_file = save_gpt2_files(backend, tmp_path)
    gpt2 = build_tokenizer(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab_file, merge_file=merge_file)
    other = huggingface(tokenizer_directory)
    assert gpt2.tokenize(TEXT) == other.tokenize(TEXT)
    assert (gpt2.eod, gpt2.vocab_size, gpt2.fingerprint) == (other.eod, other.vocab_size, other.fingerprint)
    assert gpt2.detokenize(gpt2.tokenize(TEXT)) == TEXT


def test_megatrons_names_for_sentencepiece_give_the_same_ids_without_bos(sentencepiece_model: Path) -> None:
    tokenizers = [
        build_tokenizer(tokenizer_type=name, tokenizer_model=str(sentencepiece_model))
        for name in SENTENCEPIECE_TYPES
    ]
    ids = [tokenizer.tokenize("the lazy dog") for tokenizer in tokenizers]
    assert ids[0] == ids[1] == ids[2]
    assert tokenizers[0].detokenize(ids[0]) == "the lazy dog"
    assert (tokenizers[0].eod, tokenizers[0].pad) == (2, NO_PAD)
    assert 1 not in ids[0]  # bos


def test_sentencepiece_model_and_its_hugging_face_directory_have_one_fingerprint(
    sentencepiece_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    plain = build_tokenizer(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(sentencepiece_model))
    converted = huggingface(tmp_path)
    assert converted.fingerprint == plain.fingerprint
    assert converted.vocab_size == plain.vocab_size
    assert converted.eod == plain.eod


def test_null_tokenizer_reads_numbers_and_has_one_id_more_than_asked() -> None:
    tokenizer = build_tokenizer(tokenizer_type="NullTokenizer", vocab_size=100)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint) == (101, 100, None)
    assert tokenizer.tokenize("5 0 100") == [5, 0, 100]
    assert tokenizer.detokenize([5, 0]) == "5 0"
    for text in ("101", "-1", "five", ""):
        with pytest.raises(ValueError, match=r"token id|invalid literal"):
            tokenizer.tokenize(text)


def test_encoders_give_the_same_ids_after_a_trip_to_another_process(
    backend: Any, tokenizer_directory: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    split = edited_directory(tokenizer_directory, tmp_path / "split", config_split_special_tokens=True)
    vocab_file, merge_file = save_gpt2_files(backend, tmp_path)
    for tokenizer in (
        huggingface(tokenizer_directory),
        huggingface(split),
        build_tokenizer(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab_file, merge_file=merge_file),
        build_tokenizer(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(sentencepiece_model)),
    ):
        travelled = pickle.loads(pickle.dumps(tokenizer.batch_encoder()))
        assert travelled.encode([TEXT, "b"]).to_lists() == [tokenizer.tokenize(TEXT), tokenizer.tokenize("b")]
    assert 0 not in huggingface(split).tokenize(TEXT)  # the marker in the text is not an end of document here


def test_special_tokens_written_out_can_be_had_as_text(
    backend: Any, tokenizer_directory: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    vocab_file, merge_file = save_gpt2_files(backend, tmp_path)
    for flags in (with_model("HuggingFaceTokenizer", tokenizer_directory), gpt2(vocab_file, merge_file)):
        real, text = (build_tokenizer(**flags, encode_special_tokens=wanted) for wanted in (False, True))
        assert 0 in real.tokenize(TEXT)
        assert 0 not in text.tokenize(TEXT)
        assert text.detokenize(text.tokenize(TEXT)) == TEXT
        assert (text.eod, text.fingerprint) == (real.eod, real.fingerprint)
        travelled = pickle.loads(pickle.dumps(text.batch_encoder()))
        assert travelled.encode([TEXT]).to_lists() == [text.tokenize(TEXT)]
    flags = with_model("Llama2Tokenizer", sentencepiece_model)
    real, text = (build_tokenizer(**flags, encode_special_tokens=wanted) for wanted in (False, True))
    assert real.tokenize("a</s>") == text.tokenize("a</s>")
    assert real.eod not in real.tokenize("a</s>")


def test_a_tokenizer_written_in_python_cannot_take_special_tokens_as_text(
    tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(hf_directory, "load_auto_tokenizer", lambda name, **settings: slow)
    with pytest.raises(ConfigError, match="cannot be encoded as ordinary text"):
        build_tokenizer(**with_model("HuggingFaceTokenizer", tokenizer_directory), encode_special_tokens=True)


WITHOUT_TORCH = """
import os, sys
{first}
from megatron_let.data.tokenizers import build_tokenizer
tokenizer = build_tokenizer(
    tokenizer_type="HuggingFaceTokenizer", tokenizer_model={directory!r}, without_torch={without_torch}
)
print(tokenizer.tokenize({text!r}), tokenizer.fingerprint)
print("torch" in sys.modules, "TRANSFORMERS_NO_ADVISORY_WARNINGS" in os.environ)
from importlib.util import find_spec
print(find_spec("torch") is not None)
"""


@pytest.mark.parametrize(
    ("first", "without_torch", "has_torch"),
    [("", True, False), ("", False, True), ("import torch", True, True)],
)
def test_an_offline_tool_loads_the_same_tokenizer_without_torch(
    tokenizer_directory: Path, first: str, without_torch: bool, has_torch: bool
) -> None:
    script = WITHOUT_TORCH.format(
        first=first, directory=str(tokenizer_directory), without_torch=without_torch, text=TEXT
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    expected = huggingface(tokenizer_directory)
    assert result.stdout.splitlines() == [
        f"{expected.tokenize(TEXT)} {expected.fingerprint}",
        f"{has_torch} False",
        "True",  # torch can be imported again afterwards
    ]
    assert result.stderr == ""


def test_unique_identifiers_follow_the_vocabulary_and_not_its_path(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    moved = edited_directory(tokenizer_directory, tmp_path / "moved")
    other = edited_directory(tokenizer_directory, tmp_path / "other", config_eos_token="!")
    texts = [json.dumps(huggingface(path).unique_identifiers) for path in (tokenizer_directory, moved, other)]
    assert texts[0] == texts[1] != texts[2]
    assert huggingface(tokenizer_directory).fingerprint in texts[0]


def test_code_in_a_tokenizer_directory_is_never_run(tokenizer_directory: Path, tmp_path: Path) -> None:
    remote = edited_directory(
        tokenizer_directory,
        tmp_path / "remote",
        config_tokenizer_class="OwnTokenizer",
        config_auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    mark = tmp_path / "was_run"
    (remote / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    with pytest.raises(ConfigError, match="cannot load the tokenizer in"):
        huggingface(remote)
    assert not mark.exists()


def test_each_mistake_is_named_in_one_line(
    backend: Any, tokenizer_directory: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    no_eos = edited_directory(tokenizer_directory, tmp_path / "no_eos", config_eos_token=None)
    vocab_file, _ = save_gpt2_files(backend, tmp_path)
    Path(tmp_path / "no_end.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "no_merges.txt").write_text("#version: 0.2\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer_type": None}, "not one of"),
        ({"tokenizer_type": "TikTokenizer"}, "TikTokenizer is not one of HuggingFaceTokenizer, "),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, "needs --tokenizer-model"),
        (with_model("HuggingFaceTokenizer", "no/such"), "no/such is neither a directory nor"),
        (with_model("HuggingFaceTokenizer", tmp_path / "empty"), "no tokenizer in directory"),
        (with_model("HuggingFaceTokenizer", tmp_path / "broken"), "cannot load the tokenizer in"),
        (with_model("HuggingFaceTokenizer", no_eos), "has no eos token"),
        (with_model("HuggingFaceTokenizer", sentencepiece_model), "is a file: HuggingFaceTokenizer takes"),
        (with_model("Llama2Tokenizer", tokenizer_directory), "is not a file"),
        (
            with_model("Llama2Tokenizer", tokenizer_directory / "tokenizer.json"),
            "cannot load the SentencePiece",
        ),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": vocab_file}, "needs --merge-file"),
        (gpt2(vocab_file, tmp_path / "absent"), "absent does not exist"),
        (gpt2(vocab_file, vocab_file), "cannot read"),
        (gpt2(tmp_path / "no_end.json", tmp_path / "no_merges.txt"), "has no <|endoftext|>"),
        ({"tokenizer_type": "NullTokenizer"}, "needs --vocab-size"),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 0}, "needs --vocab-size"),
    ]
    for flags, message in cases:
        with pytest.raises(ConfigError) as caught:
            build_tokenizer(**flags)
        assert message in str(caught.value), flags
        assert "\n" not in str(caught.value)


def with_model(tokenizer_type: str, model: str | Path) -> dict[str, Any]:
    return {"tokenizer_type": tokenizer_type, "tokenizer_model": str(model)}


def gpt2(vocab_file: str | Path, merge_file: str | Path) -> dict[str, Any]:
    return {
        "tokenizer_type": "GPT2BPETokenizer",
        "vocab_file": str(vocab_file),
        "merge_file": str(merge_file),
    }
