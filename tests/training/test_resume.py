"""Save and resume: bitwise the uninterrupted run on the same layout, the same losses on another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_let.errors import EXIT_DONE, EXIT_PREEMPTED
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    assert_bitwise,
    largest_difference,
    metrics_rows,
    model_tensors,
    numbers,
    refusal,
    train,
    training_rows,
)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2-distributed-optimizer": (2, {"--use-distributed-optimizer": None}),
    "dp2-buckets": (
        2,
        {"--use-distributed-optimizer": None, "--overlap-grad-reduce": None, "--ddp-bucket-size": 10_000},
    ),
    "tp2-sp": (2, {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}),
    "pp2-vp2": (2, {"--pipeline-model-parallel-size": 2, "--num-layers-per-virtual-pipeline-stage": 1}),
    "fp16": (1, {"--fp16": None, "--initial-loss-scale": 4096}),
    "bf16-distributed-optimizer": (2, {"--bf16": None, "--use-distributed-optimizer": None}),
}


@pytest.fixture
def base(token_files: Path, teacher: Path) -> dict[str, Any]:
    """Return LET settings with S_stop at 3 of 5 iterations and dropout, so that random states matter."""
    return {
        "--data-path": token_files,
        "--let-teacher-load": teacher,
        "--let-weight": 1.0,
        "--let-stop-iters": 3,
        "--hidden-dropout": 0.1,
    }


@pytest.mark.parametrize("cut", [2, 3, 4], ids=lambda cut: f"cut-at-{cut}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    layout: str, cut: int, base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    if cut != 2 and layout not in ("one", "tp2-sp", "pp2-vp2"):
        pytest.skip("cuts at and after S_stop are run on three layouts")
    world_size, flags = LAYOUTS[layout]
    assert_resumes_bitwise(pool, world_size, {**base, **flags}, cut, tmp_path)


def assert_resumes_bitwise(
    pool: RankPool, world_size: int, words: dict[str, Any], cut: int, directory: Path
) -> None:
    """Assert that a run cut after iteration `cut` and resumed is, bit for bit, the uninterrupted one."""
    pool.run(world_size, train, arguments(TINY_STUDENT, {**words, "--save": directory / "whole"}))
    own = {**words, "--save": directory / "cut", "--load": directory / "cut"}
    codes = pool.run(world_size, train, arguments(TINY_STUDENT, {**own, "--exit-interval": cut}))
    assert set(codes) == {EXIT_PREEMPTED}
    codes = pool.run(world_size, train, arguments(TINY_STUDENT, own))
    assert set(codes) == {EXIT_DONE}
    assert numbers(directory / "whole") == numbers(directory / "cut")
    assert_bitwise(directory / "whole", directory / "cut", 5)


def test_a_run_with_a_megatron_teacher_resumes_bitwise(
    base: dict[str, Any], megatron_teacher: Path, pool: RankPool, tmp_path: Path
) -> None:
    words = {**base, "--let-teacher-load": megatron_teacher, "--attention-dropout": 0.1}
    assert_resumes_bitwise(pool, 1, words, 2, tmp_path)


RESHARDED = {
    "tp2-to-one": ("tp2-sp", "one"),
    "one-to-tp2": ("one", "tp2-sp"),
    "one-to-pp2-vp2": ("one", "pp2-vp2"),
    "pp2-vp2-to-tp2": ("pp2-vp2", "tp2-sp"),
}


@pytest.mark.parametrize("change", RESHARDED)
def test_a_run_resumes_on_another_layout(
    change: str, base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    before, after = RESHARDED[change]
    base = {**base, "--hidden-dropout": 0}  # random states do not carry over to another layout
    pool.run(1, train, arguments(TINY_STUDENT, {**base, "--save": tmp_path / "whole"}))
    own = {**base, "--save": tmp_path / "cut", "--load": tmp_path / "cut"}
    for name, extra in ((before, {"--exit-interval": 2}), (after, {})):
        world_size, flags = LAYOUTS[name]
        pool.run(world_size, train, arguments(TINY_STUDENT, {**own, **flags, **extra}))
    if before == "one":  # other layouts start from other weights: padding and pipeline stages move the seeds
        expected = [row["lm_loss"] for row in training_rows(tmp_path / "whole")]
        actual = [row["lm_loss"] for row in training_rows(tmp_path / "cut")]
        assert actual == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order
    stay = {**base, "--save": tmp_path / "stay", "--load": tmp_path / "cut", "--ckpt-step": 2}
    world_size, flags = LAYOUTS[before]
    pool.run(world_size, train, arguments(TINY_STUDENT, {**stay, **flags}))
    weights = [model_tensors(tmp_path / name / "iter_0000005") for name in ("stay", "cut")]
    assert largest_difference(*weights) <= 2e-5  # Adam amplifies roundings of near-zero gradients


@pytest.mark.parametrize("bucket_size", [False, 10_000], ids=["one bucket", "buckets"])
def test_distributed_optimizer_state_moves_between_layouts(
    bucket_size: int, base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    base = {**base, "--hidden-dropout": 0, "--use-distributed-optimizer": None, "--overlap-grad-reduce": None}
    base["--ddp-bucket-size"] = bucket_size
    pool.run(2, train, arguments(TINY_STUDENT, {**base, "--save": tmp_path / "whole"}))
    own = {**base, "--save": tmp_path / "cut", "--load": tmp_path / "cut"}
    pool.run(2, train, arguments(TINY_STUDENT, {**own, "--exit-interval": 2}))
    tp2pp2 = {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}
    pool.run(4, train, arguments(TINY_STUDENT, {**own, **tp2pp2}))
    weights = [model_tensors(tmp_path / name / "iter_0000005") for name in ("whole", "cut")]
    assert largest_difference(*weights) <= 2e-5  # Adam amplifies roundings of near-zero gradients


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "weight": ({"--let-weight": 0.5}, "weight is 0.5 but the checkpoint was trained with 1.0"),
    "layer": ({"--let-student-layer": 3}, "student layer is 3"),
    "stop": ({"--let-stop-iters": 4}, "stop iteration is 4"),
    "teacher layer": ({"--let-teacher-layer": 1}, "teacher layer is 1"),
    "teacher dtype": ({"--let-teacher-dtype": "bf16"}, "teacher dtype is bfloat16"),
    "no teacher": (
        {"--let-teacher-load": False, "--let-weight": False, "--let-stop-iters": False},
        "was trained with a LET teacher",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_let_settings_are_refused_on_resume_unless_overridden(
    change: str, base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    flags, message = CHANGES[change]
    own = {**base, "--save": tmp_path / "run", "--load": tmp_path / "run"}
    pool.run(1, train, arguments(TINY_STUDENT, {**own, "--exit-interval": 1}))
    (refused,) = pool.run(1, refusal, arguments(TINY_STUDENT, {**own, **flags}))
    assert refused is not None
    assert message in refused
    pool.run(1, train, arguments(TINY_STUDENT, {**own, **flags, "--let-override": None}))


def test_a_finished_run_started_again_leaves_its_rows_as_they_are(
    base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    own = {**base, "--save": tmp_path, "--load": tmp_path, "--eval-iters": 1, "--eval-interval": 2}
    words = arguments(TINY_STUDENT, {**own, "--split": "900,100,0"})
    pool.run(1, train, words)
    before = metrics_rows(tmp_path)
    assert [row["iteration"] for row in before if "validation_lm_loss" in row] == [2, 4, 5]
    pool.run(1, train, words)
    assert metrics_rows(tmp_path) == before


def test_another_teacher_is_refused_on_resume(
    base: dict[str, Any], teacher: Path, pool: RankPool, tmp_path: Path
) -> None:
    from megatron_let.testing.tiny_teachers import write_tiny_teacher

    own = {**base, "--save": tmp_path / "run", "--load": tmp_path / "run"}
    pool.run(1, train, arguments(TINY_STUDENT, {**own, "--exit-interval": 1}))
    write_tiny_teacher("llama-untied", tmp_path / "other")
    (refused,) = pool.run(
        1, refusal, arguments(TINY_STUDENT, {**own, "--let-teacher-load": tmp_path / "other"})
    )
    assert refused is not None
    assert "teacher identity" in refused
    shutil.copytree(teacher, tmp_path / "moved")
    pool.run(1, train, arguments(TINY_STUDENT, {**own, "--let-teacher-load": tmp_path / "moved"}))


def test_a_resume_after_stop_works_with_the_teacher_gone(
    base: dict[str, Any], teacher: Path, pool: RankPool, tmp_path: Path
) -> None:
    gone = tmp_path / "teacher"
    shutil.copytree(teacher, gone)
    base = {**base, "--let-teacher-load": gone}
    pool.run(1, train, arguments(TINY_STUDENT, {**base, "--save": tmp_path / "whole"}))
    own = {**base, "--save": tmp_path / "run", "--load": tmp_path / "run"}
    pool.run(1, train, arguments(TINY_STUDENT, {**own, "--exit-interval": 3}))
    shutil.rmtree(gone)
    assert pool.run(1, train, arguments(TINY_STUDENT, own)) == [EXIT_DONE]
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "run")
    assert_bitwise(tmp_path / "whole", tmp_path / "run", 5)


def test_a_run_can_be_made_longer(base: dict[str, Any], pool: RankPool, tmp_path: Path) -> None:
    base = {**base, "--let-stop-iters": False, "--let-stop-fraction": 0.6, "--save": tmp_path / "run"}
    pool.run(1, train, arguments(TINY_STUDENT, base))
    longer = {**base, "--load": tmp_path / "run", "--train-iters": 8}
    pool.run(1, train, arguments(TINY_STUDENT, longer))
    rows = training_rows(tmp_path / "run")
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert rows[-1]["learning_rate"] == rows[4]["learning_rate"]  # the decay ended where it was planned to
    # S_stop stays the absolute iteration the fraction meant when the run began: 0.6 of 5
    assert [row["let_weight"] for row in rows] == pytest.approx([1.0, 2 / 3, 1 / 3] + [None] * 5)


def test_finetune_takes_the_weights_and_counts_from_zero(
    base: dict[str, Any], start: Path, pool: RankPool, tmp_path: Path
) -> None:
    words = {**base, "--load": start, "--finetune": None, "--save": tmp_path / "run", "--lr": 1e-12}
    pool.run(1, train, arguments(TINY_STUDENT, words))
    assert training_rows(tmp_path / "run")[0]["consumed_samples"] == 8
    weights = [
        model_tensors(directory) for directory in (start / "iter_0000002", tmp_path / "run" / "iter_0000005")
    ]
    assert largest_difference(*weights) < 1e-9


def test_weights_that_are_loaded_need_not_be_drawn(
    base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    world_size, layout = LAYOUTS["tp2-sp"]
    first, drawn, loaded = (tmp_path / name for name in ("first", "drawn", "loaded"))
    pool.run(
        world_size, train, arguments(TINY_STUDENT, {**base, **layout, "--save": first, "--exit-interval": 1})
    )
    # clipped, so that a wrong norm would show in the weights
    flags = {**base, **layout, "--load": first, "--clip-grad": 0.1}
    pool.run(world_size, train, arguments(TINY_STUDENT, {**flags, "--save": drawn}))
    pool.run(
        world_size, train, arguments(TINY_STUDENT, {**flags, "--save": loaded, "--no-initialization": None})
    )
    assert numbers(loaded) == numbers(drawn)
    assert_bitwise(loaded, drawn, 5)


def test_no_load_optim_starts_the_optimizer_afresh(
    base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    own = {**base, "--save": tmp_path / "run", "--load": tmp_path / "run", "--hidden-dropout": 0}
    pool.run(1, train, arguments(TINY_STUDENT, {**own, "--exit-interval": 3}))
    with_state = {**own, "--save": tmp_path / "with"}
    without = {**own, "--save": tmp_path / "without", "--no-load-optim": None, "--no-load-rng": None}
    for words in (with_state, without):
        pool.run(1, train, arguments(TINY_STUDENT, words))
    left, right = (training_rows(tmp_path / name) for name in ("with", "without"))
    assert left[0]["lm_loss"] == right[0]["lm_loss"]
    assert left[1]["lm_loss"] != right[1]["lm_loss"]
    assert left[0]["learning_rate"] == right[0]["learning_rate"]
