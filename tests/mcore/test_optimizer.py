"""Parameter groups: what has weight decay."""

from __future__ import annotations

from megatron_let.config.derive import resolve
from megatron_let.mcore.model import build_student
from megatron_let.mcore.optimizer import build_optimizer
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments


def test_embeddings_keep_their_weight_decay_whatever_their_first_values(one_process: ParallelContext) -> None:
    changes = {"--mock-data": None, "--embedding-init-method-std": 1.0}
    config = resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)
    student = build_student(config, one_process, vocab_size=61, padded_vocab_size=72)
    names = {parameter: name for name, parameter in student.gpt_chunks[0].named_parameters()}
    groups = build_optimizer(config, student).param_groups
    decayed = {
        names[parameter] for group in groups if group["wd_mult"] == 1.0 for parameter in group["params"]
    }
    assert decayed == {name for parameter, name in names.items() if parameter.dim() > 1}
    assert "embedding.word_embeddings.weight" in decayed
