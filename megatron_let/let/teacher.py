"""What LET needs from a teacher, and how rows of training tokens are cut into what it can read.

A teacher is frozen, sees tokens and gives one vector per token. It is deliberately no `torch.nn.Module`: nothing can
register it as part of the student, so it is never in a checkpoint, an optimizer or a gradient buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_let.errors import ConfigError
from megatron_let.let.own_loss import LmHead


class Teacher(ABC):
    """A frozen causal language model that turns token ids into states of one layer."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width d_t of the states."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids must be below it."""

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Longest sequence it can read, in tokens; None without a limit."""

    @property
    @abstractmethod
    def description(self) -> str:
        """One line that identifies the teacher in logs and errors: path, layer, size."""

    @abstractmethod
    def states(self, tokens: Tensor) -> Tensor:
        """Return the states [n, l, d_t] of `tokens` [n, l], without gradient, in the teacher's dtype.

        Every row is a sequence of its own, positions from 0. Attention is causal and unmasked, so whatever stands
        right of a token does not change its state: rows of different length may be padded on the right with any
        valid id. l is at most `context_length`.
        """

    def take_lm_head(self) -> LmHead | None:
        """Return what makes logits of this teacher's states and let go of it: None the second time.

        None, too, where there is none: states of a middle layer, weights without an LM head.
        """
        return None

    @abstractmethod
    def to(self, device: torch.device | str) -> Teacher:
        """Move the weights to `device` in place and return the teacher."""

    @abstractmethod
    def parameters(self) -> Iterator[Tensor]:
        """Return the weights, none of which requires a gradient."""


def check_layer(directory: Path, layer: int | None, num_layers: int) -> None:
    """Raise ConfigError when the teacher in `directory` has no layer `layer` (1-based; None is the last)."""
    if layer is not None and not 1 <= layer <= num_layers:
        raise ConfigError(
            f"--let-teacher-layer {layer}: the teacher in {directory} has layers 1 to {num_layers}; "
            "leave the flag out for the last"
        )


def segment_states(teacher: Teacher, tokens: Tensor, document_starts: Tensor | None = None) -> Tensor:
    """Return the teacher's states [b, s, d_t] of `tokens` [b, s], cut into segments that it reads one by one.

    A segment starts at a row's first token, at a document's first token, and wherever the context length is used up.
    Within it positions count from 0 and nothing before it is seen.

    Args:
        teacher: gives the states; its dtype and device are kept.
        tokens: [b, s] ids.
        document_starts: [b, s] bool, True at the first token of a document, where the student's attention mask is
            reset; None when the student sees whole rows. Best given on the CPU: segment bounds are made there, and a
            CUDA tensor costs one synchronisation.
    """
    num_rows, length = tokens.shape
    window = min(length, teacher.context_length or length)
    if document_starts is not None:
        assert document_starts.shape == tokens.shape, "document_starts must have the shape of tokens"
        is_start = document_starts.detach().to("cpu", torch.bool)
        if is_start[:, 1:].any():
            return _scatter_segments(teacher, tokens, _cut(is_start, window))
    if window == length:
        return teacher.states(tokens)
    if length % window == 0:
        states = teacher.states(tokens.reshape(-1, window))  # [b * s / window, window, d_t]
        return states.reshape(num_rows, length, -1)
    whole = length - length % window
    head = segment_states(teacher, tokens[:, :whole])
    return torch.cat([head, teacher.states(tokens[:, whole:])], dim=1)


@dataclass(frozen=True)
class _Segments:
    """Segments in the order of the flattened tokens; both [number of segments], int64, CPU."""

    starts: Tensor
    """Index of the first token in the flattened [b * s] tokens."""

    lengths: Tensor


def _cut(document_starts: Tensor, window: int) -> _Segments:
    """Cut rows at document starts and again every `window` tokens within a document."""
    num_rows, length = document_starts.shape
    is_start = document_starts.detach().to("cpu", torch.bool, copy=True)
    is_start[:, 0] = True
    positions = torch.arange(
        num_rows * length
    )  # of the flattened tokens; rows never join: column 0 is a start
    starts = torch.where(is_start.flatten(), positions, 0).cummax(0).values  # start of each token's document
    cuts = positions[(positions - starts) % window == 0]
    ends = torch.cat([cuts[1:], torch.tensor([num_rows * length])])
    return _Segments(cuts, ends - cuts)


def _scatter_segments(teacher: Teacher, tokens: Tensor, segments: _Segments) -> Tensor:
    """Run segments in batches of similar length and put the states back in place, [b, s, d_t].

    A batch holds the lengths from 2^(i-1) + 1 to 2^i, padded to its longest: less than half of it is padding.
    """
    flat_tokens, device = tokens.reshape(-1), tokens.device
    output: Tensor | None = None
    powers = torch.ceil(torch.log2(segments.lengths.double()))
    for power in powers.unique():
        chosen = powers == power
        source, target = _batch_indices(segments.starts[chosen], segments.lengths[chosen])
        states = teacher.states(flat_tokens[source.to(device)]).flatten(0, 1)  # [n * l, d_t]
        if output is None:
            output = states.new_empty(tokens.numel(), states.shape[-1])
        kept = torch.nonzero(target.flatten() >= 0).flatten()
        output.index_copy_(0, target.flatten()[kept].to(device), states.index_select(0, kept.to(device)))
    assert output is not None, "there is at least one segment"
    return output.view(*tokens.shape, -1)


def _batch_indices(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return for n segments the flat token index to read and the one to write, each [n, l], -1 where padded.

    Padding repeats the segment's last token: an id that is valid for sure.
    """
    offsets = torch.arange(int(lengths.max()))
    source = starts[:, None] + torch.minimum(offsets[None, :], lengths[:, None] - 1)
    return source, torch.where(offsets[None, :] < lengths[:, None], source, -1)
