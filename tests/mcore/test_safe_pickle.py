"""Pickles that ask for code, lie about their size or are no pickles: a line for a person, soon, and nothing runs."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from megatron_let.errors import ConfigError
from megatron_let.mcore.dcp_metadata import read_metadata
from megatron_let.mcore.safe_pickle import read_pickle, record_type, refusals
from megatron_let.mcore.torch_file import load_torch_file

SOON = 10.0
"""Seconds of processor time; the pickles here are refused in milliseconds, and what they ask for takes minutes or for ever."""

METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that torch itself wrote, with tensors of several types and shapes and an object."""
    directory = tmp_path_factory.mktemp("written")
    state = {
        "matrix": torch.arange(12.0).reshape(3, 4),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "inner": {"object": {"a": [1, "two"]}},
    }
    with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """Return a copy of it that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def refused(action: Callable[[], object]) -> str:
    """Return the one line of a refusal that comes soon."""
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        action()
    assert time.process_time() - began < SOON
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def said(action: Callable[[], object]) -> str:
    """Return the line of a refusal, nothing where there is none; any other exception is not expected."""
    try:
        action()
    except ConfigError as refusal:
        return str(refusal)
    return ""


def refused_metadata(directory: Path, data: bytes) -> str:
    """Return why `.metadata` of these bytes is refused."""
    (directory / ".metadata").write_bytes(data)
    message = refused(lambda: read_metadata(directory))
    assert message.startswith(str(directory / ".metadata"))
    return message


def test_what_torch_writes_is_read_as_torch_reads_it(written: Path) -> None:
    ours, torchs = read_metadata(written), dcp.FileSystemReader(written).read_metadata()
    assert ours.storage_data == torchs.storage_data
    assert ours.state_dict_metadata == torchs.state_dict_metadata
    assert {type(entry).__name__ for entry in ours.state_dict_metadata.values()} == {
        "TensorStorageMetadata",
        "BytesStorageMetadata",
    }


def memo_bomb() -> bytes:
    return b"\x80\x04Nr" + struct.pack("<I", 2**31) + b"."


def key_bomb() -> bytes:
    """Return a dict whose one key is 60 times a pair of the same: its hash takes 2 ** 60 steps."""
    pairs = b"".join(b"q%ch%c\x86" % (level, level) for level in range(60))
    return b"\x80\x04})" + pairs + b"Ns."


ODD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "EOFError"),
    "cut off": (b"\x80\x04]", "cannot be read"),
    "garbage": (b"\xff" * 100, "cannot be read"),
    "a name": (b"cos\nsystem\n.", "asks for os.system, which could run code"),
    "a name of torch": (b"ctorch\nload\n.", "asks for torch.load, which could run code"),
    "a name by its parts": (
        b"\x80\x04\x8c\x05torch\x8c\x0bstorage.sys\x93.",
        "asks for torch.storage.sys, which could",
    ),
    "a name with a line break": (b"\x80\x04\x8c\x04a\nb\x1b\x8c\x01c\x93.", "asks for a\\nb\\x1b.c, which"),
    "an old way to make an object": (b"(ios\nsystem\n.", "cannot be read"),
    "a registered extension": (b"\x80\x02\x82\x01.", "cannot be read"),
    "arguments": (METADATA + b"N\x85R.", "holds something else"),
    "too many states": (METADATA + b")R}b}b.", "gives an object its state twice"),
    "the state of a class": (METADATA + b"}b.", "cannot be read"),
    "attributes of a class": (METADATA + b"N}X\x01\x00\x00\x00aNs\x86b.", "cannot be read"),
    "a call of a value": (b"ctorch\nfloat32\n)R.", "cannot be read"),
    "an object of no class": (b"])\x81.", "cannot be read"),
    "something outside": (b"NQ.", "refers to something outside itself"),
    "items of a list": (b"]NNs.", "puts items into what is no dict"),
    "another thing": (b"\x80\x04N.", "holds something else where"),
    "bytes that are not there": (b"B\xff\xff\xff\x7fabc.", "cannot be read"),
    "a huge place in the memo": (memo_bomb(), "holds something else where"),
    "a key of keys": (key_bomb(), "has a key of type tuple"),
    "a deep list": (b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".", "is nested more than 100 deep"),
    "a list of itself": (b"\x80\x04]q\x00h\x00a.", "holds something that holds itself"),
    "a small thing that unfolds": (
        b"\x80\x04)" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(60)) + b".",
        "unfolds to more than",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_metadata(case: str, copy: Path) -> None:
    data, expected = ODD[case]
    assert expected in refused_metadata(copy, data)


def edited(directory: Path, edit: Callable[[Any], object]) -> bytes:
    """Return `.metadata` after a change."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    edit(metadata)
    return pickle.dumps(metadata)


