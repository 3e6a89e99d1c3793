"""A plan's memory against jobs that run: tensor by tensor, and by what the system says their ranks take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_let.mcore import model
from megatron_let.mcore.transformer_config import build_transformer_config
from megatron_let.planning.plan import PlanSettings, RunPlan
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.plan import make_plan
from tests.training.running_job import held_by_process, held_by_tensors

LET = "let"

DISTRIBUTED = {"--use-distributed-optimizer": None}
TENSOR = {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}
PIPELINE = {"--pipeline-model-parallel-size": 2}
FULL = {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1}
GPT2 = {
    **{"--swiglu": False, "--normalization": "LayerNorm", "--disable-bias-linear": False},
    **{"--position-embedding-type": "learned_absolute", "--untie-embeddings-and-output-weights": False},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "pipeline, LET": (2, {**PIPELINE, LET: None}),
    "tensor, sequence, LET": (2, {**TENSOR, LET: None}),
    "distributed optimizer": (2, DISTRIBUTED),
    "full recompute": (1, FULL),
    "norms recomputed": (1, {"--recompute-granularity": "selective", "--recompute-modules": "layernorm"}),
    "virtual stages, LET": (2, {**PIPELINE, LET: None, "--num-virtual-stages-per-pipeline-rank": 2}),
    "tied, uneven": (2, {**PIPELINE, **GPT2, "--decoder-first-pipeline-num-layers": 1}),
    "embedding and loss counted": (
        2,
        {
            **{**PIPELINE, "--num-layers": 6},
            **{
                "--account-for-embedding-in-pipeline-split": None,
                "--account-for-loss-in-pipeline-split": None,
            },
        },
    ),
    "bf16, overlapped": (
        2,
        {**DISTRIBUTED, "--bf16": None, "--overlap-grad-reduce": None, "--overlap-param-gather": None},
    ),
    "bf16": (1, {"--bf16": None}),
}
MEASURED = ("plain", "pipeline, LET", "tensor, sequence, LET", "distributed optimizer", "full recompute")
SIZES = {
    "--hidden-size": 128,
    **{"--ffn-hidden-size": 344, "--seq-length": 64, "--micro-batch-size": 2, "--global-batch-size": 16},
    **{"--vocab-size": 250, "--make-vocab-size-divisible-by": 128},
}
LARGE = {
    **{"--hidden-size": 256, "--ffn-hidden-size": 688, "--num-layers": 4, "--seq-length": 256},
    **{"--micro-batch-size": 4, "--global-batch-size": 8, "--vocab-size": 16000},
}


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random teacher for the vocabulary and the sequences of the larger sizes."""
    import transformers

    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=16128, max_position_embeddings=256, **shape)
    directory = tmp_path_factory.mktemp("large_teacher")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def words(changes: dict[str, Any], sizes: dict[str, Any], teacher: Path) -> list[str]:
    flags = {**sizes, **changes, "--mock-data": None, "--distributed-backend": "gloo"}
    if LET in flags:
        del flags[LET]
        flags.update({"--let-teacher-load": teacher, "--let-stop-fraction": 1})
    return arguments(TINY_STUDENT, flags)


def plan_of(argv: list[str], world_size: int) -> RunPlan:
    return make_plan(parse_arguments(argv), PlanSettings(world_size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_counts_what_a_job_holds(layout: str, pool: RankPool, large_teacher: Path) -> None:
    world_size, changes = LAYOUTS[layout]
    argv = words(changes, SIZES, large_teacher)
    plan = plan_of(argv, world_size)
    for rank, held in enumerate(pool.run(world_size, held_by_tensors, argv)):
        stage = next(stage for stage in plan.stages if stage.ranks[0] <= rank <= stage.ranks[1])
        memory = stage.memory
        assert (stage.parameters, stage.whole_parameters) == (
            held.sizes.parameters,
            held.sizes.whole_parameters,
        )
        assert (memory.weights, memory.gradients) == (held.sizes.weights, held.sizes.gradients)
        # shards of the last data-parallel rank end with the weights, before the padding of the buckets
        assert memory.optimizer == pytest.approx(held.optimizer, rel=0.01)
        # tokens, losses and sums of the log are outside the plan, and of these sizes a part of a percent each
        assert memory.activations + memory.teacher_peak == pytest.approx(held.working, rel=0.03)


@pytest.fixture(scope="module")
def measured_pool() -> Iterator[RankPool]:
    """Return ranks that give memory back as soon as it is free: what they take is what is in use."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    with RankPool(2, environment=environment) as ranks:
        yield ranks


@pytest.mark.parametrize("layout", MEASURED)
def test_a_plan_is_within_a_tenth_of_the_measured_peak(
    layout: str, measured_pool: RankPool, large_teacher: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    small, large = (words(changes, sizes, large_teacher) for sizes in (SIZES, LARGE))
    # what libraries take on their first use is there after one run; some 12 MiB of theirs come and go with a large one
    measured_pool.run(world_size, held_by_process, small)
    plan = plan_of(large, world_size)
    for rank, measured in enumerate(measured_pool.run(world_size, held_by_process, large)):
        stage = next(stage for stage in plan.stages if stage.ranks[0] <= rank <= stage.ranks[1])
        assert stage.memory.before_stop == pytest.approx(measured, rel=0.1), layout


def test_a_plan_for_gpus_counts_the_outputs_that_virtual_stages_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recompute = {**FULL, "--bf16": None, "--num-virtual-stages-per-pipeline-rank": 2}
    argv = arguments(TINY_STUDENT, {**SIZES, **PIPELINE, **recompute, "--mock-data": None})
    kept = plan_of(argv, 2)

    def freeing(*args: Any, **values: Any) -> Any:
        config = build_transformer_config(*args, **values)
        config.deallocate_pipeline_outputs = True
        return config

    monkeypatch.setattr(model, "build_transformer_config", freeing)
    freed = plan_of(argv, 2)
    output = 2 * 64 * 128 * 2  # bytes: micro_batch_size, seq_length, hidden_size, bf16
    for stage, other in zip(kept.stages, freed.stages, strict=True):
        assert stage.memory.activations > other.memory.activations + output
