"""A teacher with bos first gives exactly what a plain forward of [bos] + tokens gives, less the bos's own state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_let.errors import ConfigError
from megatron_let.let import BosTeacher, load_hf_teacher, segment_states, with_bos
from megatron_let.testing.tiny_teachers import write_tiny_teacher

BOS = 3


@pytest.fixture(scope="module", params=["llama", "opt"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a teacher with rotary and one with learned positions: both count from the bos on."""
    path = tmp_path_factory.mktemp("teacher")
    write_tiny_teacher(request.param, path)
    return path


@pytest.fixture
def teacher(directory: Path) -> BosTeacher:
    inner = load_hf_teacher(directory, layer=None, dtype=torch.float32, device="cpu")
    return BosTeacher(inner, BOS)


def _plain(directory: Path, tokens: Tensor) -> Tensor:
    """Return transformers' own states of one row [l] behind the bos, as somebody would write it down."""
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        ids = torch.cat([torch.tensor([BOS]), tokens])[None]
        return model(input_ids=ids, use_cache=False).last_hidden_state[0, 1:]


def _rows(teacher: BosTeacher, num_rows: int, length: int) -> Tensor:
    return torch.randint(0, teacher.vocab_size, (num_rows, length))


def test_each_row_begins_with_bos(teacher: BosTeacher, directory: Path) -> None:
    tokens = _rows(teacher, 1, 12)
    states = segment_states(teacher, tokens)
    assert torch.equal(states[0], _plain(directory, tokens[0]))
    assert states.is_contiguous()
    inner = load_hf_teacher(directory, layer=None, dtype=torch.float32, device="cpu")
    assert not torch.equal(segment_states(inner, tokens), states)


def test_each_document_begins_with_bos_where_documents_are_kept_apart(
    teacher: BosTeacher, directory: Path
) -> None:
    tokens = _rows(teacher, 2, 20)
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[0, [5, 6]] = True
    starts[1, 11] = True
    states = segment_states(teacher, tokens, starts)
    for row, begin, end in ((0, 0, 5), (0, 5, 6), (0, 6, 20), (1, 0, 11), (1, 11, 20)):
        # 5e-6: batches of another shape, fp32, states of size 1 to 3
        expected = _plain(directory, tokens[row, begin:end])
        torch.testing.assert_close(states[row, begin:end], expected, rtol=0, atol=5e-6)


def test_a_window_is_one_token_shorter_and_begins_with_bos(teacher: BosTeacher, directory: Path) -> None:
    limit = teacher._inner.context_length
    assert limit is not None
    assert teacher.context_length == limit - 1
    tokens = _rows(teacher, 1, 2 * (limit - 1) + 4)
    states = segment_states(teacher, tokens)
    for begin in range(0, tokens.shape[1], limit - 1):
        expected = _plain(directory, tokens[0, begin : begin + limit - 1])
        torch.testing.assert_close(states[0, begin : begin + limit - 1], expected, rtol=0, atol=5e-6)


def test_without_a_bos_the_teacher_is_itself(teacher: BosTeacher) -> None:
    assert with_bos(teacher._inner, None) is teacher._inner
    assert with_bos(teacher._inner, BOS).description.endswith(f", bos {BOS} first")


def test_an_id_that_the_teacher_does_not_know_is_refused(teacher: BosTeacher) -> None:
    with pytest.raises(ConfigError, match=r"its tokenizer's bos is 9999: .* or --let-teacher-bos off"):
        BosTeacher(teacher._inner, 9999)


def test_the_lm_head_is_that_of_the_teacher_behind_the_bos(teacher: BosTeacher) -> None:
    head = teacher.take_lm_head()
    assert head is not None
    logits = head(torch.randn(1, 2, teacher.hidden_size), torch.zeros(1, 2, dtype=torch.long))
    assert logits.shape == (1, 2, teacher.vocab_size)
    assert teacher.take_lm_head() is None
