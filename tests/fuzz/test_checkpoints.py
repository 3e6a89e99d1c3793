"""Spoilt plain files and plain values of a checkpoint; its pickles are in tests/mcore/test_safe_pickle.py."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.config.derive import resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.mcore.checkpoint import RUN, SCHEDULER, load_common
from megatron_let.mcore.optimizer import build_lr_scheduler
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train, write_token_files
from megatron_let.training import checkpoint_files as files
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.checkpoint_choice import check_same_model
from megatron_let.training.checkpoints import TokenizerRecord, require_schedule, restore_schedule
from megatron_let.training.data_needs import sample_counts, total_iterations
from megatron_let.training.data_record import DataRecord, check_same_data
from megatron_let.training.let_record import record_of_run
from megatron_let.training.megatron_teacher import check_megatron_teacher
from megatron_let.training.metrics import METRICS_FILE, drop_rows_past
from megatron_let.training.saved_run import require_run
from megatron_let.training.state import TrainingState
from tests.fuzz.kit import CHANGES, EDITS, Changes, Edits, change, fuzz, said, spoil, to_json
from tests.training.bad_input import refusal
from tests.training.hostile import seal

Common = dict[str, Any]


@pytest.fixture(scope="module")
def root(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the save directory of a run of one iteration."""
    return write_run(tmp_path_factory.mktemp("run"), pool)


def write_run(root: Path, pool: RankPool) -> Path:
    """Train for one iteration in a directory and save there; return it."""
    write_token_files(root / "tokens", [[1, 2, 3, 60]] * 50)
    changes = {"--data-path": root / "tokens", "--train-iters": 1, "--save": root}
    pool.run(1, train, arguments(TINY_STUDENT, changes))
    return root


@pytest.fixture(scope="module")
def directory(root: Path) -> Path:
    """Return a copy of its checkpoint, whose files each example writes anew."""
    return Path(shutil.copytree(root, root.parent / "copy")) / "iter_0000001"


@pytest.fixture(scope="module")
def common(root: Path) -> Common:
    """Return the plain values of the checkpoint, with a LET record that a guided run would have written."""
    return common_of(root)


def common_of(root: Path) -> Common:
    """Return the same for any such run."""
    values = load_common(root / "iter_0000001")
    let = {
        "student_layer": 2,
        "teacher_layer": None,
        "weight": 1.0,
        "stop_iteration": 3,
        "stop_fraction": 0.1,
        "loss": "cosine",
        "projection": "none",
        "teacher_dtype": "float32",
        "teacher_identity": "0",
    }
    return {**values, RUN: {**values[RUN], "let": let}}


@cache
def settings_of(directory: Path, root: Path) -> RunConfig:
    """Return the settings of a run that goes on."""
    changes = {"--data-path": root / "tokens", "--load": directory.parent}
    return resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)


def use(common: Common, directory: Path, root: Path) -> str | None:
    """Go through a checkpoint's plain values as a resumed run does; return the line with which it is refused."""
    torch.save(common, directory / "common.pt")
    return resume(directory, root)


def resume(directory: Path, root: Path) -> str | None:
    """Go through the plain values of a checkpoint in a copy of an honest run's directory."""
    honest = load_common(root / "iter_0000001")[RUN]
    config = settings_of(directory, root)

    def go_on() -> None:
        run = load_common(directory).get(RUN)
        if run is None:
            return
        require_run(run, directory)
        check_same_model(config, TokenizerRecord(61, None), run, directory)
        state = TrainingState(**run["state"])
        sample_counts(config, total_iterations(config, 1, state), state)
        check_same_data(config, DataRecord(**honest["data"]), run, directory)
        scheduler = build_lr_scheduler(config, optimizer())
        saved: Any = load_common(directory).get(SCHEDULER)
        require_schedule(scheduler, saved, directory)
        restore_schedule(scheduler, saved, config, run["config"])

        record_of_run(config, {**run, "let": None}, 5)

    message = said(go_on, "")
    if message is None and RUN in load_common(directory):
        said(lambda: record_of_run(config, load_common(directory)[RUN], 5), "")
    return message


def optimizer() -> torch.optim.Optimizer:
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "is_decoupled_lr": False}
    return torch.optim.SGD([group], lr=1.0)


@fuzz(120)
@given(changes=CHANGES)
def test_other_plain_values_are_used_or_refused(
    changes: Changes, common: Common, directory: Path, root: Path
) -> None:
    use(change(common, [("replace", [0.999, *where], odd) for _, where, odd in changes]), directory, root)


@fuzz(120)
@given(changes=CHANGES)
def test_other_values_of_the_run_are_used_or_refused(
    changes: Changes, common: Common, directory: Path, root: Path
) -> None:
    use({**common, RUN: change(common[RUN], changes)}, directory, root)


def all_paths(value: Any, depth: int = 3) -> list[tuple[str, ...]]:
    """Return the way to every value in tables of tables."""
    if not isinstance(value, dict) or not depth:
        return []
    return [(name, *rest) for name in value for rest in [(), *all_paths(value[name], depth - 1)]]


