"""The 7B recipe on 32 ranks: planned in a minute, with the parameters that the program builds on every one of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_let.config.derive import resolve
from megatron_let.mcore.meta_rank import meta_rank, plain_layers
from megatron_let.mcore.model import build_student
from megatron_let.planning.plan import RunPlan
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.plan import ANYWHERE, PlanSettings, make_plan

ROOT = Path(__file__).parents[2]
WORLD_SIZE, TENSOR, PIPELINE = 32, 4, 4
LAYERS, WIDTH, FFN, VOCABULARY = 32, 4096, 11008, 32000
PADDED = 32256  # to a multiple of 128 x tensor
PUBLISHED = 6_738_415_616  # LLaMA-7B, arXiv 2302.13971, vocabulary 32,000
# NullTokenizer makes one id more
RECIPE = ["--config", "docs/scaling/7b.yaml", "--vocab-size", str(VOCABULARY - 1)]


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    """Return the plan, having checked that it takes less than a minute of a core; loading the libraries takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipe names its teacher from here
        config = parse_arguments(RECIPE)
        begun = time.process_time()
        plan = make_plan(config, PlanSettings(WORLD_SIZE))
    assert time.process_time() - begun < 45
    return plan


def test_every_rank_is_built_with_the_parameters_of_the_plan(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = plain_layers(resolve(parse_arguments(RECIPE), WORLD_SIZE, ANYWHERE))
    replicas: dict[int, int] = {}
    for rank in range(WORLD_SIZE):
        with meta_rank(config, rank=rank, world_size=WORLD_SIZE, is_on_gpu=True) as context:
            student = build_student(config, context, vocab_size=VOCABULARY, padded_vocab_size=PADDED)
            named = [item for chunk in student.gpt_chunks for item in chunk.named_parameters()]
            assert all(parameter.is_meta for _, parameter in named)
            built = sum(parameter.numel() for _, parameter in named)
            # norms are on every tensor-parallel rank, all else is cut
            own = sum(p.numel() for name, p in named if context.tp_rank == 0 or "norm" not in name)
            replicas[context.dp_rank] = replicas.get(context.dp_rank, 0) + own
            stage = plan.stages[context.pp_rank]
        assert stage.ranks[0] <= rank <= stage.ranks[1]
        assert built == stage.parameters, f"rank {rank}"
    padding = 2 * (PADDED - VOCABULARY) * WIDTH
    assert replicas == dict.fromkeys(range(2), PUBLISHED + padding)
    assert plan.parameters == PUBLISHED + padding


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
