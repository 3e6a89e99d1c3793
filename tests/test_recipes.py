"""The recipes: their flags are a run that this program accepts on their GPUs, of the size that they name."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.config.batches import batch_plan, padded_vocab_size, train_iterations
from megatron_let.config.checks.rules import Packages
from megatron_let.config.derive import resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.testing.distributed import RankPool, _free_port
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    assert_bitwise,
    model_tensors,
    numbers,
    train,
)
from megatron_let.training.arguments import parse_arguments
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[1]
ON_A_GPU_MACHINE = Packages(transformer_engine=True, apex=True)
SMOLLM_IDS, LLAMA_3_IDS = 49_152, 128_256


def recipe(name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe from another directory, with these variables alone beside the machine's own."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / f"pretrain_let_{name}.sh"), *words],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def command(name: str, *words: str, **variables: str) -> tuple[list[str], list[str]]:
    """Return what a recipe would start: the words up to the program, and the program's."""
    paths = (
        {} if name == "tiny" else {"DATA": "data/pile", "TEACHER": "teachers/a teacher", "SAVE": "runs/a run"}
    )
    done = recipe(name, *words, DRY_RUN="1", **{**paths, **variables})
    assert (done.returncode, done.stderr) == (0, "")
    everything = shlex.split(done.stdout)
    program = everything.index(str(ROOT / "pretrain_let.py"))
    assert everything[0] == sys.executable
    return everything[1:program], everything[program + 1 :]


def parameters(config: RunConfig, vocab_size: int) -> int:
    """Return the parameters of a student with RMSNorm, SwiGLU, no biases and an output layer of its own."""
    t = config.transformer
    attention = 2 * t.hidden_size * t.kv_channels * (t.num_attention_heads + t.num_query_groups)
    layer = attention + 3 * t.hidden_size * t.ffn_hidden_size + 2 * t.hidden_size
    return t.num_layers * layer + t.hidden_size + 2 * vocab_size * t.hidden_size


RECIPES = {
    "1p4b": ("1p4b", 8, {}, SMOLLM_IDS, 1.42e9),
    "1p4b on 4 nodes": ("1p4b", 32, {"NNODES": "4"}, SMOLLM_IDS, 1.42e9),
    "3b": ("3b", 8, {}, SMOLLM_IDS, 3.25e9),
    "7b": ("7b", 32, {}, LLAMA_3_IDS, 7.53e9),
    "7b in FP8": ("7b", 32, {"PRECISION": "fp8"}, LLAMA_3_IDS, 7.53e9),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_is_a_run_of_its_size_on_its_gpus(case: str) -> None:
    name, world_size, changes, ids, size = RECIPES[case]
    node = {"NODE_RANK": "0", "MASTER_ADDR": "node-a"}
    launch, flags = command(name, **node, **changes)
    assert launch[:2] == ["-m", "megatron_let.launch"]
    nodes = int(launch[launch.index("--nnodes") + 1]) if "--nnodes" in launch else 1
    assert nodes * int(launch[launch.index("--nproc-per-node") + 1]) == world_size
    config = resolve(parse_arguments(flags), world_size, ON_A_GPU_MACHINE)
    assert config.let.let_teacher_load == config.tokenizer.tokenizer_model == "teachers/a teacher"
    iterations = train_iterations(config, world_size)
    assert iterations * batch_plan(config, world_size).full * config.model.seq_length > 20e9
    assert (config.transformer.fp8 is not None) == ("PRECISION" in changes)
    padded = padded_vocab_size(
        ids, config.model.make_vocab_size_divisible_by, config.transformer.tensor_model_parallel_size
    )
    # Half of the last digit that the recipe's comment gives.
    assert parameters(config, padded) == pytest.approx(size, abs=0.005e9)


def test_parameters_are_counted_as_a_student_has_them(pool: RankPool, tmp_path: Path) -> None:
    argv = arguments(TINY_STUDENT, {"--mock-data": None, "--train-iters": 1, "--save": tmp_path})
    pool.run(1, train, argv)
    stored = model_tensors(tmp_path / "iter_0000001")
    assert sum(tensor.numel() for tensor in stored.values()) == parameters(parse_arguments(argv), 72)


@pytest.mark.parametrize("name", ["1p4b", "3b", "7b"])
def test_without_its_teacher_a_recipe_is_the_same_run_otherwise(name: str) -> None:
    node = {"NODE_RANK": "0", "MASTER_ADDR": "node-a"}
    guided, plain = (parse_arguments(command(name, LET=let, **node)[1]) for let in ("on", "off"))
    assert guided.let.is_on
    assert not plain.let.is_on
    assert {**guided.to_dict(), "let": None} == {**plain.to_dict(), "let": None}


def test_on_several_nodes_each_is_told_its_number_and_the_first_ones_address() -> None:
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a", "GPUS_PER_NODE": "4"}
    launch, _ = command("3b", **node)
    assert launch == [
        *("-m", "megatron_let.launch", "--nproc-per-node", "4", "--nnodes", "2", "--node-rank", "1"),
        *("--master-addr", "node-a", "--master-port", "29500"),
    ]


def test_under_srun_the_recipe_is_one_rank() -> None:
    assert command("7b", LAUNCHER="srun")[0] == []


def test_arguments_are_added_and_win_and_a_blend_is_taken_apart() -> None:
    _, flags = command("1p4b", "--lr", "1e-4", "--seed", "7", DATA="0.3 a 0.7 b", CACHE="/local/cache")
    config = parse_arguments(flags)
    assert (config.optimizer.lr, config.training.seed) == (1e-4, 7)
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.data.data_cache_path == "/local/cache"


GIVEN = {"DATA": "a", "TEACHER": "t", "SAVE": "s"}
MISTAKES = {
    "no data": ("1p4b", {"DATA": ""}, "DATA is not set: the prefix of data"),
    "no teacher": ("3b", {"TEACHER": ""}, "TEACHER is not set: the Hugging Face directory of SmolLM"),
    "no save": ("7b", {"SAVE": ""}, "SAVE is not set: a directory for checkpoints"),
    "no node": ("7b", {}, "NODE_RANK is not set: with NNODES=4 each node needs its number, 0 to 3"),
    "no address": ("7b", {"NODE_RANK": "0"}, "MASTER_ADDR is not set: with NNODES=4 the nodes meet"),
    "precision": ("7b", {"PRECISION": "fp4"}, "PRECISION=fp4 is not known; allowed: bf16 fp8"),
    "launcher": ("1p4b", {"LAUNCHER": "mpi"}, "LAUNCHER=mpi is not known; allowed: torchrun srun"),
    "LET": ("1p4b", {"LET": "no"}, "LET=no is not known; allowed: on off"),
    "tiny without save": ("tiny", {"SAVE": ""}, "SAVE is not set"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(mistake: str) -> None:
    name, changes, message = MISTAKES[mistake]
    done = recipe(name, **{**GIVEN, **changes})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_two_nodes_train_what_one_node_trains(tmp_path: Path, pool: RankPool) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    _, flags = command("tiny", "--train-iters", "3", SAVE=str(one))
    shared = {
        **os.environ,
        **{"PYTHON": sys.executable, "SAVE": str(two), "NNODES": "2", "GPUS_PER_NODE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())},
    }
    nodes = [
        subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "pretrain_let_tiny.sh"), "--train-iters", "3"],
            env={**shared, "NODE_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("1", "0")
    ]
    try:
        printed = [node.communicate(timeout=HANG_SECONDS)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], printed
    pool.run(2, train, flags)
    assert numbers(one) == numbers(two)
    assert_bitwise(one, two, 3)
