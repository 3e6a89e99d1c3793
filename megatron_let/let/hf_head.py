"""The LM head of a `transformers` model on states that are there already: with its scale, cap and bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron_let.let.hf_blocks import body_name


class HFHead:
    """The causal language model around a body, the body replaced by what it has given.

    The head's own forward is run, since families scale, cap or shift their logits each in their way.
    """

    def __init__(self, model: Any) -> None:
        """Take the body out of `model`; the caller holds it."""
        self._given = _Given()
        setattr(model, body_name(model), self._given)
        self._model = model.eval().requires_grad_(False)

    def __call__(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits [n, l, v] of the last layer's `states` [n, l, d_t] at `tokens` [n, l]."""
        self._model.to(states.device)
        self._given.outputs = _Outputs(states)
        try:
            logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        finally:
            self._given.outputs = None
        return logits


class _Outputs:
    """What a body returns, with the last state alone; whatever else is asked for is None."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands where the body stood."""

    outputs: _Outputs | None = None

    def forward(self, *inputs: Any, **settings: Any) -> _Outputs | None:
        """Return what the body gave before."""
        return self.outputs

    @property
    def decoder(self) -> _Given:
        """Return itself: some models reach into their body."""
        return self
