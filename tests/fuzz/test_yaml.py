"""Spoilt --config files, through everything that looks at settings before ranks are started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.config.derive import resolve
from megatron_let.testing.training import TINY_STUDENT
from megatron_let.training.arguments import parse_arguments, save_directory_of
from tests.fuzz.kit import CHANGES, EDITS, Changes, Edits, change, fuzz, said, spoil

VALUES: dict[str, Any] = {
    **{
        flag.removeprefix("--"): True if value is None else yaml.safe_load(value)
        for flag, value in TINY_STUDENT.items()
    },
    "data-path": [0.3, "a", 0.7, "b"],
    "split": "969,30,1",
    "save": "run",
    "adam-beta1": 0.9,
    "lr-warmup-fraction": 0.5,
    "num-dataset-builder-threads": 1,
}
SNIPPETS = (
    "a: &a [x,x,x]\nb: &b [*a,*a]\n",
    "save: &s [*s]\n",
    "<<: {save: x}\n",
    "<<: [{save: x}, {load: y}]\n",
    "save: !!python/object/apply:os.system [ls]\n",
    "save: !!python/name:os.system\n",
    "seed: !!int ''\n",
    "seed: !!int x\n",
    "save: !!timestamp x\n",
    "save: 2001-99-99\n",
    "seed: 2001-01-01\n",
    "finetune: !!bool x\n",
    "lr: !!float x\n",
    "save: !!binary '%%'\n",
    "save: !!binary aGVsbG8=\n",
    "save: !!set {a, b}\n",
    "save: !!omap [a: 1]\n",
    "? [a]\n: b\n",
    "? {a: b}\n: b\n",
    "seed: 0x" + "f" * 6000 + "\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: 190:20:30\n",
    "lr: .nan\n",
    "lr: -.inf\n",
    'save: "\\0"\n',
    'save: "\\ud800"\n',
    'save: "a\\nb"\n',
    'save: "' + "x" * 300 + '"\n',
    "save: |\n  x\n  y\n",
    "x" * 300 + ": 1\n",
    "[" * 2000,
    "- " * 2000,
    "a: " * 500,
    "{a: " * 2000,
    "---\na: b\n---\n",
    "%YAML 9.9\n---\n",
    "\ufeff",
    "*unknown\n",
    "attention-backend: flash\n",
    "moe-grouped-gemm: [a, [b]]\n",
    "fp8: {a: b}\n",
)


def use(content: bytes, path: Path) -> str | None:
    """Read a config file as a run does; return the line with which it is refused."""
    path.write_bytes(content)
    argv = ["--config", str(path)]
    save_directory_of(argv)

    def settle() -> None:
        resolve(parse_arguments(argv), 1).to_yaml().encode()

    # Once a value is read, its error names the setting and not the file, as for one on the command line.
    return said(settle, "")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "run.yaml"


@fuzz(60)
@given(edits=EDITS)
def test_a_config_of_other_bytes_is_used_or_refused(edits: Edits, path: Path) -> None:
    use(spoil(yaml.safe_dump(VALUES).encode(), edits), path)


@fuzz(120)
@given(changes=CHANGES)
def test_a_config_of_other_values_is_used_or_refused(changes: Changes, path: Path) -> None:
    text = yaml.safe_dump(change(VALUES, changes), allow_unicode=False)
    for mark, meant in (("<deep>", "[" * 3000), ("<long>", "9" * 5000), ("<nested>", "[" * 50 + "]" * 50)):
        text = text.replace(mark, meant)
    use(text.encode(), path)


@fuzz(50)
@given(parts=st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=3), edits=st.one_of(st.just([]), EDITS))
def test_odd_yaml_is_used_or_refused(parts: list[str], edits: Edits, path: Path) -> None:
    use(spoil((yaml.safe_dump(VALUES) + "".join(parts)).encode("utf-8", "surrogatepass"), edits), path)


def test_the_honest_config_is_used(path: Path) -> None:
    assert use(yaml.safe_dump(VALUES).encode(), path) is None


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS + "save: *a11\n", "a value is nested too deep"),
        (MERGES + "<<: *a11\n", "a value is nested too deep"),
        ("save: &a [*a]\n", "a value is nested too deep"),
        ("[" * 100_000, "a value is nested too deep"),
        ("save: !!python/object/apply:os.mkdir [MARKER]\n", "could not determine a constructor for the tag"),
        ("seed: " + "9" * 5000, "holds a value that cannot be read"),
        ("seed: 0x" + "f" * 5000, "seed is a number of 20000 bits"),
        ("seed: !!int ''\n", "holds a value that cannot be read"),
        ("finetune: !!bool x\n", "holds a value that cannot be read"),
        ("save: !!timestamp x\n", "holds a value that cannot be read"),
        ("save: 2001-99-99\n", "holds a value that cannot be read"),
        ("? [a]\n: b\n", "is not YAML"),
        ('save: "a\\0b"\n', "a\\x00b is not text that a path or a name can have"),
        ('save: "\\ud800"\n', "is not text that a path or a name can have"),
    ],
)
def test_yaml_that_is_more_than_settings(text: str, expected: str, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    message = use(text.replace("MARKER", str(marker)).encode(), tmp_path / "run.yaml")
    assert message is not None
    assert expected in message
    assert str(tmp_path / "run.yaml") in message
    assert not marker.exists()


def test_an_alias_of_a_plain_value_or_list_stays_usable(tmp_path: Path) -> None:
    values = {name: value for name, value in VALUES.items() if name not in ("data-path", "save", "split")}
    text = "save: &run somewhere\nload: *run\ntrain-data-path: &data [a]\nvalid-data-path: *data\n"
    assert use((yaml.safe_dump(values) + text).encode(), tmp_path / "run.yaml") is None
