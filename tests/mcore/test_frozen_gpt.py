"""A Megatron checkpoint as teacher: written on any layout, read whole by single ranks, against Hugging Face."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_let.config.derive import resolve
from megatron_let.errors import ConfigError
from megatron_let.mcore.frozen_gpt import load_frozen_gpt
from megatron_let.mcore.parallel import ParallelContext, parallel_context
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.hf_students import STUDENTS, build_twin
from megatron_let.testing.one_iteration import run_one_iteration, write_spread_checkpoint
from megatron_let.testing.training import TINY_STUDENT, arguments, train
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.megatron_teacher import check_megatron_teacher, load_megatron_teacher

VOCABULARY, NUM_LAYERS = 61, 4
LAYERS: tuple[int | None, ...] = (1, 2, 3, 4, None)
# fp32, two implementations of the same four layers: some hundred roundings of 6e-8 relative to values of about 1.
STATES = 2e-5

PP2 = {"--pipeline-model-parallel-size": 2}
TP2 = {"--tensor-model-parallel-size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-process": (1, {}),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2-vp2": (2, {**PP2, "--num-layers-per-virtual-pipeline-stage": 1}),
    "tp2-pp2-sp": (4, {**TP2, **PP2, "--sequence-parallel": None}),
    "dp2-distributed-optimizer": (2, {"--use-distributed-optimizer": None}),
}


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of spread weights after one training step on a layout, each written once."""

    pool: RankPool
    root: Path
    written: dict[str, Path] = field(default_factory=dict)

    def base(self, family: str) -> dict[str, Any]:
        """Return the flags of a one-process run of the family on mock data."""
        batches = {"--micro-batch-size": 2, "--global-batch-size": 4, "--train-iters": False}
        return {**TINY_STUDENT, **STUDENTS[family].flags, **batches, "--mock-data": None}

    def written_on(self, family: str, layout: str) -> Path:
        """Return the save directory."""
        start, directory = self.root / family, self.root / f"{family}-{layout}"
        if not start.exists():
            self.pool.run(1, write_spread_checkpoint, arguments(self.base(family)), start)
        if not directory.exists():
            world_size, flags = LAYOUTS[layout]
            run = {"--load": start, "--finetune": None, "--save": directory, "--train-iters": 1}
            self.pool.run(world_size, train, arguments(self.base(family), {**run, **flags}))
        return directory

    def expected_states(self, family: str, directory: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return the twin's states of LAYERS for the weights in `directory`."""
        words = arguments(self.base(family), {"--load": directory, "--finetune": None})
        twin = build_twin(
            STUDENTS[family], self.pool.run(1, run_one_iteration, words)[0].weights, vocab_size=VOCABULARY
        )
        with torch.no_grad():
            outputs = twin.model.base_model(tokens, output_hidden_states=True)
        last = outputs.last_hidden_state
        return [last if layer in (NUM_LAYERS, None) else outputs.hidden_states[layer] for layer in LAYERS]


@pytest.fixture(scope="module")
def checkpoints(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Return the maker of checkpoints."""
    return Checkpoints(pool, tmp_path_factory.mktemp("checkpoints"))


def read_states(
    argv: Sequence[str], directory: Path, tokens: torch.Tensor, stage: int
) -> list[torch.Tensor] | None:
    """On the ranks of pipeline stage `stage` load the teacher and return its states of LAYERS."""
    config = resolve(parse_arguments(list(argv)), int(os.environ["WORLD_SIZE"]))
    with parallel_context(config) as context:
        if context.pp_rank != stage:
            return None
        return [teacher_of(directory, layer, context).states(tokens) for layer in LAYERS]


def teacher_of(directory: Path, layer: int | None, context: ParallelContext) -> Any:
    """Load a teacher in fp32."""
    return load_megatron_teacher(directory, layer=layer, dtype=torch.float32, context=context)


def some_tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(3))


def assert_states(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for layer, ours, theirs in zip(LAYERS, actual, expected, strict=True):
        assert ours.shape == theirs.shape
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error <= STATES, (layer, error)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layer_of_a_checkpoint_of_any_layout_is_read_whole(
    family: str, layout: str, checkpoints: Checkpoints, pool: RankPool
) -> None:
    directory, tokens = checkpoints.written_on(family, layout), some_tokens()
    words = arguments(checkpoints.base(family), {"--train-iters": 1})
    (states,) = pool.run(1, read_states, words, directory, tokens, 0)
    assert states is not None
    assert_states(states, checkpoints.expected_states(family, directory, tokens))


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_the_ranks_of_one_stage_read_it_while_the_others_do_not(
    family: str, checkpoints: Checkpoints, pool: RankPool
) -> None:
    """Nothing in the loader may wait for the ranks of another stage."""
    directory, tokens = checkpoints.written_on(family, "tp2"), some_tokens()
    words = arguments(checkpoints.base(family), {"--train-iters": 1, **TP2, **PP2})
    states = pool.run(4, read_states, words, directory, tokens, 1)
    expected = checkpoints.expected_states(family, directory, tokens)
    readers = [mine for mine in states if mine is not None]
    assert len(readers) == 2
    for mine in readers:
        assert_states(mine, expected)


def test_layers_above_the_wanted_one_and_the_head_are_not_built(
    checkpoints: Checkpoints, one_process: ParallelContext
) -> None:
    directory = checkpoints.written_on("llama", "one-process")
    middle, last = (teacher_of(directory, layer, one_process) for layer in (2, None))
    names = [[name for name, _ in teacher._gpt.model.named_parameters()] for teacher in (middle, last)]
    assert not any("layers.2." in name for name in names[0])
    assert any("layers.3." in name for name in names[1])
    assert not any("output_layer" in name for both in names for name in both)
    assert not any(parameter.requires_grad for parameter in last.parameters())
    assert (last.vocab_size, last.hidden_size, last.context_length) == (VOCABULARY, 48, 32)
    assert str(directory) in last.description
    assert last.to("cpu") is last
    assert not last.states(some_tokens()).requires_grad


def test_a_teacher_may_compute_in_bf16(checkpoints: Checkpoints, one_process: ParallelContext) -> None:
    directory, tokens = checkpoints.written_on("llama", "one-process"), some_tokens()
    teacher = load_megatron_teacher(directory, layer=None, dtype=torch.bfloat16, context=one_process)
    states, expected = teacher.states(tokens), teacher_of(directory, None, one_process).states(tokens)
    assert states.dtype is torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(states.float(), expected, dim=-1)
    assert cosine.min() > 0.999  # bf16 keeps 8 bits: 0.4 % a rounding, a few dozen of them


@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_outside_the_teacher_is_the_users_mistake(
    layer: int, checkpoints: Checkpoints, one_process: ParallelContext
) -> None:
    with pytest.raises(ConfigError, match=f"--let-teacher-layer {layer}: .* has layers 1 to 4"):
        teacher_of(checkpoints.written_on("llama", "one-process"), layer, one_process)


def test_a_damaged_checkpoint_is_no_teacher(
    checkpoints: Checkpoints, one_process: ParallelContext, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints.written_on("llama", "one-process"), copy)
    victim = max((copy / "iter_0000001").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"is damaged: {victim.name} has \d+ bytes instead of \d+"):
        teacher_of(copy, None, one_process)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        teacher_of(tmp_path, None, one_process)


def test_a_checkpoint_of_another_program_is_no_teacher(
    checkpoints: Checkpoints, one_process: ParallelContext, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints.written_on("llama", "one-process"), copy)
    directory = copy / "iter_0000001"
    torch.save({"iteration": 1}, directory / "common.pt")
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["files"]["common.pt"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="was not written by megatron_let"):
        teacher_of(copy, None, one_process)


def test_settings_of_the_teachers_own_training_do_not_bind_the_teacher(
    checkpoints: Checkpoints, one_process: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was trained on other machines: with kernels, overlap and an attention backend that are not here."""
    directory, tokens = checkpoints.written_on("llama", "one-process"), some_tokens()
    expected = teacher_of(directory, None, one_process).states(tokens)
    _, run = check_megatron_teacher(directory, layer=None)
    run["config"]["transformer"].update(
        fp8="hybrid",
        fp8_param=True,
        first_last_layers_bf16=True,
        overlap_p2p_comm_warmup_flush=True,
        gradient_accumulation_fusion=True,
        masked_softmax_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=True,
        persist_layer_norm=True,
        attention_backend="fused",
    )
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")  # what a student with --attention-backend flash has left
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    frozen = load_frozen_gpt(
        directory / "iter_0000001", run["config"], layer=None, dtype=torch.float32, device=torch.device("cpu")
    )
    assert torch.equal(frozen.states(tokens), expected)
    assert (os.environ["NVTE_FLASH_ATTN"], os.environ["NVTE_FUSED_ATTN"]) == ("1", "0")
