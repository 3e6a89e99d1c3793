"""The blocks of a `transformers` body: where they are, how those above layer N are left out, what block N gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron_let.errors import ConfigError


class _Reached(Exception):
    """Ends a forward pass once the block that was asked for has spoken."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class BlockRunner:
    """Runs a body up to the last block that is left of it."""

    def __init__(self, body: nn.Module, blocks: nn.ModuleList) -> None:
        """Note the blocks of `body`; the last of them gives the states."""
        self._body, self._blocks = body, blocks

    def states(self, tokens: Tensor) -> Tensor:
        """Return the raw output [n, l, d] of the last block for `tokens` [n, l]; nothing after it is run."""
        hook = self._blocks[-1].register_forward_hook(_reach)
        try:
            self._body(input_ids=tokens, use_cache=False)
        except _Reached as reached:
            output = reached.output
        else:
            raise ConfigError(f"{self._name} never ran block {len(self._blocks)}: use its last layer")
        finally:
            hook.remove()
        return output[0] if isinstance(output, (tuple, list)) else output

    def check_order(self, tokens: Tensor) -> None:
        """Run `tokens` [n, l] once and see every block run once, in order.

        Raises:
            ConfigError: they do not, so that "the output of block N" is not the state after N layers.
        """
        ran: list[int] = []
        hooks = [
            block.register_forward_pre_hook(lambda block, inputs, number=number: ran.append(number))
            for number, block in enumerate(self._blocks)
        ]
        try:
            self.states(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        if ran != list(range(len(self._blocks))):
            raise ConfigError(f"{self._name} does not run its blocks one after the other: use its last layer")

    @property
    def _name(self) -> str:
        return f"--let-teacher-layer {len(self._blocks)}: {type(self._body).__name__}"


def _reach(block: nn.Module, inputs: Any, output: Any) -> None:
    raise _Reached(output)


def find_blocks(body: Any, num_layers: int) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the `num_layers` transformer blocks: the outermost module list of that length.

    Raises:
        ConfigError: there is none, or there are several.
    """
    found = [
        (name, module)
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    depth = min((name.count(".") for name, _ in found), default=0)
    outermost = [(name, blocks) for name, blocks in found if name.count(".") == depth]
    # the library names the classes of its blocks, as what must stay on one device
    block_classes = set(getattr(body, "_no_split_modules", None) or ())
    named = [
        (name, blocks)
        for name, blocks in outermost
        if {type(block).__name__ for block in blocks} & block_classes
    ]
    candidates = outermost if len(outermost) == 1 else named
    if len(candidates) != 1:
        raise ConfigError(
            f"--let-teacher-layer: {type(body).__name__} keeps its blocks in no list that we know; "
            "only its last layer can be used"
        )
    return candidates[0]


def drop_blocks(model: Any, num_layers: int, kept: int) -> None:
    """Leave blocks 1 to `kept` of `num_layers` in `model`, which was built whole: its arithmetic is that of all layers.

    What a block computes may depend on the number of layers, so the configuration stays what it is.

    Raises:
        ConfigError: as find_blocks.
    """
    name, blocks = find_blocks(body_of(model), num_layers)
    parent_name, _, attribute = name.rpartition(".")
    setattr(body_of(model).get_submodule(parent_name), attribute, blocks[:kept])
    names = {each for each, _ in model.named_parameters(remove_duplicate=False)}
    names |= {each for each, _ in model.named_buffers(remove_duplicate=False)}
    # ties of what is gone; from_pretrained would look for them
    for owner, prefix in ((model, ""), (body_of(model), body_prefix(model))):
        owner.all_tied_weights_keys = {
            target: source
            for target, source in owner.all_tied_weights_keys.items()
            if f"{prefix}{target}" in names and f"{prefix}{source}" in names
        }


def body_name(model: Any) -> str:
    """Return the attribute under which a `transformers` model keeps its body; empty where it has no head."""
    from transformers import PreTrainedModel

    name = str(model.base_model_prefix)
    if name in dict(model.named_children()):
        return name
    if model.get_output_embeddings() is None:
        return ""
    # some kinds name the prefix of a larger model that they are a part of
    inner = [child for child, module in model.named_children() if isinstance(module, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else ""


def body_of(model: Any) -> Any:
    """Return the body of a `transformers` model, which is the model itself where it has no head."""
    return model.get_submodule(body_name(model))


def body_prefix(model: Any) -> str:
    """Return what the names of the body's weights begin with."""
    name = body_name(model)
    return f"{name}." if name else ""