def matrix(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["matrix"]


def places(metadata: Metadata) -> Any:
    assert metadata.storage_data is not None
    return metadata.storage_data


def places_with(**values: object) -> Callable[[Metadata], None]:
    """Return an edit that gives every entry's place these values."""

    def edit(metadata: Metadata) -> None:
        for info in places(metadata).values():
            vars(info).update(values)

    return edit


def share_bytes(metadata: Metadata) -> None:
    first, second, *_ = places(metadata).values()
    second.offset, second.length = first.offset, first.length


CLAIMS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", []), "where a table belongs"),
    "no places": (lambda m: setattr(m, "storage_data", None), "where a table belongs"),
    "no entry": (lambda m: m.state_dict_metadata.update(matrix=5), "holds something else"),
    "a name that is none": (lambda m: m.state_dict_metadata.update({5: matrix(m)}), "where a name belongs"),
    "no type": (lambda m: setattr(matrix(m).properties, "dtype", "float"), "where a tensor's type belongs"),
    "no shape": (lambda m: setattr(matrix(m), "size", (3, 4)), "where a shape belongs"),
    "a huge shape": (lambda m: setattr(matrix(m), "size", torch.Size([3, 1 << 40])), "which has more"),
    "a piece outside": (lambda m: setattr(matrix(m), "size", torch.Size([2, 4])), "beyond its tensor"),
    "a flat piece": (lambda m: setattr(matrix(m), "size", torch.Size([12])), "another number of dimensions"),
    "65 dimensions": (lambda m: setattr(matrix(m), "size", torch.Size([1] * 65)), "more than 64 dimensions"),
    "no piece": (lambda m: matrix(m).chunks.clear(), "stores 0 numbers of matrix, which has more"),
    "pieces of no list": (lambda m: setattr(matrix(m), "chunks", None), "where a tensor's pieces belong"),
    "no place": (lambda m: places(m).clear(), "gives no place"),
    "shared bytes": (share_bytes, "places two entries on the same bytes of __0_0.distcp"),
    "too few bytes": (
        places_with(length=3),
        "no place with enough bytes",
    ),
    "transformed bytes": (
        places_with(transform_descriptors=["zstd"]),
        "asks for its bytes to be transformed",
    ),
    "another directory": (
        places_with(relative_path="/etc/passwd"),
        "no .distcp file of its own directory",
    ),
    "no file": (
        places_with(relative_path="a.distcp"),
        "a.distcp, which is no file there",
    ),
    "behind the end": (
        places_with(offset=10_000),
        "behind the end of __0_0.distcp",
    ),
    "a negative place": (
        places_with(offset=-1),
        "a negative or huge number",
    ),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_metadata_that_is_safe_and_not_true(case: str, copy: Path) -> None:
    edit, expected = CLAIMS[case]
    assert expected in refused_metadata(copy, edited(copy, edit))


Edits = list[tuple[str, float, int]]
EDITS: st.SearchStrategy[Edits] = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "cut"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def apply(data: bytes, edits: Edits) -> bytes:
    """Change bytes at places given as fractions of the length."""
    changed = bytearray(data)
    for kind, where, value in edits:
        place = min(int(where * len(changed)), max(0, len(changed) - 1))
        if kind == "flip" and changed:
            changed[place] ^= value
        elif kind == "insert":
            changed.insert(place, value)
        elif kind == "delete":
            del changed[place : place + 1 + value % 8]
        elif kind == "cut" and value < 32:
            del changed[place:]
    return bytes(changed)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_spoilt_metadata_is_read_or_refused(edits: Edits, written: Path, copy: Path) -> None:
    (copy / ".metadata").write_bytes(apply((written / ".metadata").read_bytes(), edits))
    assert "\n" not in said(lambda: read_metadata(copy))


def saved(value: object) -> bytes:
    """Return what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load(data: bytes) -> Any:
    """Load such bytes as a checkpoint's file is loaded."""
    with refusals(Path("common.pt")):
        return load_torch_file(io.BytesIO(data))


CONTENT: dict[str, Any] = {
    "plain": [1, 2.5, None, True, ("a", b"b")],
    "numpy": np.random.get_state(),
    "tensor": torch.arange(6),
}


def test_plain_values_tensors_and_numpys_random_state_are_loaded() -> None:
    loaded = load(saved(CONTENT))
    assert loaded["plain"] == CONTENT["plain"]
    assert torch.equal(loaded["tensor"], torch.arange(6))
    np.random.RandomState(0).set_state(loaded["numpy"])
    assert np.array_equal(loaded["numpy"][1], CONTENT["numpy"][1])


def repacked(
    data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """Return a file of torch with records changed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w", compression) as copy:
        for name in source.namelist():
            copy.writestr(name, change(name, source.read(name)))
    return target.getvalue()


def with_pickle(data: bytes) -> bytes:
    """Return a file of torch with another pickle."""
    return repacked(saved(None), lambda name, content: data if name.endswith("data.pkl") else content)


def with_second_pickle() -> bytes:
    target = io.BytesIO(saved(None))
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("archive/more/data.pkl", b"N.")
    return target.getvalue()


def more_numbers(name: str, content: bytes) -> bytes:
    """Let a tensor of four numbers have 16384."""
    return content.replace(b"K\x04", b"M\x00\x40") if name.endswith("data.pkl") else content


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "no zip": (lambda: pickle.dumps(5), "BadZipFile"),
    "empty": (lambda: b"", "BadZipFile"),
    "cut off": (lambda: saved(CONTENT)[:-100], "cannot be read"),
    "compressed": (
        lambda: repacked(saved([0] * 1000), lambda _, content: content, zipfile.ZIP_DEFLATED),
        "holds compressed records",
    ),
    "two pickles": (with_second_pickle, "holds 2 pickles instead of one"),
    "more numbers": (
        lambda: repacked(saved(torch.zeros(4)), more_numbers),
        "does not hold the 16384 numbers",
    ),
    "a name": (lambda: with_pickle(b"cos\nsystem\n."), "asks for os.system, which could run code"),
    "numpy's own numbers": (lambda: saved(np.arange(3.0)), "another of numpy's types"),
    "numpy's objects": (lambda: saved(np.array([None])), "another of numpy's types"),
    "a huge array": (
        lambda: repacked(
            saved(np.zeros(3, np.uint32)), lambda _, content: content.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")
        ),
        "more or fewer numbers than it says",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_odd_torch_files(case: str) -> None:
    make, expected = FILES[case]
    data = make()
    assert expected in refused(lambda: load(data))


@pytest.mark.parametrize(
    "case", ["a key of keys", "a deep list", "a list of itself", "a small thing that unfolds"]
)
def test_odd_pickles_in_torch_files(case: str) -> None:
    pickled, expected = ODD[case]
    assert expected in refused(lambda: load(with_pickle(pickled)))


class Added:
    """A class that some library has declared safe."""


def test_names_that_others_declared_safe_are_not_allowed() -> None:
    with torch.serialization.safe_globals([Added]):
        before = set(map(str, torch.serialization.get_safe_globals()))
        assert "Added, which could run code" in refused(lambda: load(saved(Added())))
        load(saved(CONTENT))
        assert set(map(str, torch.serialization.get_safe_globals())) == before


@settings(max_examples=200, deadline=None)
@given(edits=EDITS)
def test_spoilt_torch_files_are_loaded_or_refused(edits: Edits) -> None:
    assert "\n" not in said(lambda: load(apply(saved(CONTENT), edits)))


def test_a_record_keeps_what_the_pickle_gave_it() -> None:
    kind = record_type("Thing")
    record = read_pickle(
        pickle.dumps(Metadata({}), protocol=4), {("torch.distributed.checkpoint.metadata", "Metadata"): kind}
    )
    assert type(record) is kind
    assert (record.args, record.state["state_dict_metadata"]) == ((), {})
