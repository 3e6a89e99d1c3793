"""Ranks on different nodes that see different files under the same names are refused before they train."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_let.errors import ConfigError
from megatron_let.mcore import parallel
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from megatron_let.testing.training import TINY_STUDENT, arguments, refusal, write_token_files
from megatron_let.training.node_agreement import NodeFacts, require_agreement

DOCUMENTS = [list(range(number, number + 40)) for number in range(20)]


def facts(rank: int, **values: str) -> NodeFacts:
    return NodeFacts(rank, f"node{rank}", values)


def test_nodes_that_see_the_same_agree_and_other_ranks_are_not_asked() -> None:
    require_agreement([facts(0, data="a"), None, facts(2, data="a"), None])


def test_what_differs_is_named_with_rank_and_host() -> None:
    with pytest.raises(ConfigError) as caught:
        require_agreement([facts(0, data="a", tokenizer="t"), None, facts(2, data="b", tokenizer="t")])
    assert str(caught.value) == (
        "rank 2 on node2 sees another data (b, there a) than rank 0 on node0; give all nodes the same files"
    )


def test_what_only_one_node_has_is_a_difference() -> None:
    with pytest.raises(ConfigError, match=r"another teacher \(none, there x\)"):
        require_agreement([facts(0, teacher="x"), facts(1)])


def refusal_on_own_node(root: Path, argv: list[str]) -> str | None:
    """Run as the one rank of a node of its own, in a directory that other nodes do not see."""
    rank = os.environ["RANK"]
    before, name, local = os.getcwd(), socket.gethostname, os.environ["LOCAL_RANK"]
    os.chdir(root / f"node{rank}")
    os.environ["LOCAL_RANK"] = "0"
    socket.gethostname = lambda: f"node{rank}"
    try:
        return refusal(argv)
    finally:
        os.chdir(before)
        os.environ["LOCAL_RANK"] = local
        socket.gethostname = name


def write_nodes(root: Path) -> None:
    """Write the same data and teacher for two nodes."""
    for name in ("node0", "node1"):
        (root / name).mkdir()
        write_token_files(root / name / "data", DOCUMENTS)
        write_tiny_teacher("llama", root / name / "teacher")


def other_ids(node: Path) -> None:
    write_token_files(node / "data", [*DOCUMENTS[:-1], [59] * 40])


def smaller_data(node: Path) -> None:
    write_token_files(node / "data", DOCUMENTS[:-1])


def no_data(node: Path) -> None:
    (node / "data.bin").unlink()


def other_teacher(node: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(node / "teacher" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, node / "teacher" / "model.safetensors", metadata={"format": "pt"})


SPOILT: dict[str, tuple[Any, str]] = {
    "the same": (lambda node: None, ""),
    "other ids": (other_ids, "rank 1 on node1 sees another data set data ("),
    "smaller data": (smaller_data, "rank 1 on node1 sees another data set data ("),
    "no data": (no_data, "rank 1 on node1: "),
    "other teacher": (other_teacher, "rank 1 on node1 sees another teacher teacher ("),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_second_node_with_other_files_is_refused(kind: str, pool: RankPool, tmp_path: Path) -> None:
    spoil, expected = SPOILT[kind]
    write_nodes(tmp_path)
    spoil(tmp_path / "node1")
    changes = {
        "--data-path": "data",
        "--split": "100,0,0",
        "--train-iters": 1,
        "--let-teacher-load": "teacher",
        "--let-stop-iters": 1,
    }
    messages = pool.run(2, refusal_on_own_node, tmp_path, arguments(TINY_STUDENT, changes))
    assert messages[0] == messages[1]
    if kind == "the same":
        assert messages[0] is None
    else:
        assert str(messages[0]).startswith(expected)


def refusal_with_other_torch(argv: list[str]) -> str | None:
    """Run with another version of torch on rank 1, as its own word for it goes."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(parallel, "_versions", lambda: {"torch": "1.0", "numpy": "1"})
        return refusal(argv)


def test_another_version_on_a_node_is_refused(pool: RankPool) -> None:
    changes = {"--mock-data": None, "--train-iters": 1}
    message = pool.run(2, refusal_with_other_torch, arguments(TINY_STUDENT, changes))[0]
    assert message is not None
    assert (
        f"rank 1 was started with other settings than rank 0: megatron_let None (rank 0: {'0.1.0'})"
        in message
    )
    assert f"torch 1.0 (rank 0: {torch.__version__})" in message
    assert message.endswith(f"on {socket.gethostname()}; start all alike, with the same software")
