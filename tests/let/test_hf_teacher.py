"""The Hugging Face teacher against `output_hidden_states` of the full model, family by family."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_let.let import AlignmentTarget, Teacher, add_alignment_gradient, load_hf_teacher, segment_states
from megatron_let.testing.tiny_teachers import (
    CONTEXT,
    FAMILIES,
    NUM_LAYERS,
    VOCABULARY,
    WIDTH,
    write_tiny_teacher,
)


@pytest.fixture(scope="module", params=FAMILIES)
def model_on_disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, str]:
    """Return the full model, its directory and its family."""
    directory = tmp_path_factory.mktemp(request.param)
    return write_tiny_teacher(request.param, directory), directory, request.param


def load(directory: Path, layer: int | None = None, dtype: torch.dtype = torch.float32) -> Teacher:
    return load_hf_teacher(directory, layer=layer, dtype=dtype, device="cpu")


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


def block_outputs(model: Any, tokens: Tensor) -> list[Tensor]:
    """Return the raw output of each block of the full model, [layers], without relying on the library's collection."""
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == NUM_LAYERS)
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda b, i, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return outputs


def test_every_layer_equals_that_of_the_full_model(model_on_disk: tuple[Any, Path, str]) -> None:
    model, directory, family = model_on_disk
    tokens = random_tokens(3, CONTEXT)
    with torch.no_grad():
        collected = model(tokens, output_hidden_states=True).hidden_states
    raw = block_outputs(model, tokens)
    for layer in range(1, NUM_LAYERS):
        states = load(directory, layer).states(tokens)
        # 1e-6: the same fp32 operations on the same weights, states of size 1
        torch.testing.assert_close(states, raw[layer - 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(states, collected[layer], rtol=0, atol=1e-6)
    last = model.base_model(tokens).last_hidden_state
    for layer_or_none in (None, NUM_LAYERS):
        states = load(directory, layer_or_none).states(tokens)
        torch.testing.assert_close(states, last, rtol=0, atol=1e-6)
    if family != "opt-350m":  # its models end with a projection in place of a norm
        assert not torch.allclose(last, raw[-1], atol=1e-2), (
            "the final norm must make a difference to be tested"
        )


def test_teacher_says_what_it_is(model_on_disk: tuple[Any, Path, str]) -> None:
    _, directory, family = model_on_disk
    last, middle = load(directory), load(directory, 2)
    assert (last.vocab_size, last.context_length) == (VOCABULARY, CONTEXT)
    assert last.hidden_size == (16 if family == "opt-350m" else WIDTH)
    assert middle.hidden_size == WIDTH
    assert str(directory) in middle.description
    assert f"layer 2 of {NUM_LAYERS}" in middle.description
    assert f"layer {NUM_LAYERS} of {NUM_LAYERS}" in last.description


def test_layers_above_the_chosen_one_and_the_head_are_not_built(model_on_disk: tuple[Any, Path, str]) -> None:
    model, directory, _ = model_on_disk
    block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == NUM_LAYERS)[0]
    block_size = sum(parameter.numel() for parameter in block.parameters())
    sizes = [sum(p.numel() for p in load(directory, layer).parameters()) for layer in (1, 2, 3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == block_size
    assert sizes[2] == sum(parameter.numel() for parameter in model.base_model.parameters())


def test_teacher_is_frozen_and_takes_no_gradient(model_on_disk: tuple[Any, Path, str]) -> None:
    _, directory, _ = model_on_disk
    teacher, tokens = load(directory), random_tokens(2, 8)
    before = [parameter.clone() for parameter in teacher.parameters()]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    states = teacher.states(tokens)
    assert not states.requires_grad
    assert not states.is_inference(), "the loss must be able to save it for backward"
    hidden = torch.randn(8, 2, 40, requires_grad=True)
    target = AlignmentTarget(states.transpose(0, 1), torch.ones(8, 2), 1.0, lambda sums: None)
    add_alignment_gradient(hidden, target).sum().backward()
    assert hidden.grad is not None
    assert all(torch.equal(*pair) for pair in zip(before, teacher.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_dropout_is_off_and_a_second_call_gives_the_same(model_on_disk: tuple[Any, Path, str]) -> None:
    _, directory, _ = model_on_disk
    teacher, tokens = load(directory), random_tokens(2, 16)
    assert torch.equal(teacher.states(tokens), teacher.states(tokens))


def test_tokens_that_the_model_calls_padding_count_like_any_other(
    model_on_disk: tuple[Any, Path, str],
) -> None:
    model, directory, _ = model_on_disk
    tokens = random_tokens(2, 16)
    tokens[:, [0, 5, 15]] = 1  # the tiny models' pad id
    expected = model.base_model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    torch.testing.assert_close(
        load(directory).states(tokens), expected, rtol=0, atol=2e-6
    )  # fp32, states of size 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_come_in_the_teachers_dtype_whatever_autocast_says(
    model_on_disk: tuple[Any, Path, str], dtype: torch.dtype
) -> None:
    _, directory, _ = model_on_disk
    tokens = random_tokens(2, 16)
    teacher = load(directory, 2, dtype)
    states = teacher.states(tokens)
    assert {parameter.dtype for parameter in teacher.parameters()} == {dtype}
    assert states.dtype == dtype
    exact = load(directory, 2).states(tokens)
    # 6 %: two blocks with bfloat16's 8 bits, against the largest state
    assert float((states.float() - exact).abs().max()) < 0.06 * float(exact.abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(load(directory, 2).states(tokens), exact)


def test_right_padding_changes_nothing(model_on_disk: tuple[Any, Path, str]) -> None:
    _, directory, _ = model_on_disk
    for teacher in (load(directory), load(directory, 1)):
        tokens = random_tokens(1, 20)
        alone = teacher.states(tokens[:, :9])
        # 2e-6: attention over 9 or 20 keys, blocked differently, in fp32
        torch.testing.assert_close(teacher.states(tokens)[:, :9], alone, rtol=0, atol=2e-6)


def segments(starts: Tensor, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield (row, first column, end) of every segment."""
    for row in range(starts.shape[0]):
        begin = 0
        for column in range(1, starts.shape[1] + 1):
            if column == starts.shape[1] or bool(starts[row, column]) or column - begin == window:
                yield row, begin, column
                begin = column


def test_documents_and_windows_equal_one_segment_at_a_time(model_on_disk: tuple[Any, Path, str]) -> None:
    _, directory, _ = model_on_disk
    teacher = load(directory)
    tokens = random_tokens(3, 2 * CONTEXT + 9)  # longer than the positions, and no multiple
    starts = torch.rand(tokens.shape) < 0.1
    for document_starts in (None, starts):
        together = segment_states(teacher, tokens, document_starts)
        cuts = torch.zeros_like(starts) if document_starts is None else starts
        for row, begin, end in segments(cuts, CONTEXT):
            alone = teacher.states(tokens[row : row + 1, begin:end])[0]
            # 5e-6: batches of another shape, fp32, states of size 1 to 3
            torch.testing.assert_close(together[row, begin:end], alone, rtol=0, atol=5e-6)


def test_sdpa_is_used_nothing_is_cached_and_no_token_is_looked_at(
    model_on_disk: tuple[Any, Path, str],
) -> None:
    _, directory, _ = model_on_disk
    teacher = load(directory)
    body = teacher._body  # type: ignore[attr-defined]
    assert body.config._attn_implementation == "sdpa"
    assert body.config.pad_token_id is None, (
        "GPT-2 would search every batch for it, a wait for the device each time"
    )
    assert body(input_ids=random_tokens(1, 4), use_cache=False).past_key_values is None


def test_memory_is_free_when_the_last_reference_goes(model_on_disk: tuple[Any, Path, str]) -> None:
    _, directory, _ = model_on_disk
    teacher = load(directory, 2)
    weight = weakref.ref(next(iter(teacher.parameters())))
    gc.disable()
    try:
        del teacher
        assert weight() is None, "a reference cycle would keep the weights until the next collection"
    finally:
        gc.enable()
