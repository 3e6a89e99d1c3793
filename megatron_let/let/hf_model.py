"""Build or load what a Hugging Face directory describes: all of it, or its first blocks with the arithmetic of all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from megatron_let.let.hf_blocks import body_of, body_prefix, drop_blocks, find_blocks
from megatron_let.let.hf_files import config_error, quiet_transformers, stored_shapes

LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    AssertionError,
    ArithmeticError,
    IndexError,
)
"""What `transformers` raises for a directory it cannot make a model of."""

# Tensors that older versions of the library wrote and newer ones compute: name, and sizes (None: any). A bias of that
# name would be a weight, so the sizes count too.
_OLD_BUFFERS: tuple[tuple[str, tuple[tuple[int | None, ...], ...]], ...] = (
    (r"\.(attn|attention|crossattention)\.(bias|causal_mask)", ((1, 1, None, None),)),
    (r"\.masked_bias", ((), (1,))),
    (r"\.inv_freq", ((None,),)),
    (r"\.(cos|sin)_cached", ((None, None), (1, 1, None, None))),
    (r"(.*\.)?position_ids", ((None,), (1, None))),
    (r"(.*\.)?decoder\.version", ((1,),)),
)


def build_empty(config: Any, *, dtype: torch.dtype | None = None, trust_remote_code: bool) -> Any:
    """Build the whole model that `config` describes on the meta device, with its LM head where it has one."""
    with quiet_transformers(), torch.device("meta"):
        return _auto_class(config, trust_remote_code=trust_remote_code).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )


def _auto_class(config: Any, *, trust_remote_code: bool) -> Any:
    """Return the library's class of causal language models, or of bare bodies for a kind that has no other."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM

    own_code = getattr(config, "auto_map", None) if trust_remote_code else None
    if own_code:
        return AutoModelForCausalLM if AutoModelForCausalLM.__name__ in own_code else AutoModel
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel


def load_model(
    directory: Path, config: Any, kept: int | None, *, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, bool]:
    """Load the model from the directory's weights with blocks 1 to `kept` (None: all) on the CPU.

    The blocks above are neither read nor given memory. Returned beside the model: whether its LM head was filled too.

    Raises:
        ConfigError: it cannot be built, or the weights do not fill the body, or it has no place for some of them.
    """
    num_layers = config.num_hidden_layers
    try:
        kind = type(build_empty(config, trust_remote_code=trust_remote_code))
        with quiet_transformers():
            model, report = (kind if kept is None else _cut_kind(kind, num_layers, kept)).from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        raise config_error(directory, "cannot be loaded", error) from error
    return model, _check_report(directory, model, report, kept)


def _cut_kind(kind: type[Any], num_layers: int, kept: int) -> type[Any]:
    """Return a class of models that are built like `kind`, whole, and lose the upper blocks before they are filled."""

    def build_and_cut(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        drop_blocks(self, num_layers, kept)

    # the same name and module: the library looks things up by them
    return type(kind.__name__, (kind,), {"__init__": build_and_cut, "__module__": kind.__module__})


def _check_report(directory: Path, model: Any, report: dict[str, Any], kept: int | None) -> bool:
    """Refuse weights that leave the body unset or that it has no place for; return whether the head is set too."""
    missing = sorted(report["missing_keys"])
    in_body = [key for key in missing if key.startswith(body_prefix(model))]
    if in_body:
        raise config_error(
            directory,
            f"lacks {len(in_body)} of the model's weights, among them {in_body[0]}: not this model's file",
        )
    mismatched = sorted(str(entry) for entry in report["mismatched_keys"])
    if mismatched:
        raise config_error(
            directory, f"holds weights of another shape than config.json says: {mismatched[0]}"
        )
    surplus = sorted(key for key in report["unexpected_keys"] if _is_in_body(key, model, kept))
    if surplus:
        shapes = {_inner_name(key, model): shape for key, shape in stored_shapes(directory).items()}
        surplus = [
            key for key in surplus if not is_old_buffer(f".{key}", shapes.get(_inner_name(key, model)))
        ]
    if surplus:
        raise config_error(
            directory,
            f"holds {len(surplus)} weights that config.json gives no place, among them {surplus[0]}",
        )
    return bool(body_prefix(model)) and not missing


def is_old_buffer(name: str, shape: tuple[int, ...] | None) -> bool:
    """Return whether a stored tensor is one that the library wrote once and computes today."""
    return shape is not None and any(
        re.search(rf"{pattern}$", name)
        and any(
            len(sizes) == len(shape) and all(a in (None, b) for a, b in zip(sizes, shape, strict=True))
            for sizes in allowed
        )
        for pattern, allowed in _OLD_BUFFERS
    )


def _is_in_body(key: str, model: Any, kept: int | None) -> bool:
    """Return whether an unused weight belongs to the body: not to a head, nor to a block left out on purpose."""
    body, name = body_of(model), _inner_name(key, model)
    if name == key and name.split(".")[0] not in {child for child, _ in body.named_children()}:
        return False
    if kept is None:
        return True
    block_list, _ = find_blocks(body, kept)
    index = name.removeprefix(f"{block_list}.").split(".")[0]
    is_left_out = name.startswith(f"{block_list}.") and index.isdecimal() and int(index) >= kept
    return not is_left_out


def _inner_name(key: str, model: Any) -> str:
    """Return the name of a weight within the body; files may hold it with or without the body's prefix."""
    return key.removeprefix(body_prefix(model) or f"{model.base_model_prefix}.")
