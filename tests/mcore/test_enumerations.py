"""Members of enumerations in a pickle: early releases of Python 3.11 write them as an attribute that is asked for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_let.errors import ConfigError
from megatron_let.mcore.dcp_metadata import read_metadata
from megatron_let.mcore.extra_state import _NAMES
from megatron_let.mcore.safe_pickle import Refused, read_pickle


class EarlyPickler(pickle._Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        import enum

        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Return a checkpoint whose metadata were pickled so."""
    with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
        dcp.save({"matrix": torch.ones(2, 3)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    with (tmp_path / ".metadata").open("wb") as file:
        EarlyPickler(file).dump(metadata)
    return tmp_path


def test_metadata_of_an_early_python_are_read(written: Path) -> None:
    assert b"getattr" in (written / ".metadata").read_bytes()
    torchs = dcp.FileSystemReader(written).read_metadata()
    assert read_metadata(written).state_dict_metadata == torchs.state_dict_metadata


FORMAT = b"ctransformer_engine.common.recipe\nFormat\n"
GETATTR = b"cbuiltins\ngetattr\n"


def attribute(of: bytes, name: str) -> bytes:
    """Return the pickle of an attribute, asked for."""
    return GETATTR + b"(" + of + b"X" + len(name).to_bytes(4, "little") + name.encode() + b"tR."


def test_a_member_is_read_and_no_other_attribute_of_anything() -> None:
    assert read_pickle(attribute(FORMAT, "HYBRID"), _NAMES).args[1] == "HYBRID"
    for pickled in (
        attribute(FORMAT, "mro"),
        attribute(FORMAT, "__init_subclass__"),
        attribute(FORMAT, "_GENERATE"),
        attribute(FORMAT, "A.B"),
        attribute(b"ctransformer_engine.common.recipe\nDelayedScaling\n", "HYBRID"),
        attribute(b"ccollections\nOrderedDict\n", "FROMKEYS"),
        attribute(GETATTR, "X"),
        attribute(b"K\x07", "REAL"),
        GETATTR + b")R.",
        GETATTR + b"(" + FORMAT + b"K\x01tR.",
    ):
        with pytest.raises(Refused, match=r"asks for builtins\.getattr, which could run code"):
            read_pickle(pickled, _NAMES)


def test_what_is_read_cannot_be_called_or_changed() -> None:
    member = attribute(FORMAT, "HYBRID")[:-1]
    with pytest.raises(TypeError, match="not callable"):
        read_pickle(member + b")R.", _NAMES)
    with pytest.raises(Refused, match="changes a member"):
        read_pickle(member + b"}b.", _NAMES)


def test_the_line_for_a_person_names_it(written: Path) -> None:
    (written / ".metadata").write_bytes(attribute(b"ctorch\nSize\n", "HYBRID"))
    with pytest.raises(
        ConfigError, match=r"asks for builtins\.getattr, which could run code; it is not loaded"
    ):
        read_metadata(written)