def test_each_value_that_is_missing_or_of_another_kind(common: Common, directory: Path, root: Path) -> None:
    messages = []
    for path in all_paths({name: common[RUN][name] for name in ("state", "let", "data", "vocab_size")}):
        odd: Any
        for odd in (None, "x", -1, [1], {}):
            values = json.loads(json.dumps(common[RUN]))
            place = values
            for name in path[:-1]:
                place = place[name]
            if odd is None:
                del place[path[-1]]
            else:
                place[path[-1]] = odd
            messages.append(use({**common, RUN: values}, directory, root))
    assert (
        sum("is incomplete or was not written by this version" in str(message) for message in messages) > 60
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("state", "it has no state"),
        ("config", "it has no config"),
        ("let", "it has no let"),
        ("vocab_size", "it has no vocab_size"),
        ("tokenizer_fingerprint", "it has no tokenizer_fingerprint"),
    ],
)
def test_a_checkpoint_that_lacks_a_value(
    name: str, expected: str, common: Common, directory: Path, root: Path
) -> None:
    run = {key: value for key, value in common[RUN].items() if key != name}
    message = use({**common, RUN: run}, directory, root)
    assert message == (
        f"checkpoint {directory} is incomplete or was not written by this version of megatron_let ({expected}); give "
        "another"
    )


def test_a_checkpoint_without_its_schedule(common: Common, directory: Path, root: Path) -> None:
    for schedule in (None, {}, {**common[SCHEDULER], "more": 1}, {**common[SCHEDULER], "num_steps": "x"}):
        message = use({**common, SCHEDULER: schedule}, directory, root)
        assert message is not None
        assert "is incomplete or was not written by this version of megatron_let" in message


@fuzz(60)
@given(changes=CHANGES)
def test_a_teachers_run_of_other_values_is_used_or_refused(
    changes: Changes, common: Common, directory: Path
) -> None:
    torch.save({**common, RUN: change(common[RUN], changes)}, directory / "common.pt")
    seal(directory)
    said(lambda: check_megatron_teacher(directory.parent, layer=2), directory.parent)


@fuzz(120)
@given(changes=CHANGES, edits=st.one_of(st.just([]), EDITS), name=st.sampled_from(["manifest", "metadata"]))
def test_spoilt_tables_of_files_are_used_or_refused(
    changes: Changes, edits: Edits, name: str, root: Path, directory: Path
) -> None:
    file = f"{name}.json"
    honest = (root / "iter_0000001" / file).read_bytes()
    (directory / file).write_bytes(spoil(to_json(change(json.loads(honest), changes)), edits))
    if name == "metadata":
        said(lambda: load_common(directory), directory)
        (directory / file).write_bytes(honest)
        return
    damage = files.find_damage(directory, sizes_only=True)
    assert damage is None or (damage.isprintable() and len(damage) < 400)


@pytest.mark.parametrize(
    "entry",
    [
        '{"a": {"bytes": Infinity, "sha256": ""}}',
        '{"' + "x" * 300 + '": {"bytes": 1, "sha256": ""}}',
        '{"..": {"bytes": 1, "sha256": ""}}',
        '{"a\\u0000b": {"bytes": 1, "sha256": ""}}',
        '{"/etc/passwd": {"bytes": 1, "sha256": ""}}',
        "[" * 100_000,
    ],
)
def test_a_manifest_of_no_files(entry: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(f'{{"format": 1, "files": {entry}}}')
    assert files.find_damage(tmp_path) == "manifest.json cannot be read"


@fuzz(60)
@given(edits=EDITS)
def test_spoilt_metrics_and_trackers_do_not_stop_a_resume(edits: Edits, root: Path, directory: Path) -> None:
    metrics = directory.parent / METRICS_FILE
    metrics.write_bytes(spoil((root / METRICS_FILE).read_bytes(), edits))
    drop_rows_past(metrics, 1)
    (directory.parent / files.TRACKER).write_bytes(spoil(b"1\n", edits))
    files.read_tracker(directory.parent)


def test_metrics_and_trackers_of_endless_nesting_and_digits(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text("[" * 100_000 + '\n{"iteration": 1}\n')
    drop_rows_past(tmp_path / METRICS_FILE, 1)
    assert (tmp_path / METRICS_FILE).read_text() == '{"iteration": 1}\n'
    (tmp_path / files.TRACKER).write_text("9" * 5000)
    assert files.read_tracker(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden_size", 480_000_000, "its settings say"),
        ("ffn_hidden_size", 10**12, "its settings say"),
        ("num_layers", 10**9, "its settings say"),
        ("num_query_groups", 10**9, "its settings say"),
        ("num_layers", "4", "4 as int"),
    ],
)
def test_a_megatron_teacher_of_other_sizes_than_its_tensors(
    name: str, value: Any, expected: str, common: Common, root: Path, tmp_path: Path, pool: RankPool
) -> None:
    teacher = Path(shutil.copytree(root, tmp_path / "teacher")) / "iter_0000001"
    run = json.loads(json.dumps(common[RUN]))
    run["config"]["transformer"][name] = value
    torch.save({**common, RUN: run}, teacher / "common.pt")
    seal(teacher)
    changes = {"--data-path": root / "tokens", "--train-iters": 1, "--let-teacher-load": teacher.parent}
    message = refusal(pool, changes, world_size=1)
    assert expected in message
    assert str(teacher) in message
