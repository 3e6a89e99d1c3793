"""A pair that grows, is cut off and goes on: same bytes, damage noticed, every state of the renaming finished."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.indexed import HEADER, LENGTH_BYTES, check_indexed
from megatron_let.data.indexed_writer import (
    IndexedWriter,
    WriterState,
    install_pair,
    remove_working_files,
    working_file,
)
from megatron_let.data.manifest import manifest_path
from megatron_let.errors import ConfigError
from tests.data.test_indexed import files_of, parts_of, write_with_core

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [], [[7]], [[8, 9]]]


def write(stem: Path, first: int, last: int, state: WriterState | None = None) -> WriterState:
    """Write documents `first` to `last` as one run, which then stops."""
    with IndexedWriter(stem, "uint16", state) as writer:
        for part in parts_of(DOCUMENTS[first:last], "uint16", 1):
            writer.add_documents(*part)
        return writer.sync()


@given(cut=st.integers(0, len(DOCUMENTS)), beyond=st.integers(0, 3))
@settings(max_examples=25)
def test_a_writer_goes_on_from_any_state_whatever_came_after_it(
    cut: int, beyond: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("pair")
    write_with_core(directory / "whole", DOCUMENTS, "uint16")
    stem = directory / "stem"
    state = write(stem, 0, cut)
    write(stem, cut, min(cut + beyond, len(DOCUMENTS)), state)  # killed before it could say how far it came
    with IndexedWriter(stem, "uint16", state) as writer:
        for part in parts_of(DOCUMENTS[cut:], "uint16", 2):
            writer.add_documents(*part)
        digests = writer.complete()
    install_pair(stem, str(directory / "pair"))
    assert files_of(directory / "pair") == files_of(directory / "whole")
    assert digests == tuple(hashlib.sha256(part).hexdigest() for part in files_of(directory / "whole"))
    remove_working_files(stem)
    assert {path.name for path in directory.iterdir()} == {"whole.bin", "whole.idx", "pair.bin", "pair.idx"}


@pytest.mark.parametrize("kind", ["bin", "lengths", "bounds"])
def test_a_table_shorter_than_its_state_is_refused(tmp_path: Path, kind: str) -> None:
    state = write(tmp_path / "stem", 0, 3)
    path = working_file(tmp_path / "stem", kind)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ConfigError, match=f"stem.{kind} does not hold what the stopped run wrote: give --restart"
    ):
        IndexedWriter(tmp_path / "stem", "uint16", state)


def test_a_table_that_is_gone_is_refused(tmp_path: Path) -> None:
    state = write(tmp_path / "stem", 0, 3)
    working_file(tmp_path / "stem", "bounds").unlink()
    with pytest.raises(ConfigError, match=r"stem\.bounds does not hold"):
        IndexedWriter(tmp_path / "stem", "uint16", state)


@pytest.mark.parametrize("kind", ["bin", "lengths", "bounds"])
def test_what_changed_since_is_refused(tmp_path: Path, kind: str) -> None:
    state = write(tmp_path / "stem", 0, 3)
    path = working_file(tmp_path / "stem", kind)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"stem\.{kind} does not hold"):
        IndexedWriter(tmp_path / "stem", "uint16", state)


def test_installing_finishes_what_a_kill_left_undone(tmp_path: Path) -> None:
    """Every state between two renames is made by hand; each leads to the whole new pair, none shows a mixture."""
    new = tmp_path / "new"
    with IndexedWriter(new, "uint16") as writer:
        for part in parts_of(DOCUMENTS, "uint16", 1):
            writer.add_documents(*part)
        writer.complete()
    manifest_path(str(new)).write_text("new manifest")
    names = ("bin", "idx", "manifest.json")
    for moved in range(len(names) + 1):
        work = tmp_path / f"moved_{moved}"
        work.mkdir()
        for index, kind in enumerate(names):
            target = work / ("pair" if index < moved else "stem")
            shutil.copy(working_file(new, kind), working_file(target, kind))
        if moved == 0:
            for kind in names:
                working_file(work / "pair", kind).write_text(f"old {kind}")
        install_pair(work / "stem", str(work / "pair"))
        for kind in names:
            assert working_file(work / "pair", kind).read_bytes() == working_file(new, kind).read_bytes()
        assert len(list(work.iterdir())) == 3


def test_no_moment_of_installing_shows_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each single step: an index lies beside its own tokens, a manifest beside its own index, or not at all."""
    new, kinds = tmp_path / "stem", ("bin", "idx", "manifest.json")
    for kind in kinds:
        working_file(new, kind).write_text("new")
        working_file(tmp_path / "pair", kind).write_text("old")
    seen: list[tuple[str, ...]] = []

    def then_look(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(path: Path, *arguments: Any, **options: Any) -> Any:
            result = original(path, *arguments, **options)
            paths = [working_file(tmp_path / "pair", kind) for kind in kinds]
            seen.append(tuple(each.read_text() if each.exists() else "none" for each in paths))
            return result

        return step

    monkeypatch.setattr(Path, "replace", then_look(Path.replace))
    monkeypatch.setattr(Path, "unlink", then_look(Path.unlink))
    install_pair(new, str(tmp_path / "pair"))
    assert len(seen) == 6  # old index, manifest and map away; tokens, index and manifest come
    for data, index, manifest in seen:
        assert index in (data, "none")
        assert manifest in (index, "none") or (index, manifest) == ("none", "old")
    assert seen[-1] == ("new", "new", "new")


def test_removing_working_files_leaves_the_others(tmp_path: Path) -> None:
    write(tmp_path / "stem", 0, 2)
    (tmp_path / "stem.txt").write_text("mine")
    remove_working_files(tmp_path / "stem")
    assert [path.name for path in tmp_path.iterdir()] == ["stem.txt"]


def test_offsets_pass_both_32_bit_limits(tmp_path: Path) -> None:
    """40 billion tokens in the tables alone: offsets up to 160 GB, and no sum wraps on the way."""
    longest, count = 2**31 - 1, 20
    with IndexedWriter(tmp_path / "stem", "int32") as writer:
        writer.add_bounds(np.arange(1, count + 1, dtype=np.int64))
        writer.add_lengths(np.full(count, longest, dtype=np.int32))
        writer.complete()
    index = working_file(tmp_path / "stem", "idx").read_bytes()
    pointers = np.frombuffer(index, "<i8", count, offset=HEADER.size + LENGTH_BYTES * count)
    assert pointers.tolist() == [4 * longest * position for position in range(count)]


def test_what_does_not_add_up_is_an_assertion(tmp_path: Path) -> None:
    one = np.ones(1, np.int32).tobytes()
    with IndexedWriter(tmp_path / "stem", "uint16") as writer:
        with pytest.raises(AssertionError, match="lengths"):
            writer.add_documents(b"\1\0\2\0", one, one)
        with pytest.raises(AssertionError, match="counts"):
            writer.add_documents(b"\1\0", one, np.asarray([2], np.int32).tobytes())
        assert writer.sync() == WriterState(digests=[hashlib.sha256().hexdigest()] * 3)


def test_a_new_writer_forgets_what_lies_under_its_name(tmp_path: Path) -> None:
    write(tmp_path / "stem", 0, 5)
    with IndexedWriter(tmp_path / "stem", "uint16") as writer:
        for part in parts_of(DOCUMENTS[:1], "uint16", 1):
            writer.add_documents(*part)
        writer.complete()
    install_pair(tmp_path / "stem", str(tmp_path / "pair"))
    assert check_indexed(str(tmp_path / "pair")).tokens == 3
