"""Checkpoints from a stranger: refused with the reason, by the functions that a run uses, and nothing in them runs."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_let.errors import EXIT_BAD_CONFIGURATION, EXIT_DONE
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training import checkpoint_files as files
from tests.processes import HANG_SECONDS
from tests.training import hostile
from tests.training.bad_input import refusal, run

ROOT = Path(__file__).resolve().parents[2]
Spoil = Callable[[Path, object], object]

PLACES: dict[str, tuple[Spoil, str]] = {
    ".metadata": (hostile.spoil_metadata, "/.metadata"),
    "common.pt": (hostile.spoil_common, "/common.pt"),
    "random states": (hostile.spoil_object, ".distcp (rng_state/shard_0.0_1.1)"),
    "extra state": (
        lambda directory, value: hostile.spoil_object(directory, value, starts="decoder"),
        "_extra_state/shard_0_4)",
    ),
    "tensor": (hostile.spoil_tensor, ".distcp (entry at byte "),
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Return the path of what a hostile pickle would create."""
    return tmp_path / "it ran"


@pytest.fixture
def saved(start: Path, tmp_path: Path) -> Path:
    """Return a copy of a student's run, with a second, newer checkpoint."""
    root = Path(shutil.copytree(start, tmp_path / "run"))
    shutil.copytree(root / "iter_0000002", root / "iter_0000003")
    files.write_tracker(root, 3)
    return root


@pytest.fixture
def words(token_files: Path, saved: Path) -> dict[str, Any]:
    """Return the settings of a run of one more iteration, from `saved` and into it."""
    return {"--data-path": token_files, "--train-iters": 3, "--load": saved, "--save": saved}


def test_the_hostile_pickle_of_these_tests_runs_where_nothing_stops_it(marker: Path) -> None:
    pickle.loads(pickle.dumps(hostile.Hostile(marker)))
    assert marker.exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_hostile_student_checkpoint_stops_the_run_and_runs_nothing(
    place: str, words: dict[str, Any], saved: Path, marker: Path, pool: RankPool
) -> None:
    spoil, shown = PLACES[place]
    spoil(saved / "iter_0000003", hostile.Hostile(marker))
    hostile.seal(saved / "iter_0000003")
    message = refusal(pool, words, untouched=saved)
    assert not marker.exists()
    assert message.startswith(str(saved / "iter_0000003"))
    assert shown in message
    assert " asks for posix.mkdir, which could run code; it is not loaded: " in message


@pytest.mark.parametrize("place", PLACES)
def test_a_hostile_teacher_runs_nothing(
    place: str,
    let_from_start: dict[str, Any],
    megatron_teacher: Path,
    tmp_path: Path,
    marker: Path,
    pool: RankPool,
) -> None:
    teacher = Path(shutil.copytree(megatron_teacher, tmp_path / "teacher"))
    spoil, shown = PLACES[place]
    spoil(teacher / "iter_0000001", hostile.Hostile(marker))
    hostile.seal(teacher / "iter_0000001")
    message = refusal(pool, {**let_from_start, "--let-teacher-load": teacher}, untouched=teacher)
    assert not marker.exists()
    assert message.startswith(str(teacher / "iter_0000001"))
    assert shown in message
    assert " asks for posix.mkdir, which could run code" in message


def test_the_program_ends_with_code_2_and_one_line(words: dict[str, Any], saved: Path, marker: Path) -> None:
    hostile.spoil_metadata(saved / "iter_0000003", hostile.Hostile(marker))
    hostile.seal(saved / "iter_0000003")
    program = [sys.executable, str(ROOT / "pretrain_let.py"), *arguments(TINY_STUDENT, words)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert ended.returncode == EXIT_BAD_CONFIGURATION
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {saved / 'iter_0000003' / '.metadata'} asks for posix.mkdir")
    assert "Traceback" not in ended.stderr
    assert not marker.exists()


def test_a_modules_extra_state_that_would_run_code(
    words: dict[str, Any], saved: Path, marker: Path, pool: RankPool
) -> None:
    data = bytearray(pickle.dumps({"recipe": hostile.Hostile(marker)}))
    state = torch.frombuffer(data, dtype=torch.uint8)
    hostile.spoil_object(saved / "iter_0000003", state, starts="decoder")
    hostile.seal(saved / "iter_0000003")
    message = refusal(pool, words, untouched=saved)
    assert "_extra_state) asks for posix.mkdir, which could run code" in message
    assert not marker.exists()


def grow(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    entry.size = type(entry.size)([1 << 40, 48])


def point_out(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../iter_0000002/" + info.relative_path


def point_behind(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.length += 1 << 40


def point_before(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.offset = -1


CLAIMS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a huge tensor": (grow, "which has more"),
    "another directory": (point_out, "no .distcp file of its own directory"),
    "behind the end": (point_behind, "behind the end of __0_0.distcp"),
    "before the beginning": (point_before, "a negative or huge number"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_metadata_that_does_not_fit_the_files(
    claim: str, words: dict[str, Any], saved: Path, pool: RankPool
) -> None:
    edit, expected = CLAIMS[claim]
    hostile.edit_metadata(saved / "iter_0000003", edit)
    hostile.seal(saved / "iter_0000003")
    message = refusal(pool, words, world_size=1, untouched=saved)
    assert message.startswith(str(saved / "iter_0000003" / ".metadata"))
    assert expected in message


def test_random_states_of_another_kind(words: dict[str, Any], saved: Path, pool: RankPool) -> None:
    hostile.spoil_object(saved / "iter_0000003", [{"random_rng_state": "tails"}])
    hostile.seal(saved / "iter_0000003")
    assert "holds random states that cannot be used" in refusal(pool, words, world_size=1)
    assert run(pool, {**words, "--no-load-rng": None}, world_size=1).code == EXIT_DONE


def test_another_format_is_not_looked_for(words: dict[str, Any], saved: Path, pool: RankPool) -> None:
    path = saved / "iter_0000003" / "metadata.json"
    path.write_text(path.read_text().replace("torch_dist", "zarr"))
    hostile.seal(path.parent)
    assert "names another format than torch_dist" in refusal(pool, words, world_size=1, untouched=saved)


def test_files_that_are_links_are_read_like_others(
    words: dict[str, Any], saved: Path, tmp_path: Path, pool: RankPool
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for path in files.iteration_directory(saved, 3).glob("*.distcp"):
        path.replace(store / path.name)
        path.symlink_to(store / path.name)
    assert run(pool, {**words, "--train-iters": 3}, world_size=1).code == EXIT_DONE
