"""Checkpoints that cannot be loaded, or not by this run: named, skipped where an older one is whole, never touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_let.errors import EXIT_DONE, EXIT_PREEMPTED
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, metrics_rows, train
from megatron_let.training import checkpoint_files as files
from tests.training.bad_input import Outcome, content_of, refusal, run, write_word_tokenizer


@pytest.fixture(scope="module")
def original(pool: RankPool, token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run's directory with whole checkpoints of iterations 1 and 2."""
    directory = tmp_path_factory.mktemp("original")
    changes = {"--data-path": token_files, "--train-iters": 2, "--save-interval": 1, "--save": directory}
    pool.run(1, train, arguments(TINY_STUDENT, changes))
    return directory


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """Return a copy of it that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def words(token_files: Path, saved: Path) -> dict[str, Any]:
    """Return the settings of a run of one more iteration, from `saved` and into it."""
    return {"--data-path": token_files, "--train-iters": 3, "--save": saved, "--load": saved}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


NAMES = ("__0_0.distcp", "__0_1.distcp", ".metadata", "common.pt", "metadata.json", "settings.yaml")
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "{name} is missing"),
    "cut": (cut, "bytes instead of"),
    "flipped": (flip, "{name} does not match its checksum"),
}


def test_a_whole_checkpoint_is_whole_by_any_path_to_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(saved)
    for root in (saved, Path("run"), tmp_path / "link", Path("link")):
        assert files.find_damage(files.iteration_directory(root, 2)) is None
    assert sorted(path.name for path in (saved / "iter_0000002").iterdir()) == sorted(
        [*NAMES, files.MANIFEST]
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_every_damage_of_every_file_is_found(name: str, damage: str, saved: Path) -> None:
    directory = saved / "iter_0000002"
    spoil, expected = DAMAGES[damage]
    spoil(directory / name)
    found = files.find_damage(directory)
    assert found is not None
    assert name in found
    assert expected.format(name=name) in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "manifest.json is missing (not written by megatron_let, or not to its end)"),
        ("", "manifest.json cannot be read"),
        ("[]", "manifest.json cannot be read"),
        ('{"files": []}', "manifest.json cannot be read"),
        ('{"files": {}}', "manifest.json cannot be read"),
        ('{"files": {"a": 1}}', "manifest.json cannot be read"),
        ('{"files": {"../common.pt": {"bytes": 1, "sha256": ""}}}', "manifest.json cannot be read"),
    ],
)
def test_a_manifest_that_is_not_one(text: str | None, expected: str, saved: Path) -> None:
    path = saved / "iter_0000002" / files.MANIFEST
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert files.find_damage(path.parent) == expected


SKIPPED: dict[str, Callable[[Path], object]] = {
    "__0_1.distcp": Path.unlink,
    "common.pt": flip,
    ".metadata": cut,
    "manifest.json": Path.unlink,
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_damaged_newest_checkpoint_is_named_and_the_newest_whole_one_used(
    name: str, words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    SKIPPED[name](saved / "iter_0000002" / name)
    older = content_of(saved / "iter_0000001")
    result = run(pool, words)
    assert result.code == EXIT_DONE
    named = f"WARNING checkpoint {saved / 'iter_0000002'} is damaged and skipped: {name}"
    assert sum(line.startswith(named) for line in result.lines) == 1
    assert f"INFO loaded {saved / 'iter_0000001'} at iteration 1" in result.lines
    assert content_of(saved / "iter_0000001") == older
    assert [row["iteration"] for row in metrics_rows(saved)] == [1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_strict_load_stops_at_a_damaged_newest_checkpoint(
    name: str, words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    flip(saved / "iter_0000002" / name)
    message = refusal(pool, {**words, "--strict-load": None}, untouched=saved)
    assert message.startswith(f"checkpoint {saved / 'iter_0000002'} is damaged: {name} does not match")


def test_a_damaged_checkpoint_that_was_chosen_is_not_replaced_by_another(
    words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    flip(saved / "iter_0000002" / "common.pt")
    message = refusal(pool, {**words, "--ckpt-step": 2}, untouched=saved)
    assert "iter_0000002 is damaged: common.pt" in message
    message = refusal(pool, {**words, "--ckpt-step": 7}, untouched=saved)
    assert message.startswith(f"--ckpt-step 7: {saved} has checkpoints of iteration 2, 1;")


def test_no_checkpoint_is_whole(words: dict[str, Any], saved: Path, pool: RankPool) -> None:
    flip(saved / "iter_0000002" / "common.pt")
    (saved / "iter_0000001" / ".metadata").unlink()
    message = refusal(pool, words, untouched=saved)
    assert message.startswith(f"--load {saved}: none of its checkpoints is whole (iteration 2: common.pt")
    assert "iteration 1: .metadata is missing" in message


def test_a_directory_without_a_checkpoint(words: dict[str, Any], tmp_path: Path, pool: RankPool) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (empty, tmp_path / "nowhere", tmp_path / ("x" * 256)):
        message = refusal(pool, {**words, "--load": path, "--save": empty}) if path != empty else ""
        assert path == empty or message.startswith(f"--load {path} holds no checkpoint; check the path")
    assert "holds no checkpoint" in refusal(pool, {**words, "--load": empty, "--save": tmp_path / "other"})
    own = {**words, "--load": empty, "--save": empty}
    message = refusal(pool, {**own, "--exit-on-missing-checkpoint": None})
    assert f"--load {empty} holds no checkpoint" in message
    result = run(pool, {**own, "--train-iters": 1})
    assert (result.code, f"INFO no checkpoint in {empty}: starting from iteration 0" in result.lines) == (
        0,
        True,
    )


def test_what_is_given_instead_of_the_directory_of_checkpoints(
    words: dict[str, Any], saved: Path, tmp_path: Path, pool: RankPool
) -> None:
    other = {**words, "--save": tmp_path / "other"}
    message = refusal(pool, {**other, "--load": saved / "iter_0000002"})
    assert f"it looks like one checkpoint: give the directory above it, {saved}" in message
    message = refusal(pool, {**other, "--load": saved / "metrics.jsonl"})
    assert "it is a file: give a directory" in message


@pytest.mark.parametrize("text", ["2", "7", "release", ""])
def test_a_tracker_with_nothing_behind_it(
    text: str, words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    for iteration in (1, 2):
        shutil.rmtree(files.iteration_directory(saved, iteration))
    (saved / files.TRACKER).write_text(text)
    message = refusal(pool, words, untouched=saved)
    assert f"{files.TRACKER} says that there is a checkpoint, and there is none" in message


@pytest.mark.parametrize("text", [None, "", "abc", "-5", "7", "\udcff"])
def test_a_damaged_tracker_does_not_hide_the_checkpoints(
    text: str | None, words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    (saved / files.TRACKER).unlink()
    if text is not None:
        (saved / files.TRACKER).write_bytes(text.encode("utf-8", "surrogateescape"))
    result = run(pool, words, world_size=1)
    assert result.code == EXIT_DONE
    says = "names iteration 7, which is not there" if text == "7" else "names no iteration"
    assert (
        f"WARNING {saved}: {files.TRACKER} {says}; taking the checkpoint saved last, of iteration 2"
        in result.lines
    )
    assert f"INFO loaded {saved / 'iter_0000002'} at iteration 2" in result.lines
    assert files.read_tracker(saved) == 3


def test_the_strict_load_of_a_tracker_with_nothing_behind_it(
    words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    files.write_tracker(saved, 7)
    message = refusal(pool, {**words, "--strict-load": None}, untouched=saved)
    assert message == (
        f"--load {saved}: {files.TRACKER} names iteration 7, which is not there; choose a checkpoint with --ckpt-step"
    )


def test_a_run_goes_on_from_what_the_tracker_names_and_says_what_was_saved_later(
    words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    files.write_tracker(saved, 1)
    result = run(pool, {**words, "--train-iters": 2}, world_size=1)
    assert result.code == EXIT_DONE
    warned = [line for line in result.lines if line.startswith(f"WARNING {saved}")]
    assert [line.split(",")[0] for line in warned] == [
        f"WARNING {saved}: iteration 2 was saved after iteration 1"
    ]
    assert f"INFO loaded {saved / 'iter_0000001'} at iteration 1" in result.lines


def test_after_a_rollback_the_new_branch_is_kept_and_gone_on_from(
    words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    """Iterations 1 to 4 are there; the run goes back to 1, and saves 2 anew."""
    assert run(pool, {**words, "--train-iters": 4, "--save-interval": 1}, world_size=1).code == EXIT_DONE
    back = {**words, "--train-iters": 4, "--exit-interval": 2, "--save-keep-last": 2}
    result = run(pool, {**back, "--ckpt-step": 1}, world_size=1)
    assert result.code == EXIT_PREEMPTED
    assert files.resume_order(saved) == [2, 1, 4]
    assert files.find_damage(files.iteration_directory(saved, 1)) is None
    result = run(pool, {**words, "--train-iters": 4}, world_size=1)
    assert f"INFO loaded {saved / 'iter_0000002'} at iteration 2" in result.lines
    assert [line for line in result.lines if line.startswith(f"WARNING {saved}")] == []
    assert [row["iteration"] for row in metrics_rows(saved)] == [1, 2, 3, 4]


OTHER_MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "shapes": (
        {"--num-layers": 2, "--hidden-size": 32, "--ffn-hidden-size": 64},
        ["num_layers 2 (checkpoint: 4)", "hidden_size 32 (checkpoint: 48)", "ffn_hidden_size 64 (checkpoint: 96)"],
    ),
    "parts": (
        {"--swiglu": False, "--normalization": "LayerNorm", "--qk-layernorm": None},
        ["swiglu False (checkpoint: True)", "normalization LayerNorm (checkpoint: RMSNorm)", "qk_layernorm True"],
    ),
    "heads": ({"--num-query-groups": 4}, ["num_query_groups 4 (checkpoint: 2)"]),
    "vocabulary": ({"--vocab-size": 63}, ["token ids 64 (checkpoint: 61)"]),
    "meaning": ({"--rotary-base": 500, "--norm-epsilon": 1e-3}, ["rotary_base 500 (checkpoint: 10000)", "epsilon 0.001"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_a_checkpoint_of_another_model_lists_every_difference(
    case: str, words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    changes, expected = OTHER_MODELS[case]
    message = refusal(pool, {**words, **changes}, untouched=saved)
    assert message.startswith(f"checkpoint {saved / 'iter_0000002'} holds another model: ")
    assert [part for part in expected if part not in message] == []
    assert "position_embedding_type" not in message


def test_finetune_may_change_what_weights_mean_but_not_their_shapes(
    words: dict[str, Any], tmp_path: Path, pool: RankPool
) -> None:
    changes = {**words, "--finetune": None, "--save": tmp_path / "tuned", "--train-iters": 1}
    assert run(pool, {**changes, "--rotary-base": 500}).code == EXIT_DONE
    assert "hidden_size 32" in refusal(pool, {**changes, "--save": tmp_path / "other", "--hidden-size": 32})


def test_a_checkpoint_of_another_tokenizer(token_files: Path, pool: RankPool, tmp_path: Path) -> None:
    names = [f"w{index}" for index in range(60)] + ["<eod>"]
    write_word_tokenizer(tmp_path / "usual", names)
    write_word_tokenizer(tmp_path / "swapped", [names[1], names[0], *names[2:]])
    base = {"--data-path": token_files, "--tokenizer-type": "HuggingFaceTokenizer", "--vocab-size": False}
    first = {**base, "--tokenizer-model": tmp_path / "usual", "--train-iters": 1, "--save": tmp_path / "run"}
    assert run(pool, first, world_size=1).code == EXIT_DONE
    other = {
        **base,
        "--tokenizer-model": tmp_path / "swapped",
        "--load": tmp_path / "run",
        "--train-iters": 2,
    }
    assert "was trained with another tokenizer" in refusal(pool, other, untouched=tmp_path / "run")
    result = run(pool, {**other, "--finetune": None}, world_size=1)
    assert result.code == EXIT_DONE
    assert sum("was trained with another tokenizer" in line for line in result.lines) == 1


def rewrite_common(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the unsharded part of a checkpoint and make the manifest fit it again."""
    common = torch.load(directory / "common.pt", weights_only=False)
    edit(common)
    torch.save(common, directory / "common.pt")
    manifest = {"format": 1, "files": files.describe_files(directory)}
    (directory / files.MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_of_another_program(words: dict[str, Any], saved: Path, pool: RankPool) -> None:
    rewrite_common(saved / "iter_0000002", lambda common: common.pop("megatron_let"))
    message = refusal(pool, words, untouched=saved)
    assert f"checkpoint {saved / 'iter_0000002'} (iteration 2) was not written by megatron_let" in message
    for iteration in (1, 2):
        (files.iteration_directory(saved, iteration) / files.MANIFEST).unlink()
    assert "manifest.json is missing (not written by megatron_let" in refusal(pool, words, untouched=saved)


def test_a_checkpoint_without_what_a_resume_needs(
    words: dict[str, Any], token_files: Path, tmp_path: Path, pool: RankPool
) -> None:
    bare = tmp_path / "bare"
    changes = {"--data-path": token_files, "--train-iters": 1, "--save": bare, "--no-save-optim": None}
    assert run(pool, changes, world_size=1).code == EXIT_DONE
    message = refusal(pool, {**words, "--load": bare, "--save": bare}, untouched=bare)
    assert "holds no optimizer state; give --no-load-optim or --finetune" in message


def test_a_schedule_other_than_the_checkpoints(words: dict[str, Any], saved: Path, pool: RankPool) -> None:
    message = refusal(pool, {**words, "--lr": 1e-4}, untouched=saved)
    assert "max lr is 0.0001 but the checkpoint was trained with 0.003" in message
    assert "--override-opt_param-scheduler" in message


TORN = '{"iteration": 2, "lm_lo'


@pytest.mark.parametrize(
    "line",
    [TORN.encode(), b"\xff\xfe\n", b"[1]\n", b'{"iteration": "2"}\n'],
    ids=["torn", "binary", "list", "text"],
)
def test_a_damaged_metrics_file_does_not_stop_a_resume(
    line: bytes, words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    path = saved / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(rows[0] + line)
    result: Outcome = run(pool, words, world_size=1)
    assert result.code == EXIT_DONE
    assert [row["iteration"] for row in metrics_rows(saved)] == [1, 3]
