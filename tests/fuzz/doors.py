"""Where foreign bytes come in: each door puts them beside honest files and uses them as the fuzz tests do."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml

from megatron_let.let.hf_files import INDEX_FILE, SINGLE_FILE
from megatron_let.mcore.dcp_metadata import read_metadata
from megatron_let.mcore.extra_state import check_extra_states
from megatron_let.testing.distributed import RankPool
from tests.fuzz import test_checkpoints as checkpoints
from tests.fuzz import test_data_records as records
from tests.fuzz import test_indexed as indexed
from tests.fuzz import test_teachers as teachers
from tests.fuzz import test_yaml as settings
from tests.fuzz.kit import said, to_json, with_file

Use = Callable[[bytes], str | None]


class Door(NamedTuple):
    """A use of foreign bytes; it returns the line with which they were refused."""

    use: Use
    seeds: Sequence[bytes]
    kind: str = "bytes"
    """Or `json`, `yaml`: what is also changed value by value."""


def indexes(root: Path) -> list[Door]:
    """Make the door of `.idx` files."""
    prefix = root / "tokens"
    indexed.write_token_files(prefix, indexed.DOCUMENTS)
    return [_file(root, "tokens.idx", lambda: indexed.use_in_every_way(prefix))]


def manifests(root: Path) -> list[Door]:
    """Make the doors of manifests, of journals and of files that name data sets."""
    root = records.write_inputs(root)
    killed = [records.killed_files(root, while_installing=value) for value in (False, True)]

    def journal(files: records.Killed) -> Door:
        return Door(lambda data: records.go_on(root, files, data), [files["journal.json"]], "json")

    def blends(data: bytes) -> str | None:
        return records.use_data_file("per_split_data_args_path", data, root / "blends")

    return [
        Door(
            lambda data: records.use_manifest(data, root, root / "copy"),
            [records.manifest_of(root)[1]],
            "json",
        ),
        *map(journal, killed),
        Door(blends, [to_json(records.BLENDS)], "json"),
    ]


def configs(root: Path) -> list[Door]:
    """Make the door of `--config` files."""
    honest = yaml.safe_dump(settings.VALUES).encode()
    odd = [honest + snippet.encode("utf-8", "surrogatepass") for snippet in settings.SNIPPETS]
    return [Door(lambda data: settings.use(data, root / "run.yaml"), [honest, *odd], "yaml")]


def metadata(root: Path) -> list[Door]:
    """Make the doors of a checkpoint's pickles and tables."""
    with RankPool(1) as pool:
        run = checkpoints.write_run(root / "run", pool)
    directory = Path(shutil.copytree(run, root / "copy")) / "iter_0000001"

    def resume() -> str | None:
        return checkpoints.resume(directory, run)

    def extra_state(data: bytes) -> str | None:
        state = {"a._extra_state": torch.from_numpy(np.frombuffer(data, np.uint8).copy())}
        return said(lambda: check_extra_states([state], directory), directory)

    common = (directory / "common.pt").read_bytes()
    random_state = io.BytesIO()
    torch.save([np.random.get_state(), torch.arange(6)], random_state)
    recipe = b"ctransformer_engine.common.recipe\nDelayedScaling\n)R}X\x06\x00\x00\x00marginK\x00sb."
    return [
        _file(directory, ".metadata", lambda: said(lambda: read_metadata(directory), directory)),
        _file(directory, "common.pt", resume),
        Door(
            lambda data: with_file(directory, "common.pt", _packed(common, data), lambda _: resume()),
            [_pickle_of(common), _pickle_of(random_state.getvalue())],
        ),
        _file(directory, "metadata.json", resume, "json"),
        Door(extra_state, [recipe, pickle.dumps({"scale": [1.0]}, protocol=4)]),
    ]


def hf_configs(root: Path) -> list[Door]:
    """Make the doors of a Hugging Face directory."""
    honest = teachers.write_teacher(root / "honest")
    sharded = teachers.write_sharded(honest)
    weights = (honest / SINGLE_FILE).read_bytes()
    end = 8 + int.from_bytes(weights[:8], "little")

    def start(data: bytes) -> str | None:
        return with_file(honest, SINGLE_FILE, data + weights[end:], teachers.load)

    def header(data: bytes) -> str | None:
        return start(len(data).to_bytes(8, "little") + data)

    return [
        _file(honest, "config.json", lambda: teachers.load(honest), "json"),
        Door(header, [weights[8:end]], "json"),
        Door(start, [weights[:end]]),
        _file(sharded, INDEX_FILE, lambda: teachers.load(sharded), "json"),
        *(
            _file(honest, name, lambda: teachers.tokenize(honest), "json")
            for name in ("tokenizer.json", "tokenizer_config.json")
        ),
    ]


DOORS: Mapping[str, Callable[[Path], list[Door]]] = {
    "idx": indexes,
    "manifest": manifests,
    "yaml": configs,
    "metadata": metadata,
    "hf-config": hf_configs,
}


def _file(directory: Path, name: str, use: Callable[[], str | None], kind: str = "bytes") -> Door:
    seed = (directory / name).read_bytes()
    return Door(lambda data: with_file(directory, name, data, lambda _: use()), [seed], kind)


def _pickle_of(file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def _packed(file: bytes, pickled: bytes) -> bytes:
    """Return a file of torch with another pickle; zip files keep a sum of it, which random bytes never meet."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, pickled if name.endswith("/data.pkl") else source.read(name))
    return target.getvalue()
