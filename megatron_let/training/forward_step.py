"""One microbatch through one model chunk, with the language-model loss and, on its chunk, the alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from megatron_let.config.run_config import RunConfig
from megatron_let.mcore.batch import Microbatch, build_microbatch
from megatron_let.mcore.datasets import Sample
from megatron_let.mcore.model import unwrap
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.training.alignment import Alignment
from megatron_let.training.watchdog import Heartbeat

LM_LOSS = "lm loss"
LossReport = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, LossReport]]


def language_model_loss(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, LossReport]:
    """Return (sum, count, report) of `token_losses` [b, s] over `loss_mask` [b, s]; the schedule divides.

    The report holds [sum, count] in fp64, so that any number of microbatches adds up exactly.
    """
    counted = token_losses.float() * loss_mask
    loss_sum, count = counted.sum(), loss_mask.sum()
    report = torch.stack([loss_sum.detach().double(), count.double()])
    return loss_sum, count.int(), {LM_LOSS: report}


@dataclass(frozen=True)
class ForwardStep:
    """What Megatron's pipeline schedules call for each microbatch and model chunk."""

    config: RunConfig
    context: ParallelContext
    eod: int
    alignment: Alignment | None
    heartbeat: Heartbeat

    def needs_data(self, chunk: int) -> bool:
        """Return whether model chunk `chunk` of this rank reads tokens.

        The first chunk embeds them, the last scores them, the owner of layer k shows them to the teacher, and with
        `--reset-attention-mask` every chunk masks by document.
        """
        vp_stage = None if self.context.vp_size is None else chunk
        return (
            self.context.is_first_chunk(vp_stage)
            or self.context.is_last_chunk(vp_stage)
            or (self.alignment is not None and self.alignment.owner_chunk == chunk)
            or self.config.data.reset_attention_mask
        )

    def __call__(
        self, iterator: Iterator[Sample] | None, model: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        """Run `model` on the next microbatch; return its output and how to make the loss of it."""
        self.heartbeat.touch()
        chunk = unwrap(model).vp_stage or 0
        batch = self._next_microbatch(iterator) if self.needs_data(chunk) else None
        if self.alignment is not None:
            self.alignment.prepare(chunk, batch)
        if batch is None:
            return model(None, None, None), _no_loss
        output = model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels)
        return output, partial(language_model_loss, batch.loss_mask)

    def _next_microbatch(self, iterator: Iterator[Sample] | None) -> Microbatch:
        assert iterator is not None, "a chunk that needs data has an iterator"
        with self.heartbeat.reading():
            sample = next(iterator)
        return build_microbatch(
            sample["tokens"], sample["labels"], eod=self.eod, data=self.config.data, context=self.context
        )


def _no_loss(_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, LossReport]:
    raise AssertionError("only the last pipeline stage makes a loss")
