"""Data that cannot give what a run asks for is refused before anything is built, by all ranks alike."""

from __future__ import annotations

from pathlib import Path

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, refusal, write_token_files


def test_a_data_set_too_small_for_its_split_is_refused(pool: RankPool, tmp_path: Path) -> None:
    """megatron-core would look for samples in the empty split for ever."""
    write_token_files(tmp_path / "ten", [list(range(50))] * 10)
    changes = {"--data-path": tmp_path / "ten", "--eval-iters": 2}
    messages = pool.run(2, refusal, arguments(TINY_STUDENT, changes))
    assert messages[0] is not None
    assert messages[0] == messages[1]
    assert "the validation share of data set" in messages[0]
    assert "holds 0 tokens (--split 969,30,1)" in messages[0]
