"""One iteration of LET computed without any of our code: Hugging Face models, a few lines of torch, autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_let.testing.hf_students import Twin

TeacherStates = Callable[[torch.Tensor], torch.Tensor]
"""tokens [s] of one row -> states [s, d_t]."""


@dataclass(frozen=True)
class Expected:
    """What the iteration must give; losses over all counted tokens, gradients by Hugging Face's names."""

    lm_loss: float
    let_loss: float
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """The iteration: samples [n, s] in microbatches, the mask of counted tokens, LET's settings."""

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    micro_batch_size: int
    weight: float
    student_layer: int
    is_per_token: bool = False
    eod: int | None = None  # set: documents end with this token and do not see each other


def compute(problem: Problem, twin: Twin, teacher_states: TeacherStates) -> Expected:
    """Run forward and backward of the iteration as the definition says (arXiv 2602.05393)."""
    sums = [_row_sums(problem, twin, teacher_states, row) for row in range(len(problem.tokens))]
    nll, alignment, count = (torch.stack(column) for column in zip(*sums, strict=True))  # [n] each
    total = nll + problem.weight * alignment
    if problem.is_per_token:
        objective = total.sum() / count.sum()
    else:
        size = problem.micro_batch_size
        pairs = zip(total.split(size), count.split(size), strict=True)
        objective = torch.stack([t.sum() / c.sum().clamp_min(1) for t, c in pairs]).mean()
    twin.model.zero_grad()
    objective.backward()
    return Expected(
        lm_loss=float(nll.detach().sum() / count.sum()),
        let_loss=float(alignment.detach().sum() / count.sum()),
        gradients={name: p.grad.clone() for name, p in twin.model.named_parameters()},
    )


def _row_sums(
    problem: Problem, twin: Twin, teacher_states: TeacherStates, row: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sums over one row's counted tokens: L_NLL, L_proj, and their number."""
    tokens, mask = problem.tokens[row], problem.mask[row]
    logits, hidden, states = [], [], []
    for piece in documents(tokens, problem.eod):
        piece_logits, piece_hidden = _run_student(twin, tokens[piece], problem.student_layer)
        logits.append(piece_logits)
        hidden.append(piece_hidden)
        states.append(teacher_states(tokens[piece]))
    token_losses = F.cross_entropy(torch.cat(logits), problem.labels[row], reduction="none")  # [s]
    student = torch.cat(hidden)  # [s, d]
    teacher = interpolate(torch.cat(states), student.shape[-1])  # [s, d]
    cosine = (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)  # [s]
    return (token_losses * mask).sum(), -(cosine * mask).sum(), mask.sum()


def documents(tokens: torch.Tensor, eod: int | None) -> Iterator[slice]:
    """Yield the documents of a row, each with its end-of-document token; the whole row when `eod` is None."""
    start = 0
    for position, token in enumerate(tokens.tolist()):
        if token == eod:
            yield slice(start, position + 1)
            start = position + 1
    if start < len(tokens):
        yield slice(start, len(tokens))


def _run_student(twin: Twin, tokens: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [l, vocabulary] and the raw output [l, d] of block `layer` (1-based)."""
    seen: list[Any] = []
    hook = twin.blocks[layer - 1].register_forward_hook(lambda block, inputs, output: seen.append(output))
    logits = twin.model(tokens[None]).logits[0]
    hook.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return logits, output.view(-1, output.shape[-1])


def interpolate(states: torch.Tensor, width: int) -> torch.Tensor:
    """Resample each state [s, d_t] linearly at the centres of `width` equal cells, as align_corners=False does."""
    points = np.clip((np.arange(width) + 0.5) * states.shape[-1] / width - 0.5, 0, states.shape[-1] - 1)
    rows = [np.interp(points, np.arange(states.shape[-1]), row) for row in states.double().numpy()]
    return torch.from_numpy(np.stack(rows)).float()


def hf_teacher(directory: Path, layer: int | None = None, window: int | None = None) -> TeacherStates:
    """Return the states of a Hugging Face model: block `layer`'s output, or the last hidden state."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    return states_of(model, layer, window)


def states_of(model: Any, layer: int | None = None, window: int | None = None) -> TeacherStates:
    """Return the states of a model in memory; rows are read `window` tokens at a time."""

    @torch.no_grad()
    def states(tokens: torch.Tensor) -> torch.Tensor:
        pieces = []
        for piece in tokens.split(window or len(tokens)):
            outputs = model.base_model(piece[None], output_hidden_states=True)
            whole = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
            pieces.append(whole[0])
        return torch.cat(pieces)

    return states
