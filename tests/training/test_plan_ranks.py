"""7B on 32 ranks: planned in a minute, with the parameters that the program builds on every one of them."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_let.config.batches import padded_vocab_size
from megatron_let.config.derive import resolve
from megatron_let.mcore.meta_rank import meta_rank, plain_layers
from megatron_let.mcore.model import build_student
from megatron_let.planning.plan import PlanSettings, RunPlan
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.plan import ANYWHERE, make_plan
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]
WORLD_SIZE, TENSOR, PIPELINE = 32, 4, 4
LAYERS, WIDTH, FFN, VOCABULARY, TEACHER_IDS = 32, 4096, 11008, 32000, 128256
PADDED = 32256  # to a multiple of 128 x tensor
PUBLISHED = 6_738_415_616  # LLaMA-7B, arXiv 2302.13971, vocabulary 32,000
# A pipeline of four stages, deeper than the recipe's. NullTokenizer makes one id more.
DEEP = ["--config", "docs/scaling/7b.yaml", "--vocab-size", str(VOCABULARY - 1)]


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    """Return the plan of the deep pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the file names its teacher from here
        return make_plan(parse_arguments(DEEP), PlanSettings(WORLD_SIZE))


class Built(NamedTuple):
    """The model that a rank builds."""

    stage: int
    replica: int
    parameters: int
    own: int
    """Parameters that no tensor-parallel rank before this one has."""


def build_every_rank(argv: list[str], vocab_size: int) -> list[Built]:
    """Build the model of every rank on the meta device."""
    config = plain_layers(resolve(parse_arguments(argv), WORLD_SIZE, ANYWHERE), is_on_gpu=True)
    built = []
    for rank in range(WORLD_SIZE):
        with meta_rank(config, rank=rank, world_size=WORLD_SIZE, is_on_gpu=True) as context:
            padded = padded_vocab_size(vocab_size, 128, context.tp_size)
            student = build_student(config, context, vocab_size=vocab_size, padded_vocab_size=padded)
            named = [item for chunk in student.gpt_chunks for item in chunk.named_parameters()]
            assert all(parameter.is_meta for _, parameter in named)
            # norms are on every tensor-parallel rank, all else is cut
            own = sum(p.numel() for name, p in named if context.tp_rank == 0 or "norm" not in name)
            built.append(Built(context.pp_rank, context.dp_rank, sum(p.numel() for _, p in named), own))
    return built


def test_every_rank_is_built_with_the_parameters_of_the_plan(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    replicas: dict[int, int] = {}
    for rank, built in enumerate(build_every_rank(DEEP, VOCABULARY)):
        stage = plan.stages[built.stage]
        assert stage.ranks[0] <= rank <= stage.ranks[1]
        assert built.parameters == stage.parameters, f"rank {rank}"
        replicas[built.replica] = replicas.get(built.replica, 0) + built.own
    padding = 2 * (PADDED - VOCABULARY) * WIDTH
    assert replicas == dict.fromkeys(range(2), PUBLISHED + padding)
    assert plan.parameters == PUBLISHED + padding


def test_the_recipe_is_planned_in_a_minute_with_what_every_rank_builds(tmp_path: Path) -> None:
    def recipe(**variables: str) -> str:
        teacher = {"TEACHER": "docs/scaling/teacher-1b", "DATA": "data/pile", "SAVE": str(tmp_path / "run")}
        environment = {**os.environ, "PYTHON": sys.executable, **teacher, **variables}
        return subprocess.run(
            ["bash", "scripts/pretrain_let_7b.sh", "--vocab-size", str(TEACHER_IDS), "--json", str(written)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=HANG_SECONDS,
            check=True,
        ).stdout

    written = tmp_path / "plan.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = recipe(PLAN="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60  # of one core
    assert printed.startswith("32 ranks: tensor 2, context 1, pipeline 1")
    plan = json.loads(written.read_text())
    (stage,) = plan["stages"]
    flags = shlex.split(recipe(DRY_RUN="1", LAUNCHER="srun"))[2:-2]  # --json is the plan's own
    built = build_every_rank(flags, TEACHER_IDS)
    assert [rank.parameters for rank in built] == [stage["parameters"]] * WORLD_SIZE
    layers = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN + 2 * WIDTH) + WIDTH
    assert plan["parameters"] == layers + 2 * TEACHER_IDS * WIDTH
    assert sum(rank.own for rank in built if rank.replica == 0) == plan["parameters"]
    assert stage["memory"]["before_stop"] < 70 * 2**30, "the recipe is for GPUs of 80 GB"
    assert not any("GiB" in warning for warning in plan["warnings"])
    assert not (tmp_path / "run").exists()


def test_shapes_by_hand_give_the_same(plan: RunPlan) -> None:
    layer = (4 * WIDTH * WIDTH + 3 * WIDTH * FFN) // TENSOR + 2 * WIDTH
    ends = PADDED * WIDTH // TENSOR
    expected = [8 * layer + ends, 8 * layer, 8 * layer, 8 * layer + ends + WIDTH]
    assert [stage.parameters for stage in plan.stages] == expected
    memory = plan.stages[1].memory
    # bf16 weights; fp32 gradients; fp32 weights and two moments over two data-parallel ranks
    assert (memory.weights, memory.gradients) == (2 * 8 * layer, 4 * 8 * layer)
    assert memory.optimizer == pytest.approx(12 * 8 * layer / 2, rel=1e-3)


def test_activations_are_what_the_paper_s_way_of_counting_gives(plan: RunPlan) -> None:
    """Korthikanti et al., arXiv 2205.05198, section 4, counted again for SwiGLU, no dropout and fused attention."""
    tokens = 2 * 2048
    # In bf16, sharded over the tensor-parallel ranks: two norms' inputs, two linear inputs (gathered anew in backward),
    # queries, keys, values as projected and as turned, the attention's result; gate and up, their product.
    layer = 2 * tokens * (WIDTH * (2 + 2 + 3 + 2 + 1) + 3 * FFN) / TENSOR
    in_flight = [4, 3, 2, 1]
    for stage, passes in list(zip(plan.stages, in_flight, strict=True))[:3]:
        kept = 8 * layer * passes
        assert stage.memory.activations == pytest.approx(kept, rel=0.1)
