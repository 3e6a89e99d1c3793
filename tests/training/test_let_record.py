"""What LET is in a run, and what a resume may change of it."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.let import LetConfig
from megatron_let.errors import ConfigError
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from megatron_let.training.let_record import LetRecord, reconcile, teacher_identity

RECORD = LetRecord(
    student_layer=2,
    teacher_layer=None,
    weight=0.1,
    stop_iteration=15,
    stop_fraction=None,
    loss="cosine",
    projection="interpolate",
    teacher_dtype="float32",
    teacher_identity="abc",
)
STRICT = LetConfig(let_teacher_bos="on")
OTHER: dict[str, Any] = {
    "student_layer": 3,
    "teacher_layer": 5,
    "weight": 0.2,
    "stop_iteration": 16,
    "loss": "logsum",
    "projection": "linear",
    "teacher_dtype": "bfloat16",
    "teacher_identity": "xyz",
    "teacher_bos": 1,
}


# What changes no number, or is recorded as something else: the teacher by its files, S_stop as an iteration.
NOT_RECORDED = {
    *("let_teacher_load", "let_teacher_format", "let_trust_remote_code", "let_override", "let_share_teacher"),
    *("let_stop_iters", "let_stop_fraction", "let_control", "objective"),
}


def test_the_table_of_differences_covers_every_setting() -> None:
    assert OTHER.keys() | {"stop_fraction"} == asdict(RECORD).keys()
    flags = {field.name for field in fields(LetConfig)} - NOT_RECORDED
    recorded = {f"let_{name}" for name in asdict(RECORD)}
    assert flags <= recorded, "a flag that changes the numbers must be recorded and compared"


def test_a_record_survives_the_checkpoint() -> None:
    assert LetRecord(**RECORD.to_dict()) == RECORD
    assert RECORD.schedule().weight_at(0) == 0.1
    assert RECORD.schedule().weight_at(15) == 0.0


def test_the_same_settings_go_on() -> None:
    assert reconcile(RECORD.to_dict(), RECORD, completed_iterations=5, let=STRICT) == RECORD
    assert reconcile(None, None, completed_iterations=5, let=STRICT) is None


@pytest.mark.parametrize("name", OTHER)
def test_each_setting_that_differs_is_named_with_both_values(name: str) -> None:
    current = replace(RECORD, **{name: OTHER[name]})
    with pytest.raises(ConfigError) as caught:
        reconcile(RECORD.to_dict(), current, completed_iterations=5, let=STRICT)
    message = str(caught.value)
    assert f"LET setting {name.replace('_', ' ')} is {OTHER[name]}" in message
    assert f"trained with {asdict(RECORD)[name]}" in message
    assert "--let-override" in message


@pytest.mark.parametrize("name", OTHER)
def test_override_takes_each_setting_from_the_command_line(name: str) -> None:
    current = replace(RECORD, **{name: OTHER[name]})
    let = LetConfig(let_override=True)
    assert reconcile(RECORD.to_dict(), current, completed_iterations=5, let=let) == current


def test_a_resumed_run_keeps_the_teachers_bos_unless_the_flag_says_otherwise() -> None:
    """A checkpoint from before there was one was trained without."""
    now, auto = replace(RECORD, teacher_bos=1), LetConfig()
    assert reconcile(now.to_dict(), RECORD, completed_iterations=5, let=auto) == now
    old = RECORD.to_dict()
    del old["teacher_bos"]
    assert reconcile(old, now, completed_iterations=5, let=auto) == RECORD
    with pytest.raises(
        ConfigError, match="LET setting teacher bos is 1 but the checkpoint was trained with None"
    ):
        reconcile(old, now, completed_iterations=5, let=STRICT)
    assert reconcile(now.to_dict(), RECORD, completed_iterations=15, let=STRICT) == now  # the teacher is gone


def test_turning_let_on_or_off_is_refused_unless_overridden() -> None:
    let = LetConfig(let_override=True)
    for saved, current in ((RECORD.to_dict(), None), (None, RECORD)):
        with pytest.raises(ConfigError, match="--let-override"):
            reconcile(saved, current, completed_iterations=5, let=STRICT)
        assert reconcile(saved, current, completed_iterations=5, let=let) == current
    with pytest.raises(ConfigError, match="trained with a LET teacher and this run goes on without one"):
        reconcile(RECORD.to_dict(), None, completed_iterations=5, let=STRICT)
    with pytest.raises(ConfigError, match="trained without a LET teacher and this run goes on with one"):
        reconcile(None, RECORD, completed_iterations=5, let=STRICT)


def test_a_stop_given_as_a_fraction_stays_where_the_run_began() -> None:
    saved = replace(RECORD, stop_fraction=0.15, stop_iteration=15)
    longer = replace(saved, stop_iteration=30)  # 0.15 of twice the iterations
    kept = reconcile(saved.to_dict(), longer, completed_iterations=5, let=STRICT)
    assert kept == saved
    other = replace(longer, stop_fraction=0.3)
    with pytest.raises(ConfigError, match="stop"):
        reconcile(saved.to_dict(), other, completed_iterations=5, let=STRICT)


@pytest.mark.parametrize(("saved", "now"), [(None, 0.15), (0.15, None)])
def test_the_same_s_stop_may_be_said_in_another_way(saved: float | None, now: float | None) -> None:
    """15 iterations, or 0.15 of 100."""
    before, after = replace(RECORD, stop_fraction=saved), replace(RECORD, stop_fraction=now)
    assert reconcile(before.to_dict(), after, completed_iterations=5, let=STRICT) == before


@pytest.mark.parametrize(("completed", "is_gone_allowed"), [(14, False), (15, True), (100, True)])
def test_once_s_stop_has_passed_the_teacher_may_be_gone(completed: int, is_gone_allowed: bool) -> None:
    gone = replace(RECORD, teacher_identity=None)
    if not is_gone_allowed:
        with pytest.raises(ConfigError, match="holds no teacher, which the run needs until iteration"):
            reconcile(RECORD.to_dict(), gone, completed_iterations=completed, let=STRICT)
        return
    assert reconcile(RECORD.to_dict(), gone, completed_iterations=completed, let=STRICT) == RECORD
    other = replace(gone, weight=0.2)
    with pytest.raises(ConfigError, match="weight"):
        reconcile(RECORD.to_dict(), other, completed_iterations=completed, let=STRICT)


def test_a_teacher_is_known_by_its_files_and_not_by_its_path(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        write_tiny_teacher("llama", directory)
    identity = teacher_identity(first)
    assert teacher_identity(second) == identity
    (second / "tokenizer.json").write_text("{}")  # compared by itself, through the tokenizer's fingerprint
    (second / "README.md").write_text("words")
    (second / "logs").mkdir()
    assert teacher_identity(second) == identity


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_changed_byte_makes_another_teacher(name: str, where: float, tmp_path: Path) -> None:
    write_tiny_teacher("llama", tmp_path)
    before = teacher_identity(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (tmp_path / name).write_bytes(bytes(content))
    assert teacher_identity(tmp_path) != before


def test_a_large_file_is_sampled_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 26)  # 64 MiB of zeros, sparse
    before = teacher_identity(tmp_path)
    with path.open("r+b") as file:
        file.seek((1 << 26) - 1)
        file.write(b"\1")
    assert teacher_identity(tmp_path) != before
    path.write_bytes(b"")
    assert teacher_identity(tmp_path) != before
