"""Padding ids of the vocabulary: no probability, no gradient, and no memory for saying so."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_let.mcore.model import _MaskedPadding


def test_padding_changes_neither_loss_nor_gradient_and_gets_none() -> None:
    torch.manual_seed(1)
    weights, labels = torch.randn(8, 6, requires_grad=True), torch.tensor([0, 4, 2])
    hidden = torch.randn(3, 6)
    loss = F.cross_entropy(_MaskedPadding.apply(hidden @ weights.T, 5), labels)
    loss.backward()
    whole = weights.detach()[:5].clone().requires_grad_()
    expected = F.cross_entropy(hidden @ whole.T, labels)
    expected.backward()
    assert weights.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weights.grad[:5], whole.grad)
    assert weights.grad[5:].abs().max() == 0.0


def test_neither_logits_nor_their_gradient_are_copied() -> None:
    seen: list[int] = []
    logits = torch.randn(4, 8, requires_grad=True) * 1.0
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    place = logits.data_ptr()
    masked = _MaskedPadding.apply(logits, 5)
    assert masked.data_ptr() == place
    gradient = torch.ones(4, 8)
    masked.backward(gradient)
    assert seen == [gradient.data_ptr()]
